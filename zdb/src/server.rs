//! The 0-db protocol over TCP, TLS or a unix socket.
//!
//! ```text
//! bytes ─> parser (limits first) ─> session: decide ─> queue of answers, in order ─> writer: one write for what is ready
//!              reader task                                                              writer task
//! ```
//!
//! Invariants:
//! - Memory is bounded before a payload is accepted: per request, per connection, for the server.
//! - SETs and DELs of a pipeline are under way together, so that they share a group commit; every other command waits for them, so that a
//!   client reads its own writes.
//! - Bytes that are no request get one clear error and the connection is closed. Nothing a client sends makes the server panic.
//!
//! Source: the protocol as probed on 0-db 2.0.8.

mod connection;
mod manage;
mod parser;
mod reply;
mod session;

use crate::client::Password;
use crate::engine::Engine;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, broadcast};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The budget of bytes under way is counted in units of this many bytes.
const BUDGET_UNIT: usize = 1024;
/// Commands remembered for those that WAIT and are slow to look.
const WATCHED_COMMANDS_MAX: usize = 256;

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

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// TLS; `None` is plain text.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Who may manage namespaces.
    pub admin: Admin,
    /// Connections at once.
    pub connections_max: usize,
    /// Bytes of requests and answers under way, over all connections.
    pub inflight_bytes: usize,
    /// Bytes of requests and answers under way on one connection.
    pub connection_inflight_bytes: usize,
    /// For the TLS handshake, and for selecting a namespace where there is no default one.
    pub handshake_timeout: Duration,
    /// For the next bytes of a request that has begun, and for a client to take its answers.
    pub stall_timeout: Duration,
}

impl Default for ServerConfig {
    /// Everyone is admin (as in 0-db without `--admin`), 1024 connections, 96 MiB in all, 24 MiB per connection, 10 s, 60 s.
    fn default() -> Self {
        Self {
            tls: None,
            admin: Admin::Everyone,
            connections_max: 1024,
            inflight_bytes: 96 << 20,
            connection_inflight_bytes: 24 << 20,
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
        }
    }
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

/// A command that was run, for those that WAIT for it.
#[derive(Debug, Clone)]
struct Ran {
    namespace: String,
    client: u64,
    command: &'static str,
}

/// What all connections share.
struct Server {
    engine: Arc<Engine>,
    config: ServerConfig,
    budget: Arc<Semaphore>,
    ran: broadcast::Sender<Ran>,
    started: std::time::Instant,
}

/// Serve until told to stop; then connections are closed.
pub async fn serve(
    listener: impl Into<Listener>,
    engine: Arc<Engine>,
    config: ServerConfig,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let listener = listener.into();
    let places = Arc::new(Semaphore::new(config.connections_max));
    let server = Arc::new(Server {
        engine,
        budget: Arc::new(Semaphore::new(config.inflight_bytes / BUDGET_UNIT)),
        ran: broadcast::channel(WATCHED_COMMANDS_MAX).0,
        config,
        started: std::time::Instant::now(),
    });
    let tasks = TaskTracker::new();
    let mut client = 0;
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors, or a connection that was gone before it was taken: others go on.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        client += 1;
        let place = Arc::clone(&places).try_acquire_owned();
        let server = Arc::clone(&server);
        let shutdown = shutdown.clone();
        tasks.spawn(async move {
            let Ok(_place) = place else {
                connection::refuse(stream).await;
                return;
            };
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = connection::run(server, stream, client) => {}
            }
        });
    }
    tasks.close();
    tasks.wait().await;
    Ok(())
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
