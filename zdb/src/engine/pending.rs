//! What was appended and is not visible yet, since its sync is still to come. Whoever decides what comes next must see it; nobody else does.

use super::commit::Planned;
use super::store::Store;
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap};

/// Entries between their append and their publication. Changes only under the lock of the index, so that both together are always the whole.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// The newest such entry of each key, where something may be decided before it is settled.
    keys: HashMap<Bytes, PendingKey>,
    /// How many such entries are in a datafile, and their frames' bytes.
    files: BTreeMap<u32, PendingFile>,
    live_bytes_change: i64,
}

/// What a key will hold.
#[derive(Debug)]
pub(super) struct PendingKey {
    /// `None`: it will be deleted.
    pub(super) value: Option<Bytes>,
    pub(super) version: u64,
}

#[derive(Debug, Default)]
struct PendingFile {
    entries: u64,
    bytes: u64,
}

impl Pending {
    /// Entries were appended, all to the same datafile.
    pub(super) fn add(&mut self, file: u32, run: &[Planned]) {
        let file = self.files.entry(file).or_default();
        for entry in run {
            file.entries += 1;
            file.bytes += entry.frame_bytes();
            self.live_bytes_change += entry.live_bytes_change;
        }
    }

    /// More will be decided before these are settled: it must see what they do to their keys.
    pub(super) fn add_keys(&mut self, entries: &[Planned]) {
        for entry in entries {
            let key = PendingKey {
                value: (!entry.deleted).then(|| entry.value.clone()),
                version: entry.version,
            };
            self.keys.insert(entry.key.clone(), key);
        }
    }

    pub(super) fn remove(&mut self, entry: &Planned) {
        let newest = self.keys.get(&entry.key).map(|key| key.version);
        if newest == Some(entry.version) {
            self.keys.remove(&entry.key);
        }
        if let Some(file) = self.files.get_mut(&entry.place.file) {
            file.entries -= 1;
            file.bytes -= entry.frame_bytes();
            if file.entries == 0 {
                self.files.remove(&entry.place.file);
            }
        }
        self.live_bytes_change -= entry.live_bytes_change;
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&PendingKey> {
        self.keys.get(key)
    }

    /// Bytes of frames in a datafile that the index does not know of.
    pub(super) fn bytes_in(&self, file: u32) -> u64 {
        self.files.get(&file).map_or(0, |file| file.bytes)
    }

    /// What the live bytes will be, from what they are.
    pub(super) fn live_bytes(&self, now: u64) -> u64 {
        now.saturating_add_signed(self.live_bytes_change)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }
}

impl Store {
    /// Wait until everything that was appended is visible, or never will be. Who holds the writer keeps more from being appended.
    pub(super) fn wait_for_pending(&self) {
        let mut settled = self.settled.lock();
        while !self.state.read().pending.is_empty() && self.check_running().is_ok() {
            self.settling.wait(&mut settled);
        }
    }

    /// Let those know that wait for it.
    pub(super) fn tell_settled(&self) {
        // Whoever is about to wait holds this from looking whether it must until it waits.
        drop(self.settled.lock());
        self.settling.notify_all();
    }
}
