#![expect(clippy::unwrap_used, reason = "tests")]

mod alone;
mod crash;
mod directory;
mod faults;
mod history;
mod pipeline;
mod rot;
mod snapshots;

use super::{
    Engine, EngineError, EngineOptions, Mode, Namespace, NamespaceOptions, NamespaceSettings,
    SyncPolicy,
};
use crate::media::{DiskMedia, Fault, Media, SimMedia};
use bytes::Bytes;
use futures::executor::block_on;
use proptest::prelude::{Just, ProptestConfig, Strategy, prop, prop_oneof, proptest};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const DIR: &str = "/backend";

fn options(media: Arc<dyn Media>) -> EngineOptions {
    EngineOptions {
        media,
        root: None,
        datafile_bytes: 4096,
        reserve_bytes: 0,
        compaction: false,
        sync: SyncPolicy::Always,
    }
}

fn open(media: &SimMedia) -> Result<(Engine, Arc<Namespace>), EngineError> {
    let engine = Engine::open(options(Arc::new(media.clone())))?;
    let namespace = engine.add_namespace(NamespaceOptions::new("ns", DIR))?;
    Ok((engine, namespace))
}

fn opened(media: &SimMedia) -> (Engine, Arc<Namespace>) {
    open(media).unwrap()
}

fn set(namespace: &Namespace, key: &[u8], value: &[u8]) -> Result<Option<Bytes>, EngineError> {
    block_on(namespace.set(key, Bytes::copy_from_slice(value)))
}

fn delete(namespace: &Namespace, key: &[u8]) -> Result<bool, EngineError> {
    block_on(namespace.delete(key))
}

fn datafiles(media: &SimMedia) -> Vec<PathBuf> {
    let names = media.list(Path::new(DIR)).unwrap();
    names
        .iter()
        .filter(|name| name.ends_with(".zdb"))
        .map(|name| Path::new(DIR).join(name))
        .collect()
}

#[derive(Debug, Clone)]
enum Step {
    Set(u8, u16, u8),
    Delete(u8),
    Compact,
    Reopen,
    Flush,
    Jump,
    Reload,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..12_u8, 0..900_u16, 0..4_u8).prop_map(|(k, n, v)| Step::Set(k, n, v)),
        4 => (0..12_u8).prop_map(Step::Delete),
        2 => Just(Step::Compact),
        1 => Just(Step::Reopen),
        1 => Just(Step::Flush),
        1 => Just(Step::Jump),
        1 => Just(Step::Reload),
    ]
}

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

fn value(bytes: u16, seed: u8) -> Vec<u8> {
    vec![seed; usize::from(bytes)]
}

fn key(number: u8) -> Vec<u8> {
    vec![b'k', number]
}

fn assert_same(namespace: &Namespace, model: &Model) {
    let mut found = Model::new();
    let mut position = None;
    loop {
        let page = namespace.keys_after(position, 5).unwrap();
        for stat in &page.keys {
            let value = namespace.get_blocking(&stat.key).unwrap().unwrap();
            assert_eq!(value.len(), stat.bytes as usize);
            found.insert(stat.key.to_vec(), value.to_vec());
        }
        match page.next {
            Some(next) => position = Some(next),
            None => break,
        }
    }
    assert_eq!(&found, model);
    let usage = namespace.usage().unwrap();
    assert_eq!(usage.keys, model.len() as u64);
    assert_eq!(
        usage.used_bytes,
        model.values().map(|value| value.len() as u64).sum::<u64>()
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_is_a_map(steps in prop::collection::vec(step(), 1..120)) {
        let media = SimMedia::new();
        let (mut engine, mut namespace) = opened(&media);
        let mut model = Model::new();
        for step in steps {
            match step {
                Step::Set(k, bytes, seed) => {
                    let value = value(bytes, seed);
                    let same = model.get(&key(k)) == Some(&value);
                    let answer = set(&namespace, &key(k), &value).unwrap();
                    assert_eq!(answer.is_none(), same);
                    model.insert(key(k), value);
                }
                Step::Delete(k) => {
                    let existed = model.remove(&key(k)).is_some();
                    assert_eq!(delete(&namespace, &key(k)).unwrap(), existed);
                }
                Step::Compact => namespace.compact_now().unwrap(),
                Step::Reopen => {
                    engine.close();
                    (engine, namespace) = opened(&media);
                }
                Step::Flush => {
                    namespace.flush().unwrap();
                    model.clear();
                }
                Step::Jump => {
                    let jump = namespace.jump().unwrap();
                    assert!(jump.opened > jump.closed);
                }
                Step::Reload => namespace.reload().unwrap(),
            }
        }
        assert_same(&namespace, &model);
        assert!(namespace.damaged().is_empty());
        engine.close();
        drop(namespace);
        let (_engine, namespace) = opened(&media);
        assert_same(&namespace, &model);
        assert!(namespace.damaged().is_empty());
    }
}

#[test]
fn rot_under_a_running_engine_is_an_error_and_other_keys_go_on() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    set(&namespace, b"a", &value(1000, 1)).unwrap();
    set(&namespace, b"b", &value(1000, 2)).unwrap();
    let file = &datafiles(&media)[0];
    let stored = media.contents(file).unwrap();
    let at = stored.windows(4).position(|bytes| bytes == [1; 4]).unwrap();
    media.flip(file, at as u64 + 100, 1);
    assert!(matches!(
        namespace.get_blocking(b"a"),
        Err(EngineError::Corrupt(_))
    ));
    assert_eq!(namespace.damaged()[0].key.as_deref(), Some(&b"a"[..]));
    assert!(namespace.get_blocking(b"b").unwrap().is_some());
    // Repair is an overwrite or a deletion, as for any key.
    assert!(delete(&namespace, b"a").unwrap());
    assert_eq!(namespace.get_blocking(b"a").unwrap(), None);
    assert!(
        namespace.damaged().is_empty(),
        "mended damage is no longer listed"
    );
}

