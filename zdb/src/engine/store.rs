//! A namespace's datafiles and index: opening, reading, state. Writing is in [`super::commit`], reclaiming in [`super::compact`].

use super::compact::GoOn;
use super::directory::{Room, identities};
use super::entry::{Counters, KIND_COUNTERS, PURPOSE};
use super::index::Index;
use super::load::{self, Loaded};
use super::pending::Pending;
use super::settings::StoredSettings;
use super::{EngineError, EngineOptions, SyncPolicy, snapshot};
use crate::datafile::{Datafile, DatafileError, DatafileHeader, DatafileReader, FrameParts};
use crate::media::{Identity, Media, MediaLock};
use bytes::Bytes;
use parking_lot::{Condvar, Mutex, RwLock};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

const LOCK: &str = "lock";
/// A snapshot is made when this part of a datafile's full size is not in one yet.
const SNAPSHOT_WORTH_PART: u64 = 64;
/// Damage kept in the list; more is only logged.
const DAMAGE_REPORTS_MAX: usize = 10_000;

/// Bytes that were durable once and do not verify now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamageReport {
    /// The datafile.
    pub path: PathBuf,
    /// Where the damage begins.
    pub offset: u64,
    /// How far it reaches.
    pub bytes: u64,
    /// The key whose value it was, if that is still known.
    pub key: Option<Bytes>,
}

#[derive(Debug)]
pub(super) struct Store {
    pub(super) media: Arc<dyn Media>,
    pub(super) dir: PathBuf,
    pub(super) datafile_bytes: u64,
    pub(super) reserve_bytes: u64,
    pub(super) state: RwLock<State>,
    pub(super) writer: Mutex<Writer>,
    pub(super) next_file: AtomicU32,
    pub(super) sync: SyncPolicy,
    /// FLUSH: entries of lower versions do not count.
    pub(super) flushed_before: AtomicU64,
    /// Why writing stopped.
    pub(super) stopped: RwLock<Option<String>>,
    /// For those that wait until nothing is pending.
    pub(super) settled: Mutex<()>,
    pub(super) settling: Condvar,
    damaged: Mutex<Vec<DamageReport>>,
    /// Of the directory and of the marker file in it.
    pub(super) identity: RwLock<(Identity, Identity)>,
    /// When the directory was last seen to be there, in milliseconds since `opened`.
    pub(super) alive_at_ms: AtomicU64,
    pub(super) opened: Instant,
    /// Released at close, even while connections still hold the namespace.
    lock: Mutex<Option<Box<dyn MediaLock>>>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) index: Index,
    /// What the index will say once it is durable.
    pub(super) pending: Pending,
    pub(super) readers: BTreeMap<u32, DatafileReader>,
    /// Where the commit thread appends; never compacted.
    pub(super) active: u32,
    /// Datafiles that could not be compacted since part of what is needed in them is damaged, with the live bytes they had.
    pub(super) blocked: BTreeMap<u32, u64>,
    /// Up to where the snapshot of a datafile speaks; also of one of which none can be made.
    pub(super) snapshots: BTreeMap<u32, u64>,
    /// Datafiles that changed since it was last asked.
    pub(super) dirty: BTreeSet<u32>,
}

#[derive(Debug)]
pub(super) struct Writer {
    pub(super) active: Datafile,
    pub(super) counters: Counters,
    pub(super) room: Room,
}

pub(super) fn file_name(file: u32) -> String {
    format!("{file:08x}.zdb")
}

/// The number that a name begins with, if it is that and this ending.
pub(super) fn number_before(name: &str, ending: &str) -> Option<u32> {
    let digits = name.strip_suffix(ending)?;
    (digits.len() == 8)
        .then(|| u32::from_str_radix(digits, 16).ok())
        .flatten()
}

pub(super) fn file_number(name: &str) -> Option<u32> {
    number_before(name, ".zdb")
}

pub(super) fn file_header(file: u32) -> DatafileHeader {
    DatafileHeader {
        purpose: PURPOSE,
        id: u64::from(file),
    }
}

impl Store {
    /// Open the datafiles of a directory that holds the marker file.
    pub(super) fn open(
        options: &EngineOptions,
        dir: &Path,
        stored: &StoredSettings,
        lock: Box<dyn MediaLock>,
    ) -> Result<Self, EngineError> {
        let media = Arc::clone(&options.media);
        let mut loaded = load::load(&media, dir, stored)?;
        let (number, mut active) = match loaded.last.take() {
            Some((number, datafile)) if datafile.len() < options.datafile_bytes / 2 => {
                (number, datafile)
            }
            _ => {
                let number = loaded.highest + 1;
                let path = dir.join(file_name(number));
                (
                    number,
                    Datafile::create(&media, &path, file_header(number))?,
                )
            }
        };
        loaded.highest = loaded.highest.max(number);
        // What older datafiles say of the counters must outlive their compaction.
        append_counters(&mut active, loaded.counters)?;
        active.sync()?;
        loaded.readers.insert(number, active.reader());
        Self::assemble(options, dir, stored, lock, loaded, (number, active))
    }

