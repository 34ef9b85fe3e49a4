//! A namespace's datafiles and index: opening, reading, state. Writing is in [`super::commit`], reclaiming in [`super::compact`].

use super::entry::{
    Counters, EntryHead, KIND_COUNTERS, KIND_DELETE, KIND_SET, PURPOSE, head_bytes,
};
use super::index::{Index, Physical, Place};
use super::settings::MARKER;
use super::{EngineError, EngineOptions, Mode};
use crate::datafile::{
    Damage, Datafile, DatafileError, DatafileHeader, DatafileReader, FrameParts, FrameView, Tail,
    frame_bytes,
};
use crate::media::{Identity, Media, MediaLock};
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const LOCK: &str = "lock";
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
    /// Why writing stopped.
    pub(super) stopped: RwLock<Option<String>>,
    damaged: Mutex<Vec<DamageReport>>,
    identity: Mutex<(Identity, Identity)>,
    /// Released at close, even while connections still hold the namespace.
    lock: Mutex<Option<Box<dyn MediaLock>>>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) index: Index,
    pub(super) readers: BTreeMap<u32, DatafileReader>,
    /// Where the commit thread appends; never compacted.
    pub(super) active: u32,
    /// Datafiles that could not be compacted since part of what is needed in them is damaged, with the live bytes they had.
    pub(super) blocked: BTreeMap<u32, u64>,
}

#[derive(Debug)]
pub(super) struct Writer {
    pub(super) active: Datafile,
    pub(super) counters: Counters,
}

/// A value read and verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) value: Bytes,
}

pub(super) fn file_name(file: u32) -> String {
    format!("{file:08x}.zdb")
}

fn file_number(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".zdb")?;
    (digits.len() == 8)
        .then(|| u32::from_str_radix(digits, 16).ok())
        .flatten()
}

pub(super) fn file_header(file: u32) -> DatafileHeader {
    DatafileHeader {
        purpose: PURPOSE,
        id: u64::from(file),
    }
}

struct Found {
    index: Index,
    counters: Counters,
    damaged: Vec<DamageReport>,
    readers: BTreeMap<u32, DatafileReader>,
    last: Option<(u32, Datafile)>,
    highest: u32,
}

impl Found {
    fn entry(
        &mut self,
        file: u32,
        kind: u8,
        offset: u64,
        payload_bytes: u64,
        prefix: &[u8],
        value: Option<&[u8]>,
    ) {
        if kind == KIND_COUNTERS {
            self.counters
                .raise(Counters::decode(prefix).unwrap_or(Counters::FIRST));
            return;
        }
        let Some(head) = EntryHead::decode(prefix) else {
            return;
        };
        let next_id = match <[u8; 8]>::try_from(head.key) {
            Ok(id) => u64::from_le_bytes(id).saturating_add(1),
            Err(_) => 0,
        };
        let sequential = self.index.is_sequential();
        self.counters.raise(Counters {
            next_version: head.version + 1,
            // Every version took a slot at most, so in user mode versions are the upper bound of ids.
            next_id: if sequential { next_id } else { head.version },
        });
        let value_bytes = payload_bytes.saturating_sub(head_bytes(head.key) as u64);
        self.index.add(
            head.key,
            &Physical {
                version: head.version,
                place: Place { file, offset },
                frame_bytes: frame_bytes(payload_bytes),
                value_bytes: u32::try_from(value_bytes).unwrap_or(u32::MAX),
                value_crc: value.map_or(0, crc32fast::hash),
                timestamp: head.timestamp,
                deleted: kind == KIND_DELETE,
            },
        );
    }

    fn frame(&mut self, file: u32, frame: FrameView<'_>) {
        let (prefix, value) = frame.payload.split_at(frame.prefix_bytes);
        self.entry(
            file,
            frame.kind,
            frame.offset,
            frame.payload.len() as u64,
            prefix,
            Some(value),
        );
    }

    fn damage(&mut self, file: u32, path: &Path, damage: &Damage) {
        let known = damage
            .kind
            .zip(damage.prefix.as_deref())
            .zip(damage.payload_bytes);
        let key = damage
            .prefix
            .as_deref()
            .and_then(EntryHead::decode)
            .map(|head| Bytes::copy_from_slice(head.key));
        if let Some(((kind, prefix), payload_bytes)) = known {
            // The key keeps pointing at its damaged value: asking for it is an error, not an older answer.
            self.entry(
                file,
                kind,
                damage.offset,
                u64::from(payload_bytes),
                prefix,
                None,
            );
        }
        self.damaged.push(DamageReport {
            path: path.to_owned(),
            offset: damage.offset,
            bytes: damage.bytes,
            key,
        });
    }
}

impl Store {
    /// Open the datafiles of a directory that holds the marker file.
    pub(super) fn open(
        options: &EngineOptions,
        dir: &Path,
        mode: Mode,
        lock: Box<dyn MediaLock>,
    ) -> Result<Self, EngineError> {
        let media = Arc::clone(&options.media);
        let mut found = scan_directory(&media, dir, mode)?;
        let (number, mut active) = match found.last.take() {
            Some((number, datafile)) if datafile.len() < options.datafile_bytes / 2 => {
                (number, datafile)
            }
            _ => {
                let number = found.highest + 1;
                let path = dir.join(file_name(number));
                (
                    number,
                    Datafile::create(&media, &path, file_header(number))?,
                )
            }
        };
        found.highest = found.highest.max(number);
        // What older datafiles say of the counters must outlive their compaction.
        append_counters(&mut active, found.counters)?;
        active.sync()?;
        found.readers.insert(number, active.reader());
        let space = media
            .space(dir)
            .map_err(EngineError::io("measure the disk of", dir))?;
        Ok(Self {
            identity: Mutex::new(identities(&media, dir)?),
            media,
            dir: dir.to_owned(),
            datafile_bytes: options.datafile_bytes,
            reserve_bytes: options.reserve_bytes.min(space.total_bytes / 16),
            state: RwLock::new(State {
                index: found.index,
                readers: found.readers,
                active: number,
                blocked: BTreeMap::new(),
            }),
            writer: Mutex::new(Writer {
                active,
                counters: found.counters,
            }),
            next_file: AtomicU32::new(found.highest + 1),
            stopped: RwLock::new(None),
            damaged: Mutex::new(found.damaged),
            lock: Mutex::new(Some(lock)),
        })
    }

