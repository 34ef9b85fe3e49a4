//! The store against crashes, full disks and rot.

#![expect(clippy::unwrap_used, reason = "tests")]

use super::open::{OpenContext, OpenError, Opened, open};
use super::*;
use crate::ports::DataExtent;
use proptest::prelude::*;
use qsfs_zdb::media::{Fault, SimMedia};
use std::time::Instant;

/// A journal record of the tests: its sequence and the data it names.
fn record(sequence: u64, extents: &[DataExtent]) -> Vec<u8> {
    serde_json::to_vec(&(sequence, extents)).unwrap()
}

fn parse(record: &[u8]) -> (u64, Vec<DataExtent>) {
    serde_json::from_slice(record).unwrap()
}

fn settings() -> StoreSettings {
    StoreSettings {
        datafile_bytes: 20_000,
        // The tests seal and sync themselves.
        push_interval: Duration::from_secs(3600),
        sync_interval: Duration::from_secs(3600),
        journal_bytes: 1 << 20,
    }
}

fn open_on(sim: &SimMedia) -> Result<Opened, OpenError> {
    let context = OpenContext {
        settings: settings(),
        last_known_id: DatafileId(0),
        committed: &|_| false,
        extents: &|record| {
            serde_json::from_slice::<(u64, Vec<DataExtent>)>(record)
                .map(|(_, extents)| extents)
                .map_err(|error| error.to_string())
        },
    };
    open(Arc::new(sim.clone()), StateDir::new("/state"), context)
}

/// All records of all sealed journals, in order.
fn records(store: &LocalStore) -> Vec<(u64, Vec<DataExtent>)> {
    let mut found = Vec::new();
    for file in store.catalog().at(Stream::Meta, Stage::Sealed) {
        let path = store.path_of(&file);
        let header = append::meta_header(file.name.id);
        let mut visit = |frame: qsfs_zdb::datafile::FrameView<'_>| found.push(parse(frame.payload));
        qsfs_zdb::datafile::Datafile::inspect(store.media(), &path, header, &mut visit).unwrap();
    }
    found
}

fn contents(sequence: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64)
        .map(|at| (sequence * 31 + at * 7).to_le_bytes()[0] ^ (at / 256).to_le_bytes()[0])
        .collect()
}

fn read(store: &LocalStore, extents: &[DataExtent]) -> Vec<u8> {
    let mut all = Vec::new();
    for extent in extents {
        let mut buf = vec![0; extent.bytes as usize];
        assert!(
            store
                .read_data(extent.datafile, extent.offset, &mut buf)
                .unwrap(),
            "local"
        );
        all.extend_from_slice(&buf);
    }
    all
}

#[derive(Debug, Clone)]
enum Step {
    Write(usize),
    Sync,
    Rotate,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1_usize..9_000).prop_map(Step::Write),
        2 => Just(Step::Sync),
        1 => Just(Step::Rotate),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Power fails at any moment: what is there is a prefix of what was done, at least up to the last sync, and every
    /// byte of it reads back.
    #[test]
    fn after_a_power_cut_there_is_a_prefix(steps in steps(), after in 0_u64..160, seed in any::<u64>()) {
        let sim = SimMedia::new();
        let store = open_on(&sim).unwrap().store;
        sim.inject(Fault::CrashAfter(after));
        let mut sizes = Vec::new();
        let mut synced = 0;
        for step in steps {
            match step {
                Step::Write(bytes) => {
                    let sequence = sizes.len() as u64;
                    let Ok(extents) = store.append_data(&contents(sequence, bytes)) else { break };
                    if store.append_journal(&record(sequence, &extents)).is_err() {
                        break;
                    }
                    sizes.push(bytes);
                    // The keeper may meet the power cut in between.
                    let mut all = vec![0; extents[0].bytes as usize];
                    match store.read_data(extents[0].datafile, extents[0].offset, &mut all) {
                        Ok(local) => prop_assert!(local && contents(sequence, bytes).starts_with(&all)),
                        Err(error) => prop_assert!(sim.crashed(), "{error}"),
                    }
                }
                Step::Sync => match store.sync() {
                    Ok(()) => synced = sizes.len(),
                    Err(_) => break,
                },
                Step::Rotate => {
                    store.rotate();
                    if store.wait_sealed(Instant::now() + Duration::from_secs(20)).is_err() {
                        break;
                    }
                }
            }
        }
        store.stop();
        let after = sim.restart(seed);
        for _ in 0..2 {
            let opened = open_on(&after).unwrap();
            let found = records(&opened.store);
            prop_assert!(found.len() >= synced, "{} records, {} were synced: {:?}", found.len(), synced, opened.report);
            for (at, (sequence, extents)) in found.iter().enumerate() {
                prop_assert_eq!(at as u64, *sequence, "a prefix");
                // The record in flight when the power failed may be there too.
                if let Some(bytes) = sizes.get(at) {
                    prop_assert_eq!(read(&opened.store, extents), contents(*sequence, *bytes));
                }
            }
            // Once more: opening changed nothing that the next opening would see otherwise.
            opened.store.stop();
        }
    }
}

