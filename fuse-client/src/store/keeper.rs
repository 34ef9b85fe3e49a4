//! The keeper: one thread that closes datafiles in order, syncs in the background and seals when the push interval is over.

use super::append::OpenData;
use super::catalog::LocalFile;
use super::layout::{DatafileName, Stage};
use super::synced_point::SyncedPoint;
use super::{LocalStore, StoreEvent, datafile_error, io_error, pages};
use crate::ports::StoreError;
use parking_lot::{Condvar, Mutex};
use qsfs_zdb::datafile::{Datafile, SyncHandle};
use qsfs_zdb::media::OpenMode;
use qsfs_zstor::id::{DatafileId, Stream};
use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Wait after a full disk kept a datafile from being sealed.
const RETRY: Duration = Duration::from_millis(500);
/// Longest sleep: how late a change of settings may be noticed.
const SLEEP_MAX: Duration = Duration::from_secs(5);

/// A datafile to close.
#[derive(Debug)]
pub(super) enum Close {
    Data(Arc<OpenData>),
    Meta {
        id: DatafileId,
        file: Datafile,
        first_byte_ms: u64,
        barrier: DatafileId,
        checkpoint: bool,
        dead: Vec<DatafileId>,
    },
}

/// A meta datafile in the queue.
#[derive(Debug)]
struct ClosingMeta {
    id: DatafileId,
    bytes: u64,
    first_byte_ms: u64,
    checkpoint: bool,
    sync: SyncHandle,
}

#[derive(Debug, Default)]
struct State {
    /// Front first; an entry is removed only after it is sealed.
    queue: VecDeque<Arc<Mutex<Option<Close>>>>,
    /// Of the meta datafiles in the queue.
    journals: VecDeque<ClosingMeta>,
    seal: bool,
    stop: bool,
    /// Raised by every wake.
    wakes: u64,
    sealed: u64,
    queued: u64,
}

/// What the thread works from.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    state: Mutex<State>,
    changed: Condvar,
    progress: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Keeper {
    pub(super) fn close(&self, close: Close) {
        let mut state = self.state.lock();
        if let Close::Meta {
            id,
            file,
            first_byte_ms,
            checkpoint,
            ..
        } = &close
        {
            state.journals.push_back(ClosingMeta {
                id: *id,
                bytes: file.len(),
                first_byte_ms: *first_byte_ms,
                checkpoint: *checkpoint,
                sync: file.sync_handle(),
            });
        }
        state.queue.push_back(Arc::new(Mutex::new(Some(close))));
        state.queued += 1;
        state.wakes += 1;
        self.changed.notify_all();
    }

    pub(super) fn wake(&self) {
        self.state.lock().wakes += 1;
        self.changed.notify_all();
    }

    pub(super) fn seal_soon(&self) {
        self.state.lock().seal = true;
        self.wake();
    }

    /// Ends the thread and waits for what it is doing right now. What is still in the queue stays `.open`.
    pub(super) fn stop(&self) {
        self.state.lock().stop = true;
        self.changed.notify_all();
        self.progress.notify_all();
        let thread = self.thread.lock().take();
        // The thread itself may be the last to hold the store.
        let other = thread.filter(|thread| thread.thread().id() != std::thread::current().id());
        if other.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the keeper of the local store panicked");
        }
    }

    pub(super) fn journals_at_risk(&self) -> Vec<(u64, u64)> {
        self.state
            .lock()
            .journals
            .iter()
            .map(|meta| (meta.bytes, meta.first_byte_ms))
            .collect()
    }

    /// Every meta datafile in the queue, and the end of the newest journal among them.
    pub(super) fn journals_to_sync(&self) -> (Vec<SyncHandle>, Option<SyncedPoint>) {
        let state = self.state.lock();
        let handles = state.journals.iter().map(|meta| meta.sync.clone());
        let ends = state.journals.iter().filter(|meta| !meta.checkpoint);
        let newest = ends
            .map(|meta| SyncedPoint {
                journal: meta.id,
                offset: meta.bytes,
            })
            .max();
        (handles.collect(), newest)
    }
}

/// Writers held back until there is space.
#[derive(Debug, Default)]
pub(super) struct Hold {
    state: Mutex<(Option<String>, u64)>,
    changed: Condvar,
}

