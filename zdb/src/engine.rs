//! Namespaces of keys and values over append-only datafiles.
//!
//! ```text
//! set ─> queue ─> commit thread: decide, append ─> ONE fdatasync for all that wait, publish in the index, answer
//! get ─> index ─> read + verify                      compaction: copy what is needed, publish, remove the old datafile
//! ```
//!
//! Invariants:
//! - A SET or DEL is answered after it is durable, and becomes visible only then.
//! - GET returns what was set under that key, or nothing, or an error: never other bytes.
//! - The first failed sync stops the namespace for writing ([`EngineError::Stopped`]); reading goes on.
//! - Ids and versions never go back, whatever is deleted and compacted.
//! - A namespace whose directory was removed or replaced says so ([`EngineError::Gone`]) instead of writing into nowhere.

mod append;
mod commit;
mod compact;
mod directory;
mod entry;
mod index;
mod lifecycle;
mod load;
mod namespace;
mod pending;
mod pipeline;
mod queue;
mod read;
mod settings;
mod snapshot;
mod store;
#[cfg(test)]
mod tests;
mod threads;

pub(crate) use entry::value_residue;
pub use entry::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
pub use lifecycle::Jump;
pub(crate) use namespace::Caller;
pub use namespace::{KeyPage, KeyStat, Namespace, NamespaceOptions, Usage};
pub(crate) use queue::Answer;
pub use read::{KeyVersion, RawEntry};
pub use settings::{HISTORY_VERSIONS_MAX, NamespaceSettings};
pub use store::DamageReport;

use crate::datafile::DatafileError;
use crate::media::{DiskMedia, Media};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Namespaces an engine holds at most.
const NAMESPACES_MAX: usize = 1024;

/// Datafiles are never larger than about this, whatever is asked for: the index keeps offsets in 32 bits.
const DATAFILE_BYTES_MAX: u64 = index::OFFSET_MAX / 2;

/// Name of the namespace that every connection starts in.
pub const DEFAULT_NAMESPACE: &str = "default";

/// Who chooses keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// The user.
    User,
    /// The server: 8-byte little-endian ids, counted up.
    Sequential,
}

/// Why the engine did not do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// Quota or disk is full.
    #[error("no space left on this namespace")]
    NoSpace,
    /// There is no such key.
    #[error("key not found")]
    KeyNotFound,
    /// In sequential mode keys are given by the server.
    #[error("only keys that were given out can be updated in a sequential namespace")]
    UpdateOnly,
    /// Empty, or longer than [`KEY_BYTES_MAX`].
    #[error("a key of {bytes} bytes is not possible (1 to 255)")]
    KeySize {
        /// Its length.
        bytes: usize,
    },
    /// Longer than [`VALUE_BYTES_MAX`].
    #[error("a value of {bytes} bytes is not possible (at most 8 MiB)")]
    ValueSize {
        /// Its length.
        bytes: usize,
    },
    /// The namespace is write-once.
    #[error("the namespace is write-once: this key exists")]
    Worm,
    /// The namespace is locked.
    #[error("the namespace is locked for writing")]
    Locked,
    /// The namespace is frozen.
    #[error("the namespace is frozen")]
    Frozen,
    /// The value does not verify.
    #[error("the value under this key is corrupt: {0}")]
    Corrupt(Arc<DatafileError>),
    /// The namespace's directory is not the one that was opened.
    #[error("directory {dir} of the namespace is gone or was replaced", dir = dir.display())]
    Gone {
        /// Which.
        dir: PathBuf,
    },
    /// A sync failed: what the disk holds of the last writes is unknown, so nothing more is written.
    #[error("the namespace stopped writing: {reason}; check the disk, then restart")]
    Stopped {
        /// The first failure.
        reason: String,
    },
    /// Another process has the directory.
    #[error("directory {dir} is in use by another process", dir = dir.display())]
    InUse {
        /// Which.
        dir: PathBuf,
    },
    /// The mode cannot change once something was written.
    #[error("the mode of a namespace that was written to cannot change")]
    InUseMode,
    /// There are datafiles, but not the settings that say how to read them.
    #[error("directory {dir} holds datafiles but the settings of its namespace (file `namespace`) are gone: put that file back from a backup, or move the datafiles away to begin anew", dir = dir.display())]
    SettingsLost {
        /// Which.
        dir: PathBuf,
    },
    /// The key has no such version, or it is not kept any more.
    #[error("the key has no version {version}, or it is not kept any more")]
    UnknownVersion {
        /// Which was asked for.
        version: u64,
    },
    /// The namespace was closed.
    #[error("the namespace is closed")]
    Closed,
    /// A namespace of this name exists.
    #[error("namespace {0} exists")]
    Exists(String),
    /// No namespace has this name.
    #[error("namespace {0} does not exist")]
    UnknownNamespace(String),
    /// Not a name a namespace may have.
    #[error("{0:?} is not possible as the name of a namespace")]
    Name(String),
    /// The engine has no root directory (its namespaces are given to it), or too many namespaces.
    #[error("this server does not make namespaces on request")]
    NotOffered,
    /// The operating system refused.
    #[error("cannot {step} {path}: {source}", path = path.display())]
    Io {
        /// What was attempted.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// A datafile could not be used.
    #[error(transparent)]
    Datafile(Arc<DatafileError>),
}

