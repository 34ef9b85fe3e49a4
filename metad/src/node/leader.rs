//! The leader's loop: follow what apply touched, plan, carry out. Runs on events and on the plan's own timer.

use super::agents;
use super::consensus::Consensus;
use super::members;
use super::soft::{Soft, Term};
use crate::machine::MachineError;
use crate::plan::facts::RunningJob;
use crate::plan::index::Index;
use crate::plan::{Decision, Limits, plan};
use crate::state::Touched;
use crate::state::command::Command;
use crate::state::kv::KvError;
use qsfs_proto::api::AgentOrder;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Events that come closer together than this share one plan.
const COALESCE: Duration = Duration::from_millis(10);

/// Pause after a proposal that failed.
const RETRY_MS: u64 = 500;

/// Steps of the index before a term begins; with more records it begins before all are assessed.
const BEGIN_STEPS: usize = 64;

/// Steps of the index between two plans.
const FOLLOW_STEPS: usize = 64;

/// Pause before a leader that could not reach a majority asks it again.
const BARRIER_RETRY: Duration = Duration::from_millis(50);

/// Longest sleep without any event.
const IDLE: Duration = Duration::from_secs(60);

/// Runs until `stop`.
pub(crate) async fn run(consensus: Consensus, soft: Arc<Soft>, stop: CancellationToken) {
    // These change with elections and members; `metrics` with every message.
    let mut server = consensus.raft().server_metrics();
    loop {
        let term = loop {
            {
                let now = server.borrow_and_update();
                if now.current_leader == Some(now.id) {
                    break now.vote.leader_id().term;
                }
            }
            tokio::select! {
                changed = server.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
            }
        };
        // Until everything of earlier terms is applied here there is nothing to plan on.
        if let Err(error) = consensus.barrier().await {
            tracing::debug!(?error, "no majority confirms that this metad leads");
            // Not at once: where nobody can be reached that is known without waiting, and this would spin.
            tokio::select! {
                () = tokio::time::sleep(BARRIER_RETRY) => {}
                () = stop.cancelled() => return,
            }
            continue;
        }
        tracing::info!(term, "this metad leads");
        match begin(&consensus).await {
            Ok(begun) => soft.begin_term(begun),
            Err(error) => {
                tracing::error!(%error, "the state cannot be read; this metad cannot plan");
                tokio::select! {
                    () = tokio::time::sleep(IDLE) => {}
                    () = stop.cancelled() => return,
                }
                continue;
            }
        }
        lead(&consensus, &soft, term, &stop).await;
        soft.end_term();
        consensus.machine().forget_touched();
        if stop.is_cancelled() {
            return;
        }
        tracing::info!(term, "this metad does not lead any more");
    }
}

#[expect(
    clippy::redundant_closure,
    reason = "the bare function is not general enough over the lifetime of the view"
)]
async fn begin(consensus: &Consensus) -> Result<Term, KvError> {
    consensus.begin_term()?;
    let machine = consensus.machine();
    machine.follow_touched();
    let mut index = machine.read(|state| Index::begin(state))?;
    for _ in 0..BEGIN_STEPS {
        if !machine.read(|state| index.advance(state))? {
            break;
        }
        tokio::task::yield_now().await;
    }
    Ok(Term::new(index, consensus.now_ms()))
}

/// Lets the index follow, in steps between which others get at it and at the state. Answers whether more is to be done.
async fn follow(
    consensus: &Consensus,
    soft: &Soft,
    touched: &Touched,
) -> Result<bool, MachineError> {
    let machine = consensus.machine();
    let noted = soft.with(|term| {
        machine.read(|state| term.index.note(state, touched))?;
        if touched.tombstones {
            term.index.retry_stuck();
        }
        Ok::<_, KvError>(())
    });
    noted.transpose()?;
    for _ in 0..FOLLOW_STEPS {
        let step = soft.with(|term| machine.read(|state| term.index.advance(state)));
        if !step.transpose()?.unwrap_or(false) {
            return Ok(false);
        }
        tokio::task::yield_now().await;
    }
    Ok(true)
}

