//! What INFO tells: counted since the server began.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Connections accepted.
    pub(super) clients: Counter,
    /// Requests that name a command.
    pub(super) executed: Counter,
    /// Requests that do not.
    pub(super) failed: Counter,
    /// Commands that only an admin may give, refused.
    pub(super) unauthorized: Counter,
    /// Bytes of values read, and reads that failed.
    pub(super) read_bytes: Counter,
    pub(super) read_failed: Counter,
    /// Bytes of values written, and writes that failed.
    pub(super) written_bytes: Counter,
    pub(super) write_failed: Counter,
    /// Bytes from and to clients.
    pub(super) received_bytes: Counter,
    pub(super) sent_bytes: Counter,
}
