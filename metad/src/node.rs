//! The shell: what waits, talks and keeps time. It decides nothing; that is done in [`crate::state`] and [`crate::plan`].
//!
//! ```text
//! proto::server --> Service --> Consensus --> openraft --> log, machine
//!                      |             ^
//!                      v             | proposals
//!                 soft facts --> leader loop: Index + plan --> orders to agents
//! ```

pub mod admission;
pub mod agents;
pub mod bare;
pub mod bounding;
mod certificates;
pub mod clock;
pub mod consensus;
pub mod datadir;
pub mod facts;
pub mod freshness;
pub mod leader;
pub mod leases;
pub mod members;
pub mod network;
pub mod receiving;
mod renewal;
mod room;

pub use renewal::is_damage;
pub mod service;
pub mod soft;
pub mod status;
pub mod vigil;
pub mod watch;

use crate::ground::{self, Ground};
use crate::log::LogError;
use crate::log::gate::Gated;
use crate::log::storage::LogStore;
use crate::machine::{Machine, MachineError};
use crate::raft::Raft;
use consensus::Consensus;
use datadir::{DataDir, NodeFile};
use facts::NodeFacts;
use freshness::Fresh;
use network::{Inbound, Network, Outbound, Way};
use openraft::{Config, SnapshotPolicy};
use qsfs_proto::api::MetadError;
use qsfs_proto::ca::{CaError, CertificateAuthority};
use qsfs_proto::identity::{Identity, IdentityError, LiveIdentity};
use qsfs_proto::server::ServeError;
use qsfs_proto::token::TokenError;
use qsfs_zstor::id::{ClusterId, MetadId, NodeName};
use service::Service;
use soft::Soft;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use watch::Watchers;

/// Between heartbeats of the leader, and the deadline of one message to a follower.
const HEARTBEAT_MS: u64 = 150;
/// A follower asks for votes after silence of the second (openraft's lease of a leader) and a time between the two, drawn at
/// its start: 750 to 900 ms, five missed heartbeats at least, so that a dead leader is replaced within about a second.
const ELECTION_MS: (u64, u64) = (300, 450);
/// Between two looks whether Raft has stopped.
const STOPPED_LOOK: std::time::Duration = std::time::Duration::from_millis(100);

/// Why a metad node could not be made, joined or run.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The disk refused.
    #[error("cannot {step} {path}: {source}", path = path.display())]
    Io {
        /// Verb phrase.
        step: &'static str,
        /// What.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// Another process has it.
    #[error("data directory {path} is used by another process ({source}): stop it first", path = path.display())]
    InUse {
        /// Directory.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// It holds a node already.
    #[error(
        "data directory {path} already holds the metad {name} of cluster {cluster}: run it with `qsfs metad serve`, or choose another \
         directory", path = path.display()
    )]
    Initialised {
        /// Directory.
        path: PathBuf,
        /// Node.
        name: NodeName,
        /// Its cluster.
        cluster: ClusterId,
    },
    /// It holds something else.
    #[error("data directory {path} is not empty (it holds {name}): choose another", path = path.display())]
    NotEmpty {
        /// Directory.
        path: PathBuf,
        /// First foreign name.
        name: String,
    },
    /// It holds no node.
    #[error("{path} holds no metad: make one with `qsfs metad bootstrap` or `qsfs metad join`", path = path.display())]
    Empty {
        /// Directory.
        path: PathBuf,
    },
    /// `node.toml` is not usable.
    #[error("{path}: {reason}", path = path.display())]
    Malformed {
        /// File.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The state on disk is of another cluster than the certificate.
    #[error("the state in {path} is of cluster {found}, this node is of {expected}: it will not run", path = path.display())]
    OtherCluster {
        /// Directory.
        path: PathBuf,
        /// In the state.
        found: ClusterId,
        /// In the certificate.
        expected: ClusterId,
    },
    /// An option makes no sense.
    #[error("{0}")]
    Option(String),
    /// The certificate or key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The certificate authority.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The join token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The cluster refused.
    #[error(transparent)]
    Metad(#[from] MetadError),
    /// The Raft log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The state.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The server.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// Damaged, and nobody to ask.
    #[error(
        "the log or state in {path} is damaged and no peer is known that could replace it: restore a backup with `qsfs metad restore`",
        path = path.display()
    )]
    Alone {
        /// Directory.
        path: PathBuf,
    },
    /// Ended while it waited for its peers.
    #[error("ended before the peers took this node back; start it again and it goes on")]
    Stopped,
    /// Raft stopped.
    #[error("raft stopped: {0}")]
    Raft(String),
    /// The state rotted while the node ran.
    #[error(
        "the state in {path} is not as it was written ({reason}): this metad begins anew (`qsfs metad serve` by itself) and makes it again \
         from its snapshot and its log, or from its peers", path = path.display()
    )]
    Rotten {
        /// Data directory.
        path: PathBuf,
        /// What was met.
        reason: String,
    },
    /// No room for what must be durable.
    #[error(
        "the disk of {path} is full ({reason}): make room on it; this metad then begins anew (`qsfs metad serve` by itself) and catches up, \
         and nothing that it acknowledged is lost", path = path.display()
    )]
    Full {
        /// Data directory.
        path: PathBuf,
        /// What could not be written, or how little is free.
        reason: String,
    },
}

