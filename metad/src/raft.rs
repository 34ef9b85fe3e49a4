//! The types openraft is instantiated with. They stay inside this crate.

pub mod proposed;
pub mod runtime;

use crate::machine::snapshot::SnapshotFile;
use crate::state::Outcome;
use proposed::Proposed;
use serde::{Deserialize, Serialize};

/// What applying a log entry answers; `None` for entries that carry no command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response(pub Option<Outcome>);

openraft::declare_raft_types!(
    /// Raft as metad runs it.
    pub TypeConfig:
        D = Proposed,
        R = Response,
        NodeId = u64,
        Node = openraft::BasicNode,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = SnapshotFile,
        AsyncRuntime = runtime::Runtime,
);

/// The running consensus module.
pub type Raft = openraft::Raft<TypeConfig>;
/// Term and index of an entry.
pub type LogId = openraft::LogId<u64>;
/// Membership and where in the log it stands.
pub type StoredMembership = openraft::StoredMembership<u64, openraft::BasicNode>;
/// A failure of the local store, which stops the node.
pub type StorageError = openraft::StorageError<u64>;
/// One log entry.
pub type LogEntry = openraft::Entry<TypeConfig>;
/// What this node promised in which term.
pub type Vote = openraft::Vote<u64>;
