//! What a 0-db entry looks like inside a frame. Byte rulers: `docs/format.md`, section "zdb datafile".

/// Purpose in the file header of datafiles of a namespace.
pub(super) const PURPOSE: [u8; 4] = *b"ZDBD";
/// A value was set.
pub(super) const KIND_SET: u8 = 1;
/// A key was deleted.
pub(super) const KIND_DELETE: u8 = 2;
/// The counters of the namespace when this was written; every datafile begins with them.
pub(super) const KIND_COUNTERS: u8 = 3;

/// Longest key of the protocol.
pub const KEY_BYTES_MAX: usize = 255;
/// Largest value of the protocol.
pub const VALUE_BYTES_MAX: usize = 8 << 20;

const FIXED: usize = 16;

/// The part of an entry that stands before its value, with a checksum of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EntryHead<'a> {
    /// Higher is newer; unique in a namespace except for copies made by compaction.
    pub(super) version: u64,
    /// Unix seconds.
    pub(super) timestamp: u32,
    pub(super) key: &'a [u8],
}

/// Bytes before the value.
pub(super) fn head_bytes(key: &[u8]) -> usize {
    FIXED + key.len()
}

impl<'a> EntryHead<'a> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED + self.key.len());
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&self.timestamp.to_le_bytes());
        bytes.push(u8::try_from(self.key.len()).expect("keys are checked to be at most 255 bytes"));
        bytes.extend_from_slice(&[0; 3]);
        bytes.extend_from_slice(self.key);
        bytes
    }

    /// From the first bytes of a payload (or its whole prefix).
    pub(super) fn decode(bytes: &'a [u8]) -> Option<Self> {
        let key_bytes = usize::from(*bytes.get(12)?);
        Some(Self {
            version: u64::from_le_bytes(bytes.get(0..8)?.try_into().ok()?),
            timestamp: u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?),
            key: bytes.get(FIXED..FIXED + key_bytes)?,
        })
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
