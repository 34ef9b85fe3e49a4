#![expect(clippy::unwrap_used, reason = "tests")]
//! Three metads without TLS and joining, over loopback sockets, each on a runtime and a ground of its own: with small sizes, a disk that
//! is harmed or dies, or a program of another age. From the log upwards all is as in a daemon.

#[path = "nodes/bounded.rs"]
mod bounded;
#[path = "nodes/faulty.rs"]
mod faulty;
#[path = "nodes/installed.rs"]
mod installed;
#[path = "nodes/rotten.rs"]
mod rotten;
#[path = "nodes/upgraded.rs"]
mod upgraded;

use async_trait::async_trait;
use faulty::{FaultyMedia, FaultyStores, Switch};
use qsfs_metad::NodeError;
use qsfs_metad::ground::{Ground, Program, Sizes};
use qsfs_metad::log::segments::Amount;
use qsfs_metad::node::bare::{Bare, BareOptions};
use qsfs_metad::state::command::{Admission, Command, Genesis, MemberRow, Reply};
use qsfs_proto::api::{ClusterSettings, Mutation, Role};
use qsfs_proto::ca::CertificateAuthority;
use qsfs_proto::dial::{ByteStream, Dial};
use qsfs_proto::identity::PeerIdentity;
use qsfs_proto::server::{CallError, serve_known};
use qsfs_zstor::id::{ClusterId, MetadId};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

const CLUSTER: ClusterId = ClusterId::from_bytes([0xc5; 16]);
const DEADLINE: Duration = Duration::from_secs(60);
const DAY_MS: u64 = 86_400_000;

/// Sizes that a few dozen commits outgrow.
const SMALL: Sizes = Sizes {
    segment_bytes: 16 << 10,
    snapshot_cost_min: 64 << 10,
    snapshot_cost_max: 256 << 10,
    kept: Amount {
        entries: 8,
        bytes: 4 << 10,
    },
    applied_at_once: Amount {
        entries: 8,
        bytes: 4 << 10,
    },
};

/// Connects and says who it is.
struct PlainDial(PeerIdentity);

#[async_trait]
impl Dial for PlainDial {
    async fn dial(&self, address: &str) -> io::Result<Box<dyn ByteStream>> {
        let mut stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let text = serde_json::to_vec(&(self.0.cluster, self.0.role, &self.0.subject))?;
        stream.write_u16(u16::try_from(text.len()).unwrap()).await?;
        stream.write_all(&text).await?;
        Ok(Box::new(stream))
    }
}

type Known = (Box<dyn ByteStream>, Option<PeerIdentity>);

async fn greeted(mut stream: TcpStream) -> io::Result<Known> {
    let length = stream.read_u16().await?;
    let mut text = vec![0; usize::from(length)];
    stream.read_exact(&mut text).await?;
    let (cluster, role, subject): (_, _, String) = serde_json::from_slice(&text)?;
    let peer = PeerIdentity::new(cluster, role, subject).map_err(io::Error::other)?;
    Ok((Box::new(stream), Some(peer)))
}

fn accept(listener: TcpListener) -> mpsc::Receiver<Known> {
    let (ready, connections) = mpsc::channel(16);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let ready = ready.clone();
            tokio::spawn(async move {
                if let Ok(connection) = greeted(stream).await {
                    drop(ready.send(connection).await);
                }
            });
        }
    });
    connections
}

fn identity(id: MetadId) -> PeerIdentity {
    PeerIdentity::new(CLUSTER, Role::Metad, id.to_string()).unwrap()
}

struct Node {
    id: MetadId,
    dir: PathBuf,
    address: String,
    sizes: Sizes,
    program: Program,
    took_part: bool,
    /// What its disk and its rows do; a new one with every start.
    switch: Switch,
    runtime: Option<Runtime>,
    bare: Option<Arc<Bare>>,
}

