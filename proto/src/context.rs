//! The context file, `cluster.toml`: where the cluster is and who we are.
//!
//! ```toml
//! cluster = "0123…"                      # cluster id
//! role = "admin"                         # role of the certificate below
//! endpoints = ["10.0.0.1:7400", "10.0.0.2:7400"]
//! state_dir = "/home/me/.local/state/qsfs"   # optional: where mounts keep their local store
//! certificate = """-----BEGIN …"""       # or the path of a PEM file, relative to this file
//! key = """-----BEGIN …"""               # secret: the file is 0600
//! ca = """-----BEGIN …"""
//! ```

use crate::api::{MetadError, Role, Secret};
use crate::client::MetadClient;
use crate::identity::{Identity, IdentityError, IdentityPem, Locked, PEM_BYTES_MAX, write_private};
use qsfs_zstor::id::{ClientId, ClusterId};
use serde::{Deserialize, Serialize};
use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Environment variable that names the file.
pub const CONTEXT_VARIABLE: &str = "QSFS_CLUSTER";
/// The last place that is looked at.
pub const CONTEXT_SYSTEM_PATH: &str = "/etc/qsfs/cluster.toml";
/// Longest file accepted.
pub const CONTEXT_BYTES_MAX: u64 = 1 << 20;

/// Why there is no usable context.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// Nowhere.
    #[error(
        "no cluster file: give --cluster FILE, set {CONTEXT_VARIABLE}, or put one at {}; `qsfs metad bootstrap` and `qsfs dev` write one",
        .0.join(" or ")
    )]
    NotFound(Vec<String>),
    /// Could not be read or written.
    #[error("{step} {path}: {source}")]
    Io {
        /// Verb phrase.
        step: &'static str,
        /// Path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Not TOML, a key is missing or unknown, or a value is no such thing.
    #[error("{path} is not a cluster file: {reason}")]
    Malformed {
        /// Path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The certificate is not what the file says.
    #[error("{path}: {source}")]
    Identity {
        /// Path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: IdentityError,
    },
}

/// The file as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ContextFile {
    cluster: String,
    role: Role,
    endpoints: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state_dir: Option<PathBuf>,
    certificate: String,
    key: Secret,
    ca: String,
}

/// A context that parses and whose identity is of the cluster and role it names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    endpoints: Vec<String>,
    state_dir: Option<PathBuf>,
    identity: Identity,
}

impl Context {
    /// Puts one together. `endpoints` are `host:port`.
    pub fn new(endpoints: Vec<String>, identity: Identity, state_dir: Option<PathBuf>) -> Self {
        Self {
            endpoints,
            state_dir,
            identity,
        }
    }

    /// `explicit`, else `$QSFS_CLUSTER`, else `~/.config/qsfs/cluster.toml`, else `/etc/qsfs/cluster.toml`; the first two
    /// must exist when they are given.
    pub fn find(explicit: Option<&Path>) -> Result<Self, ContextError> {
        Self::load(&Self::locate(explicit)?)
    }

    /// The file that [`Self::find`] reads.
    pub fn locate(explicit: Option<&Path>) -> Result<PathBuf, ContextError> {
        find_path(
            explicit,
            env::var_os(CONTEXT_VARIABLE).map(PathBuf::from),
            env::var_os("XDG_CONFIG_HOME").map(PathBuf::from),
            env::var_os("HOME").map(PathBuf::from),
            Path::is_file,
        )
    }

    /// Reads one file.
    pub fn load(path: &Path) -> Result<Self, ContextError> {
        let malformed = |reason: String| ContextError::Malformed {
            path: path.to_owned(),
            reason,
        };
        let text = read(path, CONTEXT_BYTES_MAX)?;
        let file: ContextFile = toml::from_str(&text)
            // The whole error would quote the line, and a line may be a key.
            .map_err(|error| malformed(error.message().to_owned()))?;
        if file.endpoints.is_empty() {
            return Err(malformed("it lists no endpoints".into()));
        }
        let cluster: ClusterId = file
            .cluster
            .parse()
            .map_err(|error| malformed(format!("{error}")))?;
        let identity = Identity::from_pem(IdentityPem {
            certificate: inline(path, file.certificate)?,
            key: Secret(inline(path, file.key.0)?),
            ca: inline(path, file.ca)?,
        })
        .map_err(|source| ContextError::Identity {
            path: path.to_owned(),
            source,
        })?;
        if identity.cluster() != cluster || identity.role() != file.role {
            let peer = identity.peer();
            return Err(malformed(format!(
                "it says cluster {cluster}, role {}, but its certificate is {peer}",
                file.role
            )));
        }
        Ok(Self::new(file.endpoints, identity, file.state_dir))
    }

