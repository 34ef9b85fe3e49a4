//! Joined agents over the real wire: tokens, TLS, sessions, backends on disk. Only metad is a fake (one node, no Raft).
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "cluster/fake.rs"]
mod fake;

use bytes::Bytes;
use fake::{Fake, Node, eventually};
use qsfs_agent::{AgentError, JoinOptions, Joined, ServeOptions, join, serve};
use qsfs_proto::api::{AgentOrder, AgentReport, RebuildJob, Role};
use qsfs_proto::tls::{AGENT_SERVER_NAME, client_config};
use qsfs_zdb::client::{ClientConfig, ClientTls, Password, ZdbClient};
use qsfs_zstor::codec::{Layout, ShardHashes, Stripe, StripeEncoder};
use qsfs_zstor::id::{AgentId, BackendId, DatafileId, Epoch, Salt, Stream, VolumeId};
use qsfs_zstor::key::ObjectIds;
use qsfs_zstor::record::EncodingRecord;
use std::path::Path;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const OBJECT_BYTES: u64 = 300_000;

fn options(home: &Path, token: String, name: &str, backends: usize) -> JoinOptions {
    let backend = |index: usize| {
        format!(
            "{}=64MiB",
            home.join(format!("{name}-disk{index}")).display()
        )
    };
    JoinOptions {
        token,
        name: name.parse().unwrap(),
        location: "loc1".parse().unwrap(),
        listen: "127.0.0.1:0".parse().unwrap(),
        advertise: None,
        data: home.join(name),
        backends: (0..backends)
            .map(|index| backend(index).parse().unwrap())
            .collect(),
        attach: vec![],
    }
}

struct Agent {
    joined: Joined,
    stop: CancellationToken,
    task: JoinHandle<Result<(), AgentError>>,
}

impl Agent {
    async fn start(home: &Path, fake: &Fake, name: &str, backends: usize) -> Self {
        let token = fake.token(Role::Agent).to_string();
        let joined = join(options(home, token, name, backends)).await.unwrap();
        Self::serve(home, fake, name, joined).await
    }

    /// Serves, and waits for its session: then it listens.
    async fn serve(home: &Path, fake: &Fake, name: &str, joined: Joined) -> Self {
        fake.sessions.lock().remove(&joined.agent);
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(
            ServeOptions {
                data: home.join(name),
            },
            stop.clone(),
        ));
        let session = || {
            fake.sessions
                .lock()
                .contains_key(&joined.agent)
                .then_some(())
        };
        eventually("a session", session).await;
        Self { joined, stop, task }
    }

    async fn stop(self) -> Joined {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
        self.joined
    }
}

/// A mount's view of a backend.
fn client(fake: &Fake, backend: BackendId) -> ZdbClient {
    let backends = fake.backends.lock();
    let address = &backends
        .iter()
        .find(|known| known.id == backend)
        .unwrap()
        .address;
    assert!(address.tls);
    let identity = fake.ca.issue(Role::Client, "*").unwrap();
    let mut config = ClientConfig::new(address.endpoint.clone(), address.namespace.clone());
    config.password = address
        .password
        .as_ref()
        .map(|secret| Password::new(secret.0.clone()));
    config.tls = Some(ClientTls {
        config: client_config(&identity).unwrap(),
        server_name: AGENT_SERVER_NAME.into(),
    });
    ZdbClient::new(config)
}

/// Stores a stripe with shard `i` on backend `i`, as a mount does, and commits it.
async fn push(fake: &Fake, datafile: u64) -> EncodingRecord {
    let geometry = "4+2".parse().unwrap();
    let ids = ObjectIds {
        volume: VolumeId::from_bytes([1; 16]),
        stream: Stream::Data,
        datafile: DatafileId(datafile),
        epoch: Epoch(1),
        salt: Salt::random(&mut rand::rng()),
    };
    let layout = Layout::new(geometry, OBJECT_BYTES, 8 << 10).unwrap();
    let stripe = Stripe::new(ids, 1 << 20, OBJECT_BYTES, layout).unwrap();
    let encoder = StripeEncoder::new(stripe);
    let mut hashes = ShardHashes::new(&stripe);
    let clients: Vec<ZdbClient> = (0..6).map(|id| client(fake, BackendId(id))).collect();
    for row in 0..encoder.rows() {
        let fill = |offset: u64, buffer: &mut [u8]| {
            for (at, byte) in (offset..).zip(buffer) {
                *byte = blake3::hash(&(at / 32 + datafile).to_le_bytes()).as_bytes()
                    [(at % 32) as usize];
            }
            Ok::<(), ()>(())
        };
        for (client, piece) in clients.iter().zip(encoder.encode_row(row, fill).unwrap()) {
            hashes.add(&piece.header);
            client
                .set(&piece.header.key().to_bytes(), piece.value)
                .await
                .unwrap();
        }
    }
    let backends: Vec<BackendId> = (0..6).map(BackendId).collect();
    let record = stripe.record(&hashes.all().unwrap(), &backends).unwrap();
    fake.records
        .lock()
        .insert((record.volume, record.datafile), record.clone());
    record
}

async fn shard(client: &ZdbClient, record: &EncodingRecord, shard: u32) -> Vec<Option<Bytes>> {
    let mut pieces = Vec::new();
    for key in Stripe::of(record).unwrap().shard_keys(shard) {
        pieces.push(client.get(&key.to_bytes()).await.unwrap());
    }
    pieces
}

