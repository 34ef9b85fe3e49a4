#![expect(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::fixture::record;
use proptest::prelude::*;

const BACKEND: BackendId = BackendId(7);

fn settings(interval_ms: u64, bytes_per_s: u64) -> Event {
    Event::Settings {
        interval_ms,
        bytes_per_s,
    }
}

#[test]
fn a_tour_begins_one_interval_after_the_last() {
    let cursor = Cursor {
        last_scrub_ms: 1_000,
        since_ms: 1,
        ..Cursor::default()
    };
    let mut tour = Tour::new(BACKEND, cursor);
    let actions = tour.step(1_500, settings(1_000, 0));
    assert_eq!(
        actions,
        vec![Action::Wait {
            until_ms: Some(2_000)
        }]
    );
    assert_eq!(tour.percent(1), None);
    let actions = tour.step(2_000, Event::Tick);
    assert!(matches!(actions.last(), Some(Action::FetchPage { .. })));
    assert_eq!(tour.percent(1), Some(0));
}

#[test]
fn an_unreachable_metad_pauses_the_tour_and_neither_sweeps_nor_ends_it() {
    let mut tour = Tour::new(BACKEND, Cursor::default());
    tour.step(0, settings(0, 0));
    let mut now = 10;
    tour.step(now, Event::Ordered);
    for _ in 0..20 {
        let actions = tour.step(now, Event::Unavailable);
        let Some(Action::Wait {
            until_ms: Some(until),
        }) = actions.last()
        else {
            panic!("{actions:?}")
        };
        assert!(*until > now && *until <= now + RETRY_MS_MAX);
        now = *until;
        assert!(matches!(
            tour.step(now, Event::Tick).last(),
            Some(Action::FetchPage { .. })
        ));
    }
    assert!(tour.cursor().touring);
    assert_eq!(tour.cursor().last_scrub_ms, 0);
}

#[test]
fn an_order_during_a_tour_reads_everything_again() {
    let mut tour = Tour::new(BACKEND, Cursor::default());
    tour.step(1, Event::Ordered);
    tour.step(2, Event::Page(vec![(record(1, 4), 0), (record(2, 4), 0)]));
    tour.step(
        3,
        Event::Checked {
            bytes: 5,
            finding: None,
        },
    );
    assert_eq!(tour.step(4, Event::Ordered), vec![]);
    let actions = tour.step(
        5,
        Event::Checked {
            bytes: 5,
            finding: None,
        },
    );
    let start = (VolumeId::from_bytes([0; 16]), DatafileId(0));
    assert_eq!(actions.last(), Some(&Action::FetchPage { after: start }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Naive model: every datafile held, in order, once per tour, whatever fails and restarts in between.
    #[test]
    fn a_tour_reads_every_shard_once_and_reports_what_is_bad(
        shards in prop::collection::btree_set((1..40u64, 0..2u32), 0..30),
        bad in prop::collection::btree_set((1..40u64, 0..2u32), 0..10),
        page_datafiles in 1..5usize,
        failures in prop::collection::vec(any::<bool>(), 0..40),
        restart_at in prop::option::of(0..60usize),
        bytes_per_s in prop_oneof![Just(0u64), 1..2_000u64],
    ) {
        let mut failures = failures.into_iter();
        let mut tour = Tour::new(BACKEND, Cursor::default());
        let mut saved = Cursor::default();
        let mut now = 1u64;
        let mut checked = Vec::new();
        let mut reported = Vec::new();
        let mut read_bytes = 0u64;
        let mut actions = tour.step(now, settings(0, bytes_per_s));
        actions.extend(tour.step(now, Event::Ordered));
        let began = now;
        let mut restarted = false;
        for turn in 0..2_000 {
            for action in &actions {
                match action {
                    Action::Save(cursor) => saved = cursor.clone(),
                    Action::Report(report) => reported.push((report.datafile.0, report.shard)),
                    _ => {}
                }
            }
            if restart_at == Some(turn) && saved.touring {
                tour = Tour::new(BACKEND, saved.clone());
                actions = tour.step(now, settings(0, bytes_per_s));
                restarted = true;
            }
            let event = match actions.iter().rev().find(|action| !matches!(action, Action::Save(_) | Action::Report(_))).unwrap() {
                Action::FetchPage { .. } | Action::Check { .. } | Action::Sweep if failures.next() == Some(true) => Event::Unavailable,
                Action::FetchPage { after } => {
                    let mut datafiles: Vec<u64> = shards.iter().map(|(datafile, _)| *datafile)
                        .filter(|datafile| tour.cursor().volume.is_none() || *datafile > after.1.0).collect();
                    datafiles.dedup();
                    datafiles.truncate(page_datafiles);
                    Event::Page(shards.iter().filter(|(datafile, _)| datafiles.contains(datafile)).map(|(datafile, shard)| (record(*datafile, 4), *shard)).collect())
                }
                Action::Check { record, shard } => {
                    let place = (record.datafile.0, *shard);
                    if bytes_per_s > 0 && !restarted && failures.len() == 0 {
                        prop_assert!((now - began) * bytes_per_s / 1_000 + 1 >= read_bytes.saturating_sub(1_000) || read_bytes <= 1_000);
                    }
                    read_bytes += 1_000;
                    checked.push(place);
                    Event::Checked { bytes: 1_000, finding: bad.contains(&place).then_some(ShardState::Corrupt) }
                }
                Action::Sweep => Event::Swept,
                Action::Wait { until_ms: None } => break,
                Action::Wait { until_ms: Some(until) } => { now = now.max(*until); Event::Tick }
                other => unreachable!("{other:?}"),
            };
            now += 1;
            actions = tour.step(now, event);
        }
        prop_assert!(!tour.cursor().touring, "the tour did not end");
        prop_assert!(tour.cursor().last_scrub_ms > 0);
        let all: Vec<(u64, u32)> = shards.iter().copied().collect();
        if restarted {
            // Since the last saved cursor shards may be read twice, none is left out.
            checked.sort_unstable();
            checked.dedup();
        }
        prop_assert_eq!(&checked, &all);
        reported.sort_unstable();
        reported.dedup();
        let wanted: Vec<(u64, u32)> = shards.intersection(&bad).copied().collect();
        if !restarted { prop_assert_eq!(reported, wanted); }
    }
}
