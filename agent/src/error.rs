//! What can go wrong for a person who joins or serves an agent.

use qsfs_proto::api::MetadError;
use std::path::PathBuf;

/// Failure of [`join`](fn@crate::join) or [`serve`](fn@crate::serve).
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A file could not be read or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// Verb phrase.
        action: &'static str,
        /// File or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another process serves or joins with this data directory.
    #[error("data directory {0} is in use by another agent process; stop it first")]
    Busy(PathBuf),
    /// Nothing was joined there.
    #[error(
        "{0} is not the data directory of a joined agent; run `qsfs agent join TOKEN --data {0}` first"
    )]
    NotJoined(PathBuf),
    /// A join was begun there and did not end.
    #[error("joining with {0} did not finish; run the same `qsfs agent join` again")]
    Unfinished(PathBuf),
    /// The data directory is joined already.
    #[error(
        "{path} is joined already (agent {agent} of cluster {cluster}); run `qsfs agent serve --data {path}`"
    )]
    AlreadyJoined {
        /// Data directory.
        path: PathBuf,
        /// Its agent.
        agent: String,
        /// Its cluster.
        cluster: String,
    },
    /// The data directory belongs to another cluster.
    #[error(
        "{path} belongs to cluster {found}, the token is of cluster {wanted}; use another data directory"
    )]
    OtherCluster {
        /// Data or backend directory.
        path: PathBuf,
        /// Cluster it belongs to.
        found: String,
        /// Cluster of the token.
        wanted: String,
    },
    /// A begun join had other options.
    #[error(
        "an unfinished join in {path} had another {what}; run it again with the same options or remove {path}"
    )]
    OtherOptions {
        /// Data directory.
        path: PathBuf,
        /// Option that differs.
        what: &'static str,
    },
    /// A data directory with foreign files.
    #[error("data directory {0} is not empty and holds no agent; use an empty one")]
    DataNotEmpty(PathBuf),
    /// A backend directory with foreign files.
    #[error("backend directory {0} is not empty and not a backend of this agent; use an empty one")]
    BackendNotEmpty(PathBuf),
    /// A backend directory that another agent made.
    #[error("backend directory {path} belongs to {owner}; use another one")]
    BackendTaken {
        /// Backend directory.
        path: PathBuf,
        /// `location/node` and namespace.
        owner: String,
    },
    /// Two backends in one place.
    #[error("{0} is given twice; every backend needs its own place")]
    Twice(String),
    /// Nothing to keep shards on.
    #[error(
        "an agent needs at least one backend: --backend DIRECTORY=CAPACITY or --attach zdb://…"
    )]
    NoBackends,
    /// Nobody could reach `0.0.0.0`.
    #[error("others cannot reach {0}: name the address they use with --advertise HOST:PORT")]
    Advertise(String),
    /// The configuration file is broken.
    #[error(
        "{path} cannot be read: {reason}; restore it, or join again with an empty data directory"
    )]
    Config {
        /// File.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The listening address is not to be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Address.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A backend's namespace could not be made.
    #[error("backend {path} cannot be made: {reason}")]
    Backend {
        /// Its directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A 0-db that cannot be attached.
    #[error("0-db {endpoint}, namespace {namespace}, cannot be attached: {reason}")]
    Attach {
        /// `host:port`.
        endpoint: String,
        /// Namespace.
        namespace: String,
        /// Why.
        reason: String,
    },
    /// The token is not one, or of another role.
    #[error("join token: {0}")]
    Token(String),
    /// The agent's certificate and key.
    #[error("identity: {0}")]
    Identity(#[from] qsfs_proto::identity::IdentityError),
    /// A new certificate.
    #[error(transparent)]
    Renewal(#[from] qsfs_proto::renewal::RenewalError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] qsfs_proto::tls::TlsError),
    /// The server of the backends ended.
    #[error("serving backends on {address} ended: {reason}")]
    Server {
        /// Address.
        address: String,
        /// Why.
        reason: String,
    },
    /// metad answered something else than was asked.
    #[error("metad answered {0} where an id belongs; do its version and this one fit together?")]
    Answer(String),
    /// metad refused or did not answer.
    #[error("metad: {0}")]
    Metad(#[from] MetadError),
}

impl AgentError {
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
