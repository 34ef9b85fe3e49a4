//! Segments and the index over them.

use super::LogError;
use crate::durable;
use crate::ground::{Program, unknown_entry};
use crate::raft::proposed::{decode_entry, encode_entry};
use crate::raft::{LogEntry, LogId, Vote};
use bytes::Bytes;
use openraft::RaftLogId;
use qsfs_zdb::datafile::{
    Datafile, DatafileHeader, DatafileReader, FRAME_HEADER_BYTES, FrameParts, FrameView,
    ScanReport, SyncHandle, Tail,
};
use qsfs_zdb::media::Media;
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Size at which a new segment is begun.
pub const SEGMENT_BYTES: u64 = 16 << 20;

/// Entries kept decoded for replication and apply.
pub const CACHED_ENTRIES_MAX: usize = 2_048;

/// Encoded bytes of the entries kept decoded.
pub const CACHED_BYTES_MAX: usize = 2 << 20;

/// Version of the entry encoding, first byte of every entry frame.
const ENTRY_VERSION: u8 = 1;

const PURPOSE: [u8; 4] = *b"RLOG";
const KIND_ENTRY: u8 = 1;
const KIND_TRUNCATE: u8 = 2;

#[derive(Debug, Clone, Copy)]
struct Slot {
    segment: u64,
    offset: u64,
    bytes: u32,
    /// Encoded bytes of the entries since the log was opened up to this one, which counts: what lies between two is a difference.
    reached: u64,
    id: LogId,
}

/// So much of the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// Entries.
    pub entries: u64,
    /// Their encoded bytes.
    pub bytes: u64,
}

impl Amount {
    /// Is neither of its numbers above those of the other?
    pub fn within(self, most: Self) -> bool {
        self.entries <= most.entries && self.bytes <= most.bytes
    }
}

/// Bytes of the entries up to the newest.
fn reached(slots: &BTreeMap<u64, Slot>) -> u64 {
    slots.last_key_value().map_or(0, |(_, slot)| slot.reached)
}

#[derive(Debug, Default)]
struct Cache {
    entries: VecDeque<(u64, u32, LogEntry)>,
    bytes: usize,
}

impl Cache {
    fn push(&mut self, entry: LogEntry, bytes: u32) {
        self.bytes += bytes as usize;
        self.entries
            .push_back((entry.get_log_id().index, bytes, entry));
        while self.entries.len() > CACHED_ENTRIES_MAX || self.bytes > CACHED_BYTES_MAX {
            let Some((_, bytes, _)) = self.entries.pop_front() else {
                break;
            };
            self.bytes -= bytes as usize;
        }
    }

    fn cut(&mut self, keep: impl Fn(u64) -> bool) {
        self.entries.retain(|(index, ..)| keep(*index));
        self.bytes = self
            .entries
            .iter()
            .map(|(_, bytes, _)| *bytes as usize)
            .sum();
    }

    fn get(&self, index: u64) -> Option<&LogEntry> {
        let first = self.entries.front()?.0;
        let position = usize::try_from(index.checked_sub(first)?).ok()?;
        self.entries
            .get(position)
            .filter(|(found, ..)| *found == index)
            .map(|(_, _, entry)| entry)
    }
}

/// The log on disk and its index in memory.
#[derive(Debug)]
pub struct Segments {
    media: Arc<dyn Media>,
    dir: PathBuf,
    sealed: BTreeMap<u64, DatafileReader>,
    active: Datafile,
    slots: BTreeMap<u64, Slot>,
    cache: Cache,
    purged: Option<LogId>,
    segment_bytes: u64,
    program: Program,
}

