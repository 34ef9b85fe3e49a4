//! The filesystem against a naive model, with crashes: any prefix of the journal is the model at that point.
#![expect(clippy::unwrap_used, reason = "tests")]

mod model;
mod scenarios;

use super::testing::{MemoryStore, at, replayed, scratch};
use super::{AttributeChange, FileSystem, FileSystemOptions, FsError};
use crate::errno::errno;
use crate::namespace::{Ino, Namespace, RenameMode, XattrMode};
use model::{Model, Node};
use nix::errno::Errno;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

/// One step. Numbers are indexes into what exists at that moment, so that most steps hit something.
#[derive(Debug, Clone)]
enum Step {
    Create(usize, usize),
    Mkdir(usize, usize),
    Symlink(usize, usize),
    Mknod(usize, usize),
    Link(usize, usize, usize),
    Unlink(usize, usize),
    Rmdir(usize, usize),
    Rename((usize, usize), (usize, usize), RenameMode),
    Write(usize, u64, usize, u8),
    Truncate(usize, u64),
    Fallocate(usize, u64, u64, i32),
    SetXattr(usize, usize, u8, XattrMode),
    RemoveXattr(usize, usize),
    Chmod(usize, u32),
    Open(usize),
    Close(usize),
    Flush,
    Checkpoint,
}

const NAMES: [&[u8]; 6] = [b"a", b"b", b"c", b"\xff\xfe", "é".as_bytes(), b"a b\n"];

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let index = 0..12usize;
    let name = 0..NAMES.len();
    let place = (0..6usize, name.clone());
    let offset = prop_oneof![0..200u64, 0..9000u64, Just(1 << 40)];
    let length = prop_oneof![1..100usize, 1..5000usize];
    let rename = prop_oneof![
        3 => Just(RenameMode::Replace),
        1 => Just(RenameMode::NoReplace),
        1 => Just(RenameMode::Exchange)
    ];
    let xattr = prop_oneof![
        Just(XattrMode::Any),
        Just(XattrMode::Create),
        Just(XattrMode::Replace)
    ];
    let falloc = prop_oneof![
        Just(0),
        Just(libc::FALLOC_FL_KEEP_SIZE),
        Just(libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE),
        Just(libc::FALLOC_FL_ZERO_RANGE),
    ];
    let step = prop_oneof![
        5 => place.clone().prop_map(|(d, n)| Step::Create(d, n)),
        3 => place.clone().prop_map(|(d, n)| Step::Mkdir(d, n)),
        1 => place.clone().prop_map(|(d, n)| Step::Symlink(d, n)),
        1 => place.clone().prop_map(|(d, n)| Step::Mknod(d, n)),
        2 => (index.clone(), place.clone()).prop_map(|(i, (d, n))| Step::Link(i, d, n)),
        3 => place.clone().prop_map(|(d, n)| Step::Unlink(d, n)),
        1 => place.clone().prop_map(|(d, n)| Step::Rmdir(d, n)),
        4 => (place.clone(), place, rename).prop_map(|(a, b, mode)| Step::Rename(a, b, mode)),
        8 => (index.clone(), offset.clone(), length, any::<u8>())
            .prop_map(|(i, o, l, b)| Step::Write(i, o, l, b)),
        2 => (index.clone(), offset.clone()).prop_map(|(i, o)| Step::Truncate(i, o)),
        3 => (index.clone(), offset.clone(), 1..6000u64, falloc)
            .prop_map(|(i, o, l, m)| Step::Fallocate(i, o, l, m)),
        1 => (index.clone(), name.clone(), any::<u8>(), xattr)
            .prop_map(|(i, n, v, m)| Step::SetXattr(i, n, v, m)),
        1 => (index.clone(), name).prop_map(|(i, n)| Step::RemoveXattr(i, n)),
        1 => (index.clone(), 0..0o7777u32).prop_map(|(i, m)| Step::Chmod(i, m)),
        3 => index.clone().prop_map(Step::Open),
        2 => index.prop_map(Step::Close),
        1 => Just(Step::Flush),
        1 => Just(Step::Checkpoint),
    ];
    prop::collection::vec(step, 1..80)
}

