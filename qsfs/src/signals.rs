//! SIGTERM, SIGINT and SIGHUP as a shutdown that a daemon can wait for.

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The signals that end a process on request.
pub(crate) struct Endings {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Endings {
    /// From now on these signals no longer kill.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("listening for signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hang_up: listen(SignalKind::hangup())?,
        })
    }

    /// The next one.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }
}

/// A token that the first such signal cancels.
pub(crate) fn shutdown() -> anyhow::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut endings = Endings::listen()?;
    let cancelled = token.clone();
    tokio::spawn(async move {
        endings.next().await;
        tracing::info!("asked to end");
        cancelled.cancel();
    });
    Ok(token)
}
