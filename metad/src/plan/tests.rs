#![expect(clippy::unwrap_used, reason = "tests")]
//! The planner against a simulated cluster whose agents do at once what they are told.

use super::facts::Facts;
use super::index::Index;
use super::{Decision, Limits, Plan, plan};
use crate::placing;
use crate::state::command::{Command, Entry};
use crate::state::kv::MemoryKv;
use crate::state::tests::{Twin, VOLUME, policy, record};
use crate::state::{State, Touched, apply};
use proptest::prelude::*;
use qsfs_proto::api::{BackendFacts, ClusterSettings, Intent, Mutation, ShardReport, Verdict};
use qsfs_zstor::id::{AgentId, BackendId, DatafileId, Epoch, Stream};
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};
use std::collections::BTreeSet;

/// Two locations of two nodes of two backends: ids 1 to 4 are those of [`Twin::new`], 5 to 8 the second nodes.
struct World {
    twin: Twin,
    index: Index,
    facts: Facts,
    epoch: Epoch,
    /// Agents that say nothing.
    silent: BTreeSet<AgentId>,
    /// Backends whose agent says they failed.
    failed: BTreeSet<BackendId>,
    waiting_for: Option<String>,
}

impl World {
    fn new() -> Self {
        let mut twin = Twin::new();
        for location in ["loc1", "loc2"] {
            let agent = twin.register_agent(location, "n2");
            for namespace in ["a", "b"] {
                twin.register_backend(agent, namespace);
            }
        }
        let epoch = twin.acquire(1, false).unwrap();
        let index = Index::build(&twin.state()).unwrap();
        let facts = Facts {
            leader_since_ms: twin.now_ms,
            ..Facts::default()
        };
        let mut world = Self {
            twin,
            index,
            facts,
            epoch,
            silent: BTreeSet::new(),
            failed: BTreeSet::new(),
            waiting_for: None,
        };
        for agent in world.twin.state().agents().unwrap() {
            world.facts.session_began(agent.id, world.twin.now_ms);
        }
        world.beat();
        world
    }

    fn beat(&mut self) {
        let backends = self.twin.state().backends().unwrap();
        for agent in self.twin.state().agents().unwrap() {
            if self.silent.contains(&agent.id) {
                continue;
            }
            if !self.facts.connected(agent.id) {
                self.facts.session_began(agent.id, self.twin.now_ms);
                self.index.retry_stuck();
            }
            let facts = backends.iter().filter(|b| b.agent == agent.id);
            let facts = facts.map(|b| BackendFacts {
                backend: b.id,
                healthy: !self.failed.contains(&b.id),
                free_bytes: 1 << 40,
                ..BackendFacts::default()
            });
            let facts = facts.collect();
            self.facts.heartbeat(agent.id, facts, self.twin.now_ms);
        }
    }

    fn apply(&mut self, command: Command) {
        let entry = Entry::internal(self.twin.now_ms, command);
        let mut state = State::new(&self.twin.kv);
        apply(&mut state, &entry).unwrap().unwrap();
        let (batch, touched) = state.into_changes();
        self.twin.kv.commit(batch);
        self.follow(&touched);
    }

    fn mutate(&mut self, mutation: Mutation) {
        self.apply(Command::Mutation(mutation));
    }

    fn follow(&mut self, touched: &Touched) {
        self.index
            .follow(&State::new(&self.twin.kv), touched)
            .unwrap();
        if touched.tombstones {
            self.index.retry_stuck();
        }
    }

    fn commit(&mut self, datafile: u64, backends: &[u64]) {
        self.mutate(Mutation::CommitDatafiles {
            volume: VOLUME,
            epoch: self.epoch,
            records: vec![record(datafile, Stream::Data, backends)],
            head: None,
        });
    }

    fn plan(&mut self) -> Plan {
        let state = State::new(&self.twin.kv);
        let now_ms = self.twin.now_ms;
        let planned = plan(
            &state,
            &mut self.index,
            &self.facts,
            now_ms,
            &Limits::default(),
        );
        planned.unwrap()
    }

