//! Watching: what changes, in the order of the log.
//!
//! ```text
//! list (linearizable) -> watch(after: the list's applied index) -> Began, Changes, Progress, Changes, ...
//!                             ^ TooOld: list again
//! ```
//!
//! Invariants: changes come in ascending order of their index, all of one index together; of what the request covers nothing is skipped
//! and nothing comes twice. A noun that changed several times within one index comes once, as that index left it. Any node serves
//! a watch from what it has applied; an index means the same on all of them, so that a watch may go on at another node.

use crate::api::{Backend, ClusterSettings, Volume};
use qsfs_zstor::id::{DatafileId, VolumeId};
use qsfs_zstor::record::EncodingRecord;
use serde::{Deserialize, Serialize};

/// What is to be watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WatchRequest {
    /// Everything after this index; `None`: from now on.
    pub after: Option<u64>,
    /// Of records and volumes only those of this volume.
    pub volume: Option<VolumeId>,
    /// Encoding records.
    pub records: bool,
    /// Volumes: created, altered, leased, their head moved, deleted.
    pub volumes: bool,
    /// Backends: registered, verdicts, intents.
    pub backends: bool,
    /// Settings of the cluster.
    pub settings: bool,
}

impl WatchRequest {
    /// Everything that the caller may see.
    pub fn everything(after: Option<u64>) -> Self {
        Self {
            after,
            volume: None,
            records: true,
            volumes: true,
            backends: true,
            settings: true,
        }
    }

    /// One volume's own row (its head, lease and settings), without its records.
    pub fn volume_only(volume: VolumeId, after: Option<u64>) -> Self {
        Self {
            after,
            volume: Some(volume),
            volumes: true,
            ..Self::default()
        }
    }
}

/// One noun as an index left it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Created or changed.
    Volume(Box<Volume>),
    /// Deleted. Its records follow, as they become tombstones.
    VolumeRemoved(VolumeId),
    /// Committed, or a shard of it moved or was found bad.
    Record(Box<EncodingRecord>),
    /// Released.
    RecordRemoved {
        /// Volume.
        volume: VolumeId,
        /// Datafile.
        datafile: DatafileId,
    },
    /// Registered or changed.
    Backend(Backend),
    /// Settings of the cluster.
    Settings(ClusterSettings),
}

/// What a watch says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// First of all: changes after this index will come.
    Began(u64),
    /// All changes of one index that the request covers and the caller may see.
    Changes {
        /// Log index.
        index: u64,
        /// At least one.
        changes: Vec<Change>,
    },
    /// Everything up to this index was told: a point to resume from. Comes every few seconds when nothing else does.
    Progress(u64),
}

impl WatchEvent {
    /// From where to go on after this event.
    pub fn index(&self) -> u64 {
        match self {
            Self::Began(index) | Self::Progress(index) | Self::Changes { index, .. } => *index,
        }
    }
}
