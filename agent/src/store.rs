//! The seam to backends: where pieces are kept. One implementation is a namespace of the engine in this process, the
//! other a 0-db client.

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use qsfs_proto::api::{Backend, BackendAddress, Intent, Verdict};
use qsfs_zstor::id::BackendId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Why a piece could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The backend answers that what it holds under the key does not verify.
    #[error("corrupt: {0}")]
    Corrupt(String),
    /// The backend does not answer or cannot: nothing is said about the piece.
    #[error("unavailable: {0}")]
    Unavailable(String),
    /// No space.
    #[error("full: {0}")]
    Full(String),
}

/// One key of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredKey {
    /// The key.
    pub key: Bytes,
    /// When it was set, ms since the epoch.
    pub set_ms: u64,
}

/// A stored value that the backend itself found damaged.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Noticed {
    /// Where on the disk: the same damage is told once.
    pub place: String,
    /// Its key.
    pub key: Bytes,
}

/// Part of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPage {
    /// Where the next part begins; `None` at the end.
    pub next: Option<Bytes>,
    /// Keys.
    pub keys: Vec<StoredKey>,
}

/// A place for pieces. Every call ends within a deadline of its own.
#[async_trait]
pub trait PieceStore: Send + Sync + 'static {
    /// The value, checked by the backend as well as it can.
    async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError>;
    /// Durable when it returns.
    async fn set(&self, key: &[u8], value: Bytes) -> Result<(), StoreError>;
    /// True when the key was there.
    async fn delete(&self, key: &[u8]) -> Result<bool, StoreError>;
    /// Makes later reads come from the disk, not from memory, as far as the backend can.
    async fn forget_cached(&self) {}
    /// Damage that the backend met by itself: when it was opened, in reads, in compaction.
    async fn noticed(&self) -> Vec<Noticed> {
        Vec::new()
    }
    /// Keys in the backend's order.
    async fn keys(&self, from: Option<Bytes>) -> Result<KeyPage, StoreError>;
}

/// Makes a client for a backend elsewhere.
pub type Connect = Box<dyn Fn(&BackendAddress) -> Arc<dyn PieceStore> + Send + Sync>;

/// All backends of the cluster as this agent reaches them: its own directly, others by client.
pub struct Stores {
    connect: Connect,
    own: Mutex<BTreeMap<BackendId, Arc<dyn PieceStore>>>,
    known: Mutex<BTreeMap<BackendId, Known>>,
}

struct Known {
    backend: Backend,
    /// Made at the first use; clients of unused backends would be connections for nothing.
    store: Option<Arc<dyn PieceStore>>,
}

impl Stores {
    /// Knows no backend yet.
    pub fn new(connect: Connect) -> Self {
        Self {
            connect,
            own: Mutex::new(BTreeMap::new()),
            known: Mutex::new(BTreeMap::new()),
        }
    }

    /// A backend of this agent.
    pub fn host(&self, backend: BackendId, store: Arc<dyn PieceStore>) {
        self.own.lock().insert(backend, store);
    }

    /// The store of one of this agent's backends.
    pub fn own(&self, backend: BackendId) -> Option<Arc<dyn PieceStore>> {
        self.own.lock().get(&backend).cloned()
    }

    /// The cluster's backends as metad sees them now. Clients of unchanged addresses are kept.
    pub fn update(&self, backends: Vec<Backend>) {
        let mut known = self.known.lock();
        let mut before = std::mem::take(&mut *known);
        for backend in backends {
            let store = before
                .remove(&backend.id)
                .filter(|old| old.backend.address == backend.address)
                .and_then(|old| old.store);
            known.insert(backend.id, Known { backend, store });
        }
    }

    /// A store to read from, and how good it seems: smaller is better. `None`: unknown, lost or retired.
    pub fn source(&self, backend: BackendId) -> Option<(u8, Arc<dyn PieceStore>)> {
        if let Some(own) = self.own(backend) {
            return Some((0, own));
        }
        let mut known = self.known.lock();
        let known = known.get_mut(&backend)?;
        let rank = match (known.backend.intent, known.backend.verdict) {
            (Intent::Retire, _) | (_, Verdict::Lost) => return None,
            (_, Verdict::Up) => 1,
            (_, Verdict::Suspect) => 2,
            (_, Verdict::Down) => 3,
        };
        let store = known
            .store
            .get_or_insert_with(|| (self.connect)(&known.backend.address));
        Some((rank, Arc::clone(store)))
    }
}
