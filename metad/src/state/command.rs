//! What the Raft log carries.
//!
//! Variants are encoded by position: new ones go to the end, old ones are never reordered or removed. A node that meets one
//! it does not know stops applying rather than guess.

use super::Outcome;
use super::tombstones::Place;
use qsfs_proto::api::{Applied, ClusterSettings, Mutation, Role, Verdict};
use qsfs_zstor::id::{BackendId, ClientId, ClusterId, LocationName, MetadId, NodeName, VolumeId};
use serde::{Deserialize, Serialize};

/// One proposal: a command, when the leader proposed it, and on whose behalf.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Leader's clock, ms since the epoch. Log time is the running maximum.
    pub time_ms: u64,
    /// Whose request, for exactly-once; `None`: the cluster's own.
    pub request: Option<Request>,
    /// What to do.
    pub command: Command,
}

impl Entry {
    /// A command of the cluster itself.
    pub fn internal(time_ms: u64, command: Command) -> Self {
        Self {
            time_ms,
            request: None,
            command,
        }
    }
}

/// Names one request of one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// State directory, or what else the process is identified by.
    pub client: ClientId,
    /// One client object of it.
    pub session: u64,
    /// Number of the request in the session.
    pub sequence: u64,
    /// The client waits for no answer below.
    pub oldest_pending: u64,
}

/// Everything that changes replicated state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// From outside.
    Mutation(Mutation),
    /// The first command of a cluster.
    Initialize(Genesis),
    /// The planner's verdicts.
    SetVerdicts(Vec<(BackendId, Verdict)>),
    /// An agent or a client joins: its token is used up, bound to its signing request.
    ConsumeToken {
        /// BLAKE3 of the secret.
        hash: [u8; 32],
        /// Role asked for.
        role: Role,
        /// BLAKE3 of the signing request.
        csr: [u8; 32],
    },
    /// A metad joins: token, unique name and new id in one step.
    AdmitMetad(Admission),
    /// A metad is gone for good; its id and row stay, its name is free.
    RemoveMetad(MetadId),
    /// Deletions about to be ordered: from here on these places take no shard back.
    OrderDeletes(Vec<Place>),
    /// An agent deleted the pieces of a shard.
    ShardDeleted(Place),
    /// Turns the next records of a deleted volume into tombstones.
    ReapVolume(VolumeId),
    /// Proposals that share one log entry, hence one fdatasync a node: each is applied as if it stood alone, in this order, and
    /// a refusal of one is none of the others. A group holds no group.
    Group(Vec<Entry>),
}

impl Command {
    /// Level of programs that can apply it. A new command gets the next one; until every member has reached it, it is not proposed.
    pub fn feature_level(&self) -> u32 {
        match self {
            Self::Mutation(Mutation::SetCertificateLife { .. }) => 2,
            Self::Group(entries) => {
                let levels = entries.iter().map(|entry| entry.command.feature_level());
                levels.max().unwrap_or(1)
            }
            Self::Mutation(_)
            | Self::Initialize(_)
            | Self::SetVerdicts(_)
            | Self::ConsumeToken { .. }
            | Self::AdmitMetad(_)
            | Self::RemoveMetad(_)
            | Self::OrderDeletes(_)
            | Self::ShardDeleted(_)
            | Self::ReapVolume(_) => 1,
        }
    }
}

/// A new cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Genesis {
    /// Its id.
    pub cluster: ClusterId,
    /// PEM of its certificate authority.
    pub ca_pem: String,
    /// Settings.
    pub settings: ClusterSettings,
    /// The first metad.
    pub member: MemberRow,
    /// Hash, role and lifetime in ms of the first tokens.
    pub tokens: Vec<([u8; 32], Role, u64)>,
}

/// A metad node as it joined. Whether it votes is Raft's to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRow {
    /// Raft id.
    pub id: MetadId,
    /// Unique name.
    pub name: NodeName,
    /// Location.
    pub location: LocationName,
    /// `host:port`.
    pub address: String,
    /// Removed: the id is never used again.
    pub removed: bool,
}

/// A metad that asks to join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// BLAKE3 of the token's secret.
    pub hash: [u8; 32],
    /// BLAKE3 of its signing request.
    pub csr: [u8; 32],
    /// Name.
    pub name: NodeName,
    /// Location.
    pub location: LocationName,
    /// `host:port`.
    pub address: String,
}

/// Answer to a command that went through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To a mutation, or nothing more to say.
    Applied(Applied),
    /// Raft id of an admitted metad.
    Admitted(MetadId),
    /// Records of a deleted volume that are still to be reaped.
    Remaining(bool),
    /// To a group: one outcome for each of it.
    Group(Vec<Outcome>),
}
