//! Domain nouns and the storage codec of QSFS. Pure: no clock, no I/O, no task.
//!
//! ```text
//! datafile -> chunks (compress -> encrypt) -> object -> k data shards + m parity shards -> pieces
//! ```
//!
//! - [`id`]: newtypes for every id, index and epoch
//! - [`policy`]: what must be survivable, and the geometry that achieves it
//! - [`record`]: the encoding record, what metad remembers of a datafile

pub mod id;
pub mod policy;
pub mod record;
