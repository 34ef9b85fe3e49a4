//! The rows themselves: two layers in memory over an fjall keyspace.
//!
//! ```text
//! commit -> active layer --(4 MiB)--> frozen layer --(background, one batch)--> fjall
//! ```
//!
//! Invariants: a layer reaches fjall in one batch that also holds the meta row, so fjall is always at the
//! end of some operation, never inside one; what is only in memory when the process dies comes back by
//! replaying the journal, which is the truth. Memory is bounded by two layers, the memtables and the block cache.

use super::rows::{self, RowError};
use fjall::{Database, Keyspace, KeyspaceCreateOptions, Readable, Slice};
use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard};
use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

/// The active layer is frozen and flushed at this size (keys and values; the map about doubles it).
const LAYER_BYTES: usize = 4 << 20;
/// Writers wait while the active layer is this large and the frozen one is still being flushed.
const LAYER_BYTES_MAX: usize = 16 << 20;
/// Blocks of fjall's tables kept in memory.
const CACHE_BYTES: u64 = 32 << 20;
/// fjall's own memory table.
const MEMTABLE_BYTES: u64 = 8 << 20;
/// Files fjall keeps open.
const OPEN_FILES_MAX: usize = 128;

/// Why the rows cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// fjall failed.
    #[error("{step}: {source}")]
    Storage {
        /// Verb phrase.
        step: &'static str,
        /// Cause.
        #[source]
        source: fjall::Error,
    },
    /// A background flush failed before; nothing more is accepted.
    #[error(
        "an earlier write of the namespace store failed ({0}); unmount, check the disk of the state directory, mount again"
    )]
    Failed(String),
    /// A row is not what it must be.
    #[error(transparent)]
    Row(#[from] RowError),
}

/// Pending rows; `None` deletes.
pub(super) type Layer = BTreeMap<Vec<u8>, Option<Slice>>;

#[derive(Default)]
pub(super) struct Layers {
    active: Layer,
    active_bytes: usize,
    frozen: Option<Arc<Layer>>,
}

struct Shared {
    db: Database,
    rows: Keyspace,
    layers: RwLock<Layers>,
    /// Set by the flusher when a flush failed.
    failed: Mutex<Option<String>>,
    /// Signalled when the frozen layer is gone (or failed).
    flushed: Condvar,
}

/// See the module.
pub(super) struct Table {
    shared: Arc<Shared>,
    flusher: Option<(std::sync::mpsc::SyncSender<Arc<Layer>>, JoinHandle<()>)>,
}

fn storage(step: &'static str) -> impl Fn(fjall::Error) -> TableError {
    move |source| TableError::Storage { step, source }
}

