//! The threads of a namespace: one commits; one, while there is something to do, makes snapshots and compacts.

use super::queue::{Next, Queue};
use super::settings::NamespaceSettings;
use super::store::Store;
use super::{EngineError, SyncPolicy};
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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
        loop {
            match self.queue.next(sync_at.or(idle_at)) {
                Next::Closed => break,
                Next::Batch(batch) => {
                    let settings = self.settings.read().clone();
                    let outcomes = self
                        .store
                        .commit(&batch.operations, &settings, unix_seconds());
                    batch.answer(outcomes);
                    let now = Instant::now();
                    sync_at = sync_at.or(interval.map(|interval| now + interval));
                    idle_at = Some(now + IDLE_AFTER);
                    self.start_maintenance();
                }
                Next::TimedOut if sync_at.is_none() => {
                    idle_at = None;
                    self.store.idle();
                }
                Next::TimedOut => {}
            }
            if sync_at.is_some_and(|due| due <= Instant::now()) {
                sync_at = None;
                // A failure stops the namespace; the next SET says so.
                if let Err(error) = self.store.sync_active() {
                    tracing::error!(dir = %self.store.dir.display(), %error, "cannot sync");
                }
            }
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
        self.store.write_snapshots(&go_on);
        let pace = |worked: Duration| {
            if paced && go_on() && !self.store.is_short_of_room(HURRY_DATAFILES) {
                let rest = worked.saturating_mul(REST_FACTOR).min(REST_MAX);
                self.maintenance.rest(rest, &go_on);
            }
            go_on()
        };
        let more = self.store.compact_step(&pace)?;
        drop(exclusive);
        Ok(more || (interrupted() && !self.is_closing()))
    }
}
