//! The index: which physical entry of a key is the current one, which older ones are kept as its history, and which datafiles hold how
//! much that is needed.
//!
//! Memory for a key: in user mode at most 64 bytes besides the key itself ([`user`]); in sequential mode none, the records are in
//! pages of a file with a bounded cache ([`paged`]); for each version kept as history about 40 bytes and the key.
//!
//! Invariant: for every key, `stale + 1` is the number of its physical entries on disk (values, tombstones and copies); a
//! tombstone is needed exactly while it has stale companions that would come back without it.

mod order;
mod paged;
mod record;
#[cfg(test)]
mod tests;
mod user;

pub(super) use record::{Entry, OFFSET_MAX, Place};

use super::EngineError;
use crate::media::Media;
use bytes::Bytes;
use paged::PagedTable;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use user::UserTable;

/// A physical entry, as written or as found by a scan.
#[derive(Debug, Clone, Copy)]
pub(super) struct Physical {
    pub(super) version: u64,
    /// The version before it, if its head names one.
    pub(super) previous: Option<u64>,
    pub(super) place: Place,
    pub(super) value_bytes: u32,
    pub(super) value_crc: u32,
    pub(super) timestamp: u32,
    pub(super) deleted: bool,
}

impl Physical {
    fn entry(&self) -> Entry {
        Entry {
            version: self.version,
            place: self.place,
            value_bytes: self.value_bytes,
            value_crc: self.value_crc,
            timestamp: self.timestamp,
            deleted: self.deleted,
            linked: self.previous.is_some(),
            stale: 0,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct FileUse {
    /// Bytes of frames in the file.
    pub(super) total_bytes: u64,
    /// Of them, needed.
    pub(super) live_bytes: u64,
}

/// A live key in scan order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) position: u64,
    pub(super) key: Bytes,
    pub(super) entry: Entry,
}

#[derive(Debug)]
enum Table {
    User(Box<UserTable>),
    Sequential(PagedTable),
}

impl Table {
    fn get(&self, key: &[u8]) -> Result<Option<Entry>, EngineError> {
        match self {
            Self::User(table) => Ok(table.get(key)),
            Self::Sequential(table) => table.get(key),
        }
    }

    fn put(&mut self, key: &[u8], entry: &Entry) -> Result<(), EngineError> {
        match self {
            Self::User(table) => {
                table.put(key, entry);
                Ok(())
            }
            Self::Sequential(table) => table.put(key, entry),
        }
    }

    /// The entry of a key; where there is none this one is put.
    fn get_or_put(&mut self, key: &[u8], entry: &Entry) -> Result<Option<Entry>, EngineError> {
        match self {
            Self::User(table) => Ok(table.get_or_put(key, entry)),
            Self::Sequential(table) => {
                let old = table.get(key)?;
                if old.is_none() {
                    table.put(key, entry)?;
                }
                Ok(old)
            }
        }
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), EngineError> {
        match self {
            Self::User(table) => {
                table.remove(key);
                Ok(())
            }
            Self::Sequential(table) => table.remove(key),
        }
    }
}

/// An entry, and the version before it.
type Offered = (Entry, Option<u64>);

#[derive(Debug)]
pub(super) struct Index {
    table: Table,
    /// Older versions kept, the newest first. Only keys that have some.
    older: HashMap<Box<[u8]>, VecDeque<Entry>>,
    /// While loading: entries that may belong to the history of a key, with the version before them.
    offered: HashMap<Box<[u8]>, Vec<Offered>>,
    history_versions: usize,
    files: BTreeMap<u32, FileUse>,
    live_keys: u64,
    live_value_bytes: u64,
    history_bytes: u64,
}

/// Bytes of a frame of an entry.
pub(super) fn entry_bytes_of(head_bytes: usize, value_bytes: u32) -> u64 {
    crate::datafile::frame_bytes(head_bytes as u64 + u64::from(value_bytes))
}

fn entry_bytes(key: &[u8], entry: &Entry) -> u64 {
    let head_bytes = super::entry::head_bytes(key.len(), entry.linked);
    entry_bytes_of(head_bytes, entry.value_bytes)
}

impl Index {
    pub(super) fn new_user(history_versions: u32) -> Self {
        Self::with(Table::User(Box::new(UserTable::new())), history_versions)
    }

    pub(super) fn new_sequential(
        media: &Arc<dyn Media>,
        dir: &Path,
        history_versions: u32,
    ) -> Result<Self, EngineError> {
        let table = PagedTable::create(media, dir)?;
        Ok(Self::with(Table::Sequential(table), history_versions))
    }

    fn with(table: Table, history_versions: u32) -> Self {
        Self {
            table,
            older: HashMap::new(),
            offered: HashMap::new(),
            history_versions: history_versions as usize,
            files: BTreeMap::new(),
            live_keys: 0,
            live_value_bytes: 0,
            history_bytes: 0,
        }
    }

    pub(super) fn is_sequential(&self) -> bool {
        matches!(self.table, Table::Sequential(_))
    }

    /// Can this key be in the namespace at all?
    pub(super) fn accepts(&self, key: &[u8]) -> bool {
        !self.is_sequential() || paged::id_of(key).is_some()
    }

    /// The live entry of a key.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Entry>, EngineError> {
        Ok(self.table.get(key)?.filter(|entry| !entry.deleted))
    }

    /// An older version of a key that is kept, and the version before it.
    pub(super) fn older(&self, key: &[u8], version: u64) -> Option<(Entry, Option<u64>)> {
        let kept = self.older.get(key)?;
        let at = kept.iter().position(|entry| entry.version == version)?;
        Some((kept[at], kept.get(at + 1).map(|entry| entry.version)))
    }

    /// The newest of the older versions of a key that are kept.
    pub(super) fn newest_older(&self, key: &[u8]) -> Option<u64> {
        Some(self.older.get(key)?.front()?.version)
    }

    /// Is the entry that stands at this place needed?
    pub(super) fn is_needed(&self, key: &[u8], place: Place) -> Result<bool, EngineError> {
        let Some(entry) = self.table.get(key)? else {
            return Ok(false);
        };
        let kept = || {
            let mut older = self.older.get(key).into_iter().flatten();
            older.any(|entry| entry.place == place)
        };
        Ok((entry.place == place && entry.is_needed()) || kept())
    }

    fn count_needed(&mut self, key: &[u8], entry: &Entry) {
        let file = self.files.entry(entry.place.file).or_default();
        file.live_bytes += entry_bytes(key, entry);
    }

    fn uncount_needed(&mut self, key: &[u8], entry: &Entry) {
        if let Some(file) = self.files.get_mut(&entry.place.file) {
            file.live_bytes = file.live_bytes.saturating_sub(entry_bytes(key, entry));
        }
    }

    fn count(&mut self, key: &[u8], entry: &Entry) {
        if entry.is_needed() {
            self.count_needed(key, entry);
        }
        if !entry.deleted {
            self.live_keys += 1;
            self.live_value_bytes += u64::from(entry.value_bytes);
        }
    }

    fn uncount(&mut self, key: &[u8], entry: &Entry) {
        if entry.is_needed() {
            self.uncount_needed(key, entry);
        }
        if !entry.deleted {
            self.live_keys -= 1;
            self.live_value_bytes -= u64::from(entry.value_bytes);
        }
    }

    fn replace(&mut self, key: &[u8], old: &Entry, new: &Entry) -> Result<(), EngineError> {
        self.table.put(key, new)?;
        self.uncount(key, old);
        self.count(key, new);
        Ok(())
    }

    /// So many keys are about to be added.
    pub(super) fn reserve(&mut self, keys: u64) {
        if let Table::User(table) = &mut self.table {
            table.reserve(usize::try_from(keys).unwrap_or(0));
        }
    }

    /// Loading is over: give back room that was not needed.
    pub(super) fn shrink(&mut self) {
        if let Table::User(table) = &mut self.table {
            table.shrink();
        }
    }

    /// A frame of this many bytes is in a file, needed or not.
    pub(super) fn add_bytes(&mut self, file: u32, bytes: u64) {
        self.files.entry(file).or_default().total_bytes += bytes;
    }

    /// A physical entry exists now. `loading`: entries come in any order, and older versions are offered later.
    pub(super) fn add(
        &mut self,
        key: &[u8],
        physical: &Physical,
        loading: bool,
    ) -> Result<(), EngineError> {
        let new = physical.entry();
        self.add_bytes(new.place.file, entry_bytes(key, &new));
        let Some(old) = self.table.get_or_put(key, &new)? else {
            self.count(key, &new);
            return Ok(());
        };
        // Copies of one version: either will do; the newer file is the compacted one.
        let newer = (new.version, new.place) > (old.version, old.place);
        let stale = old.stale.saturating_add(1);
        let current = if newer { new } else { old };
        self.replace(key, &old, &Entry { stale, ..current })?;
        if !loading && newer && self.history_versions > 0 {
            self.keep_older(key, &new, old);
        }
        Ok(())
    }

    /// The current entry has just been replaced by a newer one.
    fn keep_older(&mut self, key: &[u8], new: &Entry, old: Entry) {
        if !new.linked || old.deleted {
            self.drop_older(key, 0);
            return;
        }
        self.count_needed(key, &old);
        self.history_bytes += u64::from(old.value_bytes);
        self.older.entry(key.into()).or_default().push_front(old);
        self.drop_older(key, self.history_versions);
    }

    /// Keep at most this many older versions of a key.
    fn drop_older(&mut self, key: &[u8], keep: usize) {
        let Some(kept) = self.older.get_mut(key) else {
            return;
        };
        let dropped = kept.split_off(keep.min(kept.len()));
        if kept.is_empty() {
            self.older.remove(key);
        }
        for entry in dropped {
            self.history_bytes -= u64::from(entry.value_bytes);
            self.uncount_needed(key, &entry);
        }
    }

    /// Change how many older versions are kept. More than before are kept from now on.
    pub(super) fn set_history(&mut self, versions: u32) {
        self.history_versions = versions as usize;
        let keys: Vec<Box<[u8]>> = self.older.keys().cloned().collect();
        for key in keys {
            self.drop_older(&key, self.history_versions);
        }
    }

    /// Second pass of loading, after every entry was added: is this one part of the history of its key?
    pub(super) fn offer(&mut self, key: &[u8], physical: &Physical) -> Result<(), EngineError> {
        let Some(current) = self.table.get(key)? else {
            return Ok(());
        };
        if current.linked && !current.deleted && !physical.deleted {
            let offered = (physical.entry(), physical.previous);
            self.offered.entry(key.into()).or_default().push(offered);
        }
        Ok(())
    }

    /// The end of loading: follow the chains through what was offered.
    pub(super) fn settle(&mut self) -> Result<(), EngineError> {
        for (key, mut offered) in std::mem::take(&mut self.offered) {
            let Some(current) = self.table.get(&key)? else {
                continue;
            };
            // Of copies, the one in the newer file.
            offered.sort_by_key(|(entry, _)| std::cmp::Reverse((entry.version, entry.place)));
            let find = |version: u64| offered.iter().find(|(entry, _)| entry.version == version);
            let mut chain = VecDeque::new();
            let mut next = find(current.version).and_then(|(_, previous)| *previous);
            while let Some((entry, previous)) = next.and_then(find) {
                if chain.len() >= self.history_versions {
                    break;
                }
                chain.push_back(*entry);
                next = previous.filter(|previous| *previous < entry.version);
            }
            for entry in &chain {
                self.count_needed(&key, entry);
                self.history_bytes += u64::from(entry.value_bytes);
            }
            if !chain.is_empty() {
                self.older.insert(key, chain);
            }
        }
        Ok(())
    }

    /// Compaction wrote a copy of what stands (or stood) at `from`. `bytes`: of its frame.
    pub(super) fn add_copy(
        &mut self,
        key: &[u8],
        from: Place,
        to: Place,
        bytes: u64,
    ) -> Result<(), EngineError> {
        self.add_bytes(to.file, bytes);
        let Some(old) = self.table.get(key)? else {
            return Ok(());
        };
        let mut entry = old;
        entry.stale = entry.stale.saturating_add(1);
        if entry.place == from {
            entry.place = to;
        }
        self.replace(key, &old, &entry)?;
        let mut older = self.older.get_mut(key).into_iter().flatten();
        if let Some(kept) = older.find(|kept| kept.place == from) {
            let moved = Entry { place: to, ..*kept };
            let was = std::mem::replace(kept, moved);
            self.uncount_needed(key, &was);
            self.count_needed(key, &moved);
        }
        Ok(())
    }

    /// The physical entry at a place is gone for good.
    pub(super) fn forget(&mut self, key: &[u8], place: Place) -> Result<(), EngineError> {
        let Some(old) = self.table.get(key)? else {
            return Ok(());
        };
        if old.place == place {
            // Only an unneeded tombstone may go while it is current.
            debug_assert!(!old.is_needed(), "a needed entry was removed");
            self.table.remove(key)?;
            self.uncount(key, &old);
            return Ok(());
        }
        let mut entry = old;
        entry.stale = entry.stale.saturating_sub(1);
        self.replace(key, &old, &entry)
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

    pub(super) fn history_bytes(&self) -> u64 {
        self.history_bytes
    }

    /// Live keys behind (`up`) or before a position in scan order.
    pub(super) fn walk(
        &self,
        position: Option<u64>,
        up: bool,
        keys_max: usize,
    ) -> Result<Vec<Listed>, EngineError> {
        let listed = |(position, key, entry): (u64, &[u8], Entry)| Listed {
            position,
            key: Bytes::copy_from_slice(key),
            entry,
        };
        match &self.table {
            Table::User(table) if up => {
                Ok(table.after(position).take(keys_max).map(listed).collect())
            }
            Table::User(table) => Ok(table.before(position).take(keys_max).map(listed).collect()),
            Table::Sequential(table) => {
                let from = match (position, up) {
                    (None, true) => Some(0),
                    (None, false) => Some(u64::MAX),
                    (Some(position), true) => position.checked_add(1),
                    (Some(position), false) => position.checked_sub(1),
                };
                let found = table.walk(from, up, keys_max)?;
                let found = found.iter();
                Ok(found
                    .map(|(id, entry)| listed((*id, &id.to_le_bytes(), *entry)))
                    .collect())
            }
        }
    }

    /// Where a live key stands in scan order.
    pub(super) fn position(&self, key: &[u8], entry: &Entry) -> u64 {
        match &self.table {
            Table::Sequential(_) => paged::id_of(key).unwrap_or(u64::MAX),
            Table::User(_) => entry.version,
        }
    }
}