    /// Lets time pass with heartbeats, carrying out whatever is decided, until nothing is left to do.
    fn settle(&mut self, ms: u64) {
        let until = self.twin.now_ms + ms;
        loop {
            self.beat();
            let mut rounds = 0;
            loop {
                let plan = self.plan();
                self.waiting_for = plan.waiting_for;
                if plan.decisions.is_empty() {
                    break;
                }
                rounds += 1;
                assert!(
                    rounds < 1_000,
                    "the campaign does not end: {:?}",
                    plan.decisions
                );
                for decision in plan.decisions {
                    self.carry_out(decision);
                }
            }
            if self.twin.now_ms >= until {
                return;
            }
            self.twin.now_ms += 1_000;
        }
    }

    fn carry_out(&mut self, decision: Decision) {
        match decision {
            Decision::SetVerdicts(verdicts) => self.apply(Command::SetVerdicts(verdicts)),
            Decision::OrderDeletes(places) => self.apply(Command::OrderDeletes(places)),
            Decision::ReapVolume(volume) => self.apply(Command::ReapVolume(volume)),
            Decision::Delete { place, .. } => self.apply(Command::ShardDeleted(place)),
            Decision::Rebuild { agent, job } => {
                let target = self.twin.state().backend(job.to).unwrap().unwrap();
                assert_eq!(target.agent, agent);
                assert_eq!(
                    target.verdict,
                    Verdict::Up,
                    "no shard goes to a backend that is not up"
                );
                assert_eq!(target.intent, Intent::Serve);
                assert!(!self.failed.contains(&job.to) && !self.silent.contains(&agent));
                let before = self.survives(&job.record);
                self.mutate(Mutation::SwapShard {
                    volume: VOLUME,
                    datafile: job.record.datafile,
                    shard: job.shard,
                    from: job.record.shards[job.shard as usize].backend,
                    to: job.to,
                    version: job.record.version,
                });
                let now = self.get(job.record.datafile.0);
                assert!(self.survives(&now) >= before, "{job:?} made it worse");
            }
        }
    }

    fn get(&self, datafile: u64) -> EncodingRecord {
        let state = self.twin.state();
        state.record(VOLUME, DatafileId(datafile)).unwrap().unwrap()
    }

    /// What readable shards survive, as far as the policy asks.
    fn survives(&self, record: &EncodingRecord) -> Option<(u32, u32)> {
        let sites = self.index.sites();
        let readable = |index: usize| {
            let shard = &record.shards[index];
            super::assess::shard_health(shard, sites.backend(shard.backend)).readable()
        };
        let survival = placing::survival(record, sites, readable)?;
        let policy = policy();
        Some((
            survival.locations.min(policy.survive_locations),
            survival.nodes.min(policy.survive_nodes),
        ))
    }

    fn agents_of(&self, location: &str) -> Vec<AgentId> {
        let agents = self.twin.state().agents().unwrap();
        let here = agents.iter().filter(|a| a.location.as_str() == location);
        here.map(|agent| agent.id).collect()
    }

    fn well(&self) -> bool {
        let health = self.index.health(VOLUME);
        health.below_policy == 0 && health.unreadable == 0 && self.index.pending_shards() == (0, 0)
    }

    fn places(&self, datafile: u64) -> Vec<u64> {
        self.get(datafile)
            .shards
            .iter()
            .map(|s| s.backend.0)
            .collect()
    }

    /// The index that follows changes equals the one built from scratch.
    fn check_index(&self) {
        let fresh = Index::build(&State::new(&self.twin.kv)).unwrap();
        assert_eq!(fresh.assessments(), self.index.assessments());
        assert_eq!(fresh.health(VOLUME), self.index.health(VOLUME));
        assert_eq!(fresh.pending_shards(), self.index.pending_shards());
    }
}

fn lost_ms() -> u64 {
    let settings = ClusterSettings::default();
    settings.lost_after_ms + settings.down_after_ms + 5_000
}

#[test]
fn silence_makes_suspect_then_down_then_lost_and_a_word_makes_up_again() {
    let mut world = World::new();
    let agent = world
        .twin
        .state()
        .backend(BackendId(1))
        .unwrap()
        .unwrap()
        .agent;
    world.silent.insert(agent);
    let verdict = |world: &World| {
        let backend = world.twin.state().backend(BackendId(1)).unwrap();
        backend.unwrap().verdict
    };
    let settings = ClusterSettings::default();
    world.settle(settings.suspect_after_ms);
    assert_eq!(verdict(&world), Verdict::Suspect);
    world.settle(settings.down_after_ms - settings.suspect_after_ms);
    assert_eq!(verdict(&world), Verdict::Down);
    world.settle(settings.lost_after_ms);
    assert_eq!(verdict(&world), Verdict::Lost);
    world.silent.clear();
    world.settle(0);
    assert_eq!(verdict(&world), Verdict::Up);
}

