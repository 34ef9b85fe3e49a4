//! A disk that fills up, and syncs that fail, at every place.

use super::{
    Engine, EngineError, Fault, Model, Namespace, SimMedia, Step, assert_same, delete, key, open,
    opened, set, value,
};
use std::sync::Arc;

fn steps() -> Vec<Step> {
    let mut steps = Vec::new();
    for round in 0..3_u8 {
        for k in 0..8 {
            steps.push(Step::Set(k, 400 + u16::from(round) * 41, round * 8 + k));
        }
        steps.push(Step::Delete(round));
        steps.push(Step::Compact);
        steps.push(Step::Jump);
    }
    steps.extend([Step::Flush, Step::Set(1, 200, 99)]);
    steps
}

/// Every step either does what it says or changes nothing; returns what is there then. `failed` looks at every error.
fn run(
    namespace: &Namespace,
    steps: &[Step],
    failed: &mut dyn FnMut(&EngineError),
) -> (Model, Vec<Vec<u8>>) {
    let mut model = Model::new();
    // Keys of steps whose outcome is unknown.
    let mut unknown = Vec::new();
    for step in steps {
        let outcome = match step {
            Step::Set(k, bytes, seed) => {
                set(namespace, &key(*k), &value(*bytes, *seed)).map(|_| {
                    model.insert(key(*k), value(*bytes, *seed));
                })
            }
            Step::Delete(k) => delete(namespace, &key(*k)).map(|_| {
                model.remove(&key(*k));
            }),
            Step::Compact => namespace.compact_now(),
            Step::Jump => namespace.jump().map(drop),
            Step::Flush => namespace.flush().map(|()| model.clear()),
            Step::Reopen | Step::Reload => Ok(()),
        };
        if let Err(error) = outcome {
            failed(&error);
            if let (EngineError::Stopped { .. }, Step::Set(k, ..) | Step::Delete(k)) =
                (&error, step)
            {
                unknown.push(key(*k));
            }
        }
    }
    (model, unknown)
}

#[test]
fn a_full_disk_is_a_clean_error_and_room_heals_it() {
    let mut refused = 0;
    for capacity in (600..14_000).step_by(331) {
        let media = SimMedia::new();
        let (engine, namespace) = opened(&media);
        media.inject(Fault::Capacity(capacity));
        let (mut model, _) = run(&namespace, &steps(), &mut |error| {
            refused += 1;
            assert!(matches!(error, EngineError::NoSpace), "{capacity}: {error}");
        });
        assert_same(&namespace, &model);
        namespace.is_alive().unwrap();
        media.inject(Fault::Healthy);
        set(&namespace, b"later", b"there is room").unwrap();
        model.insert(b"later".to_vec(), b"there is room".to_vec());
        namespace.compact_now().unwrap();
        assert_same(&namespace, &model);
        engine.close();
        drop(namespace);
        let (_engine, namespace) = opened(&media);
        assert_same(&namespace, &model);
        assert!(namespace.damaged().is_empty());
    }
    assert!(refused > 100, "the disk was full now and then: {refused}");
}

#[test]
fn a_failed_sync_at_any_place_loses_nothing_that_was_acknowledged() {
    let mut stopped = 0;
    for sync in 0..70 {
        let media = SimMedia::new();
        let Ok((engine, namespace)): Result<(Engine, Arc<Namespace>), _> = open(&media) else {
            continue;
        };
        media.inject(Fault::FailSync(sync));
        let (model, unknown) = run(&namespace, &steps(), &mut |_| {});
        let is_stopped = matches!(namespace.is_alive(), Err(EngineError::Stopped { .. }));
        stopped += u32::from(is_stopped);
        if is_stopped {
            // For good, whatever the disk does now.
            assert!(matches!(
                set(&namespace, b"more", b"?"),
                Err(EngineError::Stopped { .. })
            ));
        }
        // Reading goes on.
        for (key, value) in &model {
            let found = namespace.get_blocking(key).unwrap();
            assert_eq!(found.as_deref(), Some(&value[..]), "sync {sync}");
        }
        engine.close();
        drop(namespace);
        let after = media.restart(sync);
        let (_engine, namespace) = opened(&after);
        for k in 0..8 {
            let key = key(k);
            if unknown.contains(&key) {
                continue;
            }
            let found = namespace.get_blocking(&key).unwrap();
            assert_eq!(
                found.as_deref(),
                model.get(&key).map(|value| &value[..]),
                "sync {sync} key {k}"
            );
        }
    }
    assert!(stopped > 20, "syncs of the datafiles failed: {stopped}");
}
