//! Health: up, suspect, down, lost, from the age of heartbeats and from what agents say of their backends.
//!
//! Silence is counted from when this leader began to listen, so a change of leader lowers nobody's verdict by itself; how
//! long a backend has been down is replicated, so it does not restart the clock of `lost_after` either.

use super::facts::Facts;
use super::index::Index;
use super::{Decision, Plan};
use qsfs_proto::api::{Backend, ClusterSettings, Intent, Verdict};

pub(super) fn plan(index: &Index, facts: &Facts, now_ms: u64, plan: &mut Plan) {
    let mut verdicts = Vec::new();
    for backend in index.backends() {
        if backend.intent == Intent::Retire {
            continue;
        }
        let (verdict, next_ms) = judge(backend, facts, index.settings(), now_ms);
        if verdict != backend.verdict {
            verdicts.push((backend.id, verdict));
        }
        if let Some(next_ms) = next_ms {
            plan.wake_at(next_ms);
        }
    }
    if !verdicts.is_empty() {
        plan.decisions.push(Decision::SetVerdicts(verdicts));
    }
}

/// The verdict now, and when silence would change it.
pub fn judge(
    backend: &Backend,
    facts: &Facts,
    settings: &ClusterSettings,
    now_ms: u64,
) -> (Verdict, Option<u64>) {
    let heard_ms = facts.heard_ms(backend.agent);
    let really_heard = facts
        .agents
        .get(&backend.agent)
        .is_some_and(|session| session.heard_ms > 0);
    let fact = facts.backends.get(&backend.id);
    let failed = fact.is_some_and(|fact| !fact.healthy);
    let healthy = really_heard && fact.is_some_and(|fact| fact.healthy);
    let age_ms = now_ms.saturating_sub(heard_ms);

    if failed || age_ms >= settings.down_after_ms {
        return down(backend, settings, now_ms);
    }
    if age_ms >= settings.suspect_after_ms {
        let suspect = match backend.verdict {
            Verdict::Up => Verdict::Suspect,
            worse => worse,
        };
        return (suspect, Some(heard_ms + settings.down_after_ms));
    }
    if healthy {
        return (Verdict::Up, Some(heard_ms + settings.suspect_after_ms));
    }
    (backend.verdict, Some(heard_ms + settings.suspect_after_ms))
}

fn down(backend: &Backend, settings: &ClusterSettings, now_ms: u64) -> (Verdict, Option<u64>) {
    match backend.verdict {
        Verdict::Lost => (Verdict::Lost, None),
        Verdict::Down => {
            let lost_ms = backend
                .verdict_since_ms
                .saturating_add(settings.lost_after_ms);
            if lost_ms <= now_ms {
                (Verdict::Lost, None)
            } else {
                (Verdict::Down, Some(lost_ms))
            }
        }
        Verdict::Up | Verdict::Suspect => (Verdict::Down, None),
    }
}
