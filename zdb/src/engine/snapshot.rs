//! What is known of a complete datafile, kept beside it so that opening a namespace need not read the datafile: the index is the sum of
//! these snapshots and of what stands behind them. Byte rulers: `docs/format.md`, section "zdb datafile".
//!
//! A snapshot is only a shorter way to what the datafile says. It is bound to its datafile (random salt, length covered) and believed
//! only as a whole; one that is missing, cut short or damaged means that the datafile itself is read, and the snapshot made again.

use super::EngineError;
use super::entry::{Counters, EntryHead, KIND_COUNTERS};
use super::index::Place;
use crate::datafile::{Datafile, DatafileError, DatafileHeader, DatafileReader, FrameHead};
use crate::media::Media;
use std::path::Path;
use std::sync::Arc;

const PURPOSE: [u8; 4] = *b"ZDBI";
/// Entries, one after the other.
const KIND_ENTRIES: u8 = 1;
/// Which datafile it is of, and how much there must be; the last frame.
const KIND_END: u8 = 2;
/// A frame of entries is written at this size.
const BLOCK_BYTES: usize = 256 << 10;
const FIXED: usize = 32;

/// An entry of a datafile without its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Known<'a> {
    pub(super) head: EntryHead<'a>,
    pub(super) kind: u8,
    pub(super) place: Place,
    pub(super) value_bytes: u32,
    pub(super) value_crc: u32,
}

/// What a frame of a datafile says.
pub(super) enum Told<'a> {
    Entry(Known<'a>),
    Counters(Counters),
    Other,
}

impl<'a> Known<'a> {
    /// From a frame's head.
    pub(super) fn tell(file: u32, frame: &FrameHead<'a>) -> Told<'a> {
        if frame.kind == KIND_COUNTERS {
            return Counters::decode(frame.prefix).map_or(Told::Other, Told::Counters);
        }
        let Some(head) = EntryHead::decode(frame.kind, frame.prefix) else {
            return Told::Other;
        };
        let head_bytes = u32::try_from(head.bytes()).unwrap_or(u32::MAX);
        Told::Entry(Self {
            head,
            kind: frame.kind,
            place: Place {
                file,
                offset: frame.offset,
            },
            value_bytes: frame.payload_bytes.saturating_sub(head_bytes),
            value_crc: frame.rest_crc,
        })
    }

    fn encode(&self, to: &mut Vec<u8>) {
        to.push(self.kind);
        to.push(u8::try_from(self.head.key.len()).expect("keys have at most 255 bytes"));
        to.extend_from_slice(&[0; 2]);
        to.extend_from_slice(&self.value_bytes.to_le_bytes());
        to.extend_from_slice(&self.head.version.to_le_bytes());
        to.extend_from_slice(&self.head.timestamp.to_le_bytes());
        to.extend_from_slice(&self.value_crc.to_le_bytes());
        to.extend_from_slice(&self.place.offset.to_le_bytes());
        to.extend_from_slice(self.head.key);
        if let Some(previous) = self.head.previous {
            to.extend_from_slice(&previous.to_le_bytes());
        }
    }

    /// The first entry of a block, and what is behind it.
    fn decode(file: u32, bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        let long = |at: usize| -> Option<u64> {
            Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
        };
        let kind = *bytes.first()?;
        let mut end = FIXED + usize::from(*bytes.get(1)?);
        let key = bytes.get(FIXED..end)?;
        let mut previous = None;
        if kind == super::entry::KIND_SET_LINKED {
            previous = Some(long(end)?);
            end += 8;
        }
        let known = Self {
            head: EntryHead {
                version: long(8)?,
                previous,
                timestamp: word(16)?,
                deleted: kind == super::entry::KIND_DELETE,
                key,
            },
            kind,
            place: Place {
                file,
                offset: long(24)?,
            },
            value_bytes: word(4)?,
            value_crc: word(20)?,
        };
        Some((known, bytes.get(end..)?))
    }
}

/// The end of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct End {
    salt: u32,
    covered: u64,
    entries: u64,
    counters: Counters,
}

impl End {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(40);
        bytes.extend_from_slice(&self.salt.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.covered.to_le_bytes());
        bytes.extend_from_slice(&self.entries.to_le_bytes());
        bytes.extend_from_slice(&self.counters.encode());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let long = |at: usize| -> Option<u64> {
            Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
        };
        Some(Self {
            salt: u32::from_le_bytes(bytes.get(0..4)?.try_into().ok()?),
            covered: long(8)?,
            entries: long(16)?,
            counters: Counters::decode(bytes.get(24..)?)?,
        })
    }
}

/// A snapshot that verifies.
#[derive(Debug)]
pub(super) struct Snapshot {
    reader: DatafileReader,
    file: u32,
    end: End,
}

pub(super) fn file_name(file: u32) -> String {
    format!("{file:08x}.idx")
}

