//! Which buried pieces are deleted now: those past their grace, on backends that are up, ordered through the log first.

use super::facts::Facts;
use super::index::Index;
use super::{Decision, Limits, Plan};
use crate::state::State;
use crate::state::kv::{Kv, KvError};
use crate::state::tombstones::ORDER_PLACES_MAX;
use qsfs_proto::api::{Intent, Verdict};

pub(super) fn plan<K: Kv>(
    state: &State<K>,
    index: &Index,
    facts: &Facts,
    now_ms: u64,
    limits: &Limits,
    plan: &mut Plan,
) -> Result<(), KvError> {
    let mut to_order = Vec::new();
    let log_time_ms = state.log_time_ms()?.max(now_ms);
    let reachable = index.backends().filter(|backend| {
        backend.verdict == Verdict::Up
            && backend.intent != Intent::Retire
            && facts.connected(backend.agent)
    });
    for backend in reachable {
        for (place, due_ms) in state.tombstones_due(backend.id, limits.deletions_per_backend)? {
            if due_ms > log_time_ms {
                plan.wake_at(due_ms);
                break;
            }
            if facts.deleting.contains_key(&place) {
                continue;
            }
            let Some(tombstone) = state.tombstone(&place)? else {
                continue;
            };
            match tombstone.places.get(&(place.backend, place.shard)) {
                Some(due) if due.ordered => plan.decisions.push(Decision::Delete {
                    agent: backend.agent,
                    place,
                    record: Box::new(tombstone.record),
                }),
                Some(_) if to_order.len() < ORDER_PLACES_MAX => to_order.push(place),
                _ => {}
            }
        }
    }
    if !to_order.is_empty() {
        plan.decisions.push(Decision::OrderDeletes(to_order));
    }
    Ok(())
}
