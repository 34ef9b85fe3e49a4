//! sled under the replicated state: one tree, key prefixes, flushed when we say.
//!
//! `flush()` of sled 0.34 does not reach the platter on Linux (`sync_file_range`, no fdatasync): its file is synced as well.
//!
//! ```text
//! commit -> recent rows (memory) --[RECENT_ROWS_MAX rows, or a flush]--> one sled batch
//! reads  -> recent rows, then sled
//! ```
//!
//! Many entries write the same few rows (sums, sessions, log time), and what one request remembers the next forgets: they meet in
//! memory and reach sled once. That loses nothing: the Raft log is the truth until a flush, which moves everything over
//! first; and all that is recent goes over in one batch with the row that says how far the state is applied.

use crate::ground::{Store, Stores};
use crate::state::kv::{Batch, Kv, KvError, Pair, after};
use parking_lot::RwLock;
use qsfs_zdb::media::{DiskMedia, Media};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes sled may cache.
pub const CACHE_BYTES: u64 = 48 << 20;

/// Rows kept in memory before they go to sled.
pub const RECENT_ROWS_MAX: usize = 2_048;

/// Their bytes.
pub const RECENT_BYTES_MAX: usize = 4 << 20;

/// Times a directory that is still locked by its closing predecessor is tried again, 20 ms apart.
const OPEN_TRIES: u32 = 100;

/// The rows: what is recent, and the store below.
#[derive(Debug, Clone)]
pub struct SledKv {
    store: Arc<dyn Store>,
    generation: u64,
    recent: Arc<RwLock<Recent>>,
}

/// Stores in sled.
#[derive(Debug, Clone, Copy)]
pub struct SledStores;

impl Stores for SledStores {
    fn open(&self, dir: &Path) -> Result<Arc<dyn Store>, KvError> {
        let db = open_waiting(dir)?;
        let file = std::fs::File::open(dir.join("db")).map_err(sled::Error::from)?;
        Ok(Arc::new(SledStore {
            db,
            file,
            path: dir.to_owned(),
        }))
    }

    fn exists(&self, dir: &Path) -> bool {
        dir.exists()
    }

    fn remove(&self, dir: &Path) -> std::io::Result<()> {
        std::fs::remove_dir_all(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        std::fs::rename(from, to)
    }

    fn list(&self, parent: &Path) -> std::io::Result<Vec<String>> {
        DiskMedia.list(parent)
    }
}

#[derive(Debug)]
struct SledStore {
    db: sled::Db,
    /// sled's one file, for syncing it.
    file: std::fs::File,
    path: PathBuf,
}

impl Store for SledStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        Ok(self.db.get(key)?.map(|value| value.to_vec()))
    }

    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        let mut pairs = Vec::new();
        for pair in self.db.range(from..until).take(max) {
            let (key, value) = pair?;
            pairs.push((key.to_vec(), value.to_vec()));
        }
        Ok(pairs)
    }

    fn write(&self, batch: &Batch) -> Result<(), KvError> {
        let mut changes = sled::Batch::default();
        for (key, value) in batch {
            match value {
                Some(value) => changes.insert(key.as_slice(), value.as_slice()),
                None => changes.remove(key.as_slice()),
            }
        }
        Ok(self.db.apply_batch(changes)?)
    }

    fn flush(&self) -> Result<(), KvError> {
        self.db.flush()?;
        Ok(self.file.sync_data().map_err(sled::Error::from)?)
    }

    fn verify(&self) -> Result<(), KvError> {
        let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            self.db.iter().try_for_each(|row| row.map(drop))
        }));
        // sled answers some damage with a panic.
        Ok(read.unwrap_or_else(|_| Err(damaged(&self.path)))?)
    }
}

fn damaged(path: &Path) -> sled::Error {
    let text = format!("{} is damaged", path.display());
    sled::Error::Io(std::io::Error::other(text))
}

/// What sled does not have yet.
#[derive(Debug, Default)]
struct Recent {
    rows: Batch,
    /// Bytes of all that was put here since the last move, replaced ones included: an upper bound.
    bytes: usize,
}

impl SledKv {
    /// Directory of a generation.
    pub fn dir(state: &Path, generation: u64) -> PathBuf {
        state.join(format!("{generation:08x}"))
    }

