//! The leader's memory: facts, the planner's index, agent sessions, writers' reports. Nothing of it is replicated; a new leader
//! learns it anew within a heartbeat.

use super::leases::{Holders, Refused};
use crate::plan::Plan;
use crate::plan::facts::Facts;
use crate::plan::index::Index;
use parking_lot::Mutex;
use qsfs_proto::api::{AgentOrder, ClientReport};
use qsfs_zstor::id::{AgentId, Epoch, VolumeId};
use std::collections::{BTreeMap, VecDeque};
use tokio::sync::{Notify, mpsc};

/// Rebuild rates are taken over so long.
pub const RATE_WINDOW_MS: u64 = 10_000;

/// Finished rebuilds remembered for the rate.
const RATE_SAMPLES_MAX: usize = 4_096;

/// The way to one agent.
#[derive(Debug)]
pub struct SessionHandle {
    /// Tells a newer session of the same agent from this one.
    pub serial: u64,
    /// Orders.
    pub orders: mpsc::Sender<AgentOrder>,
}

/// What a writer said last.
#[derive(Debug, Clone)]
pub struct WriterReport {
    /// Its words.
    pub report: ClientReport,
    /// Under which epoch.
    pub epoch: Epoch,
    /// When.
    pub at_ms: u64,
}

/// What a leader knows during its term.
#[derive(Debug, Default)]
pub struct Term {
    /// Heartbeats, jobs, failures.
    pub facts: Facts,
    /// What is wrong with which record.
    pub index: Index,
    /// Agents in session.
    pub sessions: BTreeMap<AgentId, SessionHandle>,
    /// Writers' reports.
    pub writers: BTreeMap<VolumeId, WriterReport>,
    /// When those who hold leases were heard.
    pub holders: Holders,
    /// To whom a lease was not given.
    pub refused: Refused,
    /// The newest plan.
    pub plan: Plan,
    finished: VecDeque<(u64, u64)>,
    serial: u64,
}

impl Term {
    /// A term that begins now.
    pub fn new(index: Index, now_ms: u64) -> Self {
        let facts = Facts {
            leader_since_ms: now_ms,
            ..Facts::default()
        };
        Self {
            facts,
            index,
            ..Self::default()
        }
    }

    /// A rebuild stored so many bytes.
    pub fn finished(&mut self, bytes: u64, now_ms: u64) {
        self.finished.push_back((now_ms, bytes));
        if self.finished.len() > RATE_SAMPLES_MAX {
            self.finished.pop_front();
        }
    }

    /// Bytes per second and mean bytes per shard, lately.
    pub fn rate(&self, now_ms: u64) -> (u64, u64) {
        let since = now_ms.saturating_sub(RATE_WINDOW_MS);
        let recent: Vec<_> = self
            .finished
            .iter()
            .filter(|(at, _)| *at >= since)
            .collect();
        let bytes: u64 = recent.iter().map(|(_, bytes)| bytes).sum();
        let count = recent.len() as u64;
        (
            bytes * 1_000 / RATE_WINDOW_MS,
            bytes.checked_div(count).unwrap_or(0),
        )
    }

    /// A number for a new session.
    pub fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }
}

/// Shared by the service, the sessions and the leader loop.
#[derive(Debug, Default)]
pub struct Soft {
    term: Mutex<Option<Term>>,
    wake: Notify,
}

impl Soft {
    /// Begins a term.
    pub fn begin_term(&self, term: Term) {
        *self.term.lock() = Some(term);
        self.wake.notify_one();
    }

    /// Ends it: sessions close, as their senders are dropped.
    pub fn end_term(&self) {
        self.term.lock().take();
    }

    /// Works on the term, if this node leads.
    pub fn with<T>(&self, work: impl FnOnce(&mut Term) -> T) -> Option<T> {
        self.term.lock().as_mut().map(work)
    }

    /// Asks the leader loop to plan.
    pub fn replan(&self) {
        self.wake.notify_one();
    }

    /// Waits for [`Self::replan`].
    pub async fn woken(&self) {
        self.wake.notified().await;
    }
}
