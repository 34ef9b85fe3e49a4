//! A namespace: the store, its settings, and the thread that commits.

use super::commit::{Action, Done, Operation};
use super::settings::{MARKER, NamespaceSettings};
use super::store::{DamageReport, Store, take_lock};
use super::{EngineError, EngineOptions, KEY_BYTES_MAX, Mode, VALUE_BYTES_MAX};
use bytes::Bytes;
use parking_lot::{Condvar, Mutex, RwLock};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;

/// Operations and bytes of one commit.
const BATCH_OPERATIONS_MAX: usize = 4096;
const BATCH_BYTES_MAX: usize = 32 << 20;

/// A namespace without writes for this long marks its datafile.
const IDLE_AFTER: Duration = Duration::from_millis(500);

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

/// Counters of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Live keys.
    pub keys: u64,
    /// Live payload bytes; what the quota counts.
    pub used_bytes: u64,
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

struct Waiting {
    operation: Operation,
    answer: oneshot::Sender<Result<Done, EngineError>>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    closed: bool,
}

/// What the threads of a namespace share.
struct Shared {
    name: String,
    store: Store,
    settings: RwLock<NamespaceSettings>,
    queue: Mutex<Queue>,
    wake: Condvar,
    compacting: AtomicBool,
    closing: AtomicBool,
    compaction: bool,
    compaction_turn: Arc<Mutex<()>>,
}

/// A namespace of an [`super::Engine`].
pub struct Namespace {
    shared: Arc<Shared>,
    committer: Mutex<Option<JoinHandle<()>>>,
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

fn unix_seconds() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| {
        u32::try_from(since.as_secs()).unwrap_or(u32::MAX)
    })
}

