//! Random commands against a model that is too simple to be wrong.

use super::*;
use crate::state::command::Reply;
use proptest::prelude::*;
use qsfs_proto::api::{Head, MetadError, ShardReport};
use std::collections::BTreeMap;

#[derive(Debug, Clone)]
enum Op {
    Acquire {
        client: u8,
        takeover: bool,
    },
    Renew {
        epoch_back: u64,
    },
    ReleaseLease {
        epoch_back: u64,
    },
    Commit {
        epoch_back: u64,
        files: Vec<(u64, bool, [u64; 4])>,
        head: Option<(u64, u64)>,
    },
    Release {
        epoch_back: u64,
        file: u64,
    },
    Swap {
        file: u64,
        shard: u32,
        to: u64,
        version_back: u64,
    },
    Report {
        file: u64,
        shard: u32,
        backend: u64,
    },
    Wait {
        ms: u64,
    },
    Retry,
}

fn ops() -> impl Strategy<Value = Op> {
    let back = prop_oneof![8 => Just(0u64), 1 => 1u64..3];
    let file = 1u64..9;
    let spread = prop_oneof![
        4 => Just([1u64, 2, 3, 4]),
        1 => [1u64..6, 1u64..6, 1u64..6, 1u64..6],
    ];
    prop_oneof![
        2 => (1u8..4, any::<bool>()).prop_map(|(client, takeover)| Op::Acquire { client, takeover }),
        1 => back.clone().prop_map(|epoch_back| Op::Renew { epoch_back }),
        1 => back.clone().prop_map(|epoch_back| Op::ReleaseLease { epoch_back }),
        8 => (
            back.clone(),
            prop::collection::vec((file.clone(), any::<bool>(), spread), 0..3),
            prop::option::of((file.clone(), file.clone())),
        )
            .prop_map(|(epoch_back, files, head)| Op::Commit { epoch_back, files, head }),
        2 => (back.clone(), file.clone()).prop_map(|(epoch_back, file)| Op::Release { epoch_back, file }),
        4 => (file.clone(), 0u32..4, 1u64..6, back)
            .prop_map(|(file, shard, to, version_back)| Op::Swap { file, shard, to, version_back }),
        3 => (file, 0u32..4, 1u64..5).prop_map(|(file, shard, backend)| Op::Report { file, shard, backend }),
        1 => (0u64..40_000).prop_map(|ms| Op::Wait { ms }),
        2 => Just(Op::Retry),
    ]
}

/// What the model knows of a record.
#[derive(Debug, Clone, PartialEq)]
struct File {
    meta: bool,
    places: [u64; 4],
    bad: [bool; 4],
    version: u64,
}

#[derive(Debug, Default)]
struct Model {
    epoch: u64,
    lease: Option<(u8, u64)>,
    files: BTreeMap<u64, File>,
    released: std::collections::BTreeSet<u64>,
    head: (u64, u64),
    found: u64,
    repaired: u64,
}

impl Model {
    fn writes(&self, epoch: u64) -> bool {
        epoch == self.epoch && self.lease.is_some()
    }

    fn commit(&mut self, files: &[(u64, bool, [u64; 4])], head: Option<(u64, u64)>) -> bool {
        let mut after = self.files.clone();
        for (file, meta, places) in files {
            let crowded = (1..6).any(|b| places.iter().filter(|p| **p == b).count() > 2);
            let twice = files.iter().filter(|(other, ..)| other == file).count() > 1;
            // Backend 5 does not exist; the salt follows the file, so a known file was committed before.
            if crowded || twice || places.contains(&5) || self.released.contains(file) {
                return false;
            }
            after.entry(*file).or_insert(File {
                meta: *meta,
                places: *places,
                bad: [false; 4],
                version: 0,
            });
        }
        if let Some((newest, from)) = head {
            let is_meta = |file| after.get(&file).is_some_and(|f: &File| f.meta);
            let back = newest < self.head.0 || from < self.head.1;
            if back || from > newest || !is_meta(newest) || !is_meta(from) {
                return false;
            }
            self.head = (newest, from);
        }
        self.files = after;
        true
    }

    fn release(&mut self, file: u64) -> bool {
        let needed = |f: &File| f.meta && file >= self.head.1;
        if self.files.get(&file).is_some_and(needed) {
            return false;
        }
        if self.files.remove(&file).is_some() {
            self.released.insert(file);
        }
        true
    }

