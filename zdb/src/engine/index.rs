//! The index: which physical entry of a key is the current one, and which datafiles hold how much that is needed.
//!
//! Pure. Invariant: for every key, `stale + 1` is the number of its physical entries on disk (values, tombstones and copies); a
//! tombstone is needed exactly while it has stale companions that would come back without it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

pub(super) type Key = Arc<[u8]>;

/// Where a physical entry stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) file: u32,
    pub(super) offset: u64,
}

/// The current physical entry of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) version: u64,
    pub(super) place: Place,
    pub(super) value_bytes: u32,
    pub(super) value_crc: u32,
    pub(super) timestamp: u32,
    pub(super) deleted: bool,
    stale: u32,
}

/// A physical entry, as written or as found by a scan.
#[derive(Debug, Clone, Copy)]
pub(super) struct Physical {
    pub(super) version: u64,
    pub(super) place: Place,
    pub(super) frame_bytes: u64,
    pub(super) value_bytes: u32,
    pub(super) value_crc: u32,
    pub(super) timestamp: u32,
    pub(super) deleted: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct FileUse {
    /// Bytes of frames in the file.
    pub(super) total_bytes: u64,
    /// Of them, needed.
    pub(super) live_bytes: u64,
}

#[derive(Debug, Default)]
pub(super) struct Index {
    entries: HashMap<Key, Entry>,
    /// Scan order: last-written in user mode, id in sequential mode.
    order: BTreeMap<u64, Key>,
    files: BTreeMap<u32, FileUse>,
    live_keys: u64,
    live_value_bytes: u64,
    sequential: bool,
}

fn frame_bytes(key: &[u8], entry: &Entry) -> u64 {
    let payload = super::entry::head_bytes(key) as u64 + u64::from(entry.value_bytes);
    crate::datafile::frame_bytes(payload)
}

impl Index {
    pub(super) fn new(sequential: bool) -> Self {
        Self {
            sequential,
            ..Self::default()
        }
    }

    /// Only for an empty index.
    pub(super) fn set_sequential(&mut self, sequential: bool) {
        self.sequential = sequential;
    }

    pub(super) fn is_sequential(&self) -> bool {
        self.sequential
    }

    /// The live entry of a key.
    pub(super) fn get(&self, key: &[u8]) -> Option<(&Key, &Entry)> {
        self.entries
            .get_key_value(key)
            .filter(|(_, entry)| !entry.deleted)
    }

    /// Is the entry that stands at this place needed?
    pub(super) fn is_needed(&self, key: &[u8], place: Place) -> bool {
        self.entries
            .get(key)
            .is_some_and(|entry| entry.place == place && needed(entry))
    }

    /// The index's own copy of a key.
    pub(super) fn shared_key(&self, key: &[u8]) -> Option<Key> {
        self.entries.get_key_value(key).map(|(key, _)| key.clone())
    }

    fn order_of(&self, key: &[u8], entry: &Entry) -> u64 {
        match <[u8; 8]>::try_from(key) {
            Ok(id) if self.sequential => u64::from_le_bytes(id),
            _ => entry.version,
        }
    }

    /// Take a key's entry out of all sums.
    fn withdraw(&mut self, key: &[u8]) -> Option<(Key, Entry)> {
        let (key, entry) = self.entries.remove_entry(key)?;
        if needed(&entry)
            && let Some(file) = self.files.get_mut(&entry.place.file)
        {
            file.live_bytes -= frame_bytes(&key, &entry);
        }
        if !entry.deleted {
            self.live_keys -= 1;
            self.live_value_bytes -= u64::from(entry.value_bytes);
            let order = self.order_of(&key, &entry);
            self.order.remove(&order);
        }
        Some((key, entry))
    }

