//! Datafiles of every format version stay readable. The files are in `tests/golden`, the byte rulers in `docs/format.md`.
//!
//! A new format version adds files; the old ones are never made again (`QSFS_WRITE_GOLDEN=1` writes those that are missing).
#![expect(clippy::unwrap_used, reason = "tests")]

use bytes::Bytes;
use qsfs_zdb::datafile::{Datafile, DatafileHeader, FrameParts};
use qsfs_zdb::engine::{Engine, EngineOptions, NamespaceOptions};
use qsfs_zdb::media::{DiskMedia, Media};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const HEADER: DatafileHeader = DatafileHeader {
    purpose: *b"GOLD",
    id: 0x0102_0304_0506_0708,
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn media() -> Arc<dyn Media> {
    Arc::new(DiskMedia)
}

/// Opening for writing may mend a file, so tests work on copies.
fn copy_of(name: &str, dir: &Path) -> PathBuf {
    let copy = dir.join(name);
    std::fs::copy(golden(name), &copy).unwrap();
    copy
}

fn namespace_dir(dir: &Path, name: &str) -> PathBuf {
    let namespace = dir.join(name);
    std::fs::create_dir(&namespace).unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, namespace.join(path.file_name().unwrap())).unwrap();
    }
    namespace
}

fn write_missing() {
    let path = golden("datafile-v1");
    if !path.exists() {
        let mut datafile = Datafile::create(&media(), &path, HEADER).unwrap();
        datafile.append(1, &[b"first"]).unwrap();
        let frame = FrameParts {
            kind: 2,
            prefix: b"prefix ",
            parts: &[b"and ", b"rest"],
        };
        datafile.append_batch(&[frame]).unwrap();
        datafile.sync().unwrap();
        datafile.append(239, &[&[0xa5; 1000]]).unwrap();
        datafile.mark().unwrap();
    }
    let path = golden("namespace-v1");
    if !path.exists() {
        let engine = Engine::open(EngineOptions::default()).unwrap();
        let mut options = NamespaceOptions::new("golden", &path);
        options.settings.password = Some("golden".to_owned());
        options.settings.maxsize_bytes = 1 << 30;
        let namespace = engine.add_namespace(options).unwrap();
        futures::executor::block_on(async {
            namespace
                .set(b"one", Bytes::from_static(b"1"))
                .await
                .unwrap();
            namespace
                .set(b"two", Bytes::from_static(b"old"))
                .await
                .unwrap();
            namespace
                .set(b"two", Bytes::from_static(b"22"))
                .await
                .unwrap();
            namespace
                .set(b"gone", Bytes::from_static(b"x"))
                .await
                .unwrap();
            namespace.delete(b"gone").await.unwrap();
        });
        engine.close();
        std::fs::remove_file(path.join("lock")).unwrap();
    }
}

/// Small datafiles, so that even these have snapshots.
fn small_files() -> EngineOptions {
    EngineOptions {
        datafile_bytes: 4096,
        ..EngineOptions::default()
    }
}

/// What version 2 of a namespace added: history, the flush barrier, snapshots.
fn write_missing_2() {
    let path = golden("namespace-v2");
    if path.exists() {
        return;
    }
    let engine = Engine::open(small_files()).unwrap();
    let mut options = NamespaceOptions::new("golden", &path);
    options.settings.history_versions = 2;
    let namespace = engine.add_namespace(options).unwrap();
    let set = |key: &'static [u8], value: &'static [u8]| {
        futures::executor::block_on(namespace.set(key, Bytes::from_static(value))).unwrap();
    };
    set(b"flushed", b"away");
    namespace.flush().unwrap();
    for value in [&b"first"[..], b"second", b"third", b"fourth"] {
        set(b"key", value);
    }
    set(b"rotten", &[0x5a; 100]);
    namespace.jump().unwrap();
    set(b"key", b"fifth");
    engine.close();
    std::fs::remove_file(path.join("lock")).unwrap();
}

