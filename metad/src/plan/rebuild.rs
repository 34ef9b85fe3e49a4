//! Re-silver: which shard of which record is made again, and where.

use super::assess::{ShardHealth, shard_health};
use super::facts::{Facts, RecordName};
use super::index::Index;
use super::{Decision, Limits, Plan};
use crate::placing;
use crate::state::State;
use crate::state::kv::{Kv, KvError};
use qsfs_proto::api::{Intent, RebuildJob, Verdict};
use qsfs_zstor::id::BackendId;
use qsfs_zstor::placement::{self, Candidate, Moves, Survival, Unplaceable};
use qsfs_zstor::policy::Policy;
use qsfs_zstor::record::{EncodingRecord, ShardState};
use std::collections::{BTreeMap, BTreeSet};

/// Room left on a backend beyond the shard, so that headers and journals fit.
pub const ROOM_BYTES: u64 = 4 << 20;

/// What became of a record that was looked at.
enum Look {
    /// Make this shard there.
    Job(u32, BackendId),
    /// The target has enough to do.
    Busy,
    /// Not with the backends there are.
    Stuck(String),
}

pub(super) fn plan<K: Kv>(
    state: &State<K>,
    index: &mut Index,
    facts: &Facts,
    now_ms: u64,
    limits: &Limits,
    plan: &mut Plan,
) -> Result<(), KvError> {
    let max = limits
        .rebuilds_max
        .min(index.settings().rebuilds_max as usize);
    let mut load: BTreeMap<BackendId, usize> = BTreeMap::new();
    for job in facts.running.values() {
        *load.entry(job.to).or_default() += 1;
    }
    let mut running = facts.running.len();
    for name in index.work(limits.examined_max) {
        if running >= max {
            break;
        }
        if facts.running.contains_key(&name) {
            continue;
        }
        if let Some(failed) = facts.failed.get(&name)
            && failed.retry_ms > now_ms
        {
            plan.wake_at(failed.retry_ms);
            continue;
        }
        let Some(record) = state.record(name.0, name.1)? else {
            continue;
        };
        match look(state, index, facts, limits, &load, (name, &record))? {
            Look::Job(shard, to) => {
                let Some(agent) = index.sites().backend(to).map(|backend| backend.agent) else {
                    continue;
                };
                running += 1;
                *load.entry(to).or_default() += 1;
                let job = Box::new(RebuildJob { record, shard, to });
                plan.decisions.push(Decision::Rebuild { agent, job });
            }
            Look::Busy => {}
            Look::Stuck(reason) => index.set_stuck(name, reason),
        }
    }
    plan.waiting_for = waiting_for(index, facts, now_ms);
    Ok(())
}

fn look<K: Kv>(
    state: &State<K>,
    index: &Index,
    facts: &Facts,
    limits: &Limits,
    load: &BTreeMap<BackendId, usize>,
    (name, record): (RecordName, &EncodingRecord),
) -> Result<Look, KvError> {
    let Some(volume) = index.volume(name.0) else {
        return Ok(Look::Stuck("its volume is being deleted".into()));
    };
    let health: Vec<_> = record
        .shards
        .iter()
        .map(|shard| shard_health(shard, index.sites().backend(shard.backend)))
        .collect();
    let readable = health.iter().filter(|h| h.readable()).count();
    if readable < record.geometry.data() {
        return Ok(Look::Stuck(format!(
            "only {readable} of the {} shards needed answer",
            record.geometry.data()
        )));
    }
    let doomed = being_deleted(state, record)?;
    let site = Site {
        index,
        facts,
        doomed,
    };
    let in_place = |shard: u32| site.takes(record.shards[shard as usize].backend, Some(shard));
    let stays: Vec<_> = (0u32..)
        .zip(&record.shards)
        .zip(&health)
        .map(|((shard, s), h)| (!h.needs_rebuild() || in_place(shard)).then_some(s.backend))
        .collect();
    let moves = placement::moves(
        &volume.policy,
        record.geometry,
        placing::stored_shard_bytes(record),
        &stays,
        &site.candidates(&stays),
    );
    let harmless = Harmless::of(index, &volume.policy, record);
    let target = pick(&health, &stays, &moves, &harmless);
    Ok(match target {
        Ok((_, to)) if !has_room(load, to, limits) => Look::Busy,
        Ok((shard, to)) => Look::Job(shard, to),
        Err(reason) => Look::Stuck(reason),
    })
}

