//! Why a mount cannot begin, go on, or end well; with the exit code that scripts see.

use crate::fetch::FetchError;
use crate::kit::KitError;
use crate::namespace::NamespaceError;
use crate::ports::StoreError;
use crate::push::SettleError;
use crate::store::open::OpenError;
use qsfs_proto::api::MetadError;
use std::path::PathBuf;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// metad refused or could not be asked.
    #[error("{step}: {reason}")]
    Metad {
        /// Verb phrase.
        step: &'static str,
        /// Why.
        reason: MetadError,
    },
    /// The kit cannot be used.
    #[error(transparent)]
    Kit(#[from] KitError),
    /// No key.
    #[error(
        "{state_dir} holds no key of volume {volume}: give its recovery kit with --kit FILE",
        state_dir = state_dir.display()
    )]
    NoKey {
        /// Volume.
        volume: String,
        /// Where the key would be.
        state_dir: PathBuf,
    },
    /// The key is of another volume, or an old one.
    #[error(
        "wrong key for volume {volume}: {reason}; use the recovery kit that was written for this volume"
    )]
    WrongKey {
        /// Volume.
        volume: String,
        /// How it was noticed.
        reason: String,
    },
    /// Another mount uses it.
    #[error("state directory {} is in use by another mount; unmount that one or choose another --state-dir", .0.display())]
    StateDirBusy(PathBuf),
    /// It is of another volume or cluster.
    #[error("state directory {} belongs to {what} {found}, not to {wanted}: choose another --state-dir", path.display())]
    Foreign {
        /// Which.
        path: PathBuf,
        /// `cluster` or `volume`.
        what: &'static str,
        /// What it says.
        found: String,
        /// What is being mounted.
        wanted: String,
    },
    /// A file of the state directory cannot be used.
    #[error("{step} {}: {reason}", path.display())]
    StateFile {
        /// Verb phrase.
        step: &'static str,
        /// Which.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// The local store cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The local store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The namespace cannot be used or rebuilt.
    #[error("namespace: {0}")]
    Namespace(#[from] NamespaceError),
    /// The meta stream cannot be read back.
    #[error("recover datafile {datafile}: {reason}")]
    Fetch {
        /// Which.
        datafile: u64,
        /// Why.
        reason: FetchError,
    },
    /// The meta stream makes no sense.
    #[error("recover the namespace from datafile {datafile}: {reason}")]
    Meta {
        /// Which.
        datafile: u64,
        /// Why.
        reason: String,
    },
    /// The mount itself.
    #[error(transparent)]
    Fuse(#[from] crate::fuse::MountError),
    /// The filesystem could not be set up.
    #[error("set up the filesystem: {0}")]
    FileSystem(#[from] crate::filesystem::FsError),
    /// What was at risk could not be pushed in time.
    #[error(
        "not everything could be pushed before the end: {0}; it stays in the state directory and is pushed by the next mount"
    )]
    Settle(#[from] SettleError),
    /// TLS of the context's identity.
    #[error("identity: {0}")]
    Identity(String),
    /// A thread ended early.
    #[error("a task of the mount ended early: {0}")]
    Task(String),
}

impl MountError {
    /// Wraps a refusal.
    pub fn metad(step: &'static str) -> impl FnOnce(MetadError) -> Self {
        move |reason| Self::Metad { step, reason }
    }

    /// The exit code of product.md.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Metad { reason, .. } => metad_exit_code(reason),
            Self::WrongKey { .. } => 12,
            Self::Settle(SettleError::Fenced(_)) | Self::Store(StoreError::Fenced(_)) => 11,
            Self::Fetch { reason, .. } => match reason {
                FetchError::TooFewShards(..) | FetchError::Deadline => 14,
                FetchError::Metad(error) => metad_exit_code(error),
                FetchError::Header(_) | FetchError::Chunk(_) => 12,
                FetchError::NoRecord(_)
                | FetchError::Stripe(_)
                | FetchError::PastEnd(_)
                | FetchError::Lost => 1,
            },
            _ => 1,
        }
    }
}

/// Exit code of a refusal by metad.
pub const fn metad_exit_code(error: &MetadError) -> u8 {
    match error {
        MetadError::NoSuchVolume(_) => 10,
        MetadError::Held { .. } | MetadError::Fenced { .. } => 11,
        MetadError::NoQuorum(_) | MetadError::Unreachable(_) | MetadError::Unknown(_) => 13,
        MetadError::PolicyUnmet(_) => 15,
        _ => 1,
    }
}