impl Segments {
    /// Opens or creates the log of a directory, whose entries this program must know.
    pub fn open(
        media: Arc<dyn Media>,
        dir: &Path,
        segment_bytes: u64,
        program: Program,
    ) -> Result<Self, LogError> {
        let io = |step| {
            move |source| LogError::Io {
                step,
                path: dir.to_owned(),
                source,
            }
        };
        media.create_dir_all(dir).map_err(io("create"))?;
        let purged: Option<LogId> = durable::load(&*media, &dir.join("purged"))?;
        let mut ids: Vec<u64> = media
            .list(dir)
            .map_err(io("list"))?
            .iter()
            .filter_map(|name| u64::from_str_radix(name.strip_suffix(".log")?, 16).ok())
            .collect();
        ids.sort_unstable();
        let mut slots = BTreeMap::new();
        let mut sealed = BTreeMap::new();
        let mut active = None;
        for id in &ids {
            let last = Some(id) == ids.last();
            match open_segment(&media, dir, *id, program, &mut slots) {
                Ok(datafile) if last => active = Some(datafile),
                Ok(datafile) => {
                    sealed.insert(*id, datafile.reader());
                }
                // A crash while it was being created: nothing was ever in it.
                Err(LogError::Segment(qsfs_zdb::datafile::DatafileError::NoHeader {
                    never_born: true,
                    path,
                    ..
                })) if last => media
                    .remove(&path)
                    .map_err(io("remove an unborn segment of"))?,
                Err(error) => return Err(error),
            }
        }
        let active = match active {
            Some(mut active) => {
                reserve(&mut active, segment_bytes);
                active
            }
            None => create_segment(
                &media,
                dir,
                ids.last().map_or(1, |last| last + 1),
                segment_bytes,
            )?,
        };
        if let Some(purged) = purged {
            slots = slots.split_off(&(purged.index + 1));
        }
        check_consecutive(&slots, purged)?;
        Ok(Self {
            media,
            dir: dir.to_owned(),
            sealed,
            active,
            slots,
            cache: Cache::default(),
            purged,
            segment_bytes,
            program,
        })
    }

    /// How much lies behind one index, up to another.
    pub fn amount(&self, behind: Option<u64>, upto: u64) -> Amount {
        let newest = |upto: u64| self.slots.range(..=upto).next_back();
        let Some((last, end)) = newest(upto) else {
            return Amount::default();
        };
        let begin = match behind.and_then(newest) {
            Some((index, slot)) => (*index, slot.reached),
            None => {
                let first = self.slots.first_key_value();
                first.map_or((0, 0), |(index, slot)| {
                    let before = slot.reached - u64::from(slot.bytes);
                    (index.saturating_sub(1), before)
                })
            }
        };
        Amount {
            entries: last.saturating_sub(begin.0),
            bytes: end.reached.saturating_sub(begin.1),
        }
    }

    /// The newest index up to which no more than `most` lies behind `behind`, but at least the next one; none if there is none.
    pub fn fitting(&self, behind: u64, most: Amount) -> Option<u64> {
        let (last, _) = self.slots.range(behind + 1..).next_back()?;
        // What is fitting so far, and the first that may not be.
        let (mut upto, mut above) = (behind + 1, last + 1);
        while above - upto > 1 {
            let middle = upto + (above - upto) / 2;
            if self.amount(Some(behind), middle).within(most) {
                upto = middle;
            } else {
                above = middle;
            }
        }
        Some(upto)
    }

    /// The newest index up to which all may be purged, if of the entries up to `upto` as many are kept as `kept` allows in both of its
    /// numbers.
    pub fn purgeable(&self, upto: u64, kept: Amount) -> Option<u64> {
        let (newest, end) = self.slots.range(..=upto).next_back()?;
        let mut there = self.slots.range(..=upto).rev();
        let gone = there.find(|(index, slot)| {
            let before = slot.reached - u64::from(slot.bytes);
            newest - **index >= kept.entries || end.reached - before > kept.bytes
        });
        gone.map(|(index, _)| *index)
    }