    /// Opens or creates.
    pub fn open(stores: &dyn Stores, state: &Path, generation: u64) -> Result<Self, KvError> {
        Ok(Self {
            store: stores.open(&Self::dir(state, generation))?,
            generation,
            recent: Arc::default(),
        })
    }

    /// Opens or creates, and reads every row: rot is found here and not while entries are applied.
    pub fn open_verified(
        stores: &dyn Stores,
        state: &Path,
        generation: u64,
    ) -> Result<Self, KvError> {
        let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let kv = Self::open(stores, state, generation)?;
            kv.store.verify()?;
            Ok(kv)
        }));
        // sled answers some damage with a panic.
        opened.unwrap_or_else(|_| Err(damaged(&Self::dir(state, generation)).into()))
    }

    /// Which of the directories it is.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Applies a batch atomically, in memory; [`Self::relieve`] is due when this answers true.
    pub fn commit(&self, batch: Batch) -> bool {
        let mut recent = self.recent.write();
        for (key, value) in batch {
            recent.bytes += key.len() + value.as_ref().map_or(0, Vec::len);
            recent.rows.insert(key, value);
        }
        recent.rows.len() >= RECENT_ROWS_MAX || recent.bytes >= RECENT_BYTES_MAX
    }

    /// Moves what is recent to sled, as one batch.
    pub fn relieve(&self) -> Result<(), KvError> {
        self.move_over(&mut self.recent.write())
    }

    /// After an error the rows are still recent: nothing is lost, and the caller stops.
    fn move_over(&self, recent: &mut Recent) -> Result<(), KvError> {
        self.store.write(&recent.rows)?;
        *recent = Recent::default();
        Ok(())
    }

    /// Makes everything committed durable.
    pub fn flush(&self) -> Result<(), KvError> {
        self.relieve()?;
        self.store.flush()
    }
}

/// A sled that was just dropped keeps its file lock until its threads have ended.
fn open_waiting(path: &Path) -> Result<sled::Db, KvError> {
    let config = sled::Config::default()
        .path(path)
        .cache_capacity(CACHE_BYTES)
        .flush_every_ms(None);
    let mut tries = 0;
    loop {
        match config.open() {
            Err(sled::Error::Io(error)) if tries < OPEN_TRIES && is_locked(&error) => {
                tries += 1;
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            other => return Ok(other?),
        }
    }
}

fn is_locked(error: &std::io::Error) -> bool {
    error.to_string().contains("lock")
}

impl Kv for SledKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        match self.recent.read().rows.get(key) {
            Some(value) => Ok(value.clone()),
            None => self.store.get(key),
        }
    }

    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        // Held throughout: rows must not move over between the two looks.
        let recent = self.recent.read();
        let mut found = Vec::new();
        let mut cursor = from.to_vec();
        while cursor.as_slice() < until && found.len() < max {
            let page = self.store.range(&cursor, until, max)?;
            let end = match page.last() {
                Some((last, _)) if page.len() == max => after(last),
                _ => until.to_vec(),
            };
            let over = recent.rows.range(cursor..end.clone());
            found.extend(overlaid(page, over));
            cursor = end;
        }
        found.truncate(max);
        Ok(found)
    }
}

/// Two sorted sequences as one; where both have a key, the recent one is right.
fn overlaid<'a>(
    page: Vec<Pair>,
    over: impl Iterator<Item = (&'a Vec<u8>, &'a Option<Vec<u8>>)>,
) -> Vec<Pair> {
    let mut over = over.peekable();
    if over.peek().is_none() {
        return page;
    }
    let mut merged = Vec::with_capacity(page.len());
    let mut page = page.into_iter().peekable();
    loop {
        let recent_first = match (over.peek(), page.peek()) {
            (None, None) => return merged,
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (Some((key, _)), Some((stored, _))) => {
                if *key == stored {
                    page.next();
                    true
                } else {
                    *key < stored
                }
            }
        };
        if recent_first {
            if let Some((key, Some(value))) = over.next() {
                merged.push((key.clone(), value.clone()));
            }
        } else {
            merged.extend(page.next());
        }
    }
}
