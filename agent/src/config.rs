//! What an agent remembers of its join: `agent.toml` in its data directory, mode 0600 (it holds namespace passwords).
//!
//! Invariant: the file is written before anything is asked of metad and completed after everything was answered, so
//! that an interrupted join goes on with the same namespaces and passwords instead of leaving twins behind.

use crate::AgentError;
use crate::durable::replace_file;
use nix::fcntl::{Flock, FlockArg};
use qsfs_proto::api::{BackendAddress, Secret};
use qsfs_zstor::id::{AgentId, BackendId, ClusterId, LocationName, NodeName};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Version of the file.
pub(crate) const CONFIG_VERSION: u32 = 1;
const CONFIG_FILE: &str = "agent.toml";
const LOCK_FILE: &str = "lock";
const IDENTITY_DIR: &str = "identity";

/// The agent's data directory, locked.
pub(crate) struct DataDir {
    path: PathBuf,
    /// Held until the process ends.
    _lock: Flock<File>,
}

impl DataDir {
    /// Makes the directory if it is missing (mode 0700) and takes its lock.
    pub(crate) fn create(path: &Path) -> Result<Self, AgentError> {
        use std::os::unix::fs::DirBuilderExt;
        let make = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path);
        make.map_err(AgentError::io("create directory", path))?;
        Self::open(path)
    }

    /// Takes the lock of an existing one.
    pub(crate) fn open(path: &Path) -> Result<Self, AgentError> {
        if !path.is_dir() {
            return Err(AgentError::NotJoined(path.to_owned()));
        }
        let lock = path.join(LOCK_FILE);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock)
            .map_err(AgentError::io("open", &lock))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => Ok(Self {
                path: path.to_owned(),
                _lock: held,
            }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(AgentError::Busy(path.to_owned())),
            Err((_, errno)) => Err(AgentError::io("lock", &lock)(errno.into())),
        }
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the identity is.
    pub(crate) fn identity(&self) -> PathBuf {
        Self::identity_of(&self.path)
    }

    /// The same of a directory that is not locked.
    pub(crate) fn identity_of(path: &Path) -> PathBuf {
        path.join(IDENTITY_DIR)
    }

    /// The configuration, if there is one.
    pub(crate) fn load(&self) -> Result<Option<Config>, AgentError> {
        Self::read(&self.path)
    }

    /// That of a directory that is not locked: another process may change it.
    pub(crate) fn read(dir: &Path) -> Result<Option<Config>, AgentError> {
        let path = dir.join(CONFIG_FILE);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(AgentError::io("read", &path))?,
        };
        let broken = |reason: String| AgentError::Config {
            path: path.clone(),
            reason,
        };
        let config: Config = toml::from_str(&text).map_err(|error| broken(error.to_string()))?;
        if config.version != CONFIG_VERSION {
            return Err(broken(format!(
                "it has version {}, this is {CONFIG_VERSION}",
                config.version
            )));
        }
        Ok(Some(config))
    }

    /// Makes the configuration durable.
    pub(crate) fn save(&self, config: &Config) -> Result<(), AgentError> {
        let path = self.path.join(CONFIG_FILE);
        let text = toml::to_string(config).map_err(|error| AgentError::Config {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        replace_file(&path, text.as_bytes()).map_err(AgentError::io("write", &path))
    }

    /// Nothing there but the lock?
    pub(crate) fn is_fresh(&self) -> Result<bool, AgentError> {
        let entries = fs::read_dir(&self.path).map_err(AgentError::io("list", &self.path))?;
        for entry in entries {
            let entry = entry.map_err(AgentError::io("list", &self.path))?;
            if entry.file_name() != LOCK_FILE {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// [`CONFIG_VERSION`].
    pub(crate) version: u32,
    /// Cluster.
    pub(crate) cluster: ClusterId,
    /// Location of this node.
    pub(crate) location: LocationName,
    /// Name of this node.
    pub(crate) node: NodeName,
    /// Where backends are served.
    pub(crate) listen: SocketAddr,
    /// `host:port` by which others reach it.
    pub(crate) endpoint: String,
    /// metad, `host:port`.
    pub(crate) metad: Vec<String>,
    /// Given by metad; missing while the join is not finished.
    pub(crate) agent: Option<AgentId>,
    /// Directories.
    #[serde(default)]
    pub(crate) backend: Vec<HostedConfig>,
    /// Plain 0-db namespaces elsewhere.
    #[serde(default)]
    pub(crate) attached: Vec<AttachedConfig>,
}

impl Config {
    /// Did the join end?
    pub(crate) fn is_complete(&self) -> bool {
        self.agent.is_some()
            && self.backend.iter().all(|backend| backend.id.is_some())
            && self.attached.iter().all(|attached| attached.id.is_some())
    }
}

/// A backend in a directory of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HostedConfig {
    /// Given by metad.
    pub(crate) id: Option<BackendId>,
    /// Directory.
    pub(crate) dir: PathBuf,
    /// Namespace.
    pub(crate) namespace: String,
    /// Its password.
    pub(crate) password: Secret,
    /// Bytes it may hold.
    pub(crate) capacity_bytes: u64,
}

impl HostedConfig {
    /// How others reach it.
    pub(crate) fn address(&self, endpoint: &str) -> BackendAddress {
        BackendAddress {
            endpoint: endpoint.to_owned(),
            namespace: self.namespace.clone(),
            password: Some(self.password.clone()),
            tls: true,
        }
    }
}

/// A plain 0-db namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AttachedConfig {
    /// Given by metad.
    pub(crate) id: Option<BackendId>,
    /// `host:port`.
    pub(crate) endpoint: String,
    /// Namespace.
    pub(crate) namespace: String,
    /// Its password.
    pub(crate) password: Option<Secret>,
    /// Bytes it may hold.
    pub(crate) capacity_bytes: u64,
}

impl AttachedConfig {
    /// How everybody reaches it.
    pub(crate) fn address(&self) -> BackendAddress {
        BackendAddress {
            endpoint: self.endpoint.clone(),
            namespace: self.namespace.clone(),
            password: self.password.clone(),
            tls: false,
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn config() -> Config {
        Config {
            version: CONFIG_VERSION,
            cluster: ClusterId::from_bytes([3; 16]),
            location: "loc1".parse().unwrap(),
            node: "n1".parse().unwrap(),
            listen: "127.0.0.1:7500".parse().unwrap(),
            endpoint: "127.0.0.1:7500".into(),
            metad: vec!["127.0.0.1:7400".into()],
            agent: Some(AgentId(1)),
            backend: vec![HostedConfig {
                id: Some(BackendId(2)),
                dir: "/disks/a".into(),
                namespace: "b-1".into(),
                password: Secret("s".into()),
                capacity_bytes: 1 << 40,
            }],
            attached: vec![],
        }
    }

    #[test]
    fn a_configuration_is_private_and_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::create(&dir.path().join("data")).unwrap();
        assert!(data.is_fresh().unwrap());
        assert_eq!(data.load().unwrap(), None);
        data.save(&config()).unwrap();
        assert_eq!(data.load().unwrap(), Some(config()));
        assert!(!data.is_fresh().unwrap());
        let mode = fs::metadata(data.path().join(CONFIG_FILE))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_data_directory_has_one_process_and_a_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::create(dir.path()).unwrap();
        assert!(matches!(
            DataDir::open(dir.path()),
            Err(AgentError::Busy(_))
        ));
        fs::write(dir.path().join(CONFIG_FILE), "version = 1\nwhat = 3").unwrap();
        assert!(matches!(data.load(), Err(AgentError::Config { .. })));
        drop(data);
        let data = DataDir::open(dir.path()).unwrap();
        data.save(&Config {
            version: 9,
            ..config()
        })
        .unwrap();
        assert!(matches!(data.load(), Err(AgentError::Config { .. })));
        assert!(matches!(
            DataDir::open(&dir.path().join("no")),
            Err(AgentError::NotJoined(_))
        ));
    }
}
