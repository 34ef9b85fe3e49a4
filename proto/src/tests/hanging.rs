//! Peers that accept and never answer, answer garbage, or fall silent anywhere in the middle: every call ends, with the right word.

use super::fake::{Cluster, Node, TIMING, Tamper, revoke};
use crate::api::{MetadError, Role};
use crate::client::{MetadClient, Timing};
use crate::identity::Identity;
use crate::join::{Deadlines, Joiner, join_within};
use crate::token::JoinToken;
use crate::watch::{Change, WatchEvent, WatchRequest};
use qsfs_zstor::id::{AgentId, ClientId, VolumeId};
use std::sync::atomic::Ordering;
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

/// Joins through `address`; what it ended as. The deadlines are short, so that a hang is told from a long wait.
async fn join_through(cluster: &Cluster, address: &str) -> Result<(), MetadError> {
    let endpoints = vec![address.to_owned()];
    let (id, ca) = (cluster.ca.cluster(), cluster.ca.fingerprint());
    let token = JoinToken::new(Role::Agent, id, ca, endpoints, &mut rand::rng()).unwrap();
    let joiner = Joiner {
        role: Role::Agent,
        name: "n1".into(),
        location: "loc1".into(),
        address: String::new(),
    };
    let deadlines = Deadlines {
        whole: CALL,
        attempt: Duration::from_millis(700),
    };
    let ended = timeout(HUNG, join_within(&token, joiner, deadlines)).await;
    ended.expect("joining ends").map(drop)
}

#[tokio::test]
async fn joining_through_a_peer_that_falls_silent_ends_and_says_whether_it_was_asked() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let mut runs = JoinSet::new();
    // Within TLS; within HTTP/2's greeting; within the grant.
    for bytes in [1, 5, 600, 1_200, 1_800, 2_400, 2_700, 3_000, 3_400, 4_000] {
        let (server, cluster) = (node.address.clone(), cluster.clone());
        runs.spawn(async move {
            let (address, proxy) = stalling_proxy(server, bytes).await;
            let ended = join_through(&cluster, &address).await;
            drop(proxy);
            (bytes, address, ended)
        });
    }
    let ends = runs.join_all().await;
    for (bytes, address, ended) in &ends {
        match ended {
            // No connection stood: nothing was asked.
            Err(MetadError::Unreachable(text)) => assert!(text.contains(address), "{text}"),
            Err(MetadError::Unknown(text)) => {
                assert!(*bytes > 1_000, "{bytes}: {text}");
                assert!(
                    text.contains(address) && text.contains("qsfs token create"),
                    "{text}"
                );
            }
            other => panic!("{bytes}: {other:?}"),
        }
    }
    let unknown = |end: &&(usize, String, Result<(), MetadError>)| {
        matches!(end.2, Err(MetadError::Unknown(_)))
    };
    let count = ends.iter().filter(unknown).count();
    assert!(count > 0 && count < ends.len(), "{ends:?}");
    node.stop().await;
}

#[tokio::test]
async fn joining_at_garbage_or_with_grants_that_do_not_fit_is_refused() {
    let (cluster, other) = (Cluster::new(), Cluster::new());
    for answer in [&b""[..], b"HTTP/1.1 200 OK\r\n\r\n", &[0xff; 4_096]] {
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
        let ended = join_through(&cluster, &address).await;
        assert!(
            matches!(ended, Err(MetadError::Unreachable(_))),
            "{ended:?}"
        );
    }
    // The server of another cluster does not get to see the secret.
    let foreign = Node::start(&other, 1).await;
    other.lead(Some(&foreign));
    let ended = join_through(&cluster, &foreign.address).await;
    assert!(
        matches!(ended, Err(MetadError::Unreachable(_))),
        "{ended:?}"
    );
    assert_eq!(other.joins.load(Ordering::SeqCst), 0);
    foreign.stop().await;
    // Grants of a server that is ours but answers wrongly.
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let another_key = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap().to_pem();
    let (other_ca, other_cluster) = (other.ca.ca_pem().to_owned(), other.ca.cluster());
    let tampers: [Tamper; 5] = [
        Box::new(|grant| grant.cert_pem.clear()),
        Box::new(|grant| grant.cert_pem = "x".repeat(100_000)),
        Box::new(move |grant| grant.cert_pem.clone_from(&another_key.certificate)),
        Box::new(move |grant| grant.ca_pem.clone_from(&other_ca)),
        Box::new(move |grant| grant.cluster = other_cluster),
    ];
    for (number, tamper) in tampers.into_iter().enumerate() {
        *cluster.tamper.lock().unwrap() = Some(tamper);
        let ended = join_through(&cluster, &node.address).await;
        let refused = matches!(ended, Err(MetadError::Token(_) | MetadError::Unknown(_)));
        assert!(refused, "{number}: {ended:?}");
    }
    *cluster.tamper.lock().unwrap() = None;
    join_through(&cluster, &node.address).await.unwrap();
    node.stop().await;
}

#[tokio::test]
async fn a_watch_through_a_peer_that_falls_silent_says_so_and_goes_on_elsewhere() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    let admin = cluster.ca.issue(Role::Admin, "root").unwrap();
    let changes = |index| WatchEvent::Changes {
        index,
        changes: vec![Change::VolumeRemoved(VolumeId::from_bytes([1; 16]))],
    };
    let told = (1..=200).map(changes).collect::<Vec<_>>();
    cluster.history.send_replace((0, told));
    let mut runs = JoinSet::new();
    for bytes in [1, 600, 1_800, 2_700, 3_000, 3_200, 4_000, 6_000] {
        let (server, admin) = (node.address.clone(), admin.clone());
        runs.spawn(async move {
            let (address, proxy) = stalling_proxy(server.clone(), bytes).await;
            // Alone: nothing comes any more, and the watch says from whom and why.
            let mut alone = client(&address, &admin).watch(WatchRequest::everything(Some(0)));
            let mut troubles = alone.troubles();
            let trouble = timeout(HUNG, async {
                loop {
                    tokio::select! {
                        biased;
                        told = troubles.wait_for(Option::is_some) => {
                            return told.expect("it goes on trying").clone().unwrap_or_default();
                        }
                        event = alone.next() => assert!(event.is_some_and(|event| event.is_ok())),
                    }
                }
            });
            let trouble = trouble.await.expect("it says what is wrong");
            assert!(trouble.contains(&address), "{bytes}: {trouble}");
            // Beside a node that is well: all comes, once, in order.
            let both = MetadClient::with_timing(
                vec![address, server],
                &admin,
                ClientId::random(&mut rand::rng()),
                Timing {
                    read: CALL,
                    connect: Duration::from_millis(700),
                    ..TIMING
                },
            );
            let mut watch = both.unwrap().watch(WatchRequest::everything(Some(0)));
            let mut next = 1;
            while next <= 200 {
                let event = timeout(HUNG, watch.next()).await.expect("it goes on");
                match event.expect("no end").unwrap() {
                    WatchEvent::Changes { index, .. } => {
                        assert_eq!(index, next, "{bytes}");
                        next += 1;
                    }
                    WatchEvent::Began(_) | WatchEvent::Progress(_) => {}
                }
            }
            assert_eq!(watch.trouble(), None);
            drop(proxy);
        });
    }
    runs.join_all().await;
    node.stop().await;
}
