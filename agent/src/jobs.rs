//! Which rebuilds and deletions run now: the queue of metad's orders, as a pure core.
//!
//! ```text
//! Ordered ──▶ queue (FIFO, one entry per shard and kind) ──Start──▶ running ──Ended──▶ Answer
//! ```
//!
//! Invariants: jobs of one shard never run at the same time (a deletion could otherwise race with the rebuild that
//! puts the same keys there); what is running fits the limits, or runs alone; the newest order about a shard wins; an
//! order that is repeated (by a new leader, say) is not done twice at once. Nothing here is persistent: jobs are
//! derived again by metad, and every job looks at the record afresh before it changes anything.

use qsfs_proto::api::{AgentReport, RebuildJob};
use qsfs_zstor::id::{BackendId, DatafileId, Salt, VolumeId};
use qsfs_zstor::record::EncodingRecord;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Most orders that wait; more are refused, and metad derives them again.
pub const QUEUE_MAX: usize = 65_536;
/// Rows (one piece of every shard) a rebuild has in flight at most.
pub const WINDOW_ROWS_MAX: u32 = 8;

/// What may run at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rebuilds.
    pub rebuilds_max: usize,
    /// Deletions.
    pub deletions_max: usize,
    /// Bytes of pieces all running rebuilds may hold in memory.
    pub bytes_max: u64,
    /// Of them, for one rebuild, unless a single row needs more.
    pub job_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            rebuilds_max: 4,
            deletions_max: 4,
            bytes_max: 64 << 20,
            job_bytes_max: 24 << 20,
        }
    }
}

/// One shard of one encoding attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardKey {
    /// Volume.
    pub volume: VolumeId,
    /// Datafile.
    pub datafile: DatafileId,
    /// Salt of the attempt.
    pub salt: Salt,
    /// Index of the shard.
    pub shard: u32,
}

impl ShardKey {
    /// The key of a record's shard.
    pub fn of(record: &EncodingRecord, shard: u32) -> Self {
        Self {
            volume: record.volume,
            datafile: record.datafile,
            salt: record.salt,
            shard,
        }
    }
}

/// One order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Job {
    /// Make a shard.
    Rebuild(RebuildJob),
    /// Delete a shard's pieces.
    Delete {
        /// Where.
        backend: BackendId,
        /// Record the shard belonged to.
        record: EncodingRecord,
        /// Index of the shard.
        shard: u32,
    },
}

impl Job {
    /// The shard it is about.
    pub fn key(&self) -> ShardKey {
        match self {
            Self::Rebuild(job) => ShardKey::of(&job.record, job.shard),
            Self::Delete { record, shard, .. } => ShardKey::of(record, *shard),
        }
    }

    /// The backend it changes.
    pub fn backend(&self) -> BackendId {
        match self {
            Self::Rebuild(job) => job.to,
            Self::Delete { backend, .. } => *backend,
        }
    }

    fn is_rebuild(&self) -> bool {
        matches!(self, Self::Rebuild(_))
    }

    fn same_order(&self, other: &Self) -> bool {
        self.is_rebuild() == other.is_rebuild()
            && self.key() == other.key()
            && self.backend() == other.backend()
    }

    /// Bytes of one row: a piece of `k` shards and the piece that is made.
    fn row_bytes(&self) -> u64 {
        match self {
            Self::Rebuild(job) => {
                let piece = u64::from(job.record.piece_bytes).min(job.record.shard_bytes.max(1));
                (job.record.geometry.data() as u64 + 1) * piece
            }
            Self::Delete { .. } => 0,
        }
    }
}

/// Names one run of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The shard is stored and the swap accepted.
    Rebuilt {
        /// Bytes stored.
        bytes: u64,
    },
    /// The pieces are gone.
    Deleted,
    /// It failed; the text says why.
    Failed {
        /// For people.
        error: String,
    },
    /// It was cancelled: nobody waits for an answer.
    Cancelled,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// metad wants something.
    Ordered(Job),
    /// A run ended.
    Ended {
        /// Which.
        ticket: Ticket,
        /// How.
        outcome: Outcome,
    },
    /// The leader is gone: what waits will be derived again by the next one.
    SessionLost,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Run a job.
    Start {
        /// Its run.
        ticket: Ticket,
        /// The job.
        job: Job,
        /// Rows it may have in flight.
        window_rows: u32,
    },
    /// Stop a run soon; it still ends with [`Event::Ended`].
    Cancel {
        /// Which.
        ticket: Ticket,
    },
    /// Tell metad.
    Answer(AgentReport),
}

#[derive(Debug)]
struct Running {
    job: Job,
    bytes: u64,
    cancelled: bool,
}

/// The queue.
#[derive(Debug)]
pub struct JobQueue {
    limits: Limits,
    waiting: VecDeque<Job>,
    running: BTreeMap<Ticket, Running>,
    next_ticket: u64,
}

