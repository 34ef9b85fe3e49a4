//! The threads of a namespace: one commits; one, once large values come fast, syncs what the first has appended; one, while there is something to do, makes snapshots and compacts.

use super::commit::{Operation, Outcome};
use super::pipeline::Pipeline;
use super::queue::{Batch, Next, Queue, Turn};
use super::settings::NamespaceSettings;
use super::store::Store;
use super::{EngineError, SyncPolicy};
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Semaphore;

/// A smaller batch is appended in no time: its sync gains nothing from being done elsewhere. Where datafiles are small, so is what is large.
const PIPELINED_BYTES: u64 = 512 << 10;
const PIPELINED_PART: u64 = 16;
/// Threads of the runtime that may wait for disks.
static WAITING_HERE: Semaphore = Semaphore::const_new(4);
/// A namespace without writes for this long marks its datafile.
const IDLE_AFTER: Duration = Duration::from_millis(500);
/// Compaction rests this many times as long as it worked, so that the disk is mostly free for what is written meanwhile.
const REST_FACTOR: u32 = 3;
/// It never rests longer than this after one batch.
const REST_MAX: Duration = Duration::from_millis(500);
/// With less room than this many datafiles it does not rest at all.
const HURRY_DATAFILES: u64 = 4;

impl Shared {
    /// Keep the background away while the namespace changes as a whole. The namespace stays open while this is held.
    pub(super) fn exclusive(&self) -> Result<MutexGuard<'_, ()>, EngineError> {
        let guard = self.maintenance.interrupt();
        if self.is_closing() {
            return Err(EngineError::Closed);
        }
        Ok(guard)
    }
}

/// What the threads of a namespace share.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) store: Store,
    pub(super) settings: RwLock<NamespaceSettings>,
    pub(super) queue: Queue,
    pub(super) pipeline: Pipeline,
    pub(super) closing: AtomicBool,
    pub(super) compaction: bool,
    pub(super) compaction_turn: Arc<Mutex<()>>,
    /// Held while datafiles other than the active one change.
    pub(super) maintenance: Maintenance,
}

/// Who may touch complete datafiles: the background thread, or whoever interrupts it.
#[derive(Default)]
pub(super) struct Maintenance {
    running: AtomicBool,
    interrupts: AtomicU32,
    exclusive: Mutex<()>,
    resting: Mutex<()>,
    wake: Condvar,
}

impl Maintenance {
    /// Let the background give way, and keep it out until the guard is dropped.
    pub(super) fn interrupt(&self) -> MutexGuard<'_, ()> {
        self.interrupts.fetch_add(1, Ordering::AcqRel);
        self.wake();
        let guard = self.exclusive.lock();
        self.interrupts.fetch_sub(1, Ordering::AcqRel);
        guard
    }

    /// Rest, unless somebody waits.
    fn rest(&self, time: Duration, go_on: &dyn Fn() -> bool) {
        let until = Instant::now() + time;
        let mut resting = self.resting.lock();
        while go_on() && !self.wake.wait_until(&mut resting, until).timed_out() {}
    }

    pub(super) fn wake(&self) {
        // Whoever is about to rest holds this from looking whether it may until it rests.
        drop(self.resting.lock());
        self.wake.notify_all();
    }
}

/// What the commit thread knows of the sync thread.
#[derive(Default)]
struct Syncer {
    /// Started when it is first needed.
    thread: Option<JoinHandle<()>>,
    /// Others came while the last batch was under way.
    company: bool,
}

impl Syncer {
    /// Is there a thread, now at the latest? Without one every batch is synced before the next is appended.
    fn runs(&mut self, shared: &Arc<Shared>) -> bool {
        if self.thread.is_none() {
            let syncing = Arc::clone(shared);
            let started = std::thread::Builder::new()
                .name("zdb-sync".to_owned())
                .spawn(move || syncing.sync_loop());
            match started {
                Ok(thread) => self.thread = Some(thread),
                Err(error) => tracing::warn!(%error, "cannot start a thread that syncs"),
            }
        }
        self.thread.is_some()
    }
}

fn unix_seconds() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| {
        u32::try_from(since.as_secs()).unwrap_or(u32::MAX)
    })
}

impl Shared {
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    pub(super) fn commit_loop(self: Arc<Self>) {
        let interval = match self.store.sync {
            SyncPolicy::Always => None,
            SyncPolicy::Interval(interval) => Some(interval),
        };
        // Since when something is not synced; when to mark an idle datafile.
        let mut sync_at: Option<Instant> = None;
        let mut idle_at = Some(Instant::now() + IDLE_AFTER);
        let mut syncer = Syncer::default();
        loop {
            match self.queue.next(sync_at.or(idle_at)) {
                Next::Closed => break,
                Next::Batch(batch, turn) => {
                    self.commit(batch, turn, &mut syncer);
                    let now = Instant::now();
                    sync_at = sync_at.or(interval.map(|interval| now + interval));
                    idle_at = Some(now + IDLE_AFTER);
                }
                Next::TimedOut if sync_at.is_none() => {
                    let last = self.queue.last_commit().map(|last| last + IDLE_AFTER);
                    idle_at = last.filter(|due| *due > Instant::now());
                    if idle_at.is_none() {
                        self.store.idle();
                    }
                }
                Next::TimedOut => {}
                Next::Elsewhere => idle_at = Some(Instant::now() + IDLE_AFTER),
            }
            if sync_at.is_some_and(|due| due <= Instant::now()) {
                sync_at = None;
                // A failure stops the namespace; the next SET says so.
                if let Err(error) = self.store.sync_active() {
                    tracing::error!(dir = %self.store.dir.display(), %error, "cannot sync");
                }
            }
        }
        self.pipeline.close();
        if let Some(thread) = syncer.thread.take() {
            let _ = thread.join();
        }
    }

