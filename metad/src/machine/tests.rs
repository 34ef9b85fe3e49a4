#![expect(clippy::unwrap_used, reason = "tests")]
//! openraft's own suite on the real log and the real state machine; snapshots; rebuilding.

use super::mover::scan;
use super::rows::{Rows, View};
use super::sled_kv::SledStores;
use super::{Machine, snapshot};
use crate::ground::{Ground, Store, Stores};
use crate::log::storage::LogStore;
use crate::raft::{LogEntry, LogId, StorageError, TypeConfig};
use crate::state::command::{Command, Entry};
use crate::state::kv::{Batch, Kv, KvError, MemoryKv, Pair, RowKey};
use crate::state::tests::genesis;
use openraft::storage::RaftStateMachine;
use openraft::testing::{StoreBuilder, Suite};
use openraft::{CommittedLeaderId, EntryPayload};
use parking_lot::Mutex;
use proptest::prelude::*;
use qsfs_proto::api::{Mutation, Role};
use qsfs_zdb::media::DiskMedia;
use std::sync::Arc;

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
        payload: EntryPayload::Normal(Entry::internal(1_000 + index, command).into()),
    }
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
    let meta = snapshot::Meta {
        last_log_id: raft.applied,
        last_membership: raft.membership,
        snapshot_id: "s".into(),
    };
    let view = machine.shared.current.read().kv.view();
    let (mut next, mut from) = (3_000, RowKey::new());
    let path = snapshot::write(&DiskMedia, dir.path(), &meta, || {
        fill(&machine, next..next + 50);
        next += 50;
        if next % 200 == 0 {
            machine.shared.current.read().kv.relieve()?;
        }
        let page = view.page(&from, 500)?;
        from = page
            .last()
            .map_or(RowKey::new(), |(last, _)| crate::state::kv::after(last));
        Ok::<_, KvError>(page)
    })
    .unwrap();
    let mut copied = Vec::new();
    snapshot::read_rows(&DiskMedia, &path, |batch| {
        copied.extend(batch.into_iter().map(|(key, value)| (key, value.unwrap())));
        Ok(())
    })
    .unwrap();
    assert!(next > 3_200, "several pages");
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
    let meta = snapshot::read_meta(&DiskMedia, &path).unwrap();
    assert!(machine.prepare(&path, &meta).is_err());
    assert!(!dir.path().join("state/00000001").exists());
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

/// sled on a disk that has no room for what opening writes.
#[derive(Debug)]
struct FullStores;

impl Stores for FullStores {
    fn open(&self, _: &std::path::Path) -> Result<Arc<dyn Store>, KvError> {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        Err(sled::Error::Io(full).into())
    }

    fn exists(&self, dir: &std::path::Path) -> bool {
        SledStores.exists(dir)
    }

    fn remove(&self, dir: &std::path::Path) -> std::io::Result<()> {
        SledStores.remove(dir)
    }

    fn rename(&self, from: &std::path::Path, to: &std::path::Path) -> std::io::Result<()> {
        SledStores.rename(from, to)
    }

    fn list(&self, parent: &std::path::Path) -> std::io::Result<Vec<String>> {
        SledStores.list(parent)
    }
}

#[test]
fn a_state_that_does_not_open_on_a_full_disk_stays_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::open(dir.path()).unwrap();
    fill(&machine, 1..100);
    let before = rows(&machine);
    machine.flush().unwrap();
    drop(machine);
    let full = Ground {
        stores: Arc::new(FullStores),
        ..Ground::real()
    };
    Machine::open_on(&full, dir.path()).unwrap_err();
    assert!(!dir.path().join("state/damaged-00000000").exists());
    let machine = Machine::open(dir.path()).unwrap();
    assert_eq!(rows(&machine), before);
}

#[tokio::test]
async fn a_damaged_snapshot_is_not_sent_but_made_anew_from_the_state() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::open(dir.path()).unwrap();
    fill(&machine, 1..100);
    let path = machine.build().unwrap();
    let sent = machine.get_current_snapshot().await.unwrap().unwrap();
    assert_eq!(sent.meta.last_log_id, Some(log_id(99)), "this one is whole");
    drop(machine);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let mut machine = Machine::open(dir.path()).unwrap();
    fill(&machine, 100..120);
    let sent = machine.get_current_snapshot().await.unwrap().unwrap();
    assert_eq!(sent.meta.last_log_id, Some(log_id(119)));
    let mut copied = Vec::new();
    snapshot::read_rows(&DiskMedia, sent.snapshot.path(), |batch| {
        copied.extend(batch.into_iter().map(|(key, value)| (key, value.unwrap())));
        Ok(())
    })
    .unwrap();
    assert_eq!(copied, rows(&machine));
    assert!(!path.exists(), "nobody uses the damaged one any more");
}

