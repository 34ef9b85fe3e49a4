//! sled as what lies below the rows: one tree, flushed when we say.
//!
//! `flush()` of sled 0.34 does not reach the platter on Linux (`sync_file_range`, no fdatasync), and pages it puts into files of
//! their own are never synced: both are done here.

use crate::ground::{Store, Stores};
use crate::state::kv::{Batch, KvError, Pair, RowKey};
use qsfs_zdb::media::{DiskMedia, Media};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use super::rows::Rows as SledKv;

/// Bytes sled may cache.
pub const CACHE_BYTES: u64 = 48 << 20;

/// Times a directory that is still locked by its closing predecessor is tried again, 20 ms apart.
const OPEN_TRIES: u32 = 100;

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

impl SledStore {
    /// sled answers some damage with a panic.
    fn reading<T>(&self, read: impl FnOnce() -> Result<T, KvError>) -> Result<T, KvError> {
        let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
        read.unwrap_or_else(|_| {
            let text = format!("{} cannot be read", self.path.display());
            Err(KvError::Damaged(text))
        })
    }

    /// Pages that outgrow sled's file. There are none as long as rows are of the size they are; but if, they count as well.
    fn sync_large_pages(&self) -> std::io::Result<()> {
        let dir = self.path.join("blobs");
        if !dir.is_dir() {
            return Ok(());
        }
        for entry in std::fs::read_dir(&dir)? {
            match std::fs::File::open(entry?.path()) {
                Ok(file) => file.sync_all()?,
                // Replaced meanwhile: what replaced it was written later than what is being flushed.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        std::fs::File::open(&dir)?.sync_all()
    }
}

impl Store for SledStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        self.reading(|| Ok(self.db.get(key)?.map(|value| value.to_vec())))
    }

    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        self.reading(|| {
            let mut pairs = Vec::new();
            for pair in self.db.range(from..until).take(max) {
                let (key, value) = pair?;
                pairs.push((RowKey::from_slice(&key), value.to_vec()));
            }
            Ok(pairs)
        })
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
        self.file.sync_data().map_err(sled::Error::from)?;
        Ok(self.sync_large_pages().map_err(sled::Error::from)?)
    }

    fn verify(&self) -> Result<(), KvError> {
        self.reading(|| Ok(self.db.iter().try_for_each(|row| row.map(drop))?))
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
