//! Batches that are appended while the one before is synced: what is decided sees them, nothing is answered or visible before its sync,
//! and all of them fall with the first that fails.

use super::{
    DIR, Engine, EngineError, EngineOptions, Fault, Model, Namespace, NamespaceOptions, SimMedia,
    datafiles, key, opened, options, set, value,
};
use crate::engine::Caller;
use crate::engine::commit::{Action, Done, Operation, Outcome, Staged};
use bytes::Bytes;
use futures::executor::block_on;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn set_of(key: &[u8], value: &[u8]) -> Operation {
    Operation {
        key: Bytes::copy_from_slice(key),
        action: Action::Set {
            value: Bytes::copy_from_slice(value),
            crc: crc32fast::hash(value),
            timestamp: None,
        },
    }
}

fn delete_of(key: &[u8]) -> Operation {
    Operation {
        key: Bytes::copy_from_slice(key),
        action: Action::Delete { timestamp: None },
    }
}

fn stage(namespace: &Namespace, operation: Operation) -> Staged {
    let settings = namespace.settings();
    let store = &namespace.shared.store;
    let staged = store.stage(&[operation], &settings, 1);
    store.stage_behind(&staged);
    staged
}

fn settle(namespace: &Namespace, mut staged: Staged) -> Outcome {
    namespace.shared.store.settle(std::iter::once(&mut staged));
    staged.into_outcomes().remove(0)
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn what_is_decided_sees_what_is_not_synced_yet() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    namespace
        .change_settings(|settings| settings.maxsize_bytes = 1000)
        .unwrap();
    let first = stage(&namespace, set_of(b"a", &value(800, 1)));
    let same = stage(&namespace, set_of(b"a", &value(800, 1)));
    let too_much = stage(&namespace, set_of(b"b", &value(300, 1)));
    let gone = stage(&namespace, delete_of(b"a"));
    let again = stage(&namespace, delete_of(b"a"));
    let fits = stage(&namespace, set_of(b"b", &value(300, 1)));
    // Nobody else does.
    assert_eq!(namespace.get_blocking(b"a").unwrap(), None);
    let outcomes = [first, same, too_much, gone, again, fits]
        .into_iter()
        .map(|staged| settle(&namespace, staged));
    let [first, same, too_much, gone, again, fits] =
        outcomes.collect::<Vec<_>>().try_into().unwrap();
    assert_eq!(first.unwrap(), Done::Stored(Bytes::from_static(b"a")));
    assert_eq!(same.unwrap(), Done::Unchanged);
    assert!(matches!(too_much, Err(EngineError::NoSpace)));
    assert_eq!(gone.unwrap(), Done::Deleted);
    assert!(matches!(again, Err(EngineError::KeyNotFound)));
    assert_eq!(fits.unwrap(), Done::Stored(Bytes::from_static(b"b")));
    assert_eq!(namespace.get_blocking(b"a").unwrap(), None);
    assert_eq!(namespace.usage().unwrap().used_bytes, 300);
    assert!(namespace.shared.store.state.read().pending.is_empty());
}

#[test]
fn what_was_appended_behind_a_failed_sync_falls_with_it() {
    let media = SimMedia::new();
    let (engine, namespace) = opened(&media);
    set(&namespace, b"old", b"1").unwrap();
    let first = stage(&namespace, set_of(b"a", b"1"));
    let behind = [
        stage(&namespace, set_of(b"b", b"2")),
        // Only true if the first is.
        stage(&namespace, set_of(b"a", b"1")),
        stage(&namespace, delete_of(b"old")),
        stage(&namespace, delete_of(b"old")),
    ];
    media.inject(Fault::FailSync(0));
    assert!(matches!(
        settle(&namespace, first),
        Err(EngineError::Stopped { .. })
    ));
    let before = media.operations();
    for staged in behind {
        let outcome = settle(&namespace, staged);
        assert!(
            matches!(outcome, Err(EngineError::Stopped { .. })),
            "{outcome:?}"
        );
    }
    assert_eq!(media.operations(), before, "no second try");
    assert_eq!(namespace.get_blocking(b"a").unwrap(), None);
    assert_eq!(namespace.get_blocking(b"old").unwrap().unwrap(), "1");
    assert!(matches!(
        namespace.flush(),
        Err(EngineError::Stopped { .. })
    ));
    engine.close();
    drop(namespace);
    let (_engine, namespace) = opened(&media.restart(1));
    let old = namespace.get_blocking(b"old").unwrap();
    assert!(old.is_none_or(|old| old == "1"));
}