impl Hold {
    pub(super) fn set(&self, reason: Option<String>) {
        let mut state = self.state.lock();
        if state.0.is_some() != reason.is_some() {
            state.1 += 1;
        }
        state.0 = reason;
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn release(&self) {
        self.set(None);
    }

    pub(super) fn reason(&self) -> Option<String> {
        self.state.lock().0.clone()
    }

    /// Space was freed: those who met a full disk try again.
    pub(super) fn poke(&self) {
        self.state.lock().1 += 1;
        self.changed.notify_all();
    }

    /// Waits until nobody is held back; ENOSPC at the deadline.
    pub(super) fn wait(&self, deadline: Instant, on_wait: impl Fn()) -> Result<(), StoreError> {
        let mut state = self.state.lock();
        let mut told = false;
        while let Some(reason) = state.0.clone() {
            if !told {
                told = true;
                parking_lot::MutexGuard::unlocked(&mut state, &on_wait);
                continue;
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return Err(StoreError::NoSpace(reason));
            }
        }
        Ok(())
    }

    /// Waits until space was freed; false at the deadline.
    pub(super) fn wait_poke(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        let before = state.1;
        while state.1 == before {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return false;
            }
        }
        true
    }
}

/// Starts the thread; it ends with the store.
pub(super) fn start(store: &Arc<LocalStore>) {
    let weak = Arc::downgrade(store);
    let spawned = std::thread::Builder::new()
        .name("store-keeper".to_owned())
        .spawn(move || run(&weak));
    match spawned {
        Ok(thread) => *store.keeper.thread.lock() = Some(thread),
        Err(error) => store.fail(&io_error("start the keeper of", store.dir.root(), error)),
    }
}

fn run(weak: &Weak<LocalStore>) {
    let mut synced = Instant::now();
    loop {
        let Some(store) = weak.upgrade() else { return };
        let mut state = store.keeper.state.lock();
        if state.stop {
            return;
        }
        let wakes = state.wakes;
        let next = state.queue.front().cloned();
        let seal = std::mem::take(&mut state.seal);
        drop(state);
        if seal {
            store.rotate();
        }
        let settings = store.settings();
        if let Some(next) = next {
            store.close_one(&next);
        } else if store
            .active
            .oldest()
            .is_some_and(|oldest| oldest.elapsed() >= settings.push_interval)
        {
            store.rotate();
        } else if synced.elapsed() >= settings.sync_interval {
            if store.dirty() && store.failure().is_none() {
                // The failure is noted by the round itself; whoever syncs or writes next is told.
                let _ = store.sync();
            }
            synced = Instant::now();
        } else {
            let until_sync = settings.sync_interval.saturating_sub(synced.elapsed());
            let until_seal = store.active.oldest().map_or(SLEEP_MAX, |oldest| {
                settings.push_interval.saturating_sub(oldest.elapsed())
            });
            let sleep = until_sync.min(until_seal).min(SLEEP_MAX);
            let mut state = store.keeper.state.lock();
            if state.wakes == wakes && !state.stop {
                store.keeper.changed.wait_for(&mut state, sleep);
            }
        }
    }
}

impl LocalStore {
    fn close_one(&self, slot: &Mutex<Option<Close>>) {
        let outcome = match &mut *slot.lock() {
            Some(Close::Data(open)) => self.seal_data(open),
            Some(Close::Meta {
                id,
                file,
                first_byte_ms,
                barrier,
                checkpoint,
                dead,
            }) => {
                let sealed = SealedMeta {
                    id: *id,
                    first_byte_ms: *first_byte_ms,
                    barrier: *barrier,
                    checkpoint: *checkpoint,
                    dead,
                };
                self.seal_meta(file, &sealed)
            }
            None => Ok(None),
        };
        match outcome {
            Ok(sealed) => {
                // The event first: whoever waits for the seal must find the file in the push queue.
                if let Some(file) = &sealed {
                    let _ = self.events.send(StoreEvent::Sealed(Arc::clone(file)));
                }
                let mut state = self.keeper.state.lock();
                state.queue.pop_front();
                state.sealed += 1;
                if let Some(file) = &sealed {
                    state.journals.retain(|meta| meta.id != file.name.id);
                }
                drop(state);
                self.keeper.progress.notify_all();
            }
            Err(StoreError::NoSpace(why)) => {
                tracing::warn!(%why, "a datafile cannot be sealed yet");
                let _ = self.events.send(StoreEvent::SpaceWanted);
                let mut state = self.keeper.state.lock();
                self.keeper.changed.wait_for(&mut state, RETRY);
            }
            Err(error) => {
                self.fail(&error);
                let mut state = self.keeper.state.lock();
                // Nothing more can be sealed; the files stay `.open` and are verified at the next mount.
                state.queue.clear();
                state.stop = true;
                drop(state);
                self.keeper.progress.notify_all();
            }
        }
    }

