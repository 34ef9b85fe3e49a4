//! Opening the store, after a clean end or a crash.
//!
//! What was open when the machine (or the process) stopped is scanned: every journal record must parse and every byte of
//! data it names in an unsealed datafile must match the record's checksum. The journal is cut at the first record for
//! which that fails, so what remains is a prefix of what was done. Then everything that was open is sealed.
//!
//! Order of the repairs: journals are cut durably before data is sealed, so that a crash in between changes nothing.
//!
//! Damage in what was durable is never cut in silence: it is an error that names the file and says what to do.

mod verify;

use super::append::{KIND_RECORD, meta_header};
use super::catalog::{Catalog, LocalFile};
use super::layout::{DatafileName, Stage, StateDir};
use super::pages::{PAGE_BYTES, PageSums};
use super::synced_point::{self, SyncedPoint};
use super::{LocalStore, StoreEvent, StoreSettings, datafile_error, io_error, now_ms};
use crate::ports::{DataExtent, StoreError};
use qsfs_zdb::datafile::{Datafile, DatafileError, Tail};
use qsfs_zdb::media::{Media, MediaFile, OpenMode};
use qsfs_zstor::id::{DatafileId, Stream};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use tokio::sync::mpsc;

/// Bytes read at once while checksums are computed.
const SUM_BYTES: usize = 256 * PAGE_BYTES;

/// Why the store cannot be opened. Nothing was changed in the file that is named.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The disk refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A durable part of a journal that is not committed does not verify.
    #[error(
        "journal {path} is damaged at byte {offset} ({what}): operations from there on exist nowhere else and cannot be \
         replayed. Restore the file if you can; else move the state directory away and mount again with the recovery kit: \
         everything up to the last push is then there"
    )]
    DamagedJournal {
        /// Which file.
        path: String,
        /// Where.
        offset: u64,
        /// What does not verify.
        what: &'static str,
    },
    /// Bytes of a data datafile that were durable, and that a journal names, do not verify.
    #[error(
        "datafile {path} is damaged at byte {offset} ({what}): these bytes were durable, and exist nowhere else. Restore the \
         file if you can; else move the state directory away and mount again with the recovery kit: everything up to the last \
         push is then there"
    )]
    DamagedData {
        /// Which file.
        path: String,
        /// Where.
        offset: u64,
        /// What does not verify.
        what: &'static str,
    },
    /// A record verifies but cannot be read.
    #[error(
        "journal {path} holds a record this program cannot read ({reason}): use the program that wrote it"
    )]
    Record {
        /// Which file.
        path: String,
        /// Why.
        reason: String,
    },
}

/// Data extents of an encoded journal record.
pub type RecordExtents<'a> = &'a dyn Fn(&[u8]) -> Result<Vec<DataExtent>, String>;

/// What is known besides the state directory.
#[derive(Clone, Copy)]
pub struct OpenContext<'a> {
    /// Settings.
    pub settings: StoreSettings,
    /// Highest datafile id known to metad.
    pub last_known_id: DatafileId,
    /// Is this data datafile committed?
    pub committed: &'a dyn Fn(DatafileId) -> bool,
    /// Reads records.
    pub extents: RecordExtents<'a>,
}

/// What opening found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OpenReport {
    /// Records cut because they or their data never reached the disk.
    pub records_cut: u64,
    /// Bytes of torn journal tails.
    pub journal_bytes_cut: u64,
    /// Bytes of data that no record names.
    pub data_bytes_cut: u64,
    /// Why the journal was cut, naming file and place.
    pub cut_at: Option<String>,
    /// Datafiles that were open and are sealed now.
    pub sealed: Vec<DatafileId>,
}

/// An open store, its events, and what was found.
#[derive(Debug)]
pub struct Opened {
    /// The store.
    pub store: Arc<LocalStore>,
    /// Its events; those of files found sealed come first.
    pub events: mpsc::UnboundedReceiver<StoreEvent>,
    /// What was found.
    pub report: OpenReport,
}

struct OpenDatafile {
    path: PathBuf,
    file: Box<dyn MediaFile>,
    length: u64,
    used: u64,
}

struct Scan<'a> {
    media: Arc<dyn Media>,
    dir: StateDir,
    synced: Option<SyncedPoint>,
    context: OpenContext<'a>,
    catalog: Catalog,
    open_data: BTreeMap<DatafileId, OpenDatafile>,
    /// Data that sealed journals name: it was sealed before they were.
    named: BTreeSet<DatafileId>,
    report: OpenReport,
}

