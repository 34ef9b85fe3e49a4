//! Domain nouns and the storage codec of QSFS. Pure: no clock, no I/O, no task.
//!
//! ```text
//! datafile -> chunks (compress -> encrypt) -> object -> k data shards + m parity shards -> pieces
//! ```
//!
//! - [`id`]: newtypes for every id, index and epoch
//! - [`policy`]: what must be survivable, and the geometry that achieves it
//! - [`record`]: the encoding record, what metad remembers of a datafile
//! - [`key`]: the volume key, which never leaves the client
//! - [`codec`]: chunks, objects, stripes; encode, decode, reconstruct
//! - [`piece`]: what is stored under one 0-db key; describes and verifies itself without keys
//! - [`placement`]: which backend gets which shard, and what a stripe survives

pub mod codec;
pub mod id;
pub mod key;
pub mod piece;
pub mod placement;
pub mod policy;
pub mod record;
