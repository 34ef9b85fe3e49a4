//! What a 0-db entry looks like inside a frame. Byte rulers: `docs/format.md`, section "zdb datafile".

use bytes::Bytes;

/// Purpose in the file header of datafiles of a namespace.
pub(super) const PURPOSE: [u8; 4] = *b"ZDBD";
/// A value was set.
pub(super) const KIND_SET: u8 = 1;
/// A key was deleted.
pub(super) const KIND_DELETE: u8 = 2;
/// The counters of the namespace when this was written; every datafile begins with them.
pub(super) const KIND_COUNTERS: u8 = 3;
/// A value was set over another that is kept as history: the head names the version before.
pub(super) const KIND_SET_LINKED: u8 = 4;

/// Longest key of the protocol.
pub const KEY_BYTES_MAX: usize = 255;
/// Largest value of the protocol.
pub const VALUE_BYTES_MAX: usize = 8 << 20;

const FIXED: usize = 16;
const LINK: usize = 8;

/// The part of an entry that stands before its value, with a checksum of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EntryHead<'a> {
    /// Higher is newer; unique in a namespace except for copies made by compaction.
    pub(super) version: u64,
    /// The version before it ([`KIND_SET_LINKED`]).
    pub(super) previous: Option<u64>,
    /// Unix seconds.
    pub(super) timestamp: u32,
    pub(super) deleted: bool,
    pub(super) key: &'a [u8],
}

/// Bytes before the value.
pub(super) fn head_bytes(key_bytes: usize, linked: bool) -> usize {
    FIXED + key_bytes + if linked { LINK } else { 0 }
}

/// The address modulo 8 at which a large value of this key should begin, so that it can be written from where it lies: as it will in the
/// datafile (`datafile::layout`).
pub(crate) fn value_residue(key: &Bytes) -> usize {
    head_bytes(key.len(), false) % 8
}

impl<'a> EntryHead<'a> {
    pub(super) fn kind(&self) -> u8 {
        match (self.deleted, self.previous) {
            (true, _) => KIND_DELETE,
            (false, None) => KIND_SET,
            (false, Some(_)) => KIND_SET_LINKED,
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED + LINK + self.key.len());
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&self.timestamp.to_le_bytes());
        bytes.push(u8::try_from(self.key.len()).expect("keys are checked to be at most 255 bytes"));
        bytes.extend_from_slice(&[0; 3]);
        bytes.extend_from_slice(self.key);
        if let Some(previous) = self.previous {
            bytes.extend_from_slice(&previous.to_le_bytes());
        }
        bytes
    }

    /// From the first bytes of a payload (or its whole prefix); `None` if the kind is not that of an entry.
    pub(super) fn decode(kind: u8, bytes: &'a [u8]) -> Option<Self> {
        if !matches!(kind, KIND_SET | KIND_DELETE | KIND_SET_LINKED) {
            return None;
        }
        let key_end = FIXED + usize::from(*bytes.get(12)?);
        let previous = match kind {
            KIND_SET_LINKED => {
                let link = bytes.get(key_end..key_end + LINK)?;
                Some(u64::from_le_bytes(link.try_into().ok()?))
            }
            _ => None,
        };
        Some(Self {
            version: u64::from_le_bytes(bytes.get(0..8)?.try_into().ok()?),
            previous,
            timestamp: u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?),
            deleted: kind == KIND_DELETE,
            key: bytes.get(FIXED..key_end)?,
        })
    }

    /// Its own length.
    pub(super) fn bytes(&self) -> usize {
        head_bytes(self.key.len(), self.previous.is_some())
    }
}

/// Numbers that must never go back, whatever compaction removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) next_version: u64,
    /// The next id of a namespace in sequential mode.
    pub(super) next_id: u64,
}

impl Counters {
    pub(super) const FIRST: Self = Self {
        next_version: 1,
        next_id: 0,
    };

    pub(super) fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.next_version.to_le_bytes());
        bytes[8..].copy_from_slice(&self.next_id.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            next_version: u64::from_le_bytes(bytes.get(0..8)?.try_into().ok()?),
            next_id: u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?),
        })
    }

    pub(super) fn raise(&mut self, other: Self) {
        self.next_version = self.next_version.max(other.next_version);
        self.next_id = self.next_id.max(other.next_id);
    }
}