    fn assemble(
        options: &EngineOptions,
        dir: &Path,
        stored: &StoredSettings,
        lock: Box<dyn MediaLock>,
        loaded: Loaded,
        (number, active): (u32, Datafile),
    ) -> Result<Self, EngineError> {
        let media = Arc::clone(&options.media);
        let space = media
            .space(dir)
            .map_err(EngineError::io("measure the disk of", dir))?;
        Ok(Self {
            identity: RwLock::new(identities(&media, dir)?),
            alive_at_ms: AtomicU64::new(0),
            opened: Instant::now(),
            media,
            dir: dir.to_owned(),
            datafile_bytes: options.datafile_bytes.min(super::DATAFILE_BYTES_MAX),
            reserve_bytes: options.reserve_bytes.min(space.total_bytes / 16),
            state: RwLock::new(State {
                index: loaded.index,
                pending: Pending::default(),
                readers: loaded.readers,
                active: number,
                blocked: BTreeMap::new(),
                snapshots: loaded.snapshots,
                dirty: BTreeSet::new(),
            }),
            writer: Mutex::new(Writer {
                active,
                counters: loaded.counters,
                room: Room::default(),
            }),
            next_file: AtomicU32::new(loaded.highest + 1),
            sync: options.sync,
            flushed_before: AtomicU64::new(stored.flushed_before),
            stopped: RwLock::new(None),
            settled: Mutex::default(),
            settling: Condvar::new(),
            damaged: Mutex::new(loaded.damaged),
            lock: Mutex::new(Some(lock)),
        })
    }

    /// Remember damage, once per place.
    pub(super) fn report(&self, report: DamageReport) {
        let mut damaged = self.damaged.lock();
        let known = damaged
            .iter()
            .any(|old| old.path == report.path && old.offset == report.offset);
        if !known {
            tracing::warn!(path = %report.path.display(), offset = report.offset, bytes = report.bytes, "a datafile is damaged");
            if damaged.len() < DAMAGE_REPORTS_MAX {
                damaged.push(report);
            }
        }
    }

    /// Damage that still stands: a value that was overwritten or deleted since, or a file that was compacted away, is mended.
    pub(super) fn damaged(&self) -> Vec<DamageReport> {
        let mut damaged = self.damaged.lock();
        let state = self.state.read();
        damaged.retain(|report| match &report.key {
            // What cannot be looked up now still stands.
            Some(key) => state.index.get(key).map_or(true, |entry| {
                entry.is_some_and(|entry| {
                    entry.place.offset == report.offset
                        && report.path.ends_with(file_name(entry.place.file))
                })
            }),
            None => self.media.exists(&report.path),
        });
        damaged.clone()
    }

    /// Is there a complete datafile without its snapshot?
    pub(super) fn lacks_snapshots(&self) -> bool {
        let state = self.state.read();
        let worth = self.datafile_bytes / SNAPSHOT_WORTH_PART;
        state.readers.iter().any(|(file, reader)| {
            let covered = state.snapshots.get(file).copied().unwrap_or(0);
            *file != state.active && reader.len().saturating_sub(covered) > worth
        })
    }