fn code<T>(outcome: Result<T, FsError>) -> Result<T, Errno> {
    outcome.map_err(|error| errno(&error))
}

struct Run {
    filesystem: Arc<FileSystem>,
    store: Arc<MemoryStore>,
    model: Model,
    /// Inodes of directories, files and everything, by the model's numbers (which are the same).
    open: Vec<u64>,
    clock: i64,
    /// The journal's length after every step, and the tree then.
    history: Vec<(usize, String)>,
    checkpoint: Option<Vec<Vec<u8>>>,
}

fn filesystem(namespace: Namespace, store: &Arc<MemoryStore>, read_only: bool) -> FileSystem {
    let options = FileSystemOptions {
        read_only,
        control_socket: None,
    };
    FileSystem::new(Arc::new(namespace), Arc::clone(store) as _, options, at(1)).unwrap()
}

impl Run {
    fn new(dir: &Path) -> Self {
        let store = Arc::new(MemoryStore::new(8000));
        let filesystem = Arc::new(filesystem(Namespace::open(dir).unwrap(), &store, false));
        let model = Model::new();
        let history = vec![(store.journal().len(), model.dump())];
        Self {
            filesystem,
            store,
            model,
            open: Vec::new(),
            clock: 10,
            history,
            checkpoint: None,
        }
    }

    fn directory(&self, index: usize) -> u64 {
        let all = self
            .model
            .numbers(|node| matches!(node, Node::Directory { .. }));
        all[index % all.len()]
    }

    fn other(&self, index: usize) -> Option<u64> {
        let all = self
            .model
            .numbers(|node| !matches!(node, Node::Directory { .. }));
        (!all.is_empty()).then(|| all[index % all.len()])
    }

    fn any(&self, index: usize) -> u64 {
        let all = self.model.numbers(|_| true);
        all[index % all.len()]
    }

    fn step(&mut self, step: &Step) {
        self.clock += 1;
        match step {
            Step::Create(..) | Step::Mkdir(..) | Step::Symlink(..) | Step::Mknod(..) => {
                self.make(step);
            }
            Step::Link(..) | Step::Unlink(..) | Step::Rmdir(..) | Step::Rename(..) => {
                self.rename_and_remove(step);
            }
            Step::Write(..) | Step::Truncate(..) | Step::Fallocate(..) => self.contents(step),
            Step::SetXattr(..) | Step::RemoveXattr(..) | Step::Chmod(..) => self.attributes(step),
            Step::Open(index) => {
                if let Some(ino) = self.other(*index) {
                    self.filesystem.open(Ino(ino)).unwrap();
                    self.model.open(ino);
                    self.open.push(ino);
                }
            }
            Step::Close(index) => {
                if !self.open.is_empty() {
                    let ino = self.open.swap_remove(index % self.open.len());
                    self.filesystem
                        .release(Ino(ino), at(self.clock).now)
                        .unwrap();
                    self.model.close(ino);
                }
            }
            Step::Flush => self.filesystem.namespace().flush().unwrap(),
            Step::Checkpoint => {
                let snapshot = self.filesystem.namespace().snapshot().unwrap();
                self.checkpoint = Some(snapshot.map(Result::unwrap).collect());
            }
        }
        self.history
            .push((self.store.journal().len(), self.model.dump()));
    }

