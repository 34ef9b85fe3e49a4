//! Up to where the log of this node is durable.

use super::LogError;
use std::sync::Arc;
use tokio::sync::{Notify, watch};

#[derive(Debug, Default)]
struct Progress {
    /// Every entry below this index that this node has to hold is durable.
    end: u64,
    /// The first failure of a sync. Nothing is durable from then on that was not before.
    failed: Option<String>,
}

/// A mark that grows as syncs return, and may be waited for. Clones share it.
#[derive(Debug, Clone)]
pub struct Watermark {
    progress: watch::Sender<Progress>,
    /// Wakes whoever waits for a failure alone: the mark moves with every commit.
    failing: Arc<Notify>,
}

impl Watermark {
    /// Everything below `end` is durable.
    pub fn new(end: u64) -> Self {
        let progress = Progress { end, failed: None };
        Self {
            progress: watch::Sender::new(progress),
            failing: Arc::default(),
        }
    }

    /// The first index that is not known to be durable.
    pub fn end(&self) -> u64 {
        self.progress.borrow().end
    }

    /// Everything below `end` is durable now. Nothing happens if that was known, or if a sync has failed.
    pub fn reach(&self, end: u64) {
        self.progress.send_if_modified(|progress| {
            let grows = progress.failed.is_none() && end > progress.end;
            if grows {
                progress.end = end;
            }
            grows
        });
    }

    /// What stands at `end` and behind it is void.
    pub fn cut(&self, end: u64) {
        self.progress.send_if_modified(|progress| {
            let shrinks = end < progress.end;
            if shrinks {
                progress.end = end;
            }
            shrinks
        });
    }

    /// A sync failed: whoever waits is told, and everyone who will.
    pub fn fail(&self, reason: &str) {
        self.progress.send_if_modified(|progress| {
            let first = progress.failed.is_none();
            progress.failed.get_or_insert_with(|| reason.to_owned());
            first
        });
        self.failing.notify_waiters();
    }

    /// Returns once everything below `end` is durable.
    ///
    /// # Errors
    /// [`LogError::NotDurable`] when a sync failed before that.
    pub async fn wait(&self, end: u64) -> Result<(), LogError> {
        if self.end() >= end {
            return Ok(());
        }
        let mut progress = self.progress.subscribe();
        let over = progress
            .wait_for(|progress| progress.end >= end || progress.failed.is_some())
            .await;
        match over {
            Ok(progress) if progress.end >= end => Ok(()),
            Ok(progress) => Err(LogError::NotDurable(
                progress.failed.clone().unwrap_or_default(),
            )),
            Err(_) => Err(LogError::SyncerGone),
        }
    }

    /// Returns the reason once a sync has failed; else never.
    pub async fn failure(&self) -> String {
        loop {
            // From before the look, so that no failure comes between unseen.
            let failing = self.failing.notified();
            if let Some(reason) = &self.progress.borrow().failed {
                return reason.clone();
            }
            failing.await;
        }
    }
}
