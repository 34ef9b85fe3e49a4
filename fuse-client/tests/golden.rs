//! What a mount once left in its state directory stays readable, and what is written now is what was written then.
//!
//! The files are in `tests/golden`, the byte rulers in `docs/format.md`. A changed format takes a new version and adds files; the
//! old ones are never made again (`QSFS_WRITE_GOLDEN=1` writes those that are missing). The keys in the kit belong to nothing.
#![expect(clippy::unwrap_used, reason = "tests")]

use qsfs_fuse_client::kit::RecoveryKit;
use qsfs_fuse_client::namespace::{
    Action, FileExtent, Ino, Namespace, Operation, RenameMode, Time, XattrMode,
};
use qsfs_fuse_client::ports::DataExtent;
use qsfs_fuse_client::push::checkpoint;
use qsfs_fuse_client::store::append::{
    KIND_CHECKPOINT_BEGIN, KIND_CHECKPOINT_END, KIND_CHECKPOINT_ROWS, KIND_RECORD, meta_header,
};
use qsfs_fuse_client::store::layout::StateDir;
use qsfs_fuse_client::store::open::{OpenContext, Opened, open};
use qsfs_fuse_client::store::synced_point::SyncedPoint;
use qsfs_fuse_client::store::{StoreSettings, pages};
use qsfs_proto::api::Role;
use qsfs_proto::ca::CertificateAuthority;
use qsfs_zdb::datafile::Datafile;
use qsfs_zdb::media::{DiskMedia, Media};
use qsfs_zstor::id::{ClusterId, DatafileId, KeyId, VolumeId};
use qsfs_zstor::key::VolumeKey;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

const STATE: &str = "state-v1";
const KIT: &str = "volume-v1.kit";
const JOURNAL: DatafileId = DatafileId(4);
const CHECKPOINT: DatafileId = DatafileId(5);
/// Everything the state directory holds.
const STATE_FILES: [&str; 9] = [
    "synced",
    "datafiles/0000000000000001.data.sealed",
    "datafiles/0000000000000001.data.crc",
    "datafiles/0000000000000002.data.sealed",
    "datafiles/0000000000000002.data.crc",
    "datafiles/0000000000000003.data.sealed",
    "datafiles/0000000000000003.data.crc",
    "datafiles/0000000000000004.meta.sealed",
    "datafiles/0000000000000005.meta.sealed",
];
/// The meta datafiles: each has a random salt, so their frames are compared, not their bytes.
const META_FILES: std::ops::Range<usize> = 7..9;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn media() -> Arc<dyn Media> {
    Arc::new(DiskMedia)
}

fn may_write(path: &Path) -> bool {
    !path.exists() && std::env::var_os("QSFS_WRITE_GOLDEN").is_some()
}