    fn swap(&mut self, file: u64, shard: usize, to: u64, version_back: u64) -> bool {
        let Some(found) = self.files.get_mut(&file) else {
            return false;
        };
        let mut places = found.places;
        places[shard] = to;
        let crowded = (1..6).any(|b| places.iter().filter(|p| **p == b).count() > 2);
        if version_back > 0 || to == 5 || crowded {
            return false;
        }
        self.repaired += u64::from(found.bad[shard]);
        found.places = places;
        found.bad[shard] = false;
        found.version += 1;
        true
    }
}

struct Run {
    twin: Twin,
    model: Model,
    last: Option<(Entry, Outcome)>,
    sequence: u64,
}

impl Run {
    fn entry(&mut self, mutation: Mutation) -> Outcome {
        self.sequence += 1;
        let entry = Entry {
            time_ms: self.twin.now_ms,
            request: Some(request(50, self.sequence)),
            command: Command::Mutation(mutation),
        };
        let outcome = self.twin.apply(&entry);
        self.last = Some((entry, outcome.clone()));
        outcome
    }

    fn step(&mut self, op: &Op) {
        let now = self.twin.now_ms;
        let ttl = ClusterSettings::default().lease_ttl_ms;
        let epoch = |back: &u64| self.model.epoch.saturating_sub(*back);
        match op {
            Op::Acquire {
                client: number,
                takeover,
            } => {
                let held = self
                    .model
                    .lease
                    .is_some_and(|(holder, until)| holder != *number && until > now && !takeover);
                let outcome = self.entry(Mutation::AcquireLease {
                    volume: VOLUME,
                    client: client(*number),
                    holder: "h:1".into(),
                    takeover: *takeover,
                });
                if held {
                    assert!(matches!(outcome, Err(MetadError::Held { .. })));
                } else {
                    self.model.epoch += 1;
                    self.model.lease = Some((*number, now + ttl));
                    let granted = Reply::Applied(Applied::Epoch(Epoch(self.model.epoch)));
                    assert_eq!(outcome, Ok(granted));
                }
            }
            Op::Renew { epoch_back } => {
                let epoch = epoch(epoch_back);
                let outcome = self.entry(Mutation::RenewLease {
                    volume: VOLUME,
                    epoch: Epoch(epoch),
                    report: Default::default(),
                });
                assert_eq!(outcome.is_ok(), self.model.writes(epoch));
                if let (true, Some(lease)) = (outcome.is_ok(), &mut self.model.lease) {
                    lease.1 = now + ttl;
                }
            }
            Op::ReleaseLease { epoch_back } => {
                let epoch = epoch(epoch_back);
                let outcome = self.entry(Mutation::ReleaseLease {
                    volume: VOLUME,
                    epoch: Epoch(epoch),
                });
                assert_eq!(outcome.is_ok(), epoch == self.model.epoch);
                if outcome.is_ok() {
                    self.model.lease = None;
                }
            }
            Op::Wait { ms } => self.twin.now_ms += ms,
            Op::Retry => {
                if let Some((entry, outcome)) = self.last.clone() {
                    assert_eq!(self.twin.apply(&entry), outcome);
                }
            }
            _ => self.step_records(op),
        }
    }