fn size(path: &std::path::Path) -> u64 {
    let found = std::fs::metadata(path).unwrap();
    if !found.is_dir() {
        return found.len();
    }
    let entries = std::fs::read_dir(path).unwrap();
    entries.map(|entry| size(&entry.unwrap().path())).sum()
}

/// Records are committed, released, and their pieces deleted, again and again, with a snapshot after each round.
#[test]
fn state_and_snapshots_stay_bounded_while_records_come_and_go() {
    use crate::state::tests::{VOLUME, client, policy, record};
    use qsfs_proto::api::{BackendAddress, VolumeSettings};
    use qsfs_zstor::id::{AgentId, BackendId, DatafileId, Epoch, KeyId, Stream};
    const RECORDS: u64 = 200;
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::open(dir.path()).unwrap();
    let (mut index, mut now_ms) = (0, 1_000);
    let mut run = |command: Command, later_ms: u64| {
        index += 1;
        now_ms += later_ms;
        let entry = LogEntry {
            log_id: log_id(index),
            payload: EntryPayload::Normal(Entry::internal(now_ms, command).into()),
        };
        let (mut responses, _) = machine.apply(vec![entry]).unwrap();
        responses.pop().unwrap().0.unwrap().unwrap();
    };
    run(genesis(), 1);
    for (agent, location) in [(1, "loc1"), (2, "loc2")] {
        let register = Mutation::RegisterAgent {
            location: location.parse().unwrap(),
            node: "n1".parse().unwrap(),
        };
        run(Command::Mutation(register), 1);
        for namespace in ["a", "b"] {
            let address = BackendAddress {
                endpoint: format!("{location}:9900"),
                namespace: namespace.into(),
                password: None,
                tls: true,
            };
            let register = Mutation::RegisterBackend {
                agent: AgentId(agent),
                address,
                capacity_bytes: 1 << 40,
            };
            run(Command::Mutation(register), 1);
        }
    }
    let create = Mutation::CreateVolume {
        id: VOLUME,
        name: "v".parse().unwrap(),
        policy: policy(),
        key_id: KeyId::from_bytes([3; 16]),
        settings: VolumeSettings::default(),
    };
    run(Command::Mutation(create), 1);
    let lease = Mutation::AcquireLease {
        volume: VOLUME,
        client: client(1),
        holder: "h:1".into(),
        takeover: false,
    };
    run(Command::Mutation(lease), 1);
    let grace_ms = machine
        .read(|state| state.settings())
        .unwrap()
        .tombstone_grace_ms;
    let mut sizes = Vec::new();
    for round in 0..24 {
        let files = round * RECORDS + 1..(round + 1) * RECORDS + 1;
        let records = files
            .clone()
            .map(|f| record(f, Stream::Data, &[1, 2, 3, 4]));
        let commit = Mutation::CommitDatafiles {
            volume: VOLUME,
            epoch: Epoch(1),
            records: records.collect(),
            head: None,
        };
        run(Command::Mutation(commit), 1);
        let release = Mutation::ReleaseDatafiles {
            volume: VOLUME,
            epoch: Epoch(1),
            datafiles: files.map(DatafileId).collect(),
        };
        run(Command::Mutation(release), 1);
        for backend in 1..=4 {
            let due = machine.read(|state| state.tombstones_due(BackendId(backend), 1_000));
            let due = due.unwrap();
            assert_eq!(due.len(), usize::try_from(RECORDS).unwrap());
            let places: Vec<_> = due.into_iter().map(|(place, _)| place).collect();
            run(Command::OrderDeletes(places.clone()), grace_ms + 1);
            for place in places {
                run(Command::ShardDeleted(place), 0);
            }
        }
        let snapshot = machine.build().unwrap();
        assert_eq!(
            snapshot::finished(&DiskMedia, dir.path()).unwrap(),
            std::slice::from_ref(&snapshot)
        );
        let blocks = machine.shared.current.read().kv.blocks();
        sizes.push((size(&dir.path().join("state")), size(&snapshot), blocks));
    }
    let (state, snapshot, blocks) = sizes[3];
    let (last_state, last_snapshot, last_blocks) = sizes[23];
    assert!(last_state <= 2 * state + (4 << 20), "{sizes:?}");
    assert!(last_snapshot <= 2 * snapshot, "{sizes:?}");
    assert!(last_blocks <= 2 * blocks + 4, "{sizes:?}");
}

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// Compares with a golden file, which is written if it is missing and `QSFS_WRITE_GOLDEN` is set, and never changed.
fn golden(name: &str, made: &[u8]) {
    let path = std::path::Path::new(GOLDEN).join(name);
    if !path.exists() && std::env::var_os("QSFS_WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(GOLDEN).unwrap();
        std::fs::write(&path, made).unwrap();
    }
    assert!(
        std::fs::read(&path).unwrap() == made,
        "{name} is not what it was"
    );
}

