//! Group commit: decide a batch of operations in order, append what they write, sync once for all that wait, publish, answer.
//!
//! The next batch may be decided and appended while the one before is being synced ([`super::pipeline`]). It sees what that one did
//! ([`super::pending`]), so it stands and falls with it: after a failed sync nothing that was appended behind it is acknowledged.

use super::entry::{EntryHead, head_bytes};
use super::index::{Physical, Place};
use super::settings::NamespaceSettings;
use super::store::{Store, Writer};
use super::{EngineError, Mode, SyncPolicy};
use crate::datafile::{SyncHandle, frame_bytes};
use bytes::Bytes;
use std::collections::HashMap;

/// What is asked.
#[derive(Debug, Clone)]
pub(super) enum Action {
    Set {
        value: Bytes,
        /// CRC-32 of the value: who submits it computes it, so that the commit thread need not.
        crc: u32,
        timestamp: Option<u32>,
    },
    Delete {
        timestamp: Option<u32>,
    },
}

#[derive(Debug, Clone)]
pub(super) struct Operation {
    /// Empty for a new key of a sequential namespace.
    pub(super) key: Bytes,
    pub(super) action: Action,
}

impl Operation {
    pub(super) fn bytes(&self) -> usize {
        self.key.len()
            + match &self.action {
                Action::Set { value, .. } => value.len(),
                Action::Delete { .. } => 0,
            }
    }
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Done {
    Stored(Bytes),
    Unchanged,
    Deleted,
}

impl Done {
    /// The key of what was stored.
    pub(super) fn key(self) -> Option<Bytes> {
        match self {
            Self::Stored(key) => Some(key),
            Self::Unchanged | Self::Deleted => None,
        }
    }
}

/// An entry to append for one operation.
pub(super) struct Planned {
    pub(super) operation: usize,
    pub(super) key: Bytes,
    pub(super) kind: u8,
    pub(super) head: Vec<u8>,
    pub(super) value: Bytes,
    pub(super) value_crc: u32,
    pub(super) version: u64,
    previous: Option<u64>,
    timestamp: u32,
    pub(super) deleted: bool,
    pub(super) live_bytes_change: i64,
    pub(super) place: Place,
}

impl Planned {
    fn payload_bytes(&self) -> u64 {
        (self.head.len() + self.value.len()) as u64
    }

    pub(super) fn frame_bytes(&self) -> u64 {
        frame_bytes(self.payload_bytes())
    }

    fn physical(&self) -> Physical {
        Physical {
            version: self.version,
            previous: self.previous,
            place: self.place,
            value_bytes: u32::try_from(self.value.len()).unwrap_or(u32::MAX),
            value_crc: self.value_crc,
            timestamp: self.timestamp,
            deleted: self.deleted,
        }
    }
}

/// What an earlier operation of the batch will have done to a key.
struct Overlaid {
    value: Option<Bytes>,
    version: u64,
    /// Which operation.
    operation: usize,
}

/// A SET to decide.
#[derive(Clone, Copy)]
struct Set<'a> {
    key: &'a Bytes,
    value: &'a Bytes,
    crc: u32,
    timestamp: Option<u32>,
}

/// An entry to plan.
struct Write<'a> {
    key: &'a Bytes,
    /// `None`: a deletion.
    set: Option<Set<'a>>,
    timestamp: Option<u32>,
    /// The version before it, if that is kept.
    previous: Option<u64>,
    /// Live bytes of the key before it.
    old_bytes: u64,
}

/// What a key holds when an operation is decided.
#[derive(Clone, Copy)]
struct Live {
    bytes: u64,
    version: u64,
    /// Of the value, if it is in a datafile.
    crc: Option<u32>,
}

/// The state that decisions of one batch see.
struct Batch<'a> {
    store: &'a Store,
    settings: &'a NamespaceSettings,
    now: u32,
    overlay: HashMap<Bytes, Overlaid>,
    live_bytes: u64,
    disk_room: u64,
    planned: Vec<Planned>,
    /// Operations that are answered "unchanged" because of an earlier one of the batch: they stand and fall with it.
    repeated: Vec<Repeated>,
}

#[derive(Clone, Copy)]
struct Repeated {
    operation: usize,
    of: usize,
}

pub(super) type Outcome = Result<Done, EngineError>;

/// A batch that was decided and appended, and what will be answered if that becomes durable.
pub(super) struct Staged {
    outcomes: Vec<Outcome>,
    /// What was appended.
    entries: Vec<Planned>,
    /// Makes it durable; datafiles that were completed meanwhile are already. `None`: nothing to wait for.
    sync: Option<SyncHandle>,
}

impl Staged {
    fn refused(operations: usize, error: &EngineError) -> Self {
        Self {
            outcomes: (0..operations).map(|_| Err(error.clone())).collect(),
            entries: Vec::new(),
            sync: None,
        }
    }

