//! Certificates that end while everything runs: renewed without a failed call, and worth nothing once they have ended.

use super::fake::{Cluster, Node, client_as, revoke};
use crate::api::{MetadError, Role};
use crate::ca::CertificateAuthority;
use crate::context::Context;
use crate::identity::{
    CA_FILE, CERT_FILE, Identity, KEY_FILE, LiveIdentity, NEXT_KEY_FILE, Validity, wall_ms,
};
use crate::raft::{RaftPeer, RaftRpc};
use crate::renewal::{ClusterFile, Home, IdentityDir, Renewal, RenewalError, Signer, request};
use async_trait::async_trait;
use bytes::Bytes;
use qsfs_zstor::id::{AgentId, ClusterId, MetadId};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);
/// A third of it is left for a renewal, also on a busy machine.
const LIFE: Duration = Duration::from_secs(8);

async fn until(what: &str, is: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The authority itself, as a metad has it; fails when told to.
struct Local {
    cluster: Arc<Cluster>,
    role: Role,
    subject: &'static str,
    refuses: AtomicBool,
}

#[async_trait]
impl Signer for Local {
    async fn sign(&self, csr_pem: &str) -> Result<String, MetadError> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err(MetadError::NoQuorum("nobody leads".into()));
        }
        let signed = self.cluster.ca.sign(csr_pem, self.role, self.subject, LIFE);
        signed.map_err(|error| MetadError::Invalid(error.to_string()))
    }
}

fn local(cluster: &Arc<Cluster>, role: Role, subject: &'static str) -> Arc<Local> {
    Arc::new(Local {
        cluster: cluster.clone(),
        role,
        subject,
        refuses: AtomicBool::new(false),
    })
}

/// An identity that lives in a directory.
fn housed(
    cluster: &Cluster,
    dir: &Path,
    role: Role,
    subject: &str,
) -> (LiveIdentity, Arc<dyn Home>) {
    let identity = cluster.ca.issue_for(role, subject, LIFE).unwrap();
    identity.save(dir).unwrap();
    let home = IdentityDir(dir.to_owned());
    (LiveIdentity::new(identity), Arc::new(home))
}

#[tokio::test]
async fn certificates_change_under_load_without_a_failed_call_and_old_ones_are_worth_nothing() {
    let cluster = Cluster::new();
    *cluster.certificate_life.lock().unwrap() = LIFE;
    let dir = tempfile::tempdir().unwrap();
    let stop = CancellationToken::new();
    let (server, home) = housed(&cluster, &dir.path().join("metad"), Role::Metad, "1");
    let signer = local(&cluster, Role::Metad, "1");
    let renewal = Renewal::new(server.clone(), home, signer, "");
    let mut tasks = vec![tokio::spawn(renewal.run(|_| {}, stop.clone()))];
    let node = Node::start_at(&cluster, &server, "127.0.0.1:0").await;
    cluster.lead(Some(&node));
    let place = dir.path().join("agent");
    let (agent, home) = housed(&cluster, &place, Role::Agent, "loc1/n1");
    let first = agent.current();
    let client = client_as(&agent, &[&node]);
    let signer = Arc::new(client.clone());
    let renewal = Renewal::new(agent.clone(), home, signer, "");
    let told = Arc::new(AtomicU64::new(0));
    let telling = told.clone();
    let renewed = move |_: &Identity| {
        telling.fetch_add(1, Ordering::SeqCst);
    };
    tasks.push(tokio::spawn(renewal.run(renewed, stop.clone())));
    // A peer of Raft, whose identity is renewed by somebody else in the same way.
    let (metad, home) = housed(&cluster, &dir.path().join("m2"), Role::Metad, "2");
    let renewal = Renewal::new(metad.clone(), home, local(&cluster, Role::Metad, "2"), "");
    tasks.push(tokio::spawn(renewal.run(|_| {}, stop.clone())));
    let peer = RaftPeer::new(MetadId(1), &node.address, &metad).unwrap();
    // Several lives long: every call is answered at the first attempt.
    let mut calls = 0_u64;
    while agent.generation() < 3 || server.generation() < 3 || metad.generation() < 3 {
        let register = crate::api::Mutation::RegisterAgent {
            location: "loc1".parse().unwrap(),
            node: "n1".parse().unwrap(),
        };
        client.mutate(register).await.unwrap();
        client.backends().await.unwrap();
        let reply = peer.call(RaftRpc::Append, Bytes::from_static(b"x"), DEADLINE);
        reply.await.unwrap();
        calls += 1;
    }
    assert_eq!(cluster.applied() as u64, calls, "none was sent twice");
    // In use first, told then.
    until("all are told of", || {
        told.load(Ordering::SeqCst) == agent.generation()
    })
    .await;
    // What is in use is what is kept, and it is of the same process.
    until("it is kept", || {
        Identity::load(&place).is_ok_and(|kept| kept == agent.current())
    })
    .await;
    assert_eq!(agent.current().peer(), first.peer());
    let heard = cluster.heard.lock().unwrap().clone();
    let ends: Vec<u64> = heard.iter().map(|(_, ends_ms)| *ends_ms).collect();
    assert!(ends.is_sorted() && ends.first() < ends.last(), "{ends:?}");
    // The first certificate has ended since.
    assert!(first.expires_ms().unwrap() < wall_ms());
    let late = client_as(&first, &[&node]);
    let ended = late
        .mutate_within(revoke("a"), Duration::from_secs(1))
        .await;
    assert!(
        matches!(&ended, Err(MetadError::Unreachable(text)) if text.contains("xpired")),
        "{ended:?}"
    );
    stop.cancel();
    for task in tasks {
        task.await.unwrap();
    }
    node.stop().await;
}

