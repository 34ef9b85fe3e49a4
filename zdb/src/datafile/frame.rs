//! Encoding of the file header and the frame header. The byte rulers are in `docs/format.md`.

use super::{DatafileError, DatafileHeader, FrameParts};

/// Bytes before the first frame: the file header, twice.
pub(super) const FILE_HEADER_BYTES: u64 = 64;
const FILE_HEADER_COPY: usize = 32;
const FILE_MAGIC: [u8; 8] = *b"QSFSDATA";
/// The format version written.
pub(super) const VERSION: u32 = 1;

/// Bytes of a frame before its payload.
pub const FRAME_HEADER_BYTES: u64 = 32;
/// [`FRAME_HEADER_BYTES`] as an index.
pub(super) const FRAME_HEADER: usize = 32;
/// The largest payload of a frame: 64 MiB.
pub const FRAME_PAYLOAD_MAX: u64 = 64 << 20;
const FRAME_MAGIC: [u8; 4] = *b"QFRM";
/// Frames begin at multiples of this.
pub(super) const ALIGNMENT: u64 = 8;
/// [`ALIGNMENT`] as an index.
pub(super) const ALIGNMENT_STEP: usize = 8;

/// A frame over bytes that were torn and never acknowledged; users never see it.
pub const KIND_VOID: u8 = 0;
/// A frame that only says that everything before it was durable; users never see it.
pub const KIND_MARK: u8 = 255;
/// The highest kind a user may append.
pub(super) const KIND_USER_MAX: u8 = 239;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileHeader {
    pub(super) header: DatafileHeader,
    pub(super) salt: u32,
}

/// What reading a file header found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FileHeaderRead {
    Valid(FileHeader),
    OtherVersion(u32),
    Invalid(&'static str),
}

impl FileHeader {
    pub(super) fn encode(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        let (first, second) = bytes.split_at_mut(FILE_HEADER_COPY);
        first[0..8].copy_from_slice(&FILE_MAGIC);
        first[8..12].copy_from_slice(&VERSION.to_le_bytes());
        first[12..16].copy_from_slice(&self.header.purpose);
        first[16..24].copy_from_slice(&self.header.id.to_le_bytes());
        first[24..28].copy_from_slice(&self.salt.to_le_bytes());
        let crc = crc32fast::hash(&first[..28]);
        first[28..32].copy_from_slice(&crc.to_le_bytes());
        second.copy_from_slice(first);
        bytes
    }

    /// Either copy will do.
    pub(super) fn decode(bytes: &[u8; 64]) -> FileHeaderRead {
        let (first, second) = bytes.split_at(FILE_HEADER_COPY);
        match Self::decode_copy(first) {
            FileHeaderRead::Invalid(reason) => match Self::decode_copy(second) {
                FileHeaderRead::Invalid(_) => FileHeaderRead::Invalid(reason),
                found => found,
            },
            found => found,
        }
    }

