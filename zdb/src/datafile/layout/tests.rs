#![expect(clippy::unwrap_used, reason = "tests")]

use super::{LARGE_BYTES, Layout, PAGE, PAGE_BYTES};
use crate::datafile::tests::{HEADER, path, payloads, sim};
use crate::datafile::{Datafile, FrameParts, ScanReport, Tail};
use crate::media::{DiskMedia, Fault, Media, OpenMode};
use proptest::prelude::{ProptestConfig, any, prop, proptest};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Bytes at an address that is `residue` modulo a page.
struct Placed {
    memory: Vec<u8>,
    range: Range<usize>,
}

impl Placed {
    fn new(bytes: usize, residue: usize, seed: u8) -> Self {
        let mut memory = vec![0; bytes + PAGE_BYTES];
        let from = residue.wrapping_sub(memory.as_ptr().addr()) % PAGE_BYTES;
        let range = from..from + bytes;
        for (at, byte) in memory[range.clone()].iter_mut().enumerate() {
            *byte = seed.wrapping_add((at % 251).to_le_bytes()[0]);
        }
        Self { memory, range }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.range.clone()]
    }
}

fn frame<'a>(prefix: &'a [u8], parts: &'a [&'a [u8]]) -> FrameParts<'a> {
    FrameParts {
        kind: 1,
        prefix,
        parts,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_large_value_is_moved_to_where_memory_and_file_agree(
        begin in 8..4_000_u64, prefix in 0..300_usize, residue in 0..PAGE_BYTES, bytes in (LARGE_BYTES - 2)..(LARGE_BYTES + 9_000),
    ) {
        let begin = begin * 8;
        let value = Placed::new(bytes, residue, 1);
        let (prefix, parts) = (vec![7; prefix], [value.bytes()]);
        let frame = frame(&prefix, &parts);
        let mut layout = Layout::new(begin, 1, 0, true);
        layout.push(&frame, None).unwrap();
        let placed = &layout.placed[0];
        assert_eq!(placed.offset % 8, 0);
        let moved = placed.offset - begin;
        assert!(moved == 0 || (32..PAGE + 32).contains(&moved));
        let can = bytes >= LARGE_BYTES && residue % 8 == prefix.len() % 8;
        assert_eq!(placed.direct.is_some(), can);
        let Some(pages) = &placed.direct else {
            assert_eq!(moved, 0);
            return Ok(());
        };
        let at = placed.offset + 32 + (prefix.len() + pages.start) as u64;
        assert_eq!(at % PAGE, 0);
        assert_eq!(value.bytes()[pages.clone()].as_ptr().addr() % PAGE_BYTES, 0);
        assert_eq!(pages.len() % PAGE_BYTES, 0);
        assert!(pages.start < PAGE_BYTES && bytes - pages.end < PAGE_BYTES);
    }

    #[test]
    fn a_flipped_bit_in_what_moves_a_value_harms_nobody(at in 0..PAGE, bit in 0..8_u32, residue in 0..PAGE_BYTES) {
        let (sim, media) = sim();
        let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
        let value = Placed::new(LARGE_BYTES, residue / 8 * 8, 3);
        let parts = [value.bytes()];
        let offsets = append(&mut datafile, &[frame(&[], &parts)]).unwrap();
        datafile.mark().unwrap();
        let void = 64..offsets[0];
        if void.is_empty() {
            return Ok(());
        }
        sim.flip(path(), void.start + at % (void.end - void.start), 1 << bit);
        drop(datafile);
        let (datafile, report) = Datafile::open(&media, path(), HEADER).unwrap();
        assert_eq!((report.frames, report.torn_bytes_cut, report.damaged.len()), (1, 0, 0));
        assert_eq!(payloads(&datafile), [value.bytes().to_vec()]);
    }

    #[test]
    fn values_come_back_wherever_they_lie_in_memory(
        values in prop::collection::vec((0..40_usize, prop::bool::ANY, 0..PAGE_BYTES, any::<u8>()), 1..6), batches in 1..3_usize,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let media: Arc<dyn Media> = Arc::new(DiskMedia);
        let path = dir.path().join("f");
        let mut datafile = Datafile::create(&media, &path, HEADER).unwrap();
        let values: Vec<(Vec<u8>, Placed)> = values
            .into_iter()
            .map(|(prefix, large, residue, seed)| {
                let bytes = if large { LARGE_BYTES + residue } else { residue };
                // Half of them agree.
                let residue = if seed % 2 == 0 { residue } else { residue / 8 * 8 + prefix % 8 };
                (vec![seed; prefix], Placed::new(bytes, residue, seed))
            })
            .collect();
        let parts: Vec<[&[u8]; 1]> = values.iter().map(|(_, value)| [value.bytes()]).collect();
        let frames: Vec<_> = values.iter().zip(&parts).map(|((prefix, _), parts)| frame(prefix, parts)).collect();
        for batch in frames.chunks(batches) {
            append(&mut datafile, batch).unwrap();
            datafile.sync().unwrap();
        }
        let wanted: Vec<Vec<u8>> =
            values.iter().map(|(prefix, value)| [prefix, value.bytes()].concat()).collect();
        assert_eq!(payloads(&datafile), wanted);
        drop(datafile);
        let (datafile, report) = Datafile::open(&media, &path, HEADER).unwrap();
        assert_eq!((report.frames, report.torn_bytes_cut, report.damaged.len()), (values.len() as u64, 0, 0));
        assert_eq!(payloads(&datafile), wanted);
    }
}