fn copy_state(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.join("datafiles")).unwrap();
    for name in STATE_FILES {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

/// What the files of the golden volume hold: bytes that differ from page to page.
fn contents(bytes: u64) -> Vec<u8> {
    (0..bytes)
        .map(|at| (at * 7 + at / 4096).to_le_bytes()[0])
        .collect()
}

fn extent(datafile: u64, offset: u64, bytes: u32, crc: u32) -> DataExtent {
    DataExtent {
        datafile: DatafileId(datafile),
        offset,
        bytes,
        crc,
    }
}

/// The extents the store answered for 10,000 bytes, and for 100 more in a datafile of their own.
fn extents() -> (Vec<DataExtent>, Vec<DataExtent>) {
    let all = contents(10_000);
    let (first, second) = all.split_at(9000);
    let long = vec![
        extent(1, 0, 9000, crc32fast::hash(first)),
        extent(2, 0, 1000, crc32fast::hash(second)),
    ];
    (
        long,
        vec![extent(3, 0, 100, crc32fast::hash(&contents(100)))],
    )
}

fn time(sequence: u64) -> Time {
    Time {
        seconds: 1_700_000_000 + i64::try_from(sequence).unwrap(),
        nanos: 999_999_999,
    }
}

fn create(name: &str, parent: u64, ino: u64, mode: u32, target: &str) -> Action {
    Action::Create {
        parent: Ino(parent),
        name: name.into(),
        ino: Ino(ino),
        mode,
        uid: 1000,
        gid: 100,
        rdev: 0,
        target: target.into(),
    }
}

fn unlink(name: &str, reap: bool) -> Action {
    Action::Unlink {
        parent: Ino::ROOT,
        name: name.into(),
        reap,
    }
}

fn set_xattr(name: &str, mode: XattrMode) -> Action {
    Action::SetXattr {
        ino: Ino(3),
        name: name.into(),
        value: vec![0, 0xff, b'v'],
        mode,
    }
}

fn write(offset: u64, extents: Vec<DataExtent>, clear_privileges: bool) -> Action {
    Action::Write {
        ino: Ino(3),
        offset,
        extents,
        clear_privileges,
    }
}

fn rename(parent: u64, name: &str, new_name: &str, mode: RenameMode, reap: bool) -> Action {
    Action::Rename {
        parent: Ino(parent),
        name: name.into(),
        new_parent: Ino::ROOT,
        new_name: new_name.into(),
        mode,
        reap,
    }
}

/// The journal: every kind of change, every mode, options present and absent.
fn operations() -> Vec<Operation> {
    let (long, short) = extents();
    let set_attr = Action::SetAttr {
        ino: Ino(3),
        mode: Some(0o600),
        uid: None,
        gid: Some(u32::MAX - 1),
        size: Some(1 << 40),
        atime: Some(Time {
            seconds: -2,
            nanos: 5,
        }),
        mtime: None,
        clear_privileges: true,
    };
    let punch = Action::Punch {
        ino: Ino(3),
        offset: 9100,
        bytes: 900,
        extend_to: 20_000,
        clear_privileges: false,
    };
    let link = Action::Link {
        ino: Ino(3),
        parent: Ino::ROOT,
        name: b"\xff not UTF-8".to_vec(),
    };
    let removed = Action::RemoveXattr {
        ino: Ino(3),
        name: b"user.gone".to_vec(),
    };
    let rmdir = Action::Rmdir {
        parent: Ino::ROOT,
        name: b"e".to_vec(),
    };
    let released = Action::Released {
        datafiles: vec![DatafileId(2)],
    };
    let actions = vec![
        create("d", 1, 2, 0o040_755, ""),
        create("a", 2, 3, 0o100_644, ""),
        write(0, long, false),
        write(9000, short, true),
        punch,
        released,
        set_xattr("user.kept", XattrMode::Any),
        set_xattr("user.gone", XattrMode::Create),
        set_xattr("user.gone", XattrMode::Replace),
        removed,
        link,
        rename(2, "a", "c", RenameMode::NoReplace, false),
        create("l", 1, 4, 0o120_777, "c"),
        rename(1, "c", "l", RenameMode::Exchange, false),
        set_attr,
        create("t", 1, 5, 0o100_600, ""),
        unlink("t", false),
        Action::Reap { ino: Ino(5) },
        create("e", 1, 6, 0o040_700, ""),
        rmdir,
        create("o", 1, 7, 0o100_600, ""),
        create("p", 1, 8, 0o100_600, ""),
        rename(1, "p", "o", RenameMode::Replace, false),
        create("q", 1, 9, 0o100_600, ""),
        unlink("q", true),
    ];
    (1..)
        .zip(actions)
        .map(|(sequence, action)| Operation {
            sequence,
            time: time(sequence),
            action,
        })
        .collect()
}

fn open_store(dir: &StateDir) -> Opened {
    let context = OpenContext {
        settings: StoreSettings {
            datafile_bytes: 9000,
            // Sealed and synced here, at known places only.
            push_interval: Duration::from_secs(3600),
            sync_interval: Duration::from_secs(3600),
            journal_bytes: 1 << 20,
        },
        last_known_id: DatafileId(0),
        committed: &|_| false,
        extents: &|record| Namespace::record_extents(record).map_err(|error| error.to_string()),
    };
    open(media(), dir.clone(), context).unwrap()
}

/// Makes the golden state directory with the code of today.
fn make_state(root: &Path) {
    let dir = StateDir::new(root);
    let opened = open_store(&dir);
    let store = &opened.store;
    let long = store.append_data(&contents(10_000)).unwrap();
    store.rotate_data();
    let short = store.append_data(&contents(100)).unwrap();
    assert_eq!((long, short), extents());
    let namespace = Namespace::open(&dir.names()).unwrap();
    for operation in operations() {
        let record = operation.encode();
        store.append_journal(&record).unwrap();
        namespace.replay(&record).unwrap();
    }
    store.sync().unwrap();
    assert_eq!(checkpoint::take(store, &namespace).unwrap(), CHECKPOINT);
    let deadline = Instant::now() + Duration::from_secs(60);
    assert!(store.wait_sealed(deadline).unwrap());
    store.stop();
}

/// A copy of the golden state directory; opening it writes to it.
fn golden_state() -> tempfile::TempDir {
    static WRITTEN: Once = Once::new();
    WRITTEN.call_once(|| {
        if may_write(&golden(STATE)) {
            let fresh = tempfile::tempdir().unwrap();
            make_state(fresh.path());
            copy_state(fresh.path(), &golden(STATE));
        }
    });
    let copy = tempfile::tempdir().unwrap();
    copy_state(&golden(STATE), copy.path());
    copy
}

/// Kinds and payloads of a meta datafile that is complete and undamaged.
fn frames(root: &Path, id: DatafileId) -> Vec<(u8, Vec<u8>)> {
    let path = root.join(format!("datafiles/{:016x}.meta.sealed", id.0));
    let mut found = Vec::new();
    let (_, report) = Datafile::inspect(&media(), &path, meta_header(id), &mut |frame| {
        assert_eq!(frame.prefix_bytes, 0);
        found.push((frame.kind, frame.payload.to_vec()));
    })
    .unwrap();
    assert!(report.ends_marked && report.damaged.is_empty());
    found
}

#[test]
fn page_sums_of_version_1_stay_as_they_are() {
    let state = golden_state();
    let contents = [
        contents(10_000)[..9000].to_vec(),
        contents(10_000)[9000..].to_vec(),
        contents(100),
    ];
    for (id, contents) in (1..).zip(contents) {
        let data = state
            .path()
            .join(format!("datafiles/{id:016x}.data.sealed"));
        assert_eq!(std::fs::read(data).unwrap(), contents);
        let raw = std::fs::read(StateDir::new(state.path()).page_sums(DatafileId(id))).unwrap();
        let sums: Vec<u32> = contents.chunks(4096).map(crc32fast::hash).collect();
        let bytes = contents.len() as u64;
        assert_eq!(pages::decode(&raw).unwrap(), (bytes, sums.clone()));
        assert_eq!(pages::encode(bytes, &sums), raw);
    }
}

#[test]
fn the_synced_point_of_version_1_stays_as_it_is() {
    let state = golden_state();
    let raw = std::fs::read(StateDir::new(state.path()).synced_point()).unwrap();
    // The header, and all records as frames.
    let records = operations();
    let framed = records
        .iter()
        .map(|operation| 32 + operation.encode().len().next_multiple_of(8) as u64);
    let point = SyncedPoint {
        journal: JOURNAL,
        offset: 64 + framed.sum::<u64>(),
    };
    assert_eq!(SyncedPoint::decode(&raw), Some(point));
    assert_eq!(point.encode().as_slice(), raw);
}

#[test]
fn the_journal_of_version_1_stays_as_it_is() {
    let state = golden_state();
    let found = frames(state.path(), JOURNAL);
    let wanted = operations();
    assert_eq!(found.len(), wanted.len());
    for ((kind, record), operation) in found.iter().zip(wanted) {
        assert_eq!(*kind, KIND_RECORD);
        assert_eq!(Operation::decode(record).as_ref(), Ok(&operation));
        assert_eq!(&operation.encode(), record);
    }
}

/// Keys of a batch as `docs/format.md` draws it, read by hand; values end with the row version, xattrs are raw.
fn keys_of(batch: &[u8]) -> Vec<Vec<u8>> {
    assert_eq!(batch[0], 1);
    let mut keys = Vec::new();
    let mut rest = &batch[1..];
    while !rest.is_empty() {
        let key_bytes = usize::from(u16::from_le_bytes(rest[..2].try_into().unwrap()));
        let value_bytes = u32::from_le_bytes(rest[2..6].try_into().unwrap());
        let (key, after) = rest[6..].split_at(key_bytes);
        let (value, after) = after.split_at(usize::try_from(value_bytes).unwrap());
        if key[0] == b'x' {
            assert_eq!(value, [0, 0xff, b'v']);
        } else {
            assert_eq!(value.last(), Some(&1));
        }
        keys.push(key.to_vec());
        rest = after;
    }
    keys
}

fn key(tag: u8, number: u64, rest: &[u8]) -> Vec<u8> {
    [&[tag], number.to_be_bytes().as_slice(), rest].concat()
}

fn wanted_keys() -> Vec<Vec<u8>> {
    let cookie = |number: u64| key(b'c', 1, &number.to_be_bytes());
    let start = |number: u64| key(b'e', 3, &number.to_be_bytes());
    vec![
        cookie(4),
        cookie(44),
        cookie(56),
        cookie(57),
        cookie(92),
        key(b'd', 1, b"c"),
        key(b'd', 1, b"d"),
        key(b'd', 1, b"l"),
        key(b'd', 1, b"o"),
        key(b'd', 1, b"\xff not UTF-8"),
        start(0),
        start(9000),
        key(b'i', 1, b""),
        key(b'i', 2, b""),
        key(b'i', 3, b""),
        key(b'i', 4, b""),
        key(b'i', 7, b""),
        key(b'i', 8, b""),
        key(b'l', 1, b""),
        key(b'l', 3, b""),
        b"m".to_vec(),
        key(b'o', 7, b""),
        key(b'x', 3, b"user.kept"),
    ]
}

/// Every field of the namespace that the golden journal and the golden checkpoint lead to.
fn check_namespace(namespace: &Namespace) {
    assert_eq!(namespace.applied_sequence(), 25);
    assert_eq!(namespace.clock(), time(25));
    assert_eq!(namespace.inodes(), 6);
    assert_eq!(namespace.orphans().unwrap(), [Ino(7)]);
    assert_eq!(namespace.target(Ino(4)).unwrap(), Some(b"c".to_vec()));
    assert_eq!(namespace.parent(Ino(2)).unwrap(), Some(Ino::ROOT));
    assert_eq!(namespace.xattrs(Ino(3)).unwrap(), [b"user.kept"]);
    assert_eq!(
        namespace.xattr(Ino(3), b"user.kept").unwrap(),
        Some(vec![0, 0xff, b'v'])
    );
    assert_eq!(
        namespace.live_datafiles().unwrap(),
        [(DatafileId(1), 9000), (DatafileId(3), 100)]
    );
    let run = |start, datafile, bytes| FileExtent {
        start,
        datafile: DatafileId(datafile),
        offset: 0,
        bytes,
    };
    assert_eq!(
        namespace.extents_of(Ino(3)).unwrap(),
        [run(0, 1, 9000), run(9000, 3, 100)]
    );
    let file = namespace.attributes(Ino(3)).unwrap().unwrap();
    assert_eq!((file.mode, file.nlink), (0o100_600, 2));
    assert_eq!((file.uid, file.gid, file.rdev), (1000, u32::MAX - 1, 0));
    assert_eq!((file.size, file.allocated), (1 << 40, 9100));
    let read = Time {
        seconds: -2,
        nanos: 5,
    };
    assert_eq!((file.atime, file.btime), (read, time(2)));
    assert_eq!((file.mtime, file.ctime), (time(15), time(15)));
    let root = namespace.attributes(Ino::ROOT).unwrap().unwrap();
    assert_eq!((root.mode, root.nlink), (0o040_755, 3));
    let mut entries = Vec::new();
    namespace
        .entries(Ino::ROOT, 0, false, &mut |entry, _| {
            entries.push((entry.name, entry.ino.0, entry.kind, entry.cookie));
            ControlFlow::Continue(())
        })
        .unwrap();
    let wanted = [
        (b"d".to_vec(), 2, 0o040_000, 4),
        (b"\xff not UTF-8".to_vec(), 3, 0o100_000, 44),
        (b"c".to_vec(), 4, 0o120_000, 56),
        (b"l".to_vec(), 3, 0o100_000, 57),
        (b"o".to_vec(), 8, 0o100_000, 92),
    ];
    assert_eq!(entries, wanted);
}

#[test]
fn the_checkpoint_of_version_1_loads_and_is_what_its_journal_leads_to() {
    let state = golden_state();
    let found = frames(state.path(), CHECKPOINT);
    let [(begin, sequence), (rows, batch), (end, batches)] = found.as_slice() else {
        panic!("{} frames", found.len());
    };
    let kinds = [
        KIND_CHECKPOINT_BEGIN,
        KIND_CHECKPOINT_ROWS,
        KIND_CHECKPOINT_END,
    ];
    assert_eq!([*begin, *rows, *end], kinds);
    assert_eq!(sequence.as_slice(), 25_u64.to_le_bytes());
    assert_eq!(batches.as_slice(), 1_u64.to_le_bytes());
    assert_eq!(keys_of(batch), wanted_keys());

    let loaded = Namespace::open(&state.path().join("loaded")).unwrap();
    let mut loader = loaded.load().unwrap();
    loader.rows(batch).unwrap();
    assert_eq!(loader.finish().unwrap(), 25);
    check_namespace(&loaded);

    let replayed = Namespace::open(&state.path().join("replayed")).unwrap();
    for (_, record) in frames(state.path(), JOURNAL) {
        replayed.replay(&record).unwrap();
    }
    check_namespace(&replayed);
    for namespace in [loaded, replayed] {
        let dumped: Result<Vec<_>, _> = namespace.snapshot().unwrap().collect();
        assert_eq!(dumped.unwrap(), std::slice::from_ref(batch));
    }
}

#[test]
fn the_state_directory_of_version_1_opens_and_its_data_reads_back() {
    let state = golden_state();
    let dir = StateDir::new(state.path());
    let opened = open_store(&dir);
    assert_eq!(opened.report, Default::default());
    let mut read = Vec::new();
    for extent in extents().0 {
        let mut run = vec![0; usize::try_from(extent.bytes).unwrap()];
        let local = opened
            .store
            .read_data(extent.datafile, extent.offset, &mut run);
        assert!(local.unwrap());
        read.extend(run);
    }
    assert_eq!(read, contents(10_000));
    opened.store.stop();
}

#[test]
fn the_state_directory_is_written_as_it_was() {
    let state = golden_state();
    let fresh = tempfile::tempdir().unwrap();
    make_state(fresh.path());
    for name in &STATE_FILES[..META_FILES.start] {
        let read = |root: &Path| std::fs::read(root.join(name)).unwrap();
        assert_eq!(read(fresh.path()), read(state.path()), "{name}");
    }
    for id in [JOURNAL, CHECKPOINT] {
        let name = STATE_FILES[usize::try_from(id.0).unwrap() + 3];
        let bytes = |root: &Path| std::fs::metadata(root.join(name)).unwrap().len();
        assert_eq!(bytes(fresh.path()), bytes(state.path()), "{name}");
        assert_eq!(frames(fresh.path(), id), frames(state.path(), id), "{name}");
    }
}

fn make_kit() -> RecoveryKit {
    let cluster = ClusterId::from_bytes([7; 16]);
    let ca = CertificateAuthority::create(cluster).unwrap();
    RecoveryKit {
        volume: "golden".parse().unwrap(),
        volume_id: VolumeId::from_bytes([1; 16]),
        key_id: KeyId::from_bytes([2; 16]),
        key: VolumeKey::from_bytes([7; 32]),
        cluster,
        endpoints: vec!["127.0.0.1:7400".into(), "127.0.0.1:7401".into()],
        identity: ca.issue(Role::Client, "*").unwrap(),
    }
}

#[test]
fn the_recovery_kit_of_version_1_stays_as_it_is() {
    let path = golden(KIT);
    if may_write(&path) {
        make_kit().save(&path).unwrap();
    }
    let kit = RecoveryKit::load(&path).unwrap();
    assert_eq!(kit.volume.to_string(), "golden");
    assert_eq!(kit.volume_id, VolumeId::from_bytes([1; 16]));
    assert_eq!(kit.key_id, KeyId::from_bytes([2; 16]));
    assert_eq!(kit.key.expose(), &[7; 32]);
    assert_eq!(kit.cluster, ClusterId::from_bytes([7; 16]));
    assert_eq!(kit.endpoints, ["127.0.0.1:7400", "127.0.0.1:7401"]);
    assert_eq!(kit.identity.cluster(), kit.cluster);
    assert_eq!(kit.identity.role(), Role::Client);
    assert_eq!(kit.identity.subject(), "*");
    assert_eq!(*kit.to_text(), std::fs::read_to_string(&path).unwrap());
}