    fn decode_copy(copy: &[u8]) -> FileHeaderRead {
        if copy[0..8] != FILE_MAGIC {
            return FileHeaderRead::Invalid("wrong magic");
        }
        if u32_at(copy, 28) != crc32fast::hash(&copy[..28]) {
            return FileHeaderRead::Invalid("checksum does not match");
        }
        let version = u32_at(copy, 8);
        if version != VERSION {
            return FileHeaderRead::OtherVersion(version);
        }
        let mut purpose = [0; 4];
        purpose.copy_from_slice(&copy[12..16]);
        FileHeaderRead::Valid(Self {
            header: DatafileHeader {
                purpose,
                id: u64_at(copy, 16),
            },
            salt: u32_at(copy, 24),
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameHeader {
    pub(super) kind: u8,
    pub(super) prefix_bytes: u16,
    pub(super) payload_bytes: u32,
    pub(super) payload_crc: u32,
    pub(super) prefix_crc: u32,
    /// The file was durable up to here when the frame was written.
    pub(super) durable: u64,
}

impl FrameHeader {
    /// `rest_crc`: CRC-32 of all parts, if the caller knows it already.
    pub(super) fn of(
        frame: &FrameParts<'_>,
        rest_crc: Option<u32>,
        durable: u64,
    ) -> Result<Self, DatafileError> {
        let rest_bytes = frame.parts.iter().map(|p| p.len()).sum::<usize>();
        let bytes = frame.prefix.len() + rest_bytes;
        let too_large = || DatafileError::TooLarge {
            bytes: bytes as u64,
        };
        if bytes as u64 > FRAME_PAYLOAD_MAX {
            return Err(too_large());
        }
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(frame.prefix);
        let prefix_crc = hasher.clone().finalize();
        match rest_crc {
            Some(crc) => hasher.combine(&crc32fast::Hasher::new_with_initial_len(
                crc,
                rest_bytes as u64,
            )),
            None => frame.parts.iter().for_each(|part| hasher.update(part)),
        }
        Ok(Self {
            kind: frame.kind,
            prefix_bytes: u16::try_from(frame.prefix.len()).map_err(|_| too_large())?,
            payload_bytes: u32::try_from(bytes).map_err(|_| too_large())?,
            payload_crc: hasher.finalize(),
            prefix_crc,
            durable,
        })
    }

    /// Header, payload and padding.
    pub(super) fn frame_bytes(&self) -> u64 {
        frame_bytes(u64::from(self.payload_bytes))
    }

    pub(super) fn encode(&self, salt: u32, offset: u64) -> [u8; FRAME_HEADER] {
        let mut bytes = [0; FRAME_HEADER];
        bytes[0..4].copy_from_slice(&FRAME_MAGIC);
        bytes[4] = self.kind;
        bytes[6..8].copy_from_slice(&self.prefix_bytes.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.payload_crc.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.prefix_crc.to_le_bytes());
        bytes[20..28].copy_from_slice(&self.durable.to_le_bytes());
        let crc = header_crc(&bytes, salt, offset);
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `None` if these bytes are not the header of a frame of this file at this offset.
    pub(super) fn decode(bytes: &[u8], salt: u32, offset: u64) -> Option<Self> {
        let bytes: &[u8; FRAME_HEADER] = bytes.get(..FRAME_HEADER)?.try_into().ok()?;
        if bytes[0..4] != FRAME_MAGIC || u32_at(bytes, 28) != header_crc(bytes, salt, offset) {
            return None;
        }
        let header = Self {
            kind: bytes[4],
            prefix_bytes: u16::from_le_bytes([bytes[6], bytes[7]]),
            payload_bytes: u32_at(bytes, 8),
            payload_crc: u32_at(bytes, 12),
            prefix_crc: u32_at(bytes, 16),
            durable: u64_at(bytes, 20),
        };
        let sane = u64::from(header.payload_bytes) <= FRAME_PAYLOAD_MAX
            && u32::from(header.prefix_bytes) <= header.payload_bytes;
        sane.then_some(header)
    }

    /// As [`FrameHeader::decode`] for bytes of which exactly one bit is wrong: what the frame was, though not that any of it can be trusted.
    pub(super) fn decode_flipped(bytes: &[u8], salt: u32, offset: u64) -> Option<Self> {
        let bytes: [u8; FRAME_HEADER] = bytes.get(..FRAME_HEADER)?.try_into().ok()?;
        one_bit_flipped(&bytes).find_map(|told| Self::decode(&told, salt, offset))
    }

    pub(super) fn verify_payload(&self, payload: &[u8]) -> bool {
        payload.len() == self.payload_bytes as usize && crc32fast::hash(payload) == self.payload_crc
    }

    pub(super) fn verify_prefix(&self, prefix: &[u8]) -> bool {
        prefix.len() == usize::from(self.prefix_bytes) && crc32fast::hash(prefix) == self.prefix_crc
    }

    /// CRC-32 of the payload behind the prefix, from the two that are known: `crc(a ++ b) = shift(crc(a), len(b)) ^ crc(b)`.
    pub(super) fn rest_crc(&self) -> u32 {
        let rest = u64::from(self.payload_bytes) - u64::from(self.prefix_bytes);
        let mut shifted = crc32fast::Hasher::new_with_initial(self.prefix_crc);
        shifted.combine(&crc32fast::Hasher::new_with_initial_len(0, rest));
        shifted.finalize() ^ self.payload_crc
    }

    /// The prefix, if it verifies although the payload does not; also if one bit of it is wrong.
    pub(super) fn verified_prefix(&self, payload: &[u8]) -> Option<Vec<u8>> {
        let prefix = payload.get(..usize::from(self.prefix_bytes))?;
        let verifies = |told: &Vec<u8>| crc32fast::hash(told) == self.prefix_crc;
        let told = prefix.to_vec();
        if verifies(&told) {
            return Some(told);
        }
        if prefix.len() > FLIPPED_PREFIX_MAX {
            return None;
        }
        one_bit_flipped(prefix).find(verifies)
    }
}

/// Longer prefixes are not searched for a flipped bit: that takes as long as their length squared.
const FLIPPED_PREFIX_MAX: usize = 512;

/// These bytes with each of their bits flipped in turn.
fn one_bit_flipped(bytes: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
    (0..bytes.len() * 8).map(|bit| {
        let mut flipped = bytes.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        flipped
    })
}

/// Does the frame magic stand here? Cheap filter for the search after damage.
pub(super) fn has_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(&FRAME_MAGIC)
}

/// Header, payload and padding of a frame.
pub(crate) fn frame_bytes(payload_bytes: u64) -> u64 {
    (FRAME_HEADER_BYTES + payload_bytes).next_multiple_of(ALIGNMENT)
}

/// The zeros after a payload.
pub(super) fn padding(payload_bytes: u64) -> &'static [u8] {
    let zeros: &'static [u8; 8] = &[0; 8];
    match payload_bytes % ALIGNMENT {
        0 => &zeros[..0],
        1 => &zeros[..7],
        2 => &zeros[..6],
        3 => &zeros[..5],
        4 => &zeros[..4],
        5 => &zeros[..3],
        6 => &zeros[..2],
        _ => &zeros[..1],
    }
}

/// Bound to file and place, so that a copy elsewhere does not pass.
fn header_crc(bytes: &[u8; FRAME_HEADER], salt: u32, offset: u64) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&salt.to_le_bytes());
    hasher.update(&offset.to_le_bytes());
    hasher.update(&bytes[..28]);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
