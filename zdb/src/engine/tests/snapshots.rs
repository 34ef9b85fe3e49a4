//! Opening by snapshots: the same answers, whatever happened to the snapshots.

use super::{
    DIR, EngineError, Fault, Media, Model, SimMedia, assert_same, datafiles, delete, key, opened,
    set, value,
};
use std::path::{Path, PathBuf};

fn snapshots(media: &SimMedia) -> Vec<PathBuf> {
    let names = media.list(Path::new(DIR)).unwrap();
    names
        .iter()
        .filter(|name| name.ends_with(".idx"))
        .map(|name| Path::new(DIR).join(name))
        .collect()
}

/// A closed namespace with several datafiles and their snapshots.
fn closed() -> (SimMedia, Model) {
    let media = SimMedia::new();
    let (engine, namespace) = opened(&media);
    let mut model = Model::new();
    for k in 0..20 {
        set(&namespace, &key(k), &value(300, 200 + k)).unwrap();
        set(&namespace, &key(k), &value(400, k)).unwrap();
        model.insert(key(k), value(400, k));
    }
    delete(&namespace, &key(3)).unwrap();
    model.remove(&key(3));
    namespace.compact_now().unwrap();
    for k in 0..3 {
        set(&namespace, &key(k), &value(200, 100 + k)).unwrap();
        model.insert(key(k), value(200, 100 + k));
    }
    engine.close();
    drop(namespace);
    assert!(snapshots(&media).len() >= 2, "{:?}", snapshots(&media));
    (media, model)
}

#[test]
fn a_namespace_opened_by_snapshots_is_the_same() {
    let (media, model) = closed();
    let before = snapshots(&media);
    let (engine, namespace) = opened(&media);
    assert_same(&namespace, &model);
    // Nothing was read that a snapshot speaks of: rot in it is found when it is asked for, as an error.
    engine.close();
    drop(namespace);
    let file = &datafiles(&media)[0];
    let stored = media.contents(file).unwrap();
    let at = stored
        .windows(100)
        .position(|bytes| bytes.iter().all(|byte| *byte == bytes[0]))
        .unwrap();
    media.flip(file, at as u64 + 50, 1);
    let (_engine, namespace) = opened(&media);
    assert!(namespace.damaged().is_empty(), "the datafile was read");
    let corrupt = (0..20).filter(|k| {
        matches!(
            namespace.get_blocking(&key(*k)),
            Err(EngineError::Corrupt(_))
        )
    });
    assert!(corrupt.count() <= 1);
    assert!(snapshots(&media).len() >= before.len());
}

#[test]
fn without_snapshots_the_datafiles_are_read() {
    let (media, model) = closed();
    for snapshot in snapshots(&media) {
        media.remove(&snapshot).unwrap();
    }
    let (_engine, namespace) = opened(&media);
    assert_same(&namespace, &model);
    // They are made again.
    namespace.compact_now().unwrap();
    assert!(!snapshots(&media).is_empty());
}

#[test]
fn a_snapshot_of_another_datafile_is_not_believed() {
    let (media, model) = closed();
    let found = snapshots(&media);
    media.rename(&found[0], &found[1]).unwrap();
    let (_engine, namespace) = opened(&media);
    assert_same(&namespace, &model);
}

#[test]
fn every_bit_of_a_snapshot_may_flip() {
    let (media, model) = closed();
    for snapshot in snapshots(&media) {
        let bytes = media.contents(&snapshot).unwrap().len() as u64;
        for offset in (0..bytes).step_by(3) {
            let mask = 1 << (offset % 8);
            media.flip(&snapshot, offset, mask);
            let (engine, namespace) = opened(&media);
            assert_same(&namespace, &model);
            assert!(namespace.damaged().is_empty());
            engine.close();
            drop(namespace);
            media.flip(&snapshot, offset, mask);
        }
    }
}

#[test]
fn a_datafile_that_was_cut_short_is_reported() {
    let (media, model) = closed();
    let file = &datafiles(&media)[0];
    let cut = media.contents(file).unwrap().len() as u64 / 2;
    media
        .open(file, super::super::super::media::OpenMode::ReadWrite)
        .unwrap()
        .truncate(cut)
        .unwrap();
    let (_engine, namespace) = opened(&media);
    assert!(!namespace.damaged().is_empty());
    for (key, wanted) in &model {
        match namespace.get_blocking(key) {
            Ok(found) => assert_eq!(found.as_deref(), Some(&wanted[..])),
            Err(error) => assert!(matches!(error, EngineError::Corrupt(_)), "{error}"),
        }
    }
}

#[test]
fn a_full_disk_costs_only_the_snapshot() {
    let (media, model) = closed();
    for snapshot in snapshots(&media) {
        media.remove(&snapshot).unwrap();
    }
    let (engine, namespace) = opened(&media);
    media.inject(Fault::Capacity(1));
    namespace.compact_now().ok();
    assert_same(&namespace, &model);
    engine.close();
    drop(namespace);
    media.inject(Fault::Healthy);
    let (_engine, namespace) = opened(&media);
    assert_same(&namespace, &model);
}
