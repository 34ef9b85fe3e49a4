#![expect(clippy::unwrap_used, reason = "tests")]

use super::{Datafile, DatafileError, DatafileHeader, FrameParts, ScanReport, Tail};
use crate::media::{DiskMedia, Fault, Media, SimMedia};
use proptest::prelude::{ProptestConfig, any, prop, proptest};
use std::path::Path;
use std::sync::Arc;

pub(super) const HEADER: DatafileHeader = DatafileHeader {
    purpose: *b"TEST",
    id: 7,
};

pub(super) fn sim() -> (SimMedia, Arc<dyn Media>) {
    let sim = SimMedia::new();
    sim.create_dir_all(Path::new("/d")).unwrap();
    (sim.clone(), Arc::new(sim))
}

pub(super) fn path() -> &'static Path {
    Path::new("/d/f")
}

pub(super) fn payloads(datafile: &Datafile) -> Vec<Vec<u8>> {
    datafile
        .frames(0)
        .filter_map(Result::ok)
        .map(|frame| frame.payload.to_vec())
        .collect()
}

fn reopen(media: &Arc<dyn Media>) -> (Datafile, ScanReport) {
    Datafile::open(media, path(), HEADER).unwrap()
}

#[test]
fn frames_come_back_in_order_from_a_real_disk() {
    let dir = tempfile::tempdir().unwrap();
    let media: Arc<dyn Media> = Arc::new(DiskMedia);
    let path = dir.path().join("f");
    let mut datafile = Datafile::create(&media, &path, HEADER).unwrap();
    datafile.preallocate(1 << 16).unwrap();
    let first = datafile.append(1, &[b"hello ", b"world"]).unwrap();
    let second = datafile.append(2, &[&[9; 5000]]).unwrap();
    datafile.sync().unwrap();
    assert_eq!(&datafile.read(first).unwrap().payload[..], b"hello world");
    assert_eq!(datafile.read(second).unwrap().kind, 2);
    drop(datafile);
    let (datafile, report) = Datafile::open(&media, &path, HEADER).unwrap();
    assert_eq!((report.frames, report.torn_bytes_cut), (2, 0));
    assert_eq!(
        payloads(&datafile),
        [b"hello world".to_vec(), vec![9; 5000]]
    );
}

#[test]
fn another_file_is_refused() {
    let (_, media) = sim();
    Datafile::create(&media, path(), HEADER).unwrap();
    let other = DatafileHeader { id: 8, ..HEADER };
    let refused = Datafile::open(&media, path(), other);
    assert!(matches!(refused, Err(DatafileError::Foreign { .. })));
}

#[test]
fn damage_in_the_middle_is_reported_and_the_rest_is_read() {
    let (sim, media) = sim();
    let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
    let mut offsets = Vec::new();
    for value in 0..3_u8 {
        let parts: &[&[u8]] = &[&[value; 100]];
        let frame = FrameParts {
            kind: 1,
            prefix: b"name",
            parts,
        };
        offsets.extend(datafile.append_batch(&[frame]).unwrap());
        datafile.sync().unwrap();
    }
    sim.flip(path(), offsets[1] + 60, 4);
    assert!(matches!(
        datafile.read(offsets[1]),
        Err(DatafileError::Damaged { .. })
    ));
    drop(datafile);
    let (datafile, report) = reopen(&media);
    assert_eq!(report.torn_bytes_cut, 0);
    assert_eq!(report.damaged.len(), 1);
    assert_eq!(report.damaged[0].offset, offsets[1]);
    assert_eq!(report.damaged[0].prefix.as_deref(), Some(&b"name"[..]));
    assert_eq!(payloads(&datafile).len(), 2);
    assert_eq!(datafile.frames(0).filter(Result::is_err).count(), 1);
}

#[test]
fn a_lost_header_of_a_frame_does_not_lose_the_frames_behind_it() {
    let (sim, media) = sim();
    let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
    let first = datafile.append(1, &[&[1; 100]]).unwrap();
    datafile.sync().unwrap();
    // A copy of a whole frame inside a payload must not be taken for a frame.
    let copy = sim.contents(path()).unwrap()[usize::try_from(first).unwrap()..].to_vec();
    let second = datafile.append(1, &[&[0; 8], &copy]).unwrap();
    datafile.sync().unwrap();
    datafile.append(1, &[&[3; 100]]).unwrap();
    datafile.mark().unwrap();
    sim.flip(path(), second + 5, 1);
    drop(datafile);
    let (datafile, report) = reopen(&media);
    assert_eq!(report.damaged.len(), 1);
    assert_eq!(payloads(&datafile), [vec![1; 100], vec![3; 100]]);
}

#[test]
fn rot_in_the_last_frame_of_a_marked_file_is_damage_not_a_torn_tail() {
    let (sim, media) = sim();
    let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
    let last = datafile.append(1, &[&[1; 100]]).unwrap();
    datafile.mark().unwrap();
    sim.flip(path(), last + 50, 1);
    drop(datafile);
    let (_, report) = reopen(&media);
    assert_eq!((report.damaged.len(), report.torn_bytes_cut), (1, 0));
}

#[test]
fn an_idle_mark_needs_no_sync_and_stands_once() {
    let (sim, media) = sim();
    let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
    let last = datafile.append(1, &[&[1; 100]]).unwrap();
    datafile.mark_idle().unwrap();
    assert_eq!(
        datafile.frames(0).count(),
        1,
        "nothing is durable yet, nothing is marked"
    );
    datafile.sync().unwrap();
    let before = datafile.len();
    datafile.mark_idle().unwrap();
    datafile.mark_idle().unwrap();
    assert_eq!(datafile.len(), before + 32);
    sim.flip(path(), last + 50, 1);
    drop(datafile);
    assert_eq!(reopen(&media).1.damaged.len(), 1);
}