/// Log, state and Raft of one data directory.
pub(crate) struct Core {
    pub(crate) raft: Raft,
    pub(crate) machine: Machine,
    pub(crate) network: Network,
    pub(crate) log: LogStore,
}

pub(crate) fn raft_config() -> Arc<Config> {
    let config = Config {
        cluster_name: "qsfs".into(),
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: ELECTION_MS.0,
        election_timeout_max: ELECTION_MS.1,
        install_snapshot_timeout: u64::try_from(network::SNAPSHOT_READ.as_millis())
            .unwrap_or(u64::MAX),
        max_payload_entries: 256,
        // Both are `bounding`'s.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        snapshot_max_chunk_size: network::SNAPSHOT_CHUNK_BYTES,
        ..Config::default()
    };
    Arc::new(config.validate().expect("the constants above agree"))
}

/// Starts on what is there; if that is damaged, on what the peers give.
async fn open_or_renew(
    dir: &DataDir,
    node: NodeFile,
    identity: Identity,
    authority: &CertificateAuthority,
    shutdown: &CancellationToken,
) -> Result<(NodeFile, LiveIdentity, Core), NodeError> {
    if !dir.is_renewing() {
        let identity = LiveIdentity::new(identity);
        match start(dir, &node, &identity).await {
            Ok(core) => return Ok((node, identity, core)),
            Err(error) if renewal::is_damage(&error) => {
                tracing::error!(%error, "damaged");
                dir.begin_renewal(&error.to_string())?;
            }
            Err(error) => return Err(error),
        }
    }
    let (node, identity) = renewal::renew(dir, &node, authority, shutdown).await?;
    let identity = LiveIdentity::new(identity);
    let core = start(dir, &node, &identity).await?;
    Ok((node, identity, core))
}

/// Keeps on disk where the other nodes are, for when this one has lost everything else.
async fn remember_peers(raft: Raft, path: PathBuf, own: u64) {
    let mut metrics = raft.server_metrics();
    let mut kept = Vec::new();
    loop {
        let peers: Vec<String> = {
            let metrics = metrics.borrow_and_update();
            let nodes = metrics.membership_config.nodes();
            nodes
                .filter(|(id, _)| **id != own)
                .map(|(_, node)| node.addr.clone())
                .collect()
        };
        if peers != kept {
            let (path, stored) = (path.clone(), peers.clone());
            let written =
                tokio::task::spawn_blocking(move || DataDir::keep_peers(&path, &stored)).await;
            match written {
                Ok(Ok(())) => kept = peers,
                Ok(Err(error)) => tracing::warn!(%error, "where the peers are is not kept"),
                Err(_) => return,
            }
        }
        if metrics.changed().await.is_err() {
            return;
        }
    }
}

/// Opens log and state and starts Raft.
pub(crate) async fn start(
    dir: &DataDir,
    node: &NodeFile,
    identity: impl Into<LiveIdentity>,
) -> Result<Core, NodeError> {
    let ground = Ground::real();
    let took_part = !dir.peers()?.is_empty();
    let network = Network::new(Way::Tls(identity.into()), node.id);
    start_on(
        &ground,
        dir.path(),
        (node.cluster, node.id),
        took_part,
        network,
    )
    .await
}

/// The same on any ground.
pub(crate) async fn start_on(
    ground: &Ground,
    dir: &Path,
    (cluster, id): (ClusterId, MetadId),
    took_part: bool,
    network: Network,
) -> Result<Core, NodeError> {
    let (standing, path) = (ground.clone(), dir.to_owned());
    let opening = move || open(&standing, &path, cluster, took_part);
    let opened = ground::blocking(&ground.work, opening).await;
    let (log, machine) = opened.map_err(|error| NodeError::Raft(error.to_string()))??;
    let log = log.of_node(id.0);
    let raft = Raft::new(
        id.0,
        raft_config(),
        Outbound::new(network.clone(), log.clone(), machine.clone()),
        log.clone(),
        Gated::new(machine.clone(), log.clone()),
    )
    .await
    .map_err(|error| NodeError::Raft(error.to_string()))?;
    Ok(Core {
        raft,
        machine,
        network,
        log,
    })
}

