//! The data directory of a metad node.
//!
//! ```text
//! lock  node.toml  identity/{cert,key,ca}.pem  ca-key.pem (0600)  log/  state/  snapshot/  peers  [renewing]  [damaged/]
//! ```
//!
//! `peers`: where the others were last known to be. It is there once the node has taken part, so a log without a vote beside it is
//! one that was lost. `renewing`: log and state are damaged and are not to be opened any more (`node/renewal.rs`); `damaged/`: what
//! was set aside then, newest only.
//! `node.toml` is written last when a node is made: a directory that has it is complete, one without is refused or begun anew.

use super::NodeError;
use crate::durable;
use crate::log::LogError;
use qsfs_proto::api::Secret;
use qsfs_proto::ca::CertificateAuthority;
use qsfs_proto::identity::Identity;
use qsfs_zdb::media::{DiskMedia, Media, MediaLock};
use qsfs_zstor::id::{ClusterId, LocationName, MetadId, NodeName};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const NODE_FILE: &str = "node.toml";
const CA_KEY_FILE: &str = "ca-key.pem";
const IDENTITY_DIR: &str = "identity";
const PEERS_FILE: &str = "peers";
const RENEWING_FILE: &str = "renewing";
const DAMAGED_DIR: &str = "damaged";
/// What a node that lost its memory gives up.
const MEMORY: [&str; 3] = ["log", "state", "snapshot"];
const LAYOUT_VERSION: u32 = 1;

/// Who this node is; everything else is in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeFile {
    /// Version of the layout.
    pub layout: u32,
    /// Cluster.
    pub cluster: ClusterId,
    /// Raft id.
    pub id: MetadId,
    /// Name.
    pub name: NodeName,
    /// Location.
    pub location: LocationName,
    /// `host:port` to listen on.
    pub listen: String,
    /// `host:port` where others reach it.
    pub advertise: String,
}

impl NodeFile {
    /// With the layout version of this program.
    pub fn new(
        cluster: ClusterId,
        id: MetadId,
        (name, location): (NodeName, LocationName),
        (listen, advertise): (String, String),
    ) -> Self {
        Self {
            layout: LAYOUT_VERSION,
            cluster,
            id,
            name,
            location,
            listen,
            advertise,
        }
    }
}

/// A locked data directory.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: Box<dyn MediaLock>,
}