#[derive(Debug, Clone)]
enum Harm {
    Flip,
    Cut,
    Remove,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// The process was killed, then a local file was harmed: either opening names it, or everything that was synced is there, and a
    /// byte that cannot be right is an error. A cut or flipped `.open` datafile once took what was synced with it, without a word.
    #[test]
    fn harm_after_a_kill_never_costs_what_was_synced_in_silence(
        steps in steps(),
        harm in prop_oneof![Just(Harm::Flip), Just(Harm::Cut), Just(Harm::Remove)],
        which in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
    ) {
        let sim = SimMedia::new();
        let store = open_on(&sim).unwrap().store;
        let mut sizes = Vec::new();
        let mut synced = 0;
        for step in steps {
            match step {
                Step::Write(bytes) => {
                    let sequence = sizes.len() as u64;
                    let extents = store.append_data(&contents(sequence, bytes)).unwrap();
                    store.append_journal(&record(sequence, &extents)).unwrap();
                    sizes.push(bytes);
                }
                Step::Sync => {
                    store.sync().unwrap();
                    synced = sizes.len();
                }
                Step::Rotate => {
                    store.rotate();
                    prop_assert!(store.wait_sealed(Instant::now() + Duration::from_secs(20)).unwrap());
                    synced = sizes.len();
                }
            }
        }
        store.stop();
        let media: Arc<dyn Media> = Arc::new(sim.clone());
        let dir = StateDir::new("/state").datafiles();
        let names = media.list(&dir).unwrap();
        prop_assume!(!names.is_empty());
        let path = dir.join(which.get(&names));
        let bytes = sim.contents(&path).unwrap().len();
        match harm {
            Harm::Flip if bytes > 0 => sim.flip(&path, at.index(bytes) as u64, 0x10),
            Harm::Flip => {}
            Harm::Cut => {
                let file = media.open(&path, qsfs_zdb::media::OpenMode::ReadWrite).unwrap();
                file.truncate(at.index(bytes.max(1)) as u64).unwrap();
            }
            Harm::Remove => media.remove(&path).unwrap(),
        }
        let opened = match open_on(&sim) {
            Ok(opened) => opened,
            Err(error) => {
                let said = error.to_string();
                // A file that is gone is named by what it was when it was needed last.
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                prop_assert!(said.contains(&name[..21]) && said.contains("recovery kit"), "{said}");
                return Ok(());
            }
        };
        let found = records(&opened.store);
        // A sealed journal that is gone leaves a gap, which replay refuses.
        let gap = found.iter().enumerate().any(|(at, (sequence, _))| at as u64 != *sequence);
        let removed_sealed = matches!(harm, Harm::Remove) && path.to_string_lossy().ends_with("meta.sealed");
        prop_assert!(found.len() >= synced || removed_sealed, "{} records, {synced} were synced: {:?}", found.len(), opened.report);
        prop_assert!(!gap || removed_sealed, "a prefix");
        for (sequence, extents) in &found {
            let wanted = contents(*sequence, sizes[usize::try_from(*sequence).unwrap()]);
            let mut from = 0;
            for extent in extents {
                let mut buf = vec![0; extent.bytes as usize];
                // Damaged is an answer, wrong bytes are not.
                if let Ok(local) = opened.store.read_data(extent.datafile, extent.offset, &mut buf) {
                    prop_assert!(local && buf == wanted[from..from + buf.len()], "operation {sequence}");
                }
                from += buf.len();
            }
        }
        opened.store.stop();
    }
}

#[test]
fn a_store_goes_on_after_a_clean_end() {
    let sim = SimMedia::new();
    let mut all = Vec::new();
    for round in 0..3_u64 {
        let opened = open_on(&sim).unwrap();
        for (at, extents) in records(&opened.store) {
            assert_eq!(read(&opened.store, &extents), contents(at, 30_000));
        }
        assert_eq!(records(&opened.store).len() as u64, round);
        let extents = opened.store.append_data(&contents(round, 30_000)).unwrap();
        assert!(extents.len() == 2, "split over a seal");
        opened
            .store
            .append_journal(&record(round, &extents))
            .unwrap();
        opened.store.sync().unwrap();
        all.extend(extents);
        opened.store.stop();
    }
    let ids: Vec<_> = all.iter().map(|extent| extent.datafile).collect();
    assert!(ids.is_sorted());
}

