//! What a member may make a node hold: every limit met over TLS, by a client that means harm, while another one is served.

use super::fake::{Cluster, Node, admin, client_as, revoke};
use crate::api::{MetadError, Mutation, Role};
use crate::channel::{connect, versioned};
use crate::identity::Identity;
use crate::raft::{RaftPeer, RaftRpc};
use crate::server::{
    CallError, MESSAGE_BYTES_MAX, MUTATION_STREAMS_MAX, PENDING_BYTES_MAX, Places, READS_MAX,
    RequestId, SESSIONS_MAX, STREAMS_MAX,
};
use crate::tls::{grpc_client_config, grpc_join_config};
use crate::verb::Query;
use crate::watch::WatchRequest;
use crate::wire::pb::metad_client::MetadClient as Stub;
use crate::wire::{PROTOCOL_KEY, PROTOCOL_VERSION, Wire, error_of, pb};
use bytes::Bytes;
use futures::{StreamExt, stream};
use http_body::{Frame, SizeHint};
use prost::Message as _;
use qsfs_zstor::id::{ClientId, MetadId};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tower::Service;

const DEADLINE: Duration = Duration::from_secs(60);

async fn channel(node: &Node, identity: &Identity) -> Channel {
    let config = grpc_client_config(identity).unwrap();
    connect(&node.address, config, DEADLINE).await.unwrap()
}

fn busy(status: &Status) -> String {
    match error_of(status) {
        Some(CallError::Refused(MetadError::Busy(text))) => text,
        other => panic!("{other:?}: {status:?}"),
    }
}

/// Some bytes, and then nothing more, ever.
struct Unfinished(Option<Bytes>);

