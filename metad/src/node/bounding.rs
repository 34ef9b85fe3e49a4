//! Keeps the log short: when a snapshot is due, and what of the log goes after it.
//!
//! ```text
//! log:  purged | kept for late followers | snapshot | not in a snapshot yet ... applied | not applied yet
//!                                                   |------- cost: due at [`due_at`] ---|
//! ```
//!
//! A snapshot writes the whole state. If it were due after the same amount of log whatever its size, a large state would be rewritten
//! for every few changes; so the amount grows with it, and what snapshots write is at most some twice what the log does, until
//! [`Sizes::snapshot_cost_max`] bounds the log: its disk, its index in memory, and what a start applies again.

use crate::ground::{self, Sizes};
use crate::log::segments::Amount;
use crate::log::storage::LogStore;
use crate::machine::Machine;
use crate::raft::{LogId, Raft};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What an entry costs besides its bytes: a place in the index of the log, and its part of a start.
const ENTRY_COST: u64 = 1 << 10;

/// So many bytes of a snapshot allow one of the log.
const SNAPSHOT_SHARE: u64 = 2;

/// A snapshot that has not come for so long is asked for again: one that is received in between takes its place. While one is being made
/// openraft ignores it.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// Between two looks at a log that grows.
const LOOK: Duration = Duration::from_millis(50);

/// What so much of the log costs.
fn cost(amount: Amount) -> u64 {
    amount.bytes + amount.entries * ENTRY_COST
}

/// Cost of the log behind a snapshot of this size at which the next one is due.
pub fn due_at(sizes: &Sizes, snapshot_bytes: u64) -> u64 {
    let grown = (snapshot_bytes / SNAPSHOT_SHARE).max(sizes.snapshot_cost_min);
    grown.min(sizes.snapshot_cost_max)
}

/// Has snapshots taken and the log purged until `stop`.
pub(super) async fn run(raft: Raft, log: LogStore, machine: Machine, stop: CancellationToken) {
    let sizes = machine.ground().sizes;
    let mut applied = machine.applied_index();
    let mut known: Option<Option<LogId>> = None;
    let mut snapshot_bytes = 0;
    // Since when a snapshot is being made.
    let mut building: Option<Instant> = None;
    loop {
        let snapshot = raft.data_metrics().borrow().snapshot;
        if known != Some(snapshot) {
            (known, building) = (Some(snapshot), None);
            snapshot_bytes = size_of_snapshot(&machine).await;
            let upto = snapshot.and_then(|id| log.purgeable(id.index, sizes.kept));
            if let Some(upto) = upto
                && raft.trigger().purge_log(upto).await.is_err()
            {
                // It has stopped, which others say.
                return;
            }
        }
        // What was purged is in a snapshot: openraft has not said yet which one there is.
        let unknown = snapshot.is_none() && log.bounds().0.is_some();
        let index = *applied.borrow_and_update();
        let behind = log.amount(snapshot.map(|id| id.index), index);
        let asked = building.is_some_and(|since| since.elapsed() < ASK_AGAIN);
        if !asked && !unknown && cost(behind) >= due_at(&sizes, snapshot_bytes) {
            building = Some(Instant::now());
            if raft.trigger().snapshot().await.is_err() {
                return;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop.cancelled() => return,
        }
        if building.is_some() || unknown {
            continue;
        }
        tokio::select! {
            changed = applied.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}

async fn size_of_snapshot(machine: &Machine) -> u64 {
    let (work, machine) = (machine.ground().work.clone(), machine.clone());
    let asked = ground::blocking(&work, move || machine.snapshot_bytes()).await;
    match asked {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) => {
            tracing::warn!(%error, "how large the newest snapshot is cannot be told");
            0
        }
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_state_is_not_rewritten_for_every_few_changes_and_the_log_stays_bounded() {
        let sizes = Sizes::default();
        assert_eq!(due_at(&sizes, 0), sizes.snapshot_cost_min);
        assert_eq!(due_at(&sizes, 100 << 20), 64 << 20);
        assert_eq!(due_at(&sizes, 700 << 20), 350 << 20);
        for gib in [2, 20, 1 << 20] {
            assert_eq!(due_at(&sizes, gib << 30), sizes.snapshot_cost_max);
        }
    }

    #[test]
    fn many_small_entries_cost_more_than_their_bytes() {
        let small = Amount {
            entries: 1_000,
            bytes: 250_000,
        };
        let large = Amount {
            entries: 1,
            bytes: 250_000,
        };
        assert!(cost(small) > 4 * cost(large));
    }
}