    /// Bytes appended.
    pub(super) fn bytes(&self) -> usize {
        let bytes: u64 = self.entries.iter().map(Planned::frame_bytes).sum();
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    /// Is there a sync to wait for?
    pub(super) fn needs_sync(&self) -> bool {
        self.sync.is_some()
    }

    /// The answers, once [`Store::settle`] was there.
    pub(super) fn into_outcomes(self) -> Vec<Outcome> {
        self.outcomes
    }
}

impl Store {
    /// Decide a batch and append what it writes. Nothing of it may be answered before [`Store::settle`].
    pub(super) fn stage(
        &self,
        operations: &[Operation],
        settings: &NamespaceSettings,
        now: u32,
    ) -> Staged {
        let ready = self.check_running();
        let ready = ready.and_then(|()| self.check_alive_lately());
        if let Err(error) = ready {
            return Staged::refused(operations.len(), &error);
        }
        let mut writer = self.writer.lock();
        let live_bytes = {
            let state = self.state.read();
            state.pending.live_bytes(state.index.live_value_bytes())
        };
        let mut batch = Batch {
            store: self,
            settings,
            now,
            overlay: HashMap::new(),
            live_bytes,
            disk_room: self.room(&mut writer),
            planned: Vec::new(),
            repeated: Vec::new(),
        };
        let mut outcomes: Vec<Outcome> = operations
            .iter()
            .enumerate()
            .map(|(number, operation)| batch.decide(&mut writer, number, operation))
            .collect();
        let Batch {
            planned: mut entries,
            repeated,
            ..
        } = batch;
        writer
            .room
            .take(entries.iter().map(Planned::frame_bytes).sum());
        self.append_planned(&mut writer, &mut entries, &mut outcomes);
        entries.retain(|entry| outcomes[entry.operation].is_ok());
        for Repeated { operation, of } in repeated {
            if let Err(error) = &outcomes[of] {
                outcomes[operation] = Err(error.clone());
            }
        }
        let syncs = !entries.is_empty() && self.sync == SyncPolicy::Always;
        Staged {
            outcomes,
            sync: syncs.then(|| writer.active.sync_handle()),
            entries,
        }
    }

    /// More will be staged before this batch is settled.
    pub(super) fn stage_behind(&self, staged: &Staged) {
        self.state.write().pending.add_keys(&staged.entries);
    }

    /// Make batches durable ([`SyncPolicy::Always`]), all with one sync, and visible; in the order in which they were staged, and
    /// all that were staged before must be settled. What is answered `Ok` then is so.
    pub(super) fn settle<'a>(&self, batches: impl Iterator<Item = &'a mut Staged>) {
        let mut batches: Vec<&mut Staged> = batches.collect();
        let newest = batches.iter().rev().find_map(|batch| batch.sync.as_ref());
        let mut stored = self.check_running();
        if let (Ok(()), Some(handle)) = (&stored, newest) {
            stored = handle.sync().map(drop).map_err(EngineError::from);
        }
        for batch in &mut batches {
            stored = stored.and_then(|()| self.publish(&batch.entries));
            if let Err(error) = &stored {
                let stopped = self.stop_for(error);
                // What of it is there after a restart is unknown, and so is everything that was decided by it.
                batch.outcomes.fill(Err(stopped));
            }
        }
        self.tell_settled();
    }

    fn stop_for(&self, error: &EngineError) -> EngineError {
        if matches!(error, EngineError::Stopped { .. }) {
            return error.clone();
        }
        self.stop(error.to_string());
        EngineError::Stopped {
            reason: error.to_string(),
        }
    }

    /// Let everybody see what was written.
    fn publish(&self, entries: &[Planned]) -> Result<(), EngineError> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut state = self.state.write();
        for entry in entries {
            state.index.add(&entry.key, &entry.physical(), false)?;
            state.dirty.insert(entry.place.file);
            state.pending.remove(entry);
        }
        Ok(())
    }
}