#[test]
fn snapshots_and_blocks_are_written_as_they_always_were() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::open(dir.path()).unwrap();
    fill(&machine, 1..40);
    let path = machine.build().unwrap();
    golden("snapshot-1.snap", &std::fs::read(path).unwrap());
    let store = Arc::new(MemoryStore::default());
    let kv = Rows::open_on(store.clone(), 0, true).unwrap();
    kv.commit(
        rows(&machine)
            .into_iter()
            .map(|(key, value)| (key, Some(value)))
            .collect(),
    );
    kv.relieve().unwrap();
    let mut pages = Vec::new();
    scan(store.as_ref(), &[], |name, page| {
        for part in [name, page] {
            pages.extend(u32::try_from(part.len()).unwrap().to_le_bytes());
            pages.extend(part);
        }
        Ok(true)
    })
    .unwrap();
    golden("state-2.pages", &pages);
}

/// A store in memory: a crash takes what was written since the last flush, or the end of it.
#[derive(Debug, Default)]
struct MemoryStore(Mutex<Pages>);

#[derive(Debug, Default)]
struct Pages {
    now: MemoryKv,
    /// Written since the last flush.
    unflushed: Vec<Batch>,
    durable: MemoryKv,
}

impl MemoryStore {
    /// What a crash leaves when the first `kept` of the batches since the last flush reached the disk.
    fn crashed(&self, kept: usize) -> Self {
        let pages = self.0.lock();
        let mut durable = pages.durable.clone();
        for changes in pages.unflushed.iter().take(kept) {
            durable.commit(changes.clone());
        }
        Self(Mutex::new(Pages {
            now: durable.clone(),
            unflushed: Vec::new(),
            durable,
        }))
    }

    fn unflushed(&self) -> usize {
        self.0.lock().unflushed.len()
    }
}

impl Store for MemoryStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        self.0.lock().now.get(key)
    }

    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        self.0.lock().now.range(from, until, max)
    }

    fn write(&self, batch: &Batch) -> Result<(), KvError> {
        let mut pages = self.0.lock();
        pages.now.commit(batch.clone());
        pages.unflushed.push(batch.clone());
        Ok(())
    }

    fn flush(&self) -> Result<(), KvError> {
        let mut pages = self.0.lock();
        pages.durable = pages.now.clone();
        pages.unflushed.clear();
        Ok(())
    }

    fn verify(&self) -> Result<(), KvError> {
        Ok(())
    }
}

/// Only a start looked at checksums: a row that rotted later was read, and decided what was applied.
#[test]
fn a_page_that_rots_after_it_was_opened_is_an_error_of_every_read_and_is_remembered() {
    let store = Arc::new(MemoryStore::default());
    let kv = Rows::open_on(store.clone(), 0, true).unwrap();
    let key = |n: u32| RowKey::from_slice(&n.to_be_bytes());
    kv.commit((0..3).map(|n| (key(n), Some(vec![7; 9]))).collect());
    kv.relieve().unwrap();
    assert_eq!(kv.get(&key(1)).unwrap(), Some(vec![7; 9]));
    assert_eq!(kv.rot(), None);
    // The last byte: the value of the last row. Nothing but the checksum tells.
    let mut rotten = Batch::new();
    let first_block = |name: &[u8], page: &[u8]| {
        let mut page = page.to_vec();
        *page.last_mut().unwrap() ^= 1;
        rotten.insert(RowKey::from_slice(name), Some(page));
        Ok(false)
    };
    scan(store.as_ref(), b"p", first_block).unwrap();
    store.write(&rotten).unwrap();
    let is_rot = |error: KvError| matches!(error, KvError::Damaged(ref text) if text.contains("does not verify"));
    assert!(is_rot(kv.get(&key(2)).unwrap_err()));
    assert!(is_rot(kv.range(&[], &[u8::MAX; 16], 10).unwrap_err()));
    assert!(is_rot(kv.view().page(&[], 10).unwrap_err()));
    assert!(kv.rot().unwrap().contains("does not verify"));
    kv.commit([(key(1), None)].into());
    assert!(is_rot(kv.relieve().unwrap_err()));
}