async fn lead(consensus: &Consensus, soft: &Arc<Soft>, term: u64, stop: &CancellationToken) {
    let mut server = consensus.raft().server_metrics();
    let mut replication = consensus.raft().data_metrics();
    let mut applied = consensus.machine().applied_index();
    loop {
        let wake_at_ms = match think(consensus, soft).await {
            Ok(wake_at_ms) => wake_at_ms,
            Err(error) => {
                tracing::error!(%error, "planning failed");
                None
            }
        };
        let joining = members::tend(consensus).await;
        let wait = wake_at_ms.map_or(IDLE, |at_ms| {
            Duration::from_millis(at_ms.saturating_sub(consensus.now_ms())).min(IDLE)
        });
        tokio::select! {
            _ = applied.changed() => {}
            () = soft.woken() => {}
            _ = server.changed() => {}
            _ = replication.changed(), if joining => {}
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return,
        }
        tokio::time::sleep(COALESCE).await;
        let now = server.borrow_and_update().clone();
        if now.current_leader != Some(now.id) || now.vote.leader_id().term != term {
            return;
        }
        applied.borrow_and_update();
        replication.borrow_and_update();
    }
}

/// One round: follow, plan, carry out. Answers when to think again.
async fn think(consensus: &Consensus, soft: &Arc<Soft>) -> Result<Option<u64>, MachineError> {
    let now_ms = consensus.now_ms();
    let touched = consensus.machine().take_touched();
    let more = follow(consensus, soft, &touched).await?;
    let planned = soft.with(|term| {
        consensus.machine().read(|state| {
            term.facts.expire(now_ms);
            let limits = Limits::default();
            plan(state, &mut term.index, &term.facts, now_ms, &limits)
        })
    });
    let Some(planned) = planned else {
        return Ok(None);
    };
    let planned = planned?;
    tell_agents(soft, &touched);
    let mut wake_at_ms = planned.wake_at_ms.filter(|_| !more);
    if more {
        wake_at_ms = Some(now_ms);
    }
    let mut proposals = Vec::new();
    soft.with(|term| {
        term.plan = planned;
        let decisions = std::mem::take(&mut term.plan.decisions);
        for decision in decisions {
            if let Some(command) = carry_out(term, decision, now_ms) {
                proposals.push(command);
            }
        }
    });
    for command in proposals {
        if let Err(error) = consensus.propose_internal(command).await {
            tracing::warn!(
                ?error,
                "a decision was not accepted; it will be planned again"
            );
            wake_at_ms = Some(consensus.now_ms() + RETRY_MS);
        }
    }
    Ok(wake_at_ms)
}

/// Orders go out at once; what must be agreed on is handed back to be proposed.
fn carry_out(term: &mut Term, decision: Decision, now_ms: u64) -> Option<Command> {
    match decision {
        Decision::SetVerdicts(verdicts) => {
            tracing::info!(?verdicts, "verdicts change");
            Some(Command::SetVerdicts(verdicts))
        }
        Decision::OrderDeletes(places) => Some(Command::OrderDeletes(places)),
        Decision::ReapVolume(volume) => Some(Command::ReapVolume(volume)),
        Decision::Rebuild { agent, job } => {
            let record = (job.record.volume, job.record.datafile);
            let running = RunningJob {
                shard: job.shard,
                to: job.to,
                agent,
                since_ms: now_ms,
            };
            if agents::send(term, agent, AgentOrder::Rebuild(*job)) {
                term.facts.running.insert(record, running);
            }
            None
        }
        Decision::Delete {
            agent,
            place,
            record,
        } => {
            let order = AgentOrder::DeleteShard {
                backend: place.backend,
                record: *record,
                shard: place.shard,
            };
            if agents::send(term, agent, order) {
                term.facts.deleting.insert(place, now_ms);
            }
            None
        }
    }
}

fn tell_agents(soft: &Soft, touched: &Touched) {
    soft.with(|term| {
        if touched.settings {
            let settings = term.index.settings().clone();
            agents::broadcast(term, &AgentOrder::Settings(settings));
        }
        if !touched.backends.is_empty() {
            let backends = term.index.backends().cloned().collect();
            agents::broadcast(term, &AgentOrder::Backends(backends));
        }
    });
}