impl From<DatafileError> for EngineError {
    fn from(error: DatafileError) -> Self {
        match error {
            full if full.is_disk_full() => Self::NoSpace,
            other => Self::Datafile(Arc::new(other)),
        }
    }
}

impl EngineError {
    pub(crate) fn io<'a>(step: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Self + 'a {
        move |source| {
            if crate::media::is_disk_full(&source) {
                return Self::NoSpace;
            }
            Self::Io {
                step,
                path: path.to_owned(),
                source: Arc::new(source),
            }
        }
    }
}

/// When what was acknowledged is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SyncPolicy {
    /// Before it is acknowledged; one sync serves everything that waits.
    #[default]
    Always,
    /// At most this long after it was acknowledged: a crash of the machine loses what was acknowledged since the last sync. This is for
    /// those who want the original 0-db's behaviour, which syncs nothing by itself.
    Interval(Duration),
}

/// Options of an engine.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The disk.
    pub media: Arc<dyn Media>,
    /// Where namespaces made on request (NSNEW, and `default`) live; `None`: all namespaces are added by the program.
    pub root: Option<PathBuf>,
    /// A datafile is complete at this size.
    pub datafile_bytes: u64,
    /// A SET that would leave less than this on the disk is refused, so that deleting and compacting stay possible. Never more than a
    /// sixteenth of the disk.
    pub reserve_bytes: u64,
    /// Compact (and make the snapshots that a fast start needs) in the background.
    pub compaction: bool,
    /// When what was acknowledged is durable.
    pub sync: SyncPolicy,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            media: Arc::new(DiskMedia),
            root: None,
            datafile_bytes: 256 << 20,
            reserve_bytes: 64 << 20,
            compaction: true,
            sync: SyncPolicy::Always,
        }
    }
}

/// A set of namespaces.
#[derive(Debug)]
pub struct Engine {
    options: EngineOptions,
    namespaces: RwLock<BTreeMap<String, Arc<Namespace>>>,
    /// One compaction at a time, so that it takes at most one core and one disk.
    compaction_turn: Arc<Mutex<()>>,
}

impl Engine {
    /// An engine; with a root directory its namespaces are opened and `default` exists.
    pub fn open(options: EngineOptions) -> Result<Self, EngineError> {
        let engine = Self {
            options,
            namespaces: RwLock::default(),
            compaction_turn: Arc::default(),
        };
        if let Some(root) = engine.options.root.clone() {
            let media = Arc::clone(&engine.options.media);
            media
                .create_dir_all(&root)
                .map_err(EngineError::io("create directory", &root))?;
            engine.open_all(&media, &root)?;
            if engine.namespace(DEFAULT_NAMESPACE).is_none() {
                engine.add_namespace(NamespaceOptions::new(
                    DEFAULT_NAMESPACE,
                    root.join(DEFAULT_NAMESPACE),
                ))?;
            }
        }
        Ok(engine)
    }

