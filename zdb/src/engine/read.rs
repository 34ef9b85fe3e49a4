//! Reading values: the index says where, the datafile is read, and what is read must be what was meant.

use super::EngineError;
use super::entry::{EntryHead, head_bytes};
use super::index::{Entry, Place};
use super::store::{DamageReport, State, Store, file_name};
use crate::datafile::{DatafileError, DatafileReader, Frame};
use bytes::Bytes;
use std::sync::Arc;

/// A version of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyVersion {
    /// Its number: 1 and up, higher is newer, and the same whatever is compacted.
    pub version: u64,
    /// When it was set, Unix seconds.
    pub timestamp: u32,
    /// The value.
    pub value: Bytes,
    /// The version before it, if that is kept.
    pub previous: Option<u64>,
}

/// An entry as it stands in a datafile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawEntry {
    /// The key.
    pub key: Bytes,
    /// Its version.
    pub version: u64,
    /// The version before it, if the entry names one.
    pub previous: Option<u64>,
    /// When it was set or deleted, Unix seconds.
    pub timestamp: u32,
    /// It says that the key was deleted.
    pub deleted: bool,
    /// The value, verified.
    pub value: Bytes,
    /// Where it stands.
    pub offset: u64,
    /// Where the next one may stand.
    pub next_offset: u64,
}

/// A value read and verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) value: Bytes,
}

/// A value that stands in a datafile, as far as the index knows.
struct Wanted {
    place: Place,
    version: u64,
    payload_bytes: u32,
    head_bytes: usize,
    reader: Option<DatafileReader>,
}

/// Copying and verifying more than this takes too long for a thread that others wait for.
const CACHED_BYTES_MAX: u32 = (1 << 20) + 4096;

/// May reading wait for the disk?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    Wait,
    /// Only what is in memory.
    Cached,
}

impl Store {
    /// The value of a key, verified. With [`Reading::Cached`]: `None` if that would wait for the disk.
    pub(super) fn read(
        &self,
        key: &[u8],
        reading: Reading,
    ) -> Result<Option<Option<Stored>>, EngineError> {
        let state = self.state.read();
        let Some(entry) = state.index.get(key)? else {
            return Ok(Some(None));
        };
        let wanted = Wanted::of(&state, key, &entry);
        drop(state);
        Ok(self.fetch(key, &wanted, reading)?.map(Some))
    }

    /// The value of a key, verified.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Stored>, EngineError> {
        Ok(self.read(key, Reading::Wait)?.flatten())
    }

    /// Read and verify what the index points at. Its datafile may be compacted away meanwhile; open, it stays readable.
    fn fetch(
        &self,
        key: &[u8],
        wanted: &Wanted,
        reading: Reading,
    ) -> Result<Option<Stored>, EngineError> {
        let Place { file, offset } = wanted.place;
        let Some(reader) = &wanted.reader else {
            let path = self.dir.join(file_name(file));
            return Err(self.corrupt(key, DatafileError::NoFrame { path, offset }));
        };
        let read = match reading {
            Reading::Wait => reader.read_sized(offset, wanted.payload_bytes).map(Some),
            Reading::Cached if wanted.payload_bytes > CACHED_BYTES_MAX => return Ok(None),
            Reading::Cached => reader.read_cached(offset, wanted.payload_bytes),
        };
        let frame = match read {
            Ok(Some(frame)) => frame,
            Ok(None) => return Ok(None),
            Err(error @ (DatafileError::Damaged { .. } | DatafileError::NoFrame { .. })) => {
                return Err(self.corrupt(key, error));
            }
            Err(error) => return Err(error.into()),
        };
        if !wanted.is(key, &frame) {
            let error = DatafileError::Damaged {
                path: reader.path().to_owned(),
                offset,
                bytes: frame.payload.len() as u64,
            };
            return Err(self.corrupt(key, error));
        }
        Ok(Some(Stored {
            value: frame.payload.slice(wanted.head_bytes..),
        }))
    }

    /// A version of a key (`None`: the current one) with its value, verified. `Ok(None)`: no such key.
    pub(super) fn version(
        &self,
        key: &[u8],
        version: Option<u64>,
    ) -> Result<Option<KeyVersion>, EngineError> {
        let state = self.state.read();
        let Some(current) = state.index.get(key)? else {
            return Ok(None);
        };
        let (entry, previous) = match version {
            Some(version) if version != current.version => state
                .index
                .older(key, version)
                .ok_or(EngineError::UnknownVersion { version })?,
            _ => (current, state.index.newest_older(key)),
        };
        let wanted = Wanted::of(&state, key, &entry);
        drop(state);
        let stored = self.fetch(key, &wanted, Reading::Wait)?;
        Ok(stored.map(|stored| KeyVersion {
            version: entry.version,
            timestamp: entry.timestamp,
            value: stored.value,
            previous,
        }))
    }

    /// The entry at (or, in a file's header, behind) an offset of a datafile.
    pub(super) fn raw_entry(
        &self,
        file: u32,
        offset: u64,
    ) -> Result<Option<RawEntry>, EngineError> {
        let reader = self.state.read().readers.get(&file).cloned();
        let Some(reader) = reader else {
            return Ok(None);
        };
        // The frames from there on: counters and what is only housekeeping are passed over.
        for frame in reader.frames(offset) {
            let frame = frame?;
            if let Some(head) = EntryHead::decode(frame.kind, &frame.payload) {
                return Ok(Some(RawEntry {
                    key: Bytes::copy_from_slice(head.key),
                    version: head.version,
                    previous: head.previous,
                    timestamp: head.timestamp,
                    deleted: head.deleted,
                    value: frame.payload.slice(head.bytes()..),
                    offset: frame.offset,
                    next_offset: frame.next_offset(),
                }));
            }
        }
        Ok(None)
    }

    fn corrupt(&self, key: &[u8], error: DatafileError) -> EngineError {
        let (path, offset, bytes) = match &error {
            DatafileError::Damaged {
                path,
                offset,
                bytes,
            } => (path.clone(), *offset, *bytes),
            DatafileError::NoFrame { path, offset } => (path.clone(), *offset, 0),
            _ => (self.dir.clone(), 0, 0),
        };
        self.report(DamageReport {
            path,
            offset,
            bytes,
            key: Some(Bytes::copy_from_slice(key)),
        });
        EngineError::Corrupt(Arc::new(error))
    }
}

impl Wanted {
    fn of(state: &State, key: &[u8], entry: &Entry) -> Self {
        let head_bytes = head_bytes(key.len(), entry.linked);
        let payload_bytes = u32::try_from(head_bytes)
            .unwrap_or(u32::MAX)
            .saturating_add(entry.value_bytes);
        Self {
            place: entry.place,
            version: entry.version,
            payload_bytes,
            head_bytes,
            reader: state.readers.get(&entry.place.file).cloned(),
        }
    }

    /// Is this frame the entry that is wanted?
    fn is(&self, key: &[u8], frame: &Frame) -> bool {
        EntryHead::decode(frame.kind, &frame.payload).is_some_and(|told| {
            !told.deleted
                && told.key == key
                && told.version == self.version
                && told.bytes() == self.head_bytes
        })
    }
}
