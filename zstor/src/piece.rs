//! Pieces: what is stored under one 0-db key. A piece describes and verifies itself without any key.
//!
//! ```text
//! value = header (160 bytes) | payload (1 byte to 1 MiB of one shard)
//! ```
//!
//! Every piece names its whole stripe, so records can be rebuilt from pieces alone. The byte ruler is in
//! `docs/format.md`; golden files hold it still.
//!
//! Invariants: decoding never panics, never allocates, and accepts exactly what encoding makes.

use crate::codec::{Layout, LayoutError, Stripe, StripeError};
use crate::id::{DatafileId, Epoch, Salt, VolumeId};
use crate::key::{ObjectIds, stream_byte, stream_from_byte};
use crate::policy::{Geometry, PolicyError};
use std::fmt;

/// Bytes before the payload.
pub const PIECE_HEADER_BYTES: usize = 160;
/// Most payload bytes of a piece.
pub const PIECE_BYTES_MAX: usize = 1 << 20;
/// Version written now.
pub const PIECE_VERSION: u16 = 1;

const MAGIC: [u8; 8] = *b"QSFSPIEC";
/// zstd or stored, AES-256-GCM, Reed-Solomon over GF(2^8) with polynomial 0x11d, systematic Vandermonde.
const CODEC: u8 = 1;
const HASH_AT: usize = 104;
const ZERO_AT: usize = 136;
const CRC_AT: usize = 156;

/// Why bytes are not a (right) piece.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PieceError {
    /// Too short, or not the length its header tells.
    #[error("piece has {got} bytes, {want} are right")]
    Length {
        /// As given.
        got: usize,
        /// As needed.
        want: usize,
    },
    /// Not written by QSFS.
    #[error("not a QSFS piece (magic does not match)")]
    Magic,
    /// The header's checksum does not match.
    #[error("piece header is damaged (checksum does not match)")]
    HeaderDamaged,
    /// Of a later QSFS.
    #[error("piece has version {0}; this QSFS reads version {PIECE_VERSION}: upgrade it")]
    Version(u16),
    /// A field is impossible although the checksum matches.
    #[error("piece header is invalid: {0} is out of range")]
    Field(&'static str),
    /// Sizes contradict each other.
    #[error("piece header is invalid: {0}")]
    Layout(#[from] LayoutError),
    /// Geometry out of range.
    #[error("piece header is invalid: {0}")]
    Geometry(#[from] PolicyError),
    /// Stripe sizes contradict each other.
    #[error("piece header is invalid: {0}")]
    Stripe(#[from] StripeError),
    /// The payload's hash does not match.
    #[error("piece payload is damaged (BLAKE3 does not match)")]
    PayloadDamaged,
    /// A sound piece, but not the one that was asked for.
    #[error("found piece {found} where {wanted} belongs")]
    Misplaced {
        /// What the header says.
        found: PieceKey,
        /// What was asked for.
        wanted: PieceKey,
    },
    /// The right name, but of a stripe with other sizes.
    #[error("piece {0} tells other stripe sizes than its record")]
    OtherStripe(PieceKey),
}

/// Name of a piece: its 0-db key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PieceKey {
    /// Volume.
    pub volume: VolumeId,
    /// Datafile.
    pub datafile: DatafileId,
    /// Salt of the encoding attempt: pieces of two attempts never share a key.
    pub salt: Salt,
    /// Shard.
    pub shard: u32,
    /// Piece of the shard.
    pub piece: u32,
}

impl PieceKey {
    /// Length of the key.
    pub const BYTES: usize = 48;
    const PREFIX: [u8; 2] = *b"q1";

    /// `"q1" | volume 16 | datafile 8 | salt 16 | shard 2 | piece 4`; numbers big-endian, so that keys sort by datafile, shard, piece.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let shard = u16::try_from(self.shard).expect("shards are below SHARDS_MAX");
        let mut out = [0; Self::BYTES];
        out[0..2].copy_from_slice(&Self::PREFIX);
        out[2..18].copy_from_slice(self.volume.as_bytes());
        out[18..26].copy_from_slice(&self.datafile.0.to_be_bytes());
        out[26..42].copy_from_slice(self.salt.as_bytes());
        out[42..44].copy_from_slice(&shard.to_be_bytes());
        out[44..48].copy_from_slice(&self.piece.to_be_bytes());
        out
    }

    /// The name in a 0-db key, or `None` when it is not a piece's (another program's value in an attached 0-db).
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        if bytes[0..2] != Self::PREFIX {
            return None;
        }
        Some(Self {
            volume: VolumeId::from_bytes(array(bytes, 2)),
            datafile: DatafileId(u64::from_be_bytes(array(bytes, 18))),
            salt: Salt::from_bytes(array(bytes, 26)),
            shard: u32::from(u16::from_be_bytes(array(bytes, 42))),
            piece: u32::from_be_bytes(array(bytes, 44)),
        })
    }
}

