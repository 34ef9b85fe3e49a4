//! A state that rots while its node runs.

use super::faulty::Rot;
use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_that_rots_while_it_is_in_use_ends_the_node_and_the_next_start_makes_it_again() {
    goes_bad(Rot::Flips, "does not verify").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_that_the_disk_cannot_read_any_more_is_made_again_as_well() {
    goes_bad(Rot::Unreadable, "does not give back").await;
}

async fn goes_bad(how: Rot, said: &str) {
    let mut nodes = Nodes::start(3, |_| {}).await;
    nodes.grow(40).await;
    let of = (nodes.leader().await + 1) % nodes.nodes.len();
    let node = &nodes.nodes[of];
    let aside = node.dir.join("state").join("damaged-00000000");
    // What is in memory only is in no page.
    node.bare().machine().flush().unwrap();
    node.switch.rot(how);
    let read = node.bare().machine().copy_to(&node.dir.join("copied"));
    let met = read.unwrap_err().to_string();
    assert!(met.contains(said), "{met}");
    let ended = tokio::time::timeout(DEADLINE, node.bare().failed()).await;
    let why = ended.expect("it goes on with a state that rots");
    assert!(why.contains(said), "{why}");
    assert!(!aside.exists());

    let disk = node.switch.clone();
    nodes.nodes[of].kill();
    // The disk is no better after a restart.
    nodes.nodes[of].switch = disk;
    nodes.nodes[of].start().await.unwrap();
    assert!(aside.exists(), "the start found nothing");
    assert_eq!(nodes.nodes[of].bare().machine().rot(), None);
    nodes.grow(5).await;
    nodes.agree().await;
}
