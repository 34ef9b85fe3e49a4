//! What is said to metad, as domain types. The wire form (`qsfs.proto`) is private to this crate.

use qsfs_zstor::id::{
    AgentId, BackendId, ClientId, ClusterId, DatafileId, Epoch, KeyId, LocationName, MetadId,
    NodeName, VolumeId, VolumeName,
};
use qsfs_zstor::policy::Policy;
use qsfs_zstor::record::{EncodingRecord, ShardState};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Who a certificate or a token stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A metadata node.
    Metad,
    /// A storage agent.
    Agent,
    /// A mount or a person's read access.
    Client,
    /// Full control: volumes, tokens, backends, settings.
    Admin,
}

/// Cluster-wide settings, all replicated. Durations in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterSettings {
    /// Between heartbeats of an agent.
    pub heartbeat_ms: u64,
    /// Silence after which a backend is suspect.
    pub suspect_after_ms: u64,
    /// Silence after which a backend is down.
    pub down_after_ms: u64,
    /// Down for so long: lost, its shards are rebuilt elsewhere.
    pub lost_after_ms: u64,
    /// Between the starts of two scrub tours of a backend.
    pub scrub_interval_ms: u64,
    /// Bytes per second a scrub reads from one backend at most; 0 is no limit.
    pub scrub_bytes_per_s: u64,
    /// How long pieces of a released datafile are kept.
    pub tombstone_grace_ms: u64,
    /// Lease lifetime without renewal.
    pub lease_ttl_ms: u64,
    /// Rebuilds that may run at once in the whole cluster.
    pub rebuilds_max: u32,
}

impl Default for ClusterSettings {
    fn default() -> Self {
        Self {
            heartbeat_ms: 1_000,
            suspect_after_ms: 5_000,
            down_after_ms: 15_000,
            lost_after_ms: 600_000,
            scrub_interval_ms: 7 * 24 * 3_600_000,
            scrub_bytes_per_s: 64 << 20,
            tombstone_grace_ms: 3_600_000,
            lease_ttl_ms: 30_000,
            rebuilds_max: 16,
        }
    }
}

/// Settings of one volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSettings {
    /// A datafile is sealed at the latest so long after its first byte.
    pub push_interval_ms: u64,
    /// A datafile is sealed when it holds so many bytes.
    pub datafile_bytes: u64,
    /// Most bytes of user data; 0 is no limit.
    pub quota_bytes: u64,
}

impl Default for VolumeSettings {
    fn default() -> Self {
        Self {
            push_interval_ms: 15 * 60_000,
            datafile_bytes: 64 << 20,
            quota_bytes: 0,
        }
    }
}

/// The point to which a lost client is recoverable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Head {
    /// Newest committed meta datafile; `DatafileId(0)` when nothing was pushed yet. Never goes back.
    pub datafile: DatafileId,
    /// First meta datafile that recovery has to read: where the newest complete checkpoint begins, or the
    /// first journal datafile of the volume.
    pub recover_from: DatafileId,
}

/// The exclusive right to write a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Client state directory that holds it.
    pub client: ClientId,
    /// `host:pid` for people.
    pub holder: String,
    /// Leader time in ms since the epoch at which it ends if not renewed.
    pub expires_ms: u64,
}

/// One volume as metad knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Identity.
    pub id: VolumeId,
    /// Name.
    pub name: VolumeName,
    /// Policy.
    pub policy: Policy,
    /// Random name of its key.
    pub key_id: KeyId,
    /// Epoch of the newest writer.
    pub epoch: Epoch,
    /// Who may write now.
    pub lease: Option<Lease>,
    /// Where recovery starts and ends.
    pub head: Head,
    /// Settings.
    pub settings: VolumeSettings,
    /// Creation time, ms since the epoch.
    pub created_ms: u64,
}

