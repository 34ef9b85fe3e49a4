//! A crash at every changing operation of the disk in turn, and rot at every place.

use super::{
    DIR, Engine, EngineError, Fault, Media, Mode, Model, Namespace, NamespaceOptions,
    NamespaceSettings, SimMedia, Step, assert_same, delete, key, open, opened, options, set, value,
};
use bytes::Bytes;
use futures::executor::block_on;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A fixed history of writes, deletions, rotations, compactions, flushes, closings and openings.
fn history() -> Vec<Step> {
    let mut steps = Vec::new();
    for round in 0..4_u8 {
        for k in 0..8 {
            steps.push(Step::Set(k, 500 + u16::from(round) * 37, round * 8 + k));
        }
        steps.push(Step::Delete(round));
        steps.push(Step::Delete(7 - round));
        steps.push(Step::Compact);
        match round {
            0 => steps.push(Step::Jump),
            1 => steps.push(Step::Reopen),
            2 => steps.extend([Step::Flush, Step::Set(1, 300, 77), Step::Reload]),
            _ => steps.extend([Step::Jump, Step::Compact, Step::Reopen]),
        }
    }
    steps
}

/// Run the history until the crash. Returns what must be there, and the one step whose outcome is unknown.
fn run_until_crash(media: &SimMedia, steps: &[Step]) -> (Model, Option<Step>) {
    let mut model = Model::new();
    let Ok((mut engine, mut namespace)) = open(media) else {
        return (model, None);
    };
    for step in steps {
        let unknown = (model.clone(), Some(step.clone()));
        match step {
            Step::Set(k, bytes, seed) => {
                let value = value(*bytes, *seed);
                if set(&namespace, &key(*k), &value).is_err() {
                    return unknown;
                }
                model.insert(key(*k), value);
            }
            Step::Delete(k) => {
                if delete(&namespace, &key(*k)).is_err() {
                    return unknown;
                }
                model.remove(&key(*k));
            }
            Step::Flush => {
                if namespace.flush().is_err() {
                    return unknown;
                }
                model.clear();
            }
            Step::Compact | Step::Jump | Step::Reload => {
                let done = match step {
                    Step::Compact => namespace.compact_now(),
                    Step::Jump => namespace.jump().map(drop),
                    _ => namespace.reload(),
                };
                assert!(done.is_ok() || media.crashed());
            }
            Step::Reopen => {
                engine.close();
                drop(namespace);
                match open(media) {
                    Ok(again) => (engine, namespace) = again,
                    Err(_) => return (model, None),
                }
            }
        }
        if media.crashed() {
            return (model, None);
        }
    }
    (model, None)
}

/// What must be there after the crash, given what is there now of the step whose outcome is unknown.
fn settle(namespace: &Namespace, model: &Model, unknown: Option<&Step>) -> Model {
    let mut expected = model.clone();
    match unknown {
        // All or nothing.
        Some(Step::Flush) if namespace.usage().unwrap().keys == 0 => expected.clear(),
        Some(Step::Set(k, ..) | Step::Delete(k)) => {
            let now = namespace.get_blocking(&key(*k)).unwrap();
            let done = match unknown {
                Some(Step::Set(_, bytes, seed)) => Some(value(*bytes, *seed)),
                _ => None,
            };
            let now = now.map(|value| value.to_vec());
            assert!(
                now == done || now.as_ref() == model.get(&key(*k)),
                "neither done nor undone"
            );
            match now {
                Some(value) => expected.insert(key(*k), value),
                None => expected.remove(&key(*k)),
            };
        }
        _ => {}
    }
    expected
}

#[test]
fn a_crash_at_any_operation_keeps_what_was_acknowledged() {
    let steps = history();
    let whole = SimMedia::new();
    run_until_crash(&whole, &steps);
    let operations = whole.operations();
    assert!(operations > 200, "the history is long enough: {operations}");
    for crash in 0..operations {
        let media = SimMedia::new();
        media.inject(Fault::CrashAfter(crash));
        let (model, unknown) = run_until_crash(&media, &steps);
        for seed in 0..3 {
            let after = media.restart(crash * 31 + seed);
            let (engine, namespace) = opened(&after);
            assert!(
                namespace.damaged().is_empty(),
                "crash {crash}: a torn tail is not damage: {:?}",
                namespace.damaged()
            );
            let mut expected = settle(&namespace, &model, unknown.as_ref());
            assert_same(&namespace, &expected);
            // It goes on working: write, compact, open once more.
            set(&namespace, b"after", b"crash").unwrap();
            namespace.compact_now().unwrap();
            expected.insert(b"after".to_vec(), b"crash".to_vec());
            engine.close();
            drop(namespace);
            let (_engine, namespace) = opened(&after);
            assert_same(&namespace, &expected);
        }
    }
}

