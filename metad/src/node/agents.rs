//! Agent sessions: reports in, orders out.

use super::consensus::Consensus;
use super::soft::{SessionHandle, Soft, Term};
use crate::state::command::Command;
use crate::state::tombstones::Place;
use qsfs_proto::api::{AgentOrder, AgentReport, BackendFacts, MetadError, Verdict};
use qsfs_proto::server::{CallError, SESSION_QUEUE_MAX};
use qsfs_zstor::id::AgentId;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Hands an order to an agent's queue. False: it is full or gone; the plan comes back to it.
pub(super) fn send(term: &Term, agent: AgentId, order: AgentOrder) -> bool {
    let session = term.sessions.get(&agent);
    session.is_some_and(|session| session.orders.try_send(order).is_ok())
}

/// Tells all agents. One whose queue is full loses its session, because it must not miss this: it begins another.
pub(super) fn broadcast(term: &mut Term, order: &AgentOrder) {
    term.sessions
        .retain(|_, session| session.orders.try_send(order.clone()).is_ok());
}

/// Opens a session.
pub(super) fn open(
    consensus: &Consensus,
    soft: &Arc<Soft>,
    agent: AgentId,
    reports: mpsc::Receiver<AgentReport>,
) -> Result<mpsc::Receiver<AgentOrder>, CallError> {
    let (orders, queue) = mpsc::channel(SESSION_QUEUE_MAX);
    let now_ms = consensus.now_ms();
    let opened = soft.with(|term| {
        let first = [
            AgentOrder::Settings(term.index.settings().clone()),
            AgentOrder::Backends(term.index.backends().cloned().collect()),
        ];
        for order in first {
            if orders.try_send(order).is_err() {
                return None;
            }
        }
        let serial = term.next_serial();
        term.facts.session_began(agent, now_ms);
        term.index.retry_stuck();
        term.sessions
            .insert(agent, SessionHandle { serial, orders });
        Some(serial)
    });
    let Some(Some(serial)) = opened else {
        return Err(CallError::NotLeader { leader: None });
    };
    soft.replan();
    tracing::info!(%agent, "agent session opened");
    tokio::spawn(listen(
        consensus.clone(),
        Arc::clone(soft),
        (agent, serial),
        reports,
    ));
    Ok(queue)
}

async fn listen(
    consensus: Consensus,
    soft: Arc<Soft>,
    (agent, serial): (AgentId, u64),
    mut reports: mpsc::Receiver<AgentReport>,
) {
    while let Some(report) = reports.recv().await {
        let mine = soft.with(|term| is_current(term, agent, serial));
        if mine != Some(true) {
            return;
        }
        take(&consensus, &soft, agent, report).await;
    }
    soft.with(|term| {
        if is_current(term, agent, serial) {
            term.sessions.remove(&agent);
            term.facts.session_ended(agent);
        }
    });
    tracing::info!(%agent, "agent session ended");
    soft.replan();
}

fn is_current(term: &Term, agent: AgentId, serial: u64) -> bool {
    let session = term.sessions.get(&agent);
    session.is_some_and(|session| session.serial == serial)
}

async fn take(consensus: &Consensus, soft: &Arc<Soft>, agent: AgentId, report: AgentReport) {
    let now_ms = consensus.now_ms();
    match report {
        AgentReport::Heartbeat { facts } => {
            let changed = soft.with(|term| heartbeat(term, agent, facts, now_ms));
            if changed == Some(true) {
                soft.replan();
            }
        }
        AgentReport::RebuildDone {
            volume,
            datafile,
            shard,
            bytes,
            error,
        } => {
            if let Some(error) = &error {
                tracing::warn!(%volume, %datafile, shard, error, "a rebuild failed");
            }
            soft.with(|term| {
                let running = term.facts.running.get(&(volume, datafile));
                if running.is_some_and(|job| job.agent != agent) {
                    // Not its job.
                    return;
                }
                if error.is_none() {
                    term.finished(bytes, now_ms);
                }
                term.facts.rebuild_done((volume, datafile), error, now_ms);
            });
            soft.replan();
        }
        AgentReport::ShardDeleted {
            backend,
            volume,
            datafile,
            salt,
            shard,
        } => {
            let place = Place {
                backend,
                volume,
                datafile,
                salt,
                shard,
            };
            let own = soft.with(|term| {
                let backend = term.index.sites().backend(backend);
                backend.is_some_and(|backend| backend.agent == agent)
            });
            if own != Some(true) {
                tracing::warn!(%agent, %backend, "an agent told of a deletion on a backend that is not its own");
                return;
            }
            let told = consensus
                .propose_internal(Command::ShardDeleted(place))
                .await;
            if let Err(error) = told {
                tracing::warn!(
                    ?error,
                    "a deletion was not recorded; it will be ordered again"
                );
            }
            soft.with(|term| term.facts.deleting.remove(&place));
            soft.replan();
        }
    }
}

