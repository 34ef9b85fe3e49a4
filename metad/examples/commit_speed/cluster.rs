//! Three metad processes (this program again) and callers that commit.

use crate::{CALLERS_PER_CONNECTION, Latencies, gather};
use anyhow::{Context as _, Result, bail};
use qsfs_metad::state::command::{Command, Entry, Request};
use qsfs_metad::{BootstrapOptions, JoinOptions, ServeOptions, bootstrap, join};
use qsfs_proto::api::{Applied, BackendAddress, ClusterSettings, Mutation, Role, VolumeSettings};
use qsfs_proto::client::MetadClient;
use qsfs_proto::context::Context;
use qsfs_proto::join::Joiner;
use qsfs_zstor::id::{
    BackendId, ClientId, DatafileId, Epoch, KeyId, Salt, ShardHash, Stream, VolumeId,
};
use qsfs_zstor::policy::{Geometry, Policy};
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);
const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);
const HOUR_MS: u64 = 3_600_000;

/// What a child process does.
pub(crate) fn serve(data: PathBuf) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    Ok(runtime.block_on(qsfs_metad::serve(
        ServeOptions { data },
        CancellationToken::new(),
    ))?)
}

struct Node {
    /// `qsfs`; without it this program.
    program: Option<PathBuf>,
    data: PathBuf,
    address: String,
    child: Option<Child>,
}

impl Node {
    fn new(root: &Path, name: &str, program: Option<&Path>) -> Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        Ok(Self {
            program: program.map(Path::to_owned),
            data: root.join(name),
            address: listener.local_addr()?.to_string(),
            child: None,
        })
    }

    fn start(&mut self) -> Result<()> {
        let mut command = if let Some(program) = &self.program {
            let mut command = std::process::Command::new(program);
            command.args(["metad", "serve", "--data"]);
            command
        } else {
            let mut command = std::process::Command::new(std::env::current_exe()?);
            // As the program sets it for what it leaves to this allocator.
            command.env("MALLOC_ARENA_MAX", "2").arg("serve");
            command
        };
        command.arg(&self.data).stdin(Stdio::null());
        self.child = Some(command.spawn()?);
        Ok(())
    }

    /// SIGKILL.
    fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{error}");
        }
    }
}

/// Three voters, a volume, its lease, four backends nobody serves.
pub(crate) struct Cluster {
    nodes: Vec<Node>,
    context: Context,
    epoch: Epoch,
    backends: Arc<Vec<BackendId>>,
    next: Arc<AtomicU64>,
}

impl Cluster {
    pub(crate) async fn start(root: &Path, program: Option<&Path>) -> Result<Self> {
        let mut first = Node::new(root, "m1", program)?;
        let born = bootstrap(BootstrapOptions {
            name: "m1".parse()?,
            location: "loc1".parse()?,
            listen: first.address.clone(),
            advertise: None,
            data: first.data.clone(),
            settings: quiet(),
            certificate_life: None,
            agent_tokens: 2,
        })
        .await?;
        first.start()?;
        let mut nodes = vec![first];
        for (number, token) in (2..).zip(&born.tokens[..2]) {
            let name = format!("m{number}");
            let mut node = Node::new(root, &name, program)?;
            join(JoinOptions {
                token: token.to_string(),
                name: name.parse()?,
                location: format!("loc{number}").parse()?,
                listen: node.address.clone(),
                advertise: None,
                data: node.data.clone(),
            })
            .await?;
            node.start()?;
            nodes.push(node);
        }
        let endpoints = nodes.iter().map(|node| node.address.clone()).collect();
        let context = Context::new(endpoints, born.context.identity().clone(), None);
        let mut cluster = Self {
            nodes,
            context,
            epoch: Epoch(0),
            backends: Arc::default(),
            next: Arc::new(AtomicU64::new(1)),
        };
        cluster.until_healthy().await?;
        let mut backends = Vec::new();
        for (token, location) in born.tokens[2..].iter().zip(["loc1", "loc2"]) {
            backends.extend(register(&cluster, &token.to_string(), location).await?);
        }
        cluster.backends = Arc::new(backends);
        cluster.epoch = cluster.volume().await?;
        Ok(cluster)
    }

    async fn volume(&self) -> Result<Epoch> {
        let client = self.client(1)?;
        let create = Mutation::CreateVolume {
            id: VOLUME,
            name: "bench".parse()?,
            policy: Policy {
                geometry: Geometry::new(2, 2)?,
                survive_locations: 1,
                survive_nodes: 1,
            },
            key_id: KeyId::from_bytes([3; 16]),
            settings: VolumeSettings::default(),
        };
        client.mutate(create).await?;
        let lease = Mutation::AcquireLease {
            volume: VOLUME,
            client: ClientId::from_bytes([1; 16]),
            holder: "bench:1".into(),
            takeover: false,
        };
        match client.mutate(lease).await? {
            Applied::Epoch(epoch) => Ok(epoch),
            other => bail!("a lease was answered {other:?}"),
        }
    }

    pub(crate) fn client(&self, number: u16) -> Result<MetadClient> {
        let mut id = [0; 16];
        id[..2].copy_from_slice(&number.to_le_bytes());
        Ok(self.context.client(ClientId::from_bytes(id))?)
    }

