//! The local store: file contents and the journal, append-only, on the client's own disk.
//!
//! ```text
//! append_data  -> active data datafile --full / interval / sync--> closing --keeper--> .sealed --push--> .pushed
//! append_journal -> active meta datafile --interval / sync / size-->   "        (after all data it names)
//! ```
//!
//! Invariants:
//! - `sync` makes data durable before the journal that names it; one round of fdatasync serves all who wait;
//! - a meta datafile becomes `.sealed` only after all data it names is `.sealed` (the keeper closes in order);
//! - the first failed fsync stops the store: what the disk holds is then unknown until it is opened again;
//! - bytes are given out only if their page checksum verifies;
//! - after a crash, what is there is a prefix of what was done ([`open`]).

pub mod append;
pub mod aside;
pub mod catalog;
pub mod handles;
pub mod keeper;
pub mod layout;
pub mod open;
pub mod pages;
mod sync;
pub mod synced_point;
#[cfg(test)]
mod tests;

use crate::ports::StoreError;
use append::{Active, Gate, OpenData};
use catalog::{AtRisk, Catalog, LocalFile};
use handles::{Handles, LocalReadError};
use keeper::Keeper;
use layout::{DatafileName, Stage, StateDir};
use parking_lot::{Mutex, RwLock};
use qsfs_zdb::datafile::DatafileError;
use qsfs_zdb::media::{Media, is_disk_full};
use qsfs_zstor::id::{DatafileId, Epoch, Stream};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::mpsc;

/// Longest time a writer waits for space before it gets ENOSPC.
pub const WRITER_WAIT_MAX: Duration = Duration::from_secs(10);

/// How the store behaves.
#[derive(Debug, Clone, Copy)]
pub struct StoreSettings {
    /// A data datafile is sealed when it holds so many bytes.
    pub datafile_bytes: u64,
    /// A datafile is sealed at the latest so long after its first byte.
    pub push_interval: Duration,
    /// Unsynced bytes are synced at the latest after this.
    pub sync_interval: Duration,
    /// A journal is sealed when it holds so many bytes.
    pub journal_bytes: u64,
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self {
            datafile_bytes: 64 << 20,
            push_interval: Duration::from_secs(15 * 60),
            sync_interval: Duration::from_secs(5),
            journal_bytes: 16 << 20,
        }
    }
}

/// What the store tells the rest of the mount.
#[derive(Debug, Clone)]
pub enum StoreEvent {
    /// A datafile is sealed: push it.
    Sealed(Arc<LocalFile>),
    /// A writer waits for space.
    SpaceWanted,
    /// The store stopped; the text says why.
    Failed(String),
}

/// Which datafiles nothing names any more (committed or not), as the namespace knows now.
pub type DeadSource = Box<dyn Fn() -> Vec<DatafileId> + Send + Sync>;

/// Counters for people.
#[derive(Debug, Default)]
pub struct StoreCounters {
    /// Damaged local copies dropped because a committed one replaces them.
    pub damaged_dropped: AtomicU64,
    /// Rounds of fdatasync.
    pub sync_rounds: AtomicU64,
}

/// The local store of one mount.
pub struct LocalStore {
    media: Arc<dyn Media>,
    dir: StateDir,
    settings: RwLock<StoreSettings>,
    next_id: AtomicU64,
    active: Active,
    gate: Gate,
    /// Data datafiles that are open or closing, for readers and syncs.
    open_data: RwLock<BTreeMap<DatafileId, Arc<OpenData>>>,
    catalog: Catalog,
    handles: Handles,
    keeper: Keeper,
    rounds: sync::Rounds,
    synced: synced_point::SyncedPointFile,
    failed: OnceLock<String>,
    fenced: Mutex<Option<Epoch>>,
    held: keeper::Hold,
    events: mpsc::UnboundedSender<StoreEvent>,
    dead_source: OnceLock<DeadSource>,
    read_only: AtomicBool,
    counters: StoreCounters,
}

impl std::fmt::Debug for LocalStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalStore")
            .field("dir", &self.dir.root())
            .finish_non_exhaustive()
    }
}

impl LocalStore {
    fn assemble(
        media: Arc<dyn Media>,
        dir: StateDir,
        settings: StoreSettings,
        next_id: DatafileId,
        catalog: Catalog,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<StoreEvent>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let store = Arc::new(Self {
            handles: Handles::new(Arc::clone(&media)),
            media,
            dir,
            settings: RwLock::new(settings),
            next_id: AtomicU64::new(next_id.0),
            active: Active::default(),
            gate: Gate::default(),
            open_data: RwLock::default(),
            catalog,
            keeper: Keeper::default(),
            rounds: sync::Rounds::default(),
            synced: synced_point::SyncedPointFile::default(),
            failed: OnceLock::new(),
            fenced: Mutex::new(None),
            held: keeper::Hold::default(),
            events,
            dead_source: OnceLock::new(),
            read_only: AtomicBool::new(false),
            counters: StoreCounters::default(),
        });
        keeper::start(&store);
        (store, receiver)
    }

