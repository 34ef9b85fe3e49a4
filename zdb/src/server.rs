//! The 0-db protocol over TCP, TLS or a unix socket.
//!
//! ```text
//! bytes ─> parser (limits first) ─> session: decide ─> queue of answers, in order ─> writer: one write for what is ready
//!          └────────────────────────────── one task per connection ──────────────────────────────────────────┘
//! ```
//!
//! Invariants:
//! - Memory is bounded before a payload is accepted: per request, per connection, for the server. Who holds budget that others wait for
//!   must move (see `pace`).
//! - SETs and DELs of a pipeline are under way together, so that they share a group commit; every other command waits for them, so that a
//!   client reads its own writes.
//! - Bytes that are no request get one clear error and the connection is closed. Nothing a client sends makes the server panic.
//!
//! Source: the protocol as probed on 0-db 2.0.8.

mod buffers;
mod command;
mod connection;
mod counters;
mod cursor;
mod files;
mod instance;
mod lookout;
mod manage;
mod pace;
mod parser;
mod reply;
mod scan;
mod session;
mod values;
mod watch;
mod writer;

use crate::client::Password;
use crate::engine::{Engine, Mode};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The budget of bytes under way is counted in units of this many bytes.
const BUDGET_UNIT: usize = 256;
/// After a connection could not be taken.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);
/// Connections that still have answers to get when the server ends get them within this time.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// Who may create, change and remove namespaces.
#[derive(Debug, Clone)]
pub enum Admin {
    /// Every connection.
    Everyone,
    /// Who knows this password (AUTH).
    Password(Password),
    /// Nobody: the program that runs the engine does it.
    Nobody,
}

impl Admin {
    fn password(&self) -> Option<&Password> {
        match self {
            Self::Password(password) => Some(password),
            Self::Everyone | Self::Nobody => None,
        }
    }
}

/// In which mode new namespaces are, and whether clients may change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunningMode {
    /// User mode, until NSSET says otherwise.
    Mixed,
    /// All are in this mode.
    Only(Mode),
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// TLS; `None` is plain text.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Who may manage namespaces.
    pub admin: Admin,
    /// The default namespace is read-only without the admin's password.
    pub protect: bool,
    /// May NSSET change the mode of a namespace?
    pub mode: RunningMode,
    /// Versions before the current one that new namespaces keep for HISTORY.
    pub history_versions: u32,
    /// May an admin end the server with STOP?
    pub allow_stop: bool,
    /// Connections at once.
    pub connections_max: usize,
    /// Bytes of requests and answers under way, over all connections.
    pub inflight_bytes: usize,
    /// Bytes of requests and answers under way on one connection.
    pub connection_inflight_bytes: usize,
    /// Bytes of large requests of which a part has arrived, over all connections.
    pub arriving_bytes: usize,
    /// For the TLS handshake, and for selecting a namespace where there is no default one.
    pub handshake_timeout: Duration,
    /// For the next bytes of a request that has begun, and for a client to take its answers.
    pub stall_timeout: Duration,
}

impl Default for ServerConfig {
    /// As 0-db without options: everyone is admin, mixed mode. 1024 connections; 96 MiB in all, 24 MiB per connection, 16 MiB arriving;
    /// 10 s, 60 s.
    fn default() -> Self {
        Self {
            tls: None,
            admin: Admin::Everyone,
            protect: false,
            mode: RunningMode::Mixed,
            history_versions: 0,
            allow_stop: false,
            connections_max: 1024,
            inflight_bytes: 96 << 20,
            connection_inflight_bytes: 24 << 20,
            arriving_bytes: 16 << 20,
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
        }
    }
}

/// Why a server cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum ModeError {
    /// A namespace that was written to is in the other mode.
    #[error(
        "namespace {name} is in {found} mode, and all are to be in {wanted} mode: start in mixed mode, or with another data directory"
    )]
    Used {
        /// Which.
        name: String,
        /// Its mode.
        found: &'static str,
        /// The mode asked for.
        wanted: &'static str,
    },
    /// A namespace could not be changed.
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
}