/// An entry that was appended to a datafile which was completed before its sync looked like garbage to compaction: the datafile was
/// removed, the entry published and acknowledged.
#[test]
fn compaction_leaves_a_datafile_alone_that_holds_what_is_not_synced_yet() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    for round in 0..4 {
        set(&namespace, b"k", &value(300, round)).unwrap();
    }
    let files = datafiles(&media);
    let staged = stage(&namespace, set_of(b"k", &value(300, 9)));
    let other = stage(&namespace, set_of(b"new", b"value"));
    namespace.jump().unwrap();
    namespace.compact_now().unwrap();
    settle(&namespace, staged).unwrap();
    settle(&namespace, other).unwrap();
    assert_eq!(
        namespace.get_blocking(b"k").unwrap().unwrap(),
        value(300, 9)
    );
    assert_eq!(namespace.get_blocking(b"new").unwrap().unwrap(), "value");
    // Now it may.
    namespace.compact_now().unwrap();
    assert!(datafiles(&media).iter().all(|file| !files.contains(file)));
    assert_eq!(namespace.get_blocking(b"new").unwrap().unwrap(), "value");
}

#[test]
fn flush_and_reload_wait_for_what_is_not_synced_yet() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    for flush in [false, true] {
        // Another value each time: the same one again would be nothing to wait for.
        let staged = stage(&namespace, set_of(b"k", &value(300, u8::from(flush))));
        std::thread::scope(|scope| {
            let changing = scope.spawn(|| {
                if flush {
                    namespace.flush()
                } else {
                    namespace.reload()
                }
            });
            // It holds the writer while it waits.
            wait_until("the change begins", || {
                namespace.shared.store.writer.is_locked()
            });
            assert!(!changing.is_finished());
            settle(&namespace, staged).unwrap();
            changing.join().unwrap().unwrap();
        });
        let found = namespace.get_blocking(b"k").unwrap();
        assert_eq!(found.is_none(), flush);
        assert_eq!(namespace.usage().unwrap().keys, u64::from(!flush));
    }
}

fn wide(media: &SimMedia, compaction: bool) -> (Engine, Arc<Namespace>) {
    let engine = Engine::open(EngineOptions {
        compaction,
        // What is as large as a 16th of it is worth a sync beside the next append.
        datafile_bytes: 16 << 10,
        ..options(Arc::new(media.clone()))
    })
    .unwrap();
    let namespace = engine.add_namespace(NamespaceOptions::new("ns", DIR));
    (engine, namespace.unwrap())
}

#[test]
fn the_next_batch_is_appended_while_one_is_synced() {
    for fails in [false, true] {
        let media = SimMedia::new();
        let (engine, namespace) = wide(&media, false);
        let submit = |key: &'static [u8]| {
            let submitted = namespace.submit_set(
                Bytes::from_static(key),
                value(2000, key[0]).into(),
                None,
                Caller::Busy,
            );
            submitted.unwrap()
        };
        media.allow_syncs(Some(0));
        let mut first = submit(b"a");
        wait_until("the first is synced", || media.syncs_held() == 1);
        // It is not alone, so from now on appending does not wait for syncs.
        let mut second = submit(b"b");
        media.allow_syncs(Some(1));
        block_on(first.stored()).unwrap();
        wait_until("the second is synced", || media.syncs_held() == 1);
        let mut third = submit(b"c");
        let file = &datafiles(&media)[0];
        wait_until("the third is appended", || {
            let stored = media.contents(file).unwrap();
            stored.windows(2000).any(|bytes| bytes == value(2000, b'c'))
        });
        assert!(second.try_stored().is_none() && third.try_stored().is_none());
        assert_eq!(namespace.get_blocking(b"b").unwrap(), None);
        if fails {
            media.inject(Fault::FailSync(0));
        }
        media.allow_syncs(None);
        for answer in [&mut second, &mut third] {
            let outcome = block_on(answer.stored());
            assert_eq!(
                fails,
                matches!(outcome, Err(EngineError::Stopped { .. })),
                "{outcome:?}"
            );
        }
        for key in [b"b", b"c"] {
            assert_eq!(namespace.get_blocking(key).unwrap().is_some(), !fails);
        }
        engine.close();
        drop(namespace);
        let (_engine, namespace) = wide(&media.restart(7), false);
        assert!(namespace.get_blocking(b"a").unwrap().is_some());
        if !fails {
            assert!(namespace.get_blocking(b"c").unwrap().is_some());
        }
    }
}