#[test]
fn a_namespace_of_version_2_is_opened() {
    if std::env::var_os("QSFS_WRITE_GOLDEN").is_some() {
        write_missing_2();
    }
    for with_snapshots in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let copy = namespace_dir(dir.path(), "namespace-v2");
        let entries = std::fs::read_dir(&copy).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        let ending = |path: &PathBuf, ending: &str| path.extension().is_some_and(|e| e == ending);
        let snapshots: Vec<_> = paths.iter().filter(|path| ending(path, "idx")).collect();
        assert!(!snapshots.is_empty());
        if with_snapshots {
            // The snapshot is believed: rot in the datafile that it speaks for is not seen by opening.
            let datafile = paths.iter().find(|path| ending(path, "zdb")).unwrap();
            let mut bytes = std::fs::read(datafile).unwrap();
            let at = bytes.windows(50).position(|run| run == [0x5a; 50]).unwrap();
            bytes[at] ^= 1;
            std::fs::write(datafile, bytes).unwrap();
        } else {
            snapshots
                .iter()
                .for_each(|path| std::fs::remove_file(path).unwrap());
        }
        let engine = Engine::open(small_files()).unwrap();
        let options = NamespaceOptions::existing("golden", &copy);
        let namespace = engine.add_namespace(options).unwrap();
        assert!(namespace.damaged().is_empty());
        assert_eq!(namespace.settings().history_versions, 2);
        assert_eq!(namespace.usage().unwrap().keys, 2);
        assert_eq!(namespace.get_blocking(b"rotten").is_err(), with_snapshots);
        let mut found = Vec::new();
        let mut version = None;
        while let Some(told) = namespace.history(b"key", version).unwrap() {
            found.push(told.value);
            version = told.previous;
            if version.is_none() {
                break;
            }
        }
        assert_eq!(found, ["fifth", "fourth", "third"]);
        engine.close();
    }
}

#[test]
fn a_datafile_of_version_1_is_read() {
    if std::env::var_os("QSFS_WRITE_GOLDEN").is_some() {
        write_missing();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = copy_of("datafile-v1", dir.path());
    let (datafile, report) = Datafile::open(&media(), &path, HEADER).unwrap();
    assert_eq!((report.frames, report.torn_bytes_cut), (3, 0));
    assert!(report.damaged.is_empty());
    let frames: Vec<(u64, u8, Bytes)> = datafile
        .frames(0)
        .map(|frame| frame.unwrap())
        .map(|frame| (frame.offset, frame.kind, frame.payload))
        .collect();
    // The offsets are part of the format: 64 bytes of header; 32 + 5 and 32 + 15 bytes rounded up to 8.
    assert_eq!(frames[0], (64, 1, Bytes::from_static(b"first")));
    assert_eq!(frames[1], (104, 2, Bytes::from_static(b"prefix and rest")));
    assert_eq!(frames[2], (152, 239, Bytes::from(vec![0xa5; 1000])));
    assert_eq!(datafile.len(), 152 + 1032 + 32);
}

#[test]
fn a_namespace_of_version_1_is_opened() {
    if std::env::var_os("QSFS_WRITE_GOLDEN").is_some() {
        write_missing();
    }
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::open(EngineOptions::default()).unwrap();
    let options = NamespaceOptions::existing("golden", namespace_dir(dir.path(), "namespace-v1"));
    let namespace = engine.add_namespace(options).unwrap();
    let get = |key: &[u8]| namespace.get_blocking(key).unwrap();
    assert_eq!(get(b"one").as_deref(), Some(&b"1"[..]));
    assert_eq!(get(b"two").as_deref(), Some(&b"22"[..]));
    assert_eq!(get(b"gone"), None);
    let settings = namespace.settings();
    assert_eq!(settings.password.as_deref(), Some("golden"));
    assert_eq!(settings.maxsize_bytes, 1 << 30);
    assert!(settings.public && namespace.damaged().is_empty());
    assert_eq!(namespace.usage().unwrap().keys, 2);
    engine.close();
}
