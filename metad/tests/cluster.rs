#![expect(clippy::unwrap_used, reason = "tests")]
//! Three metads over real sockets and TLS, in one process; each on a runtime of its own, so that one can be dropped at once.

#[path = "cluster/repair.rs"]
mod repair;
#[path = "cluster/security.rs"]
mod security;
#[path = "cluster/watch.rs"]
mod watch;

use qsfs_metad::{
    BootstrapOptions, JoinOptions, NodeError, ServeOptions, bootstrap, join, serve_on,
};
use qsfs_proto::api::{
    AgentOrder, AgentReport, Applied, BackendAddress, BackendFacts, ClusterSettings, Head,
    MetadError, Mutation, Role, Verdict, VolumeSettings,
};
use qsfs_proto::client::{AgentSession, MetadClient};
use qsfs_proto::context::Context;
use qsfs_proto::join::Joiner;
use qsfs_proto::token::JoinToken;
use qsfs_zstor::id::{
    AgentId, BackendId, ClientId, DatafileId, Epoch, KeyId, Salt, ShardHash, Stream, VolumeId,
};
use qsfs_zstor::policy::{Geometry, Policy};
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);
const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);

struct Node {
    data: PathBuf,
    address: String,
    runtime: Option<Runtime>,
}

impl Node {
    fn new(root: &Path, name: &str) -> (Self, std::net::TcpListener) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let node = Self {
            data: root.join(name),
            address: listener.local_addr().unwrap().to_string(),
            runtime: None,
        };
        (node, listener)
    }

    fn start(&mut self, listener: std::net::TcpListener) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let options = ServeOptions {
            data: self.data.clone(),
        };
        listener.set_nonblocking(true).unwrap();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            serve_on(options, listener, CancellationToken::new())
                .await
                .unwrap();
        });
        self.runtime = Some(runtime);
    }

    /// Everything of the node is dropped where it stands.
    fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A runtime must not be dropped from within another one.
            let dropper =
                std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(10)));
            dropper.join().unwrap();
        }
    }

    fn restart(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        let listener = loop {
            match std::net::TcpListener::bind(&self.address) {
                Ok(listener) => break listener,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        self.start(listener);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Cluster {
    nodes: Vec<Node>,
    context: Context,
    tokens: Vec<JoinToken>,
    client: MetadClient,
    _dir: tempfile::TempDir,
}

fn settings() -> ClusterSettings {
    ClusterSettings {
        heartbeat_ms: 100,
        suspect_after_ms: 500,
        down_after_ms: 1_000,
        lost_after_ms: 2_000,
        ..ClusterSettings::default()
    }
}

async fn start() -> Cluster {
    start_with(settings()).await
}

async fn start_with(settings: ClusterSettings) -> Cluster {
    let dir = tempfile::tempdir().unwrap();
    let (mut first, listener) = Node::new(dir.path(), "m1");
    let born = bootstrap(BootstrapOptions {
        name: "m1".parse().unwrap(),
        location: "loc1".parse().unwrap(),
        listen: first.address.clone(),
        advertise: None,
        data: first.data.clone(),
        settings,
        certificate_life: None,
        agent_tokens: 2,
    })
    .await
    .unwrap();
    first.start(listener);
    let mut nodes = vec![first];
    for (number, token) in (2..).zip(&born.tokens[..2]) {
        let name = format!("m{number}");
        let (mut node, listener) = Node::new(dir.path(), &name);
        join(JoinOptions {
            token: token.to_string(),
            name: name.parse().unwrap(),
            location: format!("loc{number}").parse().unwrap(),
            listen: node.address.clone(),
            advertise: None,
            data: node.data.clone(),
        })
        .await
        .unwrap();
        node.start(listener);
        nodes.push(node);
    }
    let endpoints = nodes.iter().map(|node| node.address.clone()).collect();
    let context = Context::new(endpoints, born.context.identity().clone(), None);
    let client = context.client(ClientId::from_bytes([1; 16])).unwrap();
    let cluster = Cluster {
        nodes,
        context,
        tokens: born.tokens[2..].to_vec(),
        client,
        _dir: dir,
    };
    cluster
        .until("three voters", |c| async move {
            let members = c.members().await.ok()?;
            (members.iter().filter(|m| m.voter && m.healthy).count() == 3).then_some(())
        })
        .await;
    cluster
}

impl Cluster {
    /// Asks again until it is so, or a minute is over.
    async fn until<T, F: Future<Output = Option<T>>>(
        &self,
        what: &str,
        ask: impl Fn(MetadClient) -> F,
    ) -> T {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(found) = ask(self.client.clone()).await {
                return found;
            }
            assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn leader(&self) -> usize {
        let address = self
            .until("a leader", |c| async move {
                let members = c.members().await.ok()?;
                members.into_iter().find(|m| m.leader).map(|m| m.address)
            })
            .await;
        self.nodes
            .iter()
            .position(|node| node.address == address)
            .unwrap()
    }
}

/// An agent without disks: it only says that its backends are well.
struct FakeAgent {
    client: MetadClient,
    id: AgentId,
    backends: Vec<BackendId>,
    session: AgentSession,
}

async fn fake_agent(cluster: &Cluster, token: &JoinToken, location: &str) -> FakeAgent {
    let joiner = Joiner {
        role: Role::Agent,
        name: "n1".into(),
        location: location.into(),
        address: String::new(),
    };
    let (identity, _) = qsfs_proto::join::join(token, joiner).await.unwrap();
    let client = MetadClient::new(
        cluster.context.endpoints().to_vec(),
        &identity,
        ClientId::random(&mut rand::rng()),
    )
    .unwrap();
    let register = Mutation::RegisterAgent {
        location: location.parse().unwrap(),
        node: "n1".parse().unwrap(),
    };
    let Applied::Agent(id) = client.mutate(register).await.unwrap() else {
        panic!("an agent id")
    };
    let mut backends = Vec::new();
    for namespace in ["a", "b"] {
        let register = Mutation::RegisterBackend {
            agent: id,
            address: BackendAddress {
                endpoint: format!("{location}:9900"),
                namespace: namespace.into(),
                password: None,
                tls: true,
            },
            capacity_bytes: 1 << 40,
        };
        match client.mutate(register).await.unwrap() {
            Applied::Backend(backend) => backends.push(backend),
            other => panic!("{other:?}"),
        }
    }
    let session = client.agent_session(id).await.unwrap();
    let agent = FakeAgent {
        client,
        id,
        backends,
        session,
    };
    agent.beat(None).await;
    agent
}

impl FakeAgent {
    async fn beat(&self, failed: Option<BackendId>) {
        let facts = self.backends.iter().map(|backend| BackendFacts {
            backend: *backend,
            healthy: failed != Some(*backend),
            problem: failed.map_or(String::new(), |_| "its directory is gone".into()),
            free_bytes: 1 << 40,
            ..BackendFacts::default()
        });
        let report = AgentReport::Heartbeat {
            facts: facts.collect(),
        };
        // A session that ended is noticed by whoever waits for its effect.
        drop(self.session.0.send(report).await);
    }
}

fn policy() -> Policy {
    Policy {
        geometry: Geometry::new(2, 2).unwrap(),
        survive_locations: 1,
        survive_nodes: 1,
    }
}

fn create_volume() -> Mutation {
    Mutation::CreateVolume {
        id: VOLUME,
        name: "dev".parse().unwrap(),
        policy: policy(),
        key_id: KeyId::from_bytes([3; 16]),
        settings: VolumeSettings::default(),
    }
}

fn record(datafile: u64, epoch: Epoch, backends: &[BackendId]) -> EncodingRecord {
    let shards = backends.iter().map(|backend| Shard {
        backend: *backend,
        hash: ShardHash::from_bytes([1; 32]),
        state: ShardState::Stored,
    });
    EncodingRecord {
        volume: VOLUME,
        datafile: DatafileId(datafile),
        stream: Stream::Meta,
        epoch,
        salt: Salt::random(&mut rand::rng()),
        geometry: policy().geometry,
        chunk_bytes: 1 << 20,
        plain_bytes: 100,
        object_bytes: 200,
        shard_bytes: 100,
        piece_bytes: 1 << 20,
        shards: shards.collect(),
        version: 0,
    }
}

async fn acquire(client: &MetadClient) -> Epoch {
    let mutation = Mutation::AcquireLease {
        volume: VOLUME,
        client: ClientId::from_bytes([1; 16]),
        holder: "host:1".into(),
        takeover: false,
    };
    match client.mutate(mutation).await.unwrap() {
        Applied::Epoch(epoch) => epoch,
        other => panic!("{other:?}"),
    }
}

async fn commit(client: &MetadClient, epoch: Epoch, datafile: u64, backends: &[BackendId]) {
    let mutation = Mutation::CommitDatafiles {
        volume: VOLUME,
        epoch,
        records: vec![record(datafile, epoch, backends)],
        head: Some(Head {
            datafile: DatafileId(datafile),
            recover_from: DatafileId(1),
        }),
    };
    assert_eq!(client.mutate(mutation).await, Ok(Applied::Done));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_dies_and_then_all_and_nothing_committed_is_lost() {
    let mut cluster = start().await;
    let client = cluster.client.clone();
    assert!(matches!(
        client.mutate(create_volume()).await,
        Err(MetadError::PolicyUnmet(_))
    ));
    let tokens = cluster.tokens.clone();
    let mut backends = Vec::new();
    let mut agents = Vec::new();
    for (token, location) in tokens.iter().zip(["loc1", "loc2"]) {
        let agent = fake_agent(&cluster, token, location).await;
        backends.extend(agent.backends.clone());
        agents.push(agent);
    }
    client.mutate(create_volume()).await.unwrap();
    let placement = client.placement(VOLUME, 1 << 20).await.unwrap();
    assert!(placement.full_policy, "{placement:?}");
    let epoch = acquire(&client).await;
    commit(&client, epoch, 1, &backends).await;

    let dead = cluster.leader().await;
    cluster.nodes[dead].kill();
    commit(&client, epoch, 2, &backends).await;
    let next = cluster.leader().await;
    assert_ne!(next, dead);
    cluster
        .until("the dead metad is told", |c| async move {
            let status = c.status().await.ok()?;
            let told = status.findings.iter().any(|f| f.name == "METAD_DOWN");
            told.then_some(())
        })
        .await;
    cluster.nodes[dead].restart();
    cluster
        .until("three again", |c| async move {
            let status = c.status().await.ok()?;
            (status.quorum.healthy == 3).then_some(())
        })
        .await;

    for node in &mut cluster.nodes {
        node.kill();
    }
    for node in &mut cluster.nodes {
        node.restart();
    }
    let records = cluster
        .until("the records", |c| async move {
            c.list_records(VOLUME, None, DatafileId(0), 10).await.ok()
        })
        .await;
    let ids: Vec<_> = records.iter().map(|record| record.datafile.0).collect();
    assert_eq!(ids, [1, 2]);
    let volume = client.volume(&"dev".parse().unwrap()).await.unwrap();
    assert_eq!(volume.head.datafile, DatafileId(2));
    commit(&client, epoch, 3, &backends).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_backend_is_down_at_once_lost_later_and_its_shards_are_rebuilt() {
    let cluster = start().await;
    let client = cluster.client.clone();
    let tokens = cluster.tokens.clone();
    let mut agents = [
        fake_agent(&cluster, &tokens[0], "loc1").await,
        fake_agent(&cluster, &tokens[1], "loc2").await,
    ];
    let backends: Vec<_> = agents.iter().flat_map(|a| a.backends.clone()).collect();
    client.mutate(create_volume()).await.unwrap();
    let epoch = acquire(&client).await;
    commit(&client, epoch, 1, &backends).await;
    let failed = backends[0];

    let deadline = Instant::now() + DEADLINE;
    let job = loop {
        assert!(Instant::now() < deadline, "no rebuild was ordered");
        agents[0].beat(Some(failed)).await;
        agents[1].beat(None).await;
        let orders = &mut agents[0].session.1;
        match tokio::time::timeout(Duration::from_millis(100), orders.recv()).await {
            Ok(Some(Ok(AgentOrder::Rebuild(job)))) => break job,
            Ok(None | Some(Err(_))) => panic!("the session ended"),
            _ => {}
        }
    };
    assert_eq!((job.shard, job.record.datafile), (0, DatafileId(1)));
    assert_eq!(
        job.to, backends[1],
        "the other backend of the same location"
    );
    let status = client.status().await.unwrap();
    assert!(status.findings.iter().any(|f| f.name == "BACKEND_DOWN"));
    assert_eq!(status.backends[0].state, "lost");

    let agent = &agents[0];
    let swap = Mutation::SwapShard {
        volume: VOLUME,
        datafile: DatafileId(1),
        shard: 0,
        from: failed,
        to: job.to,
        version: job.record.version,
    };
    agent.client.mutate(swap).await.unwrap();
    let done = AgentReport::RebuildDone {
        volume: VOLUME,
        datafile: DatafileId(1),
        shard: 0,
        bytes: 100,
        error: None,
    };
    agent.session.0.send(done).await.unwrap();
    cluster
        .until("well again", |c| {
            let (one, two) = (agents[0].beat(Some(failed)), agents[1].beat(None));
            async move {
                one.await;
                two.await;
                let status = c.status().await.ok()?;
                (status.findings.is_empty() && status.resilver.pending_shards == 0).then_some(())
            }
        })
        .await;
    let records = client.records(VOLUME, &[DatafileId(1)]).await.unwrap();
    assert_eq!(records[0].shards[0].backend, job.to);
    let all = client.backends().await.unwrap();
    assert_eq!(all[0].verdict, Verdict::Lost);
    assert_eq!(agents[0].id, all[0].agent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_directories_and_names_are_refused_when_they_are_not_fit() {
    let cluster = start().await;
    let dir = tempfile::tempdir().unwrap();
    let options = |token: &JoinToken, name: &str, data: &Path| JoinOptions {
        token: token.to_string(),
        name: name.parse().unwrap(),
        location: "loc1".parse().unwrap(),
        listen: "127.0.0.1:1".into(),
        advertise: None,
        data: data.to_owned(),
    };
    let fresh = dir.path().join("fresh");
    let agent_token = &cluster.tokens[0];
    let refused = join(options(agent_token, "m9", &fresh)).await;
    assert!(
        matches!(&refused, Err(NodeError::Metad(MetadError::Token(_)))),
        "{refused:?}"
    );

    let new_token = JoinToken::new(
        Role::Metad,
        agent_token.cluster(),
        agent_token.ca_hash(),
        agent_token.endpoints().to_vec(),
        &mut rand::rng(),
    )
    .unwrap();
    let refused = join(options(&new_token, "m9", &fresh)).await;
    assert!(
        matches!(&refused, Err(NodeError::Metad(MetadError::Token(_)))),
        "{refused:?}"
    );
    let create = Mutation::CreateToken {
        hash: new_token.secret_hash(),
        role: Role::Metad,
        ttl_ms: 60_000,
    };
    cluster.client.mutate(create).await.unwrap();
    let refused = join(options(&new_token, "m2", &fresh)).await;
    assert!(
        matches!(&refused, Err(NodeError::Metad(MetadError::Exists(_)))),
        "{refused:?}"
    );

    let used = join(options(&new_token, "m9", &cluster.nodes[1].data)).await;
    assert!(matches!(&used, Err(NodeError::InUse { .. })), "{used:?}");
    let full = dir.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("photo.jpg"), b"x").unwrap();
    let other = join(options(&new_token, "m9", &full)).await;
    assert!(
        matches!(&other, Err(NodeError::NotEmpty { .. })),
        "{other:?}"
    );
}
