//! The Raft log: segments of the same append-only framed file that backends and clients use.
//!
//! ```text
//! log/vote   log/purged   log/{segment:016x}.log ...
//! segment = frames: ENTRY (a log entry) | TRUNCATE (everything from this index on is void)
//! ```
//!
//! Invariants: indexes are consecutive from the one after `purged`; a segment is begun only after the one before it is durable, so a
//! torn tail can only be in the last one; only a prefix of the segments is ever deleted; `purged` is durable before that;
//! an append is reported flushed only after its bytes are durable, save a leader's own (`storage`). Damage in the middle is
//! never cut: the log refuses to open (and the node is renewed from its peers, `node/renewal.rs`).

pub mod gate;
pub mod segments;
pub mod storage;
pub mod syncer;
pub mod watermark;

#[cfg(test)]
mod tests;

use crate::durable::DurableError;
use qsfs_zdb::datafile::DatafileError;
use std::path::PathBuf;

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A segment failed.
    #[error("raft log: {0}")]
    Segment(#[from] DatafileError),
    /// The vote or the purge mark failed.
    #[error("raft log: {0}")]
    Mark(#[from] DurableError),
    /// The directory could not be read.
    #[error("raft log: cannot {step} {path}: {source}", path = path.display())]
    Io {
        /// Verb phrase.
        step: &'static str,
        /// What.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// Bytes that were durable do not verify.
    #[error(
        "raft log: {path} is damaged at byte {offset} ({bytes} bytes): entries that this node acknowledged are gone, so it must \
         not vote with this data", path = path.display()
    )]
    Damaged {
        /// Segment.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// How many.
        bytes: u64,
    },
    /// A frame verifies but makes no sense here.
    #[error("raft log: {path}, frame at byte {offset}: {reason}", path = path.display())]
    Frame {
        /// Segment.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// Why.
        reason: String,
    },
    /// Entries are missing between others.
    #[error(
        "raft log: entry {missing} is missing before entry {next}: entries that this node acknowledged are gone"
    )]
    Hole {
        /// First missing index.
        missing: u64,
        /// The one after the hole.
        next: u64,
    },
    /// A node that took part has no vote.
    #[error(
        "raft log: {path} is gone though this node took part in the cluster: what it promised is forgotten", path = path.display()
    )]
    Gone {
        /// The vote.
        path: PathBuf,
    },
    /// A sync failed: what was written since the one before may be on the disk or not.
    #[error("raft log: it does not become durable: {0}")]
    NotDurable(String),
    /// The thread that syncs is gone.
    #[error("raft log: the syncing thread ended")]
    SyncerGone,
}