impl fmt::Display for PieceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}/{}/{}/{}/{}",
            self.volume, self.datafile, self.salt, self.shard, self.piece
        )
    }
}

/// What a piece says of itself; valid by construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PieceHeader {
    stripe: Stripe,
    shard: u32,
    piece: u32,
    payload_hash: [u8; 32],
}

impl PieceHeader {
    /// The stripe the piece is part of.
    pub const fn stripe(&self) -> &Stripe {
        &self.stripe
    }

    /// Shard index.
    pub const fn shard(&self) -> u32 {
        self.shard
    }

    /// Piece index within the shard.
    pub const fn piece(&self) -> u32 {
        self.piece
    }

    /// Length of the payload.
    pub fn payload_bytes(&self) -> usize {
        self.stripe.layout().piece_len(self.piece)
    }

    /// BLAKE3 of the payload.
    pub const fn payload_hash(&self) -> &[u8; 32] {
        &self.payload_hash
    }

    /// The 0-db key under which the piece belongs.
    pub const fn key(&self) -> PieceKey {
        self.stripe.piece_key(self.shard, self.piece)
    }

    /// Is this the piece `(shard, piece)` of `stripe`? A sound piece at a wrong place must not be used.
    pub fn expect(&self, stripe: &Stripe, shard: u32, piece: u32) -> Result<(), PieceError> {
        let wanted = stripe.piece_key(shard, piece);
        let found = self.key();
        if found != wanted {
            return Err(PieceError::Misplaced { found, wanted });
        }
        if self.stripe != *stripe {
            return Err(PieceError::OtherStripe(found));
        }
        Ok(())
    }

    /// Reads and checks a header alone (the payload may follow or not).
    pub fn decode(bytes: &[u8]) -> Result<Self, PieceError> {
        let length = PieceError::Length {
            got: bytes.len(),
            want: PIECE_HEADER_BYTES,
        };
        let head: &[u8; PIECE_HEADER_BYTES] = bytes
            .get(..PIECE_HEADER_BYTES)
            .and_then(|head| head.try_into().ok())
            .ok_or(length)?;
        if head[0..8] != MAGIC {
            return Err(PieceError::Magic);
        }
        if crc32fast::hash(&head[..CRC_AT]) != u32::from_le_bytes(array(head, CRC_AT)) {
            return Err(PieceError::HeaderDamaged);
        }
        let version = u16::from_le_bytes(array(head, 8));
        if version != PIECE_VERSION {
            return Err(PieceError::Version(version));
        }
        if head[11] != CODEC {
            return Err(PieceError::Field("codec"));
        }
        if head[ZERO_AT..CRC_AT].iter().any(|byte| *byte != 0) {
            return Err(PieceError::Field("reserved"));
        }
        let geometry = Geometry::new(u32::from(head[12]), u32::from(head[13]))?;
        let ids = ObjectIds {
            volume: VolumeId::from_bytes(array(head, 16)),
            stream: stream_from_byte(head[10]).ok_or(PieceError::Field("stream"))?,
            datafile: DatafileId(u64::from_le_bytes(array(head, 48))),
            epoch: Epoch(u64::from_le_bytes(array(head, 56))),
            salt: Salt::from_bytes(array(head, 32)),
        };
        let number = |at| u64::from_le_bytes(array(head, at));
        let small = |at| u32::from_le_bytes(array(head, at));
        let layout = Layout::checked(geometry, number(72), number(80), small(92))?;
        let stripe = Stripe::new(ids, small(88), number(64), layout)?;
        let header = Self {
            stripe,
            shard: u32::from(u16::from_le_bytes(array(head, 14))),
            piece: small(96),
            payload_hash: array(head, HASH_AT),
        };
        if header.shard as usize >= geometry.total() {
            return Err(PieceError::Field("shard"));
        }
        if header.piece >= layout.pieces_per_shard() {
            return Err(PieceError::Field("piece"));
        }
        if header.payload_bytes() != small(100) as usize {
            return Err(PieceError::Field("payload length"));
        }
        Ok(header)
    }

