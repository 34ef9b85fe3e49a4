//! Proposals and linearizable reads.
//!
//! A read needs one round of heartbeats to know that this node still leads. Readers that arrive while a round is under way
//! share the next one, so a thousand readers cost two rounds. Proposals are grouped in the same way (`consensus/proposer.rs`).

mod proposer;
mod returning;

use super::clock::Clock;
use super::facts::check_level;
use crate::ground::WallClock;
use crate::machine::Machine;
use crate::raft::Raft;
use crate::state::command::{Command, Entry, Reply, Request};
use crate::state::kv::KvError;
use openraft::error::{CheckIsLeaderError, RaftError};
use proposer::Proposer;
use qsfs_proto::api::MetadError;
use qsfs_proto::server::CallError;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// Readers waiting for the next round.
const READERS_MAX: usize = 16_384;

/// Between two words of rounds that failed.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// A proposal or a round of heartbeats takes no longer, or its outcome is unknown.
pub const DEADLINE: Duration = Duration::from_secs(10);

type Answer = Result<u64, CallError>;

/// Raft as the service uses it.
#[derive(Clone)]
pub struct Consensus {
    raft: Raft,
    machine: Machine,
    clock: Arc<Clock>,
    readers: mpsc::Sender<oneshot::Sender<Answer>>,
    proposer: Proposer,
    cluster_level: Arc<AtomicU32>,
}

impl Consensus {
    /// Starts the tasks that serve readers and proposals; they end with the last clone.
    pub fn start(raft: Raft, machine: Machine, wall: Arc<dyn WallClock>) -> Self {
        let (readers, waiting) = mpsc::channel(READERS_MAX);
        tokio::spawn(serve_readers(raft.clone(), waiting));
        Self {
            proposer: Proposer::start(raft.clone()),
            raft,
            machine,
            clock: Arc::new(Clock::new(wall)),
            readers,
            cluster_level: Arc::new(AtomicU32::new(1)),
        }
    }

    /// From now on commands up to this level may be proposed: every member can apply them.
    pub(super) fn set_cluster_level(&self, level: u32) {
        self.cluster_level.store(level, Ordering::Relaxed);
    }

    /// Leader time.
    pub fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// Leader time goes on from where the log is.
    pub(super) fn begin_term(&self) -> Result<(), KvError> {
        let log_ms = self.machine.read(|state| state.log_time_ms())?;
        self.clock.begin_term(log_ms);
        Ok(())
    }

    /// The Raft below.
    pub fn raft(&self) -> &Raft {
        &self.raft
    }

    /// The state.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// This node leads, as far as it knows.
    pub fn leads(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        metrics.current_leader == Some(metrics.id)
    }

    /// Returns once everything committed before the call is applied here.
    pub async fn barrier(&self) -> Answer {
        let (answer, wait) = oneshot::channel();
        let lost = || CallError::from(MetadError::NoQuorum("this node is stopping".into()));
        self.readers.send(answer).await.map_err(|_| lost())?;
        wait.await.map_err(|_| lost())?
    }

    /// Proposes a command and waits for its answer.
    pub async fn propose(
        &self,
        command: Command,
        request: Option<Request>,
    ) -> Result<Reply, CallError> {
        let level = self.cluster_level.load(Ordering::Relaxed);
        check_level((self.machine.ground().program.level_of)(&command), level)
            .map_err(MetadError::Invalid)?;
        let entry = Entry {
            time_ms: self.now_ms(),
            request,
            command,
        };
        match tokio::time::timeout(DEADLINE, self.proposer.propose(entry)).await {
            Ok(answer) => answer,
            Err(_) => {
                Err(MetadError::Unknown("no majority confirmed the change in time".into()).into())
            }
        }
    }

    /// Proposes a command of the cluster itself.
    pub async fn propose_internal(&self, command: Command) -> Result<Reply, CallError> {
        self.propose(command, None).await
    }
}

async fn serve_readers(raft: Raft, mut waiting: mpsc::Receiver<oneshot::Sender<Answer>>) {
    let mut refusals = Refusals::default();
    while let Some(first) = waiting.recv().await {
        let mut readers = vec![first];
        while let Ok(next) = waiting.try_recv() {
            readers.push(next);
        }
        let answer = round(&raft).await;
        if let Err(CallError::Refused(reason @ MetadError::NoQuorum(_))) = &answer
            && let Some(rounds) = refusals.one_more(Instant::now())
        {
            tracing::error!(%reason, rounds, "reads are refused: no majority confirms that this metad leads");
        }
        for reader in readers {
            // A reader whose caller went away does not wait any more.
            drop(reader.send(answer.clone()));
        }
    }
}

/// Rounds that failed for want of a majority: there may be hundreds a second, and one line says as much.
#[derive(Debug, Default)]
struct Refusals {
    said: Option<Instant>,
    rounds: u64,
}

impl Refusals {
    /// A round failed; if it is time to say so: how many since that was said last.
    fn one_more(&mut self, now: Instant) -> Option<u64> {
        self.rounds += 1;
        let due = self
            .said
            .is_none_or(|said| now.saturating_duration_since(said) >= SAY_EVERY);
        due.then(|| {
            self.said = Some(now);
            std::mem::take(&mut self.rounds)
        })
    }
}

async fn round(raft: &Raft) -> Answer {
    match tokio::time::timeout(DEADLINE, raft.ensure_linearizable()).await {
        Ok(Ok(index)) => Ok(index.map_or(0, |id| id.index)),
        Ok(Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(forward)))) => {
            Err(CallError::NotLeader {
                leader: forward.leader_node.map(|node| node.addr),
            })
        }
        Ok(Err(error)) => Err(MetadError::NoQuorum(error.to_string()).into()),
        Err(_) => Err(MetadError::NoQuorum("no majority answered in time".into()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_rounds_are_said_at_once_and_then_seldom_with_their_number() {
        let begin = Instant::now();
        let mut refusals = Refusals::default();
        let said: Vec<(u64, u64)> = (0..2_500)
            .map(|tick| tick * 10)
            .filter_map(|ms| {
                let rounds = refusals.one_more(begin + Duration::from_millis(ms))?;
                Some((ms, rounds))
            })
            .collect();
        assert_eq!(said, [(0, 1), (10_000, 1_000), (20_000, 1_000)]);
        // After a long quiet, again at once, with those that were not said.
        let later = begin + Duration::from_secs(3_600);
        assert_eq!(refusals.one_more(later), Some(500));
    }
}
