//! The rows of the replicated state: the newest in memory, all others in blocks of the store below.
//!
//! ```text
//! commit -> recent (memory) -> frozen (memory, does not change) -> blocks (store), see `mover`
//! reads  -> recent, then frozen, then the block that the directory names
//! ```
//!
//! Many entries write the same few rows (sums, sessions, log time), and what one request remembers the next forgets: they meet in
//! memory, and neighbours go over in one block. That loses nothing: the Raft log is the truth until a flush, which moves
//! everything over first; and a move is one change of the root, with the row that says how far the state is applied.
//!
//! Neither commits nor reads wait for a move: it works on layers and a directory that do not change, and swaps pointers at the
//! end. A copy of the state ([`View`]) is made in the same way, and holds on to what it began with.

use super::block;
use super::directory::{Directory, Position};
use super::mover::{self, FORMAT, FORMAT_PAGE, Mover};
use super::seen::Seen;
use crate::ground::{Store, Stores};
use crate::state::kv::{self, Batch, Kv, KvError, Pair, RowKey};
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Bytes of rows kept in memory before they are moved, see `ROW_OVERHEAD`.
pub const RECENT_BYTES_MAX: usize = 8 << 20;

/// So many times that, and whoever commits has to wait for a move.
pub const RECENT_TIMES_MAX: usize = 3;

/// What a row takes in memory besides its bytes, about: its place in the map, whose nodes are not full, and that of its value.
const ROW_OVERHEAD: usize = 128;

/// Rows taken out of a block at once.
const BLOCK_PAGE_ROWS: usize = 64;

/// How much is only in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Little.
    Room,
    /// A move is due; nobody has to wait for it.
    Due,
    /// Too much: move before the next commit.
    Full,
}

/// The rows.
#[derive(Debug, Clone)]
pub struct Rows {
    inner: Arc<Inner>,
    generation: u64,
}

#[derive(Debug)]
struct Inner {
    store: Arc<dyn Store>,
    layers: RwLock<Layers>,
    mover: Mutex<Mover>,
    /// Of the blocks that the directory names.
    seen: Mutex<Seen>,
    /// Copies under way: what they read is not removed.
    views: AtomicUsize,
    /// The first rot that was met.
    rot: OnceLock<String>,
}

impl Inner {
    /// A block, verified: what rotted since the start, or cannot be read any more, is an error and not a row. Costs a fifth of what getting the block and finding a row in it does.
    fn block(&self, id: u64) -> Result<Vec<u8>, KvError> {
        self.noting(mover::page(self.store.as_ref(), id).and_then(|page| {
            let verified = block::verify(&page);
            verified.map_err(|error| KvError::Damaged(format!("page {id}: {error}")))?;
            Ok(page)
        }))
    }

    /// Remembers rot, for whoever decides what becomes of the node.
    fn noting<T>(&self, result: Result<T, KvError>) -> Result<T, KvError> {
        if let Err(error) = &result
            && error.is_rot()
        {
            self.rot.get_or_init(|| error.to_string());
        }
        result
    }
}

#[derive(Debug, Default)]
struct Layers {
    recent: Batch,
    /// Bytes of all that was put there, replaced ones included: an upper bound.
    recent_bytes: usize,
    /// Oldest first.
    frozen: Vec<Arc<Batch>>,
    directory: Arc<Directory>,
}

impl Layers {
    fn freeze(&mut self) {
        if !self.recent.is_empty() {
            self.frozen.push(Arc::new(std::mem::take(&mut self.recent)));
            self.recent_bytes = 0;
        }
    }
}

impl Rows {
    /// Directory of a generation.
    pub fn dir(state: &Path, generation: u64) -> PathBuf {
        state.join(format!("{generation:08x}"))
    }

    /// Opens or creates.
    pub fn open(stores: &dyn Stores, state: &Path, generation: u64) -> Result<Self, KvError> {
        let store = stores.open(&Self::dir(state, generation))?;
        Self::open_on(store, generation, false)
    }

