//! What to do next, decided: verdicts, rebuilds and moves, deletions. Pure; the shell carries out and tells back as facts.
//!
//! ```text
//! replicated state --Touched--> Index (what is wrong with which record)
//! heartbeats, job reports ----> Facts        } plan(now) -> Plan { decisions, wake_at_ms, waiting_for }
//! ```
//!
//! Rebuild jobs are derived, never stored: a new leader builds its [`index::Index`] from the records and derives them again. A job
//! leaves its agent no choice; the compare-and-swap on the record makes a double rebuild harmless. Invariants:
//! - one job per record at a time, for every swap raises its version;
//! - no shard is ever sent to a backend that is not up, serving, and in session with this leader;
//! - a move happens only if it makes what the record survives strictly better (or empties a draining backend), so the
//!   campaign ends.

pub mod assess;
pub mod deletions;
pub mod facts;
pub mod index;
pub mod rebuild;
pub mod verdict;

#[cfg(test)]
mod tests;

use crate::state::State;
use crate::state::kv::{Kv, KvError};
use crate::state::tombstones::Place;
use facts::Facts;
use index::Index;
use qsfs_proto::api::{RebuildJob, Verdict};
use qsfs_zstor::id::{AgentId, BackendId, VolumeId};
use qsfs_zstor::record::EncodingRecord;

/// Named maxima of one plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rebuilds running in the cluster.
    pub rebuilds_max: usize,
    /// Rebuilds running towards one backend.
    pub rebuilds_per_backend: usize,
    /// Deletions under way per backend.
    pub deletions_per_backend: usize,
    /// Records looked at for work in one plan.
    pub examined_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            rebuilds_max: 16,
            rebuilds_per_backend: 4,
            deletions_per_backend: 32,
            examined_max: 4_096,
        }
    }
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Propose these verdicts.
    SetVerdicts(Vec<(BackendId, Verdict)>),
    /// Send a rebuild to the agent of its target.
    Rebuild {
        /// Agent.
        agent: AgentId,
        /// Job.
        job: Box<RebuildJob>,
    },
    /// Propose that these deletions be ordered.
    OrderDeletes(Vec<Place>),
    /// Send an ordered deletion.
    Delete {
        /// Agent.
        agent: AgentId,
        /// What.
        place: Place,
        /// The record it belonged to.
        record: Box<EncodingRecord>,
    },
    /// Propose to reap the next records of a deleted volume.
    ReapVolume(VolumeId),
}

/// The decisions, and when to think again if nothing happens before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// In order of urgency.
    pub decisions: Vec<Decision>,
    /// Leader time in ms of the next timer; `None`: only an event can change the plan.
    pub wake_at_ms: Option<u64>,
    /// Why re-silver does not go on, for people.
    pub waiting_for: Option<String>,
}

impl Plan {
    fn wake_at(&mut self, at_ms: u64) {
        self.wake_at_ms = Some(self.wake_at_ms.map_or(at_ms, |wake| wake.min(at_ms)));
    }
}

/// Decides. `index` must have seen every change of `state`.
pub fn plan<K: Kv>(
    state: &State<K>,
    index: &mut Index,
    facts: &Facts,
    now_ms: u64,
    limits: &Limits,
) -> Result<Plan, KvError> {
    let mut plan = Plan::default();
    verdict::plan(index, facts, now_ms, &mut plan);
    if !plan.decisions.is_empty() {
        // Everything else depends on these; the next plan follows as soon as they are applied.
        plan.waiting_for = rebuild::waiting_for(index, facts, now_ms);
        return Ok(plan);
    }
    rebuild::plan(state, index, facts, now_ms, limits, &mut plan)?;
    deletions::plan(state, index, facts, now_ms, limits, &mut plan)?;
    for volume in state.doomed_volumes()? {
        plan.decisions.push(Decision::ReapVolume(volume));
    }
    Ok(plan)
}