    fn step_records(&mut self, op: &Op) {
        let epoch = |back: &u64| self.model.epoch.saturating_sub(*back);
        match op {
            Op::Commit {
                epoch_back,
                files,
                head,
            } => {
                let epoch = epoch(epoch_back);
                let records = files.iter().map(|(file, meta, places)| {
                    let stream = if *meta { Stream::Meta } else { Stream::Data };
                    EncodingRecord {
                        epoch: Epoch(epoch),
                        ..record(*file, stream, places)
                    }
                });
                let outcome = self.entry(Mutation::CommitDatafiles {
                    volume: VOLUME,
                    epoch: Epoch(epoch),
                    records: records.collect(),
                    head: head.map(|(datafile, recover_from)| Head {
                        datafile: DatafileId(datafile),
                        recover_from: DatafileId(recover_from),
                    }),
                });
                let expected = self.model.writes(epoch) && self.model.commit(files, *head);
                assert_eq!(outcome.is_ok(), expected, "{outcome:?}");
            }
            Op::Release { epoch_back, file } => {
                let epoch = epoch(epoch_back);
                let outcome = self.entry(Mutation::ReleaseDatafiles {
                    volume: VOLUME,
                    epoch: Epoch(epoch),
                    datafiles: vec![DatafileId(*file)],
                });
                let expected = self.model.writes(epoch) && self.model.release(*file);
                assert_eq!(outcome.is_ok(), expected, "{outcome:?}");
            }
            Op::Swap {
                file,
                shard,
                to,
                version_back,
            } => {
                let found = self.model.files.get(file);
                let from = found.map_or(1, |f| f.places[*shard as usize]);
                let version = found.map_or(0, |f| f.version);
                let outcome = self.entry(Mutation::SwapShard {
                    volume: VOLUME,
                    datafile: DatafileId(*file),
                    shard: *shard,
                    from: BackendId(from),
                    to: BackendId(*to),
                    version: version.wrapping_sub(*version_back),
                });
                let expected = self.model.swap(*file, *shard as usize, *to, *version_back);
                assert_eq!(outcome.is_ok(), expected, "{outcome:?}");
            }
            Op::Report {
                file,
                shard,
                backend,
            } => {
                let reports = vec![ShardReport {
                    volume: VOLUME,
                    datafile: DatafileId(*file),
                    shard: *shard,
                    backend: BackendId(*backend),
                    state: ShardState::Missing,
                    by_scrub: true,
                }];
                self.entry(Mutation::ReportShards { reports }).unwrap();
                let index = *shard as usize;
                if let Some(found) = self.model.files.get_mut(file)
                    && found.places[index] == *backend
                    && !found.bad[index]
                {
                    found.bad[index] = true;
                    found.version += 1;
                    self.model.found += 1;
                }
            }
            _ => {}
        }
    }

    fn compare(&self) {
        let state = self.twin.state();
        let volume = state.volume(VOLUME).unwrap().unwrap();
        assert_eq!(volume.epoch.0, self.model.epoch);
        let head = (volume.head.datafile.0, volume.head.recover_from.0);
        assert_eq!(head, self.model.head);
        let rot = state.rot().unwrap();
        assert_eq!(
            (rot.found_by_scrub, rot.repaired),
            (self.model.found, self.model.repaired)
        );
        let records = state.records_after(VOLUME, DatafileId(0), 99).unwrap();
        let found: BTreeMap<_, _> = records.iter().map(|r| (r.datafile.0, as_file(r))).collect();
        assert_eq!(found, self.model.files);
        assert_eq!(
            state.volume_totals(VOLUME).unwrap().datafiles,
            records.len() as u64
        );
        for backend in 1..=4u64 {
            let id = BackendId(backend);
            let expected: Vec<_> = self
                .model
                .files
                .iter()
                .flat_map(|(file, f)| (0u32..).zip(f.places).map(move |(i, p)| (*file, i, p)))
                .filter(|(.., place)| *place == backend)
                .map(|(file, shard, _)| (VOLUME, DatafileId(file), shard))
                .collect();
            assert_eq!(state.shards_on(id, None, 999).unwrap(), expected);
            assert_eq!(
                state.backend_load(id).unwrap().shards,
                expected.len() as u64
            );
            // No place is both alive and to be deleted.
            for (place, _) in state.tombstones_due(id, 999).unwrap() {
                let record = state.record(VOLUME, place.datafile).unwrap();
                let alive = record.is_some_and(|r| {
                    r.salt == place.salt && r.shards[place.shard as usize].backend == id
                });
                assert!(!alive, "{place:?}");
            }
        }
    }
}

fn as_file(record: &EncodingRecord) -> File {
    let at = |i: usize| record.shards[i].backend.0;
    let bad = |i: usize| record.shards[i].state != ShardState::Stored;
    File {
        meta: record.stream == Stream::Meta,
        places: [at(0), at(1), at(2), at(3)],
        bad: [bad(0), bad(1), bad(2), bad(3)],
        version: record.version,
    }
}

fn run(ops: &[Op]) -> Run {
    let mut run = Run {
        twin: Twin::new(),
        model: Model::default(),
        last: None,
        sequence: 0,
    };
    for op in ops {
        run.step(op);
        run.compare();
    }
    run
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn apply_agrees_with_the_naive_model_and_with_itself(ops in prop::collection::vec(ops(), 1..50)) {
        let first = run(&ops);
        let second = run(&ops);
        prop_assert_eq!(first.twin.kv.rows(), second.twin.kv.rows());
        for in_a_view in [1, 3, usize::MAX] {
            prop_assert_eq!(&first.twin.replayed(in_a_view), &first.twin.kv);
        }
    }
}