    /// Opens or creates, and reads every row: rot is found here and not while entries are applied.
    pub fn open_verified(
        stores: &dyn Stores,
        state: &Path,
        generation: u64,
    ) -> Result<Self, KvError> {
        let path = Self::dir(state, generation);
        let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            Self::open_on(stores.open(&path)?, generation, true)
        }));
        // sled answers some damage with a panic.
        opened.unwrap_or_else(|_| {
            let text = format!("{} cannot be read", path.display());
            Err(KvError::Damaged(text))
        })
    }

    /// On any store.
    pub fn open_on(store: Arc<dyn Store>, generation: u64, verify: bool) -> Result<Self, KvError> {
        check_format(store.as_ref())?;
        let mut parts = Vec::new();
        mover::scan(store.as_ref(), &[mover::ROOT], |_, part| {
            parts.push(part.to_vec());
            Ok(true)
        })?;
        let directory = Directory::load(&parts, |id| mover::page(store.as_ref(), id))?;
        let mut mover = Mover {
            next_id: 0,
            root_parts: u32::try_from(parts.len()).unwrap_or(u32::MAX),
            freed: Vec::new(),
        };
        if verify {
            mover.freed = check_pages(store.as_ref(), &directory)?;
            mover.reclaim(store.as_ref())?;
        }
        let blocks = directory.entries().map(|entry| entry.id);
        let last = blocks.chain(directory.segment_ids()).max();
        mover.next_id = last.map_or(0, |last| last + 1);
        let layers = Layers {
            directory: Arc::new(directory),
            ..Layers::default()
        };
        let inner = Inner {
            store,
            layers: RwLock::new(layers),
            mover: Mutex::new(mover),
            seen: Mutex::default(),
            views: AtomicUsize::new(0),
            rot: OnceLock::new(),
        };
        Ok(Self {
            inner: Arc::new(inner),
            generation,
        })
    }

    /// Which of the directories it is.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Applies a batch atomically, in memory.
    pub fn commit(&self, batch: Batch) -> Fill {
        let mut layers = self.inner.layers.write();
        for (key, value) in batch {
            layers.recent_bytes += ROW_OVERHEAD + key.len() + value.as_ref().map_or(0, Vec::len);
            layers.recent.insert(key, value);
        }
        match layers.recent_bytes {
            0..RECENT_BYTES_MAX => Fill::Room,
            bytes if bytes < RECENT_TIMES_MAX * RECENT_BYTES_MAX => Fill::Due,
            _ => Fill::Full,
        }
    }

    /// Moves what is in memory to the store. After an error it is still in memory: nothing is lost, and the caller stops.
    pub fn relieve(&self) -> Result<(), KvError> {
        let store = self.inner.store.as_ref();
        let mut mover = self.inner.mover.lock();
        let (frozen, directory) = {
            let mut layers = self.inner.layers.write();
            layers.freeze();
            (layers.frozen.clone(), Arc::clone(&layers.directory))
        };
        if !frozen.is_empty() {
            let moved = mover.move_over(store, &directory, &frozen);
            let moved = Arc::new(self.inner.noting(moved)?);
            let gone: Vec<_> = {
                let mut layers = self.inner.layers.write();
                layers.directory = moved;
                self.inner.seen.lock().clear();
                layers.frozen.drain(..frozen.len()).collect()
            };
            // Taking them apart takes a while, for which nobody has to wait.
            drop((gone, frozen, directory));
        }
        // A copy that begins now begins with a directory that names nothing of what was freed.
        if self.inner.views.load(Ordering::Acquire) == 0 {
            mover.reclaim(store)?;
        }
        Ok(())
    }

    /// Makes everything committed durable.
    pub fn flush(&self) -> Result<(), KvError> {
        self.relieve()?;
        self.inner.store.flush()
    }

    /// All rows as they are now, whatever is committed later.
    pub fn view(&self) -> View {
        let mut layers = self.inner.layers.write();
        layers.freeze();
        self.inner.views.fetch_add(1, Ordering::AcqRel);
        View {
            inner: Arc::clone(&self.inner),
            frozen: layers.frozen.clone(),
            directory: Arc::clone(&layers.directory),
        }
    }

    /// What a read or a move found that is not as it was written: this store is given up.
    pub fn rot(&self) -> Option<String> {
        self.inner.rot.get().cloned()
    }

    /// Blocks in the store.
    pub fn blocks(&self) -> usize {
        self.inner.layers.read().directory.len()
    }
}

impl Kv for Rows {
    fn look(&self, key: &[u8], see: &mut dyn FnMut(&[u8])) -> Result<bool, KvError> {
        // Held throughout: what is being read must not be removed.
        let layers = self.inner.layers.read();
        let frozen = layers.frozen.iter().rev().map(AsRef::as_ref);
        for layer in std::iter::once(&layers.recent).chain(frozen) {
            if let Some(value) = layer.get(key) {
                return Ok(value.as_deref().map(see).is_some());
            }
        }
        let Some(at) = layers.directory.position(key) else {
            return Ok(false);
        };
        if let Some(known) = self.inner.seen.lock().get(key) {
            return Ok(known.map(see).is_some());
        }
        let page = self.inner.block(layers.directory.at(at).id)?;
        let found = block::find(&page, key)?;
        match found {
            Some(value) => self.inner.seen.lock().row(key, value),
            None => {
                let (lower, higher) = block::around(&page, key)?;
                let next = || {
                    let next = layers.directory.at(layers.directory.next(at)?);
                    Some(RowKey::from_slice(&next.first))
                };
                let until = higher
                    .or_else(next)
                    .unwrap_or_else(|| RowKey::from_slice(&[u8::MAX; 16]));
                self.inner.seen.lock().gap(lower.unwrap_or_default(), until);
            }
        }
        Ok(found.map(see).is_some())
    }

    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        let layers = self.inner.layers.read();
        let frozen = layers.frozen.iter().map(AsRef::as_ref);
        let over: Vec<&Batch> = frozen.chain([&layers.recent]).collect();
        let mut stored = Stored::new(&self.inner, &layers.directory, from);
        kv::overlaid(&over, || stored.next(until), (from, until), max)
    }
}

