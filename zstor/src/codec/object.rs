//! The object: a header of fixed size for its number of chunks, then the sealed chunks.
//!
//! ```text
//! object = fixed part (88) | chunk table (4 per chunk) | MAC (32) | chunk 0 | chunk 1 | ...
//! ```
//!
//! The header's size follows from plaintext size and chunk size, both in the record, so a writer reserves the room and
//! fills it in last, and a reader knows what to fetch first. The geometry is deliberately not in it: stripes can be
//! cut anew to another geometry by agents, who cannot make the MAC.
//!
//! Invariants: limits are checked before anything is allocated; nothing of a header is believed before its MAC.

use crate::codec::chunk::{CHUNK_BYTES_MAX, ChunkEntry, TAG_BYTES};
use crate::key::{HEADER_MAC_CONTEXT, ObjectIds, VolumeKey};
use crate::piece::array;
use std::ops::Range;

/// Most chunks of an object: 64 GiB of plaintext at 1 MiB chunks.
pub const CHUNKS_MAX: u32 = 1 << 16;
/// Version written now.
pub const OBJECT_VERSION: u16 = 1;

const MAGIC: [u8; 8] = *b"QSFSOBJ\0";
const IDS_AT: usize = 32;
const TABLE_AT: usize = IDS_AT + ObjectIds::BYTES;
const ENTRY_BYTES: usize = 4;
const MAC_BYTES: usize = 32;
/// Set in a table entry when the chunk is compressed.
const COMPRESSED: u32 = 1 << 31;

/// Why bytes are not (this) object's header, or a header cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// Chunk size 0 or above the limit, or too many chunks.
    #[error(
        "{plain_bytes} bytes in chunks of {chunk_bytes} are out of range: at most {CHUNKS_MAX} chunks of 1 to {CHUNK_BYTES_MAX} bytes"
    )]
    Size {
        /// Plaintext bytes.
        plain_bytes: u64,
        /// Chunk size.
        chunk_bytes: u32,
    },
    /// The table has not one entry per chunk.
    #[error("chunk table has {got} entries, {want} are right")]
    Entries {
        /// As given.
        got: usize,
        /// As needed.
        want: usize,
    },
    /// An entry is impossible.
    #[error("chunk {0} has an impossible length")]
    Entry(u32),
    /// Cut short.
    #[error("object header has {got} bytes, {want} are needed")]
    Length {
        /// As given.
        got: usize,
        /// As needed.
        want: usize,
    },
    /// Not an object, or of a later QSFS.
    #[error("not a QSFS object header of version {OBJECT_VERSION}")]
    Magic,
    /// Damaged, of another datafile or attempt, or the key is of another volume.
    #[error("object header does not authenticate: it is damaged, or the key is not this volume's")]
    Unauthentic,
    /// Authentic, but not what the record says.
    #[error("object header is authentic but is not the one the record names: {0} differs")]
    OtherObject(&'static str),
}

/// The header of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectHeader {
    ids: ObjectIds,
    chunk_bytes: u32,
    plain_bytes: u64,
    entries: Vec<ChunkEntry>,
    /// `offsets[i]` is where chunk `i` begins in the object; one more for the end.
    offsets: Vec<u64>,
}

impl ObjectHeader {
    /// Number of chunks, or an error when out of range.
    pub fn chunks_of(plain_bytes: u64, chunk_bytes: u32) -> Result<u32, ObjectError> {
        let size = ObjectError::Size {
            plain_bytes,
            chunk_bytes,
        };
        if chunk_bytes == 0 || chunk_bytes > CHUNK_BYTES_MAX {
            return Err(size);
        }
        match u32::try_from(plain_bytes.div_ceil(u64::from(chunk_bytes))) {
            Ok(chunks) if chunks <= CHUNKS_MAX => Ok(chunks),
            _ => Err(size),
        }
    }

    /// Bytes of the encoded header: what to reserve at the start of the object, and what to read first.
    pub const fn encoded_len(chunks: u32) -> usize {
        TABLE_AT + chunks as usize * ENTRY_BYTES + MAC_BYTES
    }

    /// Checks that there is one possible entry per chunk.
    pub fn new(
        ids: ObjectIds,
        chunk_bytes: u32,
        plain_bytes: u64,
        entries: Vec<ChunkEntry>,
    ) -> Result<Self, ObjectError> {
        let chunks = Self::chunks_of(plain_bytes, chunk_bytes)?;
        if entries.len() != chunks as usize {
            return Err(ObjectError::Entries {
                got: entries.len(),
                want: chunks as usize,
            });
        }
        let mut offsets = Vec::with_capacity(entries.len() + 1);
        let mut at = Self::encoded_len(chunks) as u64;
        for (chunk, entry) in (0..).zip(&entries) {
            let plain = plain_bytes_of(chunk, chunk_bytes, plain_bytes);
            let cipher = entry.cipher_bytes as usize;
            let possible = if entry.compressed {
                cipher > TAG_BYTES && cipher < plain + TAG_BYTES
            } else {
                cipher == plain + TAG_BYTES
            };
            if !possible {
                return Err(ObjectError::Entry(chunk));
            }
            offsets.push(at);
            at += u64::from(entry.cipher_bytes);
        }
        offsets.push(at);
        Ok(Self {
            ids,
            chunk_bytes,
            plain_bytes,
            entries,
            offsets,
        })
    }