#[tokio::test]
async fn a_connection_ends_with_the_certificate_it_was_made_under() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let brief = Duration::from_secs(3);
    let agent = cluster.ca.issue_for(Role::Agent, "loc1/n1", brief).unwrap();
    let client = client_as(&agent, &[&node]);
    let (_reports, mut orders) = client.agent_session(AgentId(1)).await.unwrap();
    // Nobody ends it but the server, which keeps its own end open.
    let waited = tokio::time::timeout(DEADLINE, async {
        while let Some(order) = orders.recv().await {
            assert!(order.is_err(), "{order:?}");
        }
    });
    waited.await.unwrap();
    assert!(
        wall_ms() >= agent.expires_ms().unwrap(),
        "not before its end"
    );
    node.stop().await;
}

#[tokio::test]
async fn who_asks_gets_its_own_identity_whatever_the_request_says() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let agent = cluster.ca.issue(Role::Agent, "loc1/n1").unwrap();
    let client = client_as(&agent, &[&node]);
    let admin = format!("qsfs://{}/admin/root", cluster.ca.cluster());
    let key = rcgen::KeyPair::generate().unwrap();
    let mut wish = rcgen::CertificateParams::default();
    wish.subject_alt_names = vec![rcgen::SanType::URI(admin.try_into().unwrap())];
    let csr = wish.serialize_request(&key).unwrap().pem().unwrap();
    let pem = client.renew_certificate(&csr).await.unwrap();
    let identity = Identity::from_pem(crate::identity::IdentityPem {
        certificate: pem,
        key: crate::api::Secret(key.serialize_pem()),
        ca: cluster.ca.ca_pem().to_owned(),
    });
    assert_eq!(identity.unwrap().peer(), agent.peer());
    for nonsense in ["", "no pem", "-----BEGIN CERTIFICATE REQUEST-----\n!\n"] {
        let refused = client.renew_certificate(nonsense).await;
        assert!(
            matches!(refused, Err(MetadError::Invalid(_))),
            "{refused:?}"
        );
    }
    // A signer that answers with somebody else's certificate is not believed.
    let impostor = local(&cluster, Role::Admin, "root");
    let refused = request(&*impostor, &agent).await;
    assert!(
        matches!(refused, Err(RenewalError::Identity(_))),
        "{refused:?}"
    );
    node.stop().await;
}