/// Opens the store of a state directory.
pub fn open(
    media: Arc<dyn Media>,
    dir: StateDir,
    context: OpenContext<'_>,
) -> Result<Opened, OpenError> {
    let datafiles = dir.datafiles();
    media
        .create_dir_all(&datafiles)
        .map_err(|source| io_error("create", &datafiles, source))?;
    let names = local_names(&media, &dir)?;
    let last_local = names.iter().map(|name| name.id).max().unwrap_or_default();
    let last = last_local.max(context.last_known_id);
    let synced = synced_point::read(&media, &dir)
        .map_err(|source| io_error("read", &dir.synced_point(), source))?;
    let mut scan = Scan {
        media: Arc::clone(&media),
        dir: dir.clone(),
        synced,
        context,
        catalog: Catalog::default(),
        open_data: BTreeMap::new(),
        named: BTreeSet::new(),
        report: OpenReport::default(),
    };
    scan.load_closed(&names, last)?;
    scan.load_open_data(&names)?;
    scan.check_synced(&names)?;
    let journals = scan.cut_journals(&names)?;
    scan.seal_data()?;
    scan.seal_journals(journals, last)?;
    // Nothing is open any more: what is sealed says itself where it ends.
    synced_point::forget(&media, &dir)
        .map_err(|source| io_error("remove", &dir.synced_point(), source))?;
    let Scan {
        catalog, report, ..
    } = scan;
    let sealed: Vec<Arc<LocalFile>> = catalog
        .all()
        .into_iter()
        .filter(|file| file.name.stage == Stage::Sealed)
        .collect();
    let (store, events) = LocalStore::assemble(media, dir, context.settings, last.next(), catalog);
    // Data first: a meta datafile enters the queue after all data it names.
    let (data, meta): (Vec<_>, Vec<_>) = sealed
        .into_iter()
        .partition(|file| file.name.stream == Stream::Data);
    for file in data.into_iter().chain(meta) {
        let _ = store.events.send(StoreEvent::Sealed(file));
    }
    Ok(Opened {
        store,
        events,
        report,
    })
}

/// Names of all local datafiles, by id.
pub fn local_names(
    media: &Arc<dyn Media>,
    dir: &StateDir,
) -> Result<Vec<DatafileName>, StoreError> {
    let path = dir.datafiles();
    if !media.exists(&path) {
        return Ok(Vec::new());
    }
    let listed = media
        .list(&path)
        .map_err(|source| io_error("list", &path, source))?;
    let mut names: Vec<DatafileName> = listed
        .iter()
        .filter_map(|name| DatafileName::parse(name))
        .collect();
    names.sort();
    Ok(names)
}