    /// Appends entries; they are readable at once and durable after the returned handle was synced.
    pub fn append(&mut self, entries: Vec<LogEntry>) -> Result<SyncHandle, LogError> {
        let mut waiting: Vec<(LogEntry, Vec<u8>)> = Vec::with_capacity(entries.len());
        let mut bytes = 0;
        for entry in entries {
            if self.active.len() + bytes >= self.segment_bytes {
                self.write(std::mem::take(&mut waiting))?;
                bytes = 0;
                self.roll()?;
            }
            let body = encode_entry(&entry, vec![ENTRY_VERSION]);
            bytes += body.len() as u64 + FRAME_HEADER_BYTES;
            waiting.push((entry, body));
        }
        self.write(waiting)?;
        Ok(self.active.sync_handle())
    }

    /// All with one write, into the active segment.
    fn write(&mut self, entries: Vec<(LogEntry, Vec<u8>)>) -> Result<(), LogError> {
        if entries.is_empty() {
            return Ok(());
        }
        let bodies: Vec<[&[u8]; 1]> = entries.iter().map(|(_, body)| [body.as_slice()]).collect();
        let frames: Vec<_> = bodies
            .iter()
            .map(|parts| FrameParts {
                kind: KIND_ENTRY,
                prefix: &[],
                parts,
            })
            .collect();
        let offsets = self.active.append_batch(&frames)?;
        let segment = self.active.header().id;
        let mut reached = reached(&self.slots);
        for ((entry, body), offset) in entries.into_iter().zip(offsets) {
            let id = *entry.get_log_id();
            let bytes = u32::try_from(body.len()).expect("frames are at most 64 MiB");
            reached += u64::from(bytes);
            let slot = Slot {
                segment,
                offset,
                bytes,
                reached,
                id,
            };
            self.slots.insert(id.index, slot);
            self.cache.push(entry, bytes);
        }
        Ok(())
    }

    fn roll(&mut self) -> Result<(), LogError> {
        // The mark proves that all before it was durable: what does not verify later is damage, not a torn tail.
        self.active.mark()?;
        let id = self.active.header().id;
        let next = create_segment(&self.media, &self.dir, id + 1, self.segment_bytes)?;
        let full = std::mem::replace(&mut self.active, next);
        self.sealed.insert(id, full.reader());
        Ok(())
    }

    /// Voids everything from `index` on. Need not be durable at once: whatever is appended next stands behind it.
    pub fn truncate(&mut self, index: u64) -> Result<(), LogError> {
        self.active.append(KIND_TRUNCATE, &[&index.to_le_bytes()])?;
        self.slots.split_off(&index);
        self.cache.cut(|cached| cached < index);
        Ok(())
    }

    /// Forgets everything up to `upto`: the mark first, then whole segments.
    pub fn purge(&mut self, upto: LogId) -> Result<(), LogError> {
        if self.purged.is_some_and(|purged| purged.index >= upto.index) {
            return Ok(());
        }
        durable::store(&*self.media, &self.dir.join("purged"), &upto)?;
        self.purged = Some(upto);
        self.slots = self.slots.split_off(&(upto.index + 1));
        self.cache.cut(|cached| cached > upto.index);
        let needed = self
            .slots
            .values()
            .map(|slot| slot.segment)
            .min()
            .unwrap_or_else(|| self.active.header().id);
        while let Some(oldest) = self.sealed.first_entry()
            && *oldest.key() < needed
        {
            let reader = oldest.remove();
            let path = reader.path().to_owned();
            self.media.remove(&path).map_err(|source| LogError::Io {
                step: "remove",
                path,
                source,
            })?;
        }
        Ok(())
    }