impl JobQueue {
    /// An empty queue.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: VecDeque::new(),
            running: BTreeMap::new(),
            next_ticket: 0,
        }
    }

    /// Jobs that wait and jobs that run.
    pub fn len(&self) -> (usize, usize) {
        (self.waiting.len(), self.running.len())
    }

    /// Takes in what happened and says what to do.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Ordered(job) => self.ordered(job, &mut actions),
            Event::Ended { ticket, outcome } => self.ended(ticket, outcome, &mut actions),
            Event::SessionLost => self.waiting.clear(),
        }
        self.start_what_fits(&mut actions);
        actions
    }

    fn ordered(&mut self, job: Job, actions: &mut Vec<Action>) {
        let key = job.key();
        let repeated = self
            .running
            .values()
            .any(|running| !running.cancelled && running.job.same_order(&job));
        if repeated {
            self.waiting.retain(|waiting| waiting.key() != key);
            return;
        }
        for (ticket, running) in &mut self.running {
            let overtaken = running.job.key() == key
                && (job.is_rebuild() && running.job.is_rebuild()
                    || running.job.backend() == job.backend());
            if overtaken && !running.cancelled {
                running.cancelled = true;
                actions.push(Action::Cancel { ticket: *ticket });
            }
        }
        if let Some(waiting) = self
            .waiting
            .iter_mut()
            .find(|waiting| waiting.same_order(&job))
        {
            *waiting = job;
            return;
        }
        self.waiting.retain(|waiting| {
            waiting.key() != key
                || !(job.is_rebuild() && waiting.is_rebuild() || waiting.backend() == job.backend())
        });
        if self.waiting.len() >= QUEUE_MAX {
            if let Job::Rebuild(job) = &job {
                let error = format!("{QUEUE_MAX} orders wait already");
                actions.push(Action::Answer(rebuild_done(job, 0, Some(error))));
            }
            return;
        }
        self.waiting.push_back(job);
    }

    fn ended(&mut self, ticket: Ticket, outcome: Outcome, actions: &mut Vec<Action>) {
        let running = self
            .running
            .remove(&ticket)
            .expect("only what was started ends, and once");
        let answer = match (running.job, outcome) {
            (_, Outcome::Cancelled) => None,
            (Job::Rebuild(job), Outcome::Rebuilt { bytes }) => {
                Some(rebuild_done(&job, bytes, None))
            }
            (Job::Rebuild(_), Outcome::Failed { .. }) if running.cancelled => None,
            (Job::Rebuild(job), Outcome::Failed { error }) => {
                Some(rebuild_done(&job, 0, Some(error)))
            }
            (
                Job::Delete {
                    backend,
                    record,
                    shard,
                },
                Outcome::Deleted,
            ) => Some(AgentReport::ShardDeleted {
                backend,
                volume: record.volume,
                datafile: record.datafile,
                salt: record.salt,
                shard,
            }),
            // metad repeats the order until it is told that the pieces are gone.
            (Job::Delete { .. }, Outcome::Failed { .. }) => None,
            (job, outcome) => unreachable!("{job:?} cannot end as {outcome:?}"),
        };
        actions.extend(answer.map(Action::Answer));
    }

    fn start_what_fits(&mut self, actions: &mut Vec<Action>) {
        let mut busy: BTreeSet<ShardKey> = self
            .running
            .values()
            .map(|running| running.job.key())
            .collect();
        let mut rebuilds = self
            .running
            .values()
            .filter(|running| running.job.is_rebuild())
            .count();
        let mut deletions = self.running.len() - rebuilds;
        let mut bytes: u64 = self.running.values().map(|running| running.bytes).sum();
        let mut rebuild_blocked = false;
        let mut index = 0;
        while let Some(job) = self.waiting.get(index) {
            if rebuilds >= self.limits.rebuilds_max && deletions >= self.limits.deletions_max {
                break;
            }
            let (window_rows, job_bytes) = self.window(job);
            let fits = if job.is_rebuild() {
                let room = rebuilds == 0 || bytes + job_bytes <= self.limits.bytes_max;
                // A large rebuild is not overtaken by small ones, or it would never run.
                let fits = !rebuild_blocked && rebuilds < self.limits.rebuilds_max && room;
                rebuild_blocked |= !fits && !busy.contains(&job.key());
                fits
            } else {
                deletions < self.limits.deletions_max
            };
            // A second order about a shard waits for the first, also for one that waits itself.
            let free = busy.insert(job.key());
            if !(fits && free) {
                index += 1;
                continue;
            }
            let job = self.waiting.remove(index).expect("index is in range");
            if job.is_rebuild() {
                rebuilds += 1;
            } else {
                deletions += 1;
            }
            bytes += job_bytes;
            let ticket = Ticket(self.next_ticket);
            self.next_ticket += 1;
            let running = Running {
                job: job.clone(),
                bytes: job_bytes,
                cancelled: false,
            };
            self.running.insert(ticket, running);
            actions.push(Action::Start {
                ticket,
                job,
                window_rows,
            });
        }
    }

    fn window(&self, job: &Job) -> (u32, u64) {
        let row = job.row_bytes().max(1);
        let rows = (self.limits.job_bytes_max / row).clamp(1, u64::from(WINDOW_ROWS_MAX));
        let rows = u32::try_from(rows).expect("at most WINDOW_ROWS_MAX");
        (rows, job.row_bytes() * u64::from(rows))
    }
}

fn rebuild_done(job: &RebuildJob, bytes: u64, error: Option<String>) -> AgentReport {
    AgentReport::RebuildDone {
        volume: job.record.volume,
        datafile: job.record.datafile,
        shard: job.shard,
        bytes,
        error,
    }
}

#[cfg(test)]
mod tests;
