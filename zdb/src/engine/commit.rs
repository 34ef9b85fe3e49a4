//! Group commit: decide a batch of operations in order, append what they write, sync once, publish, answer.

use super::entry::{EntryHead, head_bytes};
use super::index::{Physical, Place};
use super::settings::NamespaceSettings;
use super::store::{Store, Writer, append_counters, file_header, file_name};
use super::{EngineError, Mode, SyncPolicy};
use crate::datafile::{Datafile, DatafileError, FrameParts, frame_bytes};
use bytes::Bytes;
use std::collections::HashMap;

/// A datafile that holds mostly garbage is completed at this part of its full size, so that compaction can have it.
const EARLY_ROTATION_PART: u64 = 8;

/// A datafile is extended by this much ahead of small appends, at most by that part of its full size.
const FILL_AHEAD_BYTES: u64 = 1 << 20;
const FILL_AHEAD_PART: u64 = 8;

/// What is asked.
#[derive(Debug, Clone)]
pub(super) enum Action {
    Set {
        value: Bytes,
        /// CRC-32 of the value: who submits it computes it, so that the commit thread need not.
        crc: u32,
        timestamp: Option<u32>,
    },
    Delete,
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
                Action::Delete => 0,
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
struct Planned {
    operation: usize,
    key: Bytes,
    kind: u8,
    head: Vec<u8>,
    value: Bytes,
    value_crc: u32,
    version: u64,
    previous: Option<u64>,
    timestamp: u32,
    deleted: bool,
    place: Place,
}

impl Planned {
    fn payload_bytes(&self) -> u64 {
        (self.head.len() + self.value.len()) as u64
    }

