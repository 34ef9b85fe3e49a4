//! Single facts that the model does not cover.

use super::super::testing::{MemoryStore, at, scratch};
use super::super::{AttributeChange, FileSystem, FsError, TimeChange};
use super::{code, filesystem};
use crate::namespace::{Ino, Namespace, NamespaceError, Replayed, Time};
use nix::errno::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn fresh(datafile_bytes: usize) -> (Arc<FileSystem>, Arc<MemoryStore>, tempfile::TempDir) {
    let dir = scratch();
    let store = Arc::new(MemoryStore::new(datafile_bytes));
    let namespace = Namespace::open(&dir.path().join("names")).unwrap();
    let filesystem = filesystem(namespace, &store, false);
    (Arc::new(filesystem), store, dir)
}

fn file(fs: &FileSystem, name: &[u8]) -> Ino {
    fs.create(Ino::ROOT, name, 0o644, at(5)).unwrap().ino
}

#[test]
fn sequential_writes_become_one_extent_per_64_mib() {
    let (fs, _store, _dir) = fresh(1 << 30);
    let ino = file(&fs, b"f");
    let block = vec![1; 1 << 20];
    for index in 0..100u64 {
        fs.write(ino, index << 20, &block, false, at(6)).unwrap();
    }
    let extents = fs.namespace().extents_of(ino).unwrap();
    assert_eq!(extents.len(), 2, "{extents:?}");
    assert_eq!(extents[0].bytes, 64 << 20);
}

#[test]
fn overwritten_and_deleted_data_makes_datafiles_dead_until_released() {
    let (fs, _store, _dir) = fresh(1000);
    let ino = file(&fs, b"f");
    fs.write(ino, 0, &[1; 2500], false, at(6)).unwrap();
    assert_eq!(fs.namespace().dead_datafiles().unwrap(), []);
    fs.write(ino, 0, &[2; 1000], false, at(7)).unwrap();
    let dead = fs.namespace().dead_datafiles().unwrap();
    assert_eq!(dead.len(), 1, "{dead:?}");
    assert_eq!(fs.namespace().live_bytes(dead[0]).unwrap(), 0);
    fs.datafiles_released(dead, at(8).now).unwrap();
    assert_eq!(fs.namespace().dead_datafiles().unwrap(), []);
}

