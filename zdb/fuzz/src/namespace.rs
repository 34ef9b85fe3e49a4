//! What comes from disks: entries and the files of a namespace.

use crate::datafile::{Datafile, DatafileHeader, FrameParts};
use crate::engine::{Engine, EngineOptions, Namespace, NamespaceOptions};
use crate::media::{Media, OpenMode, SimMedia};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

const DIR: &str = "/ns";
const KEYS_MAX: usize = 1000;

fn engine(media: &Arc<dyn Media>) -> Engine {
    let options = EngineOptions {
        media: Arc::clone(media),
        compaction: false,
        datafile_bytes: 4096,
        reserve_bytes: 0,
        ..EngineOptions::default()
    };
    Engine::open(options).expect("an engine without namespaces opens")
}

fn options() -> NamespaceOptions {
    NamespaceOptions::new("fuzzed", DIR)
}

/// Everything a client could ask of it; nothing of it may panic or hang. The values that are readable.
fn ask(namespace: &Namespace) -> BTreeMap<Bytes, Bytes> {
    let mut values = BTreeMap::new();
    let page = namespace.keys_after(None, KEYS_MAX);
    for stat in page.map_or_else(|_| Vec::new(), |page| page.keys) {
        if let Ok(Some(value)) = namespace.get_blocking(&stat.key) {
            assert_eq!(value.len(), stat.bytes as usize);
            values.insert(stat.key, value);
        }
    }
    let _ = namespace.keys_before(None, KEYS_MAX);
    let _ = namespace.usage();
    for key in values.keys() {
        let _ = namespace.history(key, None);
    }
    let _ = namespace.damaged();
    // Errors are fine; what it moves must stay what it was.
    let _ = namespace.compact_now();
    for (key, value) in &values {
        let again = namespace.get_blocking(key);
        assert!(
            matches!(again, Ok(Some(again)) if again == *value),
            "compaction changed a value"
        );
    }
    values
}

/// Frames with right checksums and arbitrary contents: the entry decoder sees what no writer of ours makes.
///
/// Input: again and again kind, length of the prefix, length of the rest, then so many bytes.
pub fn open_frames(mut bytes: &[u8]) {
    let media: Arc<dyn Media> = Arc::new(SimMedia::new());
    let engine = engine(&media);
    engine
        .add_namespace(options())
        .expect("a namespace is made");
    engine.close();
    let header = DatafileHeader {
        purpose: *b"ZDBD",
        id: 0x77,
    };
    let path = Path::new(DIR).join("00000077.zdb");
    let mut file = Datafile::create(&media, &path, header).expect("a datafile is made");
    while let [kind, prefix, rest, more @ ..] = bytes {
        let (prefix, more) = more.split_at(usize::from(*prefix).min(more.len()));
        let (rest, more) = more.split_at(usize::from(*rest).min(more.len()));
        let parts = FrameParts {
            kind: (*kind).clamp(1, 239),
            prefix,
            parts: &[rest],
        };
        file.append_batch(&[parts]).expect("a frame is appended");
        bytes = more;
    }
    file.mark().expect("the datafile is marked");
    drop(file);
    let engine = self::engine(&media);
    if let Ok(namespace) = engine.add_namespace(options()) {
        ask(&namespace);
    }
    engine.close();
}

struct Base {
    files: Vec<(PathBuf, Vec<u8>)>,
    /// All values that a key ever had.
    values: BTreeMap<Bytes, Vec<Bytes>>,
}

/// A namespace with updates and deletions in several datafiles, and what was set in it.
fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let media: Arc<dyn Media> = Arc::new(SimMedia::new());
        let engine = engine(&media);
        let namespace = engine
            .add_namespace(options())
            .expect("a namespace is made");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime is made");
        let mut values: BTreeMap<Bytes, Vec<Bytes>> = BTreeMap::new();
        for number in 0..60_u8 {
            let key = Bytes::from(format!("key {}", number % 20));
            if number % 7 == 3 {
                let _ = runtime.block_on(namespace.delete(&key));
                continue;
            }
            let value = Bytes::from(vec![number; 100 + usize::from(number)]);
            runtime
                .block_on(namespace.set(&key, value.clone()))
                .expect("a value is set");
            values.entry(key).or_default().push(value);
        }
        engine.close();
        let names = media.list(Path::new(DIR)).expect("the directory is there");
        let files = names.into_iter().map(|name| {
            let path = Path::new(DIR).join(name);
            let file = media
                .open(&path, OpenMode::Read)
                .expect("a file that is listed opens");
            let length = file.length().expect("it has a length");
            let mut bytes = vec![0; usize::try_from(length).expect("files are small here")];
            file.read_exact_at(&mut bytes, 0).expect("it is readable");
            (path, bytes)
        });
        Base {
            files: files.collect(),
            values,
        }
    })
}

/// A sound namespace with arbitrary damage: what is read is what was set once under that key, or an error.
///
/// Input: again and again a file, an offset (2 bytes), a length, then the bytes to write there; length 0 cuts the file.
pub fn open_damaged(mut bytes: &[u8]) {
    let base = base();
    let media: Arc<dyn Media> = Arc::new(SimMedia::new());
    media
        .create_dir_all(Path::new(DIR))
        .expect("a directory is made");
    let mut files = base.files.clone();
    while let [number, low, high, length, more @ ..] = bytes {
        let count = files.len();
        let (_, contents) = &mut files[usize::from(*number) % count];
        let offset = usize::from(u16::from_le_bytes([*low, *high]));
        let offset = offset % (contents.len() + 1);
        let (written, more) = more.split_at(usize::from(*length).min(more.len()));
        if *length == 0 {
            contents.truncate(offset);
        }
        for (place, byte) in contents[offset..].iter_mut().zip(written) {
            *place = *byte;
        }
        bytes = more;
    }
    for (path, contents) in &files {
        let file = media
            .open(path, OpenMode::CreateNew)
            .expect("a file is made");
        file.write_all_at(contents, 0).expect("it is written");
        file.sync_data().expect("it is synced");
    }
    let engine = engine(&media);
    // Refusing to open is an answer too.
    if let Ok(namespace) = engine.add_namespace(options()) {
        for (key, value) in ask(&namespace) {
            let once = base.values.get(&key);
            assert!(
                once.is_some_and(|values| values.contains(&value)),
                "a value that was never set"
            );
        }
    }
    engine.close();
}