/// What a writer tells with each renewal, for status only; never part of a decision.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClientReport {
    /// Acknowledged bytes that no committed datafile holds yet.
    pub at_risk_bytes: u64,
    /// Age of the oldest of them, in seconds.
    pub at_risk_age_s: u64,
    /// Bytes of local datafiles.
    pub local_bytes: u64,
    /// Why pushing does not go on, for people; empty when all is well.
    pub push_blocked: String,
}

/// Cluster's verdict on a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Answers.
    Up,
    /// Silent for a little while.
    Suspect,
    /// Silent, or its agent reports it failed.
    Down,
    /// Down for `lost_after`: its shards are rebuilt elsewhere.
    Lost,
}

/// What an operator wants of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Intent {
    /// Take shards.
    Serve,
    /// Move everything off.
    Drain,
    /// Gone for good.
    Retire,
}

/// A namespace password. Never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// How a backend is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendAddress {
    /// `host:port` of the 0-db.
    pub endpoint: String,
    /// 0-db namespace.
    pub namespace: String,
    /// Namespace password.
    pub password: Option<Secret>,
    /// TLS with the cluster's CA (every backend an agent hosts). False: a plain 0-db attached from outside.
    pub tls: bool,
}

/// One backend: replicated facts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Identity.
    pub id: BackendId,
    /// Agent that hosts or attached it.
    pub agent: AgentId,
    /// Location, from its agent.
    pub location: LocationName,
    /// Node, from its agent.
    pub node: NodeName,
    /// How to reach it.
    pub address: BackendAddress,
    /// Bytes it may hold.
    pub capacity_bytes: u64,
    /// Verdict.
    pub verdict: Verdict,
    /// When the verdict was set, leader time in ms since the epoch.
    pub verdict_since_ms: u64,
    /// Intent.
    pub intent: Intent,
}

/// Soft facts of a backend, from heartbeats.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BackendFacts {
    /// Which.
    pub backend: BackendId,
    /// False: the directory is gone or the disk fails; `problem` says what.
    pub healthy: bool,
    /// Empty when healthy.
    pub problem: String,
    /// Bytes used.
    pub used_bytes: u64,
    /// Bytes that can still be stored (smaller of quota and free disk).
    pub free_bytes: u64,
    /// Pieces held.
    pub pieces: u64,
    /// End of the last complete scrub tour, ms since the epoch; 0 is never.
    pub last_scrub_ms: u64,
    /// Share of the running scrub tour done, in percent; `None` when no tour runs.
    pub scrub_percent: Option<u8>,
    /// Damaged pieces found by scrub since the agent started.
    pub scrub_found: u64,
    /// How long before this was said it was found; older programs do not say.
    pub age_ms: Option<u64>,
}

/// One agent: replicated facts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// Identity.
    pub id: AgentId,
    /// Location.
    pub location: LocationName,
    /// Node.
    pub node: NodeName,
}

/// One metad node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Identity in Raft.
    pub id: MetadId,
    /// Name (`m1`).
    pub name: NodeName,
    /// Location.
    pub location: LocationName,
    /// `host:port`.
    pub address: String,
    /// Voter or learner.
    pub voter: bool,
    /// Answered the leader lately.
    pub healthy: bool,
    /// Is the leader.
    pub leader: bool,
}

/// The voters that removing a metad node would leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VotersLeft {
    /// All.
    pub voters: usize,
    /// Those of them that answer.
    pub answering: usize,
}

impl VotersLeft {
    /// After `removed` is gone.
    pub fn without(members: &[Member], removed: MetadId) -> Self {
        let left = members.iter().filter(|m| m.voter && m.id != removed);
        Self {
            voters: left.clone().count(),
            answering: left.filter(|member| member.healthy).count(),
        }
    }

    /// Nothing is agreed on by fewer.
    pub fn majority(self) -> usize {
        self.voters / 2 + 1
    }

    /// Can they agree on anything?
    pub fn have_quorum(self) -> bool {
        self.answering >= self.majority()
    }

    /// So many more may fail before nothing is agreed on any more.
    pub fn spare(self) -> usize {
        self.answering.saturating_sub(self.majority())
    }
}