/// A copy: rows as they were at one moment. Committing and moving go on; pages are removed when it is dropped.
#[derive(Debug)]
pub struct View {
    inner: Arc<Inner>,
    frozen: Vec<Arc<Batch>>,
    directory: Arc<Directory>,
}

impl View {
    /// At most `max` rows from `from` on, in key order; fewer only at the end.
    pub fn page(&self, from: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        let over: Vec<&Batch> = self.frozen.iter().map(AsRef::as_ref).collect();
        let until = [u8::MAX; 16];
        let mut stored = Stored::new(&self.inner, &self.directory, from);
        kv::overlaid(&over, || stored.next(&until), (from, &until), max)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.inner.views.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Walks the rows in blocks.
struct Stored<'a> {
    inner: &'a Inner,
    directory: &'a Directory,
    /// The block at work.
    page: Option<Vec<u8>>,
    at: Option<Position>,
    from: RowKey,
    rows: std::vec::IntoIter<Pair>,
}

impl<'a> Stored<'a> {
    fn new(inner: &'a Inner, directory: &'a Directory, from: &[u8]) -> Self {
        Self {
            inner,
            directory,
            page: None,
            at: directory.position(from),
            from: RowKey::from_slice(from),
            rows: Vec::new().into_iter(),
        }
    }

    fn next(&mut self, until: &[u8]) -> Result<Option<Pair>, KvError> {
        loop {
            if let Some(row) = self.rows.next() {
                return Ok((row.0.as_slice() < until).then_some(row));
            }
            let Some(at) = self.at else {
                return Ok(None);
            };
            let page = match self.page.take() {
                Some(page) => page,
                None => self.inner.block(self.directory.at(at).id)?,
            };
            let rows = block::rows_from(&page, &self.from, BLOCK_PAGE_ROWS)?;
            match rows.last() {
                Some((last, _)) if rows.len() == BLOCK_PAGE_ROWS => {
                    self.from = kv::after(last);
                    self.page = Some(page);
                }
                _ => self.at = self.directory.next(at),
            }
            self.rows = rows.into_iter();
        }
    }
}

/// Refuses what is not of the format that is known; an empty store is made to be of it.
fn check_format(store: &dyn Store) -> Result<(), KvError> {
    if let Some(page) = store.get(FORMAT_PAGE)? {
        let found = page.as_slice().try_into().map(u32::from_le_bytes);
        return match found {
            Ok(FORMAT) => Ok(()),
            Ok(found) if found > FORMAT => Err(KvError::NewerFormat {
                found,
                known: FORMAT,
            }),
            _ => Err(KvError::Damaged("its format is not a number".into())),
        };
    }
    let mut empty = true;
    mover::scan(store, &[], |_, _| {
        empty = false;
        Ok(false)
    })?;
    if !empty {
        return Err(KvError::OldFormat);
    }
    let format = FORMAT.to_le_bytes().to_vec();
    store.write(&[(RowKey::from_slice(FORMAT_PAGE), Some(format))].into())
}

/// The first key of a block, and that of the next.
type Between<'a> = (&'a [u8], Option<&'a [u8]>);

/// Reads all pages: every block that is named must be there, verify, and hold the rows it is said to. Answers the pages that nothing
/// names, which a crash left.
fn check_pages(store: &dyn Store, directory: &Directory) -> Result<Vec<u64>, KvError> {
    let mut expected: HashMap<u64, Option<Between<'_>>> =
        directory.segment_ids().map(|id| (id, None)).collect();
    let mut entries = directory.entries().peekable();
    while let Some(entry) = entries.next() {
        let below = entries.peek().map(|next| &*next.first);
        expected.insert(entry.id, Some((&entry.first, below)));
    }
    let mut nameless = Vec::new();
    mover::scan(store, &[mover::PAGE], |name, page| {
        let id = name.get(1..).and_then(|id| id.try_into().ok());
        let id = id.map(u64::from_be_bytes);
        let id = id.ok_or_else(|| KvError::Damaged("a page has no number".into()))?;
        match expected.remove(&id) {
            Some(Some((first, below))) => block::check(page, first, below)?,
            // A segment: it was read and verified when the directory was loaded.
            Some(None) => {}
            None => nameless.push(id),
        }
        Ok(true)
    })?;
    match expected.keys().min() {
        Some(id) => Err(KvError::Damaged(format!("page {id} is missing"))),
        None => Ok(nameless),
    }
}