/// Bring the namespaces of an engine into the mode that all are to be in; those that were written to must be in it.
pub fn apply_mode(engine: &Engine, mode: RunningMode) -> Result<(), ModeError> {
    let RunningMode::Only(wanted) = mode else {
        return Ok(());
    };
    let word = |mode| match mode {
        Mode::User => "user",
        Mode::Sequential => "sequential",
    };
    for name in engine.namespace_names() {
        let Some(namespace) = engine.namespace(&name) else {
            continue;
        };
        let found = namespace.settings().mode;
        if found == wanted {
            continue;
        }
        if !namespace.is_unused() {
            return Err(ModeError::Used {
                name,
                found: word(found),
                wanted: word(wanted),
            });
        }
        namespace.change_settings(|settings| settings.mode = wanted)?;
    }
    Ok(())
}

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self::Unix(listener)
    }
}

/// What all connections share.
struct Server {
    engine: Arc<Engine>,
    config: ServerConfig,
    budget: Arc<Semaphore>,
    arriving: Arc<Semaphore>,
    /// Connections that wait for one of the two.
    waiting: AtomicUsize,
    next_client: AtomicU64,
    watch: watch::Watch,
    counters: counters::Counters,
    started: std::time::Instant,
    /// Cancelled: no further requests are taken.
    shutdown: CancellationToken,
}

/// As [`serve_all`], for one listener.
pub async fn serve(
    listener: impl Into<Listener>,
    engine: Arc<Engine>,
    config: ServerConfig,
    shutdown: CancellationToken,
) -> io::Result<()> {
    serve_all(vec![listener.into()], engine, config, shutdown).await
}

/// Serve until told to stop, all listeners as one server. What was asked before is answered, then connections are closed.
pub async fn serve_all(
    listeners: Vec<Listener>,
    engine: Arc<Engine>,
    config: ServerConfig,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(config.connections_max));
    let server = Arc::new(Server {
        engine,
        budget: Arc::new(Semaphore::new(config.inflight_bytes / BUDGET_UNIT)),
        arriving: Arc::new(Semaphore::new(config.arriving_bytes / BUDGET_UNIT)),
        waiting: AtomicUsize::new(0),
        next_client: AtomicU64::new(1),
        watch: watch::Watch::new(),
        counters: counters::Counters::default(),
        config,
        started: std::time::Instant::now(),
        shutdown,
    });
    let tasks = TaskTracker::new();
    let cut = CancellationToken::new();
    let accepting = listeners
        .iter()
        .map(|listener| accept_all(listener, &server, &places, &tasks, &cut));
    futures::future::join_all(accepting).await;
    drop(listeners);
    tasks.close();
    if tokio::time::timeout(LAST_ANSWERS, tasks.wait())
        .await
        .is_err()
    {
        cut.cancel();
        tasks.wait().await;
    }
    Ok(())
}

/// Take connections until told to stop.
async fn accept_all(
    listener: &Listener,
    server: &Arc<Server>,
    places: &Arc<Semaphore>,
    tasks: &TaskTracker,
    cut: &CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            () = server.shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors, or a connection that was gone before it was taken: others go on.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let client = server.next_client.fetch_add(1, Ordering::Relaxed);
        server.counters.clients.add(1);
        let Ok(place) = Arc::clone(places).try_acquire_owned() else {
            tasks.spawn(connection::refuse(stream));
            continue;
        };
        let server = Arc::clone(server);
        let cut = cut.clone();
        tasks.spawn(async move {
            let _place = place;
            tokio::select! {
                () = cut.cancelled() => {}
                () = connection::run(server, stream, client) => {}
            }
        });
    }
}

impl Listener {
    async fn accept(&self) -> io::Result<connection::Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Answers are written together already; waiting for more would only delay them.
                stream.set_nodelay(true)?;
                Ok(connection::Accepted::Tcp(stream))
            }
            Self::Unix(listener) => Ok(connection::Accepted::Unix(listener.accept().await?.0)),
        }
    }
}