/// Log and state of a node that does not run.
pub(crate) fn open_stopped(
    path: &Path,
    cluster: ClusterId,
) -> Result<(LogStore, Machine), NodeError> {
    open(&Ground::real(), path, cluster, true)
}

fn open(
    ground: &Ground,
    path: &Path,
    cluster: ClusterId,
    took_part: bool,
) -> Result<(LogStore, Machine), NodeError> {
    let log = LogStore::open(ground, &path.join("log"))?;
    log.check_vote(took_part)?;
    let machine = Machine::open_on(ground, path)?;
    let found = machine.read(|state| state.cluster());
    if let Some(found) = found.map_err(MachineError::from)?
        && found.id != cluster
    {
        return Err(NodeError::OtherCluster {
            path: path.to_owned(),
            found: found.id,
            expected: cluster,
        });
    }
    machine.catch_up(log.bounds().0)?;
    if let Some(applied) = machine.raft_row().applied {
        log.void_other_than(applied)?;
    }
    Ok((log, machine))
}

/// Runs the node of a data directory until `shutdown`.
pub(crate) async fn run(
    dir: DataDir,
    listener: Option<TcpListener>,
    shutdown: CancellationToken,
) -> Result<(), NodeError> {
    let path = dir.path().to_owned();
    room::to_start(&path, &shutdown).await?;
    let ended = run_on(dir, listener, shutdown.clone()).await;
    let ended = ended.map_err(|error| room::name(error, &path));
    if let Err(error) = &ended
        && room::is_full(error)
    {
        // Also what ended before it had peers to tell.
        room::to_resume(&path, &shutdown).await?;
    }
    ended
}

async fn run_on(
    dir: DataDir,
    listener: Option<TcpListener>,
    shutdown: CancellationToken,
) -> Result<(), NodeError> {
    let (node, identity, authority) = dir.load()?;
    let listener = match listener {
        Some(listener) => listener,
        None => TcpListener::bind(&node.listen)
            .await
            .map_err(|source| NodeError::Io {
                step: "listen on",
                path: PathBuf::from(&node.listen),
                source,
            })?,
    };
    let (node, identity, core) =
        match open_or_renew(&dir, node, identity, &authority, &shutdown).await {
            Err(NodeError::Stopped) => return Ok(()),
            opened => opened?,
        };
    let stop = shutdown.child_token();
    let started_ms = core.machine.ground().clock.now_ms();
    let program = core.machine.ground().program;
    core.network
        .change_own_facts(|facts| *facts = NodeFacts::of(program, started_ms));
    let renewing = renew_own(&dir, &identity, &authority, (&core, &node), &stop).await?;
    let about = core.network.clone();
    let backing_up = tokio::spawn(crate::backup::run(
        core.machine.clone(),
        dir.path().to_owned(),
        move |backup, (disk_free_bytes, disk_bytes)| {
            about.change_own_facts(|facts| {
                facts.backup = backup;
                facts.disk_free_bytes = disk_free_bytes;
                facts.disk_bytes = disk_bytes;
            });
        },
        stop.clone(),
    ));
    let remembering = tokio::spawn(remember_peers(
        core.raft.clone(),
        dir.path().to_owned(),
        node.id.0,
    ));
    let ended = serve(&core, &node, (&identity, authority), listener, &shutdown).await;
    remembering.abort();
    stop.cancel();
    if let Err(error) = renewing.await {
        tracing::warn!(%error, "the task that renews the certificate failed");
    }
    if let Err(error) = backing_up.await {
        tracing::warn!(%error, "the task that backs up failed");
    }
    if let Err(error) = core.raft.shutdown().await {
        tracing::warn!(%error, "raft did not stop cleanly");
    }
    if let Some(reason) = core.machine.rot() {
        let path = dir.path().to_owned();
        let rotten = NodeError::Rotten { path, reason };
        tracing::error!(error = %rotten, "this metad stops");
        return Err(rotten);
    }
    let machine = core.machine.clone();
    let flushed = tokio::task::spawn_blocking(move || machine.flush()).await;
    if let Ok(Err(error)) = flushed {
        tracing::warn!(%error, "the state was not flushed; the log will bring it up to date");
    }
    let ended = ended.map_err(|error| room::name(error, dir.path()));
    if let Err(error) = &ended
        && room::is_full(error)
    {
        tracing::error!(%error, "this metad stops");
        room::to_begin_anew(dir.path(), &core, &shutdown).await?;
    }
    ended
}

