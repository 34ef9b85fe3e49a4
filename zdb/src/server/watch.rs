//! WAIT: who wants to know what others run.

use super::command::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::broadcast;

/// Commands remembered for those that WAIT and are slow to look.
const WATCHED_COMMANDS_MAX: usize = 256;

/// A command that was run.
#[derive(Debug, Clone)]
pub(super) struct Ran {
    pub(super) namespace: String,
    pub(super) client: u64,
    pub(super) command: Command,
}

/// Tells those that WAIT.
#[derive(Debug)]
pub(super) struct Watch {
    ran: broadcast::Sender<Ran>,
    watchers: AtomicUsize,
}

struct Watching<'a>(&'a AtomicUsize);

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Watch {
    pub(super) fn new() -> Self {
        Self {
            ran: broadcast::channel(WATCHED_COMMANDS_MAX).0,
            watchers: AtomicUsize::new(0),
        }
    }

    /// Is anybody watching? Without, nothing needs to be told.
    pub(super) fn is_watched(&self) -> bool {
        self.watchers.load(Ordering::Acquire) > 0
    }

    pub(super) fn tell(&self, ran: Ran) {
        // Nobody waits any more: an error that means nothing.
        let _ = self.ran.send(ran);
    }

    /// The next command that satisfies `wanted`; `None` when the time is up.
    pub(super) async fn next(
        &self,
        patience: Duration,
        wanted: impl Fn(&Ran) -> bool,
    ) -> Option<Command> {
        let mut ran = self.ran.subscribe();
        self.watchers.fetch_add(1, Ordering::AcqRel);
        let _watching = Watching(&self.watchers);
        let seen = async {
            loop {
                match ran.recv().await {
                    Ok(ran) if wanted(&ran) => return ran.command,
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    // The sender lives as long as `self`.
                    Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        tokio::time::timeout(patience, seen).await.ok()
    }
}