const ROOT: &str = "/root";

fn rooted(media: &SimMedia) -> Result<Engine, EngineError> {
    Engine::open(crate::engine::EngineOptions {
        root: Some(PathBuf::from(ROOT)),
        ..options(Arc::new(media.clone()))
    })
}

/// Make, fill, change, delete and make again a namespace; returns what is certain of it (`None`: it is not there) and whether the last
/// operation is unknown, with what it would have made of it.
fn live_and_die(media: &SimMedia) -> (Option<Model>, Option<Option<Model>>) {
    let Ok(engine) = rooted(media) else {
        return (None, None);
    };
    let mut certain = None;
    for round in 0..2_u8 {
        let Ok(namespace) = engine.create_namespace("ns") else {
            return (certain, Some(Some(Model::new())));
        };
        let mut model = Model::new();
        certain = Some(model.clone());
        for k in 0..6 {
            let done = set(&namespace, &key(k), &value(900, round * 16 + k));
            let before = certain.clone();
            model.insert(key(k), value(900, round * 16 + k));
            if done.is_err() {
                return (before, Some(Some(model)));
            }
            certain = Some(model.clone());
        }
        // A change of settings is all or nothing, and touches no key.
        let quota = namespace.change_settings(|settings| settings.maxsize_bytes = 1 << 20);
        if quota.is_err() {
            return (certain, None);
        }
        drop(namespace);
        if engine.remove_namespace("ns").is_err() {
            return (certain, Some(None));
        }
        certain = None;
    }
    (certain, None)
}

#[test]
fn a_crash_while_namespaces_come_and_go_leaves_them_whole_or_gone() {
    let whole = SimMedia::new();
    assert_eq!(live_and_die(&whole), (None, None));
    for crash in 0..whole.operations() {
        let media = SimMedia::new();
        media.inject(Fault::CrashAfter(crash));
        let (certain, possible) = live_and_die(&media);
        for seed in 0..3 {
            let after = media.restart(crash * 13 + seed);
            let engine = rooted(&after).unwrap();
            let found = engine.namespace("ns").map(|namespace| {
                assert!(namespace.damaged().is_empty(), "crash {crash}");
                contents(&namespace)
            });
            assert!(
                found == certain || possible.as_ref() == Some(&found),
                "crash {crash} seed {seed}: {found:?}"
            );
            // The name can be used, and holds nothing of an earlier life.
            if found.is_none() {
                let namespace = engine.create_namespace("ns").unwrap();
                assert_eq!(contents(&namespace), Model::new());
                assert!(namespace.is_unused(), "crash {crash}");
            }
            engine.remove_namespace("ns").unwrap();
            engine.close();
            assert!(!after.exists(&Path::new(ROOT).join("ns")));
        }
    }
}

fn contents(namespace: &Namespace) -> Model {
    let page = namespace.keys_after(None, 1000).unwrap();
    let value = |key: &[u8]| namespace.get_blocking(key).unwrap().unwrap().to_vec();
    page.keys
        .iter()
        .map(|stat| (stat.key.to_vec(), value(&stat.key)))
        .collect()
}

