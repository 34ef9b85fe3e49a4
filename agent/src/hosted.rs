//! A backend in a directory of this node: an engine namespace, and the marker that says whose directory it is.
//!
//! ```text
//! DIR/qsfs-backend.toml     cluster, location, node, namespace
//! DIR/pieces/               the engine's files
//! ```
//!
//! Invariant: only `join` makes directories and namespaces. When the directory of a known backend is gone, that is a
//! problem to report, never a reason to begin an empty one: an empty backend would answer that nothing was stored.

use crate::AgentError;
use crate::config::{Config, HostedConfig};
use crate::durable::replace_file;
use crate::local::{Probe, Usage};
use crate::store::{KeyPage, Noticed, PieceStore, StoreError, StoredKey};
use async_trait::async_trait;
use bytes::Bytes;
use qsfs_zdb::engine::{Engine, EngineError, Mode, Namespace, NamespaceOptions, NamespaceSettings};
use qsfs_zstor::id::{ClusterId, LocationName, NodeName};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MARKER_FILE: &str = "qsfs-backend.toml";
const PIECES_DIR: &str = "pieces";
/// Keys of one page of a scan.
const SCAN_KEYS: usize = 1_000;

/// Whose a directory is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Marker {
    cluster: ClusterId,
    location: LocationName,
    node: NodeName,
    namespace: String,
}

impl Marker {
    fn of(config: &Config, backend: &HostedConfig) -> Self {
        Self {
            cluster: config.cluster,
            location: config.location.clone(),
            node: config.node.clone(),
            namespace: backend.namespace.clone(),
        }
    }

    fn read(dir: &Path) -> Result<Option<Self>, String> {
        match fs::read_to_string(dir.join(MARKER_FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.to_string()),
            Ok(text) => toml::from_str(&text)
                .map(Some)
                .map_err(|error| error.to_string()),
        }
    }
}

/// Before anything is asked of metad: may this directory become this backend?
pub(crate) fn check_dir(config: &Config, backend: &HostedConfig) -> Result<(), AgentError> {
    let dir = &backend.dir;
    let mut entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(AgentError::io("list", dir))?,
    };
    let marker = Marker::read(dir).map_err(|reason| AgentError::Config {
        path: dir.join(MARKER_FILE),
        reason,
    })?;
    match marker {
        Some(marker) if marker == Marker::of(config, backend) => Ok(()),
        Some(marker) if marker.cluster != config.cluster => Err(AgentError::OtherCluster {
            path: dir.clone(),
            found: marker.cluster.to_string(),
            wanted: config.cluster.to_string(),
        }),
        Some(marker) => Err(AgentError::BackendTaken {
            path: dir.clone(),
            owner: format!("{}/{} ({})", marker.location, marker.node, marker.namespace),
        }),
        None if entries.next().is_none() => Ok(()),
        None => Err(AgentError::BackendNotEmpty(dir.clone())),
    }
}

/// Makes the directory, its marker and its namespace, or finds them made.
pub(crate) fn create(
    engine: &Engine,
    config: &Config,
    backend: &HostedConfig,
) -> Result<(), AgentError> {
    let dir = &backend.dir;
    fs::create_dir_all(dir).map_err(AgentError::io("create directory", dir))?;
    let marker = toml::to_string(&Marker::of(config, backend)).expect("a marker is a plain table");
    let path = dir.join(MARKER_FILE);
    replace_file(&path, marker.as_bytes()).map_err(AgentError::io("write", &path))?;
    let options = NamespaceOptions {
        settings: NamespaceSettings {
            mode: Mode::User,
            maxsize_bytes: backend.capacity_bytes,
            password: Some(backend.password.0.clone()),
            public: false,
            ..NamespaceSettings::default()
        },
        replace_settings: true,
        ..NamespaceOptions::new(&backend.namespace, dir.join(PIECES_DIR))
    };
    engine
        .add_namespace(options)
        .map_err(|error| AgentError::Backend {
            path: dir.clone(),
            reason: error.to_string(),
        })?;
    Ok(())
}

/// Opens a known backend; the text says why it cannot be, for its facts.
pub(crate) fn open(
    engine: &Engine,
    config: &Config,
    backend: &HostedConfig,
) -> Result<Arc<Namespace>, String> {
    let dir = &backend.dir;
    let gone = || format!("directory {} is gone", dir.display());
    if !dir.is_dir() {
        return Err(gone());
    }
    match Marker::read(dir) {
        Ok(Some(marker)) if marker == Marker::of(config, backend) => {}
        Ok(Some(_)) => {
            return Err(format!(
                "directory {} belongs to another backend",
                dir.display()
            ));
        }
        Ok(None) => {
            return Err(format!(
                "directory {} is empty or not a backend: was its disk mounted?",
                dir.display()
            ));
        }
        Err(error) => return Err(format!("marker of {}: {error}", dir.display())),
    }
    let options = NamespaceOptions::existing(&backend.namespace, dir.join(PIECES_DIR));
    engine.add_namespace(options).map_err(|error| match error {
        EngineError::Gone { .. } => gone(),
        other => other.to_string(),
    })
}

