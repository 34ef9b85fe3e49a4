//! What reads of blocks found lately: rows that are read with every entry and hardly ever written (backends, the volume), and gaps in
//! which there is no row (a new record is looked for before it is written).
//!
//! It speaks for the blocks of one directory: whoever puts another in its place clears it.

use crate::state::kv::RowKey;
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

/// Rows remembered at most.
const ROWS_MAX: usize = 1_024;

/// Longest value remembered.
const VALUE_BYTES_MAX: usize = 4 << 10;

/// Gaps remembered at most.
const GAPS_MAX: usize = 1_024;

#[derive(Debug, Default)]
pub(super) struct Seen {
    rows: HashMap<RowKey, Vec<u8>>,
    /// There is no row between the two.
    gaps: BTreeMap<RowKey, RowKey>,
}

impl Seen {
    /// What is known of a key: its value, or that there is none.
    pub(super) fn get(&self, key: &[u8]) -> Option<Option<&[u8]>> {
        if let Some(value) = self.rows.get(key) {
            return Some(Some(value));
        }
        let below = (Bound::Unbounded, Bound::Excluded(key));
        let (_, end) = self.gaps.range::<[u8], _>(below).next_back()?;
        (key < &**end).then_some(None)
    }

    pub(super) fn row(&mut self, key: &[u8], value: &[u8]) {
        if value.len() > VALUE_BYTES_MAX {
            return;
        }
        if self.rows.len() >= ROWS_MAX {
            self.rows.clear();
        }
        self.rows.insert(RowKey::from_slice(key), value.to_vec());
    }

    pub(super) fn gap(&mut self, from: RowKey, until: RowKey) {
        if self.gaps.len() >= GAPS_MAX {
            self.gaps.clear();
        }
        self.gaps.insert(from, until);
    }

    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.gaps.clear();
    }
}