#[test]
fn a_crash_keeps_ids_and_history_of_a_sequential_namespace() {
    let sequential = NamespaceOptions {
        settings: NamespaceSettings {
            mode: Mode::Sequential,
            history_versions: 1,
            ..NamespaceSettings::default()
        },
        ..NamespaceOptions::new("ns", DIR)
    };
    let start = |media: &SimMedia| -> Result<(Engine, Arc<Namespace>), EngineError> {
        let engine = Engine::open(options(Arc::new(media.clone())))?;
        let namespace = engine.add_namespace(sequential.clone())?;
        Ok((engine, namespace))
    };
    // Ids in the order they were given, with the two newest values of each.
    let run = |media: &SimMedia| {
        let mut known: Vec<(Bytes, Vec<Vec<u8>>)> = Vec::new();
        let Ok((_engine, namespace)) = start(media) else {
            return known;
        };
        for round in 0..3_u8 {
            for k in 0..5_usize {
                let value = value(600, round * 5 + 1);
                let id = known.get(k).map(|(id, _)| id.clone()).unwrap_or_default();
                let Ok(Some(id)) = set(&namespace, &id, &value) else {
                    return known;
                };
                match known.get_mut(k) {
                    Some((_, values)) => values.push(value),
                    None => known.push((id, vec![value])),
                }
            }
            if namespace.compact_now().is_err() {
                return known;
            }
        }
        known
    };
    let whole = SimMedia::new();
    assert_eq!(run(&whole).len(), 5);
    for crash in 0..whole.operations() {
        let media = SimMedia::new();
        media.inject(Fault::CrashAfter(crash));
        let known = run(&media);
        let after = media.restart(crash * 17);
        let (_engine, namespace) = start(&after).unwrap();
        assert!(namespace.damaged().is_empty(), "crash {crash}");
        for (id, values) in &known {
            let version = namespace.history(id, None).unwrap().unwrap();
            let newest = values.last().unwrap();
            if version.value[..] == newest[..] {
                let previous = version.previous.map(|previous| {
                    let version = namespace.history(id, Some(previous)).unwrap().unwrap();
                    version.value.to_vec()
                });
                let wanted = values.len().checked_sub(2).map(|at| values[at].clone());
                assert_eq!(previous, wanted, "crash {crash}");
            } else {
                // The operation that was under way is done: the newest known is the one before.
                let previous = namespace.history(id, version.previous).unwrap().unwrap();
                assert_eq!(previous.value[..], newest[..], "crash {crash}");
            }
        }
        let fresh = set(&namespace, b"", b"fresh").unwrap().unwrap();
        assert!(known.iter().all(|(id, _)| *id != fresh), "crash {crash}");
    }
}

/// With syncs at intervals a crash may take what was acknowledged since the last one, but never what was durable before: compaction must
/// not remove an old value whose successor is not on the disk yet.
#[test]
fn a_crash_between_syncs_leaves_every_key_its_old_or_its_new_value() {
    let interval = |media: &SimMedia| {
        let engine = Engine::open(crate::engine::EngineOptions {
            // Never due while the test runs.
            sync: crate::engine::SyncPolicy::Interval(std::time::Duration::from_secs(3600)),
            ..options(Arc::new(media.clone()))
        })?;
        let namespace = engine.add_namespace(NamespaceOptions::new("ns", DIR))?;
        Ok::<_, EngineError>((engine, namespace))
    };
    let old = |k: u8| value(700, k + 1);
    let new = |k: u8| value(900, k + 101);
    let overwrite = |media: &SimMedia| {
        let Ok((_engine, namespace)) = interval(media) else {
            return;
        };
        for k in 0..12 {
            if set(&namespace, &key(k), &new(k)).is_err() {
                return;
            }
        }
        let _ = namespace.compact_now();
        let _ = namespace.jump();
        let _ = namespace.compact_now();
    };
    let durable = || {
        let media = SimMedia::new();
        let (engine, namespace) = opened(&media);
        for k in 0..12 {
            set(&namespace, &key(k), &old(k)).unwrap();
        }
        engine.close();
        media
    };
    let whole = durable();
    let before = whole.operations();
    overwrite(&whole);
    for crash in 0..whole.operations() - before {
        let media = durable();
        media.inject(Fault::CrashAfter(crash));
        overwrite(&media);
        for seed in 0..3 {
            let after = media.restart(crash * 7 + seed);
            let (_engine, namespace) = opened(&after);
            assert!(namespace.damaged().is_empty(), "crash {crash}");
            for k in 0..12 {
                let found = namespace.get_blocking(&key(k)).unwrap();
                let found = found.as_deref();
                assert!(
                    found == Some(&old(k)[..]) || found == Some(&new(k)[..]),
                    "crash {crash} seed {seed} key {k}: {:?}",
                    found.map(<[u8]>::len)
                );
            }
        }
    }
}

fn files(media: &SimMedia) -> Vec<PathBuf> {
    let names = media.list(Path::new(DIR)).unwrap();
    names.iter().map(|name| Path::new(DIR).join(name)).collect()
}

