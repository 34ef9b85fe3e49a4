//! Makes appends durable, in the order in which they were written.
//!
//! ```text
//! append of a leader   --> queue --> one fdatasync for all that wait --> watermark
//! append of a follower --> the same, and its callback after it; on a quick disk in place
//! ```
//!
//! A disk whose newest sync was quick is waited for in place: handing over to a thread and back would cost more than the
//! fdatasync. A leader never waits in place; see [`super::storage`]. Where there are no threads (a simulation) a task syncs, and
//! everything goes through it.

use super::watermark::Watermark;
use crate::ground::{self, Work};
use crate::raft::TypeConfig;
use openraft::storage::LogFlushed;
use parking_lot::{Condvar, Mutex};
use qsfs_zdb::datafile::{DatafileError, SyncHandle};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// A disk whose newest sync took less is quick: a task may wait for it.
const QUICK: Duration = Duration::from_millis(1);

/// Appends that wait to become durable without their writer waiting too. Behind them a leader waits as a follower does.
const AHEAD_MAX: usize = 1_024;

struct Request {
    handle: SyncHandle,
    /// One past the last index it covers.
    end: u64,
    callback: Option<LogFlushed<TypeConfig>>,
    since: Instant,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Request>,
    /// When the oldest request of the round that is under way was made.
    syncing_since: Option<Instant>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    /// Wakes the thread.
    filled: Condvar,
    /// Wakes the task.
    filled_task: Notify,
    /// How long the newest sync took, in µs.
    newest_us: AtomicU64,
    watermark: Watermark,
    has_thread: bool,
}

/// Handle to whoever syncs; that ends when the last handle is dropped.
#[derive(Clone)]
pub struct Syncer {
    closing: Arc<Closing>,
}

struct Closing(Arc<Shared>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.queue.lock().closed = true;
        self.0.wake();
    }
}

impl std::fmt::Debug for Syncer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Syncer")
    }
}

impl Syncer {
    /// Starts it. Where there are no threads only within a runtime.
    pub fn start(watermark: Watermark, work: &Arc<dyn Work>) -> Result<Self, std::io::Error> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            filled: Condvar::new(),
            filled_task: Notify::new(),
            // Not known yet: not quick.
            newest_us: AtomicU64::new(u64::MAX),
            watermark,
            has_thread: work.has_threads(),
        });
        let worker = Arc::clone(&shared);
        if shared.has_thread {
            std::thread::Builder::new()
                .name("raft-log-sync".into())
                .spawn(move || worker.run_thread())?;
        } else {
            tokio::spawn(run_task(worker, Arc::clone(work)));
        }
        Ok(Self {
            closing: Arc::new(Closing(shared)),
        })
    }

    /// Calls back once everything appended through `handle` so far, which is everything below `end`, is durable.
    pub fn flush(&self, handle: SyncHandle, end: u64, callback: LogFlushed<TypeConfig>) {
        let shared = &self.closing.0;
        let request = Request {
            handle,
            end,
            callback: Some(callback),
            since: Instant::now(),
        };
        if shared.waits_in_place() {
            shared.sync(vec![request]);
        } else {
            shared.enqueue(request);
        }
    }

    /// Makes everything below `end` durable later and calls back at once; or, if too much waits already, as [`Self::flush`] does.
    pub fn flush_behind(&self, handle: SyncHandle, end: u64, callback: LogFlushed<TypeConfig>) {
        let shared = &self.closing.0;
        let full = shared.queue.lock().waiting.len() >= AHEAD_MAX;
        let (now, later) = if full {
            (None, Some(callback))
        } else {
            (Some(callback), None)
        };
        shared.enqueue(Request {
            handle,
            end,
            callback: later,
            since: Instant::now(),
        });
        if let Some(callback) = now {
            callback.log_io_completed(Ok(()));
        }
    }

    /// How long the oldest append that is not durable yet has waited.
    pub fn lag(&self) -> Duration {
        let queue = self.closing.0.queue.lock();
        let oldest = queue
            .syncing_since
            .or_else(|| queue.waiting.front().map(|request| request.since));
        oldest.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Shared {
    fn waits_in_place(&self) -> bool {
        let newest = Duration::from_micros(self.newest_us.load(Ordering::Relaxed));
        self.has_thread && newest < QUICK
    }

    fn wake(&self) {
        if self.has_thread {
            self.filled.notify_one();
        } else {
            self.filled_task.notify_one();
        }
    }

    fn enqueue(&self, request: Request) {
        self.queue.lock().waiting.push_back(request);
        self.wake();
    }

    fn run_thread(&self) {
        loop {
            let batch = {
                let mut queue = self.queue.lock();
                while queue.waiting.is_empty() {
                    if queue.closed {
                        return;
                    }
                    self.filled.wait(&mut queue);
                }
                queue.take()
            };
            self.sync(batch);
            self.queue.lock().syncing_since = None;
        }
    }

    /// One fdatasync serves all: a handle whose bytes another one's sync covered returns at once.
    fn sync(&self, batch: Vec<Request>) {
        let mut reached = 0;
        let mut failed: Option<DatafileError> = None;
        let began = std::time::Instant::now();
        for request in &batch {
            match request.handle.sync() {
                Ok(_) => reached = request.end,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        let took = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.newest_us.store(took, Ordering::Relaxed);
        self.watermark.reach(reached);
        if let Some(error) = &failed {
            tracing::error!(%error, "the Raft log does not become durable; this node stops");
            self.watermark.fail(&error.to_string());
        }
        for Request { end, callback, .. } in batch {
            let Some(callback) = callback else {
                continue;
            };
            callback.log_io_completed(match &failed {
                Some(error) if end > reached => Err(std::io::Error::other(error.to_string())),
                _ => Ok(()),
            });
        }
    }
}

async fn run_task(shared: Arc<Shared>, work: Arc<dyn Work>) {
    loop {
        let batch = {
            let mut queue = shared.queue.lock();
            if queue.closed && queue.waiting.is_empty() {
                return;
            }
            queue.take()
        };
        if batch.is_empty() {
            shared.filled_task.notified().await;
            continue;
        }
        let syncing = Arc::clone(&shared);
        if ground::blocking(&work, move || syncing.sync(batch))
            .await
            .is_err()
        {
            shared.watermark.fail("whoever syncs is gone");
            return;
        }
        shared.queue.lock().syncing_since = None;
    }
}

impl Queue {
    fn take(&mut self) -> Vec<Request> {
        self.syncing_since = self.waiting.front().map(|request| request.since);
        self.waiting.drain(..).collect()
    }
}
