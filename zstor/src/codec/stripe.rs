//! A stripe: one object as `k + m` shards, encoded and rebuilt row by row.
//!
//! ```text
//! object --read--> row p: [header room | payload] x k --parity--> x (k + m) --hash, header--> values to store
//! ```
//!
//! Invariants: what [`ShardRebuilder`] makes is, byte for byte, what [`StripeEncoder`] made; a shard's hash is the BLAKE3
//! of the BLAKE3s of its pieces' payloads in order, so it is known from piece headers alone.

use crate::codec::coder::{CoderError, StripeCoder};
use crate::codec::layout::{Layout, LayoutError};
use crate::codec::object::{ObjectError, ObjectHeader};
use crate::id::{BackendId, ShardHash};
use crate::key::ObjectIds;
use crate::piece::{PIECE_HEADER_BYTES, PieceHeader, PieceKey, finish_piece};
use crate::record::{EncodingRecord, Shard, ShardState};
use bytes::Bytes;

/// Why numbers do not describe a stripe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StripeError {
    /// Sizes of plaintext and chunks.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// Sizes of shards and pieces.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The object cannot hold that plaintext, or is larger than it could be.
    #[error("an object of {object_bytes} bytes cannot hold {plain_bytes} bytes of plaintext")]
    Sizes {
        /// Plaintext bytes.
        plain_bytes: u64,
        /// Object bytes.
        object_bytes: u64,
    },
    /// A record must name `k + m` shards.
    #[error("{got} shards are named, {want} are right")]
    Shards {
        /// As given.
        got: usize,
        /// `k + m`.
        want: usize,
    },
}

/// All there is to know of a stripe besides where its shards are. Valid by construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stripe {
    ids: ObjectIds,
    chunk_bytes: u32,
    plain_bytes: u64,
    layout: Layout,
}

impl Stripe {
    /// Checks that the sizes can belong together.
    pub fn new(
        ids: ObjectIds,
        chunk_bytes: u32,
        plain_bytes: u64,
        layout: Layout,
    ) -> Result<Self, StripeError> {
        let chunks = ObjectHeader::chunks_of(plain_bytes, chunk_bytes)?;
        let header = ObjectHeader::encoded_len(chunks) as u64;
        // Every chunk has a tag; none is larger than stored as it is.
        let tags = u64::from(chunks) * crate::codec::TAG_BYTES as u64;
        let object_bytes = layout.object_bytes();
        if object_bytes < header + tags || object_bytes > header + tags + plain_bytes {
            return Err(StripeError::Sizes {
                plain_bytes,
                object_bytes,
            });
        }
        Ok(Self {
            ids,
            chunk_bytes,
            plain_bytes,
            layout,
        })
    }

    /// The stripe of an object that is about to be encoded.
    pub fn of_object(
        header: &ObjectHeader,
        geometry: crate::policy::Geometry,
        piece_bytes: u32,
    ) -> Result<Self, StripeError> {
        let layout = Layout::new(geometry, header.object_bytes(), piece_bytes)?;
        Self::new(
            *header.ids(),
            header.chunk_bytes(),
            header.plain_bytes(),
            layout,
        )
    }

    /// The stripe a record describes; its sizes are checked.
    pub fn of(record: &EncodingRecord) -> Result<Self, StripeError> {
        let want = record.geometry.total();
        if record.shards.len() != want {
            return Err(StripeError::Shards {
                got: record.shards.len(),
                want,
            });
        }
        let ids = ObjectIds {
            volume: record.volume,
            stream: record.stream,
            datafile: record.datafile,
            epoch: record.epoch,
            salt: record.salt,
        };
        Self::new(
            ids,
            record.chunk_bytes,
            record.plain_bytes,
            Layout::of(record)?,
        )
    }

    /// Whose it is.
    pub const fn ids(&self) -> &ObjectIds {
        &self.ids
    }

    /// Plaintext bytes per chunk.
    pub const fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    /// Plaintext bytes of the datafile.
    pub const fn plain_bytes(&self) -> u64 {
        self.plain_bytes
    }

    /// Sizes.
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Bytes of the object header: what a reader needs first.
    pub fn object_header_bytes(&self) -> usize {
        let chunks = ObjectHeader::chunks_of(self.plain_bytes, self.chunk_bytes)
            .expect("checked when the stripe was made");
        ObjectHeader::encoded_len(chunks)
    }

    /// Name of one of its pieces.
    pub const fn piece_key(&self, shard: u32, piece: u32) -> PieceKey {
        PieceKey {
            volume: self.ids.volume,
            datafile: self.ids.datafile,
            salt: self.ids.salt,
            shard,
            piece,
        }
    }