impl Table {
    pub(super) fn open(dir: &Path) -> Result<Self, TableError> {
        let db = Database::builder(dir)
            .cache_size(CACHE_BYTES)
            .worker_threads(2)
            .max_cached_files(Some(OPEN_FILES_MAX))
            .max_journaling_size(64 << 20)
            .open()
            .map_err(storage("open the namespace store"))?;
        let rows = db
            .keyspace("rows", || {
                KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES)
            })
            .map_err(storage("open the namespace store"))?;
        let shared = Arc::new(Shared {
            db,
            rows,
            layers: RwLock::default(),
            failed: Mutex::default(),
            flushed: Condvar::new(),
        });
        let (sender, receiver) = std::sync::mpsc::sync_channel::<Arc<Layer>>(1);
        let background = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("names-flush".into())
            .spawn(move || {
                for layer in receiver {
                    background.flush(&layer);
                }
            })
            .map_err(|error| TableError::Failed(format!("start the flush thread: {error}")))?;
        Ok(Self {
            shared,
            flusher: Some((sender, thread)),
        })
    }

    pub(super) fn view(&self) -> View<'_> {
        View {
            layers: self.shared.layers.read(),
            rows: &self.shared.rows,
        }
    }

    /// Fails if rows could not be written before; asked before an operation is journaled.
    pub(super) fn check(&self) -> Result<(), TableError> {
        match &*self.shared.failed.lock() {
            Some(reason) => Err(TableError::Failed(reason.clone())),
            None => Ok(()),
        }
    }

    /// Makes the changes visible, all at once. The caller is the only writer. Cannot fail: what fjall cannot take
    /// is reported by the next [`Table::check`].
    pub(super) fn commit(&self, changes: Layer) {
        let mut layers = self.shared.layers.write();
        for (key, value) in changes {
            layers.active_bytes += key.len() + value.as_ref().map_or(0, |value| value.len());
            layers.active.insert(key, value);
        }
        let (bytes, busy) = (layers.active_bytes, layers.frozen.is_some());
        if bytes >= LAYER_BYTES && !busy {
            self.freeze(&mut layers);
        }
        drop(layers);
        if bytes >= LAYER_BYTES_MAX && busy {
            self.wait_flushed();
        }
    }

    fn freeze(&self, layers: &mut Layers) {
        let frozen = Arc::new(std::mem::take(&mut layers.active));
        layers.active_bytes = 0;
        layers.frozen = Some(Arc::clone(&frozen));
        if let Some((sender, _)) = &self.flusher {
            sender
                .send(frozen)
                .expect("the flush thread lives as long as the table");
        }
    }

    fn wait_flushed(&self) {
        let mut failed = self.shared.failed.lock();
        while failed.is_none() && self.shared.layers.read().frozen.is_some() {
            self.shared.flushed.wait(&mut failed);
        }
    }

    /// Everything committed so far is in fjall (not necessarily on the disk) when this returns. The caller is
    /// the only writer.
    pub(super) fn flush(&self) -> Result<(), TableError> {
        self.wait_flushed();
        self.check()?;
        let mut layers = self.shared.layers.write();
        if !layers.active.is_empty() {
            self.freeze(&mut layers);
            drop(layers);
            self.wait_flushed();
        }
        self.check()
    }

    /// Removes every row.
    pub(super) fn clear(&self) -> Result<(), TableError> {
        self.flush()?;
        self.shared
            .rows
            .clear()
            .map_err(storage("clear the namespace store"))
    }

    /// A consistent view that stays as it is while writes go on. Call after [`Table::flush`].
    pub(super) fn snapshot(&self) -> fjall::Iter {
        let snapshot = self.shared.db.snapshot();
        snapshot.iter(&self.shared.rows)
    }

    /// Makes what was flushed survive a power cut.
    pub(super) fn persist(&self) -> Result<(), TableError> {
        self.shared
            .db
            .persist(fjall::PersistMode::SyncAll)
            .map_err(storage("sync the namespace store"))
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            tracing::warn!(%error, "the namespace store is behind; the journal will be replayed");
        }
        if let Some((sender, thread)) = self.flusher.take() {
            drop(sender);
            if thread.join().is_err() {
                tracing::warn!("the namespace's flush thread panicked");
            }
        }
    }
}

impl Shared {
    fn flush(&self, layer: &Layer) {
        let mut batch = self.db.batch();
        for (key, value) in layer {
            match value {
                Some(value) => batch.insert(&self.rows, key.as_slice(), value.clone()),
                None => batch.remove(&self.rows, key.as_slice()),
            }
        }
        let outcome = batch.commit();
        if outcome.is_ok() {
            self.layers.write().frozen = None;
        }
        let mut failed = self.failed.lock();
        if let Err(error) = outcome {
            tracing::error!(%error, "the namespace store cannot be written");
            *failed = Some(error.to_string());
        }
        drop(failed);
        self.flushed.notify_all();
    }
}

/// Rows as of now; changes wait while it is held.
pub(super) struct View<'a> {
    layers: RwLockReadGuard<'a, Layers>,
    rows: &'a Keyspace,
}

/// A view plus changes that are not committed yet.
pub(super) struct Draft<'a> {
    view: View<'a>,
    changes: Layer,
}

impl<'a> Draft<'a> {
    pub(super) fn new(view: View<'a>) -> Self {
        Self {
            view,
            changes: Layer::new(),
        }
    }

    pub(super) fn put(&mut self, key: Vec<u8>, value: Slice) {
        self.changes.insert(key, Some(value));
    }

    pub(super) fn delete(&mut self, key: Vec<u8>) {
        self.changes.insert(key, None);
    }

    pub(super) fn finish(self) -> Layer {
        self.changes
    }
}

/// Takes a row; says whether to go on.
pub(super) type Visit<'v> = dyn FnMut(&[u8], &Slice) -> Result<ControlFlow<()>, TableError> + 'v;

/// Reading rows through the layers, newest first.
pub(super) trait Rows {
    /// Newest first.
    fn layers(&self) -> [Option<&Layer>; 3];
    /// What lies below them.
    fn base(&self) -> &Keyspace;

    fn get(&self, key: &[u8]) -> Result<Option<Slice>, TableError> {
        for layer in self.layers().into_iter().flatten() {
            if let Some(value) = layer.get(key) {
                return Ok(value.clone());
            }
        }
        self.base().get(key).map_err(storage("read a row"))
    }