    /// The entries of `[from, until)` that exist, at least one of them, then as many as fit `bytes_max`.
    pub fn read(&self, from: u64, until: u64, bytes_max: u64) -> Result<Vec<LogEntry>, LogError> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        if from >= until {
            return Ok(entries);
        }
        for (index, slot) in self.slots.range(from..until) {
            bytes += u64::from(slot.bytes);
            if !entries.is_empty() && bytes > bytes_max {
                break;
            }
            let entry = match self.cache.get(*index) {
                Some(entry) => entry.clone(),
                None => self.read_slot(slot)?,
            };
            entries.push(entry);
        }
        Ok(entries)
    }

    fn read_slot(&self, slot: &Slot) -> Result<LogEntry, LogError> {
        let frame = match self.sealed.get(&slot.segment) {
            Some(reader) => reader.read_sized(slot.offset, slot.bytes)?,
            None => self.active.reader().read_sized(slot.offset, slot.bytes)?,
        };
        decode(
            &segment_path(&self.dir, slot.segment),
            slot.offset,
            &frame.payload,
            self.program,
        )
    }

    /// Last purged and last present id.
    pub fn bounds(&self) -> (Option<LogId>, Option<LogId>) {
        let last = self.slots.last_key_value().map(|(_, slot)| slot.id);
        (self.purged, last.or(self.purged))
    }

    /// The id of a present entry, or of the newest purged one.
    pub fn id_at(&self, index: u64) -> Option<LogId> {
        let slot = self.slots.get(&index).map(|slot| slot.id);
        slot.or(self.purged.filter(|purged| purged.index == index))
    }

    /// Where the vote is kept.
    pub fn vote_path(&self) -> PathBuf {
        self.dir.join("vote")
    }

    /// The vote as last stored.
    pub fn load_vote(&self) -> Result<Option<Vote>, LogError> {
        Ok(durable::load(&*self.media, &self.vote_path())?)
    }

    /// The disk.
    pub fn media(&self) -> Arc<dyn Media> {
        Arc::clone(&self.media)
    }

    /// Segments on disk.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.sealed.len() + 1
    }
}

fn segment_path(dir: &Path, id: u64) -> PathBuf {
    dir.join(format!("{id:016x}.log"))
}

fn header(id: u64) -> DatafileHeader {
    DatafileHeader {
        purpose: PURPOSE,
        id,
    }
}

fn create_segment(
    media: &Arc<dyn Media>,
    dir: &Path,
    id: u64,
    segment_bytes: u64,
) -> Result<Datafile, LogError> {
    let mut segment = Datafile::create(media, &segment_path(dir, id), header(id))?;
    reserve(&mut segment, segment_bytes);
    Ok(segment)
}

/// Reserves the blocks of a whole segment: a sync that also has to store a new length costs several times one that does not.
fn reserve(segment: &mut Datafile, segment_bytes: u64) {
    if let Err(error) = segment.preallocate(segment_bytes) {
        tracing::warn!(%error, "no room is reserved for the Raft log; it goes on without");
    }
}

fn open_segment(
    media: &Arc<dyn Media>,
    dir: &Path,
    id: u64,
    program: Program,
    slots: &mut BTreeMap<u64, Slot>,
) -> Result<Datafile, LogError> {
    let path = segment_path(dir, id);
    let mut trouble = None;
    let mut visit = |frame: FrameView<'_>| {
        if trouble.is_none()
            && let Err(error) = replay(&path, id, frame, program, slots)
        {
            trouble = Some(error);
        }
    };
    let (datafile, report) =
        Datafile::open_visiting(media, &path, header(id), Tail::Cut, &mut visit)?;
    if let Some(damage) = report.damaged.first() {
        return Err(LogError::Damaged {
            path,
            offset: damage.offset,
            bytes: damage.bytes,
        });
    }
    match trouble {
        Some(error) => Err(error),
        None => Ok(datafile),
    }
}

