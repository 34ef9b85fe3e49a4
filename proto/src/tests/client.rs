//! What the client promises: it finds the leader, applies once, and ends with the right word.

use super::fake::{Cluster, Node, TIMING, admin, client_as, revoke, volume};
use crate::api::{AgentOrder, AgentReport, Applied, ClusterSettings, MetadError, Role};
use crate::client::MetadClient;
use crate::join::{Joiner, join};
use crate::token::JoinToken;
use qsfs_zstor::id::{AgentId, ClientId, DatafileId, Epoch};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::TcpListener;

/// Two attempts fit.
const SHORT: Duration = Duration::from_millis(900);

#[tokio::test]
async fn the_leader_is_found_by_hint_and_again_after_it_changed() {
    let cluster = Cluster::new();
    let nodes = [
        Node::start(&cluster, 1).await,
        Node::start(&cluster, 2).await,
        Node::start(&cluster, 3).await,
    ];
    // Only one endpoint is given: the others are learned.
    let client = admin(&cluster, &[&nodes[0]]);
    for leader in [&nodes[2], &nodes[1], &nodes[0]] {
        cluster.lead(Some(leader));
        client.mutate(revoke("a")).await.unwrap();
        assert_eq!(client.volumes().await.unwrap().len(), 2);
    }
    let [first, second, third] = nodes;
    cluster.lead(Some(&second));
    client.mutate(revoke("a")).await.unwrap();
    second.stop().await;
    cluster.lead(Some(&third));
    client.mutate(revoke("a")).await.unwrap();
    assert_eq!(cluster.applied(), 5);
    first.stop().await;
    third.stop().await;
}

#[tokio::test]
async fn a_mutation_whose_answer_is_lost_is_repeated_and_applied_once() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let client = admin(&cluster, &[&node]);
    cluster.lose_answers.store(2, Ordering::SeqCst);
    assert_eq!(client.mutate(revoke("a")).await, Ok(Applied::Version(0)));
    assert_eq!(cluster.applied(), 1);
    assert_eq!(client.mutate(revoke("a")).await, Ok(Applied::Version(1)));
    let ids: Vec<_> = cluster.answers.lock().unwrap().keys().copied().collect();
    assert_eq!((ids[0].sequence, ids[1].sequence), (1, 2));
    assert_eq!(ids[1].oldest_pending, 2);
    node.stop().await;
}

#[tokio::test]
async fn mutations_in_flight_keep_the_oldest_pending_back() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let client = admin(&cluster, &[&node]);
    let calls = (0..20).map(|_| client.mutate(revoke("a")));
    let answers = futures::future::join_all(calls).await;
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(cluster.applied(), 20);
    let answers = cluster.answers.lock().unwrap();
    assert!(answers.keys().all(|id| id.oldest_pending <= id.sequence));
}

#[tokio::test]
async fn no_answer_until_the_deadline_is_unknown() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let client = admin(&cluster, &[&node]);
    cluster.lose_answers.store(usize::MAX, Ordering::SeqCst);
    let ended = client.mutate_within(revoke("a"), SHORT).await;
    assert!(matches!(ended, Err(MetadError::Unknown(_))), "{ended:?}");
    node.stop().await;
}

#[tokio::test]
async fn an_answer_lost_before_the_quorum_is_still_unknown() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let client = admin(&cluster, &[&node]);
    cluster.lose_answers.store(1, Ordering::SeqCst);
    let mutation = tokio::spawn({
        let client = client.clone();
        async move { client.mutate_within(revoke("a"), SHORT).await }
    });
    while cluster.applied() == 0 {
        tokio::task::yield_now().await;
    }
    cluster.lead(None);
    let ended = mutation.await.unwrap();
    assert!(matches!(ended, Err(MetadError::Unknown(_))), "{ended:?}");
    node.stop().await;
}

#[tokio::test]
async fn without_a_leader_it_is_no_quorum_and_stale_reads_go_on() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    let client = admin(&cluster, &[&node]);
    let ended = client.mutate_within(revoke("a"), SHORT).await;
    assert!(matches!(ended, Err(MetadError::NoQuorum(_))), "{ended:?}");
    assert_eq!(client.applied(), 0);
    assert_eq!(client.stale().volumes().await.unwrap().len(), 2);
    assert_eq!(client.applied(), 42);
    cluster.lead(Some(&node));
    let ended = client.mutate_within(revoke("no quorum"), SHORT).await;
    assert!(matches!(ended, Err(MetadError::NoQuorum(_))), "{ended:?}");
    assert_eq!(cluster.applied(), 0);
    node.stop().await;
}

#[tokio::test]
async fn nobody_there_or_silent_is_unreachable() {
    let cluster = Cluster::new();
    let identity = cluster.ca.issue(Role::Admin, "root").unwrap();
    // Accepts (in the backlog) and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoints = [&silent, &gone].map(|socket| socket.local_addr().unwrap().to_string());
    drop(gone);
    let client = ClientId::random(&mut rand::rng());
    let client = MetadClient::with_timing(endpoints.to_vec(), &identity, client, TIMING).unwrap();
    let ended = client.mutate_within(revoke("a"), SHORT).await;
    assert!(
        matches!(ended, Err(MetadError::Unreachable(_))),
        "{ended:?}"
    );
}

