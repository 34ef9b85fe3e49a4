//! The scan order of a namespace in user mode: live entries by version, 9 bytes each, in sorted runs.
//!
//! New entries have the highest version, so runs fill up one after the other; entries removed in between shrink them, and small
//! neighbours are joined.

use super::user::Slot;
use std::collections::BTreeMap;
use std::ops::Bound;

/// Entries of a run at most.
const RUN_MAX: usize = 512;
/// A run with fewer is joined with its neighbour.
const RUN_SMALL: usize = RUN_MAX / 4;
const ITEM_BYTES: usize = 9;

/// Version minus the run's first (u32), then the slot.
type Item = [u8; ITEM_BYTES];

fn item(delta: u32, slot: Slot) -> Item {
    let mut bytes = [0; ITEM_BYTES];
    bytes[..4].copy_from_slice(&delta.to_le_bytes());
    bytes[4..].copy_from_slice(&slot.0);
    bytes
}

fn delta(item: &Item) -> u32 {
    u32::from_le_bytes([item[0], item[1], item[2], item[3]])
}

fn slot(item: &Item) -> Slot {
    Slot([item[4], item[5], item[6], item[7], item[8]])
}

#[derive(Debug, Default)]
pub(super) struct Order {
    /// By a version that is not above the run's first.
    runs: BTreeMap<u64, Vec<Item>>,
}

impl Order {
    fn run_of(&mut self, version: u64) -> Option<(u64, &mut Vec<Item>)> {
        let (base, run) = self.runs.range_mut(..=version).next_back()?;
        Some((*base, run))
    }

    pub(super) fn insert(&mut self, version: u64, at: Slot) {
        let new_run = vec![item(0, at)];
        let Some((base, run)) = self.run_of(version) else {
            self.runs.insert(version, new_run);
            return;
        };
        let Ok(offset) = u32::try_from(version - base) else {
            self.runs.insert(version, new_run);
            return;
        };
        let position = run.partition_point(|item| delta(item) < offset);
        if run.len() < RUN_MAX {
            run.insert(position, item(offset, at));
            return;
        }
        // Full: what is behind becomes a run of its own, so that rising versions fill runs whole.
        let behind = run.split_off(position);
        if run.is_empty() {
            self.runs.remove(&base);
        }
        self.runs.insert(version, new_run);
        if let Some(first) = behind.first().map(delta) {
            let from = base + u64::from(first);
            let moved = behind
                .iter()
                .map(|old| item(delta(old) - first, slot(old)))
                .collect();
            self.runs.insert(from, moved);
            self.join(from);
        }
    }

    pub(super) fn remove(&mut self, version: u64) {
        let Some((base, run)) = self.run_of(version) else {
            return;
        };
        let Ok(offset) = u32::try_from(version - base) else {
            return;
        };
        let Ok(position) = run.binary_search_by(|item| delta(item).cmp(&offset)) else {
            return;
        };
        run.remove(position);
        if run.is_empty() {
            self.runs.remove(&base);
            return;
        }
        if run.len() < run.capacity() / 4 * 3 {
            run.shrink_to_fit();
        }
        if run.len() < RUN_SMALL {
            self.join(base);
        }
    }

    /// Take the next run into this one if both together are not large.
    fn join(&mut self, base: u64) {
        let after = (Bound::Excluded(base), Bound::Unbounded);
        let Some((&next, items)) = self.runs.range(after).next() else {
            return;
        };
        let room = self
            .runs
            .get(&base)
            .map_or(0, |run| (RUN_MAX / 2).saturating_sub(run.len()));
        let last = items.last().map_or(0, delta);
        let fits = u32::try_from(next - base)
            .ok()
            .and_then(|shift| shift.checked_add(last).map(|_| shift));
        if items.len() > room {
            return;
        }
        let (Some(shift), Some(items)) = (fits, self.runs.remove(&next)) else {
            return;
        };
        if let Some(run) = self.runs.get_mut(&base) {
            run.extend(items.iter().map(|old| item(delta(old) + shift, slot(old))));
        }
    }

    /// Bytes allocated.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        // A node of a `BTreeMap` is at least half full.
        let of_map = 2 * (size_of::<u64>() + size_of::<Vec<Item>>());
        let runs = self.runs.values();
        runs.map(|run| run.capacity() * ITEM_BYTES + of_map).sum()
    }

    pub(super) fn after(&self, position: Option<u64>) -> impl Iterator<Item = (u64, Slot)> + '_ {
        let from = position.map_or(Some(0), |position| position.checked_add(1));
        let first = from.and_then(|from| Some(*self.runs.range(..=from).next_back()?.0));
        let runs = self.runs.range(first.unwrap_or(0)..);
        runs.flat_map(|(base, run)| {
            run.iter()
                .map(move |item| (base + u64::from(delta(item)), slot(item)))
        })
        .skip_while(move |(version, _)| from.is_none_or(|from| *version < from))
    }

    pub(super) fn before(&self, position: Option<u64>) -> impl Iterator<Item = (u64, Slot)> + '_ {
        let to = position.map_or(Bound::Unbounded, Bound::Excluded);
        self.runs
            .range((Bound::Unbounded, to))
            .rev()
            .flat_map(|(base, run)| {
                run.iter()
                    .rev()
                    .map(move |item| (base + u64::from(delta(item)), slot(item)))
            })
            .skip_while(move |(version, _)| position.is_some_and(|position| *version >= position))
    }
}
