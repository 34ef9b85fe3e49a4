//! The key-value store under the replicated state: what `apply` may ask of it, and the in-memory twin.
//!
//! Invariants: ranges come in key order; a batch becomes visible whole or not at all.

use std::collections::BTreeMap;

/// A key and its value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// Changes by key; `None` deletes.
pub type Batch = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// The local store failed; never a refusal.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// The store could not be read or written.
    #[error("state store: {0}")]
    Store(#[from] sled::Error),
    /// The state was replaced by a newer snapshot while it was being copied.
    #[error("the state was replaced while it was being copied")]
    Replaced,
    /// A row does not decode: the state is damaged or was written by a newer version.
    #[error("state row {key} does not decode ({reason}): restore this node from its peers")]
    Row {
        /// Key in hexadecimal.
        key: String,
        /// Why.
        reason: String,
    },
}

/// What `apply` reads.
pub trait Kv {
    /// One value.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError>;

    /// At most `max` pairs of `[from, until)` in key order.
    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError>;
}

impl<T: Kv + ?Sized> Kv for &T {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        (**self).get(key)
    }

    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        (**self).range(from, until, max)
    }
}

/// The in-memory twin, for tests and simulation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryKv {
    rows: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl MemoryKv {
    /// Applies a batch.
    pub fn commit(&mut self, batch: Batch) {
        for (key, value) in batch {
            match value {
                Some(value) => self.rows.insert(key, value),
                None => self.rows.remove(&key),
            };
        }
    }

    /// Everything, in key order.
    pub fn rows(&self) -> &BTreeMap<Vec<u8>, Vec<u8>> {
        &self.rows
    }
}

impl Kv for MemoryKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        Ok(self.rows.get(key).cloned())
    }

    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        if from >= until {
            return Ok(Vec::new());
        }
        let pairs = self.rows.range(from.to_vec()..until.to_vec()).take(max);
        Ok(pairs.map(|(k, v)| (k.clone(), v.clone())).collect())
    }
}

/// The smallest key greater than `key`.
pub fn after(key: &[u8]) -> Vec<u8> {
    let mut next = key.to_vec();
    next.push(0);
    next
}

/// The end of the range of all keys that begin with `prefix`.
pub fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.last_mut() {
        if *last < u8::MAX {
            *last += 1;
            return end;
        }
        end.pop();
    }
    vec![u8::MAX; prefix.len() + 64]
}