/// Every segment and what stands in it; nothing is changed.
pub fn inspect(media: &Arc<dyn Media>, dir: &Path) -> Result<Vec<(PathBuf, String)>, LogError> {
    let mut found = Vec::new();
    if !media.exists(dir) {
        return Ok(found);
    }
    let names = media.list(dir).map_err(|source| LogError::Io {
        step: "list",
        path: dir.to_owned(),
        source,
    })?;
    for name in names {
        let Some(id) = name
            .strip_suffix(".log")
            .and_then(|id| u64::from_str_radix(id, 16).ok())
        else {
            continue;
        };
        let path = segment_path(dir, id);
        let mut slots = BTreeMap::new();
        let mut trouble = None;
        let mut visit = |frame: FrameView<'_>| {
            if let Err(error) = replay(&path, id, frame, Program::default(), &mut slots) {
                trouble.get_or_insert(error);
            }
        };
        let read = Datafile::inspect(media, &path, header(id), &mut visit);
        let text = match (read, trouble) {
            (Err(error), _) => format!("DAMAGED: {error}"),
            (_, Some(error)) => format!("DAMAGED: {error}"),
            (Ok((_, report)), None) => describe(&report, &slots),
        };
        found.push((path, text));
    }
    Ok(found)
}

fn describe(report: &ScanReport, slots: &BTreeMap<u64, Slot>) -> String {
    let ends = (slots.first_key_value(), slots.last_key_value());
    let entries = match ends {
        (Some((_, first)), Some((_, last))) => format!("entries {} to {}", first.id, last.id),
        _ => "no entries".to_owned(),
    };
    match report.damaged.first() {
        Some(damage) => format!(
            "DAMAGED at byte {} ({} bytes); {entries}",
            damage.offset, damage.bytes
        ),
        None if report.torn_bytes_cut > 0 => {
            format!(
                "{entries}; {} torn bytes at the end, never acknowledged",
                report.torn_bytes_cut
            )
        }
        None => format!("whole: {entries}"),
    }
}

fn replay(
    path: &Path,
    segment: u64,
    frame: FrameView<'_>,
    program: Program,
    slots: &mut BTreeMap<u64, Slot>,
) -> Result<(), LogError> {
    let bad = |reason: String| LogError::Frame {
        path: path.to_owned(),
        offset: frame.offset,
        reason,
    };
    match frame.kind {
        KIND_ENTRY => {
            let id = *decode(path, frame.offset, frame.payload, program)?.get_log_id();
            slots.split_off(&id.index);
            let bytes = u32::try_from(frame.payload.len()).map_err(|e| bad(e.to_string()))?;
            let slot = Slot {
                segment,
                offset: frame.offset,
                bytes,
                reached: reached(slots) + u64::from(bytes),
                id,
            };
            slots.insert(id.index, slot);
        }
        KIND_TRUNCATE => {
            let index: [u8; 8] = frame
                .payload
                .try_into()
                .map_err(|_| bad("a truncation is 8 bytes".into()))?;
            slots.split_off(&u64::from_le_bytes(index));
        }
        other => return Err(bad(format!("kind {other} is unknown: use a newer program"))),
    }
    Ok(())
}

pub(super) fn decode(
    path: &Path,
    offset: u64,
    payload: &[u8],
    program: Program,
) -> Result<LogEntry, LogError> {
    let bad = |reason: String| LogError::Frame {
        path: path.to_owned(),
        offset,
        reason,
    };
    match payload.split_first() {
        Some((&ENTRY_VERSION, body)) => {
            // The frame verified: nobody harmed it, somebody newer wrote it.
            let decoded = decode_entry(&Bytes::copy_from_slice(body));
            let entry = decoded.map_err(|error| bad(unknown_entry(&error.to_string())))?;
            program.check(&entry).map_err(bad)?;
            Ok(entry)
        }
        Some((version, _)) => Err(bad(unknown_entry(&format!("its version is {version}")))),
        None => Err(bad("an empty entry".into())),
    }
}

fn check_consecutive(slots: &BTreeMap<u64, Slot>, purged: Option<LogId>) -> Result<(), LogError> {
    let mut expected = purged.map(|purged| purged.index + 1);
    for index in slots.keys().copied() {
        if let Some(missing) = expected
            && missing != index
        {
            return Err(LogError::Hole {
                missing,
                next: index,
            });
        }
        expected = Some(index + 1);
    }
    Ok(())
}