#[test]
fn compaction_does_not_drop_what_is_damaged_but_needed() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    for k in 0..7 {
        set(&namespace, &key(k), &value(500, k + 1)).unwrap();
    }
    let file = &datafiles(&media)[0];
    let stored = media.contents(file).unwrap();
    let at = stored.windows(4).position(|bytes| bytes == [1; 4]).unwrap();
    media.flip(file, at as u64 + 50, 1);
    for k in 1..7 {
        set(&namespace, &key(k), &value(600, k + 1)).unwrap();
    }
    namespace.compact_now().unwrap();
    assert!(matches!(
        namespace.get_blocking(&key(0)),
        Err(EngineError::Corrupt(_))
    ));
    assert!(delete(&namespace, &key(0)).unwrap());
    namespace.compact_now().unwrap();
    assert!(!media.exists(file), "nothing in it is needed any more");
}

#[test]
fn deleting_frees_space_on_the_disk() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    for round in 0..20_u8 {
        for k in 0..20 {
            set(&namespace, &key(k), &value(400, round)).unwrap();
        }
    }
    for k in 0..20 {
        delete(&namespace, &key(k)).unwrap();
    }
    set(&namespace, b"x", &value(10, 0)).unwrap();
    namespace.compact_now().unwrap();
    let left = namespace.usage().unwrap().datafile_bytes;
    assert!(left < 8192, "{left} bytes are left of 160 KiB written");
}

#[test]
fn quota_and_full_disk_refuse_and_later_accept() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    namespace
        .change_settings(|settings| settings.maxsize_bytes = 1000)
        .unwrap();
    set(&namespace, b"a", &value(800, 1)).unwrap();
    assert!(matches!(
        set(&namespace, b"b", &value(300, 1)),
        Err(EngineError::NoSpace)
    ));
    // Replacing counts the old size as free.
    set(&namespace, b"a", &value(1000, 2)).unwrap();
    assert_eq!(namespace.usage().unwrap().free_bytes, 0);
    namespace
        .change_settings(|settings| settings.maxsize_bytes = 0)
        .unwrap();
    media.inject(Fault::Capacity(3000));
    assert!(matches!(
        set(&namespace, b"c", &value(3000, 1)),
        Err(EngineError::NoSpace)
    ));
    assert!(delete(&namespace, b"a").unwrap());
    media.inject(Fault::Healthy);
    set(&namespace, b"c", &value(3000, 1)).unwrap();
}

#[test]
fn a_failed_sync_stops_writing_but_not_reading() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    set(&namespace, b"a", b"1").unwrap();
    media.inject(Fault::FailSync(0));
    assert!(matches!(
        set(&namespace, b"b", b"2"),
        Err(EngineError::Stopped { .. })
    ));
    assert!(matches!(
        set(&namespace, b"c", b"3"),
        Err(EngineError::Stopped { .. })
    ));
    assert!(matches!(
        namespace.is_alive(),
        Err(EngineError::Stopped { .. })
    ));
    assert_eq!(namespace.get_blocking(b"a").unwrap().unwrap(), "1");
    assert_eq!(namespace.get_blocking(b"b").unwrap(), None);
}

