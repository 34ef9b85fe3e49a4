//! `qsfs status --json`: the contract for scripts (product.md), as types.

use serde::{Deserialize, Serialize};

/// Version of the JSON below.
pub const SCHEMA_VERSION: u32 = 1;

/// The verdict in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StatusVerdict {
    /// Nothing to do.
    Ok,
    /// Something is less than it should be; nothing is unavailable.
    Warning,
    /// Data is unavailable or one step from it.
    Critical,
}

/// One named finding; `qsfs explain NAME` says more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// `LOCATION_DOWN`, `AT_RISK_AGE`, ...
    pub name: String,
    /// What it is about.
    pub subject: String,
    /// One sentence for people.
    pub text: String,
    /// How bad.
    pub severity: StatusVerdict,
}

/// Raft in one line.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct QuorumStatus {
    /// Leader's name.
    pub leader: String,
    /// Voters.
    pub voters: u32,
    /// Voters that answered lately.
    pub healthy: u32,
    /// Term.
    pub term: u64,
    /// Applied index.
    pub applied: u64,
}

/// What may still be lost before data is unavailable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct LossBudget {
    /// Any so many more locations.
    pub locations: u32,
    /// Any so many more nodes.
    pub nodes: u32,
    /// Any so many more backends.
    pub backends: u32,
}

/// One volume.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Name.
    pub name: String,
    /// `4+4`.
    pub policy: String,
    /// Epoch.
    pub epoch: u64,
    /// `host:pid` of the writer; null when none.
    pub writer: Option<String>,
    /// Head datafile.
    pub head: u64,
    /// Committed datafiles.
    pub datafiles: u64,
    /// Of them, those whose survival rules do not hold now.
    pub below_policy: u64,
    /// Of them, those with fewer than `k` reachable shards.
    pub unreadable: u64,
    /// Plaintext bytes committed.
    pub bytes: u64,
    /// Bytes at risk, from the writer.
    pub at_risk_bytes: u64,
    /// Age of the oldest.
    pub at_risk_age_s: u64,
    /// Loss budget.
    pub loss_budget: LossBudget,
}

/// The campaign that returns every datafile to its policy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ResilverStatus {
    /// Shards to make or move.
    pub pending_shards: u64,
    /// Rebuilds running.
    pub running: u64,
    /// Lately.
    pub bytes_per_s: u64,
    /// At that rate.
    pub eta_s: Option<u64>,
    /// Why it does not go on.
    pub waiting_for: Option<String>,
}

/// What rot was found and mended since the cluster began (replicated counters).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RotStatus {
    /// Corrupt or missing shards reported by reads.
    pub found_by_read: u64,
    /// By scrubs.
    pub found_by_scrub: u64,
    /// Reported shards made again.
    pub repaired: u64,
}

/// One backend.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Id.
    pub id: u64,
    /// Location.
    pub location: String,
    /// Node.
    pub node: String,
    /// `up | suspect | down | lost | draining | retired`.
    pub state: String,
    /// Used.
    pub used_bytes: u64,
    /// Capacity.
    pub capacity_bytes: u64,
    /// Shards that records place here.
    pub shards: u64,
    /// RFC 3339, or null when never.
    pub last_scrub: Option<String>,
}

/// The whole answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Worst of the findings.
    pub verdict: StatusVerdict,
    /// Worst first.
    pub findings: Vec<Finding>,
    /// Quorum.
    pub quorum: QuorumStatus,
    /// Volumes.
    pub volumes: Vec<VolumeStatus>,
    /// Re-silver.
    pub resilver: ResilverStatus,
    /// Rot.
    pub rot: RotStatus,
    /// Backends.
    pub backends: Vec<BackendStatus>,
}
