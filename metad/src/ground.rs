//! What a node stands on: its disk, the store under its rows, its clock, and where it does what blocks. A daemon stands on
//! [`Ground::real`]; a simulation gives its own of each.

use crate::log::segments::Amount;
use crate::machine::rows::Rows;
use crate::machine::sled_kv::SledStores;
use crate::node::facts::FEATURE_LEVEL;
use crate::raft::{LogEntry, LogId};
use crate::state::command::{Command, Entry};
use crate::state::kv::{Batch, KvError, Pair};
use crate::state::{self, Outcome, State};
use futures::future::BoxFuture;
use openraft::EntryPayload;
use qsfs_zdb::media::{DiskMedia, Media};
use std::fmt::Debug;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// All of it.
#[derive(Debug, Clone)]
pub struct Ground {
    /// The disk: log, vote, marks, snapshots.
    pub media: Arc<dyn Media>,
    /// What lies below the rows.
    pub stores: Arc<dyn Stores>,
    /// Where blocking work is done.
    pub work: Arc<dyn Work>,
    /// Time of day.
    pub clock: Arc<dyn WallClock>,
    /// What applies an entry.
    pub applier: Arc<dyn Applier>,
    /// Sizes at which something happens.
    pub sizes: Sizes,
    /// Which commands are known.
    pub program: Program,
}

impl Ground {
    /// The machine's.
    pub fn real() -> Self {
        Self {
            media: Arc::new(DiskMedia),
            stores: Arc::new(SledStores),
            work: Arc::new(Threads),
            clock: Arc::new(SystemClock),
            applier: Arc::new(Apply),
            sizes: Sizes::default(),
            program: Program::default(),
        }
    }
}

/// Which commands a program knows, by their level. There is one ([`Program::default`]); tests have older ones and newer ones.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// The highest level that it knows.
    pub level: u32,
    /// The level of a command.
    pub level_of: fn(&Command) -> u32,
}

impl Default for Program {
    fn default() -> Self {
        Self {
            level: FEATURE_LEVEL,
            level_of: Command::feature_level,
        }
    }
}

impl Program {
    /// What it says of an entry that it does not know.
    ///
    /// # Errors
    /// The text, for people.
    pub fn check(&self, entry: &LogEntry) -> Result<(), String> {
        let EntryPayload::Normal(proposal) = &entry.payload else {
            return Ok(());
        };
        let one = |command: &Command| {
            let level = (self.level_of)(command);
            if level <= self.level {
                return Ok(());
            }
            let index = entry.log_id.index;
            Err(unknown_entry(&format!(
                "entry {index} is of feature level {level}, this program knows {}",
                self.level
            )))
        };
        match &proposal.command {
            Command::Group(parts) => parts.iter().try_for_each(|part| one(&part.command)),
            command => one(command),
        }
    }
}

/// What is said of an entry that a newer program wrote.
pub fn unknown_entry(what: &str) -> String {
    format!(
        "an entry that this program does not know ({what}): start the newer program that wrote it; nothing is given up"
    )
}

/// Sizes at which something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes at which a new segment of the log is begun.
    pub segment_bytes: u64,
    /// Cost of the log ([`crate::node::bounding`]) at which a snapshot is taken, as long as snapshots are small.
    pub snapshot_cost_min: u64,
    /// The same, however large snapshots are.
    pub snapshot_cost_max: u64,
    /// What is kept of the log that is in a snapshot, for followers that are a little late.
    pub kept: Amount,
    /// How much of the log is applied at once by one that hears from a leader: it is in memory meanwhile.
    pub applied_at_once: Amount,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            segment_bytes: crate::log::segments::SEGMENT_BYTES,
            snapshot_cost_min: 64 << 20,
            snapshot_cost_max: 512 << 20,
            kept: Amount {
                entries: 2_000,
                bytes: 16 << 20,
            },
            applied_at_once: Amount {
                entries: 16_384,
                bytes: 8 << 20,
            },
        }
    }
}

/// One piece of work that may wait for a disk.
pub type Job = Box<dyn FnOnce() + Send>;

/// The work was begun and did not end: its thread panicked or the node is stopping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("blocking work did not end")]
pub struct WorkLost;

/// Where blocking work is done.
pub trait Work: Debug + Send + Sync {
    /// Does it aside; the future ends when it is done.
    fn run(&self, job: Job) -> BoxFuture<'static, Result<(), WorkLost>>;

    /// May a thread of one's own be started? If not, everything goes through [`Self::run`].
    fn has_threads(&self) -> bool;
}

/// Does work aside and brings back what it answers.
pub(crate) async fn blocking<T: Send + 'static>(
    work: &Arc<dyn Work>,
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<T, WorkLost> {
    let (answer, wait) = tokio::sync::oneshot::channel();
    let done = work.run(Box::new(move || {
        // Who does not wait any more does not want it.
        drop(answer.send(job()));
    }));
    done.await?;
    wait.await.map_err(|_| WorkLost)
}

/// tokio's threads for blocking work.
#[derive(Debug, Clone, Copy)]
pub struct Threads;

impl Work for Threads {
    fn run(&self, job: Job) -> BoxFuture<'static, Result<(), WorkLost>> {
        let running = tokio::task::spawn_blocking(job);
        Box::pin(async move { running.await.map_err(|_| WorkLost) })
    }

    fn has_threads(&self) -> bool {
        true
    }
}

/// Time of day, which may jump.
pub trait WallClock: Debug + Send + Sync {
    /// ms since the epoch.
    fn now_ms(&self) -> u64;
}

/// The operating system's.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock;

impl WallClock for SystemClock {
    fn now_ms(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
    }
}

/// What applies an entry. There is one ([`Apply`]); a simulation watches it, or breaks it to see whether its checkers notice.
pub trait Applier: Debug + Send + Sync {
    /// [`state::apply`], of the entry with this id.
    fn apply(
        &self,
        id: &LogId,
        state: &mut State<&Rows>,
        entry: &Entry,
    ) -> Result<Outcome, KvError>;
}

/// [`state::apply`].
#[derive(Debug, Clone, Copy)]
pub struct Apply;

impl Applier for Apply {
    fn apply(
        &self,
        _: &LogId,
        state: &mut State<&Rows>,
        entry: &Entry,
    ) -> Result<Outcome, KvError> {
        state::apply(state, entry)
    }
}

/// An ordered store of rows on disk. Durable when flushed; a crash may take back what was written since, but never part of a batch.
pub trait Store: Debug + Send + Sync {
    /// One value.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError>;

    /// At most `max` pairs of `[from, until)` in key order.
    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError>;

    /// Writes a batch atomically.
    fn write(&self, batch: &Batch) -> Result<(), KvError>;

    /// Makes everything written durable.
    fn flush(&self) -> Result<(), KvError>;

    /// Reads everything.
    fn verify(&self) -> Result<(), KvError>;
}

/// Stores by directory.
pub trait Stores: Debug + Send + Sync {
    /// Opens or creates.
    fn open(&self, dir: &Path) -> Result<Arc<dyn Store>, KvError>;

    /// Is there one?
    fn exists(&self, dir: &Path) -> bool;

    /// Removes it with everything in it.
    fn remove(&self, dir: &Path) -> io::Result<()>;

    /// Moves it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Names of the stores in a directory.
    fn list(&self, parent: &Path) -> io::Result<Vec<String>>;
}
