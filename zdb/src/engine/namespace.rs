//! A namespace: the store, its settings, and the thread that commits.

use super::commit::{Action, Operation};
use super::index::Listed;
use super::lifecycle::{remove_deleted, stored_settings};
use super::pipeline::Pipeline;
use super::queue::{Answer, Queue};
use super::read::{KeyVersion, RawEntry, Reading};
use super::settings::{DELETED, MARKER, NamespaceSettings};
use super::store::{DamageReport, Store, take_lock};
use super::threads::{Maintenance, Shared};
use super::{EngineError, EngineOptions, KEY_BYTES_MAX, Mode, VALUE_BYTES_MAX};
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// How to open a namespace.
#[derive(Debug, Clone)]
pub struct NamespaceOptions {
    /// Its name.
    pub name: String,
    /// Its directory; nothing else may be in it.
    pub dir: PathBuf,
    /// Make it if the directory holds none. Without this a missing namespace is [`EngineError::Gone`].
    pub create: bool,
    /// Settings of a new namespace; with `replace_settings` also of an existing one.
    pub settings: NamespaceSettings,
    /// Let `settings` replace what an existing namespace has stored.
    pub replace_settings: bool,
}

impl NamespaceOptions {
    /// Open it, or make it with default settings.
    pub fn new(name: impl Into<String>, dir: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            dir: dir.into(),
            create: true,
            settings: NamespaceSettings::default(),
            replace_settings: false,
        }
    }

    /// Open it; it must exist.
    pub fn existing(name: impl Into<String>, dir: impl Into<PathBuf>) -> Self {
        Self {
            create: false,
            ..Self::new(name, dir)
        }
    }
}

/// How an operation's answer is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caller {
    /// Nothing else of this client is under way or has arrived: its task may wait for the disk.
    Alone,
    /// It goes on meanwhile.
    Busy,
}

/// Counters of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Live keys.
    pub keys: u64,
    /// Live payload bytes; what the quota counts.
    pub used_bytes: u64,
    /// Payload bytes of older versions that are kept.
    pub history_bytes: u64,
    /// What can still be stored: the smaller of quota and disk.
    pub free_bytes: u64,
    /// Free bytes of the disk.
    pub disk_free_bytes: u64,
    /// Bytes of datafiles, garbage included.
    pub datafile_bytes: u64,
    /// The next id of a sequential namespace.
    pub next_id: u64,
}

/// What is known of a key without reading its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyStat {
    /// The key.
    pub key: Bytes,
    /// Bytes of its value.
    pub bytes: u32,
    /// When it was set, Unix seconds.
    pub timestamp: u32,
    /// Where it stands in scan order.
    pub position: u64,
}

/// Some keys in scan order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeyPage {
    /// The keys.
    pub keys: Vec<KeyStat>,
    /// Hand this to the next call; `None` at the end.
    pub next: Option<u64>,
}

/// A namespace of an [`super::Engine`].
pub struct Namespace {
    pub(super) shared: Arc<Shared>,
    committer: Mutex<Option<JoinHandle<()>>>,
    /// Held while the settings change.
    pub(super) changing: Mutex<()>,
}

impl std::fmt::Debug for Namespace {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Namespace")
            .field("name", &self.shared.name)
            .field("dir", &self.shared.store.dir)
            .finish_non_exhaustive()
    }
}