    fn frame_bytes(&self) -> u64 {
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

type Outcome = Result<Done, EngineError>;

impl Store {
    /// Carry out a batch. Everything answered `Ok` is durable ([`SyncPolicy::Always`]) or will be at the next sync.
    pub(super) fn commit(
        &self,
        operations: &[Operation],
        settings: &NamespaceSettings,
        now: u32,
    ) -> Vec<Outcome> {
        let refuse_all =
            |error: &EngineError| operations.iter().map(|_| Err(error.clone())).collect();
        let space = self.media.space(&self.dir);
        let ready = self.check_running().and_then(|()| self.check_alive());
        if let Err(error) = ready {
            return refuse_all(&error);
        }
        let mut writer = self.writer.lock();
        let mut batch = Batch {
            store: self,
            settings,
            now,
            overlay: HashMap::new(),
            live_bytes: self.state.read().index.live_value_bytes(),
            disk_room: space.map_or(0, |space| {
                space.free_bytes.saturating_sub(self.reserve_bytes)
            }),
            planned: Vec::new(),
            repeated: Vec::new(),
        };
        let mut outcomes: Vec<Outcome> = operations
            .iter()
            .enumerate()
            .map(|(number, operation)| batch.decide(&mut writer, number, operation))
            .collect();
        let Batch {
            mut planned,
            repeated,
            ..
        } = batch;
        if planned.is_empty() {
            return outcomes;
        }
        self.append_planned(&mut writer, &mut planned, &mut outcomes);
        let stored = match self.sync {
            SyncPolicy::Always => writer.active.sync().map_err(EngineError::from),
            SyncPolicy::Interval(_) => Ok(()),
        };
        if let Err(error) = stored.and_then(|()| self.publish(&planned, &outcomes)) {
            // Whether it is there after a restart is unknown.
            self.stop(error.to_string());
            let stopped = EngineError::Stopped {
                reason: error.to_string(),
            };
            for entry in &planned {
                outcomes[entry.operation] = Err(stopped.clone());
            }
        }
        for Repeated { operation, of } in repeated {
            if let Err(error) = &outcomes[of] {
                outcomes[operation] = Err(error.clone());
            }
        }
        outcomes
    }

    /// Let everybody see what was written.
    fn publish(&self, planned: &[Planned], outcomes: &[Outcome]) -> Result<(), EngineError> {
        let written = planned
            .iter()
            .filter(|entry| outcomes[entry.operation].is_ok());
        let mut state = self.state.write();
        for entry in written {
            state.index.add(&entry.key, &entry.physical(), false)?;
            state.dirty.insert(entry.place.file);
        }
        Ok(())
    }

    /// Append in order, rotating as files fill up. An entry that cannot be written turns its outcome into the error.
    fn append_planned(
        &self,
        writer: &mut Writer,
        planned: &mut [Planned],
        outcomes: &mut [Outcome],
    ) {
        let mut rest = planned;
        while !rest.is_empty() {
            self.rotate_if_due(writer, rest[0].frame_bytes());
            let room = self.datafile_bytes.saturating_sub(writer.active.len());
            let mut bytes = 0;
            let fitting = rest.iter().take_while(|entry| {
                bytes += entry.frame_bytes();
                bytes <= room
            });
            let count = fitting.count().max(1);
            let (now, later) = rest.split_at_mut(count);
            if self.append_run(writer, now).is_err() {
                // Alone, what is small (a deletion) may still find room.
                for entry in now {
                    if let Err(error) = self.append_run(writer, std::slice::from_mut(entry)) {
                        outcomes[entry.operation] = Err(error.into());
                    }
                }
            }
            rest = later;
        }
    }

    fn append_run(&self, writer: &mut Writer, run: &mut [Planned]) -> Result<(), DatafileError> {
        let values: Vec<[&[u8]; 1]> = run.iter().map(|entry| [&entry.value[..]]).collect();
        let frames: Vec<FrameParts<'_>> = run
            .iter()
            .zip(&values)
            .map(|(entry, value)| FrameParts {
                kind: entry.kind,
                prefix: &entry.head,
                parts: value,
            })
            .collect();
        let crcs: Vec<u32> = run.iter().map(|entry| entry.value_crc).collect();
        self.fill_ahead(writer, run);
        let offsets = writer.active.append_summed(&frames, &crcs)?;
        let file = self.state.read().active;
        for (entry, offset) in run.iter_mut().zip(offsets) {
            entry.place = Place { file, offset };
        }
        Ok(())
    }

    /// Before small appends the file is extended for many of them at once.
    fn fill_ahead(&self, writer: &mut Writer, run: &[Planned]) {
        let fill = FILL_AHEAD_BYTES.min(self.datafile_bytes / FILL_AHEAD_PART);
        let bytes: u64 = run.iter().map(Planned::frame_bytes).sum();
        let ahead = writer.active.ahead_bytes();
        let room = self.datafile_bytes.saturating_sub(writer.active.len());
        if bytes <= ahead || bytes > fill / 4 || room < fill * 2 {
            return;
        }
        if let Err(error) = writer.active.fill_ahead(fill) {
            // The append itself says whether there is room for it.
            tracing::debug!(%error, "cannot extend the datafile ahead");
        }
    }

    fn rotate_if_due(&self, writer: &mut Writer, next_bytes: u64) {
        let length = writer.active.len();
        let mostly_garbage = {
            let state = self.state.read();
            let live = state.index.file_use(state.active).live_bytes;
            length > self.datafile_bytes / EARLY_ROTATION_PART && live < length / 4
        };
        let full = length + next_bytes > self.datafile_bytes && !writer.active.is_empty();
        if (full || mostly_garbage)
            && let Err(error) = self.rotate(writer)
        {
            // The old datafile may still take it; if not, the append says why.
            tracing::warn!(dir = %self.dir.display(), %error, "cannot begin a new datafile");
        }
    }

    pub(super) fn rotate(&self, writer: &mut Writer) -> Result<(), EngineError> {
        let number = self.new_file_number();
        let path = self.dir.join(file_name(number));
        let fresh =
            Datafile::create(&self.media, &path, file_header(number)).and_then(|mut file| {
                append_counters(&mut file, writer.counters)?;
                file.sync()?;
                Ok(file)
            });
        let fresh = match fresh {
            Ok(fresh) => fresh,
            Err(error) => {
                // Nothing was acknowledged in it. If it cannot be removed, the next open finds it empty.
                let _ = self.media.remove(&path);
                return Err(error.into());
            }
        };
        let completed = writer.active.trim().and_then(|()| writer.active.mark());
        if let Err(error) = completed {
            if writer.active.is_stopped() {
                self.stop(error.to_string());
            }
            // Else only the mark found no room: the old datafile goes on.
            let _ = self.media.remove(&path);
            return Err(error.into());
        }
        let mut state = self.state.write();
        state.readers.insert(number, fresh.reader());
        state.active = number;
        writer.active = fresh;
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
            Action::Delete => self.decide_delete(writer, number, &operation.key),
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
        let previous = linked.map(|old| old.version);
        self.plan(writer, number, &key, Some(set), previous);
        Ok(Done::Stored(key))
    }

    fn decide_delete(&mut self, writer: &mut Writer, number: usize, key: &Bytes) -> Outcome {
        if self.settings.worm {
            return Err(EngineError::Worm);
        }
        let Some(old) = self.live(key)? else {
            return Err(EngineError::KeyNotFound);
        };
        self.live_bytes -= old.bytes;
        self.plan(writer, number, key, None, None);
        Ok(Done::Deleted)
    }

    fn plan(
        &mut self,
        writer: &mut Writer,
        operation: usize,
        key: &Bytes,
        set: Option<Set<'_>>,
        previous: Option<u64>,
    ) {
        let version = writer.counters.next_version;
        writer.counters.next_version += 1;
        let value = set.map(|set| set.value.clone());
        let timestamp = set.and_then(|set| set.timestamp).unwrap_or(self.now);
        let head = EntryHead {
            version,
            previous,
            timestamp,
            deleted: value.is_none(),
            key,
        };
        self.planned.push(Planned {
            operation,
            key: key.clone(),
            kind: head.kind(),
            head: head.encode(),
            deleted: value.is_none(),
            value: value.clone().unwrap_or_default(),
            // Of nothing it is 0.
            value_crc: set.map_or(0, |set| set.crc),
            version,
            previous,
            timestamp,
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
        let entry = self.store.state.read().index.get(key)?;
        Ok(entry.map(|entry| Live {
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
        old.bytes == value.len() as u64
            && old.crc == Some(crc)
            && matches!(self.store.get(key), Ok(Some(stored)) if stored.value == *value)
    }
}