#[tokio::test]
async fn what_fails_is_tried_again_and_a_renewal_by_hand_is_taken_over() {
    let cluster = Cluster::new();
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("agent");
    let (agent, home) = housed(&cluster, &place, Role::Agent, "loc1/n1");
    let signer = local(&cluster, Role::Agent, "loc1/n1");
    signer.refuses.store(true, Ordering::SeqCst);
    let stop = CancellationToken::new();
    let renewal = Renewal::new(agent.clone(), home, signer.clone(), "join again");
    let running = tokio::spawn(renewal.run(|_| {}, stop.clone()));
    // Nobody signs until after the end; then a person brings a certificate.
    let end = agent.current().expires_ms().unwrap();
    until("the certificate ends", || wall_ms() > end).await;
    assert_eq!(agent.generation(), 0);
    let by_hand = cluster.ca.issue_for(Role::Agent, "loc1/n1", LIFE).unwrap();
    by_hand.save(&place).unwrap();
    until("it is taken over", || agent.current() == by_hand).await;
    signer.refuses.store(false, Ordering::SeqCst);
    until("it renews itself again", || agent.generation() > 1).await;
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_certificate_that_cannot_be_kept_is_used_and_kept_later() {
    let cluster = Cluster::new();
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("agent");
    let (agent, home) = housed(&cluster, &place, Role::Agent, "loc1/n1");
    let moved = dir.path().join("elsewhere");
    fs::rename(&place, &moved).unwrap();
    let signer = local(&cluster, Role::Agent, "loc1/n1");
    let stop = CancellationToken::new();
    let renewal = Renewal::new(agent.clone(), home, signer, "");
    let running = tokio::spawn(renewal.run(|_| {}, stop.clone()));
    until("it is in use", || agent.generation() > 0).await;
    fs::rename(&moved, &place).unwrap();
    until("it is kept", || {
        Identity::load(&place).is_ok_and(|kept| kept == agent.current())
    })
    .await;
    stop.cancel();
    running.await.unwrap();
}

fn ca() -> CertificateAuthority {
    CertificateAuthority::create(ClusterId::random(&mut rand::rng())).unwrap()
}

/// What a change does to a directory, with its name.
type Step<'a> = (&'static str, &'a dyn Fn(&Path));

/// Dies after every step of a change: what is there is the old identity or the new one, whole, and the next change goes through.
#[test]
fn a_change_of_files_that_is_interrupted_anywhere_leaves_one_whole_identity() {
    let ca = ca();
    let issue = || ca.issue(Role::Agent, "loc1/n1").unwrap();
    let (old, new, newest) = (issue(), issue(), issue());
    let pem = new.to_pem();
    let steps: [Step<'_>; 6] = [
        ("nothing", &|_| {}),
        ("half a draft of the key", &|dir| {
            fs::write(dir.join("key.pem.next.new"), &pem.key.0[..50]).unwrap();
        }),
        ("the key", &|dir| {
            fs::rename(dir.join("key.pem.next.new"), dir.join(NEXT_KEY_FILE)).unwrap();
            fs::write(dir.join(NEXT_KEY_FILE), &pem.key.0).unwrap();
        }),
        ("half a draft of the certificate", &|dir| {
            fs::write(dir.join("cert.pem.new"), &pem.certificate[..50]).unwrap();
        }),
        ("the certificate", &|dir| {
            fs::write(dir.join("cert.pem.new"), &pem.certificate).unwrap();
            fs::rename(dir.join("cert.pem.new"), dir.join(CERT_FILE)).unwrap();
        }),
        ("the key in its place", &|dir| {
            fs::rename(dir.join(NEXT_KEY_FILE), dir.join(KEY_FILE)).unwrap();
        }),
    ];
    for fresh in [false, true] {
        for end in 1..=steps.len() {
            let dir = tempfile::tempdir().unwrap();
            if fresh {
                fs::write(dir.path().join(CA_FILE), &pem.ca).unwrap();
            } else {
                old.save(dir.path()).unwrap();
            }
            steps[..end].iter().for_each(|(_, step)| step(dir.path()));
            let what = format!("fresh: {fresh}, up to {}", steps[end - 1].0);
            // From the certificate on it is the new one.
            match Identity::load(dir.path()) {
                Ok(found) => assert!(
                    found == if end > 4 { new.clone() } else { old.clone() },
                    "{what}"
                ),
                Err(_) => assert!(fresh && end <= 4, "{what}"),
            }
            newest.save(dir.path()).unwrap();
            assert!(Identity::load(dir.path()).unwrap() == newest, "{what}");
            assert!(!dir.path().join(NEXT_KEY_FILE).exists(), "{what}");
        }
    }
}

#[test]
fn an_older_certificate_never_replaces_a_newer_one() {
    let ca = ca();
    let dir = tempfile::tempdir().unwrap();
    let issue = |hours: u64| {
        let life = Duration::from_secs(hours * 3_600);
        ca.issue_for(Role::Client, "*", life).unwrap()
    };
    let (older, newer) = (issue(1), issue(2));
    let file = dir.path().join("cluster.toml");
    let context = Context::new(vec!["a:1".into()], older.clone(), Some("/state".into()));
    context.save(&file).unwrap();
    older.save(&dir.path().join("id")).unwrap();
    let homes: [Box<dyn Home>; 2] = [
        Box::new(ClusterFile(file.clone())),
        Box::new(IdentityDir(dir.path().join("id"))),
    ];
    for home in homes {
        assert_eq!(home.keep(&newer).unwrap(), newer);
        assert_eq!(home.keep(&older).unwrap(), newer);
        assert_eq!(home.load().unwrap(), newer);
    }
    // Who changes something else in the file does not bring the old certificate back.
    let endpoints = vec!["b:2".to_owned()];
    let changed = Context::update(&file, |kept| kept.with_endpoints(endpoints.clone()));
    assert_eq!(changed.unwrap().identity(), &newer);
    let kept = Context::load(&file).unwrap();
    assert_eq!(
        (kept.identity(), kept.endpoints()),
        (&newer, &endpoints[..])
    );
    assert_eq!(kept.state_dir(), Some(Path::new("/state")));
}

#[test]
fn no_certificate_outlives_the_authority_and_an_ended_one_is_told() {
    let ca = ca();
    let forever = Duration::from_secs(100 * 366 * 24 * 3_600);
    let identity = ca.issue_for(Role::Admin, "root", forever).unwrap();
    assert!(identity.expires_ms().unwrap() <= ca.expires_ms());
    let Validity { ends_ms, .. } = identity.validity().unwrap();
    assert!(identity.check_not_ended(ends_ms - 1, "join again").is_ok());
    let told = identity.check_not_ended(ends_ms + 3 * 86_400_000, "join again");
    let told = told.unwrap_err().to_string();
    assert!(
        told.contains("admin root ended 3 days ago") && told.contains("join again"),
        "{told}"
    );
}
