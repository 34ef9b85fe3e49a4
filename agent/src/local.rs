//! The backends of this agent: their stores, their health, what is told of them in heartbeats.

use crate::store::PieceStore;
use crate::tour::Progress;
use async_trait::async_trait;
use parking_lot::Mutex;
use qsfs_proto::api::BackendFacts;
use qsfs_zstor::id::BackendId;
use std::sync::Arc;
use std::time::Duration;

/// A backend that does not tell its numbers for so long is reported as not healthy.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// What a healthy backend says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Usage {
    /// Bytes used.
    pub(crate) used_bytes: u64,
    /// Bytes that can still be stored.
    pub(crate) free_bytes: u64,
    /// Keys.
    pub(crate) pieces: u64,
}

/// Looks whether a backend is well.
#[async_trait]
pub(crate) trait Probe: Send + Sync + 'static {
    /// Its numbers, or what is wrong, for people.
    async fn probe(&self) -> Result<Usage, String>;
}

/// One backend of this agent.
pub(crate) struct LocalBackend {
    /// Identity.
    pub(crate) id: BackendId,
    /// Its pieces; `None` when it could not be opened.
    pub(crate) store: Option<Arc<dyn PieceStore>>,
    /// Its health.
    pub(crate) probe: Box<dyn Probe>,
    /// Of its scrub.
    pub(crate) progress: Arc<Mutex<Progress>>,
    /// The problem last told, so that the log names every change once.
    pub(crate) told: Mutex<String>,
}

impl LocalBackend {
    /// See the fields.
    pub(crate) fn new(
        id: BackendId,
        store: Option<Arc<dyn PieceStore>>,
        probe: Box<dyn Probe>,
    ) -> Self {
        Self {
            id,
            store,
            probe,
            progress: Arc::default(),
            told: Mutex::default(),
        }
    }

    /// For a heartbeat.
    pub(crate) async fn facts(&self) -> BackendFacts {
        let probed = match tokio::time::timeout(PROBE_TIMEOUT, self.probe.probe()).await {
            Ok(probed) => probed,
            Err(_) => Err(format!(
                "does not answer within {} s",
                PROBE_TIMEOUT.as_secs()
            )),
        };
        let (usage, problem) = match probed {
            Ok(usage) => (usage, String::new()),
            Err(problem) => (Usage::default(), problem),
        };
        self.tell(&problem);
        let progress = *self.progress.lock();
        let percent = |toured: u64| {
            let share = toured.saturating_mul(100) / usage.used_bytes.max(1);
            u8::try_from(share.min(99)).expect("at most 99")
        };
        BackendFacts {
            backend: self.id,
            healthy: problem.is_empty(),
            problem,
            used_bytes: usage.used_bytes,
            free_bytes: usage.free_bytes,
            pieces: usage.pieces,
            last_scrub_ms: progress.last_scrub_ms,
            scrub_percent: progress.toured_bytes.map(percent),
            scrub_found: progress.found,
            age_ms: Some(0),
        }
    }

    fn tell(&self, problem: &str) {
        let mut told = self.told.lock();
        if *told == problem {
            return;
        }
        if problem.is_empty() {
            tracing::info!(backend = %self.id, "backend is healthy again");
        } else {
            tracing::error!(backend = %self.id, problem, "backend is not healthy");
        }
        *told = problem.to_owned();
    }
}