impl Node {
    fn new(root: &Path, number: u64) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self {
            id: MetadId(number),
            dir: root.join(format!("m{number}")),
            address: listener.local_addr().unwrap().to_string(),
            sizes: SMALL,
            program: Program::default(),
            took_part: false,
            switch: Switch::default(),
            runtime: None,
            bare: None,
        }
    }

    fn ground(&self) -> Ground {
        let real = Ground::real();
        Ground {
            media: Arc::new(FaultyMedia::over(real.media.clone(), &self.switch)),
            stores: Arc::new(FaultyStores::over(real.stores.clone(), &self.switch)),
            sizes: self.sizes,
            program: self.program,
            ..real
        }
    }

    /// Starts it on what is on its disk.
    async fn start(&mut self) -> Result<(), NodeError> {
        assert!(self.runtime.is_none(), "it runs");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let options = BareOptions {
            ground: self.ground(),
            dir: self.dir.clone(),
            cluster: CLUSTER,
            id: self.id,
            took_part: self.took_part,
            dial: Arc::new(PlainDial(identity(self.id))),
            authority: CertificateAuthority::create(CLUSTER).unwrap(),
        };
        let (me, address) = (identity(self.id), self.address.clone());
        let started = runtime.spawn(async move {
            let bare = Arc::new(Bare::start(options).await?);
            let deadline = Instant::now() + DEADLINE;
            let listener = loop {
                match TcpListener::bind(&address).await {
                    Ok(listener) => break listener,
                    Err(error) => assert!(Instant::now() < deadline, "{error}"),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            let (service, raft) = (bare.service(), bare.transport());
            let connections = ReceiverStream::new(accept(listener));
            tokio::spawn(serve_known(
                connections,
                me,
                service,
                raft,
                CancellationToken::new(),
            ));
            Ok::<_, NodeError>(bare)
        });
        let started = started.await.unwrap();
        self.runtime = Some(runtime);
        match started {
            Ok(bare) => {
                self.bare = Some(bare);
                self.took_part = true;
                Ok(())
            }
            Err(error) => {
                self.kill();
                Err(error)
            }
        }
    }

    /// Everything of it is dropped where it stands.
    fn kill(&mut self) {
        self.bare = None;
        if let Some(runtime) = self.runtime.take() {
            // A runtime must not be dropped from within another one.
            let dropper =
                std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(30)));
            dropper.join().unwrap();
        }
        self.switch = Switch::default();
    }

    fn bare(&self) -> &Bare {
        self.bare.as_ref().expect("it runs")
    }

    fn leads(&self) -> bool {
        self.bare.as_ref().is_some_and(|bare| {
            let metrics = bare.consensus().raft().metrics();
            let metrics = metrics.borrow();
            metrics.running_state.is_ok()
                && metrics.current_leader == Some(self.id.0)
                && metrics.state == openraft::ServerState::Leader
        })
    }

    fn applied(&self) -> u64 {
        let row = self.bare().machine().raft_row();
        row.applied.map_or(0, |id| id.index)
    }

    fn purged(&self) -> u64 {
        self.bare().log().bounds().0.map_or(0, |id| id.index)
    }

    /// Hash of all rows and the entry that was applied last.
    fn state(&self) -> (u64, blake3::Hash) {
        let copy = self.dir.join("copy");
        if copy.exists() {
            std::fs::remove_file(&copy).unwrap();
        }
        self.bare().machine().copy_to(&copy).unwrap();
        let hash = blake3::hash(&std::fs::read(&copy).unwrap());
        (self.applied(), hash)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Nodes {
    nodes: Vec<Node>,
    tokens: u64,
    _root: tempfile::TempDir,
}

/// A change that adds a row.
fn add(number: u64) -> Command {
    let mut hash = [0xff; 32];
    hash[..8].copy_from_slice(&number.to_le_bytes());
    Command::Mutation(Mutation::CreateToken {
        hash,
        role: Role::Client,
        ttl_ms: DAY_MS,
    })
}

fn genesis(first: &Node) -> Genesis {
    Genesis {
        cluster: CLUSTER,
        ca_pem: "none".into(),
        settings: ClusterSettings::default(),
        member: MemberRow {
            id: first.id,
            name: "m1".parse().unwrap(),
            location: "loc1".parse().unwrap(),
            address: first.address.clone(),
            removed: false,
        },
        tokens: (1..=9).map(|n| ([n; 32], Role::Metad, DAY_MS)).collect(),
    }
}

impl Nodes {
    async fn start(count: u64, arrange: impl Fn(&mut Node)) -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut first = Node::new(root.path(), 1);
        arrange(&mut first);
        first.start().await.unwrap();
        first.bare().initialize(genesis(&first)).await.unwrap();
        let mut nodes = Self {
            nodes: vec![first],
            tokens: 0,
            _root: root,
        };
        for number in 2..=count {
            let mut node = Node::new(nodes._root.path(), number);
            arrange(&mut node);
            let token = u8::try_from(number).unwrap();
            let admit = Command::AdmitMetad(Admission {
                hash: [token; 32],
                csr: [token; 32],
                name: format!("m{number}").parse().unwrap(),
                location: format!("loc{number}").parse().unwrap(),
                address: node.address.clone(),
            });
            let Reply::Admitted(id) = nodes.insist(admit).await else {
                panic!("not admitted")
            };
            node.id = id;
            node.start().await.unwrap();
            nodes.nodes.push(node);
            until("one voter more", || nodes.voters() == number).await;
        }
        nodes
    }

    fn voters(&self) -> u64 {
        let Some(leader) = self.nodes.iter().find(|node| node.leads()) else {
            return 0;
        };
        let metrics = leader.bare().consensus().raft().metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        // In the middle of a change both the old voters and the new ones decide.
        let changes = membership.get_joint_config().len() > 1;
        let voters = u64::try_from(membership.voter_ids().count()).unwrap();
        if changes { 0 } else { voters }
    }

    async fn leader(&self) -> usize {
        until("nobody leads", || self.nodes.iter().any(Node::leads)).await;
        self.nodes.iter().position(Node::leads).unwrap_or(0)
    }

    async fn propose(&self, command: Command) -> Result<Reply, CallError> {
        let leader = self.leader().await;
        let consensus = self.nodes[leader].bare().consensus().clone();
        consensus.propose_internal(command).await
    }

    /// What every node says of itself.
    fn picture(&self) -> String {
        let of = |node: &Node| {
            let bare = node.bare.as_ref()?;
            let metrics = bare.consensus().raft().metrics();
            let metrics = metrics.borrow();
            Some(format!("{:?}", *metrics))
        };
        let nodes = self.nodes.iter();
        let all = nodes.map(|node| of(node).unwrap_or_else(|| "it does not run".into()));
        all.collect::<Vec<_>>().join("\n")
    }

    /// Until it goes through: for what is refused only because a leader changes.
    async fn insist(&self, command: Command) -> Reply {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.propose(command.clone()).await {
                Ok(reply) => return reply,
                Err(error) => assert!(Instant::now() < deadline, "{error:?}\n{}", self.picture()),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// So many rows more.
    async fn grow(&mut self, by: u64) {
        for _ in 0..by {
            self.tokens += 1;
            self.insist(add(self.tokens)).await;
        }
    }

    /// Until all have applied the same, and then that it is the same.
    async fn agree(&self) {
        let leader = self.leader().await;
        let newest = self.nodes[leader].applied();
        until("a node stays behind", || {
            self.nodes.iter().all(|node| node.applied() >= newest)
        })
        .await;
        let deadline = Instant::now() + DEADLINE;
        loop {
            let states: Vec<_> = self.nodes.iter().map(Node::state).collect();
            // A leader may have written an entry of its own meanwhile.
            if states.iter().all(|(applied, _)| *applied == states[0].0) {
                assert!(states.iter().all(|(_, hash)| *hash == states[0].1));
                return;
            }
            assert!(Instant::now() < deadline, "they do not come to rest");
        }
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
