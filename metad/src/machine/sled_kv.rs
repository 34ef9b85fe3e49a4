//! sled under the replicated state: one tree, key prefixes, flushed when we say.
//!
//! `flush()` of sled 0.34 does not reach the platter on Linux (`sync_file_range`, no fdatasync): its file is synced as well.

use crate::state::kv::{Batch, Kv, KvError, Pair};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes sled may cache.
pub const CACHE_BYTES: u64 = 48 << 20;

/// Times a directory that is still locked by its closing predecessor is tried again, 20 ms apart.
const OPEN_TRIES: u32 = 100;

/// The store.
#[derive(Debug, Clone)]
pub struct SledKv {
    db: sled::Db,
    /// sled's one file, for syncing it.
    file: Arc<std::fs::File>,
    generation: u64,
}

impl SledKv {
    /// Directory of a generation.
    pub fn dir(state: &Path, generation: u64) -> PathBuf {
        state.join(format!("{generation:08x}"))
    }

    /// Opens or creates.
    pub fn open(state: &Path, generation: u64) -> Result<Self, KvError> {
        let path = Self::dir(state, generation);
        let db = open_waiting(&path)?;
        let file = std::fs::File::open(path.join("db")).map_err(sled::Error::from)?;
        Ok(Self {
            db,
            file: Arc::new(file),
            generation,
        })
    }

    /// Which of the directories it is.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Applies a batch atomically.
    pub fn commit(&self, batch: Batch) -> Result<(), KvError> {
        let mut changes = sled::Batch::default();
        for (key, value) in batch {
            match value {
                Some(value) => changes.insert(key, value),
                None => changes.remove(key),
            }
        }
        Ok(self.db.apply_batch(changes)?)
    }

    /// Makes everything committed durable.
    pub fn flush(&self) -> Result<(), KvError> {
        self.db.flush()?;
        Ok(self.file.sync_data().map_err(sled::Error::from)?)
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
        Ok(self.db.get(key)?.map(|value| value.to_vec()))
    }

    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        if from >= until {
            return Ok(Vec::new());
        }
        let mut pairs = Vec::new();
        for pair in self.db.range(from..until).take(max) {
            let (key, value) = pair?;
            pairs.push((key.to_vec(), value.to_vec()));
        }
        Ok(pairs)
    }
}