    /// Where everything is.
    pub const fn dir(&self) -> &StateDir {
        &self.dir
    }

    /// The disk.
    pub const fn media(&self) -> &Arc<dyn Media> {
        &self.media
    }

    /// Sealed and pushed files.
    pub const fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Counters.
    pub const fn counters(&self) -> &StoreCounters {
        &self.counters
    }

    /// Settings as they are now.
    pub fn settings(&self) -> StoreSettings {
        *self.settings.read()
    }

    /// Takes new settings; they count from the next datafile on.
    pub fn set_settings(&self, settings: StoreSettings) {
        *self.settings.write() = settings;
        self.keeper.wake();
    }

    /// Sets, once, where dead datafiles are learned from.
    pub fn set_dead_source(&self, source: DeadSource) {
        if self.dead_source.set(source).is_err() {
            tracing::warn!("the source of dead datafiles was set already");
        }
    }

    /// Refuses all writes from now on: a follower.
    pub fn set_read_only(&self) {
        self.read_only.store(true, Ordering::Release);
    }

    /// Another writer took over: refuses all writes from now on.
    pub fn fence(&self, epoch: Epoch) {
        *self.fenced.lock() = Some(epoch);
        self.held.release();
    }

    /// The epoch of the writer that took over, if one did.
    pub fn fenced(&self) -> Option<Epoch> {
        *self.fenced.lock()
    }

