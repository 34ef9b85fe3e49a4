//! What a person asks for: `qsfs metad bootstrap`, `join`, `serve`.

use crate::backup::BackupFacts;
use qsfs_proto::api::ClusterSettings;
use qsfs_proto::context::Context;
use qsfs_proto::token::JoinToken;
use qsfs_zstor::id::{LocationName, MetadId, NodeName};
use std::path::PathBuf;
use std::time::Duration;

/// Lifetime of the tokens that a bootstrap prints.
pub const BOOTSTRAP_TOKEN_TTL_MS: u64 = 24 * 3_600_000;

/// Options of [`bootstrap`](fn@crate::bootstrap).
#[derive(Debug, Clone)]
pub struct BootstrapOptions {
    /// Name of the first metad.
    pub name: NodeName,
    /// Its location.
    pub location: LocationName,
    /// `host:port` to listen on.
    pub listen: String,
    /// `host:port` by which others reach it, when that differs.
    pub advertise: Option<String>,
    /// Data directory; made when missing, else it must be empty.
    pub data: PathBuf,
    /// Settings of the cluster.
    pub settings: ClusterSettings,
    /// For how long certificates are made; `None`: [`qsfs_proto::ca::LEAF_VALIDITY`].
    pub certificate_life: Option<Duration>,
    /// Tokens for agents to make, beside the two for metads.
    pub agent_tokens: usize,
}

/// A new cluster.
#[derive(Debug)]
pub struct Bootstrapped {
    /// For its admin.
    pub context: Context,
    /// Two for metads, then those for agents. Single use.
    pub tokens: Vec<JoinToken>,
    /// What to think of, for people.
    pub warnings: Vec<String>,
}

/// Options of [`join`](fn@crate::join).
#[derive(Debug, Clone)]
pub struct JoinOptions {
    /// Token, as printed.
    pub token: String,
    /// Unique name.
    pub name: NodeName,
    /// Location.
    pub location: LocationName,
    /// `host:port` to listen on.
    pub listen: String,
    /// `host:port` by which others reach it, when that differs.
    pub advertise: Option<String>,
    /// Data directory; made when missing, else it must be empty.
    pub data: PathBuf,
}

/// A metad that joined and is to be served now.
#[derive(Debug, Clone)]
pub struct Joined {
    /// Its Raft id.
    pub id: MetadId,
}

/// Options of [`restore`](fn@crate::restore).
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// The backup; the authority's key is beside it ([`crate::backup::key_path`]).
    pub backup: PathBuf,
    /// Name of the first metad.
    pub name: NodeName,
    /// Its location.
    pub location: LocationName,
    /// `host:port` to listen on.
    pub listen: String,
    /// `host:port` by which others reach it, when that differs.
    pub advertise: Option<String>,
    /// Data directory; made when missing, else it must be empty.
    pub data: PathBuf,
}

/// A cluster that begins again.
#[derive(Debug)]
pub struct Restored {
    /// For its admin.
    pub context: Context,
    /// For the other metads. Single use.
    pub tokens: Vec<JoinToken>,
    /// What it begins with.
    pub facts: BackupFacts,
}

/// Options of [`recover`](fn@crate::recover).
#[derive(Debug, Clone)]
pub struct RecoverOptions {
    /// Data directory of the stopped survivor.
    pub data: PathBuf,
    /// Do it; otherwise only say what would happen.
    pub apply: bool,
}

/// What a recovery would do, or did.
#[derive(Debug)]
pub enum Recovery {
    /// Nothing was changed.
    Plan {
        /// The survivor.
        name: NodeName,
        /// Newest entry it holds.
        applied: u64,
        /// Term of that entry.
        term: u64,
    },
    /// The survivor is the first node of the cluster now.
    Done(Box<Restored>),
}

/// Options of [`serve`](fn@crate::serve).
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Data directory of a bootstrap or join.
    pub data: PathBuf,
}