    /// All keys of one shard: what to delete when it is released.
    pub fn shard_keys(&self, shard: u32) -> impl Iterator<Item = PieceKey> + use<> {
        let stripe = *self;
        (0..self.layout.pieces_per_shard()).map(move |piece| stripe.piece_key(shard, piece))
    }

    /// The record to commit: version 0, all shards stored at `backends` (in shard order).
    pub fn record(
        &self,
        hashes: &[ShardHash],
        backends: &[BackendId],
    ) -> Result<EncodingRecord, StripeError> {
        let want = self.layout.geometry().total();
        for got in [hashes.len(), backends.len()] {
            if got != want {
                return Err(StripeError::Shards { got, want });
            }
        }
        let shard = |(hash, backend): (&ShardHash, &BackendId)| Shard {
            backend: *backend,
            hash: *hash,
            state: ShardState::Stored,
        };
        Ok(EncodingRecord {
            volume: self.ids.volume,
            datafile: self.ids.datafile,
            stream: self.ids.stream,
            epoch: self.ids.epoch,
            salt: self.ids.salt,
            geometry: self.layout.geometry(),
            chunk_bytes: self.chunk_bytes,
            plain_bytes: self.plain_bytes,
            object_bytes: self.layout.object_bytes(),
            shard_bytes: self.layout.shard_bytes(),
            piece_bytes: self.layout.piece_bytes(),
            shards: hashes.iter().zip(backends).map(shard).collect(),
            version: 0,
        })
    }

    fn empty_value(&self, piece: u32) -> Vec<u8> {
        vec![0; PIECE_HEADER_BYTES + self.layout.piece_len(piece)]
    }

    fn finish(&self, shard: usize, piece: u32, mut value: Vec<u8>) -> EncodedPiece {
        let shard = u32::try_from(shard).expect("below SHARDS_MAX");
        let header = finish_piece(self, shard, piece, &mut value);
        EncodedPiece {
            header,
            value: Bytes::from(value),
        }
    }
}

/// A piece ready to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedPiece {
    /// What it says of itself; `header.key()` is the 0-db key.
    pub header: PieceHeader,
    /// The whole value: header and payload.
    pub value: Bytes,
}

/// Encodes an object row by row. Rows may be encoded in any order and by several threads.
pub struct StripeEncoder {
    stripe: Stripe,
    coder: StripeCoder,
}

impl StripeEncoder {
    /// For one stripe.
    pub fn new(stripe: Stripe) -> Self {
        Self {
            stripe,
            coder: StripeCoder::new(stripe.layout.geometry()),
        }
    }

    /// The stripe.
    pub const fn stripe(&self) -> &Stripe {
        &self.stripe
    }

    /// Number of rows.
    pub fn rows(&self) -> u32 {
        self.stripe.layout.pieces_per_shard()
    }

    /// Piece `row` of all `k + m` shards, in shard order. `read(offset, buffer)` fills the buffer with object bytes; it is
    /// never asked for bytes past the object's end (padding is made here).
    pub fn encode_row<E>(
        &self,
        row: u32,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Vec<EncodedPiece>, E> {
        let layout = &self.stripe.layout;
        assert!(row < self.rows(), "no row {row}");
        let k = layout.geometry().data();
        let mut values: Vec<Vec<u8>> = (0..layout.geometry().total())
            .map(|_| self.stripe.empty_value(row))
            .collect();
        let (data, parity) = values.split_at_mut(k);
        for (shard, value) in data.iter_mut().enumerate() {
            let offset = layout.piece_offset(shard, row);
            let payload = &mut value[PIECE_HEADER_BYTES..];
            let left = layout.object_bytes().saturating_sub(offset);
            let bytes = usize::try_from(left).map_or(payload.len(), |left| left.min(payload.len()));
            if bytes > 0 {
                read(offset, &mut payload[..bytes])?;
            }
        }
        let inputs: Vec<&[u8]> = data
            .iter()
            .map(|value| &value[PIECE_HEADER_BYTES..])
            .collect();
        let mut outputs: Vec<&mut [u8]> = parity
            .iter_mut()
            .map(|value| &mut value[PIECE_HEADER_BYTES..])
            .collect();
        self.coder.parity(&inputs, &mut outputs);
        let finish = |(shard, value)| self.stripe.finish(shard, row, value);
        Ok(values.into_iter().enumerate().map(finish).collect())
    }
}

/// Collects piece hashes, in any order, into shard hashes.
pub struct ShardHashes {
    stripe: Stripe,
    /// `[shard][piece]`.
    pieces: Vec<Vec<Option<[u8; 32]>>>,
}

impl ShardHashes {
    /// For one stripe, nothing known yet.
    pub fn new(stripe: &Stripe) -> Self {
        let rows = stripe.layout.pieces_per_shard() as usize;
        let pieces = vec![vec![None; rows]; stripe.layout.geometry().total()];
        Self {
            stripe: *stripe,
            pieces,
        }
    }

