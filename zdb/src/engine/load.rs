//! From the files of a directory to an index: snapshots where they can be believed, the datafiles themselves behind and without them.

use super::entry::{Counters, EntryHead};
use super::index::{Index, OFFSET_MAX, Physical, Place, entry_bytes_of};
use super::settings::StoredSettings;
use super::snapshot::{self, Known, Snapshot, Told};
use super::store::{DamageReport, file_header, file_name, file_number};
use super::{EngineError, Mode};
use crate::datafile::{
    Damage, Datafile, DatafileError, DatafileReader, FrameHead, FrameView, Tail,
};
use crate::media::Media;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// What a directory holds.
pub(super) struct Loaded {
    pub(super) index: Index,
    pub(super) counters: Counters,
    pub(super) damaged: Vec<DamageReport>,
    pub(super) readers: BTreeMap<u32, DatafileReader>,
    /// Up to where each datafile's snapshot speaks.
    pub(super) snapshots: BTreeMap<u32, u64>,
    /// The datafile with the highest number, if it may be written to.
    pub(super) last: Option<(u32, Datafile)>,
    pub(super) highest: u32,
}

/// Room for more keys than this is made only when they come.
const RESERVED_KEYS_MAX: u64 = 32 << 20;

/// An empty index for these settings.
pub(super) fn empty_index(
    media: &Arc<dyn Media>,
    dir: &Path,
    stored: &StoredSettings,
) -> Result<Index, EngineError> {
    let history = stored.settings.history_versions;
    match stored.settings.mode {
        Mode::User => Ok(Index::new_user(history)),
        Mode::Sequential => Index::new_sequential(media, dir, history),
    }
}

/// Puts what files say into an index.
struct Collector<'a> {
    dir: &'a Path,
    index: Index,
    counters: Counters,
    /// Entries of lower versions were flushed.
    flushed_before: u64,
    damaged: Vec<DamageReport>,
    /// Datafiles that are not read yet.
    files_left: u64,
    /// The index was made as large as it will probably become.
    has_room: bool,
    /// The first failure of the index itself.
    failed: Result<(), EngineError>,
}