    fn deposit(&mut self, key: Key, entry: Entry) {
        if needed(&entry) {
            self.files.entry(entry.place.file).or_default().live_bytes += frame_bytes(&key, &entry);
        }
        if !entry.deleted {
            self.live_keys += 1;
            self.live_value_bytes += u64::from(entry.value_bytes);
            self.order.insert(self.order_of(&key, &entry), key.clone());
        }
        self.entries.insert(key, entry);
    }

    /// A physical entry exists now.
    pub(super) fn add(&mut self, key: &[u8], physical: &Physical) {
        let file = self.files.entry(physical.place.file).or_default();
        file.total_bytes += physical.frame_bytes;
        let new = Entry {
            version: physical.version,
            place: physical.place,
            value_bytes: physical.value_bytes,
            value_crc: physical.value_crc,
            timestamp: physical.timestamp,
            deleted: physical.deleted,
            stale: 0,
        };
        let Some((key, old)) = self.withdraw(key) else {
            self.deposit(key.into(), new);
            return;
        };
        // Copies of one version: either will do; the newer file is the compacted one.
        let newer = (new.version, new.place) > (old.version, old.place);
        let stale = old.stale + 1;
        let current = if newer { new } else { old };
        self.deposit(key, Entry { stale, ..current });
    }

    /// Compaction wrote a copy of what stands (or stood) at `from`.
    pub(super) fn add_copy(&mut self, key: &[u8], from: Place, to: Place, bytes: u64) {
        self.files.entry(to.file).or_default().total_bytes += bytes;
        if let Some((key, mut entry)) = self.withdraw(key) {
            if entry.place == from {
                entry.place = to;
            }
            entry.stale += 1;
            self.deposit(key, entry);
        }
    }

    /// The physical entry at a place is gone for good.
    pub(super) fn forget(&mut self, key: &[u8], place: Place) {
        if let Some((key, mut entry)) = self.withdraw(key) {
            if entry.place == place {
                // Only an unneeded tombstone may go while it is current.
                debug_assert!(
                    entry.deleted && entry.stale == 0,
                    "a needed entry was removed"
                );
                return;
            }
            entry.stale = entry.stale.saturating_sub(1);
            self.deposit(key, entry);
        }
    }

    pub(super) fn forget_file(&mut self, file: u32) {
        self.files.remove(&file);
    }

    pub(super) fn file_use(&self, file: u32) -> FileUse {
        self.files.get(&file).copied().unwrap_or_default()
    }

    pub(super) fn files(&self) -> impl Iterator<Item = (u32, FileUse)> + '_ {
        self.files.iter().map(|(file, usage)| (*file, *usage))
    }

    pub(super) fn live_keys(&self) -> u64 {
        self.live_keys
    }

    pub(super) fn live_value_bytes(&self) -> u64 {
        self.live_value_bytes
    }

    /// Live keys behind a position in scan order.
    pub(super) fn after(
        &self,
        position: Option<u64>,
    ) -> impl Iterator<Item = (u64, &Key, &Entry)> + '_ {
        let from = match position {
            Some(position) => std::ops::Bound::Excluded(position),
            None => std::ops::Bound::Unbounded,
        };
        self.order
            .range((from, std::ops::Bound::Unbounded))
            .filter_map(|(order, key)| Some((*order, key, self.entries.get(key)?)))
    }

    /// Live keys before a position, backwards.
    pub(super) fn before(
        &self,
        position: Option<u64>,
    ) -> impl Iterator<Item = (u64, &Key, &Entry)> + '_ {
        let to = match position {
            Some(position) => std::ops::Bound::Excluded(position),
            None => std::ops::Bound::Unbounded,
        };
        self.order
            .range((std::ops::Bound::Unbounded, to))
            .rev()
            .filter_map(|(order, key)| Some((*order, key, self.entries.get(key)?)))
    }

    /// Where a live key stands in scan order.
    pub(super) fn position(&self, key: &[u8]) -> Option<u64> {
        self.get(key).map(|(key, entry)| self.order_of(key, entry))
    }
}

fn needed(entry: &Entry) -> bool {
    !entry.deleted || entry.stale > 0
}
