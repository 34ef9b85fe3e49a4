//! What the control socket of a mount answers.

use crate::control::server::{Handler, Refusal};
use crate::control::{Answer, Progress, Request};
use crate::fuse::MountHandle;
use crate::push::SettleError;
use crate::session::{Session, SyncError};
use async_trait::async_trait;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Longest sync unless the request says otherwise.
const SYNC_TIMEOUT: Duration = Duration::from_secs(600);
/// No request waits longer, whatever it says.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

/// See the module.
pub(super) struct Requests {
    pub(super) session: Arc<Session>,
    pub(super) handle: Arc<MountHandle>,
    pub(super) stop: CancellationToken,
}

#[async_trait]
impl Handler for Requests {
    async fn handle(
        &self,
        request: Request,
        progress: mpsc::Sender<Progress>,
    ) -> Result<Answer, Refusal> {
        match request {
            Request::Sync {
                timeout_ms,
                allow_degraded,
            } => self.sync(timeout_ms, allow_degraded, progress).await,
            Request::Evict => self.evict().await,
            Request::CacheStatus => Ok(Answer::CacheStatus(self.session.cache().status())),
            Request::Info { path } => self.info(&path).await,
            Request::Report => {
                let mut report = self.session.report();
                report.mountpoint = self.handle.mount_point().to_owned();
                Ok(Answer::Report(Box::new(report)))
            }
            Request::Unmount { timeout_ms } => match self.sync(timeout_ms, true, progress).await {
                Err(refusal) if refusal.code != "READ_ONLY" => Err(refusal),
                _ => {
                    self.stop.cancel();
                    Ok(Answer::Unmounting)
                }
            },
        }
    }
}

impl Requests {
    async fn sync(
        &self,
        timeout_ms: Option<u64>,
        allow_degraded: bool,
        progress: mpsc::Sender<Progress>,
    ) -> Result<Answer, Refusal> {
        let timeout = timeout_ms
            .map_or(SYNC_TIMEOUT, Duration::from_millis)
            .min(TIMEOUT_MAX);
        let tell = move |step| {
            // Who does not read is not waited for.
            let _ = progress.try_send(step);
        };
        let synced = self
            .session
            .sync(Instant::now() + timeout, allow_degraded, &tell)
            .await;
        synced.map(Answer::Synced).map_err(|error| refusal(&error))
    }

    async fn evict(&self) -> Result<Answer, Refusal> {
        let (session, handle) = (Arc::clone(&self.session), Arc::clone(&self.handle));
        let evict = move || {
            let mut evicted = session.evict_all();
            match handle.drop_kernel_pages() {
                Ok(files) => evicted.kernel_files = files as u64,
                Err(error) => evicted.kept.push(format!("pages in the kernel: {error}")),
            }
            evicted
        };
        let evicted = tokio::task::spawn_blocking(evict).await;
        evicted
            .map(Answer::Evicted)
            .map_err(|error| failed(error.to_string()))
    }

    async fn info(&self, path: &Path) -> Result<Answer, Refusal> {
        match self.session.info(path).await {
            Ok(Some(info)) => Ok(Answer::Info(info)),
            Ok(None) => Err(Refusal {
                code: "NOT_FOUND",
                text: format!("no such file in the volume: {}", path.display()),
                exit_code: 1,
            }),
            Err(error) => Err(failed(error.to_string())),
        }
    }
}

const fn failed(text: String) -> Refusal {
    Refusal {
        code: "FAILED",
        text,
        exit_code: 1,
    }
}

fn refusal(error: &SyncError) -> Refusal {
    let (code, exit_code) = match error {
        SyncError::ReadOnly => ("READ_ONLY", 1),
        SyncError::Seal(_) => ("FAILED", 1),
        SyncError::Settle(SettleError::Fenced(_)) => ("FENCED", 11),
        SyncError::Settle(SettleError::Deadline { .. }) => ("DEADLINE", 1),
        SyncError::Settle(SettleError::Ended) => ("FAILED", 1),
        SyncError::BelowPolicy { .. } => ("POLICY", 15),
        SyncError::Policy(_) => ("POLICY", 13),
    };
    Refusal {
        code,
        text: error.to_string(),
        exit_code,
    }
}