    fn get_as<T: serde::de::DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, TableError> {
        match self.get(key)? {
            Some(value) => Ok(Some(rows::decode(key, &value)?)),
            None => Ok(None),
        }
    }

    /// Visits the rows of `from..to` in order until told to stop.
    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), TableError> {
        let mut merge = Merge::new(self, from, to, false);
        while let Some((key, value)) = merge.next_row()? {
            if visit(key.bytes(), &value)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// The last row of `from..to`.
    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<(Vec<u8>, Slice)>, TableError> {
        Ok(Merge::new(self, from, to, true)
            .next_row()?
            .map(|(key, value)| (key.bytes().to_vec(), value)))
    }
}

impl Rows for View<'_> {
    fn layers(&self) -> [Option<&Layer>; 3] {
        [
            Some(&self.layers.active),
            self.layers.frozen.as_deref(),
            None,
        ]
    }

    fn base(&self) -> &Keyspace {
        self.rows
    }
}

impl Rows for Draft<'_> {
    fn layers(&self) -> [Option<&Layer>; 3] {
        let [active, frozen, _] = self.view.layers();
        [Some(&self.changes), active, frozen]
    }

    fn base(&self) -> &Keyspace {
        self.view.rows
    }
}

enum Key<'a> {
    Layer(&'a [u8]),
    Base(Slice),
}

impl Key<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Layer(key) => key,
            Self::Base(key) => key,
        }
    }
}

type MergeItem<'a> = Result<(Key<'a>, Option<Slice>), fjall::Error>;

struct Source<'a> {
    head: Option<MergeItem<'a>>,
    rest: Box<dyn Iterator<Item = MergeItem<'a>> + 'a>,
}

impl<'a> Source<'a> {
    fn take(&mut self) -> Option<MergeItem<'a>> {
        std::mem::replace(&mut self.head, self.rest.next())
    }
}

/// Rows of several sources in one order; of equal keys the newest source's counts.
struct Merge<'a> {
    sources: Vec<Source<'a>>,
    reverse: bool,
}

impl<'a> Merge<'a> {
    fn new<R: Rows + ?Sized>(rows: &'a R, from: &[u8], to: &[u8], reverse: bool) -> Self {
        let range = (Bound::Included(from), Bound::Excluded(to));
        let mut sources = Vec::with_capacity(4);
        if from < to {
            for layer in rows.layers().into_iter().flatten() {
                let entries = layer
                    .range::<[u8], _>(range)
                    .map(|(key, value)| Ok((Key::Layer(key.as_slice()), value.clone())));
                sources.push(Self::directed(entries, reverse));
            }
            let entries = rows.base().range::<&[u8], _>(range).map(|guard| {
                guard
                    .into_inner()
                    .map(|(key, value)| (Key::Base(key), Some(value)))
            });
            sources.push(Self::directed(entries, reverse));
        }
        Self { sources, reverse }
    }

    fn directed(
        entries: impl DoubleEndedIterator<Item = MergeItem<'a>> + 'a,
        reverse: bool,
    ) -> Source<'a> {
        let mut rest: Box<dyn Iterator<Item = MergeItem<'a>> + 'a> = if reverse {
            Box::new(entries.rev())
        } else {
            Box::new(entries)
        };
        Source {
            head: rest.next(),
            rest,
        }
    }

    /// The source whose next key comes first; of several, the newest. One that failed comes before all.
    fn first(&self) -> Option<usize> {
        let mut best: Option<(usize, &[u8])> = None;
        for (index, source) in self.sources.iter().enumerate() {
            match &source.head {
                None => {}
                Some(Err(_)) => return Some(index),
                Some(Ok((key, _))) => {
                    let key = key.bytes();
                    if best.is_none_or(|(_, least)| (key < least) != self.reverse && key != least) {
                        best = Some((index, key));
                    }
                }
            }
        }
        best.map(|(index, _)| index)
    }

    fn next_row(&mut self) -> Result<Option<(Key<'a>, Slice)>, TableError> {
        while let Some(index) = self.first() {
            let Some(item) = self.sources[index].take() else {
                break;
            };
            let (key, value) = item.map_err(storage("scan rows"))?;
            for older in &mut self.sources[index + 1..] {
                if matches!(&older.head, Some(Ok((other, _))) if other.bytes() == key.bytes()) {
                    older.take();
                }
            }
            if let Some(value) = value {
                return Ok(Some((key, value)));
            }
        }
        Ok(None)
    }
}