type Found = Option<Vec<u8>>;

/// What was acknowledged of a key last, and what was asked for behind it without an answer.
#[derive(Debug, Clone, Default)]
struct Known {
    certain: Found,
    possible: Option<Found>,
}

/// Is what is found what must or may be there?
fn check(known: &BTreeMap<Vec<u8>, Known>, found: &Model) -> Result<(), String> {
    for (key, known) in known {
        let now = found.get(key).cloned();
        if now != known.certain && known.possible.as_ref() != Some(&now) {
            return Err(format!("key {key:?}: {:?} bytes", now.map(|now| now.len())));
        }
    }
    match found.keys().find(|key| !known.contains_key(*key)) {
        Some(key) => Err(format!("key {key:?} was never set")),
        None => Ok(()),
    }
}

/// One client: rounds of four operations at once on keys of its own, until one fails.
fn client(namespace: &Namespace, number: u8) -> BTreeMap<Vec<u8>, Known> {
    let mut known: BTreeMap<Vec<u8>, Known> = BTreeMap::new();
    for round in 0..12_u8 {
        let operations = (0..4_u8).map(|k| async move {
            let key = vec![number, (k + round) % 6];
            if (round + k) % 5 == 4 {
                let done = namespace.delete(&key).await;
                return (key, None, done.map(drop));
            }
            let bytes = [40, 700, 2600][usize::from((round + k + number) % 3)];
            let value = value(bytes, 1 + round * 4 + k);
            let done = namespace.set(&key, Bytes::from(value.clone())).await;
            (key, Some(value), done.map(drop))
        });
        let mut failed = false;
        for (key, wanted, done) in block_on(futures::future::join_all(operations)) {
            let known = known.entry(key).or_default();
            match done {
                Ok(()) => known.certain = wanted,
                Err(_) => known.possible = Some(wanted),
            }
            failed |= done.is_err();
        }
        if failed {
            break;
        }
    }
    known
}

/// Several clients, large values, compaction in the background, and a crash at every place.
#[test]
fn a_crash_with_batches_in_flight_keeps_what_was_acknowledged() {
    for crash in (0..240).step_by(3) {
        let media = SimMedia::new();
        let (engine, namespace) = wide(&media, true);
        media.inject(Fault::CrashAfter(crash));
        let known: BTreeMap<Vec<u8>, Known> = std::thread::scope(|scope| {
            let clients: Vec<_> = (0..3)
                .map(|number| {
                    let namespace = &namespace;
                    scope.spawn(move || client(namespace, number))
                })
                .collect();
            let known = clients.into_iter().map(|client| client.join().unwrap());
            known.flatten().collect()
        });
        engine.close();
        drop(namespace);
        for seed in 0..3 {
            let after = media.restart(crash * 11 + seed);
            let (_engine, namespace) = wide(&after, false);
            assert!(
                namespace.damaged().is_empty(),
                "crash {crash}: {:?}",
                namespace.damaged()
            );
            let page = namespace.keys_after(None, 1000).unwrap();
            let found = page.keys.iter().map(|stat| {
                let value = namespace.get_blocking(&stat.key).unwrap().unwrap();
                (stat.key.to_vec(), value.to_vec())
            });
            check(&known, &found.collect())
                .unwrap_or_else(|wrong| panic!("crash {crash}: {wrong}"));
        }
    }
}

#[test]
fn the_check_catches_lost_and_torn_and_unasked_values() {
    let known = BTreeMap::from([(
        key(1),
        Known {
            certain: Some(value(9, 1)),
            possible: Some(Some(value(9, 2))),
        },
    )]);
    let found = |value: Found| value.map(|value| (key(1), value)).into_iter().collect();
    check(&known, &found(Some(value(9, 1)))).unwrap();
    check(&known, &found(Some(value(9, 2)))).unwrap();
    check(&known, &found(None)).unwrap_err();
    check(&known, &found(Some(value(8, 2)))).unwrap_err();
    let mut more: Model = found(Some(value(9, 1)));
    more.insert(key(2), value(1, 1));
    check(&known, &more).unwrap_err();
}