async fn rebuilt(fake: &Fake, agent: AgentId, record: &EncodingRecord) -> AgentReport {
    eventually("the end of a rebuild", || {
        let said = fake.said.lock();
        let of_it = |report: &AgentReport| {
            matches!(report, AgentReport::RebuildDone { datafile, .. } if *datafile == record.datafile)
        };
        said.iter().find(|(from, report)| *from == agent && of_it(report)).map(|(_, report)| report.clone())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_is_rebuilt_from_another_node_over_tls_after_its_agent_died() {
    let home = tempfile::tempdir().unwrap();
    let node = Node::start().await;
    let fake = &node.fake;
    let first = Agent::start(home.path(), fake, "n1", 1).await;
    let second = Agent::start(home.path(), fake, "n2", 5).await;
    let third = Agent::start(home.path(), fake, "n3", 1).await;
    assert_eq!(first.joined.backends, [BackendId(0)]);
    let record = push(fake, 1).await;
    let lost = shard(&client(fake, BackendId(0)), &record, 0).await;
    assert!(lost.iter().all(Option::is_some));
    first.stop().await;
    let target = third.joined.agent;
    let job = RebuildJob {
        record: record.clone(),
        shard: 0,
        to: BackendId(6),
    };
    fake.order(target, AgentOrder::Rebuild(job)).await;
    let done = rebuilt(fake, target, &record).await;
    assert!(
        matches!(&done, AgentReport::RebuildDone { error: None, .. }),
        "{done:?}"
    );
    assert_eq!(fake.record(&record).shards[0].backend, BackendId(6));
    assert_eq!(shard(&client(fake, BackendId(6)), &record, 0).await, lost);
    // What an agent stored is there after its restart, at the same address.
    let joined = third.stop().await;
    let third = Agent::serve(home.path(), fake, "n3", joined).await;
    assert_eq!(shard(&client(fake, BackendId(6)), &record, 0).await, lost);
    third.stop().await;
    second.stop().await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_another_cluster_gets_nothing() {
    let home = tempfile::tempdir().unwrap();
    let (node, stranger) = (Node::start().await, Node::start().await);
    let agent = Agent::start(home.path(), &node.fake, "n1", 1).await;
    assert!(client(&node.fake, BackendId(0)).ping().await.is_ok());
    *stranger.fake.backends.lock() = node.fake.backends.lock().clone();
    assert!(client(&stranger.fake, BackendId(0)).ping().await.is_err());
    agent.stop().await;
    node.stop().await;
    stranger.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_that_cannot_be_says_why_and_uses_no_token() {
    let home = tempfile::tempdir().unwrap();
    let (node, other) = (Node::start().await, Node::start().await);
    let fake = &node.fake;
    let token = || fake.token(Role::Agent).to_string();
    let with = |token: String| options(home.path(), token, "n1", 1);
    let refused = |options: JoinOptions| async { join(options).await.unwrap_err() };
    assert!(matches!(
        refused(with("qsfs1-garbage".into())).await,
        AgentError::Token(_)
    ));
    assert!(matches!(
        refused(with(fake.token(Role::Metad).to_string())).await,
        AgentError::Token(_)
    ));
    assert!(matches!(
        refused(options(home.path(), token(), "n1", 0)).await,
        AgentError::NoBackends
    ));
    let mut twice = with(token());
    twice.backends.push(twice.backends[0].clone());
    assert!(matches!(refused(twice).await, AgentError::Twice(_)));
    let anywhere = JoinOptions {
        listen: "0.0.0.0:0".parse().unwrap(),
        ..with(token())
    };
    assert!(matches!(refused(anywhere).await, AgentError::Advertise(_)));
    let foreign = home.path().join("n1-disk0");
    std::fs::create_dir_all(&foreign).unwrap();
    std::fs::write(foreign.join("photo.jpg"), "x").unwrap();
    assert!(matches!(
        refused(with(token())).await,
        AgentError::BackendNotEmpty(_)
    ));
    std::fs::remove_file(foreign.join("photo.jpg")).unwrap();
    std::fs::write(home.path().join("n1/notes"), "x").unwrap();
    assert!(matches!(
        refused(with(token())).await,
        AgentError::DataNotEmpty(_)
    ));
    std::fs::remove_file(home.path().join("n1/notes")).unwrap();
    assert!(fake.used.lock().is_empty() && fake.agents.lock().is_empty());
    // Now it works; and only once.
    let once = token();
    let joined = join(with(once.clone())).await.unwrap();
    assert!(matches!(
        refused(with(once.clone())).await,
        AgentError::AlreadyJoined { .. }
    ));
    assert!(matches!(
        refused(with(other.fake.token(Role::Agent).to_string())).await,
        AgentError::OtherCluster { .. }
    ));
    let again = refused(options(home.path(), once, "n2", 1)).await;
    assert!(
        matches!(&again, AgentError::Metad(error) if error.to_string().contains("token refused")),
        "{again}"
    );
    let mut taken = options(home.path(), token(), "n3", 1);
    taken.backends = with(token()).backends;
    assert!(matches!(
        refused(taken).await,
        AgentError::BackendTaken { .. }
    ));
    assert_eq!(joined.backends, [BackendId(0)]);
    let missing = serve(
        ServeOptions {
            data: home.path().join("no"),
        },
        CancellationToken::new(),
    )
    .await;
    assert!(matches!(missing, Err(AgentError::NotJoined(_))));
    node.stop().await;
    other.stop().await;
}