impl Scan<'_> {
    fn load_closed(&mut self, names: &[DatafileName], last: DatafileId) -> Result<(), OpenError> {
        for name in names.iter().filter(|name| name.stage != Stage::Open) {
            let path = self.dir.datafile(*name);
            let open = self.media.open(&path, OpenMode::Read);
            let bytes = open
                .and_then(|file| file.length())
                .map_err(|source| io_error("open", &path, source))?;
            let bytes = match name.stream {
                Stream::Data => self.sealed_bytes(name.id).unwrap_or(bytes),
                Stream::Meta => bytes,
            };
            let checkpoint = match (name.stream, name.stage) {
                (Stream::Meta, Stage::Sealed) => self.check_sealed_meta(name.id, &path)?,
                _ => false,
            };
            self.catalog.insert(LocalFile {
                name: *name,
                bytes,
                first_byte_ms: modified_ms(&path),
                barrier: last,
                checkpoint,
                dead: Vec::new(),
                last_used: AtomicU64::new(0),
            });
        }
        Ok(())
    }

    fn load_open_data(&mut self, names: &[DatafileName]) -> Result<(), OpenError> {
        for name in names
            .iter()
            .filter(|name| (name.stream, name.stage) == (Stream::Data, Stage::Open))
        {
            let path = self.dir.datafile(*name);
            let file = self
                .media
                .open(&path, OpenMode::ReadWrite)
                .map_err(|source| io_error("open", &path, source))?;
            let length = file
                .length()
                .map_err(|source| io_error("measure", &path, source))?;
            self.open_data.insert(
                name.id,
                OpenDatafile {
                    path,
                    file,
                    length,
                    used: 0,
                },
            );
        }
        Ok(())
    }

    /// Keeps the journals' longest prefix whose data verifies; returns what is left of each, in order.
    fn cut_journals(
        &mut self,
        names: &[DatafileName],
    ) -> Result<Vec<(DatafileId, Datafile)>, OpenError> {
        let mut kept = Vec::new();
        for name in names
            .iter()
            .filter(|name| (name.stream, name.stage) == (Stream::Meta, Stage::Open))
        {
            let path = self.dir.datafile(*name);
            if self.report.cut_at.is_some() {
                // What comes after a cut is no prefix any more.
                self.drop_journal(name.id, &path)?;
                continue;
            }
            if let Some(journal) = self.cut_journal(name.id, &path)? {
                kept.push((name.id, journal));
            }
        }
        Ok(kept)
    }

    fn cut_journal(&mut self, id: DatafileId, path: &Path) -> Result<Option<Datafile>, OpenError> {
        let mut cut: Option<u64> = None;
        let (mut kept, mut dropped, mut checkpoint) = (0_u64, 0_u64, false);
        let mut unreadable = None;
        let media = Arc::clone(&self.media);
        let opened =
            Datafile::open_visiting(&media, path, meta_header(id), Tail::Cut, &mut |frame| {
                checkpoint |= frame.kind != KIND_RECORD;
                if cut.is_some() || frame.kind != KIND_RECORD {
                    dropped += u64::from(cut.is_some());
                    return;
                }
                match (self.context.extents)(frame.payload) {
                    Ok(extents) if extents.iter().all(|extent| self.verifies(extent)) => {
                        kept += 1;
                        self.account(&extents);
                    }
                    Ok(_) => {
                        cut = Some(frame.offset);
                        dropped += 1;
                    }
                    Err(reason) => unreadable = Some(reason),
                }
            });
        let (journal, found) = match opened {
            Ok(opened) => opened,
            Err(DatafileError::NoHeader {
                never_born: true, ..
            }) => {
                self.remove(path)?;
                return Ok(None);
            }
            Err(error) => return Err(journal_error(path, error)),
        };
        let damage = found.damaged.first().map(|damage| damage.offset);
        if let Some(offset) = damage.filter(|offset| cut.is_none_or(|cut| *offset < cut)) {
            return Err(damaged_journal(path, offset, NOT_VERIFIED));
        }
        if let Some(reason) = unreadable {
            return Err(OpenError::Record {
                path: path.display().to_string(),
                reason,
            });
        }
        self.report.journal_bytes_cut += found.torn_bytes_cut;
        if checkpoint || kept == 0 {
            // A checkpoint that was not complete is taken again.
            if let Some(offset) = cut {
                self.note_cut(path, offset, dropped);
            }
            drop(journal);
            self.remove(path)?;
            return Ok(None);
        }
        let Some(offset) = cut else {
            return Ok(Some(journal));
        };
        self.note_cut(path, offset, dropped);
        self.rewrite(id, path, &journal, offset).map(Some)
    }

    fn note_cut(&mut self, path: &Path, offset: u64, records: u64) {
        self.report.records_cut += records;
        self.report.cut_at = Some(format!(
            "{} at byte {offset}: its data never reached the disk",
            path.display()
        ));
    }

    fn drop_journal(&mut self, id: DatafileId, path: &Path) -> Result<(), OpenError> {
        let mut records = 0;
        let inspected =
            Datafile::inspect(&self.media, path, meta_header(id), &mut |_| records += 1);
        drop(inspected);
        self.report.records_cut += records;
        self.remove(path)
    }

    fn remove(&self, path: &Path) -> Result<(), OpenError> {
        let removed = self
            .media
            .remove(path)
            .and_then(|()| self.media.sync_dir(&self.dir.datafiles()));
        Ok(removed.map_err(|source| io_error("remove", path, source))?)
    }

    /// Copies the frames before `end` into a new file that takes the journal's place.
    fn rewrite(
        &self,
        id: DatafileId,
        path: &Path,
        journal: &Datafile,
        end: u64,
    ) -> Result<Datafile, OpenError> {
        let fresh = path.with_extension("open.cut");
        if self.media.exists(&fresh) {
            self.remove(&fresh)?;
        }
        let fail = |error| OpenError::Store(datafile_error("cut", path, error));
        let mut copy = Datafile::create(&self.media, &fresh, meta_header(id)).map_err(fail)?;
        for frame in journal.frames(0) {
            let frame = frame.map_err(fail)?;
            if frame.offset >= end {
                break;
            }
            copy.append(frame.kind, &[&frame.payload]).map_err(fail)?;
        }
        copy.sync().map_err(fail)?;
        drop(copy);
        let renamed = self
            .media
            .rename(&fresh, path)
            .and_then(|()| self.media.sync_dir(&self.dir.datafiles()));
        renamed.map_err(|source| io_error("rename", &fresh, source))?;
        let (journal, _) = Datafile::open(&self.media, path, meta_header(id)).map_err(fail)?;
        Ok(journal)
    }

    fn account(&mut self, extents: &[DataExtent]) {
        for extent in extents {
            if let Some(open) = self.open_data.get_mut(&extent.datafile) {
                open.used = open.used.max(extent.offset + u64::from(extent.bytes));
            }
        }
    }

    fn seal_data(&mut self) -> Result<(), OpenError> {
        for (id, open) in std::mem::take(&mut self.open_data) {
            self.report.data_bytes_cut += open.length - open.used.min(open.length);
            if open.used == 0 {
                self.remove(&open.path)?;
                continue;
            }
            let fail = |step| move |source| (step, source);
            let sealed = open
                .file
                .truncate(open.used)
                .map_err(fail("truncate"))
                .and_then(|()| sums_of(open.file.as_ref(), open.used).map_err(fail("read")))
                .and_then(|sums| open.file.sync_data().map(|()| sums).map_err(fail("sync")));
            let sums = sealed.map_err(|(step, source)| io_error(step, &open.path, source))?;
            write_page_sums(&self.media, &self.dir, id, open.used, &sums)?;
            self.seal(id, Stream::Data, &open.path, open.used, DatafileId(0))?;
        }
        Ok(())
    }

    fn seal_journals(
        &mut self,
        journals: Vec<(DatafileId, Datafile)>,
        last: DatafileId,
    ) -> Result<(), OpenError> {
        for (id, mut journal) in journals {
            let path = journal.path().to_owned();
            journal
                .mark()
                .map_err(|error| datafile_error("seal", &path, error))?;
            self.seal(id, Stream::Meta, &path, journal.len(), last)?;
        }
        Ok(())
    }

    fn seal(
        &mut self,
        id: DatafileId,
        stream: Stream,
        path: &Path,
        bytes: u64,
        barrier: DatafileId,
    ) -> Result<(), OpenError> {
        let name = DatafileName {
            id,
            stream,
            stage: Stage::Sealed,
        };
        let first_byte_ms = modified_ms(path);
        let to = self.dir.datafile(name);
        let renamed = self
            .media
            .rename(path, &to)
            .and_then(|()| self.media.sync_dir(&self.dir.datafiles()));
        renamed.map_err(|source| io_error("rename", path, source))?;
        let last_used = AtomicU64::new(0);
        let (checkpoint, dead) = (false, Vec::new());
        self.catalog.insert(LocalFile {
            name,
            bytes,
            first_byte_ms,
            barrier,
            checkpoint,
            dead,
            last_used,
        });
        self.report.sealed.push(id);
        Ok(())
    }
}

