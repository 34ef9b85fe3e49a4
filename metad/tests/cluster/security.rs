//! Who may say what, where only the state or Raft knows; and what a token leaves behind. Roles alone: `proto/src/tests/roles.rs`.

use super::*;
use openraft::raft::VoteRequest;
use qsfs_proto::api::Secret;
use qsfs_proto::ca::CertificateAuthority;
use qsfs_proto::identity::{Identity, KeyRequest};
use qsfs_proto::raft::{RaftCallError, RaftPeer, RaftRpc};
use qsfs_zstor::id::MetadId;

fn denied<T: std::fmt::Debug>(ended: Result<T, MetadError>, naming: &str) {
    match ended {
        Err(MetadError::Denied(text)) => assert!(text.contains(naming), "{text}"),
        other => panic!("{other:?}"),
    }
}

/// Whoever has a node's disk has the authority.
fn authority(cluster: &Cluster) -> CertificateAuthority {
    qsfs_metad::authority(&cluster.nodes[0].data).unwrap()
}

fn client(cluster: &Cluster, identity: &Identity) -> MetadClient {
    let own = ClientId::random(&mut rand::rng());
    MetadClient::new(cluster.context.endpoints().to_vec(), identity, own).unwrap()
}

fn vote(term: u64, of: u64) -> bytes::Bytes {
    let request = VoteRequest::<u64>::new(openraft::Vote::new(term, of), None);
    // The first byte is the version of payloads.
    postcard::to_extend(&request, vec![1]).unwrap().into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_speak_for_themselves_alone() {
    // Nobody is down for being silent for a second.
    let cluster = start_with(ClusterSettings::default()).await;
    let mut one = fake_agent(&cluster, &cluster.tokens[0], "loc1").await;
    let other = fake_agent(&cluster, &cluster.tokens[1], "loc2").await;
    // What is said of a backend that the leader does not know yet is not heard.
    loop {
        match tokio::time::timeout(DEADLINE, one.session.1.recv()).await {
            Ok(Some(Ok(AgentOrder::Backends(known)))) if known.len() == 4 => break,
            Ok(Some(Ok(_))) => {}
            ended => panic!("the leader does not tell of the backends: {ended:?}"),
        }
    }
    denied(
        one.client.agent_session(other.id).await.map(drop),
        "is not loc1/n1",
    );
    let register = Mutation::RegisterBackend {
        agent: other.id,
        address: BackendAddress {
            endpoint: "evil:1".into(),
            namespace: "a".into(),
            password: None,
            tls: true,
        },
        capacity_bytes: 1,
    };
    denied(one.client.mutate(register).await, "is not loc1/n1");
    let swap = |to: BackendId| Mutation::SwapShard {
        volume: VOLUME,
        datafile: DatafileId(1),
        shard: 0,
        from: one.backends[0],
        to,
        version: 0,
    };
    denied(
        one.client.mutate(swap(other.backends[0])).await,
        "is not loc1/n1",
    );
    let owned = one.client.mutate(swap(one.backends[1])).await;
    assert!(!matches!(owned, Err(MetadError::Denied(_))), "{owned:?}");
    // What it says of another's backends counts for nothing: these stay up while their own agent says so.
    let lie = AgentReport::Heartbeat {
        facts: vec![BackendFacts {
            backend: other.backends[0],
            healthy: false,
            problem: "gone".into(),
            ..BackendFacts::default()
        }],
    };
    one.session.0.send(lie).await.unwrap();
    // Its own trouble, told after it, is believed: so the lie was heard before.
    one.beat(Some(one.backends[0])).await;
    let verdicts = cluster
        .until("its own backend is down", |c| async move {
            let all = c.backends().await.ok()?;
            let down = |b: &qsfs_proto::api::Backend| b.verdict == Verdict::Down;
            all.iter().any(down).then_some(all)
        })
        .await;
    for backend in verdicts {
        let down = backend.verdict == Verdict::Down;
        assert_eq!(down, backend.id == one.backends[0], "{backend:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_one_volume_learns_and_does_nothing_about_another() {
    let cluster = start().await;
    for (token, location) in cluster.tokens.iter().zip(["loc1", "loc2"]) {
        fake_agent(&cluster, token, location).await;
    }
    cluster.client.mutate(create_volume()).await.unwrap();
    let other = VolumeId::from_bytes([8; 16]);
    let mut another = create_volume();
    if let Mutation::CreateVolume { id, name, .. } = &mut another {
        (*id, *name) = (other, "other".parse().unwrap());
    }
    cluster.client.mutate(another).await.unwrap();
    let request = KeyRequest::new().unwrap();
    let pem = cluster
        .client
        .issue_client_certificate(request.csr_pem(), Some(other))
        .await
        .unwrap();
    let ca = cluster.context.identity().ca_pem().to_owned();
    let identity = request.finish(pem, ca).unwrap();
    let bound = client(&cluster, &identity);
    assert_eq!(bound.volumes().await.unwrap().len(), 1);
    denied(bound.volume(&"dev".parse().unwrap()).await, "does not open");
    denied(bound.volume_by_id(VOLUME).await, "does not open");
    denied(
        bound.list_records(VOLUME, None, DatafileId(0), 1).await,
        "does not open",
    );
    denied(bound.placement(VOLUME, 100).await, "does not open");
    let lease = Mutation::AcquireLease {
        volume: VOLUME,
        client: ClientId::from_bytes([1; 16]),
        holder: "host:1".into(),
        takeover: true,
    };
    denied(bound.mutate(lease).await, "does not open");
    // Its own is renewed for as long as its volume is there.
    let csr = KeyRequest::new().unwrap();
    let renewed = bound.renew_certificate(csr.csr_pem()).await.unwrap();
    let renewed = csr.finish(renewed, identity.ca_pem().to_owned()).unwrap();
    assert_eq!(renewed.peer(), identity.peer());
    cluster
        .client
        .mutate(Mutation::DeleteVolume { volume: other })
        .await
        .unwrap();
    let csr = KeyRequest::new().unwrap();
    denied(
        bound.renew_certificate(csr.csr_pem()).await,
        "does not exist any more",
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_agents_that_registered_are_renewed_and_a_metad_asks_nobody() {
    let cluster = start().await;
    let csr = KeyRequest::new().unwrap();
    let authority = authority(&cluster);
    let stranger = authority.issue(Role::Agent, "loc9/n9").unwrap();
    let stranger = client(&cluster, &stranger);
    denied(
        stranger.renew_certificate(csr.csr_pem()).await,
        "agent loc9/n9 does not exist",
    );
    // Not by a node that may not have heard either.
    denied(
        stranger.stale().renew_certificate(csr.csr_pem()).await,
        "agent loc9/n9 does not exist",
    );
    let metad = authority.issue(Role::Metad, "1").unwrap();
    denied(
        client(&cluster, &metad)
            .renew_certificate(csr.csr_pem())
            .await,
        "role metad",
    );
    let known = fake_agent(&cluster, &cluster.tokens[0], "loc1").await;
    let life_ms = 3_600_000;
    let set = Mutation::SetCertificateLife { life_ms };
    cluster
        .until("all nodes know the setting", |c| {
            let set = set.clone();
            async move { c.mutate(set).await.ok() }
        })
        .await;
    assert_eq!(cluster.client.certificate_life_ms().await, Ok(life_ms));
    let pem = known.client.renew_certificate(csr.csr_pem()).await.unwrap();
    let renewed = csr
        .finish(pem, cluster.context.identity().ca_pem().to_owned())
        .unwrap();
    assert_eq!(renewed.subject(), "loc1/n1");
    assert_eq!(renewed.validity().unwrap().life_ms(), life_ms);
    for life_ms in [0, 4_999, u64::MAX] {
        let refused = cluster
            .client
            .mutate(Mutation::SetCertificateLife { life_ms })
            .await;
        assert!(
            matches!(refused, Err(MetadError::Invalid(_))),
            "{refused:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_metad_speaks_in_its_own_name_and_a_removed_one_not_at_all() {
    let cluster = start().await;
    let leader = cluster.leader().await;
    let authority = authority(&cluster);
    let members = cluster.client.members().await.unwrap();
    let id_of = |at: usize| {
        let address = &cluster.nodes[at].address;
        members.iter().find(|m| m.address == *address).unwrap().id
    };
    let (target, gone) = (id_of(leader), id_of((leader + 1) % 3));
    let as_metad = |id: MetadId| {
        let identity = authority.issue(Role::Metad, &id.to_string()).unwrap();
        RaftPeer::new(target, &cluster.nodes[leader].address, &identity).unwrap()
    };
    let refused = |ended: Result<bytes::Bytes, RaftCallError>, naming: &str| match ended {
        Err(RaftCallError::Refused { reason, .. }) => assert!(reason.contains(naming), "{reason}"),
        other => panic!("{other:?}"),
    };
    let ask = |from: MetadId, of: u64| async move {
        as_metad(from)
            .call(RaftRpc::Vote, vote(1, of), DEADLINE)
            .await
    };
    refused(ask(gone, target.0).await, "spoke in the name of");
    assert!(
        ask(gone, gone.0).await.is_ok(),
        "of an old term, and answered"
    );
    let Cluster {
        mut nodes, client, ..
    } = cluster;
    nodes[(leader + 1) % 3].kill();
    let deadline = Instant::now() + DEADLINE;
    while client.remove_member(gone).await.is_err() {
        assert!(Instant::now() < deadline, "it is removed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let identity = authority.issue(Role::Metad, &gone.to_string()).unwrap();
    let peer = RaftPeer::new(target, &nodes[leader].address, &identity).unwrap();
    // However new the term it asks votes for: who leads goes on.
    let asked = peer
        .call(RaftRpc::Vote, vote(1_000_000, gone.0), DEADLINE)
        .await;
    refused(asked, "was removed");
    let members = client.members().await.unwrap();
    assert!(
        members
            .iter()
            .any(|member| member.id == target && member.leader)
    );
}

/// Every file below, with what it holds.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            // One that is just being replaced is read under its new name.
            found.extend(std::fs::read(&path).ok().map(|bytes| (path, bytes)));
        }
    }
    found
}

fn holds(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_secret_of_a_token_is_on_no_disk_and_joins_one_key_once() {
    let mut cluster = start().await;
    // One is used, one is not.
    fake_agent(&cluster, &cluster.tokens[0], "loc1").await;
    let joiner = || Joiner {
        role: Role::Agent,
        name: "n1".into(),
        location: "loc1".into(),
        address: String::new(),
    };
    let again = qsfs_proto::join::join(&cluster.tokens[0], joiner()).await;
    assert!(
        matches!(&again, Err(MetadError::Token(text)) if text.contains("used already")),
        "{again:?}"
    );
    let backup = cluster.nodes[0].data.join("copy.backup");
    qsfs_metad::backup::take(&cluster.nodes[0].data, &backup)
        .await
        .unwrap();
    for node in &mut cluster.nodes {
        node.kill();
    }
    let all: Vec<_> = cluster
        .nodes
        .iter()
        .flat_map(|node| files(&node.data))
        .collect();
    let in_log = |what: &[u8]| {
        let logs = all
            .iter()
            .filter(|(path, _)| path.to_string_lossy().contains("/log/"));
        logs.filter(|(_, bytes)| holds(bytes, what)).count()
    };
    for token in &cluster.tokens {
        let Secret(text) = token.secret();
        let raw: Vec<u8> = (0..text.len() / 2)
            .map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap())
            .collect();
        // Its hash is there, so what is looked at is what is kept.
        assert!(in_log(&token.secret_hash()) >= 3, "{} files", all.len());
        let whole = token.to_string();
        for (path, bytes) in &all {
            for secret in [text.as_bytes(), &raw, whole.as_bytes()] {
                assert!(!holds(bytes, secret), "{}", path.display());
            }
        }
    }
    // The authority's key is in its own file alone, and in the backup's.
    let key = std::fs::read(cluster.nodes[0].data.join("ca-key.pem")).unwrap();
    let body = key.split(|byte| *byte == b'\n').nth(1).unwrap();
    for (path, bytes) in &all {
        let may = path.to_string_lossy().ends_with("ca-key.pem");
        assert_eq!(holds(bytes, body), may, "{}", path.display());
    }
}