    fn make(&mut self, step: &Step) {
        let (fs, caller) = (Arc::clone(&self.filesystem), at(self.clock));
        let (directory, name, node) = match *step {
            Step::Create(d, n) => (d, n, Node::file()),
            Step::Mkdir(d, n) => (d, n, Node::directory()),
            Step::Symlink(d, n) => (d, n, Node::Symlink(NAMES[n].to_vec())),
            Step::Mknod(d, n) => (d, n, Node::Fifo),
            _ => unreachable!("made by this"),
        };
        let (parent, name) = (self.directory(directory), NAMES[name]);
        let dir = Ino(parent);
        let made = code(match &node {
            Node::File(_) => fs.create(dir, name, 0o644, caller),
            Node::Directory { .. } => fs.mkdir(dir, name, 0o755, caller),
            Node::Symlink(target) => fs.symlink(dir, name, target, caller),
            Node::Fifo => fs.mknod(dir, name, libc::S_IFIFO | 0o600, 0, caller),
        })
        .map(|attributes| attributes.ino.0);
        let is_file = matches!(node, Node::File(_));
        assert_eq!(made, self.model.make(parent, name, node), "{step:?}");
        if let (true, Ok(ino)) = (is_file, made) {
            self.model.open(ino);
            self.open.push(ino);
        }
    }

    fn rename_and_remove(&mut self, step: &Step) {
        let (fs, caller) = (Arc::clone(&self.filesystem), at(self.clock));
        match *step {
            Step::Link(file, d, n) => {
                if let Some(ino) = self.other(file) {
                    let parent = self.directory(d);
                    let linked = code(fs.link(Ino(ino), Ino(parent), NAMES[n], caller));
                    let expected = self.model.link(ino, parent, NAMES[n]);
                    assert_eq!(linked.map(|_| ()), expected, "{step:?}");
                }
            }
            Step::Unlink(d, n) => {
                let parent = self.directory(d);
                let outcome = code(fs.unlink(Ino(parent), NAMES[n], caller));
                assert_eq!(outcome, self.model.unlink(parent, NAMES[n]), "{step:?}");
            }
            Step::Rmdir(d, n) => {
                let parent = self.directory(d);
                let outcome = code(fs.rmdir(Ino(parent), NAMES[n], caller));
                assert_eq!(outcome, self.model.rmdir(parent, NAMES[n]), "{step:?}");
            }
            Step::Rename((d1, n1), (d2, n2), mode) => {
                let from = (self.directory(d1), NAMES[n1]);
                let to = (self.directory(d2), NAMES[n2]);
                let outcome =
                    code(fs.rename((Ino(from.0), from.1), (Ino(to.0), to.1), mode, caller));
                assert_eq!(outcome, self.model.rename(from, to, mode), "{step:?}");
            }
            _ => unreachable!("renamed by this"),
        }
    }

    fn contents(&mut self, step: &Step) {
        let (fs, caller) = (Arc::clone(&self.filesystem), at(self.clock));
        let (Step::Write(index, ..) | Step::Truncate(index, ..) | Step::Fallocate(index, ..)) =
            *step
        else {
            unreachable!("contents change by this")
        };
        let Some(ino) = self.other(index) else {
            return;
        };
        let (outcome, expected) = match *step {
            Step::Write(_, offset, length, byte) => (
                fs.write(Ino(ino), offset, &vec![byte; length], true, caller)
                    .map(|_| ()),
                self.model.write(ino, offset, length, byte),
            ),
            Step::Truncate(_, size) => {
                let change = AttributeChange {
                    size: Some(size),
                    ..AttributeChange::default()
                };
                (
                    fs.setattr(Ino(ino), change, caller).map(|_| ()),
                    self.model.truncate(ino, size),
                )
            }
            Step::Fallocate(_, offset, length, mode) => (
                fs.fallocate(Ino(ino), offset, length, mode, true, caller),
                self.model.fallocate(ino, offset, length, mode),
            ),
            _ => unreachable!("checked above"),
        };
        assert_eq!(code(outcome), expected, "{step:?}");
    }