/// A shard that was found bad.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardReport {
    /// Volume.
    pub volume: VolumeId,
    /// Datafile.
    pub datafile: DatafileId,
    /// Index of the shard in the record.
    pub shard: u32,
    /// Backend it was read from: a report about a shard that has moved since is ignored.
    pub backend: BackendId,
    /// `Missing` or `Corrupt`.
    pub state: ShardState,
    /// Found by a scrub (else by a read).
    pub by_scrub: bool,
}

/// One rebuild: everything an agent needs; it has no choices left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebuildJob {
    /// The record as it was when the job was planned.
    pub record: EncodingRecord,
    /// Index of the shard to make.
    pub shard: u32,
    /// Backend it goes to (hosted or attached by the agent that gets the job).
    pub to: BackendId,
}

/// What metad wants of an agent; sent on its session stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentOrder {
    /// Make a shard; answer with `SwapShard`, then `JobDone`.
    Rebuild(RebuildJob),
    /// Delete all pieces of this shard from `backend`: its datafile is released, or it moved away.
    DeleteShard {
        /// Where.
        backend: BackendId,
        /// The record the shard belonged to.
        record: EncodingRecord,
        /// Index of the shard.
        shard: u32,
    },
    /// Begin a scrub tour now.
    Scrub {
        /// Which backend.
        backend: BackendId,
    },
    /// Settings changed (also sent first on every session).
    Settings(ClusterSettings),
    /// Backends of the cluster changed (also sent first): addresses to fetch survivors from.
    Backends(Vec<Backend>),
}

/// What an agent says on its session stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentReport {
    /// Alive, with the facts of all its backends.
    Heartbeat {
        /// One entry per backend of this agent.
        facts: Vec<BackendFacts>,
    },
    /// A rebuild ended.
    RebuildDone {
        /// Volume.
        volume: VolumeId,
        /// Datafile.
        datafile: DatafileId,
        /// Shard.
        shard: u32,
        /// Bytes stored.
        bytes: u64,
        /// Why it failed; `None` when the swap was accepted.
        error: Option<String>,
    },
    /// The pieces of a shard are gone.
    ShardDeleted {
        /// Where.
        backend: BackendId,
        /// Volume.
        volume: VolumeId,
        /// Datafile.
        datafile: DatafileId,
        /// Salt of the attempt.
        salt: qsfs_zstor::id::Salt,
        /// Shard.
        shard: u32,
    },
}