fn io(step: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> NodeError {
    let path = path.to_owned();
    move |source| NodeError::Io { step, path, source }
}

impl DataDir {
    /// Locks a directory, making it if needed.
    pub fn lock(path: &Path) -> Result<Self, NodeError> {
        fs::create_dir_all(path).map_err(io("create", path))?;
        let lock = DiskMedia
            .lock(&path.join("lock"))
            .map_err(|source| NodeError::InUse {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// Locks a directory for a node that is about to be made: one that holds a node already is refused.
    pub fn lock_new(path: &Path) -> Result<Self, NodeError> {
        let dir = Self::lock(path)?;
        if let Some(node) = dir.read_node()? {
            return Err(NodeError::Initialised {
                path: path.to_owned(),
                name: node.name,
                cluster: node.cluster,
            });
        }
        let foreign = fs::read_dir(path)
            .map_err(io("list", path))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .find(|name| !OWN_NAMES.contains(&name.as_str()));
        match foreign {
            Some(name) => Err(NodeError::NotEmpty {
                path: path.to_owned(),
                name,
            }),
            None => dir.clear_unfinished().map(|()| dir),
        }
    }

    /// What a bootstrap or join that was interrupted left behind.
    fn clear_unfinished(&self) -> Result<(), NodeError> {
        for name in MEMORY.into_iter().chain([IDENTITY_DIR]) {
            let path = self.path.join(name);
            if path.exists() {
                fs::remove_dir_all(&path).map_err(io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Stores everything a node needs, `node.toml` last.
    pub fn initialise(
        &self,
        node: &NodeFile,
        identity: &Identity,
        ca_key: &Secret,
    ) -> Result<(), NodeError> {
        identity.save(&self.path.join(IDENTITY_DIR))?;
        self.write_private(CA_KEY_FILE, ca_key.0.as_bytes())?;
        let text = toml::to_string(node).expect("plain fields always encode");
        self.write_private(NODE_FILE, text.as_bytes())
    }

    fn write_private(&self, name: &str, content: &[u8]) -> Result<(), NodeError> {
        let path = self.path.join(name);
        let beside = self.path.join(format!("{name}.new"));
        let written = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)
            .and_then(|mut file| {
                file.write_all(content)?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&beside, &path))
            .and_then(|()| fs::File::open(&self.path)?.sync_all());
        written.map_err(io("write", &path))
    }

    fn read_node(&self) -> Result<Option<NodeFile>, NodeError> {
        Self::read_node_in(&self.path)
    }

    fn read_node_in(dir: &Path) -> Result<Option<NodeFile>, NodeError> {
        let path = dir.join(NODE_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).map_err(io("read", &path))?;
        let node: NodeFile = toml::from_str(&text).map_err(|error| NodeError::Malformed {
            path: path.clone(),
            reason: error.message().to_owned(),
        })?;
        if node.layout != LAYOUT_VERSION {
            return Err(NodeError::Malformed {
                path,
                reason: format!(
                    "layout {} is not known here: use a newer program",
                    node.layout
                ),
            });
        }
        Ok(Some(node))
    }

    /// The node that lives here, checked against its certificate.
    pub fn load(&self) -> Result<(NodeFile, Identity, CertificateAuthority), NodeError> {
        Self::read(&self.path)
    }

    /// The same of a directory that is not locked: a node may run on it.
    pub fn read(dir: &Path) -> Result<(NodeFile, Identity, CertificateAuthority), NodeError> {
        let Some(node) = Self::read_node_in(dir)? else {
            return Err(NodeError::Empty {
                path: dir.to_owned(),
            });
        };
        let identity = Identity::load(&Self::identity_of(dir))?;
        if identity.cluster() != node.cluster || identity.peer().metad_id() != Some(node.id) {
            return Err(NodeError::Malformed {
                path: dir.join(NODE_FILE),
                reason: format!("its certificate is of {}", identity.peer()),
            });
        }
        let key_path = dir.join(CA_KEY_FILE);
        let key = fs::read_to_string(&key_path).map_err(io("read", &key_path))?;
        let authority = CertificateAuthority::from_pem(identity.ca_pem(), &Secret(key))?;
        Ok((node, identity, authority))
    }

    /// Where the other nodes were last known to be; empty if this one never took part.
    pub fn peers(&self) -> Result<Vec<String>, NodeError> {
        let peers = durable::load(&DiskMedia, &self.path.join(PEERS_FILE));
        Ok(peers.map_err(LogError::from)?.unwrap_or_default())
    }

    /// Keeps where the others are.
    pub fn keep_peers(path: &Path, peers: &[String]) -> Result<(), NodeError> {
        let stored = durable::store(&DiskMedia, &path.join(PEERS_FILE), &peers);
        Ok(stored.map_err(LogError::from)?)
    }

    /// From now on log and state are not opened any more, whatever happens.
    pub fn begin_renewal(&self, reason: &str) -> Result<(), NodeError> {
        self.write_private(RENEWING_FILE, reason.as_bytes())
    }

    /// Is it being renewed?
    pub fn is_renewing(&self) -> bool {
        self.path.join(RENEWING_FILE).exists()
    }

    /// Sets the damaged memory aside and makes this the directory of the node it is now. May be repeated after a crash: until the
    /// mark is gone, nothing is opened.
    pub fn replace(
        &self,
        old: &NodeFile,
        new: &NodeFile,
        identity: &Identity,
    ) -> Result<(), NodeError> {
        self.set_aside(old)?;
        self.become_node(new, identity)
    }

    /// Sets log, state and snapshots aside, and forgets the peers.
    pub fn set_aside(&self, old: &NodeFile) -> Result<(), NodeError> {
        let aside = self.path.join(DAMAGED_DIR);
        let own = aside.join(old.id.to_string());
        if aside.exists() && !own.exists() {
            fs::remove_dir_all(&aside).map_err(io("remove", &aside))?;
        }
        fs::create_dir_all(&own).map_err(io("create", &own))?;
        for name in MEMORY {
            let (from, to) = (self.path.join(name), own.join(name));
            if from.exists() && !to.exists() {
                fs::rename(&from, &to).map_err(io("set aside", &from))?;
            } else if from.exists() {
                fs::remove_dir_all(&from).map_err(io("remove", &from))?;
            }
        }
        // The new node has not taken part yet: an empty log is what it should have.
        remove_file(&self.path.join(PEERS_FILE))
    }

    /// From now on another node lives here.
    pub fn become_node(&self, new: &NodeFile, identity: &Identity) -> Result<(), NodeError> {
        identity.save(&self.path.join(IDENTITY_DIR))?;
        let text = toml::to_string(new).expect("plain fields always encode");
        self.write_private(NODE_FILE, text.as_bytes())?;
        remove_file(&self.path.join(RENEWING_FILE))?;
        fs::File::open(&self.path)
            .and_then(|dir| dir.sync_all())
            .map_err(io("sync", &self.path))
    }

    /// Where the certificate and its key are.
    pub fn identity(&self) -> PathBuf {
        Self::identity_of(&self.path)
    }

    /// The same of a directory that is not locked.
    pub fn identity_of(dir: &Path) -> PathBuf {
        dir.join(IDENTITY_DIR)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn remove_file(path: &Path) -> Result<(), NodeError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

const OWN_NAMES: [&str; 11] = [
    "lock",
    NODE_FILE,
    "node.toml.new",
    IDENTITY_DIR,
    CA_KEY_FILE,
    "ca-key.pem.new",
    "log",
    "state",
    "snapshot",
    // Who is restored may find here what was saved of an earlier node.
    "backups",
    DAMAGED_DIR,
];
