//! Soft facts: what the leader alone knows, and a new leader learns anew. Heartbeats, running jobs, failures, rates.

use crate::state::tombstones::Place;
use qsfs_proto::api::BackendFacts;
use qsfs_zstor::id::{AgentId, BackendId};
use std::collections::BTreeMap;

/// A job without news for so long is given up and planned again.
pub const JOB_DEADLINE_MS: u64 = 10 * 60_000;

/// A deletion without news for so long is ordered again.
pub const DELETION_DEADLINE_MS: u64 = 60_000;

/// First and longest pause after a failed rebuild of a record.
pub const RETRY_MS: (u64, u64) = (500, 60_000);

pub use crate::state::record_set::RecordName;

/// A rebuild under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunningJob {
    /// Shard.
    pub shard: u32,
    /// Target.
    pub to: BackendId,
    /// Agent at work.
    pub agent: AgentId,
    /// When it was sent.
    pub since_ms: u64,
}

/// A rebuild that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedJob {
    /// Times in a row.
    pub attempts: u32,
    /// Not before.
    pub retry_ms: u64,
    /// What the agent said.
    pub error: String,
}

/// An agent's session with this leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgentSession {
    /// Last heartbeat.
    pub heard_ms: u64,
    /// Its stream is open.
    pub connected: bool,
}

/// Everything soft.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// When this leader began to listen: silence counts from here at the earliest.
    pub leader_since_ms: u64,
    /// Sessions.
    pub agents: BTreeMap<AgentId, AgentSession>,
    /// Newest report of each backend.
    pub backends: BTreeMap<BackendId, BackendFacts>,
    /// Rebuilds under way.
    pub running: BTreeMap<RecordName, RunningJob>,
    /// Rebuilds that failed.
    pub failed: BTreeMap<RecordName, FailedJob>,
    /// Deletions under way, since when.
    pub deleting: BTreeMap<Place, u64>,
}

impl Facts {
    /// When the agent was last heard by this leader; never before the leader began.
    pub fn heard_ms(&self, agent: AgentId) -> u64 {
        let heard = self
            .agents
            .get(&agent)
            .map_or(0, |session| session.heard_ms);
        heard.max(self.leader_since_ms)
    }

    /// The agent can be sent orders.
    pub fn connected(&self, agent: AgentId) -> bool {
        self.agents
            .get(&agent)
            .is_some_and(|session| session.connected)
    }

    /// A new session: what its predecessor was at is unknown, so it is planned again.
    pub fn session_began(&mut self, agent: AgentId, now_ms: u64) {
        self.drop_orders(agent);
        let heard_ms = self
            .agents
            .get(&agent)
            .map_or(0, |session| session.heard_ms);
        let session = AgentSession {
            heard_ms: heard_ms.min(now_ms),
            connected: true,
        };
        self.agents.insert(agent, session);
    }

    /// Its stream closed.
    pub fn session_ended(&mut self, agent: AgentId) {
        self.drop_orders(agent);
        if let Some(session) = self.agents.get_mut(&agent) {
            session.connected = false;
        }
    }

    fn drop_orders(&mut self, agent: AgentId) {
        self.running.retain(|_, job| job.agent != agent);
    }

    /// A heartbeat. True: something a plan depends on changed.
    pub fn heartbeat(&mut self, agent: AgentId, facts: Vec<BackendFacts>, now_ms: u64) -> bool {
        let mut changed = self
            .agents
            .get(&agent)
            .is_none_or(|session| session.heard_ms == 0 || !session.connected);
        let session = AgentSession {
            heard_ms: now_ms,
            connected: true,
        };
        self.agents.insert(agent, session);
        for new in facts {
            let old = self.backends.get(&new.backend);
            changed |= old.is_none_or(|old| old.healthy != new.healthy);
            self.backends.insert(new.backend, new);
        }
        changed
    }

    /// A rebuild ended.
    pub fn rebuild_done(&mut self, record: RecordName, error: Option<String>, now_ms: u64) {
        self.running.remove(&record);
        let Some(error) = error else {
            self.failed.remove(&record);
            return;
        };
        let attempts = self.failed.get(&record).map_or(0, |failed| failed.attempts) + 1;
        let pause_ms = RETRY_MS.0 << attempts.saturating_sub(1).min(16);
        let failed = FailedJob {
            attempts,
            retry_ms: now_ms + pause_ms.min(RETRY_MS.1),
            error,
        };
        self.failed.insert(record, failed);
    }

    /// Gives up what is overdue; true if anything was.
    pub fn expire(&mut self, now_ms: u64) -> bool {
        let before = (self.running.len(), self.deleting.len());
        self.running
            .retain(|_, job| now_ms < job.since_ms + JOB_DEADLINE_MS);
        self.deleting
            .retain(|_, since_ms| now_ms < *since_ms + DELETION_DEADLINE_MS);
        before != (self.running.len(), self.deleting.len())
    }
}