    /// Writes it, durable, readable by the owner only.
    pub fn save(&self, path: &Path) -> Result<(), ContextError> {
        let pem = self.identity.to_pem();
        let file = ContextFile {
            cluster: self.identity.cluster().to_string(),
            role: self.identity.role(),
            endpoints: self.endpoints.clone(),
            state_dir: self.state_dir.clone(),
            certificate: pem.certificate,
            key: pem.key,
            ca: pem.ca,
        };
        let text = toml::to_string_pretty(&file).map_err(|error| ContextError::Malformed {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        let io = |source| ContextError::Io {
            step: "writing",
            path: path.to_owned(),
            source,
        };
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            fs::create_dir_all(dir).map_err(io)?;
        }
        write_private(path, text.as_bytes()).map_err(io)
    }

    /// Changes a file that several processes may change at once: what it holds is read, changed and written while no other does.
    /// Nothing is written when nothing changed.
    pub fn update(path: &Path, change: impl FnOnce(Self) -> Self) -> Result<Self, ContextError> {
        let _locked = Locked::parent_of(path).map_err(|source| ContextError::Io {
            step: "locking the directory of",
            path: path.to_owned(),
            source,
        })?;
        let old = Self::load(path)?;
        let new = change(old.clone());
        if new != old {
            new.save(path)?;
        }
        Ok(new)
    }

    /// The same with other endpoints.
    #[must_use]
    pub fn with_endpoints(self, endpoints: Vec<String>) -> Self {
        Self { endpoints, ..self }
    }

    /// The same with another certificate of the same identity.
    #[must_use]
    pub fn with_identity(self, identity: Identity) -> Self {
        Self { identity, ..self }
    }

    /// metad endpoints, `host:port`.
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// The cluster.
    pub fn cluster(&self) -> ClusterId {
        self.identity.cluster()
    }

    /// Who we are.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Where mounts keep their local store, if the file says.
    pub fn state_dir(&self) -> Option<&Path> {
        self.state_dir.as_deref()
    }

    /// A client of this cluster.
    pub fn client(&self, client: ClientId) -> Result<MetadClient, MetadError> {
        MetadClient::new(self.endpoints.clone(), &self.identity, client)
    }
}

fn find_path(
    explicit: Option<&Path>,
    variable: Option<PathBuf>,
    config_home: Option<PathBuf>,
    home: Option<PathBuf>,
    exists: impl Fn(&Path) -> bool,
) -> Result<PathBuf, ContextError> {
    if let Some(path) = explicit {
        return Ok(path.to_owned());
    }
    if let Some(path) = variable.filter(|path| !path.as_os_str().is_empty()) {
        return Ok(path);
    }
    let config = config_home
        .filter(|path| path.is_absolute())
        .or_else(|| home.map(|home| home.join(".config")));
    let candidates: Vec<PathBuf> = config
        .map(|config| config.join("qsfs/cluster.toml"))
        .into_iter()
        .chain([PathBuf::from(CONTEXT_SYSTEM_PATH)])
        .collect();
    let shown = |paths: &[PathBuf]| {
        paths
            .iter()
            .map(|path| path.display().to_string())
            .collect()
    };
    match candidates.iter().find(|path| exists(path)) {
        Some(path) => Ok(path.clone()),
        None => Err(ContextError::NotFound(shown(&candidates))),
    }
}

/// The PEM itself, or the text of the file it names.
fn inline(context: &Path, value: String) -> Result<String, ContextError> {
    if value.trim_start().starts_with("-----BEGIN") {
        return Ok(value);
    }
    // A value with line breaks is a damaged PEM, not a path; it may be a key and must not be shown.
    if value.contains('\n') || value.is_empty() {
        return Err(ContextError::Malformed {
            path: context.to_owned(),
            reason: "certificate, key and ca must be PEM texts or paths of PEM files".into(),
        });
    }
    let dir = context.parent().unwrap_or(Path::new(""));
    read(&dir.join(value), PEM_BYTES_MAX as u64)
}

fn read(path: &Path, bytes_max: u64) -> Result<String, ContextError> {
    let io = |source| ContextError::Io {
        step: "reading",
        path: path.to_owned(),
        source,
    };
    if fs::metadata(path).map_err(io)?.len() > bytes_max {
        return Err(io(io::Error::other(format!(
            "longer than {bytes_max} bytes"
        ))));
    }
    fs::read_to_string(path).map_err(io)
}
