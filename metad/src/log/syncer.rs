//! One thread that makes appends durable: one fdatasync serves everything that waits when it begins.

use super::LogError;
use crate::raft::TypeConfig;
use openraft::storage::LogFlushed;
use qsfs_zdb::datafile::SyncHandle;
use std::sync::mpsc;

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
        std::thread::Builder::new()
            .name("raft-log-sync".into())
            .spawn(move || run(&waiting))?;
        Ok(Self { requests })
    }

    /// Calls back once everything appended through `handle` so far is durable.
    pub fn flush(
        &self,
        handle: SyncHandle,
        callback: LogFlushed<TypeConfig>,
    ) -> Result<(), LogError> {
        self.requests
            .send(Request { handle, callback })
            .map_err(|_| LogError::SyncerGone)
    }
}

fn run(waiting: &mpsc::Receiver<Request>) {
    while let Ok(first) = waiting.recv() {
        let mut batch = vec![first];
        while let Ok(next) = waiting.try_recv() {
            batch.push(next);
        }
        // A handle whose bytes another one's sync covered returns at once, so the loop costs one fdatasync.
        for Request { handle, callback } in batch {
            let result = handle.sync().map(|_| ()).map_err(std::io::Error::other);
            callback.log_io_completed(result);
        }
    }
}