#[test]
fn a_removed_directory_is_noticed() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    set(&namespace, b"a", b"1").unwrap();
    namespace.is_alive().unwrap();
    media.remove_tree(Path::new(DIR));
    media.create_dir_all(Path::new(DIR)).unwrap();
    assert!(matches!(
        namespace.is_alive(),
        Err(EngineError::Gone { .. })
    ));
    assert!(matches!(
        namespace.get_blocking(b"a"),
        Err(EngineError::Gone { .. })
    ));
    assert!(matches!(
        set(&namespace, b"b", b"2"),
        Err(EngineError::Gone { .. })
    ));
    let engine = Engine::open(options(Arc::new(media))).unwrap();
    assert!(matches!(
        engine.add_namespace(NamespaceOptions::existing("ns", DIR)),
        Err(EngineError::Gone { .. })
    ));
}

#[test]
fn sequential_ids_count_up_and_are_never_reused() {
    let media = SimMedia::new();
    let sequential = NamespaceOptions {
        settings: NamespaceSettings {
            mode: Mode::Sequential,
            ..NamespaceSettings::default()
        },
        ..NamespaceOptions::new("ns", DIR)
    };
    let engine = Engine::open(options(Arc::new(media.clone()))).unwrap();
    let namespace = engine.add_namespace(sequential).unwrap();
    let id = |namespace: &Namespace, value: &[u8]| {
        let id = set(namespace, b"", value).unwrap().unwrap();
        u64::from_le_bytes(id[..].try_into().unwrap())
    };
    assert_eq!(id(&namespace, b"zero"), 0);
    assert_eq!(id(&namespace, b"one"), 1);
    set(&namespace, &0_u64.to_le_bytes(), b"zero again").unwrap();
    assert_eq!(id(&namespace, b"three"), 3);
    assert!(matches!(
        set(&namespace, &9_u64.to_le_bytes(), b"x"),
        Err(EngineError::UpdateOnly)
    ));
    for number in [0_u64, 1, 3] {
        delete(&namespace, &number.to_le_bytes()).unwrap();
    }
    namespace.compact_now().unwrap();
    engine.close();
    drop(namespace);
    let (_engine, namespace) = opened(&media);
    namespace.compact_now().unwrap();
    assert!(id(&namespace, b"later") >= 4);
}

#[test]
fn two_processes_cannot_open_one_directory() {
    let dir = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Media> = Arc::new(DiskMedia);
    let first = Engine::open(options(Arc::clone(&disk))).unwrap();
    let second = Engine::open(options(disk)).unwrap();
    let namespace = NamespaceOptions::new("ns", dir.path());
    let held = first.add_namespace(namespace.clone()).unwrap();
    assert!(matches!(
        second.add_namespace(namespace.clone()),
        Err(EngineError::InUse { .. })
    ));
    set(&held, b"a", b"1").unwrap();
    first.close_namespace("ns").unwrap();
    // Although `held` still exists: closing released the directory.
    let opened = second.add_namespace(namespace).unwrap();
    assert_eq!(opened.get_blocking(b"a").unwrap().unwrap(), "1");
    assert!(matches!(held.get_blocking(b"a"), Err(EngineError::Closed)));
}

#[test]
fn background_compaction_keeps_the_disk_small() {
    let media = SimMedia::new();
    let engine = Engine::open(EngineOptions {
        compaction: true,
        ..options(Arc::new(media.clone()))
    })
    .unwrap();
    let namespace = engine
        .add_namespace(NamespaceOptions::new("ns", DIR))
        .unwrap();
    for round in 0..200_u8 {
        for k in 0..4 {
            set(&namespace, &key(k), &value(700, round)).unwrap();
        }
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while namespace.usage().unwrap().datafile_bytes > 40_000 {
        assert!(
            std::time::Instant::now() < deadline,
            "compaction does not keep up"
        );
        std::thread::yield_now();
    }
    engine.close();
    drop(namespace);
    let (_engine, namespace) = opened(&media);
    for k in 0..4 {
        assert_eq!(
            namespace.get_blocking(&key(k)).unwrap().unwrap(),
            value(700, 199)
        );
    }
}

/// A SET of what the SET before it in the same batch stores is answered "unchanged". It was answered so even when that one failed.
#[test]
fn a_repeated_set_fails_with_the_one_it_repeats() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    set(&namespace, b"first", b"1").unwrap();
    media.inject(Fault::FailSync(0));
    let sets = (0..200).map(|_| namespace.set(b"same", Bytes::from_static(b"value")));
    let outcomes = block_on(futures::future::join_all(sets));
    assert!(outcomes.iter().all(Result::is_err), "{outcomes:?}");
    assert_eq!(namespace.get_blocking(b"same").unwrap(), None);
}

