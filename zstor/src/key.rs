//! The volume key and what is derived from it.
//!
//! Purpose: one 32-byte secret per volume; everything else is derived with BLAKE3 `derive_key` and a context string
//! per use, over the volume key and all ids of one encoding attempt.
//!
//! Invariants: nothing here implements `Debug`, `Display` or `Serialize`; keys are zeroized when dropped. (The
//! expanded AES schedule inside `ring` is not: it lives as long as a `ChunkSealer` or `ChunkOpener`.)

use crate::id::{DatafileId, Epoch, Salt, Stream, VolumeId};
use zeroize::Zeroizing;

/// Context of the AES-256-GCM key of one encoding attempt. Never reused with another meaning.
pub(crate) const CHUNK_KEY_CONTEXT: &str = "QSFS 2026-11-23 v1 chunk AES-256-GCM key";
/// Context of the object header's MAC key.
pub(crate) const HEADER_MAC_CONTEXT: &str = "QSFS 2026-11-23 v1 object header BLAKE3 MAC key";

/// Length of a volume key.
pub const VOLUME_KEY_BYTES: usize = 32;

/// The secret of a volume. Whoever has it and the shards can read the volume; nobody else can.
pub struct VolumeKey(Zeroizing<[u8; VOLUME_KEY_BYTES]>);

impl VolumeKey {
    /// A fresh key. The randomness source must be fit for keys.
    pub fn generate(rng: &mut impl rand::CryptoRng) -> Self {
        let mut bytes = Zeroizing::new([0; VOLUME_KEY_BYTES]);
        rng.fill_bytes(bytes.as_mut());
        Self(bytes)
    }

    /// Takes over a key read from a recovery kit. The caller zeroizes its own copy.
    pub fn from_bytes(bytes: [u8; VOLUME_KEY_BYTES]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The raw key, for the recovery kit and for nothing else.
    pub fn expose(&self) -> &[u8; VOLUME_KEY_BYTES] {
        &self.0
    }

    /// One 32-byte key for one use (`context`) and one encoding attempt (`ids`).
    pub(crate) fn derive(&self, context: &str, ids: &ObjectIds) -> Zeroizing<[u8; 32]> {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        hasher.update(self.0.as_ref());
        hasher.update(&ids.to_bytes());
        Zeroizing::new(*hasher.finalize().as_bytes())
    }
}

impl Clone for VolumeKey {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// Whose object this is: all of it goes into every derived key, so no part can be exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectIds {
    /// Volume.
    pub volume: VolumeId,
    /// Stream of the datafile.
    pub stream: Stream,
    /// Datafile.
    pub datafile: DatafileId,
    /// Writer epoch of the attempt.
    pub epoch: Epoch,
    /// Drawn anew for every encoding attempt, a repeated one too.
    pub salt: Salt,
}

impl ObjectIds {
    /// Length of [`ObjectIds::to_bytes`].
    pub(crate) const BYTES: usize = 56;

    /// `volume 16 | salt 16 | datafile 8 | epoch 8 | stream 1 | zero 7`, little-endian.
    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[0..16].copy_from_slice(self.volume.as_bytes());
        out[16..32].copy_from_slice(self.salt.as_bytes());
        out[32..40].copy_from_slice(&self.datafile.0.to_le_bytes());
        out[40..48].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[48] = stream_byte(self.stream);
        out
    }
}

/// Stream as stored: 0 data, 1 meta.
pub(crate) const fn stream_byte(stream: Stream) -> u8 {
    match stream {
        Stream::Data => 0,
        Stream::Meta => 1,
    }
}

/// Reverse of [`stream_byte`].
pub(crate) const fn stream_from_byte(byte: u8) -> Option<Stream> {
    match byte {
        0 => Some(Stream::Data),
        1 => Some(Stream::Meta),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_ids_and_the_context_changes_the_derived_key() {
        let ids = ObjectIds {
            volume: VolumeId::from_bytes([1; 16]),
            stream: Stream::Data,
            datafile: DatafileId(2),
            epoch: Epoch(3),
            salt: Salt::from_bytes([4; 16]),
        };
        let key = VolumeKey::from_bytes([7; 32]);
        let others = [
            ObjectIds {
                volume: VolumeId::from_bytes([2; 16]),
                ..ids
            },
            ObjectIds {
                stream: Stream::Meta,
                ..ids
            },
            ObjectIds {
                datafile: DatafileId(3),
                ..ids
            },
            ObjectIds {
                epoch: Epoch(4),
                ..ids
            },
            ObjectIds {
                salt: Salt::from_bytes([5; 16]),
                ..ids
            },
        ];
        let base = key.derive(CHUNK_KEY_CONTEXT, &ids);
        for other in others {
            assert_ne!(*base, *key.derive(CHUNK_KEY_CONTEXT, &other), "{other:?}");
        }
        assert_ne!(*base, *key.derive(HEADER_MAC_CONTEXT, &ids));
        assert_ne!(
            *base,
            *VolumeKey::from_bytes([8; 32]).derive(CHUNK_KEY_CONTEXT, &ids)
        );
    }
}
