//! Bits flipped in what a stopped node keeps on disk: it comes back by its peers, or, when a majority is damaged, not at all.

use super::*;
use qsfs_proto::api::Member;
use qsfs_proto::client::Timing;

/// A small change that is easily counted.
async fn add_token(cluster: &Cluster, number: u8) {
    let create = Mutation::CreateToken {
        hash: [number; 32],
        role: Role::Client,
        ttl_ms: 3_600_000,
    };
    cluster.client.mutate(create).await.unwrap();
}

/// The tokens added so, as the leader has them.
async fn added(cluster: &Cluster) -> usize {
    let tokens = cluster
        .until("the tokens", |c| async move { c.tokens().await.ok() })
        .await;
    let client = |token: &&qsfs_proto::api::TokenInfo| token.role == Role::Client;
    tokens.iter().filter(client).count()
}

async fn member(cluster: &Cluster, address: &str) -> Option<Member> {
    let members = cluster.client.members().await.ok()?;
    members.into_iter().find(|member| member.address == address)
}

fn flip(path: &Path, at: impl Fn(usize) -> usize) {
    let mut bytes = std::fs::read(path).unwrap();
    // What is behind the last frame of a segment is reserved, zeros.
    let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[at(used)] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

fn segment(node: &Node) -> PathBuf {
    let mut found: Vec<_> = std::fs::read_dir(node.data.join("log"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "log"))
        .collect();
    found.sort();
    found.pop().unwrap()
}

/// Who the node is after it was damaged.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Comes {
    /// Its own log led to the state again.
    Back,
    /// It was renewed by its peers.
    AsAnother,
}

/// Damages a follower, starts it, and waits until three vote again; then it must carry a majority.
async fn heals_after(damage: impl Fn(&Node), comes: Comes) {
    let mut cluster = start().await;
    for number in 0..20 {
        add_token(&cluster, number).await;
    }
    let leader = cluster.leader().await;
    let (hurt, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let address = cluster.nodes[hurt].address.clone();
    let old = member(&cluster, &address).await.unwrap().id;
    cluster.nodes[hurt].kill();
    damage(&cluster.nodes[hurt]);
    add_token(&cluster, 20).await;
    cluster.nodes[hurt].restart();
    let deadline = Instant::now() + DEADLINE;
    loop {
        let found = member(&cluster, &address).await;
        let expected = |m: &Member| (m.id != old) == (comes == Comes::AsAnother);
        if found.is_some_and(|m| expected(&m) && m.voter && m.healthy) {
            break;
        }
        assert!(Instant::now() < deadline, "it did not come back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(
        cluster.client.members().await.unwrap().len(),
        3,
        "the old id is gone"
    );
    cluster.nodes[other].kill();
    add_token(&cluster, 21).await;
    cluster.nodes[leader].kill();
    cluster.nodes[other].restart();
    add_token(&cluster, 22).await;
    assert_eq!(added(&cluster).await, 23);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rot_in_the_middle_of_the_log_is_healed_by_the_peers() {
    heals_after(
        |node| flip(&segment(node), |used| used / 2),
        Comes::AsAnother,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_vote_is_healed_by_the_peers() {
    heals_after(
        |node| flip(&node.data.join("log/vote"), |used| used),
        Comes::AsAnother,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_log_is_healed_by_the_peers() {
    heals_after(
        |node| std::fs::remove_dir_all(node.data.join("log")).unwrap(),
        Comes::AsAnother,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_state_is_made_again_from_the_nodes_own_log() {
    let lose = |node: &Node| std::fs::remove_dir_all(node.data.join("state")).unwrap();
    heals_after(lose, Comes::Back).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_state_is_made_again_from_the_nodes_own_log() {
    let rot = |node: &Node| {
        let db = node.data.join("state/00000000/db");
        for part in [0, 3, 5, 7] {
            flip(&db, |used| used * part / 8);
        }
    };
    heals_after(rot, Comes::Back).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_majority_answers_nothing() {
    let mut cluster = start().await;
    for number in 0..20 {
        add_token(&cluster, number).await;
    }
    for node in &mut cluster.nodes {
        node.kill();
    }
    for node in &cluster.nodes[1..] {
        flip(&segment(node), |used| used / 2);
    }
    for node in &mut cluster.nodes {
        node.restart();
    }
    let timing = Timing {
        read: Duration::from_secs(4),
        mutation: Duration::from_secs(4),
        ..Timing::default()
    };
    let client = MetadClient::with_timing(
        cluster.context.endpoints().to_vec(),
        cluster.context.identity(),
        ClientId::from_bytes([9; 16]),
        timing,
    )
    .unwrap();
    // The whole one is up (it says what it has when asked for no more than that), yet nothing is agreed on.
    cluster
        .until("the whole node", |c| async move {
            c.stale().tokens().await.ok()
        })
        .await;
    assert!(client.tokens().await.is_err());
    let create = Mutation::CreateToken {
        hash: [99; 32],
        role: Role::Client,
        ttl_ms: 1_000,
    };
    assert!(client.mutate(create).await.is_err());
    for node in &cluster.nodes[1..] {
        assert!(
            node.data.join("renewing").exists(),
            "it knows that it is damaged"
        );
    }
}
