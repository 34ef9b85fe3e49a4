//! What the shell promises: only those who may, and nobody blocks the others.

use super::fake::{Cluster, Node, admin, client_as, revoke, volume};
use crate::api::{ClientReport, MetadError, Mutation, Role, ShardReport};
use crate::channel::{connect, versioned};
use crate::raft::{RaftCallError, RaftPeer, RaftRpc};
use crate::server::CallError;
use crate::tls::{grpc_client_config, grpc_join_config};
use crate::wire::error_of;
use crate::wire::pb::metad_client::MetadClient as Stub;
use crate::wire::pb::raft_client::RaftClient;
use crate::wire::pb::{HelloRequest, RaftMessage};
use bytes::Bytes;
use qsfs_zstor::id::{AgentId, BackendId, DatafileId, Epoch, MetadId, VolumeId};
use qsfs_zstor::record::ShardState;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const DEADLINE: Duration = Duration::from_secs(10);

fn denied<T: std::fmt::Debug>(ended: Result<T, MetadError>) {
    assert!(matches!(ended, Err(MetadError::Denied(_))), "{ended:?}");
}

fn renew(volume: VolumeId) -> Mutation {
    Mutation::RenewLease {
        volume,
        epoch: Epoch(1),
        report: ClientReport::default(),
    }
}

#[tokio::test]
async fn a_role_does_its_own_verbs_only() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let agent = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap();
    let agent = client_as(&agent, &[&node]);
    let client = cluster.ca.issue(Role::Client, "*").unwrap();
    let client = client_as(&client, &[&node]);
    let metad = cluster.ca.issue(Role::Metad, "7").unwrap();
    let metad = client_as(&metad, &[&node]);
    let register = |node: &str| Mutation::RegisterAgent {
        location: "loc1".parse().unwrap(),
        node: node.parse().unwrap(),
    };
    denied(agent.mutate(revoke("a")).await);
    denied(client.mutate(revoke("a")).await);
    denied(metad.mutate(revoke("a")).await);
    denied(metad.volumes().await);
    denied(client.tokens().await);
    denied(agent.scrub(None).await);
    denied(client.mutate(register("n1")).await);
    denied(agent.mutate(register("n2")).await);
    denied(agent.mutate(renew(volume(1).id)).await);
    denied(client.agent_session(AgentId(1)).await);
    agent.mutate(register("n1")).await.unwrap();
    client.mutate(renew(volume(1).id)).await.unwrap();
    assert_eq!(cluster.applied(), 2);
    node.stop().await;
}

#[tokio::test]
async fn a_certificate_bound_to_a_volume_opens_only_that_one() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let (own, foreign) = (volume(1), volume(2));
    let bound = cluster.ca.issue(Role::Client, &own.id.to_string()).unwrap();
    let bound = client_as(&bound, &[&node]);
    assert_eq!(bound.volumes().await.unwrap(), std::slice::from_ref(&own));
    assert_eq!(bound.volume(&own.name).await.unwrap(), own);
    bound.mutate(renew(own.id)).await.unwrap();
    denied(bound.volume(&foreign.name).await);
    denied(bound.volume_by_id(foreign.id).await);
    denied(bound.records(foreign.id, &[DatafileId(1)]).await);
    denied(bound.mutate(renew(foreign.id)).await);
    let report = |volume| ShardReport {
        volume,
        datafile: DatafileId(1),
        shard: 0,
        backend: BackendId(1),
        state: ShardState::Corrupt,
        by_scrub: false,
    };
    let reports = vec![report(own.id), report(foreign.id)];
    denied(bound.mutate(Mutation::ReportShards { reports }).await);
    assert_eq!(cluster.applied(), 1);
    node.stop().await;
}

#[tokio::test]
async fn a_stranger_may_only_join() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    let config = grpc_join_config(cluster.ca.fingerprint()).unwrap();
    let channel = connect(&node.address, config, DEADLINE).await.unwrap();
    let refused = Stub::new(versioned(channel.clone()))
        .hello(HelloRequest {})
        .await
        .unwrap_err();
    let error = error_of(&refused).unwrap();
    assert!(
        matches!(error, CallError::Refused(MetadError::Denied(_))),
        "{error:?}"
    );
    let refused = RaftClient::new(versioned(channel.clone()))
        .call(RaftMessage::default())
        .await
        .unwrap_err();
    let error = error_of(&refused).unwrap();
    assert!(
        matches!(error, CallError::Refused(MetadError::Denied(_))),
        "{error:?}"
    );
    node.stop().await;
}

