//! Programs of two ages in one cluster: what the newer one can do is not used before all can, and who stopped at what it does not know
//! goes on after its upgrade.

use super::*;
use qsfs_metad::node::is_damage;
use qsfs_proto::api::MetadError;

/// Life of a token that only the newer program makes: that is its new command.
const NEW_TTL_MS: u64 = 77_777;

fn level_of(command: &Command) -> u32 {
    match command {
        Command::Mutation(Mutation::CreateToken { ttl_ms, .. }) if *ttl_ms == NEW_TTL_MS => 2,
        known => known.feature_level(),
    }
}

const OLD: Program = Program { level: 1, level_of };
const NEW: Program = Program { level: 2, level_of };

fn new_command(number: u8) -> Command {
    Command::Mutation(Mutation::CreateToken {
        hash: [number; 32],
        role: Role::Agent,
        ttl_ms: NEW_TTL_MS,
    })
}

/// Tokens made by the new command, as a node has them.
fn made(node: &Node) -> usize {
    let machine = node.bare().machine();
    let tokens = machine.read(|state| state.tokens()).unwrap();
    tokens
        .iter()
        .filter(|token| token.role == Role::Agent)
        .count()
}

async fn upgrade(node: &mut Node) {
    node.kill();
    node.program = NEW;
    node.start().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_command_waits_for_all_and_who_does_not_know_it_goes_on_after_its_upgrade() {
    let mut nodes = Nodes::start(3, |node| {
        node.program = if node.id.0 < 3 { NEW } else { OLD };
    })
    .await;
    // The newer ones lead or follow: with an older member none of them proposes it.
    let refused = nodes.propose(new_command(101)).await;
    let Err(CallError::Refused(MetadError::Invalid(text))) = &refused else {
        panic!("{refused:?}")
    };
    assert!(text.contains("upgrade all of them first"), "{text}");
    nodes.grow(5).await;
    nodes.agree().await;

    upgrade(&mut nodes.nodes[2]).await;
    nodes.insist(new_command(102)).await;
    nodes.agree().await;
    assert!(nodes.nodes.iter().all(|node| made(node) == 1));

    // One that was left behind by mistake: the program was put back while it was down.
    let third = 2;
    let had = nodes.nodes[third].applied();
    nodes.nodes[third].kill();
    nodes.nodes[third].program = OLD;
    let opened = nodes.nodes[third].start().await.unwrap_err();
    assert!(
        opened.to_string().contains("start the newer program"),
        "{opened}"
    );
    assert!(!is_damage(&opened), "{opened}");
    assert!(nodes.nodes[third].dir.join("log").exists());

    upgrade(&mut nodes.nodes[third]).await;
    nodes.grow(5).await;
    nodes.insist(new_command(103)).await;
    nodes.agree().await;
    assert!(nodes.nodes[third].applied() > had);
    assert!(nodes.nodes.iter().all(|node| made(node) == 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_node_takes_no_entry_that_it_does_not_know_and_all_of_them_after_its_upgrade() {
    let mut nodes = Nodes::start(3, |node| node.program = NEW).await;
    nodes.insist(new_command(101)).await;
    nodes.agree().await;
    let leader = nodes.leader().await;
    let late = (leader + 1) % 3;
    nodes.nodes[late].kill();
    // What it said of itself still counts for a while.
    nodes.insist(new_command(102)).await;
    nodes.grow(3).await;

    // It knows what stands in its own log, and not what comes now.
    fn half_new(command: &Command) -> u32 {
        match command {
            Command::Mutation(Mutation::CreateToken { hash, .. }) if hash[0] == 102 => 2,
            known => known.feature_level(),
        }
    }
    nodes.nodes[late].program = Program {
        level: 1,
        level_of: half_new,
    };
    nodes.nodes[late].start().await.unwrap();
    let network = nodes.leader().await;
    let others: Vec<_> = (0..3).filter(|at| *at != late).collect();
    // It applies what it knows of its own log, once it hears from the leader how much of that is committed; and others go on.
    until("it does not apply what it knows", || {
        let metrics = nodes.nodes[late].bare().consensus().raft().metrics();
        let running = metrics.borrow().running_state.is_ok();
        running && made(&nodes.nodes[late]) > 0
    })
    .await;
    nodes.grow(5).await;
    assert!(others.contains(&network));
    assert_eq!(made(&nodes.nodes[late]), 1, "it guessed");
    let stood = nodes.nodes[late].applied();
    assert!(stood < nodes.nodes[network].applied());

    upgrade(&mut nodes.nodes[late]).await;
    nodes.agree().await;
    assert_eq!(made(&nodes.nodes[late]), 2);
}