#[test]
fn a_backend_that_its_agent_reports_failed_is_down_at_once() {
    let mut world = World::new();
    world.failed.insert(BackendId(2));
    world.settle(0);
    let backend = world.twin.state().backend(BackendId(2)).unwrap().unwrap();
    assert_eq!(backend.verdict, Verdict::Down);
}

#[test]
fn a_new_leader_does_not_call_anyone_down_before_it_listened() {
    let mut world = World::new();
    world.twin.now_ms += 3_600_000;
    world.facts = Facts {
        leader_since_ms: world.twin.now_ms,
        ..Facts::default()
    };
    assert_eq!(world.plan().decisions, []);
}

#[test]
fn a_lost_location_is_rebuilt_on_the_other_and_moved_back_when_it_returns() {
    let mut world = World::new();
    for datafile in 1..=6 {
        world.commit(datafile, &[1, 3, 5, 7]);
    }
    let loc1 = world.agents_of("loc1");
    world.silent.extend(loc1);
    world.settle(20_000);
    assert_eq!(world.index.pending_shards(), (0, 0), "down is not lost");
    let waiting = world.waiting_for.clone().unwrap();
    assert!(
        waiting.contains("loc1") && waiting.contains("lost in"),
        "{waiting}"
    );
    world.settle(lost_ms());
    let sites = world.index.sites();
    for datafile in 1..=6 {
        let places = world.places(datafile);
        let there = places.iter().all(|b| {
            let backend = sites.backend(BackendId(*b)).unwrap();
            backend.location.as_str() == "loc2"
        });
        assert!(there, "{places:?}");
        assert_eq!(
            places.iter().collect::<BTreeSet<_>>().len(),
            4,
            "{places:?}"
        );
    }
    assert!(!world.well(), "one location alone is below the policy");
    world.check_index();
    world.silent.clear();
    world.settle(2_000);
    assert!(world.well(), "{:?}", world.waiting_for);
    world.check_index();
}

#[test]
fn rot_is_rebuilt_in_place_and_only_if_the_place_is_up() {
    let mut world = World::new();
    world.commit(1, &[1, 3, 5, 7]);
    let report = |state| Mutation::ReportShards {
        reports: vec![ShardReport {
            volume: VOLUME,
            datafile: DatafileId(1),
            shard: 1,
            backend: BackendId(3),
            state,
            by_scrub: true,
        }],
    };
    world.mutate(report(ShardState::Corrupt));
    world.settle(0);
    assert_eq!(world.places(1), [1, 3, 5, 7]);
    assert!(world.well());
    world.failed.insert(BackendId(3));
    world.mutate(report(ShardState::Missing));
    world.settle(0);
    assert_ne!(world.places(1)[1], 3);
}

#[test]
fn what_has_the_fewest_spare_shards_comes_first() {
    let mut world = World::new();
    world.commit(1, &[1, 3, 5, 7]);
    world.commit(2, &[2, 3, 5, 7]);
    world.failed.extend([BackendId(5), BackendId(2)]);
    world.twin.now_ms += 1_000;
    world.beat();
    let lost = vec![(BackendId(2), Verdict::Lost), (BackendId(5), Verdict::Lost)];
    world.apply(Command::SetVerdicts(lost));
    let first = world.plan().decisions.into_iter().find_map(|d| match d {
        Decision::Rebuild { job, .. } => Some(job.record.datafile),
        _ => None,
    });
    assert_eq!(first, Some(DatafileId(2)));
}

#[test]
fn a_draining_backend_is_emptied_and_its_pieces_deleted_after_the_grace() {
    let mut world = World::new();
    for datafile in 1..=4 {
        world.commit(datafile, &[1, 3, 5, 7]);
    }
    world.mutate(Mutation::SetBackendIntent {
        backend: BackendId(1),
        intent: Intent::Drain,
    });
    world.settle(0);
    let load = |world: &World| {
        world
            .twin
            .state()
            .backend_load(BackendId(1))
            .unwrap()
            .shards
    };
    assert_eq!(load(&world), 0);
    assert!(world.well());
    let left = |world: &World| world.twin.state().tombstones_due(BackendId(1), 99).unwrap();
    assert_eq!(left(&world).len(), 4);
    world.settle(ClusterSettings::default().tombstone_grace_ms + 1_000);
    assert_eq!(left(&world), []);
}