    /// Open the namespaces below the root directory; one that cannot be opened does not keep the others closed.
    fn open_all(&self, media: &Arc<dyn Media>, root: &Path) -> Result<(), EngineError> {
        let names = media.list(root);
        for name in names.map_err(EngineError::io("list directory", root))? {
            let dir = root.join(&name);
            let opened = if media.exists(&dir.join(settings::MARKER)) {
                self.add_namespace(NamespaceOptions::existing(&name, dir))
                    .map(drop)
            } else if media.exists(&dir.join(settings::DELETED)) {
                lifecycle::remove_deleted(media, &dir)
            } else {
                continue;
            };
            match opened {
                Err(error) if name == DEFAULT_NAMESPACE => return Err(error),
                Err(error) => {
                    tracing::error!(namespace = name, %error, "a namespace cannot be opened; the others go on without it");
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Open (or make, if the options say so) a namespace in a directory of its own.
    pub fn add_namespace(&self, options: NamespaceOptions) -> Result<Arc<Namespace>, EngineError> {
        check_name(&options.name)?;
        if self.namespaces.read().contains_key(&options.name) {
            return Err(EngineError::Exists(options.name));
        }
        let name = options.name.clone();
        let turn = Arc::clone(&self.compaction_turn);
        let namespace = Arc::new(Namespace::open(&self.options, options, turn)?);
        let mut namespaces = self.namespaces.write();
        if namespaces.contains_key(&name) {
            return Err(EngineError::Exists(name));
        }
        if namespaces.len() >= NAMESPACES_MAX {
            return Err(EngineError::NotOffered);
        }
        namespaces.insert(name, Arc::clone(&namespace));
        Ok(namespace)
    }

    /// Make a namespace below the root directory.
    pub fn create_namespace(&self, name: &str) -> Result<Arc<Namespace>, EngineError> {
        let root = self.options.root.as_ref().ok_or(EngineError::NotOffered)?;
        check_name(name)?;
        self.add_namespace(NamespaceOptions::new(name, root.join(name)))
    }

    /// Close a namespace; its files stay.
    pub fn close_namespace(&self, name: &str) -> Result<(), EngineError> {
        let removed = self.namespaces.write().remove(name);
        removed
            .ok_or_else(|| EngineError::UnknownNamespace(name.to_owned()))?
            .close();
        Ok(())
    }

    /// Close a namespace and remove its files.
    pub fn remove_namespace(&self, name: &str) -> Result<(), EngineError> {
        let removed = self.namespaces.write().remove(name);
        let namespace = removed.ok_or_else(|| EngineError::UnknownNamespace(name.to_owned()))?;
        namespace.close();
        namespace.remove_files()
    }

    /// Close all namespaces.
    pub fn close(&self) {
        for namespace in std::mem::take(&mut *self.namespaces.write()).into_values() {
            namespace.close();
        }
    }

    /// A namespace by name.
    pub fn namespace(&self, name: &str) -> Option<Arc<Namespace>> {
        self.namespaces.read().get(name).cloned()
    }

    /// Names, `default` first.
    pub fn namespace_names(&self) -> Vec<String> {
        let namespaces = self.namespaces.read();
        let mut names: Vec<String> = namespaces.keys().cloned().collect();
        names.sort_by_key(|name| (name != DEFAULT_NAMESPACE, name.clone()));
        names
    }
}

fn check_name(name: &str) -> Result<(), EngineError> {
    let refused = name.is_empty()
        || name.len() > 128
        || name == "."
        || name == ".."
        || name.contains('/')
        || name.contains('\0');
    if refused {
        return Err(EngineError::Name(name.to_owned()));
    }
    Ok(())
}
