//! Makes appends durable.
//!
//! On a disk that has been quick of late the caller syncs itself: handing over to a thread and back would cost more than the
//! fdatasync. Otherwise one thread does, and one fdatasync serves everything that waits when it begins. Where there are no threads (a
//! simulation) a task does the same.

use super::LogError;
use crate::ground::{self, Work};
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

#[derive(Debug, Clone)]
enum Requests {
    ToThread(mpsc::SyncSender<Request>),
    ToTask(tokio::sync::mpsc::Sender<Request>),
}

/// Handle to the syncing thread; it ends when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct Syncer {
    requests: Requests,
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
    pub fn start(work: &Arc<dyn Work>) -> Result<Self, std::io::Error> {
        // Not known yet: not quick.
        let newest_us = Arc::new(AtomicU64::new(u64::MAX));
        if !work.has_threads() {
            let (requests, waiting) = tokio::sync::mpsc::channel(WAITING_MAX);
            tokio::spawn(run_as_task(waiting, Arc::clone(work)));
            let requests = Requests::ToTask(requests);
            return Ok(Self {
                requests,
                newest_us,
            });
        }
        let (requests, waiting) = mpsc::sync_channel(WAITING_MAX);
        let measured = Arc::clone(&newest_us);
        std::thread::Builder::new()
            .name("raft-log-sync".into())
            .spawn(move || run(&waiting, &measured))?;
        Ok(Self {
            requests: Requests::ToThread(requests),
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
        let request = Request { handle, callback };
        let sent = match &self.requests {
            Requests::ToThread(thread) => thread.send(request).is_ok(),
            Requests::ToTask(task) => task.try_send(request).is_ok(),
        };
        if sent {
            Ok(())
        } else {
            Err(LogError::SyncerGone)
        }
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

async fn run_as_task(mut waiting: tokio::sync::mpsc::Receiver<Request>, work: Arc<dyn Work>) {
    while let Some(first) = waiting.recv().await {
        let mut batch = vec![first];
        while let Ok(next) = waiting.try_recv() {
            batch.push(next);
        }
        let synced = ground::blocking(&work, move || {
            let unmeasured = AtomicU64::default();
            for Request { handle, callback } in batch {
                sync(&handle, callback, &unmeasured);
            }
        });
        if synced.await.is_err() {
            return;
        }
    }
}