    fn attributes(&mut self, step: &Step) {
        let (fs, caller) = (Arc::clone(&self.filesystem), at(self.clock));
        let xattr = |name: usize| [b"user.", NAMES[name]].concat();
        let (outcome, expected) = match *step {
            Step::SetXattr(index, name, value, mode) => {
                let ino = self.any(index);
                let value = vec![value; usize::from(value)];
                (
                    fs.setxattr(Ino(ino), &xattr(name), &value, mode, caller),
                    self.model.set_xattr(ino, &xattr(name), &value, mode),
                )
            }
            Step::RemoveXattr(index, name) => {
                let ino = self.any(index);
                (
                    fs.removexattr(Ino(ino), &xattr(name), caller),
                    self.model.remove_xattr(ino, &xattr(name)),
                )
            }
            Step::Chmod(index, mode) => {
                let ino = self.any(index);
                let change = AttributeChange {
                    mode: Some(mode),
                    ..AttributeChange::default()
                };
                self.model.chmod(ino, mode);
                (fs.setattr(Ino(ino), change, caller).map(|_| ()), Ok(()))
            }
            _ => unreachable!("attributes change by this"),
        };
        assert_eq!(code(outcome), expected, "{step:?}");
    }
}

/// The tree as text: what a user sees, contents as runs of equal bytes.
fn dump(fs: &Arc<FileSystem>) -> String {
    let mut text = String::new();
    let mut seen = BTreeMap::new();
    walk(fs, Ino::ROOT, "", &mut seen, &mut text);
    text
}

fn walk(
    fs: &Arc<FileSystem>,
    ino: Ino,
    path: &str,
    seen: &mut BTreeMap<Ino, ()>,
    text: &mut String,
) {
    let attributes = fs.getattr(ino).unwrap();
    let _ = write!(
        text,
        "{path} #{} mode {:o} links {}",
        ino.0, attributes.mode, attributes.nlink
    );
    for name in fs.listxattr(ino).unwrap().split(|&byte| byte == 0) {
        if !name.is_empty() {
            let value = fs.getxattr(ino, name).unwrap();
            let _ = write!(
                text,
                " {}={}x{:?}",
                name.escape_ascii(),
                value.len(),
                value.first()
            );
        }
    }
    match attributes.kind() {
        libc::S_IFDIR => {
            text.push('\n');
            let mut entries = BTreeMap::new();
            let handle = fs.opendir(ino).unwrap();
            let mut offset = 0;
            // Two entries a page, so that every place is continued from.
            loop {
                let mut page = 0;
                fs.readdir(ino, handle, offset, true, &mut |line| {
                    if page == 2 {
                        return ControlFlow::Break(());
                    }
                    page += 1;
                    offset = line.entry.cookie;
                    if let Some(found) = line.attributes {
                        assert_eq!((found.ino, found.kind()), (line.entry.ino, line.entry.kind));
                        assert!(entries.insert(line.entry.name, found.ino).is_none());
                    }
                    ControlFlow::Continue(())
                })
                .unwrap();
                if page == 0 {
                    break;
                }
            }
            fs.releasedir(handle);
            for (name, child) in entries {
                let found = fs.lookup(ino, &name).unwrap().unwrap();
                assert_eq!(found.ino, child);
                let path = format!("{path}/{}", name.escape_ascii());
                walk(fs, child, &path, seen, text);
            }
        }
        libc::S_IFLNK => {
            let _ = writeln!(text, " -> {}", fs.readlink(ino).unwrap().escape_ascii());
        }
        libc::S_IFREG => {
            let _ = writeln!(
                text,
                " size {}: {}",
                attributes.size,
                contents(fs, ino, attributes.size)
            );
            if seen.insert(ino, ()).is_none() {
                let extents = fs.namespace().extents_of(ino).unwrap();
                let allocated: u64 = extents.iter().map(|extent| extent.bytes).sum();
                assert_eq!(allocated, attributes.allocated, "allocated bytes of {path}");
                for pair in extents.windows(2) {
                    assert!(pair[0].end() <= pair[1].start, "extents of {path} overlap");
                }
                assert!(
                    extents
                        .last()
                        .is_none_or(|last| last.end() <= attributes.size)
                );
            }
        }
        _ => text.push('\n'),
    }
}