fn sums_of(file: &dyn MediaFile, bytes: u64) -> std::io::Result<Vec<u32>> {
    let mut sums = PageSums::new();
    let mut buf = vec![0; SUM_BYTES];
    let mut at = 0;
    while at < bytes {
        let now = usize::try_from(bytes - at)
            .unwrap_or(usize::MAX)
            .min(SUM_BYTES);
        file.read_exact_at(&mut buf[..now], at)?;
        sums.append(&buf[..now]);
        at += now as u64;
    }
    Ok(sums.to_vec())
}

/// Writes the page checksums of a datafile beside it, durably.
pub fn write_page_sums(
    media: &Arc<dyn Media>,
    dir: &StateDir,
    id: DatafileId,
    bytes: u64,
    sums: &[u32],
) -> Result<(), StoreError> {
    let (path, parent) = (dir.page_sums(id), dir.datafiles());
    super::keeper::write_side_file(media, &path, bytes, sums)
        .map_err(|source| io_error("write", &path, source))?;
    media
        .sync_dir(&parent)
        .map_err(|source| io_error("sync directory", &parent, source))
}

const NOT_VERIFIED: &str = "a frame does not verify";
const CUT_OFF: &str = "its end is missing";

fn damaged_journal(path: &Path, offset: u64, what: &'static str) -> OpenError {
    OpenError::DamagedJournal {
        path: path.display().to_string(),
        offset,
        what,
    }
}

fn journal_error(path: &Path, error: DatafileError) -> OpenError {
    match error {
        DatafileError::Damaged { offset, .. } => damaged_journal(path, offset, NOT_VERIFIED),
        DatafileError::NoHeader { .. } | DatafileError::Foreign { .. } => {
            damaged_journal(path, 0, "its header does not verify")
        }
        other => OpenError::Store(datafile_error("open", path, other)),
    }
}

/// When the file was last written; the best that is known of its first byte after a restart.
fn modified_ms(path: &Path) -> u64 {
    std::fs::metadata(path)
        .and_then(|meta| meta.modified())
        .ok()
        .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
        .and_then(|since| u64::try_from(since.as_millis()).ok())
        .unwrap_or_else(now_ms)
}