/// Renews the node's certificate, now if it is time (the node was off past its end), and for as long as it runs.
async fn renew_own(
    dir: &DataDir,
    live: &LiveIdentity,
    authority: &CertificateAuthority,
    (core, node): (&Core, &NodeFile),
    stop: &CancellationToken,
) -> Result<JoinHandle<()>, NodeError> {
    let authority = CertificateAuthority::from_pem(authority.ca_pem(), authority.key_pem())?;
    let of = (core.machine.clone(), node.id);
    let mut renewal = certificates::own(live, dir.identity(), authority, of);
    let network = core.network.clone();
    let tell = move |identity: &Identity| {
        if let Ok(validity) = identity.validity() {
            network.change_own_facts(|facts| {
                facts.certificate_expires_ms = validity.ends_ms;
                facts.certificate_life_ms = validity.life_ms();
            });
        }
    };
    tell(&live.current());
    renewal.step(&tell).await;
    Ok(tokio::spawn(renewal.run(tell, stop.clone())))
}

/// The tasks of a node, and what answers.
pub(crate) struct Running {
    consensus: Consensus,
    soft: Arc<Soft>,
    leader: JoinHandle<()>,
    bounding: JoinHandle<()>,
    service: Arc<Service>,
    inbound: Arc<Inbound>,
}

impl Running {
    fn start(core: &Core, authority: CertificateAuthority, stop: &CancellationToken) -> Self {
        let clock = Arc::clone(&core.machine.ground().clock);
        let consensus = Consensus::start(core.raft.clone(), core.machine.clone(), clock);
        let soft = Arc::new(Soft::default());
        let leading = leader::run(consensus.clone(), Arc::clone(&soft), stop.clone());
        let (network, fresh) = (core.network.clone(), Fresh::default());
        let asking = freshness::run(
            consensus.clone(),
            network.clone(),
            fresh.clone(),
            stop.clone(),
        );
        // Ends with `stop`; what it knows is worth nothing then.
        tokio::spawn(asking);
        let watchers = Watchers::new(
            core.machine.clone(),
            fresh.clone(),
            watch::Limits::default(),
            stop.clone(),
        );
        Self {
            leader: tokio::spawn(leading),
            bounding: tokio::spawn(bounding::run(
                core.raft.clone(),
                core.log.clone(),
                core.machine.clone(),
                stop.clone(),
            )),
            service: Arc::new(Service::new(
                consensus.clone(),
                Arc::clone(&soft),
                network,
                authority,
                (fresh, Arc::new(watchers)),
            )),
            inbound: Arc::new(Inbound::new(
                core.raft.clone(),
                consensus.clone(),
                core.network.clone(),
                core.log.clone(),
            )),
            consensus,
            soft,
        }
    }
}

async fn serve(
    core: &Core,
    node: &NodeFile,
    (identity, authority): (&LiveIdentity, CertificateAuthority),
    listener: TcpListener,
    shutdown: &CancellationToken,
) -> Result<(), NodeError> {
    let stop = shutdown.child_token();
    let Running {
        soft,
        leader,
        bounding,
        service,
        inbound,
        ..
    } = Running::start(core, authority, &stop);
    let spoken = inbound.spoken().clone();
    tracing::info!(node = %node.name, listen = %node.listen, "metad serves");
    let serving = qsfs_proto::server::serve(listener, identity, service, inbound, stop.clone());
    let ended = tokio::select! {
        served = serving => served.map_err(NodeError::from),
        stopped = stopped(core) => Err(NodeError::Raft(stopped)),
        () = vigil::run(core.raft.clone(), spoken, stop.clone()) => Ok(()),
    };
    stop.cancel();
    soft.end_term();
    if let Err(error) = leader.await {
        tracing::warn!(%error, "the leader task failed");
    }
    if let Err(error) = bounding.await {
        tracing::warn!(%error, "the task that bounds the log failed");
    }
    ended
}

/// Returns when the node cannot go on, which a failed disk makes it do; with why.
pub(crate) async fn stopped(core: &Core) -> String {
    tokio::select! {
        reason = raft_stopped(&core.raft) => reason,
        reason = core.log.watermark().failure() => LogError::NotDurable(reason).to_string(),
        reason = rotten(&core.machine) => reason,
    }
}

/// Returns when a read met rot: what was not read yet may be no better, so nothing more is answered from it.
async fn rotten(machine: &Machine) -> String {
    loop {
        if let Some(reason) = machine.rot() {
            return reason;
        }
        tokio::time::sleep(STOPPED_LOOK).await;
    }
}

/// Returns when Raft gives up, which a failed disk makes it do. It looks now and then: its metrics change with every message.
async fn raft_stopped(raft: &Raft) -> String {
    let metrics = raft.metrics();
    loop {
        if let Err(fatal) = &metrics.borrow().running_state {
            return fatal.to_string();
        }
        if metrics.has_changed().is_err() {
            return "its task ended".into();
        }
        tokio::time::sleep(STOPPED_LOOK).await;
    }
}