    /// Why the store stopped, if it did.
    pub fn failure(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Holds writers back (they wait, then get ENOSPC) or lets them go on.
    pub fn hold_writers(&self, reason: Option<String>) {
        self.held.set(reason);
    }

    /// Why writers are held back.
    pub fn held(&self) -> Option<String> {
        self.held.reason()
    }

    /// Acknowledged bytes that no committed datafile holds.
    pub fn at_risk(&self) -> AtRisk {
        let mut risk = self.catalog.at_risk();
        for file in self.open_data.read().values() {
            if file.bytes() > 0 {
                risk.add(file.bytes(), file.first_byte_ms());
            }
        }
        if let Some((bytes, first_byte_ms)) = self.active.journal_at_risk() {
            risk.add(bytes, first_byte_ms);
        }
        for (bytes, first_byte_ms) in self.keeper.journals_at_risk() {
            risk.add(bytes, first_byte_ms);
        }
        risk
    }

    /// Bytes of all local datafiles.
    pub fn local_bytes(&self) -> u64 {
        self.catalog.bytes()
            + self
                .open_data
                .read()
                .values()
                .map(|file| file.bytes())
                .sum::<u64>()
    }

    /// Bytes of data datafiles that are open or closing.
    pub fn open_bytes(&self) -> u64 {
        self.open_data
            .read()
            .values()
            .map(|file| file.bytes())
            .sum()
    }

    /// Is it a data datafile that is open or closing?
    pub fn is_open(&self, id: DatafileId) -> bool {
        self.open_data.read().contains_key(&id)
    }

    /// Highest id given out so far.
    pub fn last_id(&self) -> DatafileId {
        DatafileId(self.next_id.load(Ordering::Acquire).saturating_sub(1))
    }

    fn allocate_id(&self) -> DatafileId {
        DatafileId(self.next_id.fetch_add(1, Ordering::AcqRel))
    }

    /// Path of a sealed or pushed file.
    pub fn path_of(&self, file: &LocalFile) -> PathBuf {
        self.dir.datafile(file.name)
    }

    /// Reads and verifies bytes of a local data datafile; `Ok(false)` when it is not local. Meta files are read with
    /// [`Self::read_meta`].
    pub fn read_data(
        &self,
        id: DatafileId,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<bool, StoreError> {
        if let Some(open) = self.open_data.read().get(&id).cloned() {
            return open
                .read(offset, buf)
                .map(|()| true)
                .map_err(|error| read_error(error, UNCOMMITTED));
        }
        // A rename between look-up and open is possible once (sealed to pushed), hence the second try.
        for _ in 0..2 {
            let Some(file) = self
                .catalog
                .get(id)
                .filter(|file| file.name.stream == Stream::Data)
            else {
                return Ok(false);
            };
            self.catalog.touch(&file);
            let read = self
                .handles
                .get(&self.dir, id, &self.path_of(&file))
                .and_then(|handle| handle.read(offset, buf));
            match read {
                Ok(()) => return Ok(true),
                Err(LocalReadError::Io { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) if self.committed(id) => {
                    tracing::error!(datafile = %id, %error, "local copy is damaged: dropped, the shards replace it");
                    self.counters
                        .damaged_dropped
                        .fetch_add(1, Ordering::Relaxed);
                    self.drop_local(id);
                    return Ok(false);
                }
                Err(error) => return Err(read_error(error, UNCOMMITTED)),
            }
        }
        Ok(false)
    }

    fn committed(&self, id: DatafileId) -> bool {
        self.catalog
            .get(id)
            .is_none_or(|file| file.name.stage == Stage::Pushed)
    }

    /// Reads raw bytes of a sealed meta datafile (its frames carry their own checksums).
    pub fn read_meta(
        &self,
        file: &LocalFile,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), StoreError> {
        let path = self.path_of(file);
        let open = self.media.open(&path, qsfs_zdb::media::OpenMode::Read);
        let read = open.and_then(|open| open.read_exact_at(buf, offset));
        read.map_err(|source| io_error("read", &path, source))
    }

    /// Notes that datafiles are committed: `.sealed` becomes `.pushed`, durably.
    pub fn mark_pushed(&self, ids: &[DatafileId]) -> Result<(), StoreError> {
        for id in ids {
            let Some(file) = self
                .catalog
                .get(*id)
                .filter(|file| file.name.stage == Stage::Sealed)
            else {
                continue;
            };
            let from = self.path_of(&file);
            let to = self.dir.datafile(DatafileName {
                stage: Stage::Pushed,
                ..file.name
            });
            self.media
                .rename(&from, &to)
                .map_err(|source| io_error("rename", &from, source))?;
            self.catalog.set_pushed(*id);
        }
        let dir = self.dir.datafiles();
        self.media
            .sync_dir(&dir)
            .map_err(|source| io_error("sync directory", &dir, source))
    }

    /// Drops the local copy of a datafile; the caller knows that it is committed or dead.
    pub fn drop_local(&self, id: DatafileId) {
        let Some(file) = self.catalog.remove(id) else {
            return;
        };
        self.handles.forget(id);
        let mut paths = vec![self.path_of(&file)];
        if file.name.stream == Stream::Data {
            paths.push(self.dir.page_sums(id));
        }
        for path in paths {
            if let Err(error) = self.media.remove(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove a local datafile");
            }
        }
        self.held.poke();
    }

    /// Moves everything that is not committed to `aside/` and lists it. For a writer that was outrun.
    pub fn set_aside(&self, label: &str) -> Result<Vec<PathBuf>, StoreError> {
        aside::set_aside(&self.media, &self.dir, label, |name| {
            name.stage != Stage::Pushed
        })
    }

    fn check_writable(&self) -> Result<(), StoreError> {
        if self.read_only.load(Ordering::Acquire) {
            return Err(StoreError::ReadOnly);
        }
        if let Some(epoch) = self.fenced() {
            return Err(StoreError::Fenced(epoch));
        }
        self.check_running()
    }

    fn check_running(&self) -> Result<(), StoreError> {
        match self.failed.get() {
            Some(why) => Err(StoreError::Io {
                step: "write to",
                path: self.dir.datafiles().display().to_string(),
                source: std::io::Error::other(why.clone()),
            }),
            None => Ok(()),
        }
    }

    /// Stops the store for good.
    fn fail(&self, error: &StoreError) {
        let why =
            format!("{error}; what the disk holds is unknown until the volume is mounted again");
        if self.failed.set(why.clone()).is_ok() {
            tracing::error!(%error, "the local store stops");
            let _ = self.events.send(StoreEvent::Failed(why));
        }
    }

    /// Ends the background thread; what is durable stays, nothing is written any more.
    pub fn stop(&self) {
        self.keeper.stop();
    }
}

impl Drop for LocalStore {
    fn drop(&mut self) {
        self.keeper.stop();
    }
}

const UNCOMMITTED: &str = "it is not committed yet, so no shard can replace it; copy what else is needed, then \
     move the state directory away and mount again with the recovery kit to continue from the last push";

fn read_error(error: LocalReadError, advice: &str) -> StoreError {
    match error {
        LocalReadError::Damaged { path, offset, what } => StoreError::Damaged {
            path: path.display().to_string(),
            offset,
            advice: format!("{what}; {advice}"),
        },
        LocalReadError::Io { path, source } => io_error("read", &path, source),
    }
}

/// ENOSPC is its own kind; everything else is the disk's failure.
fn io_error(step: &'static str, path: &Path, source: std::io::Error) -> StoreError {
    if is_disk_full(&source) {
        return StoreError::NoSpace(format!("{step} {}: the local disk is full", path.display()));
    }
    StoreError::Io {
        step,
        path: path.display().to_string(),
        source,
    }
}

fn datafile_error(step: &'static str, path: &Path, error: DatafileError) -> StoreError {
    match error {
        DatafileError::Io { source, .. } => io_error(step, path, source),
        other => io_error(step, path, std::io::Error::other(other)),
    }
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