#[tokio::test]
async fn another_protocol_version_is_refused_by_name() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    let identity = cluster.ca.issue(Role::Admin, "root").unwrap();
    let config = grpc_client_config(&identity).unwrap();
    let channel = connect(&node.address, config, DEADLINE).await.unwrap();
    let refused = Stub::new(channel).hello(HelloRequest {}).await.unwrap_err();
    let error = error_of(&refused).unwrap();
    assert!(
        matches!(error, CallError::Refused(MetadError::Invalid(_))),
        "{error:?}"
    );
    node.stop().await;
}

#[tokio::test]
async fn raft_payloads_arrive_whole_and_only_from_metad_at_the_right_node() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    let other = cluster.ca.issue(Role::Metad, "2").unwrap();
    let peer = RaftPeer::new(MetadId(1), &node.address, &other).unwrap();
    let large = Bytes::from(vec![7; 20 << 20]);
    let echo = peer.call(RaftRpc::Append, large.clone(), DEADLINE).await;
    assert!(echo == Ok(large));
    let refused = peer.call(RaftRpc::Vote, Bytes::new(), DEADLINE).await;
    let Err(RaftCallError::Refused { reason, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(reason, "no vote for 2");
    let mistaken = RaftPeer::new(MetadId(3), &node.address, &other).unwrap();
    let refused = mistaken.call(RaftRpc::Append, Bytes::new(), DEADLINE).await;
    assert!(
        matches!(refused, Err(RaftCallError::Refused { .. })),
        "{refused:?}"
    );
    let admin = cluster.ca.issue(Role::Admin, "root").unwrap();
    let admin = RaftPeer::new(MetadId(1), &node.address, &admin).unwrap();
    let refused = admin.call(RaftRpc::Append, Bytes::new(), DEADLINE).await;
    assert!(
        matches!(refused, Err(RaftCallError::Refused { .. })),
        "{refused:?}"
    );
    node.stop().await;
    let gone = peer.call(RaftRpc::Append, Bytes::new(), DEADLINE).await;
    assert!(
        matches!(gone, Err(RaftCallError::Unreachable { .. })),
        "{gone:?}"
    );
}

#[tokio::test]
async fn garbage_and_silence_on_the_port_disturb_nobody() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(TcpStream::connect(&node.address).await.unwrap());
    }
    let garbage: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\xff\xff\x01\x00\xff\xff",
        &[0xff; 4096],
    ];
    for bytes in garbage {
        let mut stream = TcpStream::connect(&node.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        // Refused with an alert or closed by the handshake deadline; never an answer.
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.len() < 64, "{answer:?}");
    }
    admin(&cluster, &[&node]).mutate(revoke("a")).await.unwrap();
    node.stop().await;
}

#[tokio::test]
async fn a_client_or_server_of_another_ca_or_role_gets_nowhere() {
    let (cluster, other) = (Cluster::new(), Cluster::new());
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let foreign = other.ca.issue(Role::Admin, "root").unwrap();
    let short = Duration::from_millis(300);
    let foreign = client_as(&foreign, &[&node]);
    let ended = foreign.mutate_within(revoke("a"), short).await;
    assert!(
        matches!(ended, Err(MetadError::Unreachable(_))),
        "{ended:?}"
    );
    // An agent's certificate cannot pose as metad.
    let agent = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap();
    let impostor = Node::start_as(&cluster, &agent).await;
    cluster.lead(Some(&impostor));
    let deceived = admin(&cluster, &[&impostor]);
    let ended = deceived.mutate_within(revoke("a"), short).await;
    assert!(
        matches!(ended, Err(MetadError::Unreachable(_))),
        "{ended:?}"
    );
    assert_eq!(cluster.applied(), 0);
    node.stop().await;
    impostor.stop().await;
}

#[tokio::test]
async fn shutdown_ends_connections_that_are_open() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let agent = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap();
    let (_reports, mut orders) = client_as(&agent, &[&node])
        .agent_session(AgentId(1))
        .await
        .unwrap();
    // The service keeps its end open; the shell must not wait for it for ever.
    let _held = node.session.lock().unwrap().clone();
    node.stop().await;
    while let Some(order) = orders.recv().await {
        assert!(order.is_err(), "{order:?}");
    }
}