impl Collector<'_> {
    fn entry(&mut self, known: &Known<'_>) {
        let head = &known.head;
        let sequential = self.index.is_sequential();
        let id = <[u8; 8]>::try_from(head.key).map_or(0, u64::from_le_bytes);
        self.counters.raise(Counters {
            next_version: head.version.saturating_add(1),
            // Every version took a slot at most, so in user mode versions are the upper bound of ids.
            next_id: if sequential {
                id.saturating_add(1)
            } else {
                head.version
            },
        });
        let file = known.place.file;
        if head.version < self.flushed_before {
            let bytes = entry_bytes_of(head.bytes(), known.value_bytes);
            self.index.add_bytes(file, bytes);
            return;
        }
        if !self.index.accepts(head.key) || known.place.offset > OFFSET_MAX {
            self.damaged.push(DamageReport {
                path: self.dir.join(file_name(file)),
                offset: known.place.offset,
                bytes: entry_bytes_of(head.bytes(), known.value_bytes),
                key: None,
            });
            return;
        }
        if let Err(error) = self.index.add(head.key, &physical(known), true)
            && self.failed.is_ok()
        {
            self.failed = Err(error);
        }
    }

    fn told(&mut self, told: &Told<'_>) {
        match told {
            Told::Entry(known) => self.entry(known),
            Told::Counters(counters) => self.counters.raise(*counters),
            Told::Other => {}
        }
    }

    fn frame(&mut self, file: u32, frame: FrameView<'_>) {
        let (prefix, value) = frame.payload.split_at(frame.prefix_bytes);
        let head = FrameHead {
            offset: frame.offset,
            kind: frame.kind,
            prefix,
            payload_bytes: u32::try_from(frame.payload.len()).unwrap_or(u32::MAX),
            rest_crc: crc32fast::hash(value),
        };
        self.told(&Known::tell(file, &head));
    }

    fn damage(&mut self, file: u32, path: &Path, damage: &Damage) {
        let known = damage
            .kind
            .zip(damage.prefix.as_deref())
            .zip(damage.payload_bytes);
        let mut key = None;
        if let Some(((kind, prefix), payload_bytes)) = known {
            // The key keeps pointing at its damaged value: asking for it is an error, not an older answer.
            let head = FrameHead {
                offset: damage.offset,
                kind,
                prefix,
                payload_bytes,
                rest_crc: 0,
            };
            self.told(&Known::tell(file, &head));
            key = EntryHead::decode(kind, prefix).map(|head| Bytes::copy_from_slice(head.key));
        }
        self.damaged.push(DamageReport {
            path: path.to_owned(),
            offset: damage.offset,
            bytes: damage.bytes,
            key,
        });
    }

    /// For a datafile of so many entries, and at the first one for all that follow.
    fn make_room(&mut self, entries: u64) {
        if !std::mem::replace(&mut self.has_room, true) {
            let expected = entries.saturating_mul(self.files_left);
            self.index.reserve(expected.min(RESERVED_KEYS_MAX));
        }
    }

    fn snapshot(&mut self, snapshot: &Snapshot) -> Result<(), DatafileError> {
        self.counters.raise(snapshot.counters());
        snapshot.visit(&mut |known| self.entry(known))
    }

    /// The history of keys: follow what their heads name, once every entry is known.
    fn history(
        &mut self,
        snapshots: &BTreeMap<u32, Snapshot>,
        readers: &BTreeMap<u32, DatafileReader>,
    ) -> Result<(), EngineError> {
        let flushed_before = self.flushed_before;
        let (index, failed) = (&mut self.index, &mut self.failed);
        let mut offer = |known: &Known<'_>| {
            if known.head.version >= flushed_before
                && index.accepts(known.head.key)
                && let Err(error) = index.offer(known.head.key, &physical(known))
                && failed.is_ok()
            {
                *failed = Err(error);
            }
        };
        for (&file, reader) in readers {
            let snapshot = snapshots.get(&file);
            if let Some(snapshot) = snapshot {
                snapshot.visit(&mut offer)?;
            }
            let mut heads = reader.heads(snapshot.map_or(0, Snapshot::covered));
            while let Some(head) = heads.next() {
                match head.map(|head| Known::tell(file, &head)) {
                    Ok(Told::Entry(known)) => offer(&known),
                    // Damage was reported by the first pass.
                    Ok(_) | Err(DatafileError::Damaged { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        std::mem::replace(&mut self.failed, Ok(()))?;
        self.index.settle()
    }
}

fn physical(known: &Known<'_>) -> Physical {
    Physical {
        version: known.head.version,
        previous: known.head.previous,
        place: Place { ..known.place },
        value_bytes: known.value_bytes,
        value_crc: known.value_crc,
        timestamp: known.head.timestamp,
        deleted: known.head.deleted,
    }
}

/// Open every datafile of a directory.
pub(super) fn load(
    media: &Arc<dyn Media>,
    dir: &Path,
    stored: &StoredSettings,
) -> Result<Loaded, EngineError> {
    let names = media.list(dir).map_err(EngineError::io("list", dir))?;
    let numbers: Vec<u32> = names.iter().filter_map(|name| file_number(name)).collect();
    remove_orphans(media, dir, &names, &numbers)?;
    let mut collector = Collector {
        dir,
        index: empty_index(media, dir, stored)?,
        counters: Counters::FIRST,
        flushed_before: stored.flushed_before,
        damaged: Vec::new(),
        files_left: 0,
        has_room: false,
        failed: Ok(()),
    };
    collector.counters.next_version = stored.flushed_before.max(1);
    let mut readers = BTreeMap::new();
    let mut snapshots = BTreeMap::new();
    let mut last = None;
    let mut files_left = numbers.len() as u64;
    for &number in &numbers {
        // Datafiles are much alike: the first with a snapshot tells how many keys there may be.
        collector.files_left = files_left;
        files_left -= 1;
        let path = dir.join(file_name(number));
        // Also one without entries is in use, until compaction finds that it is not.
        collector.index.add_bytes(number, 0);
        match open_file(media, &path, number, &mut collector) {
            Ok(opened) => {
                readers.insert(number, opened.datafile.reader());
                if let Some(snapshot) = opened.snapshot {
                    snapshots.insert(number, snapshot);
                }
                last = opened.writable.then_some((number, opened.datafile));
            }
            Err(DatafileError::NoHeader {
                never_born, bytes, ..
            }) => {
                collector.index.forget_file(number);
                no_header(media, &path, never_born, bytes, &mut collector)?;
            }
            Err(error) => return Err(error.into()),
        }
        std::mem::replace(&mut collector.failed, Ok(()))?;
    }
    if stored.settings.history_versions > 0 {
        collector.history(&snapshots, &readers)?;
    }
    collector.index.shrink();
    for report in &collector.damaged {
        tracing::warn!(path = %report.path.display(), offset = report.offset, bytes = report.bytes, "a datafile is damaged");
    }
    Ok(Loaded {
        index: collector.index,
        counters: collector.counters,
        damaged: collector.damaged,
        readers,
        snapshots: snapshots
            .into_iter()
            .map(|(file, snapshot)| (file, snapshot.covered()))
            .collect(),
        last,
        highest: numbers.last().copied().unwrap_or(0),
    })
}

/// Make the index anew from datafiles that are open already; nothing may be written to them meanwhile.
pub(super) fn reload(
    media: &Arc<dyn Media>,
    dir: &Path,
    stored: &StoredSettings,
    readers: &BTreeMap<u32, DatafileReader>,
) -> Result<(Index, Vec<DamageReport>), EngineError> {
    let mut collector = Collector {
        dir,
        index: empty_index(media, dir, stored)?,
        counters: Counters::FIRST,
        flushed_before: stored.flushed_before,
        damaged: Vec::new(),
        files_left: 0,
        has_room: false,
        failed: Ok(()),
    };
    // Every byte is read and verified: whoever reloads has a reason not to believe what is known.
    for (&file, reader) in readers {
        collector.index.add_bytes(file, 0);
        let report = reader.inspect(&mut |frame| collector.frame(file, frame))?;
        for damage in &report.damaged {
            collector.damage(file, reader.path(), damage);
        }
        std::mem::replace(&mut collector.failed, Ok(()))?;
    }
    if stored.settings.history_versions > 0 {
        collector.history(&BTreeMap::new(), readers)?;
    }
    Ok((collector.index, collector.damaged))
}

struct Opened {
    datafile: Datafile,
    snapshot: Option<Snapshot>,
    writable: bool,
}

fn open_file(
    media: &Arc<dyn Media>,
    path: &Path,
    number: u32,
    collector: &mut Collector<'_>,
) -> Result<Opened, DatafileError> {
    let header = file_header(number);
    let identified = Datafile::identify(media, path, header)?;
    let snapshot = Snapshot::open(media, collector.dir, number)
        .filter(|snapshot| snapshot.is_of(identified.salt));
    let covered = snapshot.as_ref().map_or(0, Snapshot::covered);
    let cut = identified.bytes < covered;
    if cut {
        collector.damaged.push(DamageReport {
            path: path.to_owned(),
            offset: identified.bytes,
            bytes: covered - identified.bytes,
            key: None,
        });
    }
    let from = covered.min(identified.bytes);
    let (datafile, report) =
        Datafile::open_behind(media, path, header, Tail::Keep, from, &mut |frame| {
            collector.frame(number, frame);
        })?;
    if report.torn_bytes_cut > 0 {
        tracing::info!(path = %path.display(), bytes = report.torn_bytes_cut, "cut writes that were never acknowledged");
    }
    for damage in &report.damaged {
        collector.damage(number, path, damage);
    }
    if let Some(snapshot) = &snapshot {
        collector.make_room(snapshot.entries());
        collector.snapshot(snapshot)?;
    }
    Ok(Opened {
        datafile,
        snapshot,
        writable: !cut,
    })
}

/// Nothing in a datafile can be verified without its header.
fn no_header(
    media: &Arc<dyn Media>,
    path: &Path,
    never_born: bool,
    bytes: u64,
    collector: &mut Collector<'_>,
) -> Result<(), EngineError> {
    if !never_born {
        // It stays where it is, and is reported.
        collector.damaged.push(DamageReport {
            path: path.to_owned(),
            offset: 0,
            bytes,
            key: None,
        });
        return Ok(());
    }
    media
        .remove(path)
        .map_err(EngineError::io("remove", path))?;
    media
        .sync_dir(collector.dir)
        .map_err(EngineError::io("sync directory", collector.dir))
}

/// Snapshots of datafiles that are gone.
fn remove_orphans(
    media: &Arc<dyn Media>,
    dir: &Path,
    names: &[String],
    numbers: &[u32],
) -> Result<(), EngineError> {
    for file in names.iter().filter_map(|name| snapshot::file_number(name)) {
        if !numbers.contains(&file) {
            snapshot::remove(media, dir, file)?;
        }
    }
    Ok(())
}