/// The number of the datafile that a snapshot of this name is of.
pub(super) fn file_number(name: &str) -> Option<u32> {
    super::store::number_before(name, ".idx")
}

fn header(file: u32) -> DatafileHeader {
    DatafileHeader {
        purpose: PURPOSE,
        id: u64::from(file),
    }
}

impl Snapshot {
    /// The snapshot of a datafile; `None` if there is none that can be believed.
    pub(super) fn open(media: &Arc<dyn Media>, dir: &Path, file: u32) -> Option<Self> {
        let path = dir.join(file_name(file));
        if !media.exists(&path) {
            return None;
        }
        let (mut end, mut behind_end, mut entries) = (None, false, 0);
        let opened = Datafile::inspect(media, &path, header(file), &mut |frame| {
            behind_end |= end.is_some();
            match frame.kind {
                KIND_END => end = End::decode(frame.payload),
                _ => entries += count(file, frame.payload).unwrap_or(u64::MAX / 2),
            }
        });
        let found = match (opened, end) {
            (Ok((reader, report)), Some(end))
                if report.damaged.is_empty() && !behind_end && entries == end.entries =>
            {
                Some(Self { reader, file, end })
            }
            _ => None,
        };
        if found.is_none() {
            tracing::info!(path = %path.display(), "not a whole snapshot: the datafile is read instead");
        }
        found
    }

    /// Is it of this datafile?
    pub(super) fn is_of(&self, salt: u32) -> bool {
        self.end.salt == salt
    }

    /// Up to which offset of the datafile it speaks.
    pub(super) fn covered(&self) -> u64 {
        self.end.covered
    }

    /// How many entries it holds.
    pub(super) fn entries(&self) -> u64 {
        self.end.entries
    }

    pub(super) fn counters(&self) -> Counters {
        self.end.counters
    }

    /// Show every entry, in order.
    pub(super) fn visit(&self, visit: &mut dyn FnMut(&Known<'_>)) -> Result<(), DatafileError> {
        for frame in self.reader.frames(0) {
            let frame = frame?;
            let mut rest = match frame.kind {
                KIND_ENTRIES => &frame.payload[..],
                _ => &[],
            };
            while let Some((known, behind)) = Known::decode(self.file, rest) {
                visit(&known);
                rest = behind;
            }
        }
        Ok(())
    }
}

/// Entries in a block; `None` if it does not end with one.
fn count(file: u32, mut block: &[u8]) -> Option<u64> {
    let mut entries = 0;
    while !block.is_empty() {
        block = Known::decode(file, block)?.1;
        entries += 1;
    }
    Some(entries)
}

/// Make the snapshot of a datafile, all of which is durable; `false` if the datafile has damage, which only its own reading reports.
pub(super) fn write(
    media: &Arc<dyn Media>,
    dir: &Path,
    file: u32,
    reader: &DatafileReader,
) -> Result<bool, EngineError> {
    let path = dir.join(file_name(file));
    remove(media, dir, file)?;
    let written = write_new(media, &path, file, reader);
    if !matches!(written, Ok(true)) {
        // Without its end it is not believed; only its room is lost if this fails too.
        let _ = media.remove(&path);
    }
    written
}

fn write_new(
    media: &Arc<dyn Media>,
    path: &Path,
    file: u32,
    reader: &DatafileReader,
) -> Result<bool, EngineError> {
    let mut snapshot = Datafile::create(media, path, header(file))?;
    let mut end = End {
        salt: reader.salt(),
        covered: reader.len(),
        entries: 0,
        counters: Counters::FIRST,
    };
    let mut block = Vec::with_capacity(BLOCK_BYTES + 1024);
    let mut heads = reader.heads(0);
    while let Some(head) = heads.next() {
        let head = match head {
            Ok(head) => head,
            Err(DatafileError::Damaged { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        match Known::tell(file, &head) {
            Told::Entry(known) => {
                known.encode(&mut block);
                end.entries += 1;
            }
            Told::Counters(counters) => end.counters.raise(counters),
            Told::Other => {}
        }
        if block.len() >= BLOCK_BYTES {
            snapshot.append(KIND_ENTRIES, &[&block])?;
            block.clear();
        }
    }
    if !block.is_empty() {
        snapshot.append(KIND_ENTRIES, &[&block])?;
    }
    snapshot.append(KIND_END, &[&end.encode()])?;
    snapshot.sync()?;
    Ok(true)
}

/// Remove the snapshot of a datafile, if there is one.
pub(super) fn remove(media: &Arc<dyn Media>, dir: &Path, file: u32) -> Result<(), EngineError> {
    let path = dir.join(file_name(file));
    if media.exists(&path) {
        media
            .remove(&path)
            .map_err(EngineError::io("remove", &path))?;
    }
    Ok(())
}