    fn encode_into(&self, head: &mut [u8; PIECE_HEADER_BYTES]) {
        let (ids, layout) = (self.stripe.ids(), self.stripe.layout());
        let geometry = layout.geometry();
        let byte = |count: usize| u8::try_from(count).expect("at most SHARDS_MAX");
        let shard = u16::try_from(self.shard).expect("below SHARDS_MAX");
        let payload = u32::try_from(self.payload_bytes()).expect("at most PIECE_BYTES_MAX");
        head.fill(0);
        head[0..8].copy_from_slice(&MAGIC);
        head[8..10].copy_from_slice(&PIECE_VERSION.to_le_bytes());
        head[10] = stream_byte(ids.stream);
        head[11] = CODEC;
        head[12] = byte(geometry.data());
        head[13] = byte(geometry.parity());
        head[14..16].copy_from_slice(&shard.to_le_bytes());
        head[16..32].copy_from_slice(ids.volume.as_bytes());
        head[32..48].copy_from_slice(ids.salt.as_bytes());
        head[48..56].copy_from_slice(&ids.datafile.0.to_le_bytes());
        head[56..64].copy_from_slice(&ids.epoch.0.to_le_bytes());
        head[64..72].copy_from_slice(&self.stripe.plain_bytes().to_le_bytes());
        head[72..80].copy_from_slice(&layout.object_bytes().to_le_bytes());
        head[80..88].copy_from_slice(&layout.shard_bytes().to_le_bytes());
        head[88..92].copy_from_slice(&self.stripe.chunk_bytes().to_le_bytes());
        head[92..96].copy_from_slice(&layout.piece_bytes().to_le_bytes());
        head[96..100].copy_from_slice(&self.piece.to_le_bytes());
        head[100..104].copy_from_slice(&payload.to_le_bytes());
        head[HASH_AT..ZERO_AT].copy_from_slice(&self.payload_hash);
        let crc = crc32fast::hash(&head[..CRC_AT]);
        head[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Makes the value of a piece from its payload. Panics if shard, piece or payload length are not the stripe's.
pub fn encode_piece(stripe: &Stripe, shard: u32, piece: u32, payload: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(PIECE_HEADER_BYTES + payload.len());
    value.resize(PIECE_HEADER_BYTES, 0);
    value.extend_from_slice(payload);
    finish_piece(stripe, shard, piece, &mut value);
    value
}

/// Like [`encode_piece`] without a copy: `value` is [`PIECE_HEADER_BYTES`] of room, then the payload.
pub fn finish_piece(stripe: &Stripe, shard: u32, piece: u32, value: &mut [u8]) -> PieceHeader {
    let (head, payload) = value
        .split_first_chunk_mut::<PIECE_HEADER_BYTES>()
        .expect("header room is reserved");
    let header = PieceHeader {
        stripe: *stripe,
        shard,
        piece,
        payload_hash: *blake3::hash(payload).as_bytes(),
    };
    assert!(
        (shard as usize) < stripe.layout().geometry().total(),
        "no shard {shard}"
    );
    assert!(
        piece < stripe.layout().pieces_per_shard(),
        "no piece {piece}"
    );
    assert_eq!(
        payload.len(),
        header.payload_bytes(),
        "payload length of {}",
        header.key()
    );
    header.encode_into(head);
    header
}

/// Checks a stored value completely, without any key: header, length, payload hash.
pub fn verify_piece(value: &[u8]) -> Result<(PieceHeader, &[u8]), PieceError> {
    let header = PieceHeader::decode(value)?;
    let want = PIECE_HEADER_BYTES + header.payload_bytes();
    if value.len() != want {
        return Err(PieceError::Length {
            got: value.len(),
            want,
        });
    }
    let payload = &value[PIECE_HEADER_BYTES..];
    if blake3::hash(payload) != header.payload_hash {
        return Err(PieceError::PayloadDamaged);
    }
    Ok((header, payload))
}

/// The `N` bytes at `at`. Only for offsets that are known to fit.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N]
        .try_into()
        .expect("fixed offsets within a fixed length")
}

#[cfg(test)]
mod tests;