/// An engine namespace as a place for pieces.
pub(crate) struct HostedStore {
    /// The namespace.
    pub(crate) namespace: Arc<Namespace>,
}

fn store_error(error: &EngineError) -> StoreError {
    let text = error.to_string();
    match error {
        EngineError::NoSpace => StoreError::Full(text),
        EngineError::Corrupt(_) => StoreError::Corrupt(text),
        _ => StoreError::Unavailable(text),
    }
}

#[async_trait]
impl PieceStore for HostedStore {
    async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let got = match self.namespace.get(key).await {
            Ok(got) => got,
            // A sector that cannot be read is as bad as a flipped bit, as long as the rest of the backend is well.
            Err(error @ (EngineError::Io { .. } | EngineError::Datafile(_)))
                if self.namespace.is_alive().is_ok() =>
            {
                return Err(StoreError::Corrupt(format!("cannot be read: {error}")));
            }
            Err(error) => return Err(store_error(&error)),
        };
        if got.is_none() {
            // A directory that was removed while it is open holds nothing; that is no finding about a piece.
            self.namespace
                .is_alive()
                .map_err(|error| store_error(&error))?;
        }
        Ok(got)
    }

    async fn set(&self, key: &[u8], value: Bytes) -> Result<(), StoreError> {
        let stored = self.namespace.set(key, value).await;
        stored.map(drop).map_err(|error| store_error(&error))
    }

    async fn delete(&self, key: &[u8]) -> Result<bool, StoreError> {
        self.namespace
            .delete(key)
            .await
            .map_err(|error| store_error(&error))
    }

    async fn forget_cached(&self) {
        let dir = self.namespace.dir().to_owned();
        // A failing disk may hang in a system call; the runtime must not.
        let dropped = tokio::task::spawn_blocking(move || drop_page_cache(&dir)).await;
        if let Err(error) = dropped.map_err(io::Error::other).and_then(|result| result) {
            tracing::debug!(dir = %self.namespace.dir().display(), %error, "cannot drop cached pages; the scrub reads some from memory");
        }
    }

    async fn noticed(&self) -> Vec<Noticed> {
        let noticed = |damage: qsfs_zdb::engine::DamageReport| {
            let place = format!("{}@{}", damage.path.display(), damage.offset);
            damage.key.map(|key| Noticed { place, key })
        };
        self.namespace
            .damaged()
            .into_iter()
            .filter_map(noticed)
            .collect()
    }

    async fn keys(&self, from: Option<Bytes>) -> Result<KeyPage, StoreError> {
        let position = match from {
            None => None,
            Some(bytes) => Some(u64::from_le_bytes(bytes.as_ref().try_into().map_err(
                |_| StoreError::Unavailable("a scan goes on where it did not end".to_owned()),
            )?)),
        };
        let page = self.namespace.keys_after(position, SCAN_KEYS);
        let page = page.map_err(|error| store_error(&error))?;
        let stored = |stat: qsfs_zdb::engine::KeyStat| StoredKey {
            key: stat.key,
            set_ms: u64::from(stat.timestamp) * 1_000,
        };
        Ok(KeyPage {
            next: page
                .next
                .map(|position| Bytes::copy_from_slice(&position.to_le_bytes())),
            keys: page.keys.into_iter().map(stored).collect(),
        })
    }
}

/// Everything in the files is durable already, so its pages are clean and can go.
fn drop_page_cache(dir: &Path) -> io::Result<()> {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    for entry in fs::read_dir(dir)? {
        let file = fs::File::open(entry?.path())?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    }
    Ok(())
}

/// Health of a hosted backend.
pub(crate) struct HostedProbe {
    /// Or why it could not be opened; it stays closed until the agent is restarted.
    pub(crate) opened: Result<Arc<Namespace>, String>,
    /// The backend's directory.
    pub(crate) dir: PathBuf,
}

#[async_trait]
impl Probe for HostedProbe {
    async fn probe(&self) -> Result<Usage, String> {
        let namespace = Arc::clone(self.opened.as_ref().map_err(Clone::clone)?);
        let dir = self.dir.clone();
        let look = move || {
            if !dir.join(MARKER_FILE).exists() {
                return Err(format!("directory {} is gone", dir.display()));
            }
            namespace.is_alive().map_err(|error| error.to_string())?;
            let usage = namespace.usage().map_err(|error| error.to_string())?;
            Ok(Usage {
                used_bytes: usage.used_bytes,
                free_bytes: usage.free_bytes,
                pieces: usage.keys,
            })
        };
        // A failing disk may hang in a system call; the caller's deadline must not.
        match tokio::task::spawn_blocking(look).await {
            Ok(usage) => usage,
            Err(error) => Err(error.to_string()),
        }
    }
}