const EVERYTHING: ([u8; 0], [u8; 16]) = ([], [u8::MAX; 16]);

fn all(kv: &impl Kv) -> Vec<Pair> {
    kv.range(&EVERYTHING.0, &EVERYTHING.1, usize::MAX).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rows_in_memory_and_in_blocks_read_as_one_map(ops in prop::collection::vec(kv_ops(), 1..80)) {
        let store = Arc::new(MemoryStore::default());
        let mut kv = Rows::open_on(store.clone(), 0, true).unwrap();
        let mut model = MemoryKv::default();
        let mut view: Option<(View, MemoryKv)> = None;
        for op in ops {
            match op {
                KvOp::Commit(batch) => {
                    kv.commit(batch.clone());
                    model.commit(batch);
                }
                KvOp::Relieve => kv.relieve().unwrap(),
                KvOp::View => view = Some((kv.view(), model.clone())),
                KvOp::Reopen => {
                    kv.relieve().unwrap();
                    view = None;
                    kv = Rows::open_on(store.clone(), 0, true).unwrap();
                }
                KvOp::Range(from, until, max) => {
                    let (from, until) = (from.to_be_bytes(), until.to_be_bytes());
                    prop_assert_eq!(kv.range(&from, &until, max).unwrap(), model.range(&from, &until, max).unwrap());
                }
                KvOp::Get(key) => {
                    let key = key.to_be_bytes();
                    prop_assert_eq!(kv.get(&key).unwrap(), model.get(&key).unwrap());
                }
            }
            if let Some((view, then)) = &view {
                prop_assert_eq!(view.page(&[], usize::MAX).unwrap(), all(then));
            }
        }
        prop_assert_eq!(all(&kv), all(&model));
        drop(view);
        kv.relieve().unwrap();
        // Nothing is left of what was replaced.
        let (mut pages, blocks) = (0, kv.blocks());
        scan(store.as_ref(), b"p", |_, _| { pages += 1; Ok(true) }).unwrap();
        prop_assert!(pages <= blocks + blocks.div_ceil(2), "{} pages for {} blocks", pages, blocks);
    }

    #[test]
    fn a_crash_leaves_the_state_as_of_one_of_the_moves(
        batches in prop::collection::vec(batch(), 1..12),
        flush_at in 0usize..12,
        kept in any::<prop::sample::Index>(),
    ) {
        let store = Arc::new(MemoryStore::default());
        let kv = Rows::open_on(store.clone(), 0, true).unwrap();
        let mut model = MemoryKv::default();
        let mut moved = vec![all(&model)];
        let mut flushed = 0;
        for (number, batch) in batches.into_iter().enumerate() {
            kv.commit(batch.clone());
            model.commit(batch);
            kv.relieve().unwrap();
            moved.push(all(&model));
            if number == flush_at {
                kv.flush().unwrap();
                flushed = moved.len() - 1;
            }
        }
        let kept = kept.index(store.unflushed() + 1);
        let crashed = store.crashed(kept);
        let kv = Rows::open_on(Arc::new(crashed), 0, true).unwrap();
        let found = all(&kv);
        prop_assert!(moved[flushed..].contains(&found));
        if kept == store.unflushed() {
            prop_assert_eq!(&found, moved.last().unwrap());
        }
        // It goes on from there.
        let more: Batch = [(RowKey::from_slice(&[0, 1]), Some(vec![1]))].into();
        let mut after = MemoryKv::default();
        after.commit(found.into_iter().map(|(key, value)| (key, Some(value))).collect());
        after.commit(more.clone());
        kv.commit(more);
        kv.relieve().unwrap();
        prop_assert_eq!(all(&kv), all(&after));
    }
}

#[derive(Debug, Clone)]
enum KvOp {
    Commit(Batch),
    Relieve,
    View,
    Reopen,
    Range(u16, u16, usize),
    Get(u16),
}

const KEYS: u16 = 900;