    /// Notes one piece. Panics when it is not of this stripe.
    pub fn add(&mut self, header: &PieceHeader) {
        assert_eq!(*header.stripe(), self.stripe, "a piece of another stripe");
        self.pieces[header.shard() as usize][header.piece() as usize] =
            Some(*header.payload_hash());
    }

    /// Hash of a shard; `None` while one of its pieces is unknown.
    pub fn shard(&self, shard: usize) -> Option<ShardHash> {
        let mut hasher = blake3::Hasher::new();
        for piece in &self.pieces[shard] {
            hasher.update(piece.as_ref()?);
        }
        Some(ShardHash::from_bytes(*hasher.finalize().as_bytes()))
    }

    /// Hashes of all shards; `None` while a piece is unknown.
    pub fn all(&self) -> Option<Vec<ShardHash>> {
        (0..self.pieces.len())
            .map(|shard| self.shard(shard))
            .collect()
    }
}

/// Why a shard could not be rebuilt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RebuildError {
    /// The record makes no sense.
    #[error(transparent)]
    Stripe(#[from] StripeError),
    /// Survivors are too few or do not fit together.
    #[error(transparent)]
    Coder(#[from] CoderError),
    /// No such shard.
    #[error("no shard {0} in this geometry")]
    NoSuchShard(u32),
    /// Not every row was rebuilt.
    #[error("shard {0} is not complete: rebuild every row first")]
    Incomplete(u32),
    /// What was rebuilt is not what was committed.
    #[error(
        "rebuilt shard {0} does not match the hash in its record: a survivor is wrong, or the record is"
    )]
    HashMismatch(u32),
}

/// Makes one lost shard again, row by row, without any key.
pub struct ShardRebuilder {
    stripe: Stripe,
    shard: u32,
    expected: ShardHash,
    coder: StripeCoder,
    hashes: ShardHashes,
}

impl ShardRebuilder {
    /// For shard `shard` of a record.
    pub fn new(record: &EncodingRecord, shard: u32) -> Result<Self, RebuildError> {
        let stripe = Stripe::of(record)?;
        let line = record
            .shards
            .get(shard as usize)
            .ok_or(RebuildError::NoSuchShard(shard))?;
        Ok(Self {
            stripe,
            shard,
            expected: line.hash,
            coder: StripeCoder::new(stripe.layout.geometry()),
            hashes: ShardHashes::new(&stripe),
        })
    }

    /// The stripe: pieces to fetch, and to check with [`PieceHeader::expect`].
    pub const fn stripe(&self) -> &Stripe {
        &self.stripe
    }

    /// Number of rows.
    pub fn rows(&self) -> u32 {
        self.stripe.layout.pieces_per_shard()
    }

    /// The wanted shard's piece of this row, from the verified payloads of any `k` shards (index, payload), or from the
    /// shard's own when it is still readable. The same bytes as the original, header included.
    pub fn rebuild_row(
        &mut self,
        row: u32,
        present: &[(usize, &[u8])],
    ) -> Result<EncodedPiece, RebuildError> {
        assert!(row < self.rows(), "no row {row}");
        let want = self.stripe.layout.piece_len(row);
        if let Some((shard, slice)) = present.iter().find(|(_, slice)| slice.len() != want) {
            return Err(CoderError::Length {
                shard: *shard,
                got: slice.len(),
                want,
            }
            .into());
        }
        let mut value = self.stripe.empty_value(row);
        let payload = &mut value[PIECE_HEADER_BYTES..];
        self.coder
            .reconstruct_into(present, &[self.shard as usize], &mut [payload])?;
        let piece = self.stripe.finish(self.shard as usize, row, value);
        self.hashes.add(&piece.header);
        Ok(piece)
    }

    /// After the last row: is the shard the one that was committed? To be asked before its new place is recorded.
    pub fn verify(&self) -> Result<(), RebuildError> {
        match self.hashes.shard(self.shard as usize) {
            None => Err(RebuildError::Incomplete(self.shard)),
            Some(hash) if hash == self.expected => Ok(()),
            Some(_) => Err(RebuildError::HashMismatch(self.shard)),
        }
    }
}
