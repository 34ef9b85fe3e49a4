#![expect(clippy::unwrap_used, reason = "tests")]
//! openraft's own suite on the real log and the real state machine; snapshots; rebuilding.

use super::sled_kv::{SledKv, SledStores};
use super::{Machine, snapshot};
use crate::ground::Ground;
use crate::log::storage::LogStore;
use crate::raft::{LogEntry, LogId, StorageError, TypeConfig};
use crate::state::command::{Command, Entry, Genesis, MemberRow};
use crate::state::kv::{Batch, Kv, MemoryKv, Pair};
use openraft::testing::{StoreBuilder, Suite};
use openraft::{CommittedLeaderId, EntryPayload};
use proptest::prelude::*;
use qsfs_proto::api::{ClusterSettings, Mutation, Role};
use qsfs_zdb::media::DiskMedia;
use qsfs_zstor::id::{ClusterId, MetadId};

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, Machine, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, Machine), StorageError> {
        let dir = tempfile::tempdir().unwrap();
        let log = LogStore::open(&Ground::real(), &dir.path().join("log")).unwrap();
        let machine = Machine::open(dir.path()).unwrap();
        Ok((dir, log, machine))
    }
}

#[test]
fn openraft_suite_passes_on_the_real_log_and_state_machine() {
    Suite::test_all(Builder).unwrap();
}

fn log_id(index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(1, 1), index)
}

fn entry(index: u64, command: Command) -> LogEntry {
    LogEntry {
        log_id: log_id(index),
        payload: EntryPayload::Normal(Entry::internal(1_000 + index, command)),
    }
}

fn genesis() -> Command {
    Command::Initialize(Genesis {
        cluster: ClusterId::from_bytes([1; 16]),
        ca_pem: "ca".into(),
        settings: ClusterSettings::default(),
        member: MemberRow {
            id: MetadId(1),
            name: "m1".parse().unwrap(),
            location: "loc1".parse().unwrap(),
            address: "a:1".into(),
            removed: false,
        },
        tokens: vec![],
    })
}

fn token(number: u64) -> Command {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&number.to_be_bytes());
    Command::Mutation(Mutation::CreateToken {
        hash,
        role: Role::Agent,
        ttl_ms: 1_000_000,
    })
}

fn fill(machine: &Machine, indexes: std::ops::Range<u64>) {
    let entries = indexes.map(|index| match index {
        1 => entry(1, genesis()),
        _ => entry(index, token(index)),
    });
    machine.apply(entries.collect()).unwrap();
}

fn rows(machine: &Machine) -> Vec<Pair> {
    let current = machine.shared.current.read();
    current.kv.range(&[], &[u8::MAX; 16], usize::MAX).unwrap()
}

#[test]
fn a_snapshot_holds_the_state_as_it_was_when_it_began_whatever_is_applied_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::open(dir.path()).unwrap();
    fill(&machine, 1..3_000);
    let before = rows(&machine);
    let raft = machine.raft_row();
    *machine.shared.dump.lock() = Some(super::dump::Dump::default());
    let meta = snapshot::Meta {
        last_log_id: raft.applied,
        last_membership: raft.membership,
        snapshot_id: "s".into(),
    };
    let mut next = 3_000;
    let path = snapshot::write(&DiskMedia, dir.path(), &meta, || {
        fill(&machine, next..next + 50);
        next += 50;
        let current = machine.shared.current.read();
        machine
            .shared
            .dump
            .lock()
            .as_mut()
            .unwrap()
            .page(&current.kv)
    })
    .unwrap();
    let mut copied = Vec::new();
    snapshot::read_rows(&DiskMedia, &path, |batch| {
        copied.extend(batch.into_iter().map(|(key, value)| (key, value.unwrap())));
        Ok(())
    })
    .unwrap();
    assert!(next > 3_050, "several pages");
    assert_eq!(copied, before);
}

#[test]
fn what_was_flushed_is_there_after_opening_again_with_its_log_id() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::open(dir.path()).unwrap();
    fill(&machine, 1..100);
    machine.flush().unwrap();
    let before = rows(&machine);
    drop(machine);
    let machine = Machine::open(dir.path()).unwrap();
    assert_eq!(machine.raft_row().applied, Some(log_id(99)));
    assert_eq!(rows(&machine), before);
}

#[test]
fn a_flipped_bit_in_a_snapshot_is_found_and_nothing_of_it_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::open(dir.path()).unwrap();
    fill(&machine, 1..100);
    let path = machine.build().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(machine.catch_up_from_snapshot(log_id(99)).is_err());
    assert_eq!(machine.raft_row().applied, Some(log_id(99)));
}

#[test]
fn a_state_that_does_not_open_is_set_aside_and_rebuilt_from_the_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::open(dir.path()).unwrap();
    fill(&machine, 1..100);
    let before = rows(&machine);
    machine.build().unwrap();
    drop(machine);
    let sled = dir.path().join("state/00000000");
    std::fs::remove_dir_all(&sled).unwrap();
    std::fs::write(&sled, b"not a directory").unwrap();
    let machine = Machine::open(dir.path()).unwrap();
    assert_eq!(rows(&machine), before);
    assert!(dir.path().join("state/damaged-00000000").exists());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn recent_and_stored_rows_read_as_one_map(ops in prop::collection::vec(kv_ops(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let kv = SledKv::open(&SledStores, dir.path(), 0).unwrap();
        let mut model = MemoryKv::default();
        for op in ops {
            match op {
                KvOp::Commit(batch) => {
                    kv.commit(batch.clone());
                    model.commit(batch);
                }
                KvOp::Relieve => kv.relieve().unwrap(),
                KvOp::Range(from, until, max) => {
                    let (from, until) = (vec![from], vec![until]);
                    prop_assert_eq!(kv.range(&from, &until, max).unwrap(), model.range(&from, &until, max).unwrap());
                }
                KvOp::Get(key) => prop_assert_eq!(kv.get(&[key]).unwrap(), model.get(&[key]).unwrap()),
            }
        }
    }
}

#[derive(Debug, Clone)]
enum KvOp {
    Commit(Batch),
    Relieve,
    Range(u8, u8, usize),
    Get(u8),
}

fn kv_ops() -> impl Strategy<Value = KvOp> {
    let row = (
        0u8..40,
        prop::option::of(prop::collection::vec(any::<u8>(), 0..4)),
    );
    let batch = prop::collection::btree_map(row.0.prop_map(|key| vec![key]), row.1, 1..8);
    prop_oneof![
        3 => batch.prop_map(KvOp::Commit),
        1 => Just(KvOp::Relieve),
        3 => (0u8..40, 0u8..44, 1usize..6).prop_map(|(from, until, max)| KvOp::Range(from, until, max)),
        1 => (0u8..40).prop_map(KvOp::Get),
    ]
}
