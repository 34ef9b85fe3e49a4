//! A client that has been the only one for a while: its own thread waits for the disk, and nothing else is different.

use super::{Fault, Model, Namespace, SimMedia, assert_same, key, opened, set, value};
use crate::engine::{Caller, EngineError};
use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

fn threads() -> Runtime {
    let runtime = Builder::new_multi_thread().worker_threads(2).build();
    runtime.unwrap()
}

/// Commits one after the other, until their client counts as the only one.
fn be_alone(namespace: &Namespace) -> Model {
    let sets = (100..120).map(|number| (key(number), value(10, number)));
    let model: Model = sets.collect();
    for (key, value) in &model {
        set(namespace, key, value).unwrap();
    }
    model
}

#[test]
fn its_own_thread_waits_for_the_disk_and_others_are_served_behind_it() {
    let runtime = threads();
    for fails in [false, true] {
        let media = SimMedia::new();
        let (engine, namespace) = opened(&media);
        let model = be_alone(&namespace);
        let submit = |namespace: &Arc<Namespace>, key: &'static [u8], caller| {
            namespace.submit_set(
                Bytes::from_static(key),
                Bytes::from_static(b"v"),
                None,
                caller,
            )
        };
        media.allow_syncs(Some(0));
        let (own, waits) = (Arc::clone(&namespace), submit);
        let alone = runtime.spawn(async move {
            let mut answer = waits(&own, b"a", Caller::Alone).unwrap();
            answer.try_stored()
        });
        wait_until("it is synced", || media.syncs_held() == 1);
        // It has the turn: these are for the commit thread, which waits for it.
        let mut behind = submit(&namespace, b"b", Caller::Busy).unwrap();
        let also = runtime.block_on(async { submit(&namespace, b"c", Caller::Alone) });
        let mut also = also.unwrap();
        assert!(!alone.is_finished());
        assert!(behind.try_stored().is_none() && also.try_stored().is_none());
        assert_eq!(namespace.get_blocking(b"a").unwrap(), None);
        if fails {
            media.inject(Fault::FailSync(0));
        }
        media.allow_syncs(None);
        let known = runtime.block_on(alone).unwrap();
        let known = known.expect("the thread that asked has carried it out");
        let others = [&mut behind, &mut also].map(|answer| runtime.block_on(answer.stored()));
        for outcome in std::iter::once(known).chain(others) {
            assert_eq!(
                fails,
                matches!(outcome, Err(EngineError::Stopped { .. })),
                "{outcome:?}"
            );
        }
        for key in [b"a", b"b", b"c"] {
            assert_eq!(namespace.get_blocking(key).unwrap().is_some(), !fails);
        }
        engine.close();
        drop(namespace);
        let (_engine, namespace) = opened(&media.restart(3));
        for (key, value) in &model {
            assert_eq!(namespace.get_blocking(key).unwrap().unwrap(), *value);
        }
        if !fails {
            assert!(namespace.get_blocking(b"a").unwrap().is_some());
        }
    }
}

#[test]
fn what_is_asked_outside_a_runtime_of_several_threads_goes_to_the_commit_thread() {
    let single = Builder::new_current_thread().build().unwrap();
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    be_alone(&namespace);
    media.allow_syncs(Some(0));
    let submitted = single.block_on(async {
        let (key, value) = (Bytes::from_static(b"k"), Bytes::from_static(b"v"));
        namespace.submit_set(key, value, None, Caller::Alone)
    });
    let mut answer = submitted.unwrap();
    assert!(answer.try_stored().is_none());
    media.allow_syncs(None);
    single.block_on(answer.stored()).unwrap().unwrap();
}

/// The commit thread sleeps meanwhile; it must hear of it all the same, once the namespace is idle again.
#[test]
fn the_datafile_is_marked_when_it_is_idle_again() {
    let runtime = threads();
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    be_alone(&namespace);
    let filled = || namespace.active_datafile().1;
    for round in 0..2 {
        let before = filled();
        wait_until("the idle datafile is marked", || filled() > before);
        let marked = filled();
        let set = runtime.block_on(async {
            let value = Bytes::copy_from_slice(&value(10, round));
            let answer = namespace.submit_set(Bytes::from_static(b"k"), value, None, Caller::Alone);
            answer.unwrap().try_stored()
        });
        set.expect("carried out here").unwrap();
        assert!(filled() > marked);
    }
    let before = filled();
    wait_until("and again", || filled() > before);
}

#[test]
fn a_crash_keeps_what_was_acknowledged() {
    let runtime = threads();
    let mut crashes = 0;
    for crash in 0..60 {
        let media = SimMedia::new();
        let (engine, namespace) = opened(&media);
        let mut model = be_alone(&namespace);
        media.inject(Fault::CrashAfter(crash));
        let mut unknown = None;
        for round in 0..16_u8 {
            let (key, value) = (key(round % 5), value(40 + u16::from(round) * 30, round));
            let (asked, stored) = (Bytes::from(key.clone()), Bytes::from(value.clone()));
            let deletes = round % 4 == 3 && model.contains_key(&key);
            let outcome = runtime.block_on(async {
                let mut answer = if deletes {
                    namespace.submit_delete(asked, None, Caller::Alone)?
                } else {
                    namespace.submit_set(asked, stored, None, Caller::Alone)?
                };
                answer.stored().await
            });
            match outcome {
                Ok(_) if deletes => drop(model.remove(&key)),
                Ok(_) => drop(model.insert(key, value)),
                Err(_) => {
                    unknown = Some((key, (!deletes).then_some(value)));
                    break;
                }
            }
        }
        crashes += usize::from(unknown.is_some());
        engine.close();
        drop(namespace);
        let (_engine, namespace) = opened(&media.restart(crash));
        assert!(namespace.damaged().is_empty(), "crash {crash}");
        if let Some((key, asked)) = unknown {
            // There whole or not at all.
            let found = namespace.get_blocking(&key).unwrap().map(Vec::from);
            assert!(
                found == asked || found.as_ref() == model.get(&key),
                "crash {crash}"
            );
            match found {
                Some(found) => drop(model.insert(key, found)),
                None => drop(model.remove(&key)),
            }
        }
        assert_same(&namespace, &model);
    }
    assert!(crashes > 20, "only {crashes} crashes hit an operation");
}