/// Runs of equal non-zero bytes. Where there is no data it must read as zeroes, which is checked near its edges.
fn contents(fs: &Arc<FileSystem>, ino: Ino, size: u64) -> String {
    let mut runs = model::Runs::default();
    let mut at = 0;
    while at < size {
        let Ok(data) = fs.seek(ino, at, super::Seek::Data) else {
            break;
        };
        let hole = fs.seek(ino, data, super::Seek::Hole).unwrap();
        assert!(data >= at && hole > data && hole <= size);
        let start = data.saturating_sub(3);
        let mut buffer = vec![0xaa; usize::try_from(hole + 3 - start).unwrap()];
        let read = fs.read(ino, start, &mut buffer).unwrap();
        assert!(read.missing.is_empty());
        assert_eq!(read.bytes as u64, (hole + 3).min(size) - start);
        for (index, &byte) in buffer[..read.bytes].iter().enumerate() {
            let place = start + index as u64;
            if (data..hole).contains(&place) {
                runs.push(place, byte);
            } else if place >= hole || place >= at {
                assert!(
                    byte == 0 || place < at || place >= hole,
                    "a hole reads as {byte}"
                );
            }
        }
        at = hole;
    }
    runs.to_string()
}

/// Every row, for comparing two namespaces completely.
fn rows(namespace: &Namespace) -> Vec<u8> {
    namespace
        .snapshot()
        .unwrap()
        .flat_map(|batch| batch.unwrap()[1..].to_vec())
        .collect()
}

/// Live bytes are what the extents of all inodes say.
fn check_live_bytes(namespace: &Namespace) {
    let mut expected = BTreeMap::new();
    let mut inodes = Vec::new();
    namespace.all_inodes(&mut |ino| inodes.push(ino)).unwrap();
    for ino in inodes {
        for extent in namespace.extents_of(ino).unwrap() {
            *expected.entry(extent.datafile).or_insert(0) += extent.bytes;
        }
    }
    for (datafile, live) in namespace.live_datafiles().unwrap() {
        assert_eq!(live, expected.remove(&datafile).unwrap_or(0), "{datafile}");
    }
    assert!(expected.is_empty(), "datafiles not counted: {expected:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn every_prefix_of_the_journal_is_the_model_at_that_point(steps in steps(), cut in 0..1000usize) {
        let dir = scratch();
        let mut run = Run::new(&dir.path().join("live"));
        for step in &steps {
            run.step(step);
        }
        let live = dump(&run.filesystem);
        prop_assert_eq!(&live, &run.model.dump());
        check_live_bytes(run.filesystem.namespace());
        let journal = run.store.journal();

        // Killed after any record: the model as it was then, and nothing of what was open and unlinked stays.
        let cut = cut % (journal.len() + 1);
        let restarted = filesystem(replayed(&dir.path().join("cut"), &journal[..cut]), &run.store, true);
        let expected = if cut == 0 {
            Model::unfounded().dump()
        } else {
            run.history.iter().find(|(length, _)| *length >= cut).unwrap().1.clone()
        };
        prop_assert_eq!(dump(&Arc::new(restarted)), expected);

        // Checkpoint and the records after it, with some from before it: the same rows, byte by byte.
        let other = Namespace::open(&dir.path().join("loaded")).unwrap();
        if let Some(batches) = &run.checkpoint {
            let mut loader = other.load().unwrap();
            for batch in batches {
                loader.rows(batch).unwrap();
            }
            loader.finish().unwrap();
        }
        for record in &journal {
            other.replay(record).unwrap();
        }
        prop_assert_eq!(rows(&other), rows(run.filesystem.namespace()));

        // Mounted again by a writer: files that were unlinked while open are gone.
        let sweeper = filesystem(other, &run.store, false);
        prop_assert!(sweeper.namespace().orphans().unwrap().is_empty());
        check_live_bytes(sweeper.namespace());
        prop_assert_eq!(dump(&Arc::new(sweeper)), live);
    }
}