/// The shard to make next: first those that are rotten or gone, then those that leave, then moves.
///
/// The shards to move and their targets come as sets: which shard goes to which target is free, and some pairs would do harm
/// on the way where others do none.
fn pick(
    health: &[ShardHealth],
    stays: &[Option<BackendId>],
    moves: &Result<Moves, Unplaceable>,
    harmless: &Harmless<'_>,
) -> Result<(u32, BackendId), String> {
    let all = 0u32..u32::try_from(health.len()).unwrap_or(0);
    let (unreadable, leaving): (Vec<u32>, Vec<u32>) = all
        .filter(|shard| health[*shard as usize].needs_rebuild())
        .partition(|shard| !health[*shard as usize].readable());
    // Only rotten: its own backend is the place the policy chose.
    for shard in &unreadable {
        if let Some(here) = stays[*shard as usize] {
            return Ok((*shard, here));
        }
    }
    let moves = moves.as_ref().map_err(|error| error.missing.clone())?;
    let moving: Vec<u32> = moves.moves.iter().map(|(shard, _)| *shard).collect();
    let targets: Vec<BackendId> = moves.moves.iter().map(|(_, to)| *to).collect();
    harmless
        .best(&unreadable, &targets, false)
        .or_else(|| harmless.best(&leaving, &targets, true))
        .or_else(|| harmless.best(&moving, &targets, true))
        .ok_or_else(|| {
            if moves.missing.is_empty() {
                "a backend to which a shard can move without harm".to_owned()
            } else {
                moves.missing.clone()
            }
        })
}

/// What a record survives, as far as its policy asks: with all its shards where they are, and with those that are readable.
type Standing = [(u32, u32, u32); 2];

/// Which moves do not make a record survive less, not even on the way.
struct Harmless<'a> {
    index: &'a Index,
    policy: &'a Policy,
    record: &'a EncodingRecord,
    now: Standing,
}

impl<'a> Harmless<'a> {
    fn of(index: &'a Index, policy: &'a Policy, record: &'a EncodingRecord) -> Self {
        Self {
            index,
            policy,
            record,
            now: standing(index, policy, record),
        }
    }

    fn after(&self, shard: u32, to: BackendId) -> Option<Standing> {
        let mut moved = self.record.clone();
        moved.shards[shard as usize].backend = to;
        moved.shards[shard as usize].state = ShardState::Stored;
        placing::survives_one_backend(&moved).then(|| standing(self.index, self.policy, &moved))
    }

    /// The pair after which the record stands best; the first of equals, so that equal plans are equal. `strict`: only if it
    /// survives no less than before, which is so of itself for a shard that cannot be read.
    fn best(
        &self,
        shards: &[u32],
        targets: &[BackendId],
        strict: bool,
    ) -> Option<(u32, BackendId)> {
        let mut best: Option<(Standing, (u32, BackendId))> = None;
        for shard in shards {
            for to in targets {
                if self.record.shards[*shard as usize].backend == *to {
                    continue;
                }
                let Some(then) = self.after(*shard, *to) else {
                    continue;
                };
                let no_less = then
                    .iter()
                    .zip(&self.now)
                    .all(|(then, now)| then.0 >= now.0 && then.1 >= now.1);
                let better = best.as_ref().is_none_or(|(found, _)| then > *found);
                if better && (no_less || !strict) {
                    best = Some((then, (*shard, *to)));
                }
            }
        }
        best.map(|(_, job)| job)
    }
}

