//! What was changed lately, entry by entry: where watches get their changes from.
//!
//! ```text
//! floor .. [index, rows] [index, rows] ... .. applied        everything after `floor` is here
//! ```
//!
//! In memory only, of one node: it begins with what the node applies after its start or after a snapshot it was given, and forgets the
//! oldest beyond [`HISTORY_BYTES_MAX`]. Who asks for something older lists anew, or asks another node.

use crate::state::kv::Changed;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;

/// Most memory for it, bookkeeping included.
pub const HISTORY_BYTES_MAX: usize = 16 << 20;
/// Entries handed out at once.
const PAGE_ENTRIES: usize = 256;
/// Bookkeeping of a row and of an entry, about.
const OVERHEAD_BYTES: usize = 96;

/// How one entry left the watched rows that it changed: each once; `None`: deleted.
#[derive(Debug, PartialEq, Eq)]
pub struct Noted {
    /// Log index.
    pub index: u64,
    /// In key order.
    pub rows: Vec<Changed>,
}

impl Noted {
    fn bytes(&self) -> usize {
        let rows = self.rows.iter();
        let row = |(key, value): &Changed| {
            key.len() + value.as_ref().map_or(0, Vec::len) + OVERHEAD_BYTES
        };
        rows.map(row).sum::<usize>() + OVERHEAD_BYTES
    }
}

/// Some of what came after an index.
#[derive(Debug)]
pub struct Page {
    /// Entries in ascending order.
    pub entries: Vec<Arc<Noted>>,
    /// With them, everything up to this index was handed out.
    pub through: u64,
}

/// See the module.
#[derive(Debug)]
pub struct History {
    ring: Mutex<Ring>,
}

#[derive(Debug)]
struct Ring {
    floor: u64,
    applied: u64,
    entries: VecDeque<Arc<Noted>>,
    bytes: usize,
    bytes_max: usize,
}

impl History {
    /// Remembers what comes after `applied`.
    pub fn new(applied: u64) -> Self {
        Self::with_limit(applied, HISTORY_BYTES_MAX)
    }

    /// [`Self::new`] with another limit.
    pub fn with_limit(applied: u64, bytes_max: usize) -> Self {
        let ring = Ring {
            floor: applied,
            applied,
            entries: VecDeque::new(),
            bytes: 0,
            bytes_max,
        };
        Self {
            ring: Mutex::new(ring),
        }
    }

    #[cfg(test)]
    pub(super) fn set_limit(&self, bytes_max: usize) {
        self.ring.lock().bytes_max = bytes_max;
    }

    /// Everything up to `applied` was applied; of that, these entries changed something that is watched.
    pub fn extend(&self, entries: impl IntoIterator<Item = Noted>, applied: u64) {
        let mut ring = self.ring.lock();
        for noted in entries {
            ring.bytes += noted.bytes();
            ring.entries.push_back(Arc::new(noted));
        }
        ring.applied = applied;
        while ring.bytes > ring.bytes_max
            && let Some(oldest) = ring.entries.pop_front()
        {
            ring.bytes -= oldest.bytes();
            ring.floor = oldest.index;
        }
    }

    /// The state was replaced: what led to it is not known.
    pub fn restart(&self, applied: u64) {
        let mut ring = self.ring.lock();
        ring.entries.clear();
        (ring.floor, ring.applied, ring.bytes) = (applied, applied, 0);
    }

    /// What came after an index; an error is the oldest index that can be asked about.
    pub fn after(&self, index: u64) -> Result<Page, u64> {
        let ring = self.ring.lock();
        if index < ring.floor {
            return Err(ring.floor);
        }
        let from = ring.entries.partition_point(|noted| noted.index <= index);
        let entries: Vec<_> = ring
            .entries
            .range(from..)
            .take(PAGE_ENTRIES)
            .cloned()
            .collect();
        let through = match entries.last() {
            Some(last) if from + entries.len() < ring.entries.len() => last.index,
            // What is asked about may not be applied here yet.
            _ => ring.applied.max(index),
        };
        Ok(Page { entries, through })
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::state::kv::RowKey;
    use proptest::prelude::*;

    fn noted(index: u64, bytes: usize) -> Noted {
        let rows = [(
            RowKey::from_slice(&index.to_be_bytes()),
            Some(vec![7; bytes]),
        )];
        Noted {
            index,
            rows: rows.into(),
        }
    }

    fn all_after(history: &History, mut index: u64) -> Result<Vec<u64>, u64> {
        let mut found = Vec::new();
        loop {
            let page = history.after(index)?;
            found.extend(page.entries.iter().map(|noted| noted.index));
            if page.through == index {
                return Ok(found);
            }
            index = page.through;
        }
    }

    proptest! {
        /// Whoever is answered gets exactly what came after; whoever is refused is told an index that is answered.
        #[test]
        fn nothing_is_skipped_and_nothing_comes_twice(
            steps in proptest::collection::vec((1..4_u64, any::<bool>(), 0..400_usize), 0..600),
            ask in 0..1_500_u64,
        ) {
            let history = History::with_limit(10, 40_000);
            let (mut applied, mut model) = (10, Vec::new());
            for (step, changes, bytes) in steps {
                applied += step;
                let entry = changes.then(|| noted(applied, bytes));
                model.extend(entry.as_ref().map(|noted| noted.index));
                history.extend(entry, applied);
            }
            match all_after(&history, ask) {
                Ok(found) => {
                    let wanted: Vec<_> = model.into_iter().filter(|index| *index > ask).collect();
                    prop_assert_eq!(found, wanted);
                }
                Err(oldest) => {
                    prop_assert!(oldest > ask);
                    prop_assert!(all_after(&history, oldest).is_ok());
                }
            }
            prop_assert!(history.ring.lock().bytes <= 40_000);
        }
    }

    #[test]
    fn what_led_to_a_replaced_state_is_not_known() {
        let history = History::new(0);
        history.extend([noted(1, 1), noted(2, 1)], 2);
        assert_eq!(all_after(&history, 0).unwrap(), [1, 2]);
        history.restart(9);
        assert_eq!(history.after(2).unwrap_err(), 9);
        assert_eq!(all_after(&history, 9).unwrap(), [0; 0]);
        history.extend([noted(12, 1)], 12);
        assert_eq!(all_after(&history, 9).unwrap(), [12]);
    }
}
