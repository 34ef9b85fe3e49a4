//! One flipped bit, anywhere: every answer is right or says that there is damage, and the other keys go on.

use super::{DIR, Engine, EngineError, Media, Mode, Namespace, SimMedia, delete, options, set};
use crate::engine::{NamespaceOptions, NamespaceSettings};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Values of a key, the newest first; none: it was deleted.
type Histories = BTreeMap<Bytes, Vec<Vec<u8>>>;

const VERSIONS: u32 = 2;

fn opened(media: &SimMedia, mode: Mode) -> (Engine, Arc<Namespace>) {
    let engine = Engine::open(options(Arc::new(media.clone()))).unwrap();
    let namespace = engine.add_namespace(NamespaceOptions {
        settings: NamespaceSettings {
            mode,
            history_versions: VERSIONS,
            password: Some("secret".to_owned()),
            maxsize_bytes: 77_000,
            ..NamespaceSettings::default()
        },
        ..NamespaceOptions::new("ns", DIR)
    });
    (engine, namespace.unwrap())
}

/// A closed namespace of several datafiles with their snapshots: overwritten, deleted, compacted and flushed keys.
fn closed(mode: Mode) -> (SimMedia, Histories) {
    let media = SimMedia::new();
    let (engine, namespace) = opened(&media, mode);
    let mut histories = Histories::new();
    let name = |k: u8| match mode {
        Mode::User => vec![b'k', k],
        Mode::Sequential => Vec::new(),
    };
    set(&namespace, &name(99), b"flushed").unwrap();
    namespace.flush().unwrap();
    let mut keys = Vec::new();
    for k in 0..5 {
        let value = vec![k; 40 + usize::from(k)];
        let stored = set(&namespace, &name(k), &value).unwrap().unwrap();
        histories.insert(stored.clone(), vec![value]);
        keys.push(stored);
    }
    for round in 1..4_u8 {
        for k in 0..4_u8 {
            if (k + round) % 3 == 0 {
                continue;
            }
            let key = &keys[usize::from(k)];
            let value = vec![round * 16 + k; 30 + usize::from(round)];
            set(&namespace, key, &value).unwrap();
            let versions = histories.get_mut(key).unwrap();
            versions.insert(0, value);
            versions.truncate(VERSIONS as usize + 1);
        }
        namespace.jump().unwrap();
    }
    delete(&namespace, &keys[4]).unwrap();
    histories.insert(keys[4].clone(), Vec::new());
    namespace.compact_now().unwrap();
    engine.close();
    (media, histories)
}

fn files(media: &SimMedia) -> Vec<PathBuf> {
    let names = media.list(Path::new(DIR)).unwrap();
    names.iter().map(|name| Path::new(DIR).join(name)).collect()
}

/// The versions of a key, up to the first that is not told.
fn versions(namespace: &Namespace, key: &[u8]) -> Result<Vec<Vec<u8>>, EngineError> {
    let mut found = Vec::new();
    let mut next = None;
    while let Some(version) = namespace.history(key, next)? {
        found.push(version.value.to_vec());
        match version.previous {
            Some(previous) => next = Some(previous),
            None => break,
        }
    }
    Ok(found)
}

/// How many keys are harmed; an answer that is wrong is an error.
fn check(namespace: &Namespace, histories: &Histories) -> Result<usize, String> {
    let mut harmed = 0;
    let mut listed = Vec::new();
    for (key, wanted) in histories {
        if !wanted.is_empty() {
            listed.push(key.clone());
        }
        match namespace.get_blocking(key) {
            Ok(found) if found.as_deref() == wanted.first().map(|value| &value[..]) => {}
            Err(EngineError::Corrupt(_)) => harmed += 1,
            other => return Err(format!("GET {key:?}: {other:?}")),
        }
        match versions(namespace, key) {
            Ok(found) if found == *wanted => {}
            // Cut short where the version before does not verify: reported.
            Ok(found) if wanted.starts_with(&found) && !namespace.damaged().is_empty() => {}
            Err(EngineError::Corrupt(_)) => {}
            other => return Err(format!("HISTORY {key:?}: {other:?}")),
        }
    }
    let page = namespace.keys_after(None, 100).unwrap();
    let mut scanned: Vec<Bytes> = page.keys.into_iter().map(|stat| stat.key).collect();
    scanned.sort_unstable();
    if scanned != listed {
        return Err(format!("SCAN: {scanned:?}"));
    }
    Ok(harmed)
}

fn flip_every_byte(mode: Mode, with_snapshots: bool) {
    let (media, histories) = closed(mode);
    if !with_snapshots {
        for file in files(&media) {
            if file.extension().is_some_and(|ending| ending == "idx") {
                media.remove(&file).unwrap();
            }
        }
    }
    let files = files(&media);
    let snapshots = files
        .iter()
        .filter(|file| file.extension().is_some_and(|ending| ending == "idx"));
    assert_eq!(snapshots.count() > 1, with_snapshots, "{files:?}");
    let mut harmed = 0;
    for file in &files {
        let bytes = media.contents(file).unwrap().len() as u64;
        for offset in 0..bytes {
            let mask = 1 << ((offset * 5 + offset / 8) % 8);
            let flipped = media.clone_durable();
            flipped.flip(file, offset, mask);
            let (engine, namespace) = opened(&flipped, mode);
            let at = format!("{} byte {offset} mask {mask}", file.display());
            let found =
                check(&namespace, &histories).unwrap_or_else(|wrong| panic!("{at}: {wrong}"));
            assert!(found <= 1, "{at}: {found} keys");
            harmed += found;
            let settings = namespace.settings();
            assert_eq!(settings.maxsize_bytes, 77_000, "{at}");
            assert_eq!(settings.password.as_deref(), Some("secret"), "{at}");
            // It goes on, and what was harmed can be set anew.
            if found > 0 || offset % 64 == 0 {
                for key in histories.keys().take(4) {
                    set(&namespace, key, b"anew").unwrap();
                    assert_eq!(namespace.get_blocking(key).unwrap().unwrap(), "anew");
                }
            }
            engine.close();
        }
    }
    assert!(harmed > 100, "flips were found: {harmed}");
}

#[test]
fn in_user_mode_with_snapshots() {
    flip_every_byte(Mode::User, true);
}

#[test]
fn in_user_mode_without_snapshots() {
    flip_every_byte(Mode::User, false);
}

#[test]
fn in_sequential_mode_with_snapshots() {
    flip_every_byte(Mode::Sequential, true);
}

#[test]
fn in_sequential_mode_without_snapshots() {
    flip_every_byte(Mode::Sequential, false);
}

#[test]
fn the_check_catches_wrong_answers() {
    let (media, histories) = closed(Mode::User);
    let (_engine, namespace) = opened(&media, Mode::User);
    assert_eq!(check(&namespace, &histories), Ok(0));
    let key = histories.keys().next().unwrap();
    let mut wrong = histories.clone();
    wrong.get_mut(key).unwrap()[0] = b"other".to_vec();
    check(&namespace, &wrong).unwrap_err();
    let mut wrong = histories.clone();
    wrong.get_mut(key).unwrap().push(b"more".to_vec());
    check(&namespace, &wrong).unwrap_err();
    let mut wrong = histories.clone();
    wrong.insert(Bytes::from_static(b"never"), vec![b"set".to_vec()]);
    check(&namespace, &wrong).unwrap_err();
}