    /// Contents durable, checksums durable, then the rename.
    fn seal_data(&self, open: &Arc<OpenData>) -> Result<Option<Arc<LocalFile>>, StoreError> {
        self.check_running()?;
        open.sync()
            .map_err(|source| match io_error("sync", &open.path, source) {
                // A failed fsync is never retried, whatever its reason.
                StoreError::NoSpace(why) => StoreError::Io {
                    step: "sync",
                    path: open.path.display().to_string(),
                    source: std::io::Error::other(why),
                },
                other => other,
            })?;
        let (bytes, sums) = {
            let sums = open.sums.lock();
            (sums.bytes(), sums.to_vec())
        };
        self.write_page_sums(open.id, bytes, &sums)?;
        let name = DatafileName {
            id: open.id,
            stream: Stream::Data,
            stage: Stage::Sealed,
        };
        self.rename_sealed(&open.path, name)?;
        let file = self.catalog.insert(LocalFile {
            name,
            bytes,
            first_byte_ms: open.first_byte_ms(),
            barrier: DatafileId(0),
            checkpoint: false,
            dead: Vec::new(),
            last_used: AtomicU64::new(0),
        });
        self.open_data.write().remove(&open.id);
        Ok(Some(file))
    }

    fn seal_meta(
        &self,
        file: &mut Datafile,
        meta: &SealedMeta<'_>,
    ) -> Result<Option<Arc<LocalFile>>, StoreError> {
        self.check_running()?;
        let path = file.path().to_owned();
        file.mark()
            .map_err(|error| datafile_error("seal", &path, error))?;
        let name = DatafileName {
            id: meta.id,
            stream: Stream::Meta,
            stage: Stage::Sealed,
        };
        self.rename_sealed(&path, name)?;
        Ok(Some(self.catalog.insert(LocalFile {
            name,
            bytes: file.len(),
            first_byte_ms: meta.first_byte_ms,
            barrier: meta.barrier,
            checkpoint: meta.checkpoint,
            dead: meta.dead.to_vec(),
            last_used: AtomicU64::new(0),
        })))
    }

    fn rename_sealed(&self, from: &std::path::Path, name: DatafileName) -> Result<(), StoreError> {
        let (to, dir) = (self.dir.datafile(name), self.dir.datafiles());
        self.media
            .rename(from, &to)
            .map_err(|source| io_error("rename", from, source))?;
        self.media
            .sync_dir(&dir)
            .map_err(|source| io_error("sync directory", &dir, source))
    }

    fn write_page_sums(&self, id: DatafileId, bytes: u64, sums: &[u32]) -> Result<(), StoreError> {
        super::open::write_page_sums(&self.media, &self.dir, id, bytes, sums)
    }

    /// Waits until everything that was closed before the call is sealed (or cannot be); false at the deadline.
    pub fn wait_sealed(&self, deadline: Instant) -> Result<bool, StoreError> {
        let mut state = self.keeper.state.lock();
        let wanted = state.queued;
        while state.sealed < wanted {
            if state.stop {
                drop(state);
                self.check_running()?;
                return Ok(false);
            }
            if self
                .keeper
                .progress
                .wait_until(&mut state, deadline)
                .timed_out()
            {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

struct SealedMeta<'a> {
    id: DatafileId,
    first_byte_ms: u64,
    barrier: DatafileId,
    checkpoint: bool,
    dead: &'a [DatafileId],
}

/// Writes the side file; an older try is replaced.
pub(super) fn write_side_file(
    media: &Arc<dyn qsfs_zdb::media::Media>,
    path: &std::path::Path,
    bytes: u64,
    sums: &[u32],
) -> std::io::Result<()> {
    if media.exists(path) {
        media.remove(path)?;
    }
    let file = media.open(path, OpenMode::CreateNew)?;
    file.write_all_at(&pages::encode(bytes, sums), 0)?;
    file.sync_data()
}