impl http_body::Body for Unfinished {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.0.take() {
            Some(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
            None => Poll::Pending,
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// All of a request.
struct Finished(Option<Bytes>);

impl http_body::Body for Finished {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }
}

fn ask_request(body: Body) -> http::Request<Body> {
    http::Request::post("http://metad/qsfs.v1.Metad/Ask")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header(PROTOCOL_KEY, PROTOCOL_VERSION)
        .body(body)
        .unwrap()
}

/// A call of Ask whose body never ends. Its gRPC status.
async fn unfinished(mut channel: Channel, bytes: Bytes) -> Status {
    let request = ask_request(Body::new(Unfinished(Some(bytes))));
    std::future::poll_fn(|cx| channel.poll_ready(cx))
        .await
        .unwrap();
    match channel.call(request).await {
        Ok(response) => Status::from_header_map(response.headers()).expect("refused at once"),
        Err(error) => Status::unavailable(error.to_string()),
    }
}

/// The start of a gRPC message of this length.
fn prefix(length: usize) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
    bytes
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_at_its_first_bytes() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let agent = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap();
    let channel = channel(&node, &agent).await;
    for length in [MESSAGE_BYTES_MAX + 1, 1 << 30, u32::MAX as usize] {
        // Not a byte of it has come.
        let ended = timeout(DEADLINE, unfinished(channel.clone(), prefix(length).into()));
        let refused = ended.await.expect("it is not waited for");
        assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
        let limit = MESSAGE_BYTES_MAX.to_string();
        assert!(refused.message().contains(&limit), "{refused:?}");
    }
    node.stop().await;
}

#[tokio::test]
async fn unfinished_requests_hold_no_more_than_the_limit_and_give_it_back() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let agent = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap();
    let channel = channel(&node, &agent).await;
    // Each is almost complete, and stays so.
    let each = MESSAGE_BYTES_MAX / 2;
    let mut body = prefix(each + 1);
    body.resize(each, 7);
    let body = Bytes::from(body);
    let mut calls = JoinSet::new();
    let count = PENDING_BYTES_MAX / each + 4;
    for _ in 0..count {
        calls.spawn(unfinished(channel.clone(), body.clone()));
    }
    // Those over the limit end and say so; the others wait for the rest of their bodies.
    for _ in 0..4 {
        let ended = timeout(DEADLINE, calls.join_next())
            .await
            .expect("it is refused");
        let text = busy(&ended.unwrap().unwrap());
        assert!(text.contains("64 MiB"), "{text}");
    }
    // Meanwhile others are served, and when those calls are given up, so is this connection.
    admin(&cluster, &[&node]).mutate(revoke("a")).await.unwrap();
    calls.shutdown().await;
    let mut stub = Stub::new(versioned(channel));
    let served = timeout(DEADLINE, async {
        while stub.hello(pb::HelloRequest {}).await.is_err() {}
        let large = pb::MutateRequest {
            id: id(1).to_wire(),
            mutation: revoke(&"x".repeat(1 << 20)).to_wire(),
        };
        // Refused for what it is, not for what the others held.
        while let Err(status) = stub.mutate(large.clone()).await {
            if !matches!(
                error_of(&status),
                Some(CallError::Refused(MetadError::Busy(_)))
            ) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    served.await.expect("the bytes are given back");
    node.stop().await;
}

fn id(sequence: u64) -> RequestId {
    RequestId {
        client: ClientId::from_bytes([3; 16]),
        session: 1,
        sequence,
        oldest_pending: 1,
    }
}

#[tokio::test]
async fn a_stream_of_mutations_is_taken_no_faster_than_it_is_answered() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let root = cluster.ca.issue(Role::Admin, "root").unwrap();
    let channel = channel(&node, &root).await;
    // Nothing is answered: whatever arrives stays.
    cluster.lose_answers.store(usize::MAX, Ordering::SeqCst);
    let report = |sequence| pb::MutateCall {
        call: sequence,
        request: pb::MutateRequest {
            id: id(sequence).to_wire(),
            mutation: Mutation::ReleaseDatafiles {
                volume: super::fake::volume(1).id,
                epoch: qsfs_zstor::id::Epoch(1),
                datafiles: (0..1_000)
                    .map(|n| qsfs_zstor::id::DatafileId(n << 50))
                    .collect(),
            }
            .to_wire(),
        }
        .encode_to_vec()
        .into(),
    };
    let mut stub = Stub::new(versioned(channel.clone()));
    // A stream whose calls never end is over only when both ends let go.
    let over = CancellationToken::new();
    let silent = || stream::pending::<pb::MutateCall>().take_until(over.clone().cancelled_owned());
    let endless = stream::iter((1..).map(report)).take_until(over.clone().cancelled_owned());
    let mut replies = stub.mutations(endless).await.unwrap().into_inner();
    // No more are worked on than the limit says, however many are sent.
    let waiting = timeout(Duration::from_secs(3), replies.message()).await;
    assert!(waiting.is_err(), "{waiting:?}");
    assert_eq!(cluster.applied(), crate::client::MUTATIONS_IN_FLIGHT_MAX);
    // And no more streams than the limit says.
    let mut held = vec![replies];
    for _ in 1..MUTATION_STREAMS_MAX {
        let more = stub.mutations(silent()).await.unwrap();
        held.push(more.into_inner());
    }
    let refused = stub.mutations(silent()).await.unwrap_err();
    let text = busy(&refused);
    assert!(text.contains("4 streams of mutations"), "{text}");
    drop(held);
    over.cancel();
    let again = timeout(DEADLINE, async {
        while stub.mutations(stream::pending()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    again.await.expect("a stream that ended makes room");
    node.stop().await;
}

#[tokio::test]
async fn an_agent_has_few_sessions_and_reports_of_a_sensible_length() {
    let cluster = Cluster::new();
    let mut node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let agent = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap();
    let mut stub = Stub::new(versioned(channel(&node, &agent).await));
    let open = || {
        let first = pb::SessionFrame {
            kind: Some(pb::session_frame::Kind::Open(1)),
        };
        futures::StreamExt::chain(stream::iter([first]), stream::pending())
    };
    let mut held = Vec::new();
    for _ in 0..SESSIONS_MAX {
        let orders = stub.agent_session(open()).await.unwrap().into_inner();
        // The made-up service keeps the newest alone.
        held.push((orders, node.session.lock().unwrap().clone()));
    }
    let refused = stub.agent_session(open()).await.unwrap_err();
    assert!(busy(&refused).contains("4 agent sessions"), "{refused:?}");
    drop(held);
    let client = client_as(&agent, &[&node]);
    let (reports, _orders) = client
        .agent_session(qsfs_zstor::id::AgentId(1))
        .await
        .unwrap();
    let heartbeat = |bytes: usize| crate::api::AgentReport::Heartbeat {
        facts: vec![
            crate::api::BackendFacts {
                problem: "x".repeat(60_000),
                ..Default::default()
            };
            bytes / 60_000
        ],
    };
    reports.send(heartbeat(600_000)).await.unwrap();
    assert!(
        timeout(DEADLINE, node.reports.recv())
            .await
            .unwrap()
            .is_some()
    );
    reports.send(heartbeat(1_200_000)).await.unwrap();
    timeout(DEADLINE, reports.closed())
        .await
        .expect("the session ends");
    node.stop().await;
}

#[tokio::test]
async fn calls_of_a_connection_wait_for_each_other_beyond_the_limit() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let root = cluster.ca.issue(Role::Admin, "root").unwrap();
    let channel = channel(&node, &root).await;
    let watch = || {
        let mut stub = Stub::new(versioned(channel.clone()));
        async move {
            let everything: pb::WatchRequest = WatchRequest::everything(Some(0)).to_wire();
            stub.watch(everything).await.unwrap()
        }
    };
    // A watch stays open until it is dropped.
    let mut held = Vec::new();
    for _ in 0..STREAMS_MAX {
        held.push(timeout(DEADLINE, watch()).await.expect("it opens"));
    }
    let mut next = std::pin::pin!(watch());
    let waits = timeout(Duration::from_millis(500), &mut next).await;
    assert!(waits.is_err(), "one more than the limit");
    let opened = || cluster.watches.lock().unwrap().len();
    assert_eq!(opened(), STREAMS_MAX as usize);
    // Over another connection others are served meanwhile; one that ends makes room.
    admin(&cluster, &[&node]).volumes().await.unwrap();
    held.pop();
    timeout(DEADLINE, next).await.expect("it opens now");
    assert_eq!(opened(), STREAMS_MAX as usize + 1);
    node.stop().await;
}

/// A read whose answer nobody takes: its head alone.
async fn unread(mut channel: Channel) -> http::Response<Body> {
    let ask = pb::AskRequest {
        stale: false,
        query: Query::BackendFacts.to_wire(),
    };
    let message = ask.encode_to_vec();
    let mut body = prefix(message.len());
    body.extend_from_slice(&message);
    let body = Body::new(Finished(Some(body.into())));
    std::future::poll_fn(|cx| channel.poll_ready(cx))
        .await
        .unwrap();
    channel.call(ask_request(body)).await.unwrap()
}

#[tokio::test]
async fn answers_that_nobody_takes_hold_up_their_own_connection_alone() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    // More than the windows of HTTP/2 take unasked.
    cluster.fat_facts.store(50, Ordering::SeqCst);
    let agent = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap();
    let channel = channel(&node, &agent).await;
    let mut held = Vec::new();
    for _ in 0..READS_MAX {
        let answer = timeout(DEADLINE, unread(channel.clone())).await;
        held.push(answer.expect("it is answered"));
    }
    let status = |answer: &http::Response<Body>| Status::from_header_map(answer.headers());
    assert!(
        held.iter().all(|answer| status(answer).is_none()),
        "{held:?}"
    );
    let mut next = std::pin::pin!(unread(channel.clone()));
    let waits = timeout(Duration::from_millis(500), &mut next).await;
    assert!(waits.is_err(), "one more than the limit: {waits:?}");
    admin(&cluster, &[&node]).volumes().await.unwrap();
    held.pop();
    timeout(DEADLINE, next).await.expect("it is answered now");
    node.stop().await;
}

/// With few places, so that a test can take them all.
async fn small(cluster: &std::sync::Arc<Cluster>) -> Node {
    let places = Places {
        connections: 40,
        members: 20,
        each: 8,
        handshakes: 16,
        strangers: 4,
    };
    let metad = cluster.ca.issue(Role::Metad, "1").unwrap();
    let node = Node::start_within(cluster, &metad, "127.0.0.1:0", places).await;
    cluster.lead(Some(&node));
    node
}

async fn greet(node: &Node, identity: &Identity) -> (Channel, Result<(), Status>) {
    let channel = channel(node, identity).await;
    let mut stub = Stub::new(versioned(channel.clone()));
    let greeted = stub.hello(pb::HelloRequest {}).await.map(drop);
    (channel, greeted)
}

/// Until there is room again.
async fn comes_in(node: &Node, identity: &Identity) {
    let again = timeout(DEADLINE, async {
        while greet(node, identity).await.1.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    again.await.expect("places are given back");
}

#[tokio::test]
async fn one_identity_cannot_take_all_connections_nor_all_members_the_place_of_metads() {
    let cluster = Cluster::new();
    let node = small(&cluster).await;
    let hostile = cluster.ca.issue(Role::Client, "*").unwrap();
    let mut held = Vec::new();
    for _ in 0..8 {
        let (channel, greeted) = greet(&node, &hostile).await;
        greeted.unwrap();
        held.push(channel);
    }
    let refused = greet(&node, &hostile).await.1.unwrap_err();
    assert!(
        busy(&refused).contains("client * has 8 connections"),
        "{refused:?}"
    );
    // Others come in; together they have a limit as well, which leaves room for metad nodes.
    for (number, identity) in
        (0..12).map(|n| (n, cluster.ca.issue(Role::Agent, &format!("loc1/n{n}"))))
    {
        let (channel, greeted) = greet(&node, &identity.unwrap()).await;
        greeted.unwrap_or_else(|status| panic!("{number}: {status:?}"));
        held.push(channel);
    }
    let root = cluster.ca.issue(Role::Admin, "root").unwrap();
    let refused = greet(&node, &root).await.1.unwrap_err();
    assert!(
        busy(&refused).contains("20 connections of members"),
        "{refused:?}"
    );
    let peer = cluster.ca.issue(Role::Metad, "2").unwrap();
    let peer = RaftPeer::new(MetadId(1), &node.address, &peer).unwrap();
    peer.call(RaftRpc::Append, Bytes::new(), DEADLINE)
        .await
        .unwrap();
    drop(held);
    comes_in(&node, &root).await;
    comes_in(&node, &hostile).await;
    node.stop().await;
}

#[tokio::test]
async fn handshakes_and_strangers_have_few_places_and_a_deadline() {
    let cluster = Cluster::new();
    let node = small(&cluster).await;
    let mut silent = JoinSet::new();
    for _ in 0..30 {
        let mut stream = TcpStream::connect(&node.address).await.unwrap();
        silent.spawn(async move {
            // Closed by the server, who says nothing: at once or at the deadline of a handshake.
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            answer.len()
        });
    }
    // Who comes now may be turned away, but not for longer than a handshake may take.
    let client = admin(&cluster, &[&node]);
    let served = timeout(DEADLINE, client.mutate(revoke("a")));
    served.await.unwrap().unwrap();
    let ended = timeout(DEADLINE, silent.join_all()).await;
    assert!(
        ended
            .expect("all are closed")
            .iter()
            .all(|bytes| *bytes == 0)
    );
    // Strangers that did their handshake: the fifth is closed.
    let mut held = Vec::new();
    let stranger = || grpc_join_config(cluster.ca.fingerprint()).unwrap();
    for _ in 0..4 {
        let channel = connect(&node.address, stranger(), DEADLINE).await.unwrap();
        let denied = Stub::new(versioned(channel.clone()))
            .hello(pb::HelloRequest {})
            .await;
        let denied = error_of(&denied.unwrap_err());
        assert!(
            matches!(denied, Some(CallError::Refused(MetadError::Denied(_)))),
            "{denied:?}"
        );
        held.push(channel);
    }
    let fifth = async {
        let channel = connect(&node.address, stranger(), DEADLINE)
            .await
            .map_err(drop)?;
        let said = Stub::new(versioned(channel))
            .hello(pb::HelloRequest {})
            .await;
        said.map(drop)
            .map_err(|status| assert!(error_of(&status).is_none(), "{status:?}"))
    };
    assert!(
        timeout(DEADLINE, fifth)
            .await
            .expect("it is closed")
            .is_err()
    );
    client.mutate(revoke("b")).await.unwrap();
    drop(held);
    node.stop().await;
}
