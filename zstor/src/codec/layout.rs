//! How an object is cut: contiguous shards, pieces of shards, rows of pieces.
//!
//! ```text
//! object   |<------- S ------->|<------- S ------->| ... zero padding to k * S
//! shard 0  | p0 | p1 | .. | pl |   shard 1 ...            parity shards: same cut
//! row p    = piece p of every shard: what one reconstruction needs
//! ```
//!
//! Invariants: `k * S >= object bytes`; every piece but the last of a shard has exactly `piece_bytes`; a value of this
//! type is valid by construction.

use crate::piece::PIECE_BYTES_MAX;
use crate::policy::Geometry;
use crate::record::EncodingRecord;
use std::ops::Range;

/// Shard sizes are rounded up to this many bytes.
pub const SHARD_ALIGN_BYTES: u64 = 64;

/// Shard bytes under one 0-db key, unless told otherwise.
///
/// 512 KiB: a 1 MiB chunk that does not compress lies in 3 pieces (1.5 MiB fetched; with 1 MiB pieces it would be 2), one
/// that compresses to half in 1 or 2, and a backend still needs only 2 index entries per MiB stored. The size is in
/// every record and every piece: it can change without a new format.
pub const PIECE_BYTES: u32 = 512 << 10;

/// Most bytes of an object; keeps every product of sizes far from overflow.
pub const OBJECT_BYTES_MAX: u64 = 1 << 40;

/// Why sizes do not make a layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// An object must have 1 to [`OBJECT_BYTES_MAX`] bytes.
    #[error("object of {0} bytes is outside 1 to {OBJECT_BYTES_MAX}")]
    ObjectBytes(u64),
    /// Pieces must have 1 to [`PIECE_BYTES_MAX`] bytes.
    #[error("pieces of {0} bytes are outside 1 to {PIECE_BYTES_MAX}")]
    PieceBytes(u32),
    /// The shard size is not the one that follows from object and geometry.
    #[error("shards of {got} bytes do not fit the object: {want} bytes each are right")]
    ShardBytes {
        /// As read.
        got: u64,
        /// As computed.
        want: u64,
    },
    /// More than 2^32 pieces per shard.
    #[error("a shard of {shard_bytes} bytes has too many pieces of {piece_bytes} bytes")]
    PieceCount {
        /// Shard size.
        shard_bytes: u64,
        /// Piece size.
        piece_bytes: u32,
    },
}

/// One run of an object inside one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceSlice {
    /// Data shard.
    pub shard: usize,
    /// Piece of the shard.
    pub piece: u32,
    /// Bytes within the piece's payload.
    pub range: Range<usize>,
    /// Where they go, counted from the start of the asked object range.
    pub offset: u64,
}

/// Sizes of a stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    geometry: Geometry,
    object_bytes: u64,
    shard_bytes: u64,
    piece_bytes: u32,
}

impl Layout {
    /// Cuts an object of `object_bytes` at `geometry` into pieces of at most `piece_bytes`.
    pub fn new(
        geometry: Geometry,
        object_bytes: u64,
        piece_bytes: u32,
    ) -> Result<Self, LayoutError> {
        if object_bytes == 0 || object_bytes > OBJECT_BYTES_MAX {
            return Err(LayoutError::ObjectBytes(object_bytes));
        }
        if piece_bytes == 0 || piece_bytes as usize > PIECE_BYTES_MAX {
            return Err(LayoutError::PieceBytes(piece_bytes));
        }
        let shard_bytes = object_bytes
            .div_ceil(geometry.data() as u64)
            .next_multiple_of(SHARD_ALIGN_BYTES);
        if u32::try_from(shard_bytes.div_ceil(u64::from(piece_bytes))).is_err() {
            return Err(LayoutError::PieceCount {
                shard_bytes,
                piece_bytes,
            });
        }
        Ok(Self {
            geometry,
            object_bytes,
            shard_bytes,
            piece_bytes,
        })
    }

    /// The layout with these sizes, if they agree with each other.
    pub fn checked(
        geometry: Geometry,
        object_bytes: u64,
        shard_bytes: u64,
        piece_bytes: u32,
    ) -> Result<Self, LayoutError> {
        let layout = Self::new(geometry, object_bytes, piece_bytes)?;
        if layout.shard_bytes != shard_bytes {
            return Err(LayoutError::ShardBytes {
                got: shard_bytes,
                want: layout.shard_bytes,
            });
        }
        Ok(layout)
    }

    /// The layout a record tells.
    pub fn of(record: &EncodingRecord) -> Result<Self, LayoutError> {
        Self::checked(
            record.geometry,
            record.object_bytes,
            record.shard_bytes,
            record.piece_bytes,
        )
    }

    /// `k + m`.
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Bytes of the object before padding.
    pub const fn object_bytes(&self) -> u64 {
        self.object_bytes
    }

    /// Bytes of every shard.
    pub const fn shard_bytes(&self) -> u64 {
        self.shard_bytes
    }

    /// Bytes of every piece but the last of a shard.
    pub const fn piece_bytes(&self) -> u32 {
        self.piece_bytes
    }

    /// Pieces of every shard, at least 1; also the number of rows.
    pub fn pieces_per_shard(&self) -> u32 {
        let pieces = self.shard_bytes.div_ceil(u64::from(self.piece_bytes));
        u32::try_from(pieces).expect("checked when the layout was made")
    }

    /// Payload bytes of piece `piece` of any shard; 0 past the end.
    pub fn piece_len(&self, piece: u32) -> usize {
        let start = u64::from(piece) * u64::from(self.piece_bytes);
        let bytes = self
            .shard_bytes
            .saturating_sub(start)
            .min(u64::from(self.piece_bytes));
        usize::try_from(bytes).expect("at most piece_bytes")
    }

    /// Object offset of the first byte of a piece of a data shard; it may lie in the padding.
    pub fn piece_offset(&self, shard: usize, piece: u32) -> u64 {
        shard as u64 * self.shard_bytes + u64::from(piece) * u64::from(self.piece_bytes)
    }

    /// Bytes one shard takes on a backend, piece headers included (what placement must find room for).
    pub fn stored_shard_bytes(&self) -> u64 {
        self.shard_bytes
            + u64::from(self.pieces_per_shard()) * crate::piece::PIECE_HEADER_BYTES as u64
    }

    /// The piece slices that hold an object range, in object order. What lies past the object's end is left out.
    pub fn locate(&self, range: Range<u64>) -> Vec<PieceSlice> {
        let end = range.end.min(self.object_bytes);
        let mut slices = Vec::new();
        let mut at = range.start;
        while at < end {
            let (shard, in_shard) = (at / self.shard_bytes, at % self.shard_bytes);
            let piece_bytes = u64::from(self.piece_bytes);
            let (piece, in_piece) = (in_shard / piece_bytes, in_shard % piece_bytes);
            let run = (piece_bytes - in_piece)
                .min(self.shard_bytes - in_shard)
                .min(end - at);
            let narrow = |value: u64| usize::try_from(value).expect("at most piece_bytes");
            slices.push(PieceSlice {
                shard: usize::try_from(shard).expect("below k"),
                piece: u32::try_from(piece).expect("below pieces_per_shard"),
                range: narrow(in_piece)..narrow(in_piece + run),
                offset: at - range.start,
            });
            at += run;
        }
        slices
    }
}
