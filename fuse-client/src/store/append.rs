//! The active ends of both streams.

use super::handles::{LocalReadError, read_verified};
use super::keeper::{Close, Keeper};
use super::layout::{DatafileName, Stage};
use super::pages::PageSums;
use super::synced_point::SyncedPoint;
use super::{LocalStore, StoreEvent, WRITER_WAIT_MAX, datafile_error, io_error, now_ms};
use crate::ports::{DataExtent, StoreError};
use parking_lot::{Condvar, Mutex};
use qsfs_zdb::datafile::{Datafile, DatafileHeader, SyncHandle};
use qsfs_zdb::media::{MediaFile, OpenMode};
use qsfs_zstor::id::{DatafileId, Stream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Purpose of meta datafiles.
pub const META_PURPOSE: [u8; 4] = *b"QSMJ";
/// Frame kind: one journal record.
pub const KIND_RECORD: u8 = 1;
/// Frame kind: a checkpoint begins; payload is the sequence it was taken at.
pub const KIND_CHECKPOINT_BEGIN: u8 = 2;
/// Frame kind: rows of a checkpoint.
pub const KIND_CHECKPOINT_ROWS: u8 = 3;
/// Frame kind: the checkpoint is complete; payload is the number of row frames.
pub const KIND_CHECKPOINT_END: u8 = 4;

/// Header of the meta datafile with this id.
pub const fn meta_header(id: DatafileId) -> DatafileHeader {
    DatafileHeader {
        purpose: META_PURPOSE,
        id: id.0,
    }
}

/// A data datafile that is appended to, or closing.
#[derive(Debug)]
pub struct OpenData {
    pub(super) id: DatafileId,
    pub(super) path: PathBuf,
    pub(super) file: Box<dyn MediaFile>,
    pub(super) sums: Mutex<PageSums>,
    first_byte_ms: u64,
    synced: AtomicU64,
    pub(super) name_durable: AtomicBool,
}

impl OpenData {
    /// Bytes appended so far.
    pub fn bytes(&self) -> u64 {
        self.sums.lock().bytes()
    }

    /// When the first byte was written.
    pub const fn first_byte_ms(&self) -> u64 {
        self.first_byte_ms
    }

    /// True when bytes were appended since the last sync.
    pub fn dirty(&self) -> bool {
        self.synced.load(Ordering::Acquire) < self.bytes()
    }

    /// fdatasync of what was appended before the call.
    pub fn sync(&self) -> std::io::Result<()> {
        let bytes = self.bytes();
        if self.synced.load(Ordering::Acquire) < bytes {
            self.file.sync_data()?;
            self.synced.fetch_max(bytes, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Reads and verifies.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), LocalReadError> {
        // The sums and the length must belong together: the last page may grow while it is read.
        let snapshot = {
            let sums = self.sums.lock();
            let first =
                usize::try_from(offset / super::pages::PAGE_BYTES as u64).unwrap_or(usize::MAX);
            let last = buf.len().div_ceil(super::pages::PAGE_BYTES) + 1;
            let taken: Vec<u32> = (first..=first.saturating_add(last))
                .map_while(|page| sums.page(page))
                .collect();
            (sums.bytes(), first, taken)
        };
        let (bytes, first, taken) = snapshot;
        let sums = |pages: std::ops::Range<usize>| {
            let from = pages.start.checked_sub(first)?;
            taken
                .get(from..taken.len().min(pages.end.saturating_sub(first)))
                .map(<[u32]>::to_vec)
        };
        read_verified(&self.path, self.file.as_ref(), bytes, &sums, offset, buf)
    }
}

/// The journal that is appended to.
#[derive(Debug)]
pub(super) struct ActiveJournal {
    pub(super) id: DatafileId,
    pub(super) file: Datafile,
    pub(super) first_byte_ms: u64,
    pub(super) since: Instant,
}

#[derive(Debug)]
struct ActiveData {
    open: Arc<OpenData>,
    since: Instant,
}

/// Closed while a checkpoint is taken.
#[derive(Debug, Default)]
pub(super) struct Gate {
    closed: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn wait_open(&self) {
        let mut closed = self.closed.lock();
        while *closed {
            self.changed.wait(&mut closed);
        }
    }

    fn close(&self) {
        let mut closed = self.closed.lock();
        while *closed {
            self.changed.wait(&mut closed);
        }
        *closed = true;
    }

    fn open(&self) {
        *self.closed.lock() = false;
        self.changed.notify_all();
    }
}

/// Both ends. Lock order: journal, then data.
#[derive(Debug, Default)]
pub(super) struct Active {
    journal: Mutex<Option<ActiveJournal>>,
    data: Mutex<Option<ActiveData>>,
}

impl Active {
    pub(super) fn journal_at_risk(&self) -> Option<(u64, u64)> {
        let journal = self.journal.lock();
        journal
            .as_ref()
            .filter(|journal| !journal.file.is_empty())
            .map(|journal| (journal.file.len(), journal.first_byte_ms))
    }

    /// Every journal that is not sealed yet, and how far the newest is written: one look, while none can be rotated, so that none
    /// is missed on its way to the keeper.
    pub(super) fn journals_to_sync(
        &self,
        keeper: &Keeper,
    ) -> (Vec<SyncHandle>, Option<SyncedPoint>) {
        let active = self.journal.lock();
        let (mut handles, mut newest) = keeper.journals_to_sync();
        if let Some(journal) = active.as_ref() {
            handles.push(journal.file.sync_handle());
            if !journal.file.is_empty() {
                newest = Some(SyncedPoint {
                    journal: journal.id,
                    offset: journal.file.len(),
                });
            }
        }
        (handles, newest)
    }

    /// When the older of the two ends got its first byte.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let journal = self.journal.lock().as_ref().map(|journal| journal.since);
        let data = self.data.lock().as_ref().map(|data| data.since);
        journal.into_iter().chain(data).min()
    }
}

impl LocalStore {
    /// See [`crate::ports::Store::append_data`].
    pub fn append_data(&self, data: &[u8]) -> Result<Vec<DataExtent>, StoreError> {
        let deadline = Instant::now() + WRITER_WAIT_MAX;
        let mut extents = Vec::new();
        let mut rest = data;
        while !rest.is_empty() {
            self.check_writable()?;
            self.held.wait(deadline, || {
                let _ = self.events.send(StoreEvent::SpaceWanted);
            })?;
            match self.append_some(rest) {
                Ok((extent, taken)) => {
                    extents.push(extent);
                    rest = &rest[taken..];
                }
                Err(StoreError::NoSpace(why)) if Instant::now() < deadline => {
                    let _ = self.events.send(StoreEvent::SpaceWanted);
                    if !self.held.wait_poke(deadline) {
                        return Err(StoreError::NoSpace(why));
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(extents)
    }

    /// Appends as much as the active datafile takes.
    fn append_some(&self, data: &[u8]) -> Result<(DataExtent, usize), StoreError> {
        let limit = self.settings.read().datafile_bytes.max(1);
        let mut active = self.active.data.lock();
        if active.is_none() {
            *active = Some(self.new_data()?);
        }
        let Some(current) = active.as_ref() else {
            unreachable!("made above")
        };
        let open = Arc::clone(&current.open);
        let offset = open.bytes();
        let room = usize::try_from(limit.saturating_sub(offset))
            .unwrap_or(usize::MAX)
            .max(1);
        let taken = data.len().min(room).min(u32::MAX as usize);
        let now = &data[..taken];
        open.file
            .write_all_at(now, offset)
            .map_err(|source| io_error("append to", &open.path, source))?;
        open.sums.lock().append(now);
        if offset + taken as u64 >= limit {
            *active = None;
            self.keeper.close(Close::Data(Arc::clone(&open)));
        }
        let bytes = u32::try_from(taken).unwrap_or(u32::MAX);
        Ok((
            DataExtent {
                datafile: open.id,
                offset,
                bytes,
                crc: crc32fast::hash(now),
            },
            taken,
        ))
    }

    fn new_data(&self) -> Result<ActiveData, StoreError> {
        let id = self.allocate_id();
        let path = self.dir.datafile(DatafileName {
            id,
            stream: Stream::Data,
            stage: Stage::Open,
        });
        let file = self
            .media
            .open(&path, OpenMode::CreateNew)
            .map_err(|source| io_error("create", &path, source))?;
        let open = Arc::new(OpenData {
            id,
            path,
            file,
            sums: Mutex::new(PageSums::new()),
            first_byte_ms: now_ms(),
            synced: AtomicU64::new(0),
            name_durable: AtomicBool::new(false),
        });
        self.open_data.write().insert(id, Arc::clone(&open));
        self.keeper.wake();
        Ok(ActiveData {
            open,
            since: Instant::now(),
        })
    }

    /// See [`crate::ports::Store::append_journal`].
    pub fn append_journal(&self, record: &[u8]) -> Result<(), StoreError> {
        self.check_writable()?;
        let mut active = self.active.journal.lock();
        if active.is_none() {
            let id = self.allocate_id();
            *active = Some(ActiveJournal {
                id,
                file: self.create_meta(id)?,
                first_byte_ms: now_ms(),
                since: Instant::now(),
            });
            self.keeper.wake();
        }
        let Some(journal) = active.as_mut() else {
            unreachable!("made above")
        };
        let appended = journal.file.append(KIND_RECORD, &[record]);
        let full = journal.file.len() >= self.settings.read().journal_bytes;
        let path = journal.file.path().to_owned();
        drop(active);
        if full {
            self.keeper.seal_soon();
        }
        appended
            .map(|_| ())
            .map_err(|error| datafile_error("append to", &path, error))
    }

    /// Makes an empty meta datafile.
    pub fn create_meta(&self, id: DatafileId) -> Result<Datafile, StoreError> {
        let path = self.dir.datafile(DatafileName {
            id,
            stream: Stream::Meta,
            stage: Stage::Open,
        });
        Datafile::create(&self.media, &path, meta_header(id))
            .map_err(|error| datafile_error("create", &path, error))
    }

    /// Closes both active datafiles (the keeper makes them durable and seals them): the journal first, then data, so
    /// that no sealed journal names data that is not sealed.
    ///
    /// Waits while a checkpoint is being taken: no later journal may be committed before it.
    pub fn rotate(&self) {
        self.gate.wait_open();
        self.rotate_journal(false);
    }

    /// As [`Self::rotate`]; the returned id comes before that of any later journal: a checkpoint that is taken after this
    /// call may take its place. Must be followed by [`Self::close_checkpoint`] or [`Self::abandon_checkpoint`].
    pub fn rotate_for_checkpoint(&self) -> DatafileId {
        self.gate.close();
        self.rotate_journal(true)
            .unwrap_or_else(|| self.allocate_id())
    }

    fn rotate_journal(&self, reserve: bool) -> Option<DatafileId> {
        // Before the journal is taken: every operation that made a datafile dead is then in it.
        let dead = self
            .dead_source
            .get()
            .map(|source| source())
            .unwrap_or_default();
        let mut active = self.active.journal.lock();
        let journal = active.take();
        let reserved = reserve.then(|| self.allocate_id());
        let barrier = self.rotate_data();
        if let Some(journal) = journal {
            self.keeper.close(Close::Meta {
                id: journal.id,
                file: journal.file,
                first_byte_ms: journal.first_byte_ms,
                barrier,
                checkpoint: false,
                dead,
            });
        }
        reserved
    }

    /// Closes the active data datafile; all data appended before is in datafiles up to the returned id.
    pub fn rotate_data(&self) -> DatafileId {
        let mut active = self.active.data.lock();
        if let Some(data) = active.take() {
            self.keeper.close(Close::Data(data.open));
        }
        self.last_id()
    }

    /// Hands over a complete checkpoint. `barrier`: from [`Self::rotate_data`] after the snapshot was taken.
    pub fn close_checkpoint(&self, id: DatafileId, file: Datafile, barrier: DatafileId) {
        let first_byte_ms = now_ms();
        self.keeper.close(Close::Meta {
            id,
            file,
            first_byte_ms,
            barrier,
            checkpoint: true,
            dead: Vec::new(),
        });
        self.gate.open();
    }

    /// No checkpoint after all.
    pub fn abandon_checkpoint(&self) {
        self.gate.open();
    }
}
