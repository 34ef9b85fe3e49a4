//! Peers that accept and never answer, answer garbage, or fall silent anywhere in the middle: every call ends, with the right word.

use super::fake::{Cluster, Node, TIMING, revoke};
use crate::api::{MetadError, Role};
use crate::client::{MetadClient, Timing};
use crate::identity::Identity;
use qsfs_zstor::id::{AgentId, ClientId};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Of one call, whatever happens.
const CALL: Duration = Duration::from_millis(1_500);
/// Longer than any call may take, on a busy machine as well.
const HUNG: Duration = Duration::from_secs(60);

fn client(address: &str, identity: &Identity) -> MetadClient {
    let timing = Timing {
        read: CALL,
        mutation: CALL,
        connect: Duration::from_millis(700),
        ..TIMING
    };
    let client = ClientId::random(&mut rand::rng());
    MetadClient::with_timing(vec![address.to_owned()], identity, client, timing).unwrap()
}

/// Lets so many bytes of the server's through, then nothing more either way, and keeps every connection open.
async fn stalling_proxy(server: String, bytes: usize) -> (String, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut near, _)) = listener.accept().await {
            let server = server.clone();
            connections.spawn(async move {
                let mut far = TcpStream::connect(server).await.unwrap();
                let (mut left, mut up, mut down) = (bytes, [0; 4_096], [0; 4_096]);
                while left > 0 {
                    let passed = tokio::select! {
                        count = near.read(&mut up) => match count {
                            Ok(count) if count > 0 => far.write_all(&up[..count]).await.is_ok(),
                            _ => false,
                        },
                        count = far.read(&mut down) => match count {
                            Ok(count) if count > 0 => {
                                let count = count.min(left);
                                left -= count;
                                near.write_all(&down[..count]).await.is_ok()
                            }
                            _ => false,
                        },
                    };
                    if !passed {
                        return;
                    }
                }
                std::future::pending::<()>().await;
            });
        }
    });
    (address, tasks)
}

/// All kinds of calls; what the mutation ended as.
async fn call_everything(address: &str, admin: &Identity, agent: &Identity) -> Option<MetadError> {
    let (admin, agent) = (client(address, admin), client(address, agent));
    let read = admin.volumes();
    let stale = admin.stale();
    let stale = stale.status();
    let session = agent.agent_session(AgentId(1));
    let mutation = admin.mutate(revoke("a"));
    let ended = timeout(HUNG, async { tokio::join!(read, stale, session, mutation) });
    let (read, stale, session, mutation) = ended.await.expect("every call ends");
    for error in [read.err(), stale.err(), session.err()]
        .into_iter()
        .flatten()
    {
        // Of a call that changes nothing it is not said that its effect is unknown.
        assert!(
            matches!(error, MetadError::Unreachable(_) | MetadError::NoQuorum(_)),
            "{error:?}"
        );
    }
    mutation.err()
}

#[tokio::test]
async fn a_peer_that_falls_silent_anywhere_keeps_no_call_waiting() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let admin = cluster.ca.issue(Role::Admin, "root").unwrap();
    let agent = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap();
    // Within TLS's hello, key exchange, certificates; within the greeting; within an answer.
    let mut runs = JoinSet::new();
    for bytes in [
        1, 5, 600, 1_200, 1_800, 2_400, 2_700, 2_900, 3_000, 3_050, 3_100, 3_200,
    ] {
        let (server, admin, agent) = (node.address.clone(), admin.clone(), agent.clone());
        runs.spawn(async move {
            let (address, proxy) = stalling_proxy(server, bytes).await;
            let ended = call_everything(&address, &admin, &agent).await;
            drop(proxy);
            (bytes, ended)
        });
    }
    let ends = runs.join_all().await;
    for (bytes, ended) in &ends {
        match ended {
            // Never sent, for certain.
            Some(MetadError::Unreachable(_)) => {}
            // Sent on a connection that had greeted.
            Some(MetadError::Unknown(_)) | None => assert!(*bytes > 1_000, "{bytes}: {ended:?}"),
            other => panic!("{bytes}: {other:?}"),
        }
    }
    let unreached =
        |end: &&(usize, Option<MetadError>)| matches!(end, (_, Some(MetadError::Unreachable(_))));
    assert!(ends.iter().filter(unreached).count() >= 5, "{ends:?}");
    node.stop().await;
}

#[tokio::test]
async fn a_peer_that_answers_garbage_or_nothing_is_unreachable() {
    let cluster = Cluster::new();
    let admin = cluster.ca.issue(Role::Admin, "root").unwrap();
    let agent = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap();
    let answers: [&[u8]; 5] = [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"\x16\x03\x03\xff\xff\x02\x00\xff\xff",
        b"\x15\x03\x03\x00\x02\x02\x28",
        &[0xff; 4_096],
    ];
    let mut runs = JoinSet::new();
    for answer in answers {
        let (admin, agent) = (admin.clone(), agent.clone());
        runs.spawn(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let mut peer = JoinSet::new();
            peer.spawn(async move {
                let mut held = Vec::new();
                while let Ok((mut stream, _)) = listener.accept().await {
                    // Who hung up already does not want it.
                    let _ = stream.write_all(answer).await;
                    held.push(stream);
                }
            });
            let ended = call_everything(&address, &admin, &agent).await;
            assert!(
                matches!(ended, Some(MetadError::Unreachable(_))),
                "{ended:?}"
            );
        });
    }
    runs.join_all().await;
}
