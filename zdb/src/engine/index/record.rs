//! What the index knows of an entry, in 32 bytes.

/// Where a physical entry stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::engine) struct Place {
    pub(in crate::engine) file: u32,
    pub(in crate::engine) offset: u64,
}

/// A physical entry and how many others of its key there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Entry {
    pub(in crate::engine) version: u64,
    pub(in crate::engine) place: Place,
    /// At most [`crate::engine::VALUE_BYTES_MAX`].
    pub(in crate::engine) value_bytes: u32,
    pub(in crate::engine) value_crc: u32,
    pub(in crate::engine) timestamp: u32,
    pub(in crate::engine) deleted: bool,
    /// Its head names the version before it.
    pub(in crate::engine) linked: bool,
    pub(super) stale: u32,
}

/// Bytes of an encoded entry.
pub(super) const RECORD_BYTES: usize = 32;
/// Where the offsets of frames stop: they are kept in units of their alignment, as 32 bits.
pub(in crate::engine) const OFFSET_MAX: u64 = (u32::MAX as u64) * ALIGNMENT;
const ALIGNMENT: u64 = 8;
const PRESENT: u32 = 1 << 31;
const DELETED: u32 = 1 << 30;
const LINKED: u32 = 1 << 29;
const VALUE_BYTES: u32 = LINKED - 1;

impl Entry {
    /// `version 8 | file 4 | offset / 8: 4 | flags and value bytes 4 | value crc 4 | timestamp 4 | stale 4`; all zeros is no entry.
    pub(super) fn encode(&self) -> [u8; RECORD_BYTES] {
        assert!(self.place.offset <= OFFSET_MAX && self.value_bytes <= VALUE_BYTES);
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let units = u32::try_from(self.place.offset / ALIGNMENT).unwrap_or(u32::MAX);
        let sized =
            self.value_bytes | PRESENT | flag(self.deleted, DELETED) | flag(self.linked, LINKED);
        let mut bytes = [0; RECORD_BYTES];
        bytes[0..8].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.place.file.to_le_bytes());
        bytes[12..16].copy_from_slice(&units.to_le_bytes());
        bytes[16..20].copy_from_slice(&sized.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.value_crc.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.timestamp.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.stale.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        let sized = word(16)?;
        if sized & PRESENT == 0 {
            return None;
        }
        Some(Self {
            version: u64::from_le_bytes(bytes.get(0..8)?.try_into().ok()?),
            place: Place {
                file: word(8)?,
                offset: u64::from(word(12)?) * ALIGNMENT,
            },
            value_bytes: sized & VALUE_BYTES,
            value_crc: word(20)?,
            timestamp: word(24)?,
            deleted: sized & DELETED != 0,
            linked: sized & LINKED != 0,
            stale: word(28)?,
        })
    }

    /// Must the entry stay on disk? A tombstone only while there is something that would come back without it.
    pub(super) fn is_needed(&self) -> bool {
        !self.deleted || self.stale > 0
    }
}