impl Namespace {
    pub(super) fn open(
        engine: &EngineOptions,
        options: NamespaceOptions,
        compaction_turn: Arc<Mutex<()>>,
    ) -> Result<Self, EngineError> {
        let media = &engine.media;
        let dir = &options.dir;
        if options.create && media.exists(&dir.join(DELETED)) && !media.exists(&dir.join(MARKER)) {
            // Deleted, but a crash left part of it.
            remove_deleted(media, dir)?;
        }
        if options.create {
            media
                .create_dir_all(dir)
                .map_err(EngineError::io("create directory", dir))?;
        } else if !media.exists(&dir.join(MARKER)) {
            return Err(EngineError::Gone { dir: dir.clone() });
        }
        let lock = take_lock(media, dir)?;
        let stored = stored_settings(media, &options)?;
        let store = Store::open(engine, dir, &stored, lock)?;
        let shared = Arc::new(Shared {
            name: options.name,
            store,
            settings: RwLock::new(stored.settings),
            queue: Queue::default(),
            pipeline: Pipeline::default(),
            closing: AtomicBool::new(false),
            compaction: engine.compaction,
            compaction_turn,
            maintenance: Maintenance::default(),
        });
        let committing = Arc::clone(&shared);
        let committer = std::thread::Builder::new()
            .name("zdb-commit".to_owned())
            .spawn(move || committing.commit_loop())
            .map_err(EngineError::io("start the commit thread for", dir))?;
        shared.start_maintenance();
        Ok(Self {
            shared,
            committer: Mutex::new(Some(committer)),
            changing: Mutex::new(()),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.shared.store.dir
    }

    /// Its settings now.
    pub fn settings(&self) -> NamespaceSettings {
        self.shared.settings.read().clone()
    }

    /// Was nothing ever written?
    pub fn is_unused(&self) -> bool {
        self.shared.store.writer.lock().counters.next_version <= 1
    }

    /// The value of a key, verified.
    pub async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        if let Some(known) = self.get_cached(key) {
            return known;
        }
        let shared = Arc::clone(&self.shared);
        let key = key.to_vec();
        let read = tokio::task::spawn_blocking(move || shared.get(&key)).await;
        read.unwrap_or(Err(EngineError::Closed))
    }

    /// As [`Namespace::get`], on this thread.
    pub fn get_blocking(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.shared.get(key)
    }

    /// The value of a key, verified, if that is known without waiting for the disk.
    pub fn get_cached(&self, key: &[u8]) -> Option<Result<Option<Bytes>, EngineError>> {
        self.shared.get_cached(key).transpose()
    }

    /// A version of a key, `None` for the current one, with its value, verified. `Ok(None)`: there is no such key (now).
    /// [`EngineError::UnknownVersion`]: the key has no such version, or it is not kept any more.
    pub fn history(
        &self,
        key: &[u8],
        version: Option<u64>,
    ) -> Result<Option<KeyVersion>, EngineError> {
        self.shared.check_readable()?;
        self.shared.store.version(key, version)
    }

    /// Set a key; durable when this returns. `None` if the value was the same already, else the key (in sequential mode the new one).
    pub async fn set(&self, key: &[u8], value: Bytes) -> Result<Option<Bytes>, EngineError> {
        let key = Bytes::copy_from_slice(key);
        self.submit_set(key, value, None, Caller::Busy)?
            .stored()
            .await
    }

    /// Delete a key; `false` if there was none. Durable when this returns.
    pub async fn delete(&self, key: &[u8]) -> Result<bool, EngineError> {
        let key = Bytes::copy_from_slice(key);
        match self.submit_delete(key, None, Caller::Busy)?.deleted().await {
            Ok(()) => Ok(true),
            Err(EngineError::KeyNotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Put a SET in the queue, or carry it out.
    pub(crate) fn submit_set(
        &self,
        key: Bytes,
        value: Bytes,
        timestamp: Option<u32>,
        caller: Caller,
    ) -> Result<Answer, EngineError> {
        let sequential = self.shared.settings.read().mode == Mode::Sequential;
        if key.len() > KEY_BYTES_MAX || (key.is_empty() && !sequential) {
            return Err(EngineError::KeySize { bytes: key.len() });
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(EngineError::ValueSize { bytes: value.len() });
        }
        let crc = crc32fast::hash(&value);
        let action = Action::Set {
            value,
            crc,
            timestamp,
        };
        self.submit(Operation { key, action }, caller)
    }

    /// Put a DEL in the queue, or carry it out.
    pub(crate) fn submit_delete(
        &self,
        key: Bytes,
        timestamp: Option<u32>,
        caller: Caller,
    ) -> Result<Answer, EngineError> {
        let action = Action::Delete { timestamp };
        self.submit(Operation { key, action }, caller)
    }

    fn submit(&self, operation: Operation, caller: Caller) -> Result<Answer, EngineError> {
        if caller == Caller::Alone
            && let Some(outcome) = self.shared.commit_here(&operation)
        {
            return Ok(Answer::known(outcome));
        }
        self.shared.queue.submit(operation)
    }

    /// Is there such a key?
    pub fn exists(&self, key: &[u8]) -> Result<bool, EngineError> {
        Ok(self.stat(key)?.is_some())
    }

    /// What is known of a key without reading its value.
    pub fn stat(&self, key: &[u8]) -> Result<Option<KeyStat>, EngineError> {
        let state = self.shared.store.state.read();
        let entry = state.index.get(key)?;
        Ok(entry.map(|entry| KeyStat {
            key: Bytes::copy_from_slice(key),
            bytes: entry.value_bytes,
            timestamp: entry.timestamp,
            position: state.index.position(key, &entry),
        }))
    }

    /// Read and verify a value without returning it: `None` no such key, `Some(false)` corrupt.
    pub async fn check(&self, key: &[u8]) -> Result<Option<bool>, EngineError> {
        match self.get(key).await {
            Ok(Some(_)) => Ok(Some(true)),
            Ok(None) => Ok(None),
            Err(EngineError::Corrupt(_)) => Ok(Some(false)),
            Err(error) => Err(error),
        }
    }

    /// Keys behind a position (`None`: from the first) in scan order: last-written in user mode, id in sequential mode.
    pub fn keys_after(
        &self,
        position: Option<u64>,
        keys_max: usize,
    ) -> Result<KeyPage, EngineError> {
        let state = self.shared.store.state.read();
        Ok(page(state.index.walk(position, true, keys_max)?))
    }

    /// Keys before a position (`None`: from the last), backwards.
    pub fn keys_before(
        &self,
        position: Option<u64>,
        keys_max: usize,
    ) -> Result<KeyPage, EngineError> {
        let state = self.shared.store.state.read();
        Ok(page(state.index.walk(position, false, keys_max)?))
    }

    /// Counters.
    pub fn usage(&self) -> Result<Usage, EngineError> {
        let store = &self.shared.store;
        let space = store
            .media
            .space(&store.dir)
            .map_err(EngineError::io("measure the disk of", &store.dir))?;
        let disk_free_bytes = space.free_bytes.saturating_sub(store.reserve_bytes);
        let next_id = store.writer.lock().counters.next_id;
        let quota = self.shared.settings.read().maxsize_bytes;
        let state = store.state.read();
        let used_bytes = state.index.live_value_bytes();
        let quota_free = match quota {
            0 => u64::MAX,
            quota => quota.saturating_sub(used_bytes),
        };
        Ok(Usage {
            keys: state.index.live_keys(),
            used_bytes,
            history_bytes: state.index.history_bytes(),
            free_bytes: disk_free_bytes.min(quota_free),
            disk_free_bytes,
            datafile_bytes: state
                .readers
                .values()
                .map(crate::datafile::DatafileReader::len)
                .sum(),
            next_id,
        })
    }

    /// Damage found so far (at open, by reads, by compaction) that still stands.
    pub fn damaged(&self) -> Vec<DamageReport> {
        self.shared.store.damaged()
    }

    /// Is the directory still the one that was opened, and does the namespace still write?
    pub fn is_alive(&self) -> Result<(), EngineError> {
        if self.is_closed() {
            return Err(EngineError::Closed);
        }
        self.shared.store.check_alive()?;
        self.shared.store.check_running()
    }

    /// Was it closed?
    pub fn is_closed(&self) -> bool {
        self.shared.is_closing()
    }

    /// Compact until nothing is worth it; for tests and tools. The background does it by itself.
    pub fn compact_now(&self) -> Result<(), EngineError> {
        while self.shared.step(false)? {}
        Ok(())
    }

    /// The entry that stands at (or next behind) an offset of a datafile, 0 for the first; `None` at its end, or if there is no such file.
    pub fn raw_entry(&self, file: u32, offset: u64) -> Result<Option<RawEntry>, EngineError> {
        self.shared.check_readable()?;
        self.shared.store.raw_entry(file, offset)
    }

    /// The datafile that is written to, and how far it is filled.
    pub fn active_datafile(&self) -> (u32, u64) {
        let writer = self.shared.store.writer.lock();
        let file = self.shared.store.state.read().active;
        (file, writer.active.len())
    }

    /// Datafiles that were written to since the start or the last reset.
    pub fn dirty_datafiles(&self) -> Vec<u32> {
        let state = self.shared.store.state.read();
        state.dirty.iter().copied().collect()
    }

    /// Forget which datafiles were written to.
    pub fn reset_dirty_datafiles(&self) {
        self.shared.store.state.write().dirty.clear();
    }

    /// Answer what is queued, then stop. Idempotent.
    pub(super) fn close(&self) {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.queue.close();
        self.shared.maintenance.wake();
        if let Some(committer) = self.committer.lock().take() {
            let _ = committer.join();
            // A compaction sees `closing` between two batches.
            let exclusive = self.shared.maintenance.interrupt();
            self.shared.store.close();
            drop(exclusive);
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.close();
    }
}

fn page(keys: Vec<Listed>) -> KeyPage {
    let keys: Vec<KeyStat> = keys
        .into_iter()
        .map(|listed| KeyStat {
            key: listed.key,
            bytes: listed.entry.value_bytes,
            timestamp: listed.entry.timestamp,
            position: listed.position,
        })
        .collect();
    KeyPage {
        next: keys.last().map(|key| key.position),
        keys,
    }
}

impl Shared {
    fn check_readable(&self) -> Result<(), EngineError> {
        if self.is_closing() {
            return Err(EngineError::Closed);
        }
        if self.settings.read().frozen {
            return Err(EngineError::Frozen);
        }
        // A directory that was removed stays readable through open files; an answer from it would hide the loss.
        self.store.check_alive_lately()
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.check_readable()?;
        Ok(self.store.get(key)?.map(|stored| stored.value))
    }

    fn get_cached(&self, key: &[u8]) -> Result<Option<Option<Bytes>>, EngineError> {
        self.check_readable()?;
        let read = self.store.read(key, Reading::Cached)?;
        Ok(read.map(|found| found.map(|stored| stored.value)))
    }
}
