//! Makes appends durable.
//!
//! On a disk that has been quick of late the caller syncs itself: handing over to a thread and back would cost more than the
//! fdatasync. Otherwise one thread does, and one fdatasync serves everything that waits when it begins.

use super::LogError;
use crate::raft::TypeConfig;
use openraft::storage::LogFlushed;
use qsfs_zdb::datafile::SyncHandle;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// A disk whose newest sync took less is quick: a task may wait for it.
const QUICK: Duration = Duration::from_millis(1);

struct Request {
    handle: SyncHandle,
    callback: LogFlushed<TypeConfig>,
}

/// Appends waiting to become durable; more than openraft ever has under way.
const WAITING_MAX: usize = 4_096;

/// Handle to the syncing thread; it ends when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct Syncer {
    requests: mpsc::SyncSender<Request>,
    /// How long the newest sync took.
    newest_us: Arc<AtomicU64>,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Request")
    }
}

impl Syncer {
    /// Starts the thread.
    pub fn start() -> Result<Self, std::io::Error> {
        let (requests, waiting) = mpsc::sync_channel(WAITING_MAX);
        // Not known yet: not quick.
        let newest_us = Arc::new(AtomicU64::new(u64::MAX));
        let measured = Arc::clone(&newest_us);
        std::thread::Builder::new()
            .name("raft-log-sync".into())
            .spawn(move || run(&waiting, &measured))?;
        Ok(Self {
            requests,
            newest_us,
        })
    }

    /// Calls back once everything appended through `handle` so far is durable.
    pub fn flush(
        &self,
        handle: SyncHandle,
        callback: LogFlushed<TypeConfig>,
    ) -> Result<(), LogError> {
        if Duration::from_micros(self.newest_us.load(Ordering::Relaxed)) < QUICK {
            sync(&handle, callback, &self.newest_us);
            return Ok(());
        }
        self.requests
            .send(Request { handle, callback })
            .map_err(|_| LogError::SyncerGone)
    }
}

fn sync(handle: &SyncHandle, callback: LogFlushed<TypeConfig>, newest_us: &AtomicU64) {
    let began = Instant::now();
    let result = handle.sync().map(|_| ()).map_err(std::io::Error::other);
    let took = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    newest_us.store(took, Ordering::Relaxed);
    callback.log_io_completed(result);
}

fn run(waiting: &mpsc::Receiver<Request>, newest_us: &AtomicU64) {
    while let Ok(first) = waiting.recv() {
        let mut batch = vec![first];
        while let Ok(next) = waiting.try_recv() {
            batch.push(next);
        }
        // A handle whose bytes another one's sync covered returns at once, so the loop costs one fdatasync.
        for Request { handle, callback } in batch {
            sync(&handle, callback, newest_us);
        }
    }
}