#[tokio::test]
async fn a_follower_that_hints_at_a_dead_leader_does_not_hide_the_living_one() {
    let cluster = Cluster::new();
    let (follower, leader) = (
        Node::start(&cluster, 1).await,
        Node::start(&cluster, 2).await,
    );
    // The follower's cluster is an older view, in which a third node leads that is gone.
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dead = gone.local_addr().unwrap().to_string();
    drop(gone);
    *cluster.leader.lock().unwrap() = Some(dead);
    let client = admin(&cluster, &[&follower, &leader]);
    let call = tokio::spawn(async move { client.mutate(revoke("a")).await });
    tokio::task::yield_now().await;
    cluster.lead(Some(&leader));
    call.await.unwrap().unwrap();
    follower.stop().await;
    leader.stop().await;
}

#[tokio::test]
async fn refusals_arrive_as_they_were_said() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let client = admin(&cluster, &[&node]);
    let fenced = MetadError::Fenced { current: Epoch(9) };
    assert_eq!(client.mutate(revoke("fenced")).await, Err(fenced));
    let missing = client.volume(&"nothing".parse().unwrap()).await;
    assert_eq!(missing, Err(MetadError::NoSuchVolume("nothing".into())));
    let unmet = client.placement(volume(1).id, 1).await;
    assert_eq!(unmet, Err(MetadError::PolicyUnmet("no backends".into())));
    node.stop().await;
}

#[tokio::test]
async fn every_read_is_answered() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let client = admin(&cluster, &[&node]);
    let one = volume(1);
    assert_eq!(client.volume(&one.name).await.unwrap(), one);
    assert_eq!(client.volume_by_id(one.id).await.unwrap(), one);
    let ids: Vec<_> = (1..3_000).map(DatafileId).collect();
    assert!(client.records(one.id, &ids).await.unwrap().is_empty());
    let page = client.list_records(one.id, None, DatafileId(0), u32::MAX);
    assert!(page.await.unwrap().is_empty());
    assert!(client.backends().await.unwrap().is_empty());
    assert!(client.backend_facts().await.unwrap().is_empty());
    assert!(client.agents().await.unwrap().is_empty());
    assert!(client.members().await.unwrap().is_empty());
    assert!(client.tokens().await.unwrap().is_empty());
    assert_eq!(client.settings().await.unwrap(), ClusterSettings::default());
    assert_eq!(client.status().await.unwrap().schema_version, 1);
    client.scrub(None).await.unwrap();
    node.stop().await;
}

#[tokio::test]
async fn an_agent_session_carries_both_ways_and_ends_with_the_leader() {
    let cluster = Cluster::new();
    let mut node = Node::start(&cluster, 1).await;
    let other = Node::start(&cluster, 2).await;
    cluster.lead(Some(&node));
    let identity = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap();
    // The first endpoint only knows who leads.
    let client = client_as(&identity, &[&other]);
    let (reports, mut orders) = client.agent_session(AgentId(4)).await.unwrap();
    let report = AgentReport::Heartbeat { facts: Vec::new() };
    reports.send(report.clone()).await.unwrap();
    assert_eq!(node.reports.recv().await, Some(report));
    let order = AgentOrder::Settings(ClusterSettings::default());
    let sender = node.session.lock().unwrap().take().unwrap();
    sender.send(order.clone()).await.unwrap();
    assert_eq!(orders.recv().await, Some(Ok(order)));
    drop(sender);
    assert_eq!(orders.recv().await, None);
    reports.closed().await;

    // And when the node is gone without a word.
    let (_reports, mut orders) = client.agent_session(AgentId(4)).await.unwrap();
    node.stop().await;
    while let Some(order) = orders.recv().await {
        assert!(order.is_err(), "{order:?}");
    }
    other.stop().await;
}

fn joiner(role: Role) -> Joiner {
    Joiner {
        role,
        name: "n1".into(),
        location: "loc1".into(),
        address: String::new(),
    }
}

fn token(cluster: &Cluster, ca_hash: [u8; 32], nodes: &[&Node]) -> JoinToken {
    let endpoints = nodes.iter().map(|node| node.address.clone()).collect();
    let id = cluster.ca.cluster();
    JoinToken::new(Role::Agent, id, ca_hash, endpoints, &mut rand::rng()).unwrap()
}

#[tokio::test]
async fn joining_gives_an_identity_that_works() {
    let cluster = Cluster::new();
    let follower = Node::start(&cluster, 1).await;
    let leader = Node::start(&cluster, 2).await;
    cluster.lead(Some(&leader));
    let token = token(&cluster, cluster.ca.fingerprint(), &[&follower]);
    let (identity, grant) = join(&token, joiner(Role::Agent)).await.unwrap();
    assert_eq!(identity.subject(), "loc1/n1");
    assert_eq!(grant.endpoints, std::slice::from_ref(&leader.address));
    let client = client_as(&identity, &[&leader]);
    assert!(client.agents().await.is_ok());
    let refused = join(&token, joiner(Role::Metad)).await;
    assert!(matches!(refused, Err(MetadError::Token(_))), "{refused:?}");
    follower.stop().await;
    leader.stop().await;
}

/// A server that is not of the token's cluster must never see the secret.
#[tokio::test]
async fn a_server_of_another_ca_is_not_joined() {
    let (cluster, other) = (Cluster::new(), Cluster::new());
    let node = Node::start(&other, 1).await;
    other.lead(Some(&node));
    let token = token(&cluster, cluster.ca.fingerprint(), &[&node]);
    let joining = tokio::time::timeout(SHORT, join(&token, joiner(Role::Agent)));
    assert!(joining.await.is_err(), "it tries until its deadline");
    assert_eq!(other.joins.load(Ordering::SeqCst), 0);
    node.stop().await;
}