#[test]
fn what_is_not_local_is_fetched_and_sequential_readers_are_read_ahead() {
    let (fs, store, _dir) = fresh(10 << 20);
    let ino = file(&fs, b"f");
    let text: Vec<u8> = (0..25_000_000u32).map(|n| (n % 249) as u8).collect();
    for (index, part) in text.chunks(1 << 20).enumerate() {
        fs.write(ino, (index as u64) << 20, part, false, at(6))
            .unwrap();
    }
    store.remote.store(true, Ordering::Relaxed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    for offset in (0..text.len()).step_by(1 << 20) {
        let mut buffer = vec![0; 1 << 20];
        let read = fs.read(ino, offset as u64, &mut buffer).unwrap();
        buffer.truncate(read.bytes);
        assert!(!read.missing.is_empty());
        let got = runtime.block_on(fs.complete(buffer, read.missing)).unwrap();
        assert!(got == text[offset..offset + got.len()], "at {offset}");
    }
    let ahead = store.prefetched.load(Ordering::Relaxed);
    assert!(ahead > 10 << 20, "only {ahead} bytes were read ahead");
    assert!(ahead <= text.len() as u64, "{ahead} bytes: some twice");
}

#[test]
fn a_file_with_many_extents_goes_in_bounded_steps() {
    let (fs, store, _dir) = fresh(1 << 20);
    let ino = file(&fs, b"f");
    // Backwards, so that nothing merges.
    for index in (0..10_000u64).rev() {
        fs.write(ino, index * 10, &[3; 4], false, at(6)).unwrap();
    }
    fs.release(ino, at(6).now).unwrap();
    let before = store.journal().len();
    fs.unlink(Ino::ROOT, b"f", at(7)).unwrap();
    assert_eq!(store.journal().len() - before, 2);
    assert_eq!(fs.namespace().orphans().unwrap(), []);
    assert!(
        fs.namespace()
            .live_datafiles()
            .unwrap()
            .iter()
            .all(|(_, live)| *live == 0)
    );
    assert_eq!(code(fs.getattr(ino)).map(|_| ()), Err(Errno::ENOENT));
}

#[test]
fn a_fenced_writer_and_a_follower_answer_erofs_and_go_on_reading() {
    let (fs, store, _dir) = fresh(1 << 20);
    let ino = file(&fs, b"f");
    fs.write(ino, 0, b"kept", false, at(6)).unwrap();
    store.fenced.store(true, Ordering::Relaxed);
    let refused = |outcome: Result<bool, FsError>| assert_eq!(code(outcome), Err(Errno::EROFS));
    refused(fs.write(ino, 0, b"lost", false, at(7)));
    fs.fence();
    refused(fs.write(ino, 0, b"lost", false, at(7)));
    assert_eq!(
        code(fs.mkdir(Ino::ROOT, b"d", 0o755, at(7)).map(|_| ())),
        Err(Errno::EROFS)
    );
    let mut buffer = [0; 8];
    assert_eq!(fs.read(ino, 0, &mut buffer).unwrap().bytes, 4);
    assert_eq!(&buffer[..4], b"kept");
}

#[test]
fn replay_skips_what_is_known_and_refuses_gaps() {
    let (fs, store, dir) = fresh(1 << 20);
    for name in [b"a", b"b", b"c"] {
        file(&fs, name);
    }
    let journal = store.journal();
    let other = Namespace::open(&dir.path().join("other")).unwrap();
    assert_eq!(other.replay(&journal[0]).unwrap(), Replayed::Applied);
    assert_eq!(other.replay(&journal[0]).unwrap(), Replayed::Known);
    assert!(matches!(
        other.replay(&journal[2]),
        Err(NamespaceError::Gap {
            applied: 1,
            found: 3
        })
    ));
    drop(other);
    // What was applied is there after a clean end.
    let again = Namespace::open(&dir.path().join("other")).unwrap();
    assert_eq!(again.applied_sequence(), 1);
}

#[test]
fn an_interrupted_load_is_noticed_and_reset_helps() {
    let (fs, _store, dir) = fresh(1 << 20);
    file(&fs, b"a");
    let batches: Vec<_> = fs
        .namespace()
        .snapshot()
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let path = dir.path().join("half");
    let half = Namespace::open(&path).unwrap();
    half.load().unwrap().rows(&batches[0]).unwrap();
    drop(half);
    assert!(matches!(
        Namespace::open(&path),
        Err(NamespaceError::Unusable(_))
    ));
    Namespace::reset(&path).unwrap();
    assert_eq!(Namespace::open(&path).unwrap().applied_sequence(), 0);
}

#[test]
fn limits_and_odd_arguments_are_refused() {
    let (fs, _store, _dir) = fresh(1 << 20);
    let ino = file(&fs, b"f");
    let long = vec![b'x'; 256];
    assert_eq!(
        code(fs.mkdir(Ino::ROOT, &long, 0, at(6)).map(|_| ())),
        Err(Errno::ENAMETOOLONG)
    );
    assert!(fs.mkdir(Ino::ROOT, &long[..255], 0, at(6)).is_ok());
    for name in [&b"."[..], b"..", b"", b"a/b", b"a\0b"] {
        assert_eq!(
            code(fs.mkdir(Ino::ROOT, name, 0, at(6)).map(|_| ())),
            Err(Errno::EINVAL)
        );
    }
    let last = i64::MAX as u64;
    assert_eq!(
        code(fs.write(ino, last, b"x", false, at(6))),
        Err(Errno::EFBIG)
    );
    fs.write(ino, last - 1, b"x", false, at(6)).unwrap();
    assert_eq!(fs.getattr(ino).unwrap().size, last);
    assert_eq!(
        code(fs.getxattr(ino, b"system.posix_acl_access")),
        Err(Errno::EOPNOTSUPP)
    );
    let owner = AttributeChange {
        uid: Some(7),
        mtime: Some(TimeChange::At(Time {
            seconds: -5,
            nanos: 3,
        })),
        ..AttributeChange::default()
    };
    let chmod = AttributeChange {
        mode: Some(0o6755),
        ..AttributeChange::default()
    };
    fs.setattr(ino, chmod, at(6)).unwrap();
    let changed = fs.setattr(ino, owner, at(6)).unwrap();
    assert_eq!(
        changed.mode & 0o7777,
        0o755,
        "chown clears set-user-id and set-group-id"
    );
    assert_eq!(
        changed.mtime,
        Time {
            seconds: -5,
            nanos: 3
        }
    );
}

/// Found here: a create that was refused closed the handle of the number it did not get, which another thread's file had got, and so the
/// last close of that file removed nothing.
#[test]
fn what_many_threads_did_at_once_replays_to_the_same_rows() {
    let (fs, store, dir) = fresh(100_000);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let fs = &fs;
            scope.spawn(move || {
                for round in 0..200u64 {
                    // Names and one file are shared, so that threads get in each other's way; what is refused is fine.
                    let name = [b'a' + u8::try_from((thread + round) % 5).unwrap()];
                    let caller = at(100);
                    if let Ok(made) = fs.create(Ino::ROOT, &name, 0o644, caller) {
                        fs.write(made.ino, round, &[1; 50], false, caller).unwrap();
                        fs.release(made.ino, caller.now).unwrap();
                    }
                    let shared = fs.lookup(Ino::ROOT, b"a").unwrap();
                    if let Some(shared) = shared
                        && fs.open(shared.ino).is_ok()
                    {
                        fs.write(shared.ino, thread * 30, &[2; 60], false, caller)
                            .unwrap();
                        fs.read(shared.ino, 0, &mut [0; 200]).unwrap();
                        fs.release(shared.ino, caller.now).unwrap();
                    }
                    let other = [b'a' + u8::try_from(round % 5).unwrap()];
                    let _ = fs.rename(
                        (Ino::ROOT, &name),
                        (Ino::ROOT, &other),
                        crate::namespace::RenameMode::Replace,
                        caller,
                    );
                    let _ = fs.unlink(Ino::ROOT, &other, caller);
                }
            });
        }
    });
    let other = super::replayed(&dir.path().join("other"), &store.journal());
    assert_eq!(super::rows(&other), super::rows(fs.namespace()));
    super::check_live_bytes(&other);
    assert_eq!(other.orphans().unwrap(), [], "all are closed");
}