fn standing(index: &Index, policy: &Policy, record: &EncodingRecord) -> Standing {
    let sites = index.sites();
    let readable = |shard: usize| {
        let shard = &record.shards[shard];
        shard_health(shard, sites.backend(shard.backend)).readable()
    };
    let asked = |survival: Option<Survival>| {
        survival.map_or((0, 0, 0), |survival| {
            (
                survival.locations.min(policy.survive_locations),
                survival.nodes.min(policy.survive_nodes),
                survival.backends,
            )
        })
    };
    [
        asked(placing::survival(record, sites, |_| true)),
        asked(placing::survival(record, sites, readable)),
    ]
}

/// Where shards of one record may go.
struct Site<'a> {
    index: &'a Index,
    facts: &'a Facts,
    doomed: BTreeSet<(BackendId, u32)>,
}

impl Site<'_> {
    /// Up, serving, in session, and no deletion of this very shard (of any shard of the record: `None`) is under way there.
    fn takes(&self, backend: BackendId, shard: Option<u32>) -> bool {
        let doomed = self
            .doomed
            .iter()
            .any(|(place, s)| *place == backend && shard.is_none_or(|shard| shard == *s));
        !doomed
            && self.index.sites().backend(backend).is_some_and(|b| {
                b.verdict == Verdict::Up
                    && b.intent == Intent::Serve
                    && self.facts.connected(b.agent)
            })
    }

    /// Every backend the record may keep or take; one that may not take more has no free bytes.
    fn candidates(&self, stays: &[Option<BackendId>]) -> Vec<Candidate> {
        let held = |backend: BackendId| stays.contains(&Some(backend));
        self.index
            .backends()
            .filter(|b| held(b.id) || (b.intent == Intent::Serve && b.verdict != Verdict::Lost))
            .map(|backend| {
                let free = self
                    .facts
                    .backends
                    .get(&backend.id)
                    .map_or(0, |f| f.free_bytes);
                let takes = self.takes(backend.id, None);
                let free = if takes {
                    free.saturating_sub(ROOM_BYTES)
                } else {
                    0
                };
                placing::candidate(backend, free)
            })
            .collect()
    }
}

fn has_room(load: &BTreeMap<BackendId, usize>, to: BackendId, limits: &Limits) -> bool {
    load.get(&to).copied().unwrap_or(0) < limits.rebuilds_per_backend
}

/// Places of this encoding attempt whose deletion was ordered: no shard may go there until it is done.
fn being_deleted<K: Kv>(
    state: &State<K>,
    record: &EncodingRecord,
) -> Result<BTreeSet<(BackendId, u32)>, KvError> {
    let places = state.tombstone_of(record)?.map(|t| t.places);
    let ordered = places.into_iter().flatten().filter(|(_, due)| due.ordered);
    Ok(ordered.map(|(place, _)| place).collect())
}

/// What re-silver waits for, in words.
pub(super) fn waiting_for(index: &Index, facts: &Facts, now_ms: u64) -> Option<String> {
    let down: Vec<_> = index
        .backends()
        .filter(|b| b.verdict == Verdict::Down && b.intent != Intent::Retire)
        .collect();
    if let Some(first) = down.first() {
        let places: BTreeSet<_> = down.iter().map(|b| b.location.as_str()).collect();
        let lost_ms = first
            .verdict_since_ms
            .saturating_add(index.settings().lost_after_ms);
        let names: Vec<_> = places.into_iter().collect();
        return Some(format!(
            "{} backends at {} to come back, or to be given up as lost in {} s",
            down.len(),
            names.join(", "),
            lost_ms.saturating_sub(now_ms).div_ceil(1_000)
        ));
    }
    if let Some((reason, records)) = index.stuck() {
        return Some(format!("{reason} ({records} datafiles)"));
    }
    let failed = facts.failed.values().next()?;
    Some(format!(
        "a rebuild failed and will be repeated: {}",
        failed.error
    ))
}