    /// The value of a key, verified.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Stored>, EngineError> {
        // Twice: compaction may have moved the entry between the look-up and the read; its old file stays readable, but be sure.
        let (place, entry, reader) = {
            let state = self.state.read();
            let Some((_, entry)) = state.index.get(key) else {
                return Ok(None);
            };
            (
                entry.place,
                *entry,
                state.readers.get(&entry.place.file).cloned(),
            )
        };
        let Some(reader) = reader else {
            return Err(self.corrupt(
                key,
                DatafileError::NoFrame {
                    path: self.dir.join(file_name(place.file)),
                    offset: place.offset,
                },
            ));
        };
        let head = head_bytes(key);
        let payload_bytes = u32::try_from(head)
            .unwrap_or(u32::MAX)
            .saturating_add(entry.value_bytes);
        let frame = match reader.read_sized(place.offset, payload_bytes) {
            Ok(frame) => frame,
            Err(error @ (DatafileError::Damaged { .. } | DatafileError::NoFrame { .. })) => {
                return Err(self.corrupt(key, error));
            }
            Err(error) => return Err(error.into()),
        };
        let told = EntryHead::decode(&frame.payload);
        let agrees = frame.kind == KIND_SET
            && told.is_some_and(|told| told.key == key && told.version == entry.version);
        if !agrees {
            return Err(self.corrupt(
                key,
                DatafileError::Damaged {
                    path: reader.path().to_owned(),
                    offset: place.offset,
                    bytes: frame.payload.len() as u64,
                },
            ));
        }
        Ok(Some(Stored {
            value: frame.payload.slice(head..),
        }))
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
            Some(key) => state.index.get(key).is_some_and(|(_, entry)| {
                entry.place.offset == report.offset
                    && report.path.ends_with(file_name(entry.place.file))
            }),
            None => self.media.exists(&report.path),
        });
        damaged.clone()
    }

    /// Is the directory still the one that was opened?
    pub(super) fn check_alive(&self) -> Result<(), EngineError> {
        match identities(&self.media, &self.dir) {
            Ok(now) if now == *self.identity.lock() => Ok(()),
            _ => Err(EngineError::Gone {
                dir: self.dir.clone(),
            }),
        }
    }

    /// The marker file was replaced by ourselves.
    pub(super) fn remember_identity(&self) -> Result<(), EngineError> {
        *self.identity.lock() = identities(&self.media, &self.dir)?;
        Ok(())
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

    /// Say in the active datafile that all of it is durable, and let the next owner in.
    pub(super) fn close(&self) {
        if self.check_running().is_ok() && self.check_alive().is_ok() {
            let mut writer = self.writer.lock();
            if !writer.active.is_empty()
                && let Err(error) = writer.active.mark()
            {
                tracing::warn!(%error, "cannot mark the active datafile as durable");
            }
        }
        *self.lock.lock() = None;
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

fn identities(media: &Arc<dyn Media>, dir: &Path) -> Result<(Identity, Identity), EngineError> {
    let marker = dir.join(MARKER);
    let directory = media.identity(dir).map_err(EngineError::io("find", dir))?;
    let marker = media
        .identity(&marker)
        .map_err(EngineError::io("find", &marker))?;
    Ok((directory, marker))
}

fn scan_directory(media: &Arc<dyn Media>, dir: &Path, mode: Mode) -> Result<Found, EngineError> {
    let mut found = Found {
        index: Index::new(mode == Mode::Sequential),
        counters: Counters::FIRST,
        damaged: Vec::new(),
        readers: BTreeMap::new(),
        last: None,
        highest: 0,
    };
    let names = media.list(dir).map_err(EngineError::io("list", dir))?;
    for number in names.iter().filter_map(|name| file_number(name)) {
        let path = dir.join(file_name(number));
        found.highest = found.highest.max(number);
        let opened = Datafile::open_visiting(
            media,
            &path,
            file_header(number),
            Tail::Keep,
            &mut |frame| {
                found.frame(number, frame);
            },
        );
        match opened {
            Ok((datafile, report)) => {
                if report.torn_bytes_cut > 0 {
                    tracing::info!(path = %path.display(), bytes = report.torn_bytes_cut, "cut writes that were never acknowledged");
                }
                for damage in &report.damaged {
                    found.damage(number, &path, damage);
                }
                found.readers.insert(number, datafile.reader());
                found.last = Some((number, datafile));
            }
            Err(DatafileError::NoHeader {
                never_born: true, ..
            }) => {
                media
                    .remove(&path)
                    .map_err(EngineError::io("remove", &path))?;
                media
                    .sync_dir(dir)
                    .map_err(EngineError::io("sync directory", dir))?;
            }
            // Nothing in it can be verified without its header. It stays where it is, and is reported.
            Err(DatafileError::NoHeader { bytes, .. }) => found.damaged.push(DamageReport {
                path,
                offset: 0,
                bytes,
                key: None,
            }),
            Err(error) => return Err(error.into()),
        }
    }
    for report in &found.damaged {
        tracing::warn!(path = %report.path.display(), offset = report.offset, bytes = report.bytes, "a datafile is damaged");
    }
    Ok(found)
}