impl Batch<'_> {
    fn decide(&mut self, writer: &mut Writer, number: usize, operation: &Operation) -> Outcome {
        if self.settings.frozen {
            return Err(EngineError::Frozen);
        }
        if self.settings.locked {
            return Err(EngineError::Locked);
        }
        match &operation.action {
            Action::Set {
                value,
                crc,
                timestamp,
            } => {
                let set = Set {
                    key: &operation.key,
                    value,
                    crc: *crc,
                    timestamp: *timestamp,
                };
                self.decide_set(writer, number, set)
            }
            Action::Delete { timestamp } => {
                self.decide_delete(writer, number, &operation.key, *timestamp)
            }
        }
    }

    fn decide_set(&mut self, writer: &mut Writer, number: usize, set: Set<'_>) -> Outcome {
        let Set { key, value, .. } = set;
        let sequential = self.settings.mode == Mode::Sequential;
        let old = self.live(key)?;
        if sequential && !key.is_empty() && old.is_none() {
            return Err(EngineError::UpdateOnly);
        }
        if self.settings.worm && old.is_some() {
            return Err(EngineError::Worm);
        }
        if let Some(old) = old
            && self.is_unchanged(&set, old)
        {
            // One that repeats what an earlier batch does is settled behind it.
            let of = self.overlay.get(key).map(|pending| pending.operation);
            self.repeated.extend(of.map(|of| Repeated {
                operation: number,
                of,
            }));
            return Ok(Done::Unchanged);
        }
        let key = if sequential && key.is_empty() {
            Bytes::copy_from_slice(&writer.counters.next_id.to_le_bytes())
        } else {
            key.clone()
        };
        let linked = old.filter(|_| self.settings.history_versions > 0);
        let after = self.live_bytes - old.map_or(0, |old| old.bytes) + value.len() as u64;
        let quota = self.settings.maxsize_bytes;
        let head = head_bytes(key.len(), linked.is_some());
        let disk = frame_bytes((head + value.len()) as u64);
        let possible = self.store.state.read().index.accepts(&key);
        if (quota > 0 && after > quota) || disk > self.disk_room || !possible {
            return Err(EngineError::NoSpace);
        }
        self.live_bytes = after;
        self.disk_room -= disk;
        writer.counters.next_id += 1;
        let write = Write {
            key: &key,
            set: Some(set),
            timestamp: set.timestamp,
            previous: linked.map(|old| old.version),
            old_bytes: old.map_or(0, |old| old.bytes),
        };
        self.plan(writer, number, write);
        Ok(Done::Stored(key))
    }

    fn decide_delete(
        &mut self,
        writer: &mut Writer,
        number: usize,
        key: &Bytes,
        timestamp: Option<u32>,
    ) -> Outcome {
        if self.settings.worm {
            return Err(EngineError::Worm);
        }
        let Some(old) = self.live(key)? else {
            return Err(EngineError::KeyNotFound);
        };
        self.live_bytes -= old.bytes;
        let write = Write {
            key,
            set: None,
            timestamp,
            previous: None,
            old_bytes: old.bytes,
        };
        self.plan(writer, number, write);
        Ok(Done::Deleted)
    }

    fn plan(&mut self, writer: &mut Writer, operation: usize, write: Write<'_>) {
        let version = writer.counters.next_version;
        writer.counters.next_version += 1;
        let key = write.key;
        let value = write.set.map(|set| set.value.clone());
        let timestamp = write.timestamp.unwrap_or(self.now);
        let head = EntryHead {
            version,
            previous: write.previous,
            timestamp,
            deleted: value.is_none(),
            key,
        };
        let new_bytes = value.as_ref().map_or(0, Bytes::len);
        self.planned.push(Planned {
            operation,
            key: key.clone(),
            kind: head.kind(),
            head: head.encode(),
            deleted: value.is_none(),
            value: value.clone().unwrap_or_default(),
            // Of nothing it is 0.
            value_crc: write.set.map_or(0, |set| set.crc),
            version,
            previous: write.previous,
            timestamp,
            live_bytes_change: i64::try_from(new_bytes).unwrap_or(i64::MAX)
                - i64::try_from(write.old_bytes).unwrap_or(i64::MAX),
            place: Place { file: 0, offset: 0 },
        });
        let pending = Overlaid {
            value,
            version,
            operation,
        };
        self.overlay.insert(key.clone(), pending);
    }

    fn live(&self, key: &Bytes) -> Result<Option<Live>, EngineError> {
        if let Some(pending) = self.overlay.get(key) {
            return Ok(pending.value.as_ref().map(|value| Live {
                bytes: value.len() as u64,
                version: pending.version,
                crc: None,
            }));
        }
        let state = self.store.state.read();
        if let Some(pending) = state.pending.get(key) {
            return Ok(pending.value.as_ref().map(|value| Live {
                bytes: value.len() as u64,
                version: pending.version,
                crc: None,
            }));
        }
        Ok(state.index.get(key)?.map(|entry| Live {
            bytes: u64::from(entry.value_bytes),
            version: entry.version,
            crc: Some(entry.value_crc),
        }))
    }

    /// Only when size and checksum agree are the bytes read and compared. What cannot be read counts as changed.
    fn is_unchanged(&self, set: &Set<'_>, old: Live) -> bool {
        let Set {
            key, value, crc, ..
        } = *set;
        if let Some(pending) = self.overlay.get(key) {
            return pending.value.as_ref() == Some(value);
        }
        if let Some(pending) = self.store.state.read().pending.get(key) {
            return pending.value.as_ref() == Some(value);
        }
        old.bytes == value.len() as u64
            && old.crc == Some(crc)
            && matches!(self.store.get(key), Ok(Some(stored)) if stored.value == *value)
    }
}
