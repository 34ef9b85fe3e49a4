//! The storage codec: pure transformations between a sealed datafile and the pieces of its stripe.
//!
//! ```text
//! client  plaintext --ChunkSealer--> chunks --+--> object --StripeEncoder--> pieces      (push)
//!                                    header --+
//! client  pieces --ReadPlan--> object range --ObjectHeader, ChunkOpener--> plaintext     (fetch)
//! agent   pieces of k shards --ShardRebuilder--> pieces of one shard, no key needed      (rebuild)
//! anyone  piece headers --record_from_pieces--> encoding record                          (recovery)
//! ```
//!
//! Everything works in windows: a row is piece `p` of every shard, and rows are independent of each other, so memory
//! is `(k + m) * piece_bytes` per row in flight and rows can be encoded by several threads at once.

mod chunk;
mod coder;
mod layout;
mod object;
mod read;
mod recover;
mod stripe;

pub use chunk::{
    CHUNK_BYTES, CHUNK_BYTES_MAX, ChunkEntry, ChunkError, ChunkOpener, ChunkSealer, TAG_BYTES,
};
pub use coder::{CoderError, StripeCoder, UnsupportedCpu, check_cpu};
pub use layout::{
    Layout, LayoutError, OBJECT_BYTES_MAX, PIECE_BYTES, PieceSlice, SHARD_ALIGN_BYTES,
};
pub use object::{CHUNKS_MAX, OBJECT_VERSION, ObjectError, ObjectHeader};
pub use read::{PieceRef, ReadPlan, TooFewShards};
pub use recover::{RecoverError, RecoveredStripe, record_from_pieces};
pub use stripe::{
    EncodedPiece, RebuildError, ShardHashes, ShardRebuilder, Stripe, StripeEncoder, StripeError,
};

pub use crate::key::ObjectIds;
