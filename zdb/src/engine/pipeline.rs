//! Batches that were appended and wait for their sync: the next ones are appended meanwhile, and one sync serves all that wait.
//!
//! ```text
//! commit thread: append 1 | append 2 | append 3 | append 4 ...        in this order
//! sync thread:              sync 1 ........ | sync 2 3 .......        in this order; answers go out behind the sync
//! ```
//!
//! It is worth a thread of its own only where copying takes as long as the disk does: for large values.

use super::commit::Staged;
use super::queue::Batch;
use parking_lot::{Condvar, Mutex};

/// Bytes and batches that were appended and are not synced, at most.
const IN_FLIGHT_BYTES_MAX: usize = 32 << 20;
const IN_FLIGHT_BATCHES_MAX: usize = 64;

/// A batch and what will be answered if its sync succeeds.
pub(super) type InFlight = (Batch, Staged);

#[derive(Default)]
struct State {
    waiting: Vec<InFlight>,
    /// Of what waits and of what is being synced.
    batches: usize,
    bytes: usize,
    closed: bool,
}

/// Between the commit thread and the sync thread of a namespace.
#[derive(Default)]
pub(super) struct Pipeline {
    state: Mutex<State>,
    changed: Condvar,
}

impl Pipeline {
    /// Is something appended and not settled?
    pub(super) fn is_busy(&self) -> bool {
        self.state.lock().batches > 0
    }

    /// Hand a batch to the sync thread; waits while too much is in flight.
    pub(super) fn push(&self, batch: Batch, staged: Staged) {
        let mut state = self.state.lock();
        while state.bytes >= IN_FLIGHT_BYTES_MAX || state.batches >= IN_FLIGHT_BATCHES_MAX {
            self.changed.wait(&mut state);
        }
        state.batches += 1;
        state.bytes += staged.bytes();
        state.waiting.push((batch, staged));
        drop(state);
        self.changed.notify_all();
    }

    /// Everything that waits, in order; `None` once the pipeline is closed and empty.
    pub(super) fn take(&self) -> Option<Vec<InFlight>> {
        let mut state = self.state.lock();
        while state.waiting.is_empty() {
            if state.closed {
                return None;
            }
            self.changed.wait(&mut state);
        }
        Some(std::mem::take(&mut state.waiting))
    }

    /// So many batches of so many bytes are settled.
    pub(super) fn done(&self, batches: usize, bytes: usize) {
        let mut state = self.state.lock();
        state.batches -= batches;
        state.bytes -= bytes;
        drop(state);
        self.changed.notify_all();
    }

    /// What is in it is still settled.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }
}