#[test]
fn interval_acknowledges_before_the_sync_and_syncs_later() {
    let media = SimMedia::new();
    let interval = EngineOptions {
        sync: SyncPolicy::Interval(std::time::Duration::from_millis(1)),
        ..options(Arc::new(media.clone()))
    };
    let engine = Engine::open(interval).unwrap();
    let namespace = engine
        .add_namespace(NamespaceOptions::new("ns", DIR))
        .unwrap();
    set(&namespace, b"a", b"1").unwrap();
    // The sync is the only changing operation that is left to come.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let (_engine, after) = opened(&media.clone_durable());
        if after.get_blocking(b"a").unwrap().is_some() {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "never synced");
        std::thread::yield_now();
    }
    // The first failed sync is never tried again as if nothing had happened.
    media.inject(Fault::FailSync(0));
    set(&namespace, b"b", b"2").unwrap();
    while namespace.is_alive().is_ok() {
        assert!(
            std::time::Instant::now() < deadline,
            "the failure is not noticed"
        );
        std::thread::yield_now();
    }
    assert!(matches!(
        set(&namespace, b"c", b"3"),
        Err(EngineError::Stopped { .. })
    ));
    assert_eq!(namespace.get_blocking(b"a").unwrap().unwrap(), "1");
}

#[test]
fn raw_entries_are_shown_in_order() {
    let media = SimMedia::new();
    let (_engine, namespace) = opened(&media);
    set(&namespace, b"a", b"1").unwrap();
    set(&namespace, b"b", b"2").unwrap();
    delete(&namespace, b"a").unwrap();
    assert_eq!(namespace.dirty_datafiles(), vec![1]);
    namespace.reset_dirty_datafiles();
    assert_eq!(namespace.jump().unwrap().closed, 1);
    assert_eq!(namespace.dirty_datafiles(), Vec::<u32>::new());
    let mut found = Vec::new();
    let mut offset = 0;
    while let Some(raw) = namespace.raw_entry(1, offset).unwrap() {
        offset = raw.next_offset;
        found.push((raw.key.to_vec(), raw.value.to_vec(), raw.deleted));
    }
    let wanted = [
        (b"a".to_vec(), b"1".to_vec(), false),
        (b"b".to_vec(), b"2".to_vec(), false),
        (b"a".to_vec(), Vec::new(), true),
    ];
    assert_eq!(found, wanted);
    assert_eq!(namespace.raw_entry(99, 0).unwrap(), None);
}

#[test]
fn datafiles_without_their_settings_are_not_taken_for_a_new_namespace() {
    let media = SimMedia::new();
    let (engine, namespace) = opened(&media);
    set(&namespace, b"a", b"1").unwrap();
    engine.close();
    drop(namespace);
    media.remove(&Path::new(DIR).join("namespace")).unwrap();
    assert!(matches!(
        open(&media),
        Err(EngineError::SettingsLost { .. })
    ));
}

/// A handle that outlives its namespace must not touch a directory that has another owner by now.
#[test]
fn a_closed_namespace_changes_nothing_any_more() {
    let media = SimMedia::new();
    let (engine, closed) = opened(&media);
    set(&closed, b"a", b"1").unwrap();
    engine.close();
    let (_engine, namespace) = opened(&media);
    let before = media.operations();
    assert!(matches!(closed.flush(), Err(EngineError::Closed)));
    assert!(matches!(closed.jump(), Err(EngineError::Closed)));
    assert!(matches!(closed.reload(), Err(EngineError::Closed)));
    closed.compact_now().unwrap();
    let changed = closed.change_settings(|settings| settings.maxsize_bytes = 1);
    assert!(matches!(changed, Err(EngineError::Closed)));
    assert!(matches!(set(&closed, b"a", b"2"), Err(EngineError::Closed)));
    assert_eq!(media.operations(), before);
    assert_eq!(namespace.get_blocking(b"a").unwrap().unwrap(), "1");
}