/// Everything that changes replicated state from outside. One variant per verb.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mutation {
    /// Admin.
    CreateVolume {
        /// Drawn by the caller, so that a retry is the same volume.
        id: VolumeId,
        /// Unique name.
        name: VolumeName,
        /// Checked against the backends that are joined.
        policy: Policy,
        /// Name of the key.
        key_id: KeyId,
        /// Settings.
        settings: VolumeSettings,
    },
    /// Admin.
    AlterVolume {
        /// Which.
        volume: VolumeId,
        /// New settings.
        settings: VolumeSettings,
    },
    /// Admin. All its records become tombstones.
    DeleteVolume {
        /// Which.
        volume: VolumeId,
    },
    /// Client. A new epoch. Refused as held while another client's lease lives, unless `takeover`.
    AcquireLease {
        /// Volume.
        volume: VolumeId,
        /// State directory.
        client: ClientId,
        /// `host:pid`.
        holder: String,
        /// Take it from a living holder.
        takeover: bool,
    },
    /// Client. Refused as fenced when the epoch is not the volume's.
    RenewLease {
        /// Volume.
        volume: VolumeId,
        /// Epoch held.
        epoch: Epoch,
        /// For status.
        report: ClientReport,
    },
    /// Client.
    ReleaseLease {
        /// Volume.
        volume: VolumeId,
        /// Epoch held.
        epoch: Epoch,
    },
    /// Client. All or nothing: epoch, placement (at least survives one backend) and head order are checked.
    CommitDatafiles {
        /// Volume.
        volume: VolumeId,
        /// Epoch held.
        epoch: Epoch,
        /// New records, version 0.
        records: Vec<EncodingRecord>,
        /// New head, when a meta datafile is among them.
        head: Option<Head>,
    },
    /// Client. Records become tombstones.
    ReleaseDatafiles {
        /// Volume.
        volume: VolumeId,
        /// Epoch held.
        epoch: Epoch,
        /// Which; unknown ones are ignored.
        datafiles: Vec<DatafileId>,
    },
    /// Agent. Compare-and-swap of one shard's backend; resets its state to stored.
    SwapShard {
        /// Volume.
        volume: VolumeId,
        /// Datafile.
        datafile: DatafileId,
        /// Shard.
        shard: u32,
        /// Where it was.
        from: BackendId,
        /// Where it is now (may equal `from`: rebuilt in place).
        to: BackendId,
        /// Record version the rebuild was made from.
        version: u64,
    },
    /// Client or agent.
    ReportShards {
        /// What was found.
        reports: Vec<ShardReport>,
    },
    /// Agent. Idempotent by (location, node).
    RegisterAgent {
        /// Location.
        location: LocationName,
        /// Node.
        node: NodeName,
    },
    /// Agent. Idempotent by (endpoint, namespace) within the agent.
    RegisterBackend {
        /// Its agent.
        agent: AgentId,
        /// How to reach it.
        address: BackendAddress,
        /// Bytes it may hold.
        capacity_bytes: u64,
    },
    /// Admin.
    SetBackendIntent {
        /// Which.
        backend: BackendId,
        /// What.
        intent: Intent,
    },
    /// Admin.
    SetSettings(ClusterSettings),
    /// Admin. The secret itself never reaches the log, only its hash.
    CreateToken {
        /// BLAKE3 of the secret.
        hash: [u8; 32],
        /// What it lets join.
        role: Role,
        /// Lifetime in ms.
        ttl_ms: u64,
    },
    /// Admin.
    RevokeToken {
        /// First 8 hexadecimal digits of the hash, as listed.
        prefix: String,
    },
    /// Admin. How long certificates live that are made from now on. (Not one of [`ClusterSettings`], whose form is fixed in logs.)
    SetCertificateLife {
        /// In ms.
        life_ms: u64,
    },
}

/// Answer to a [`Mutation`] that was applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Applied {
    /// Nothing to say.
    Done,
    /// The volume as it is now.
    Volume(Box<Volume>),
    /// Epoch granted.
    Epoch(Epoch),
    /// Agent id.
    Agent(AgentId),
    /// Backend id.
    Backend(BackendId),
    /// Record version after a swap.
    Version(u64),
}

/// Where the `k + m` shards of one new stripe go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementAnswer {
    /// `k + m` backends in shard order.
    pub backends: Vec<BackendId>,
    /// False: below policy, to be re-silvered later.
    pub full_policy: bool,
    /// When below policy: what is missing, for people.
    pub missing: String,
}

/// A refused or unanswered call. The text is for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum MetadError {
    /// Exit code 10.
    #[error("no such volume: {0}")]
    NoSuchVolume(String),
    /// Exit code 11.
    #[error(
        "volume is held by {holder} (epoch {epoch}); stop it, wait for its lease to end, or take over with --takeover"
    )]
    Held {
        /// `host:pid`.
        holder: String,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Exit code 11.
    #[error("fenced: another writer took over at epoch {current}")]
    Fenced {
        /// Epoch of the volume now.
        current: Epoch,
    },
    /// Exit code 15.
    #[error("policy cannot be met: {0}")]
    PolicyUnmet(String),
    /// The record changed meanwhile.
    #[error("record changed meanwhile: version is {current}")]
    VersionConflict {
        /// Version now.
        current: u64,
    },
    /// Something named does not exist.
    #[error("not found: {0}")]
    NotFound(String),
    /// Exists already.
    #[error("already exists: {0}")]
    Exists(String),
    /// The certificate's role may not do this.
    #[error("permission denied: {0}")]
    Denied(String),
    /// Token unknown, used, expired, revoked, or of another role; the text says which.
    #[error("token refused: {0}")]
    Token(String),
    /// The request makes no sense.
    #[error("invalid request: {0}")]
    Invalid(String),
    /// Exit code 13. No majority answers; the request was certainly not applied.
    #[error("no quorum: {0}")]
    NoQuorum(String),
    /// The answer was lost: applied or not is unknown.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// Could not be reached, TLS refused, or another cluster answered.
    #[error("metad unreachable: {0}")]
    Unreachable(String),
    /// The changes after an index are not remembered any more: list anew, then watch from there.
    #[error(
        "too old: changes are remembered only from index {oldest} on; list again and watch from there"
    )]
    TooOld {
        /// Oldest index from which a watch can go on.
        oldest: u64,
    },
    /// A limit is reached; the text says which. Not applied.
    #[error("busy: {0}")]
    Busy(String),
}