#[test]
fn a_failed_fsync_stops_the_store_and_says_so() {
    let sim = SimMedia::new();
    let store = open_on(&sim).unwrap().store;
    let extents = store.append_data(&[1; 100]).unwrap();
    store.append_journal(&record(0, &extents)).unwrap();
    sim.inject(Fault::FailSync(0));
    assert!(store.sync().is_err());
    assert!(store.append_data(&[1; 100]).is_err() && store.sync().is_err());
    assert!(store.failure().unwrap().contains("mounted again"));
    store.stop();
}

#[test]
fn rot_in_what_is_not_committed_is_an_error_that_says_what_to_do() {
    let sim = SimMedia::new();
    let store = open_on(&sim).unwrap().store;
    let extents = store.append_data(&contents(0, 15_000)).unwrap();
    store.append_journal(&record(0, &extents)).unwrap();
    store.rotate();
    assert!(
        store
            .wait_sealed(Instant::now() + Duration::from_secs(20))
            .unwrap()
    );
    let file = store.catalog().at(Stream::Data, Stage::Sealed).remove(0);
    sim.flip(&store.path_of(&file), 5_000, 1);
    let mut buf = vec![0; 15_000];
    let error = store.read_data(file.name.id, 0, &mut buf).unwrap_err();
    assert!(
        matches!(&error, StoreError::Damaged { offset: 4096, advice, .. } if advice.contains("recovery kit")),
        "{error}"
    );
    // Committed, the shards replace it.
    store.mark_pushed(&[file.name.id]).unwrap();
    assert!(!store.read_data(file.name.id, 0, &mut buf).unwrap());
    assert_eq!(store.counters().damaged_dropped.load(Ordering::Relaxed), 1);
    assert!(store.catalog().get(file.name.id).is_none());
    store.stop();
}

#[test]
fn a_flipped_bit_in_a_journal_is_named_and_nothing_is_changed() {
    let sim = SimMedia::new();
    let store = open_on(&sim).unwrap().store;
    for sequence in 0..10 {
        let extents = store.append_data(&contents(sequence, 10)).unwrap();
        store.append_journal(&record(sequence, &extents)).unwrap();
        store.sync().unwrap();
    }
    store.stop();
    let dir = StateDir::new("/state").datafiles();
    let media: Arc<dyn Media> = Arc::new(sim.clone());
    let names = open::local_names(&media, &StateDir::new("/state")).unwrap();
    let journal = dir.join(
        names
            .iter()
            .find(|name| name.stream == Stream::Meta)
            .unwrap()
            .file_name(),
    );
    sim.flip(&journal, 300, 8);
    let before = sim.contents(&journal);
    let error = open_on(&sim).unwrap_err();
    assert!(
        matches!(&error, OpenError::DamagedJournal { path, .. } if path.contains("meta.open")),
        "{error}"
    );
    assert_eq!(sim.contents(&journal), before);
}

#[test]
fn writers_wait_for_space_and_then_get_enospc() {
    let sim = SimMedia::new();
    let store = open_on(&sim).unwrap().store;
    store.hold_writers(Some("the cache is full of what is not pushed".to_owned()));
    let writer = {
        let store = Arc::clone(&store);
        std::thread::spawn(move || store.append_data(&[7; 10]))
    };
    store.hold_writers(None);
    assert_eq!(writer.join().unwrap().unwrap().len(), 1);
    store.stop();
}

#[test]
fn a_fenced_store_takes_no_writes() {
    let store = open_on(&SimMedia::new()).unwrap().store;
    store.fence(Epoch(9));
    assert!(matches!(
        store.append_data(&[1]),
        Err(StoreError::Fenced(Epoch(9)))
    ));
    assert!(matches!(
        store.append_journal(&[1]),
        Err(StoreError::Fenced(Epoch(9)))
    ));
    store.stop();
}

/// Found by a follower that missed a file: a sync came back before the seal it had waited for was told to the push queue,
/// and so waited for nothing.
#[test]
fn whoever_waits_for_a_seal_finds_it_told() {
    for _ in 0..200 {
        let Opened {
            store, mut events, ..
        } = open_on(&SimMedia::new()).unwrap();
        let extents = store.append_data(&[1; 10]).unwrap();
        store.append_journal(&record(0, &extents)).unwrap();
        store.rotate();
        assert!(
            store
                .wait_sealed(Instant::now() + Duration::from_secs(20))
                .unwrap()
        );
        for _ in 0..2 {
            assert!(matches!(events.try_recv(), Ok(StoreEvent::Sealed(_))));
        }
        store.stop();
    }
}
