//! A node that is sent a snapshot: damaged ones, and its end in the middle of taking one in.

use super::*;

/// Kills a node, and lets the others go on until they cannot send it entries any more.
async fn leave_behind(nodes: &mut Nodes) -> usize {
    let leader = nodes.leader().await;
    let late = (leader + 1) % nodes.nodes.len();
    let had = nodes.nodes[late].applied();
    nodes.nodes[late].kill();
    let deadline = Instant::now() + DEADLINE;
    loop {
        nodes.grow(40).await;
        let leader = nodes.leader().await;
        if nodes.nodes[leader].purged() > had {
            return late;
        }
        assert!(Instant::now() < deadline, "the log is not cut");
    }
}

async fn catches_up(nodes: &Nodes, late: usize) {
    let leader = nodes.leader().await;
    let newest = nodes.nodes[leader].applied();
    until("it does not catch up", || {
        nodes.nodes[late].applied() >= newest
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_arrives_damaged_is_refused_and_asked_for_anew() {
    let mut nodes = Nodes::start(3, |_| {}).await;
    let late = leave_behind(&mut nodes).await;
    nodes.nodes[late].switch.harm(2);
    nodes.nodes[late].start().await.unwrap();
    catches_up(&nodes, late).await;
    assert_eq!(nodes.nodes[late].switch.harmed(), 2, "none was harmed");
    let metrics = nodes.nodes[late].bare().consensus().raft().metrics();
    assert!(metrics.borrow().running_state.is_ok());
    // Nothing of what was refused is left.
    let left = std::fs::read_dir(nodes.nodes[late].dir.join("snapshot")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 1, "{left:?}");
    nodes.grow(5).await;
    nodes.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_rots_at_the_leader_is_made_anew_when_it_is_refused() {
    let mut nodes = Nodes::start(3, |_| {}).await;
    let late = leave_behind(&mut nodes).await;
    let leader = nodes.leader().await;
    // Behind the leader's back: it has verified its snapshot, or written it itself.
    let dir = nodes.nodes[leader].dir.join("snapshot");
    let snapshots = || {
        let found = std::fs::read_dir(&dir).unwrap();
        let mut found: Vec<_> = found.map(|entry| entry.unwrap().path()).collect();
        found.retain(|path| path.extension().is_some_and(|e| e == "snap"));
        found
    };
    let rotten = snapshots().pop().unwrap();
    let mut bytes = std::fs::read(&rotten).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&rotten, bytes).unwrap();
    nodes.nodes[late].start().await.unwrap();
    catches_up(&nodes, late).await;
    nodes.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_ends_anywhere_while_a_snapshot_is_taken_in_comes_back() {
    let mut nodes = Nodes::start(3, |_| {}).await;
    let mut died = 0;
    for steps in 0.. {
        let late = leave_behind(&mut nodes).await;
        nodes.nodes[late].switch.die_at(steps);
        nodes.nodes[late].start().await.unwrap();
        let leader = nodes.leader().await;
        let newest = nodes.nodes[leader].applied();
        until("it neither dies nor catches up", || {
            let node = &nodes.nodes[late];
            node.switch.is_dead() || node.applied() >= newest
        })
        .await;
        let dead = nodes.nodes[late].switch.is_dead();
        nodes.nodes[late].kill();
        nodes.nodes[late].start().await.unwrap();
        catches_up(&nodes, late).await;
        nodes.agree().await;
        if !dead {
            break;
        }
        died += 1;
    }
    assert!(died >= 8, "only {died} steps");
}