    /// Until three voters are well.
    pub(crate) async fn until_healthy(&self) -> Result<()> {
        let client = self.client(0)?;
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Ok(members) = client.members().await
                && members.iter().filter(|m| m.voter && m.healthy).count() == 3
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("no three voters within {DEADLINE:?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Address of the leading metad.
    pub(crate) async fn leader(&self) -> Result<String> {
        let members = self.client(0)?.members().await?;
        let leader = members.into_iter().find(|member| member.leader);
        Ok(leader.context("no leader")?.address)
    }

    /// Kills the leading process; its place in the list.
    pub(crate) async fn kill_leader(&mut self) -> Result<usize> {
        let leader = self.leader().await?;
        let place = self
            .nodes
            .iter()
            .position(|node| node.address == leader)
            .context("an unknown leader")?;
        self.nodes[place].kill()?;
        Ok(place)
    }

    pub(crate) fn restart(&mut self, place: usize) -> Result<()> {
        self.nodes[place].start()
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        let children = self.nodes.iter().filter_map(|node| node.child.as_ref());
        children.map(Child::id).collect()
    }

    /// Bytes of one commit in the log.
    pub(crate) fn entry_bytes(&self) -> usize {
        let request = Request {
            client: ClientId::from_bytes([1; 16]),
            session: u64::MAX,
            sequence: 1_000,
            oldest_pending: 1_000,
        };
        let entry = Entry {
            time_ms: 1 << 41,
            request: Some(request),
            command: Command::Mutation(self.committer().mutation()),
        };
        postcard::to_stdvec(&entry).map_or(0, |bytes| bytes.len())
    }

    pub(crate) fn committer(&self) -> Committer {
        Committer {
            epoch: self.epoch,
            backends: Arc::clone(&self.backends),
            next: Arc::clone(&self.next),
        }
    }

    /// Commits from so many callers at once for a while.
    pub(crate) async fn commits(&self, width: usize, span: Duration) -> Result<Latencies> {
        let mut clients = Vec::new();
        for number in 0..width.div_ceil(CALLERS_PER_CONNECTION) {
            let client = self.client(u16::try_from(number + 2)?)?;
            client.members().await?;
            clients.push(client);
        }
        let until = Instant::now() + span;
        gather((0..width).map(|caller| {
            let client = clients[caller / CALLERS_PER_CONNECTION].clone();
            let committer = self.committer();
            async move {
                let mut ms = Vec::new();
                while Instant::now() < until {
                    let began = Instant::now();
                    client.mutate(committer.mutation()).await?;
                    ms.push(began.elapsed().as_secs_f64() * 1e3);
                }
                Ok(ms)
            }
        }))
        .await
    }
}

/// Makes commits, each of a new datafile.
#[derive(Clone)]
pub(crate) struct Committer {
    epoch: Epoch,
    backends: Arc<Vec<BackendId>>,
    next: Arc<AtomicU64>,
}

impl Committer {
    pub(crate) fn mutation(&self) -> Mutation {
        let shards = self.backends.iter().map(|backend| Shard {
            backend: *backend,
            hash: ShardHash::from_bytes([7; 32]),
            state: ShardState::Stored,
        });
        let record = EncodingRecord {
            volume: VOLUME,
            datafile: DatafileId(self.next.fetch_add(1, Ordering::Relaxed)),
            stream: Stream::Data,
            epoch: self.epoch,
            salt: Salt::from_bytes([9; 16]),
            geometry: Geometry::new(2, 2).expect("two and two is a geometry"),
            chunk_bytes: 1 << 20,
            plain_bytes: 64 << 20,
            object_bytes: 64 << 20,
            shard_bytes: 32 << 20,
            piece_bytes: 1 << 20,
            shards: shards.collect(),
            version: 0,
        };
        Mutation::CommitDatafiles {
            volume: VOLUME,
            epoch: self.epoch,
            records: vec![record],
            head: None,
        }
    }
}

/// No verdict changes while it is measured.
fn quiet() -> ClusterSettings {
    ClusterSettings {
        heartbeat_ms: 1_000,
        suspect_after_ms: HOUR_MS,
        down_after_ms: HOUR_MS,
        lost_after_ms: HOUR_MS,
        ..ClusterSettings::default()
    }
}

async fn register(cluster: &Cluster, token: &str, location: &str) -> Result<Vec<BackendId>> {
    let joiner = Joiner {
        role: Role::Agent,
        name: "n1".into(),
        location: location.into(),
        address: String::new(),
    };
    let (identity, _) = qsfs_proto::join::join(&token.parse()?, joiner).await?;
    let client = MetadClient::new(
        cluster.context.endpoints().to_vec(),
        &identity,
        ClientId::random(&mut rand::rng()),
    )?;
    let register = Mutation::RegisterAgent {
        location: location.parse()?,
        node: "n1".parse()?,
    };
    let Applied::Agent(agent) = client.mutate(register).await? else {
        bail!("an agent was not answered with its id");
    };
    let mut backends = Vec::new();
    for namespace in ["a", "b"] {
        let register = Mutation::RegisterBackend {
            agent,
            address: BackendAddress {
                endpoint: format!("{location}:9900"),
                namespace: namespace.into(),
                password: None,
                tls: true,
            },
            capacity_bytes: 1 << 60,
        };
        match client.mutate(register).await? {
            Applied::Backend(backend) => backends.push(backend),
            other => bail!("a backend was answered {other:?}"),
        }
    }
    Ok(backends)
}
