//! Older versions: kept as configured, in order, cut by a deletion, through compaction, reopening and reloading.

use super::{
    EngineError, Mode, Namespace, NamespaceOptions, NamespaceSettings, SimMedia, delete, key,
    options, set, value,
};
use crate::engine::Engine;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop, prop_oneof, proptest};
use std::collections::BTreeMap;
use std::sync::Arc;

fn opened(media: &SimMedia, mode: Mode, versions: u32) -> (Engine, Arc<Namespace>) {
    let engine = Engine::open(options(Arc::new(media.clone()))).unwrap();
    let namespace = engine
        .add_namespace(NamespaceOptions {
            settings: NamespaceSettings {
                mode,
                history_versions: versions,
                ..NamespaceSettings::default()
            },
            ..NamespaceOptions::new("ns", super::DIR)
        })
        .unwrap();
    (engine, namespace)
}

/// All versions of a key that can be had, the newest first.
fn versions(namespace: &Namespace, key: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut next = None;
    while let Some(version) = namespace.history(key, next).unwrap() {
        found.push(version.value.to_vec());
        assert!(
            version
                .previous
                .is_none_or(|previous| previous < version.version)
        );
        match version.previous {
            Some(previous) => next = Some(previous),
            None => break,
        }
    }
    found
}

#[test]
fn older_versions_are_kept_until_the_key_is_deleted() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media, Mode::User, 2);
    for number in 1..=5 {
        set(&namespace, b"a", &[number; 10]).unwrap();
    }
    assert_eq!(versions(&namespace, b"a"), vec![[5; 10], [4; 10], [3; 10]]);
    assert_eq!(namespace.usage().unwrap().history_bytes, 20);
    assert!(matches!(
        namespace.history(b"a", Some(1)),
        Err(EngineError::UnknownVersion { version: 1 })
    ));
    delete(&namespace, b"a").unwrap();
    assert_eq!(namespace.history(b"a", None).unwrap(), None);
    set(&namespace, b"a", b"again").unwrap();
    assert_eq!(versions(&namespace, b"a"), vec![b"again".to_vec()]);
    assert_eq!(namespace.usage().unwrap().history_bytes, 0);
    set(&namespace, b"a", b"more").unwrap();
    namespace
        .change_settings(|settings| settings.history_versions = 0)
        .unwrap();
    assert_eq!(versions(&namespace, b"a"), vec![b"more".to_vec()]);
}

#[test]
fn what_is_kept_as_history_is_not_reclaimed_and_what_is_not_is() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media, Mode::User, 1);
    for round in 0..40_u8 {
        for k in 0..5 {
            set(&namespace, &key(k), &value(400, round + 1)).unwrap();
        }
    }
    namespace.compact_now().unwrap();
    for k in 0..5 {
        assert_eq!(
            versions(&namespace, &key(k)),
            vec![value(400, 40), value(400, 39)]
        );
    }
    let left = namespace.usage().unwrap().datafile_bytes;
    assert!(left < 30_000, "{left} bytes are left of 80,000 written");
}

#[derive(Debug, Clone)]
enum Step {
    Set(u8, u16, u8),
    Delete(u8),
    Compact,
    Reopen,
    Reload,
    Jump,
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..5_u8, 0..600_u16, any::<u8>()).prop_map(|(k, n, v)| Step::Set(k, n, v)),
        2 => (0..5_u8).prop_map(Step::Delete),
        2 => Just(Step::Compact),
        1 => Just(Step::Reopen),
        1 => Just(Step::Reload),
        1 => Just(Step::Jump),
        1 => Just(Step::Flush),
    ]
}

/// Values of a key, the newest last.
type Model = BTreeMap<u8, Vec<Vec<u8>>>;

fn assert_history(namespace: &Namespace, model: &Model, keep: usize, ids: &BTreeMap<u8, Vec<u8>>) {
    for (k, values) in model {
        let wanted: Vec<_> = values.iter().rev().take(keep + 1).cloned().collect();
        let key = ids.get(k).cloned().unwrap_or_else(|| key(*k));
        assert_eq!(versions(namespace, &key), wanted);
    }
}

fn run(mode: Mode, keep: u32, steps: Vec<Step>) {
    let media = SimMedia::new();
    let (mut engine, mut namespace) = opened(&media, mode, keep);
    let mut model = Model::new();
    // In sequential mode: the id that stands for each key.
    let mut ids: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
    let name = |ids: &BTreeMap<u8, Vec<u8>>, k: u8| match mode {
        Mode::User => key(k),
        Mode::Sequential => ids.get(&k).cloned().unwrap_or_default(),
    };
    for step in steps {
        match step {
            Step::Set(k, bytes, seed) => {
                let value = value(bytes, seed);
                let stored = set(&namespace, &name(&ids, k), &value).unwrap();
                if let (Some(id), Mode::Sequential) = (&stored, mode) {
                    ids.insert(k, id.to_vec());
                }
                if stored.is_some() {
                    model.entry(k).or_default().push(value);
                }
            }
            Step::Delete(k) => {
                let name = name(&ids, k);
                let existed = model.remove(&k).is_some();
                ids.remove(&k);
                assert_eq!(delete(&namespace, &name).unwrap(), existed);
            }
            Step::Compact => namespace.compact_now().unwrap(),
            Step::Reopen => {
                engine.close();
                (engine, namespace) = opened(&media, mode, keep);
            }
            Step::Reload => namespace.reload().unwrap(),
            Step::Jump => drop(namespace.jump().unwrap()),
            Step::Flush => {
                namespace.flush().unwrap();
                model.clear();
                ids.clear();
            }
        }
        assert_history(&namespace, &model, keep as usize, &ids);
    }
    assert!(namespace.damaged().is_empty());
    assert_eq!(namespace.usage().unwrap().keys, model.len() as u64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn history_is_what_was_set(keep in 0..4_u32, steps in prop::collection::vec(step(), 1..80)) {
        run(Mode::User, keep, steps);
    }

    #[test]
    fn history_of_ids_is_what_was_set(keep in 0..3_u32, steps in prop::collection::vec(step(), 1..60)) {
        run(Mode::Sequential, keep, steps);
    }
}