#[test]
fn one_copy_of_the_file_header_is_enough() {
    let (sim, media) = sim();
    let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
    datafile.append(1, &[b"x"]).unwrap();
    datafile.sync().unwrap();
    drop(datafile);
    sim.flip(path(), 26, 1);
    assert_eq!(reopen(&media).1.frames, 1);
    sim.flip(path(), 58, 1);
    assert!(matches!(
        Datafile::open(&media, path(), HEADER),
        Err(DatafileError::NoHeader {
            never_born: false,
            ..
        })
    ));
}

#[test]
fn a_failed_sync_stops_the_file() {
    let (sim, media) = sim();
    let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
    datafile.append(1, &[b"x"]).unwrap();
    sim.inject(Fault::FailSync(0));
    assert!(matches!(datafile.sync(), Err(DatafileError::Io { .. })));
    assert!(matches!(
        datafile.sync(),
        Err(DatafileError::Stopped { .. })
    ));
    assert!(matches!(
        datafile.append(1, &[b"y"]),
        Err(DatafileError::Stopped { .. })
    ));
}

/// A fault that was to come must not outlive the end of all faults: a simulated node that was down meanwhile would meet it when it starts.
#[test]
fn a_healthy_disk_fails_no_sync_that_was_to_fail() {
    let (sim, media) = sim();
    let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
    sim.inject(Fault::FailSync(0));
    sim.inject(Fault::CrashAfter(0));
    sim.inject(Fault::Healthy);
    datafile.append(1, &[b"x"]).unwrap();
    datafile.sync().unwrap();
    assert!(!sim.crashed());
}

#[test]
fn a_full_disk_leaves_nothing_behind_and_later_there_is_room() {
    let (sim, media) = sim();
    let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
    datafile.append(1, &[b"x"]).unwrap();
    sim.inject(Fault::Capacity(1000));
    let before = datafile.len();
    let full = datafile.append(1, &[&[1; 2000]]).unwrap_err();
    assert!(full.is_disk_full());
    assert_eq!(datafile.len(), before);
    sim.inject(Fault::Healthy);
    datafile.append(1, &[&[1; 2000]]).unwrap();
    datafile.sync().unwrap();
    drop(datafile);
    assert_eq!(reopen(&media).1.frames, 2);
}

/// Append batches, sync after each, crash at every operation: what was synced is there, what remains is a prefix.
#[test]
fn a_crash_anywhere_leaves_a_prefix_with_everything_synced() {
    for crash in 0..40 {
        for seed in 0..8 {
            let (sim, media) = sim();
            let Ok(mut datafile) = Datafile::create(&media, path(), HEADER) else {
                unreachable!("no fault is injected yet")
            };
            datafile
                .preallocate(if seed % 2 == 0 { 8192 } else { 0 })
                .unwrap();
            sim.inject(Fault::CrashAfter(crash));
            let mut appended = Vec::new();
            let mut synced = 0;
            'work: for batch in 0..10_u8 {
                for frame in 0..3_u8 {
                    let payload = vec![batch * 3 + frame; 300 + 211 * usize::from(frame)];
                    if datafile.append(1, &[&payload]).is_err() {
                        break 'work;
                    }
                    appended.push(payload);
                }
                if datafile.sync().is_err() {
                    break;
                }
                synced = appended.len();
            }
            let after: Arc<dyn Media> = Arc::new(sim.restart(seed));
            for _ in 0..2 {
                let (datafile, report) = reopen(&after);
                let found = payloads(&datafile);
                assert!(
                    report.damaged.is_empty(),
                    "crash {crash} seed {seed}: {report:?}"
                );
                assert!(found.len() >= synced, "crash {crash} seed {seed}");
                // One more than was reported appended may be there: the one during which the crash came.
                for (index, payload) in found.iter().enumerate() {
                    assert!(appended.get(index).is_none_or(|wanted| wanted == payload));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_after_the_header_never_yield_a_frame_or_a_panic(
        garbage in prop::collection::vec(any::<u8>(), 0..4000), keep in any::<bool>(),
    ) {
        let (sim, media) = sim();
        drop(Datafile::create(&media, path(), HEADER).unwrap());
        let file = sim.open(path(), crate::media::OpenMode::ReadWrite).unwrap();
        file.write_all_at(&garbage, 64).unwrap();
        let tail = if keep { Tail::Keep } else { Tail::Cut };
        let mut shown = 0;
        let (datafile, report) =
            Datafile::open_visiting(&media, path(), HEADER, tail, &mut |_| shown += 1).unwrap();
        assert_eq!((shown, report.frames, datafile.frames(0).count()), (0, 0, 0));
    }

    #[test]
    fn a_flipped_bit_never_changes_what_is_read(
        sizes in prop::collection::vec(0..700_usize, 1..12), at in any::<prop::sample::Index>(), bit in 0..8_u32,
    ) {
        let (sim, media) = sim();
        let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
        let mut wanted = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            let payload = vec![u8::try_from(index).unwrap(); *size];
            datafile.append(1, &[&payload]).unwrap();
            datafile.sync().unwrap();
            wanted.push(payload);
        }
        datafile.mark().unwrap();
        let length = usize::try_from(datafile.len()).unwrap();
        drop(datafile);
        sim.flip(path(), at.index(length) as u64, 1 << bit);
        for _ in 0..2 {
            let (datafile, report) = reopen(&media);
            let found = payloads(&datafile);
            assert!(found.iter().all(|payload| wanted.contains(payload)));
            assert!(found.len() + 1 >= wanted.len());
            assert_eq!(found.len() + report.damaged.len(), wanted.len());
        }
    }
}
