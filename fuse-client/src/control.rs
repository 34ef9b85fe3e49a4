//! The control socket: what commands ask of a running mount, as JSON lines over a unix socket in the state directory.
//!
//! One request per connection; the answer is any number of `progress` lines and one last line, `done` or `error`. From a directory
//! of the mount the socket is found by an extended attribute of the root ([`find`]).

pub mod client;
pub mod server;

pub use crate::cache::{CacheStatus, Evicted};
pub use client::{Client, ControlError, Found, find};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Longest line either way.
pub const LINE_BYTES_MAX: usize = 64 << 20;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Push everything written so far and wait until it is committed.
    Sync {
        /// Longest wait; none is a default of ten minutes.
        timeout_ms: Option<u64>,
        /// Be content with less than the policy.
        allow_degraded: bool,
    },
    /// Drop all local datafiles and kernel pages that may go.
    Evict,
    /// What is local.
    CacheStatus,
    /// Where the bytes of a file are.
    Info {
        /// Path below the root of the mount.
        path: PathBuf,
    },
    /// State of the mount.
    Report,
    /// Push what is at risk, then unmount and end.
    Unmount {
        /// Longest wait for the push.
        timeout_ms: Option<u64>,
    },
}

/// How far a long request is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes committed of those that were at risk when it began.
    pub done_bytes: u64,
    /// Bytes at risk when it began.
    pub total_bytes: u64,
    /// Datafiles not committed yet.
    pub datafiles_waiting: u64,
    /// Why it does not go on; empty when it does.
    pub blocked: String,
}

/// What is known of a sync that succeeded.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Synced {
    /// Head after it.
    pub head: u64,
    /// Datafiles below policy.
    pub below_policy: u64,
    /// What the policy misses now; empty at full policy.
    pub missing: String,
}

/// State of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Report {
    /// Volume.
    pub volume: String,
    /// Mount point.
    pub mountpoint: PathBuf,
    /// State directory.
    pub state_dir: PathBuf,
    /// Process.
    pub pid: u32,
    /// A follower.
    pub read_only: bool,
    /// Epoch held.
    pub epoch: u64,
    /// Epoch of the writer that took over.
    pub fenced_by: Option<u64>,
    /// Head as committed.
    pub head: u64,
    /// Bytes at risk.
    pub at_risk_bytes: u64,
    /// Age of the oldest of them.
    pub at_risk_age_s: u64,
    /// Datafiles waiting for their commit.
    pub datafiles_waiting: u64,
    /// Datafiles committed below policy.
    pub below_policy: u64,
    /// Why pushing does not go on; empty when all is well.
    pub push_blocked: String,
    /// Why the local store stopped; empty when it runs.
    pub store_failure: String,
    /// Why writers wait; empty when they do not.
    pub writers_held: String,
    /// Cache.
    pub cache: CacheStatus,
    /// Pieces read from backends.
    pub pieces_fetched: u64,
    /// Ranges that needed reconstruction.
    pub reconstructed: u64,
    /// Shards reported as bad.
    pub shards_reported: u64,
}

/// A run of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentInfo {
    /// Where in the file.
    pub file_offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// Datafile that holds it.
    pub datafile: u64,
    /// Where in the datafile.
    pub offset: u64,
}

/// One shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardInfo {
    /// Index; those below `k` are data.
    pub shard: u64,
    /// Backend.
    pub backend: u64,
    /// Location.
    pub location: String,
    /// Node.
    pub node: String,
    /// Where it listens.
    pub endpoint: String,
    /// `up`, `suspect`, `down`, `lost`, `unknown`.
    pub verdict: String,
    /// `stored`, `missing`, `corrupt`.
    pub state: String,
}

/// One datafile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatafileInfo {
    /// Id.
    pub datafile: u64,
    /// `open`, `sealed`, `pushed` when local, else `remote`.
    pub local: String,
    /// Committed: it has an encoding record.
    pub committed: bool,
    /// Geometry of its stripe; empty when not committed.
    pub geometry: String,
    /// Shards; empty when not committed.
    pub shards: Vec<ShardInfo>,
}

/// Where the bytes of a file are.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FileInfo {
    /// Path below the root.
    pub path: PathBuf,
    /// Inode.
    pub ino: u64,
    /// Size.
    pub size: u64,
    /// Extents in file order.
    pub extents: Vec<ExtentInfo>,
    /// Datafiles they are in.
    pub datafiles: Vec<DatafileInfo>,
    /// metad could not be asked: shards are missing here, for this reason.
    pub records_missing: String,
}

/// The last word of a request that succeeded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "of", rename_all = "kebab-case")]
pub enum Answer {
    /// To [`Request::Sync`].
    Synced(Synced),
    /// To [`Request::Evict`].
    Evicted(Evicted),
    /// To [`Request::CacheStatus`].
    CacheStatus(CacheStatus),
    /// To [`Request::Info`].
    Info(FileInfo),
    /// To [`Request::Report`].
    Report(Box<Report>),
    /// To [`Request::Unmount`]: all is pushed, the mount ends now.
    Unmounting,
}

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub enum Line {
    /// It goes on.
    Progress(Progress),
    /// It is done.
    Done {
        /// The answer.
        answer: Answer,
    },
    /// It failed.
    Error {
        /// `POLICY`, `DEADLINE`, `FENCED`, `NOT_FOUND`, `INVALID`, `FAILED`.
        code: String,
        /// For people.
        text: String,
        /// Exit code for scripts.
        exit_code: u8,
    },
}

/// A path under which a socket may be bound or reached although its real path is longer than the 108 bytes that
/// `sun_path` holds: through a descriptor of its directory.
pub(crate) fn short_path(socket: &Path) -> std::io::Result<(std::fs::File, PathBuf)> {
    use std::os::fd::AsRawFd;
    let dir = std::fs::File::open(socket.parent().unwrap_or(Path::new(".")))?;
    let name = socket.file_name().unwrap_or_default();
    let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((dir, path))
}
