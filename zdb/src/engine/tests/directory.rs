//! A directory that is taken away, and a disk that fills up beside the namespace, are noticed although not every commit asks for them.

use super::{
    DIR, Engine, EngineError, EngineOptions, Fault, Media, Namespace, NamespaceOptions, SimMedia,
    datafiles, key, opened, options, set, value,
};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Sets keys until that is refused; why.
fn set_until_refused(namespace: &Namespace) -> EngineError {
    let deadline = Instant::now() + Duration::from_secs(20);
    for round in (0..=u8::MAX).cycle() {
        assert!(Instant::now() < deadline, "it is noticed");
        if let Err(error) = set(namespace, &key(round % 8), &value(900, round)) {
            return error;
        }
    }
    unreachable!("the loop has no end of its own")
}

fn with_reserve(media: &SimMedia, reserve_bytes: u64) -> (Engine, Arc<Namespace>) {
    let options = EngineOptions {
        reserve_bytes,
        ..options(Arc::new(media.clone()))
    };
    let engine = Engine::open(options).unwrap();
    let namespace = engine.add_namespace(NamespaceOptions::new("ns", DIR));
    (engine, namespace.unwrap())
}

#[test]
fn writes_alone_notice_that_the_directory_is_gone() {
    for replaced in [false, true] {
        let media = SimMedia::new();
        let (_engine, namespace) = opened(&media);
        set(&namespace, b"a", b"1").unwrap();
        media.remove_tree(Path::new(DIR));
        if replaced {
            media.create_dir_all(Path::new(DIR)).unwrap();
        }
        let refused = set_until_refused(&namespace);
        assert!(matches!(refused, EngineError::Gone { .. }), "{refused}");
        let again = set(&namespace, b"b", b"2");
        assert!(matches!(again, Err(EngineError::Gone { .. })), "{again:?}");
        // Nothing was begun in what has its name now.
        assert!(!replaced || datafiles(&media).is_empty());
    }
}

#[test]
fn no_datafile_is_begun_in_a_directory_that_is_gone() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    let outcomes: Vec<_> = (0..5)
        .map(|round| {
            if round == 1 {
                media.remove_tree(Path::new(DIR));
                media.create_dir_all(Path::new(DIR)).unwrap();
            }
            // Each fills a datafile.
            set(&namespace, &key(round), &value(4000, round))
        })
        .collect();
    assert!(outcomes[0].is_ok());
    for outcome in &outcomes[1..] {
        assert!(
            matches!(outcome, Err(EngineError::Gone { .. })),
            "{outcome:?}"
        );
    }
    assert!(datafiles(&media).is_empty());
}

#[test]
fn what_others_fill_is_noticed_and_room_that_returns_is_seen_at_once() {
    let reserve = 1 << 30;
    let media = SimMedia::new();
    let (_engine, namespace) = with_reserve(&media, reserve);
    for round in 0..3 {
        set(&namespace, b"a", &[round]).unwrap();
        // There is room for it, but the reserve is not left.
        media.inject(Fault::Capacity(reserve / 2));
        let refused = set_until_refused(&namespace);
        assert!(matches!(refused, EngineError::NoSpace), "{refused}");
        media.inject(Fault::Healthy);
        set(&namespace, b"b", &[round]).unwrap();
    }
}

#[test]
fn the_reserve_is_left_on_a_disk_that_fills_up() {
    let media = SimMedia::new();
    media.inject(Fault::Capacity(1 << 20));
    // Of which a sixteenth is kept.
    let (_engine, namespace) = with_reserve(&media, 1 << 30);
    let mut stored = 0;
    let refused = loop {
        let key = format!("{stored:04}");
        match set(&namespace, key.as_bytes(), &value(3000, 1)) {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, EngineError::NoSpace), "{refused}");
    let left = media.space(Path::new(DIR)).unwrap().free_bytes;
    // The header of a datafile and its counters are no part of an entry.
    assert!((58 << 10..70 << 10).contains(&left), "{left}, {stored}");
}
