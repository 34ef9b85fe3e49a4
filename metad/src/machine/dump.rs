//! A consistent copy of the state, taken page by page while applies go on.
//!
//! sled has no snapshot reads. Whatever apply is about to change in the part not copied yet is saved first (its pre-image), and
//! the copy takes the pre-image instead. An apply waits for one page at most.

use super::sled_kv::SledKv;
use crate::state::kv::{Batch, Kv, KvError, Pair, after};
use std::collections::BTreeMap;

/// Rows copied under the lock at once.
pub const PAGE_ROWS: usize = 2_048;

/// A copy under way.
#[derive(Debug, Default)]
pub struct Dump {
    /// Keys below are copied.
    cursor: Vec<u8>,
    /// What changed keys at or above the cursor held when the dump began.
    before: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    done: bool,
}

impl Dump {
    /// Saves what a batch is about to change. Called under the write lock.
    pub fn before_commit(&mut self, kv: &SledKv, batch: &Batch) -> Result<(), KvError> {
        if self.done {
            return Ok(());
        }
        for key in batch.range(self.cursor.clone()..).map(|(key, _)| key) {
            if !self.before.contains_key(key) {
                self.before.insert(key.clone(), kv.get(key)?);
            }
        }
        Ok(())
    }

    /// The next page in key order, empty at the end. Called under the read lock.
    pub fn page(&mut self, kv: &SledKv) -> Result<Vec<Pair>, KvError> {
        loop {
            if self.done {
                return Ok(Vec::new());
            }
            let end = vec![u8::MAX; 16];
            let page = kv.range(&self.cursor, &end, PAGE_ROWS)?;
            let next = match page.last() {
                Some((last, _)) if page.len() == PAGE_ROWS => after(last),
                _ => {
                    self.done = true;
                    end
                }
            };
            let mut rows: Batch = page.into_iter().map(|(k, v)| (k, Some(v))).collect();
            let rest = self.before.split_off(&next);
            rows.append(&mut std::mem::replace(&mut self.before, rest));
            self.cursor = next;
            let rows: Vec<_> = rows
                .into_iter()
                .filter_map(|(key, value)| value.map(|value| (key, value)))
                .collect();
            if !rows.is_empty() {
                return Ok(rows);
            }
        }
    }
}