impl Namespace {
    pub(super) fn open(
        engine: &EngineOptions,
        options: NamespaceOptions,
        compaction_turn: Arc<Mutex<()>>,
    ) -> Result<Self, EngineError> {
        let media = &engine.media;
        let dir = &options.dir;
        if options.create {
            media
                .create_dir_all(dir)
                .map_err(EngineError::io("create directory", dir))?;
        } else if !media.exists(&dir.join(MARKER)) {
            return Err(EngineError::Gone { dir: dir.clone() });
        }
        let lock = take_lock(media, dir)?;
        let settings = match NamespaceSettings::load(media, dir)? {
            Some(stored) if !options.replace_settings => stored,
            None if !options.create => return Err(EngineError::Gone { dir: dir.clone() }),
            stored => {
                if stored.as_ref() != Some(&options.settings) {
                    options.settings.save(media, dir)?;
                }
                options.settings
            }
        };
        let store = Store::open(engine, dir, settings.mode, lock)?;
        let shared = Arc::new(Shared {
            name: options.name,
            store,
            settings: RwLock::new(settings),
            queue: Mutex::default(),
            wake: Condvar::new(),
            compacting: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            compaction: engine.compaction,
            compaction_turn,
        });
        let committing = Arc::clone(&shared);
        let committer = std::thread::Builder::new()
            .name("zdb-commit".to_owned())
            .spawn(move || committing.commit_loop())
            .map_err(EngineError::io("start the commit thread for", dir))?;
        shared.start_compaction();
        Ok(Self {
            shared,
            committer: Mutex::new(Some(committer)),
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

    /// Change settings; durable when this returns. The mode can change only while nothing was ever written.
    pub fn change_settings(
        &self,
        change: impl FnOnce(&mut NamespaceSettings),
    ) -> Result<(), EngineError> {
        let store = &self.shared.store;
        store.check_alive()?;
        let mut settings = self.shared.settings.write();
        let mut changed = settings.clone();
        change(&mut changed);
        if changed.mode != settings.mode {
            if !self.is_unused() {
                return Err(EngineError::InUseMode);
            }
            let mut state = store.state.write();
            state.index.set_sequential(changed.mode == Mode::Sequential);
        }
        changed.save(&store.media, &store.dir)?;
        store.remember_identity()?;
        *settings = changed;
        Ok(())
    }

    /// Was nothing ever written?
    pub fn is_unused(&self) -> bool {
        self.shared.store.writer.lock().counters.next_version <= 1
    }

    /// The value of a key, verified.
    pub async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let shared = Arc::clone(&self.shared);
        let key = key.to_vec();
        let read = tokio::task::spawn_blocking(move || shared.get(&key)).await;
        read.unwrap_or(Err(EngineError::Closed))
    }

    /// As [`Namespace::get`], on this thread.
    pub fn get_blocking(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.shared.get(key)
    }

    /// Set a key; durable when this returns. `None` if the value was the same already, else the key (in sequential mode the new one).
    pub async fn set(&self, key: &[u8], value: Bytes) -> Result<Option<Bytes>, EngineError> {
        let key = Bytes::copy_from_slice(key);
        self.submit_set(key, value, None)?.stored().await
    }

    /// Delete a key; `false` if there was none. Durable when this returns.
    pub async fn delete(&self, key: &[u8]) -> Result<bool, EngineError> {
        let key = Bytes::copy_from_slice(key);
        match self.submit_delete(key)?.deleted().await {
            Ok(()) => Ok(true),
            Err(EngineError::KeyNotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Put a SET in the queue.
    pub(crate) fn submit_set(
        &self,
        key: Bytes,
        value: Bytes,
        timestamp: Option<u32>,
    ) -> Result<Answer, EngineError> {
        let sequential = self.shared.settings.read().mode == Mode::Sequential;
        if key.len() > KEY_BYTES_MAX || (key.is_empty() && !sequential) {
            return Err(EngineError::KeySize { bytes: key.len() });
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(EngineError::ValueSize { bytes: value.len() });
        }
        self.submit(Operation {
            key,
            action: Action::Set { value, timestamp },
        })
    }

    /// Put a DEL in the queue.
    pub(crate) fn submit_delete(&self, key: Bytes) -> Result<Answer, EngineError> {
        self.submit(Operation {
            key,
            action: Action::Delete,
        })
    }

    fn submit(&self, operation: Operation) -> Result<Answer, EngineError> {
        let (answer, waits) = oneshot::channel();
        let mut queue = self.shared.queue.lock();
        if queue.closed {
            return Err(EngineError::Closed);
        }
        queue.waiting.push_back(Waiting { operation, answer });
        drop(queue);
        self.shared.wake.notify_one();
        Ok(Answer(waits))
    }

    /// Is there such a key?
    pub fn exists(&self, key: &[u8]) -> bool {
        self.stat(key).is_some()
    }

    /// What is known of a key without reading its value.
    pub fn stat(&self, key: &[u8]) -> Option<KeyStat> {
        let state = self.shared.store.state.read();
        let (_, entry) = state.index.get(key)?;
        Some(KeyStat {
            key: Bytes::copy_from_slice(key),
            bytes: entry.value_bytes,
            timestamp: entry.timestamp,
            position: state.index.position(key)?,
        })
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
    pub fn keys_after(&self, position: Option<u64>, keys_max: usize) -> KeyPage {
        let state = self.shared.store.state.read();
        page(state.index.after(position), keys_max)
    }

    /// Keys before a position (`None`: from the last), backwards.
    pub fn keys_before(&self, position: Option<u64>, keys_max: usize) -> KeyPage {
        let state = self.shared.store.state.read();
        page(state.index.before(position), keys_max)
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
        if self.shared.closing.load(Ordering::Acquire) {
            return Err(EngineError::Closed);
        }
        self.shared.store.check_alive()?;
        self.shared.store.check_running()
    }

    /// Was it closed?
    pub fn is_closed(&self) -> bool {
        self.shared.closing.load(Ordering::Acquire)
    }

    /// Compact until nothing is worth it; for tests and tools. The background does it by itself.
    pub fn compact_now(&self) -> Result<(), EngineError> {
        while self.shared.store.compact_step(&|| !self.is_closed())? {}
        Ok(())
    }

    /// Answer what is queued, then stop. Idempotent.
    pub(super) fn close(&self) {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.queue.lock().closed = true;
        self.shared.wake.notify_all();
        if let Some(committer) = self.committer.lock().take() {
            let _ = committer.join();
            // A compaction sees `closing` between two batches.
            drop(self.shared.compaction_turn.lock());
            self.shared.store.close();
        }
    }

    pub(super) fn remove_files(&self) -> Result<(), EngineError> {
        let store = &self.shared.store;
        let names = store
            .media
            .list(&store.dir)
            .map_err(EngineError::io("list", &store.dir))?;
        for name in names {
            let path = store.dir.join(name);
            store
                .media
                .remove(&path)
                .map_err(EngineError::io("remove", &path))?;
        }
        store
            .media
            .remove_dir(&store.dir)
            .map_err(EngineError::io("remove directory", &store.dir))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.close();
    }
}

/// The answer to something in the queue.
pub(crate) struct Answer(oneshot::Receiver<Result<Done, EngineError>>);

impl Answer {
    /// Wait for a SET: the key, or `None` if the value was the same already.
    pub(crate) async fn stored(&mut self) -> Result<Option<Bytes>, EngineError> {
        match (&mut self.0).await {
            Ok(outcome) => outcome.map(Done::key),
            Err(_) => Err(EngineError::Closed),
        }
    }

    /// Wait for a DEL.
    pub(crate) async fn deleted(&mut self) -> Result<(), EngineError> {
        self.stored().await.map(|_| ())
    }

    /// As [`Answer::stored`], if it is known already.
    pub(crate) fn try_stored(&mut self) -> Option<Result<Option<Bytes>, EngineError>> {
        match self.0.try_recv() {
            Ok(outcome) => Some(outcome.map(Done::key)),
            Err(oneshot::error::TryRecvError::Empty) => None,
            Err(oneshot::error::TryRecvError::Closed) => Some(Err(EngineError::Closed)),
        }
    }
}

fn page<'a>(
    keys: impl Iterator<Item = (u64, &'a super::index::Key, &'a super::index::Entry)>,
    keys_max: usize,
) -> KeyPage {
    let keys: Vec<KeyStat> = keys
        .take(keys_max)
        .map(|(position, key, entry)| KeyStat {
            key: Bytes::copy_from_slice(key),
            bytes: entry.value_bytes,
            timestamp: entry.timestamp,
            position,
        })
        .collect();
    KeyPage {
        next: keys.last().map(|key| key.position),
        keys,
    }
}

impl Shared {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        if self.closing.load(Ordering::Acquire) {
            return Err(EngineError::Closed);
        }
        if self.settings.read().frozen {
            return Err(EngineError::Frozen);
        }
        // A directory that was removed stays readable through open files; an answer from it would hide the loss.
        self.store.check_alive()?;
        Ok(self.store.get(key)?.map(|stored| stored.value))
    }

    fn commit_loop(self: Arc<Self>) {
        while let Some((operations, answers)) = self.next_batch() {
            let settings = self.settings.read().clone();
            let outcomes = self.store.commit(&operations, &settings, unix_seconds());
            // Whoever waits no longer has given up; the outcome stands all the same.
            for (answer, outcome) in answers.into_iter().zip(outcomes) {
                let _ = answer.send(outcome);
            }
            self.start_compaction();
        }
    }

    #[expect(
        clippy::type_complexity,
        reason = "two parallel lists: the operations are lent to the store while the answers wait"
    )]
    fn next_batch(
        &self,
    ) -> Option<(
        Vec<Operation>,
        Vec<oneshot::Sender<Result<Done, EngineError>>>,
    )> {
        let mut queue = self.queue.lock();
        let mut idle = false;
        while queue.waiting.is_empty() {
            if queue.closed {
                return None;
            }
            if idle {
                self.wake.wait(&mut queue);
            } else if self.wake.wait_for(&mut queue, IDLE_AFTER).timed_out() {
                idle = true;
                // Those that come meanwhile are in the queue when this is done.
                parking_lot::MutexGuard::unlocked(&mut queue, || self.store.idle());
            }
        }
        let (mut operations, mut answers) = (Vec::new(), Vec::new());
        let mut bytes = 0;
        while let Some(next) = queue.waiting.front() {
            bytes += next.operation.bytes();
            let full = operations.len() >= BATCH_OPERATIONS_MAX || bytes > BATCH_BYTES_MAX;
            if full && !operations.is_empty() {
                break;
            }
            if let Some(next) = queue.waiting.pop_front() {
                operations.push(next.operation);
                answers.push(next.answer);
            }
        }
        Some((operations, answers))
    }

    /// Start the compaction thread if there is work and none is running.
    fn start_compaction(self: &Arc<Self>) {
        if !self.compaction
            || self.closing.load(Ordering::Acquire)
            || self.compacting.load(Ordering::Acquire)
            || self.store.compaction_victim().is_none()
            || self.compacting.swap(true, Ordering::AcqRel)
        {
            return;
        }
        let shared = Arc::clone(self);
        let started = std::thread::Builder::new()
            .name("zdb-compact".to_owned())
            .spawn(move || shared.compact_all());
        if let Err(error) = started {
            tracing::warn!(%error, "cannot start a compaction");
            self.compacting.store(false, Ordering::Release);
        }
    }

    fn compact_all(&self) {
        let go_on = || !self.closing.load(Ordering::Acquire);
        loop {
            let _turn = self.compaction_turn.lock();
            if !go_on() {
                break;
            }
            match self.store.compact_step(&go_on) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(dir = %self.store.dir.display(), %error, "compaction failed; it is tried again after the next writes");
                    break;
                }
            }
        }
        self.compacting.store(false, Ordering::Release);
    }
}