    pub(super) fn check_running(&self) -> Result<(), EngineError> {
        match &*self.stopped.read() {
            Some(reason) => Err(EngineError::Stopped {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    pub(super) fn stop(&self, reason: String) {
        let mut stopped = self.stopped.write();
        if stopped.is_none() {
            tracing::error!(dir = %self.dir.display(), %reason, "the namespace stops writing");
            *stopped = Some(reason);
        }
    }

    pub(super) fn new_file_number(&self) -> u32 {
        self.next_file.fetch_add(1, Ordering::Relaxed)
    }

    /// Nothing is being written: say in the active datafile that all of it is durable, so that rot in it is known as rot after a crash.
    pub(super) fn idle(&self) {
        if self.check_running().is_ok()
            && self.check_alive().is_ok()
            && let Err(error) = self.writer.lock().active.mark_idle()
        {
            tracing::debug!(%error, "cannot mark the idle datafile");
        }
    }

    /// Make what was acknowledged before its sync durable ([`SyncPolicy::Interval`]).
    pub(super) fn sync_active(&self) -> Result<(), EngineError> {
        self.check_running()?;
        let handle = self.writer.lock().active.sync_handle();
        match handle.sync() {
            Ok(_) => Ok(()),
            Err(error) => {
                self.stop(error.to_string());
                Err(error.into())
            }
        }
    }

    /// Say in the active datafile that all of it is durable, and let the next owner in.
    pub(super) fn close(&self) {
        if self.check_running().is_ok() && self.check_alive().is_ok() {
            let mut writer = self.writer.lock();
            if !writer.active.is_empty() {
                match writer.active.trim().and_then(|()| writer.active.mark()) {
                    Ok(()) => {
                        let active = self.state.read().active;
                        self.write_snapshot_if_worth(active, &writer.active.reader());
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot mark the active datafile as durable");
                    }
                }
            }
        }
        *self.lock.lock() = None;
    }

    /// Make the snapshots that complete datafiles do not have yet.
    pub(super) fn write_snapshots(&self, go_on: GoOn<'_>) {
        let complete: Vec<(u32, DatafileReader)> = {
            let state = self.state.read();
            let readers = state.readers.iter();
            let complete = readers.filter(|(file, _)| **file != state.active);
            complete
                .map(|(file, reader)| (*file, reader.clone()))
                .collect()
        };
        for (file, reader) in complete {
            let began = Instant::now();
            self.write_snapshot_if_worth(file, &reader);
            if !go_on(began.elapsed()) {
                return;
            }
        }
    }

    fn write_snapshot_if_worth(&self, file: u32, reader: &DatafileReader) {
        let covered = reader.len();
        let known = self.state.read().snapshots.get(&file).copied();
        let behind = covered.saturating_sub(known.unwrap_or(0));
        // Reading so little at the next open costs less than another file.
        if behind <= self.datafile_bytes / SNAPSHOT_WORTH_PART || self.check_alive().is_err() {
            return;
        }
        if let Err(error) = snapshot::write(&self.media, &self.dir, file, reader) {
            tracing::info!(file, %error, "no snapshot of a datafile: it is read at the next open");
        }
        // Also when there is none: the datafile is damaged or the disk is full, and trying again and again helps nobody.
        self.state.write().snapshots.insert(file, covered);
        let gone = !self.state.read().readers.contains_key(&file);
        if gone {
            self.remove_snapshot(file);
        }
    }

    /// A datafile's name is gone.
    pub(super) fn forget_file(&self, file: u32) {
        let mut state = self.state.write();
        state.index.forget_file(file);
        state.readers.remove(&file);
        state.blocked.remove(&file);
        drop(state);
        self.remove_snapshot(file);
    }

    pub(super) fn remove_snapshot(&self, file: u32) {
        self.state.write().snapshots.remove(&file);
        // One that stays is removed at the next open.
        if let Err(error) = snapshot::remove(&self.media, &self.dir, file) {
            tracing::debug!(file, %error, "cannot remove the snapshot of a datafile that is gone");
        }
    }

    /// Make the index anew from what the datafiles say. Reading goes on with the old one; writing waits.
    pub(super) fn reload(&self, stored: &StoredSettings) -> Result<(), EngineError> {
        self.check_running()?;
        self.check_alive()?;
        let writer = self.writer.lock();
        self.wait_for_pending();
        self.check_running()?;
        writer.active.sync()?;
        let readers = self.state.read().readers.clone();
        let (index, damaged) = load::reload(&self.media, &self.dir, stored, &readers)?;
        for report in damaged {
            self.report(report);
        }
        let mut state = self.state.write();
        state.index = index;
        state.blocked.clear();
        drop(writer);
        Ok(())
    }

    /// Empty the namespace: what the settings say of it must be durable already. The writer is held by the caller.
    pub(super) fn forget_everything(&self, flushed_before: u64, index: Index) {
        self.flushed_before.store(flushed_before, Ordering::Release);
        let mut state = self.state.write();
        let active = state.active;
        let old = std::mem::replace(&mut state.index, index);
        let readers = state.readers.iter();
        let files: Vec<(u32, PathBuf)> = readers
            .map(|(file, reader)| (*file, reader.path().to_owned()))
            .collect();
        for (file, _) in &files {
            let bytes = old.file_use(*file).total_bytes;
            state.index.add_bytes(*file, bytes);
        }
        state.blocked.clear();
        drop(state);
        drop(old);
        for (file, path) in files.iter().filter(|(file, _)| *file != active) {
            match self.media.remove(path) {
                Ok(()) => self.forget_file(*file),
                // Compaction finds that nothing in it is needed and tries again.
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot remove a flushed datafile");
                }
            }
        }
        if let Err(error) = self.media.sync_dir(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot sync the directory after a flush");
        }
    }
}

pub(super) fn take_lock(
    media: &Arc<dyn Media>,
    dir: &Path,
) -> Result<Box<dyn MediaLock>, EngineError> {
    let path = dir.join(LOCK);
    media.lock(&path).map_err(|error| {
        if error.kind() == std::io::ErrorKind::WouldBlock {
            EngineError::InUse {
                dir: dir.to_owned(),
            }
        } else {
            EngineError::io("lock", &path)(error)
        }
    })
}

pub(super) fn append_counters(
    datafile: &mut Datafile,
    counters: Counters,
) -> Result<(), DatafileError> {
    datafile
        .append_batch(&[FrameParts {
            kind: KIND_COUNTERS,
            prefix: &counters.encode(),
            parts: &[],
        }])
        .map(|_| ())
}