fn append(
    datafile: &mut Datafile,
    frames: &[FrameParts<'_>],
) -> Result<Vec<u64>, crate::datafile::DatafileError> {
    let crcs: Vec<u32> = frames
        .iter()
        .map(|frame| crc32fast::hash(frame.parts[0]))
        .collect();
    datafile.append_summed(frames, &crcs)
}

/// Where it is not known of the filesystem, this shows only that the value is there.
#[test]
fn a_large_value_takes_no_page_of_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let media: Arc<dyn Media> = Arc::new(DiskMedia);
    let path = dir.path().join("f");
    let mut datafile = Datafile::create(&media, &path, HEADER).unwrap();
    let value = Placed::new(1 << 20, 0, 9);
    let parts = [value.bytes()];
    let offsets = append(&mut datafile, &[frame(&[], &parts)]).unwrap();
    datafile.sync().unwrap();
    let file = media.open(&path, OpenMode::Read).unwrap();
    let mut page = [0; 4096];
    let begin = offsets[0] + 32;
    assert_eq!(begin % PAGE, 0);
    let mut cached = |at: u64| matches!(file.read_cached_at(&mut page, at), Ok(Some(4096)));
    // What was written through the cache says whether this kernel tells what is in it.
    if is_known(&path) && cached(begin - PAGE) {
        assert!((1..255).all(|number| !cached(begin + number * PAGE)));
    }
    assert_eq!(payloads(&datafile), [value.bytes().to_vec()]);
}

/// A filesystem of which it is known that it keeps nothing of what goes past its cache.
fn is_known(path: &Path) -> bool {
    use nix::sys::statfs::{EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, statfs};
    let known = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC];
    statfs(path).is_ok_and(|found| known.contains(&found.filesystem_type()))
}

#[test]
fn a_disk_that_is_full_in_the_middle_of_a_large_value_leaves_nothing_behind() {
    let (sim, media) = sim();
    let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
    let value = Placed::new(LARGE_BYTES, 0, 5);
    let parts = [value.bytes()];
    let before = datafile.len();
    for capacity in [10, 5_000, LARGE_BYTES as u64] {
        sim.inject(Fault::Capacity(capacity));
        let full = append(&mut datafile, &[frame(&[], &parts)]).unwrap_err();
        assert!(full.is_disk_full());
        assert_eq!(datafile.len(), before);
    }
    sim.inject(Fault::Healthy);
    append(&mut datafile, &[frame(&[], &parts)]).unwrap();
    datafile.sync().unwrap();
    drop(datafile);
    let (datafile, _) = Datafile::open(&media, path(), HEADER).unwrap();
    assert_eq!(payloads(&datafile), [value.bytes().to_vec()]);
}

/// Small and large values in turns, a crash at every operation: what was synced is there, and what else is there is whole.
#[test]
fn a_crash_anywhere_leaves_large_values_whole_or_out() {
    let values: Vec<Placed> = (0..6_u8)
        .map(|number| Placed::new(if number % 3 == 0 { 900 } else { LARGE_BYTES }, 16, number))
        .collect();
    for crash in 0..30 {
        for (seed, tail) in [(1, Tail::Keep), (2, Tail::Cut), (3, Tail::Keep)] {
            let (sim, media) = sim();
            let mut datafile = Datafile::create(&media, path(), HEADER).unwrap();
            sim.inject(Fault::CrashAfter(crash));
            let mut synced = 0;
            for (number, value) in values.iter().enumerate() {
                let parts = [value.bytes()];
                if append(&mut datafile, &[frame(&[], &parts)]).is_err() {
                    break;
                }
                if number % 2 == 1 {
                    if datafile.sync().is_err() {
                        break;
                    }
                    synced = number + 1;
                }
            }
            let after: Arc<dyn Media> = Arc::new(sim.restart(seed));
            for _ in 0..2 {
                let (datafile, report) = reopen(&after, tail);
                let found = payloads(&datafile);
                assert!(
                    report.damaged.is_empty(),
                    "crash {crash} seed {seed}: {report:?}"
                );
                let all: Vec<_> = values.iter().map(|value| value.bytes().to_vec()).collect();
                assert!(
                    found.starts_with(&all[..synced]),
                    "crash {crash} seed {seed}"
                );
                assert!(found.iter().all(|value| all.contains(value)));
            }
        }
    }
}

fn reopen(media: &Arc<dyn Media>, tail: Tail) -> (Datafile, ScanReport) {
    Datafile::open_visiting(media, path(), HEADER, tail, &mut |_| {}).unwrap()
}