/// Only facts about the agent's own backends count. True: the plan may change.
fn heartbeat(term: &mut Term, agent: AgentId, facts: Vec<BackendFacts>, now_ms: u64) -> bool {
    let own: Vec<_> = facts
        .into_iter()
        .filter(|fact| {
            let backend = term.index.sites().backend(fact.backend);
            backend.is_some_and(|backend| backend.agent == agent)
        })
        .collect();
    let not_up = own.iter().any(|fact| {
        let backend = term.index.sites().backend(fact.backend);
        fact.healthy && backend.is_some_and(|backend| backend.verdict != Verdict::Up)
    });
    let changed = term.facts.heartbeat(agent, own, now_ms);
    if changed {
        term.index.retry_stuck();
    }
    changed || not_up
}

/// What agents said of their backends, and how old that is by now.
pub(super) fn facts(term: &Term, now_ms: u64) -> Vec<BackendFacts> {
    let aged = |facts: &BackendFacts| {
        let said_ms = facts.age_ms?;
        let heard_ms = term
            .facts
            .heard_ms(term.index.sites().backend(facts.backend)?.agent);
        Some(said_ms.saturating_add(now_ms.saturating_sub(heard_ms)))
    };
    let all = term.facts.backends.values();
    all.map(|facts| BackendFacts {
        age_ms: aged(facts),
        ..facts.clone()
    })
    .collect()
}

/// Begins scrub tours.
pub(super) fn scrub(
    soft: &Soft,
    backend: Option<qsfs_zstor::id::BackendId>,
) -> Result<(), CallError> {
    let ordered = soft.with(|term| {
        let targets: Vec<_> = term
            .index
            .backends()
            .filter(|b| backend.is_none_or(|id| id == b.id))
            .map(|b| (b.agent, b.id, b.intent))
            .collect();
        if targets.is_empty() {
            let which = backend.map_or("any backend".into(), |id| format!("backend {id}"));
            return Err(CallError::from(MetadError::NotFound(which)));
        }
        let mut silent = Vec::new();
        for (agent, id, intent) in targets {
            if intent != qsfs_proto::api::Intent::Retire
                && !send(term, agent, AgentOrder::Scrub { backend: id })
            {
                silent.push(id.to_string());
            }
        }
        if silent.is_empty() {
            return Ok(());
        }
        let text = format!(
            "the agents of backends {} are not connected; the others began",
            silent.join(", ")
        );
        Err(MetadError::Invalid(text).into())
    });
    ordered.unwrap_or(Err(CallError::NotLeader { leader: None }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::index::Index;
    use crate::state::tests::Twin;
    use qsfs_zstor::id::BackendId;

    #[test]
    fn facts_grow_old_from_when_they_were_found() {
        let twin = Twin::new();
        let index = Index::build(&twin.state()).expect("a state");
        let mut term = Term::new(index, 10_000);
        let found = |backend: u64, age_ms| BackendFacts {
            backend: BackendId(backend),
            healthy: true,
            age_ms,
            ..BackendFacts::default()
        };
        // Backends 1 and 2 are the first agent's, 3 and 4 the second's, of an older program.
        heartbeat(
            &mut term,
            AgentId(1),
            vec![found(1, Some(30)), found(2, Some(0))],
            10_100,
        );
        heartbeat(&mut term, AgentId(2), vec![found(3, None)], 10_200);
        let ages = |term: &Term, now_ms| {
            let facts = facts(term, now_ms).into_iter();
            facts
                .map(|facts| (facts.backend.0, facts.age_ms))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            ages(&term, 10_100),
            [(1, Some(30)), (2, Some(0)), (3, None)]
        );
        assert_eq!(
            ages(&term, 12_100),
            [(1, Some(2_030)), (2, Some(2_000)), (3, None)]
        );
        heartbeat(&mut term, AgentId(1), vec![found(1, Some(5))], 12_100);
        assert_eq!(ages(&term, 12_100)[0], (1, Some(5)));
    }
}