#[test]
fn a_flipped_bit_is_never_a_wrong_answer() {
    let media = SimMedia::new();
    let (engine, namespace) = opened(&media);
    let mut model = Model::new();
    for k in 0..6 {
        set(&namespace, &key(k), &value(300, 100 + k)).unwrap();
        model.insert(key(k), value(300, k));
        set(&namespace, &key(k), &value(300, k)).unwrap();
    }
    namespace
        .change_settings(|settings| settings.maxsize_bytes = 77_000)
        .unwrap();
    engine.close();
    drop((engine, namespace));
    let files = files(&media);
    assert!(
        files.len() >= 3,
        "datafile, snapshot and settings: {files:?}"
    );
    // With the snapshots, then without: two ways to the index.
    for with_snapshots in [true, false] {
        for file in &files {
            if !with_snapshots && file.extension().is_some_and(|ending| ending == "idx") {
                if media.exists(file) {
                    media.remove(file).unwrap();
                }
                continue;
            }
            let bytes = media.contents(file).unwrap().len() as u64;
            for offset in (0..bytes).step_by(13) {
                media.flip(file, offset, 0x10);
                let after = media.clone_durable();
                let (engine, namespace) = opened(&after);
                let damaged = namespace.damaged();
                // A damaged key can hide which key it was; its value may then be an older one or none, but it is reported.
                let unknown = damaged.iter().any(|report| report.key.is_none());
                for (key, wanted) in &model {
                    match namespace.get_blocking(key) {
                        Ok(Some(value)) => assert!(value == wanted || unknown, "offset {offset}"),
                        Ok(None) => assert!(unknown, "offset {offset}"),
                        Err(error) => assert!(matches!(error, EngineError::Corrupt(_))),
                    }
                }
                assert_eq!(namespace.settings().maxsize_bytes, 77_000);
                engine.close();
                drop((engine, namespace));
                media.flip(file, offset, 0x10);
            }
        }
    }
}

/// Many operations share a commit; a crash tears some frames of it and leaves others whole. What was acknowledged is there, the rest is
/// whole or absent, nothing counts as damage, and a second crash right after the recovery changes nothing.
#[test]
fn a_crash_in_a_shared_commit_keeps_what_was_acknowledged() {
    for crash in 0..60 {
        let media = SimMedia::new();
        media.inject(Fault::CrashAfter(crash));
        let mut certain: Model = Model::new();
        let mut possible: BTreeMap<Vec<u8>, Option<Vec<u8>>> = BTreeMap::new();
        if let Ok((_engine, namespace)) = open(&media) {
            for round in 0..6_u8 {
                let batch = (0..8_u8).map(|k| {
                    let namespace = &namespace;
                    async move {
                        if round > 0 && k % 4 == round % 4 {
                            (k, None, namespace.delete(&key(k)).await.is_ok())
                        } else {
                            let value = value(700 + 97 * u16::from(k), round * 16 + k + 1);
                            let set = namespace.set(&key(k), Bytes::from(value.clone())).await;
                            (k, Some(value), set.is_ok())
                        }
                    }
                });
                for (k, wanted, done) in block_on(futures::future::join_all(batch)) {
                    match (done, wanted) {
                        (true, Some(value)) => drop(certain.insert(key(k), value)),
                        (true, None) => drop(certain.remove(&key(k))),
                        (false, wanted) => drop(possible.insert(key(k), wanted)),
                    }
                }
                if !possible.is_empty() {
                    break;
                }
            }
        }
        for seed in 0..4 {
            let after = media.restart(crash * 7 + seed);
            let mut seen: Option<Model> = None;
            for again in 0..2 {
                let after = if again == 0 {
                    after.clone()
                } else {
                    after.restart(seed)
                };
                let (_engine, namespace) = opened(&after);
                assert!(
                    namespace.damaged().is_empty(),
                    "crash {crash}: {:?}",
                    namespace.damaged()
                );
                let mut found = Model::new();
                for k in 0..8 {
                    let now = namespace
                        .get_blocking(&key(k))
                        .unwrap()
                        .map(|value| value.to_vec());
                    let kept = now.as_ref() == certain.get(&key(k));
                    let done = possible.get(&key(k)) == Some(&now);
                    assert!(kept || done, "crash {crash} seed {seed} key {k}: {now:?}");
                    found.extend(now.map(|value| (key(k), value)));
                }
                assert_same(&namespace, &found);
                assert!(
                    seen.is_none_or(|seen| seen == found),
                    "crash {crash}: recovery is not stable"
                );
                seen = Some(found);
            }
        }
    }
}
