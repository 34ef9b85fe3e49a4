//! The encoding record: what metad remembers of a committed datafile.

use crate::id::{BackendId, DatafileId, Epoch, Salt, ShardHash, Stream, VolumeId};
use crate::policy::Geometry;
use serde::{Deserialize, Serialize};

/// What is known of one stored shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShardState {
    /// Stored and not reported otherwise.
    Stored,
    /// Its backend answered that it does not have (all of) it.
    Missing,
    /// A piece of it did not verify.
    Corrupt,
}

/// One shard of a stripe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Where it is.
    pub backend: BackendId,
    /// Hash of the whole shard.
    pub hash: ShardHash,
    /// What is known of it.
    pub state: ShardState,
}

/// Everything needed, besides the volume key, to read a datafile back from its shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncodingRecord {
    /// Volume it belongs to.
    pub volume: VolumeId,
    /// Datafile it encodes.
    pub datafile: DatafileId,
    /// Stream of the datafile.
    pub stream: Stream,
    /// Writer epoch under which it was encoded.
    pub epoch: Epoch,
    /// Salt of the encoding attempt.
    pub salt: Salt,
    /// Geometry of this stripe (the policy's at the time).
    pub geometry: Geometry,
    /// Plaintext bytes per chunk.
    pub chunk_bytes: u32,
    /// Plaintext bytes of the datafile.
    pub plain_bytes: u64,
    /// Bytes of the object (header and chunks) before padding.
    pub object_bytes: u64,
    /// Bytes of each shard; the last piece of a shard may be shorter than the others.
    pub shard_bytes: u64,
    /// Shard bytes under one 0-db key.
    pub piece_bytes: u32,
    /// `k + m` shards, data shards first.
    pub shards: Vec<Shard>,
    /// Raised by one at every change; the token of compare-and-swap.
    pub version: u64,
}