    /// Whose object it is.
    pub const fn ids(&self) -> &ObjectIds {
        &self.ids
    }

    /// Plaintext bytes per chunk.
    pub const fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    /// Plaintext bytes in all.
    pub const fn plain_bytes(&self) -> u64 {
        self.plain_bytes
    }

    /// Bytes of the object: header and chunks.
    pub fn object_bytes(&self) -> u64 {
        *self.offsets.last().expect("one more than chunks")
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.entries.len()).expect("at most CHUNKS_MAX")
    }

    /// Table line of a chunk. Panics past the last one.
    pub fn entry(&self, chunk: u32) -> ChunkEntry {
        self.entries[chunk as usize]
    }

    /// Plaintext bytes of a chunk: the chunk size for all but the last.
    pub fn plain_bytes_of(&self, chunk: u32) -> usize {
        plain_bytes_of(chunk, self.chunk_bytes, self.plain_bytes)
    }

    /// Where chunks lie in the object, as one range. Panics when they are not chunks of this object.
    pub fn object_range(&self, chunks: Range<u32>) -> Range<u64> {
        self.offsets[chunks.start as usize]..self.offsets[chunks.end as usize]
    }

    /// The chunks that hold a plaintext range; what lies past the end is left out.
    pub fn chunks_covering(&self, plain: Range<u64>) -> Range<u32> {
        let end = plain.end.min(self.plain_bytes);
        if plain.start >= end {
            return 0..0;
        }
        let chunk_bytes = u64::from(self.chunk_bytes);
        let narrow = |chunk: u64| u32::try_from(chunk).expect("at most CHUNKS_MAX");
        narrow(plain.start / chunk_bytes)..narrow(end.div_ceil(chunk_bytes))
    }

    /// The encoded, authenticated header.
    pub fn encode(&self, key: &VolumeKey) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::encoded_len(self.chunks()));
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&OBJECT_VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.chunk_bytes.to_le_bytes());
        out.extend_from_slice(&self.plain_bytes.to_le_bytes());
        out.extend_from_slice(&self.chunks().to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.ids.to_bytes());
        for entry in &self.entries {
            let flag = if entry.compressed { COMPRESSED } else { 0 };
            out.extend_from_slice(&(entry.cipher_bytes | flag).to_le_bytes());
        }
        let mac = mac(key, &self.ids, &out);
        out.extend_from_slice(mac.as_bytes());
        out
    }

    /// Reads a header of the object that `ids`, `chunk_bytes` and `plain_bytes` name (they come from the record or from a piece).
    /// `bytes` may go on after the header.
    pub fn decode(
        key: &VolumeKey,
        ids: &ObjectIds,
        chunk_bytes: u32,
        plain_bytes: u64,
        bytes: &[u8],
    ) -> Result<Self, ObjectError> {
        let chunks = Self::chunks_of(plain_bytes, chunk_bytes)?;
        let want = Self::encoded_len(chunks);
        let bytes = bytes.get(..want).ok_or(ObjectError::Length {
            got: bytes.len(),
            want,
        })?;
        let (signed, tag) = bytes.split_at(want - MAC_BYTES);
        if signed[..8] != MAGIC || signed[8..10] != OBJECT_VERSION.to_le_bytes() {
            return Err(ObjectError::Magic);
        }
        // The comparison of two blake3::Hash takes constant time.
        if mac(key, ids, signed) != blake3::Hash::from_bytes(array(tag, 0)) {
            return Err(ObjectError::Unauthentic);
        }
        if decode_ids(signed) != ids.to_bytes() {
            return Err(ObjectError::OtherObject("an id"));
        }
        if u32::from_le_bytes(array(signed, 12)) != chunk_bytes {
            return Err(ObjectError::OtherObject("the chunk size"));
        }
        if u64::from_le_bytes(array(signed, 16)) != plain_bytes
            || u32::from_le_bytes(array(signed, 24)) != chunks
        {
            return Err(ObjectError::OtherObject("the plaintext size"));
        }
        let entries = signed[TABLE_AT..]
            .chunks_exact(ENTRY_BYTES)
            .map(|line| u32::from_le_bytes(array(line, 0)))
            .map(|line| ChunkEntry {
                cipher_bytes: line & !COMPRESSED,
                compressed: line & COMPRESSED != 0,
            })
            .collect();
        Self::new(*ids, chunk_bytes, plain_bytes, entries)
    }
}

fn decode_ids(signed: &[u8]) -> [u8; ObjectIds::BYTES] {
    array(signed, IDS_AT)
}

fn mac(key: &VolumeKey, ids: &ObjectIds, signed: &[u8]) -> blake3::Hash {
    blake3::keyed_hash(&key.derive(HEADER_MAC_CONTEXT, ids), signed)
}

fn plain_bytes_of(chunk: u32, chunk_bytes: u32, plain_bytes: u64) -> usize {
    let start = u64::from(chunk) * u64::from(chunk_bytes);
    let bytes = plain_bytes
        .saturating_sub(start)
        .min(u64::from(chunk_bytes));
    usize::try_from(bytes).expect("at most CHUNK_BYTES_MAX")
}
