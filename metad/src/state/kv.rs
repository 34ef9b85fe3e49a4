//! The key-value store under the replicated state: what `apply` may ask of it, and the in-memory twin.
//!
//! Invariants: ranges come in key order; a batch becomes visible whole or not at all.

use nix::errno::Errno;
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::ops::Bound;

/// The key of a row. Nearly all fit in without memory of their own, so that a search in a map compares what it has at hand.
pub type RowKey = SmallVec<[u8; 40]>;

/// A key and its value.
pub type Pair = (RowKey, Vec<u8>);

/// A key and its new value; `None`: deleted.
pub type Changed = (RowKey, Option<Vec<u8>>);

/// Changes by key; `None` deletes.
pub type Batch = BTreeMap<RowKey, Option<Vec<u8>>>;

/// The local store failed; never a refusal.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// The store could not be read or written.
    #[error("state store: {0}")]
    Store(#[from] sled::Error),
    /// The state was replaced by a newer snapshot while it was being copied.
    #[error("the state was replaced while it was being copied")]
    Replaced,
    /// The store's own pages contradict each other or do not verify.
    #[error("the state store is damaged: {0}")]
    Damaged(String),
    /// The store was written by a version before this one; it is brought up to date when the node is started.
    #[error("the state store is of format 1: it is brought up to date when this node is started")]
    OldFormat,
    /// The store was written by a newer version.
    #[error(
        "the state store is of format {found}, and this version of metad knows formats up to {known}: run the newer version on this node, or \
         make the node anew from its peers"
    )]
    NewerFormat {
        /// As written there.
        found: u32,
        /// The newest one that is known here.
        known: u32,
    },
    /// A row does not decode: the state is damaged or was written by a newer version.
    #[error("state row {key} does not decode ({reason}): restore this node from its peers")]
    Row {
        /// Key in hexadecimal.
        key: String,
        /// Why.
        reason: String,
    },
}

impl KvError {
    /// What it means where rows are read: what the disk fails to give back is gone, as if it had rotted.
    #[must_use]
    pub fn of_read(self) -> Self {
        match self {
            Self::Store(sled::Error::Io(error))
                if error.raw_os_error() == Some(Errno::EIO as i32) =>
            {
                Self::Damaged(format!(
                    "the disk does not give back what was written: {error}"
                ))
            }
            other => other,
        }
    }

    /// What was written is not there as it was written.
    pub fn is_rot(&self) -> bool {
        matches!(
            self,
            Self::Damaged(_) | Self::Store(sled::Error::Corruption { .. })
        )
    }
}

/// What `apply` reads.
pub trait Kv {
    /// Shows the value of a key, if there is one; says whether there is.
    fn look(&self, key: &[u8], see: &mut dyn FnMut(&[u8])) -> Result<bool, KvError>;

    /// One value.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        let mut found = None;
        self.look(key, &mut |value| found = Some(value.to_vec()))?;
        Ok(found)
    }

    /// At most `max` pairs of `[from, until)` in key order.
    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError>;
}

impl<T: Kv + ?Sized> Kv for &T {
    fn look(&self, key: &[u8], see: &mut dyn FnMut(&[u8])) -> Result<bool, KvError> {
        (**self).look(key, see)
    }

    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        (**self).range(from, until, max)
    }
}

/// The in-memory twin, for tests and simulation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryKv {
    rows: BTreeMap<RowKey, Vec<u8>>,
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
    pub fn rows(&self) -> &BTreeMap<RowKey, Vec<u8>> {
        &self.rows
    }
}

impl Kv for MemoryKv {
    fn look(&self, key: &[u8], see: &mut dyn FnMut(&[u8])) -> Result<bool, KvError> {
        Ok(self.rows.get(key).map(|value| see(value)).is_some())
    }

    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        if from >= until {
            return Ok(Vec::new());
        }
        let pairs = self
            .rows
            .range::<[u8], _>((Bound::Included(from), Bound::Excluded(until)));
        let pairs = pairs.take(max);
        Ok(pairs.map(|(k, v)| (k.clone(), v.clone())).collect())
    }
}

/// `[from, until)` of sorted sequences seen as one, at most `max` pairs: `layers`, oldest first, over `stored`, which hands out its
/// pairs of that range one by one. Where several have a key, the newest is right.
pub fn overlaid(
    layers: &[&Batch],
    mut stored: impl FnMut() -> Result<Option<Pair>, KvError>,
    (from, until): (&[u8], &[u8]),
    max: usize,
) -> Result<Vec<Pair>, KvError> {
    let mut found = Vec::new();
    if from >= until {
        return Ok(found);
    }
    let bounds = (Bound::Included(from), Bound::Excluded(until));
    let mut over: Vec<_> = layers
        .iter()
        .map(|layer| layer.range::<[u8], _>(bounds).peekable())
        .collect();
    let mut below = None;
    let mut ended = false;
    while found.len() < max {
        if below.is_none() && !ended {
            below = stored()?;
            ended = below.is_none();
        }
        let heads = over.iter_mut().filter_map(|o| Some(o.peek()?.0));
        let least = heads.min();
        let (key, mut value) = match (least, below.take()) {
            (None, None) => break,
            (None, Some((key, value))) => (key, Some(value)),
            (Some(key), None) => (key.clone(), None),
            (Some(least), Some((key, value))) if key <= *least => (key, Some(value)),
            (Some(least), pair) => {
                below = pair;
                (least.clone(), None)
            }
        };
        for layer in &mut over {
            if let Some((_, newer)) = layer.next_if(|(k, _)| **k == key) {
                value.clone_from(newer);
            }
        }
        found.extend(value.map(|value| (key, value)));
    }
    Ok(found)
}

/// The smallest key greater than `key`.
pub fn after(key: &[u8]) -> RowKey {
    let mut next = RowKey::from_slice(key);
    next.push(0);
    next
}

/// The end of the range of all keys that begin with `prefix`.
pub fn prefix_end(prefix: &[u8]) -> RowKey {
    let mut end = RowKey::from_slice(prefix);
    while let Some(last) = end.last_mut() {
        if *last < u8::MAX {
            *last += 1;
            return end;
        }
        end.pop();
    }
    RowKey::from_elem(u8::MAX, prefix.len() + 64)
}