    /// Carry out a batch, or hand it to the sync thread once it is appended.
    fn commit(self: &Arc<Self>, batch: Batch, mut turn: Turn<'_>, syncer: &mut Syncer) {
        let settings = self.settings.read().clone();
        let mut staged = self
            .store
            .stage(&batch.operations, &settings, unix_seconds());
        let behind = self.pipeline.is_busy();
        // While a client that is alone waits for its answer nothing else could be appended.
        let least = PIPELINED_BYTES.min(self.store.datafile_bytes / PIPELINED_PART);
        let large = staged.needs_sync() && staged.bytes() as u64 >= least;
        let company = syncer.company || !self.queue.is_empty();
        if behind || (large && company && syncer.runs(self)) {
            syncer.company = behind || !self.queue.is_empty();
            turn.has_company();
            self.store.stage_behind(&staged);
            self.pipeline.push(batch, staged);
            return;
        }
        self.store.settle(std::iter::once(&mut staged));
        syncer.company = !self.queue.is_empty();
        drop(turn);
        batch.answer(staged.into_outcomes());
        self.start_maintenance();
    }

    /// Carry an operation out on this thread, which then waits for the disk, if its client has been the only one for a while: two threads
    /// fewer must wake before it has its answer. Only where the other tasks of this thread are taken over by another one.
    pub(super) fn commit_here(self: &Arc<Self>, operation: &Operation) -> Option<Outcome> {
        if !self.queue.has_one() {
            return None;
        }
        let runtime = Handle::try_current().ok()?;
        if self.store.sync != SyncPolicy::Always
            || runtime.runtime_flavor() != RuntimeFlavor::MultiThread
        {
            return None;
        }
        let _place = WAITING_HERE.try_acquire().ok()?;
        let turn = self.queue.turn_of_one()?;
        // What was appended before must be settled before.
        if self.pipeline.is_busy() {
            return None;
        }
        let settings = self.settings.read().clone();
        let operations = std::slice::from_ref(operation);
        let staged = tokio::task::block_in_place(|| {
            let mut staged = self.store.stage(operations, &settings, unix_seconds());
            self.store.settle(std::iter::once(&mut staged));
            staged
        });
        drop(turn);
        self.start_maintenance();
        staged.into_outcomes().pop()
    }

    fn sync_loop(self: &Arc<Self>) {
        while let Some(mut taken) = self.pipeline.take() {
            self.store
                .settle(taken.iter_mut().map(|(_, staged)| staged));
            let batches = taken.len();
            let bytes = taken.iter().map(|(_, staged)| staged.bytes()).sum();
            for (batch, staged) in taken {
                batch.answer(staged.into_outcomes());
            }
            self.pipeline.done(batches, bytes);
            self.start_maintenance();
        }
    }

    /// Start the background thread if there is work and none is running.
    pub(super) fn start_maintenance(self: &Arc<Self>) {
        if !self.compaction
            || self.is_closing()
            || self.maintenance.running.load(Ordering::Acquire)
            || !self.has_work()
            || self.maintenance.running.swap(true, Ordering::AcqRel)
        {
            return;
        }
        let shared = Arc::clone(self);
        let started = std::thread::Builder::new()
            .name("zdb-compact".to_owned())
            .spawn(move || shared.maintain());
        if let Err(error) = started {
            tracing::warn!(%error, "cannot start a compaction");
            self.maintenance.running.store(false, Ordering::Release);
        }
    }

    fn has_work(&self) -> bool {
        self.store.compaction_victim().is_some() || self.store.lacks_snapshots()
    }

    fn maintain(&self) {
        while !self.is_closing() {
            let turn = self.compaction_turn.lock();
            match self.step(true) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(dir = %self.store.dir.display(), %error, "compaction failed; it is tried again after the next writes");
                    break;
                }
            }
            drop(turn);
        }
        self.maintenance.running.store(false, Ordering::Release);
    }

    /// Make the snapshots that are due, then compact one datafile; `false` if nothing is left to do.
    pub(super) fn step(&self, paced: bool) -> Result<bool, EngineError> {
        let exclusive = self.maintenance.exclusive.lock();
        // After closing the directory belongs to its next owner.
        if self.is_closing() {
            return Ok(false);
        }
        let interrupted = || self.maintenance.interrupts.load(Ordering::Acquire) > 0;
        let go_on = || !self.is_closing() && !interrupted();
        let pace = |worked: Duration| {
            if paced && go_on() && !self.store.is_short_of_room(HURRY_DATAFILES) {
                let rest = worked.saturating_mul(REST_FACTOR).min(REST_MAX);
                self.maintenance.rest(rest, &go_on);
            }
            go_on()
        };
        self.store.write_snapshots(&pace);
        let more = self.store.compact_step(&pace)?;
        drop(exclusive);
        Ok(more || (interrupted() && !self.is_closing()))
    }
}