fn batch() -> impl Strategy<Value = Batch> {
    let value = prop_oneof![
        2 => Just(None),
        4 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Some),
        1 => prop::collection::vec(any::<u8>(), 900..3_000).prop_map(Some),
    ];
    let one = prop::collection::btree_map(0..KEYS, value.clone(), 1..8);
    // Many neighbours at once, as a release or a commit of many has them.
    let many = (0..KEYS, 1u16..400, value).prop_map(|(from, count, value)| {
        (from..from + count)
            .map(|key| (key, value.clone()))
            .collect()
    });
    let rows = prop_oneof![2 => one, 1 => many];
    rows.prop_map(|rows: std::collections::BTreeMap<u16, Option<Vec<u8>>>| {
        rows.into_iter()
            .map(|(key, value)| (RowKey::from_slice(&key.to_be_bytes()), value))
            .collect()
    })
}

fn kv_ops() -> impl Strategy<Value = KvOp> {
    prop_oneof![
        4 => batch().prop_map(KvOp::Commit),
        2 => Just(KvOp::Relieve),
        1 => Just(KvOp::View),
        1 => Just(KvOp::Reopen),
        3 => (0..KEYS, 0..KEYS + 400, 1usize..300).prop_map(|(from, until, max)| KvOp::Range(from, until, max)),
        2 => (0..KEYS + 400).prop_map(KvOp::Get),
    ]
}

#[test]
fn a_state_of_the_first_format_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::open(dir.path()).unwrap();
    fill(&machine, 1..2_000);
    let before = rows(&machine);
    drop(machine);
    // Format 1 had every row as a value of its own.
    let state = dir.path().join("state");
    std::fs::remove_dir_all(&state).unwrap();
    let old = SledStores.open(&state.join("00000000")).unwrap();
    let batch = before
        .iter()
        .map(|(key, value)| (key.clone(), Some(value.clone())));
    old.write(&batch.collect()).unwrap();
    old.flush().unwrap();
    drop(old);
    let machine = Machine::open(dir.path()).unwrap();
    assert_eq!(rows(&machine), before);
    assert_eq!(machine.raft_row().applied, Some(log_id(1_999)));
    assert!(!state.join("00000000").exists(), "the old one is gone");
    fill(&machine, 2_000..2_010);
    machine.flush().unwrap();
    drop(machine);
    let machine = Machine::open(dir.path()).unwrap();
    assert_eq!(machine.raft_row().applied, Some(log_id(2_009)));
}

#[test]
fn a_state_of_a_newer_format_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    drop(Machine::open(dir.path()).unwrap());
    let path = dir.path().join("state/00000000");
    let newer = SledStores.open(&path).unwrap();
    let format = (super::mover::FORMAT + 1).to_le_bytes().to_vec();
    newer
        .write(&[(RowKey::from_slice(b"f"), Some(format))].into())
        .unwrap();
    newer.flush().unwrap();
    drop(newer);
    let refused = Machine::open(dir.path()).unwrap_err().to_string();
    assert!(refused.contains("format 3"), "{refused}");
    assert!(refused.contains("newer version"), "{refused}");
    assert!(path.exists());
    assert!(!dir.path().join("state/damaged-00000000").exists());
}

#[test]
fn a_block_that_is_not_what_it_was_is_found_at_open() {
    let store = Arc::new(MemoryStore::default());
    let kv = Rows::open_on(store.clone(), 0, true).unwrap();
    let row = |n: u16| (RowKey::from_slice(&n.to_be_bytes()), Some(vec![1; 50]));
    kv.commit((0..2_000).map(row).collect());
    kv.flush().unwrap();
    let mut names = Vec::new();
    let gather = |name: &[u8], page: &[u8]| {
        names.push((RowKey::from_slice(name), page.to_vec()));
        Ok(true)
    };
    scan(store.as_ref(), &[], gather).unwrap();
    for (name, page) in names {
        let mut flipped = page.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 4;
        for harmed in [Some(flipped), None] {
            if *name == *b"f" && harmed.is_none() {
                // Without it, it is taken for one of the first format, whose rows will not be ones.
                continue;
            }
            store.write(&[(name.clone(), harmed)].into()).unwrap();
            let opened = Rows::open_on(store.clone(), 0, true);
            let lost_root = name.starts_with(b"r") && store.get(&name).unwrap().is_none();
            match opened {
                Err(_) => {}
                Ok(kv) => assert!(lost_root && all(&kv).is_empty(), "{name:?} harmed"),
            }
            store
                .write(&[(name.clone(), Some(page.clone()))].into())
                .unwrap();
        }
    }
}