/// How fresh what a read saw was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freshness {
    /// Newest log index that it shows.
    pub applied: u64,
    /// What it does not show was committed at most so many ms before the answer was made: an upper bound, by the clock of the node
    /// that answered alone. 0 for linearizable reads. `None`: the node has not been up to date since it was started.
    pub age_ms: Option<u64>,
}

/// One join token as listed: never its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenInfo {
    /// First 8 hexadecimal digits of the hash.
    pub prefix: String,
    /// Role.
    pub role: Role,
    /// Expiry, ms since the epoch.
    pub expires_ms: u64,
    /// Already consumed.
    pub used: bool,
}

/// What a joining process sends. The key stays with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// Token secret.
    pub secret: Secret,
    /// Role it wants; must be the token's.
    pub role: Role,
    /// PEM certificate signing request.
    pub csr_pem: String,
    /// Name of the node (metad, agent) or of the client.
    pub name: String,
    /// Location; empty for clients.
    pub location: String,
    /// metad only: `host:port` where it will listen.
    pub address: String,
}

/// What it gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinGrant {
    /// Cluster.
    pub cluster: ClusterId,
    /// PEM certificate.
    pub cert_pem: String,
    /// PEM of the cluster's CA.
    pub ca_pem: String,
    /// metad endpoints, `host:port`.
    pub endpoints: Vec<String>,
    /// metad only: its Raft id.
    pub metad_id: Option<MetadId>,
    /// metad only: the CA key, so that no secret exists once.
    pub ca_key_pem: Option<Secret>,
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn members(healthy: &[bool], learners: usize) -> Vec<Member> {
        let all = healthy.iter().map(|healthy| (*healthy, true));
        let all = all.chain(std::iter::repeat_n((true, false), learners));
        let member = |(id, (healthy, voter)): (u64, (bool, bool))| Member {
            id: MetadId(id),
            name: format!("m{id}").parse().unwrap(),
            location: "ams".parse().unwrap(),
            address: "h:1".into(),
            voter,
            healthy,
            leader: id == 1,
        };
        (1..).zip(all).map(member).collect()
    }

    #[test]
    fn a_healthy_member_is_kept_while_a_silent_one_counts() {
        let left = |healthy: &[bool], learners, removed| {
            let left = VotersLeft::without(&members(healthy, learners), MetadId(removed));
            (left.have_quorum(), left.spare())
        };
        let (up, down) = (true, false);
        assert_eq!(left(&[up, up, up], 0, 2), (true, 0));
        assert_eq!(left(&[up, up, down], 0, 3), (true, 0));
        assert_eq!(left(&[up, up, down], 0, 2), (false, 0));
        assert_eq!(left(&[up; 5], 0, 2), (true, 1));
        assert_eq!(left(&[up, up, up, up, down], 0, 2), (true, 0));
        assert_eq!(left(&[up, up, up, down, down], 0, 2), (false, 0));
        // A learner, who copies everything yet, is no help.
        assert_eq!(left(&[up, up, down], 1, 2), (false, 0));
        assert_eq!(left(&[up], 0, 1), (false, 0));
    }
}