#[test]
fn no_more_rebuilds_run_than_allowed_in_all_and_per_target() {
    let mut world = World::new();
    for datafile in 1..=40 {
        world.commit(datafile, &[1, 3, 5, 7]);
    }
    world.failed.insert(BackendId(1));
    world.beat();
    world.apply(Command::SetVerdicts(vec![(BackendId(1), Verdict::Lost)]));
    let mut targets = std::collections::BTreeMap::<_, usize>::new();
    for decision in world.plan().decisions {
        if let Decision::Rebuild { job, .. } = decision {
            *targets.entry(job.to).or_default() += 1;
        }
    }
    let limits = Limits::default();
    assert!(!targets.is_empty());
    assert!(
        targets
            .values()
            .all(|jobs| *jobs <= limits.rebuilds_per_backend)
    );
    assert!(targets.values().sum::<usize>() <= limits.rebuilds_max);
}

#[derive(Debug, Clone)]
enum Event {
    Silence(u64),
    Fail(u64),
    Wait(u64),
    Rot(u64, u32),
    Drain(u64),
    Commit([u64; 4]),
}

fn events() -> impl Strategy<Value = Event> {
    prop_oneof![
        2 => (1u64..5).prop_map(Event::Silence),
        2 => (1u64..9).prop_map(Event::Fail),
        3 => prop_oneof![Just(3_000u64), Just(20_000), Just(700_000)].prop_map(Event::Wait),
        2 => (1u64..6, 0u32..4).prop_map(|(file, shard)| Event::Rot(file, shard)),
        1 => (1u64..3).prop_map(Event::Drain),
        3 => [1u64..9, 1u64..9, 1u64..9, 1u64..9].prop_map(Event::Commit),
    ]
}

impl World {
    fn run(&mut self, event: &Event, files: &mut u64) {
        match event {
            Event::Silence(agent) => {
                self.silent.insert(AgentId(*agent));
                self.facts.session_ended(AgentId(*agent));
            }
            Event::Fail(backend) => {
                self.failed.insert(BackendId(*backend));
            }
            Event::Wait(ms) => self.settle(*ms),
            Event::Drain(backend) => self.mutate(Mutation::SetBackendIntent {
                backend: BackendId(*backend),
                intent: Intent::Drain,
            }),
            Event::Rot(file, shard) => {
                // More rot than there is parity is beyond any planner.
                let bad = |record: &EncodingRecord| {
                    let rotten = |s: &&Shard| s.state != ShardState::Stored;
                    record.shards.iter().filter(rotten).count()
                };
                if *file <= *files && bad(&self.get(*file)) < policy().geometry.parity() {
                    let backend = self.get(*file).shards[*shard as usize].backend;
                    self.mutate(Mutation::ReportShards {
                        reports: vec![ShardReport {
                            volume: VOLUME,
                            datafile: DatafileId(*file),
                            shard: *shard,
                            backend,
                            state: ShardState::Corrupt,
                            by_scrub: false,
                        }],
                    });
                }
            }
            Event::Commit(places) => {
                let crowded = (1..9).any(|b| places.iter().filter(|p| **p == b).count() > 2);
                if !crowded {
                    *files += 1;
                    self.commit(*files, places);
                }
            }
        }
        self.check_index();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happened_all_is_at_policy_once_the_backends_are_back(
        events in prop::collection::vec(events(), 1..25)
    ) {
        let mut world = World::new();
        let mut files = 0;
        for event in &events {
            world.run(event, &mut files);
        }
        world.silent.clear();
        world.failed.clear();
        world.settle(5_000);
        world.check_index();
        prop_assert!(
            world.well(),
            "{:?} {:?}",
            world.waiting_for,
            (1..=files).map(|file| world.get(file)).collect::<Vec<_>>()
        );
        let kv: &MemoryKv = &world.twin.kv;
        prop_assert!(State::new(kv).doomed_volumes().unwrap().is_empty());
    }
}
