//! A filesystem as naive as can be: maps of bytes.

use crate::namespace::{RenameMode, XattrMode};
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::fmt;

#[derive(Debug, Clone, Default)]
pub(super) struct Contents {
    size: u64,
    /// Bytes that are not in a hole.
    bytes: BTreeMap<u64, u8>,
}

#[derive(Debug, Clone)]
pub(super) enum Node {
    File(Contents),
    Directory { entries: BTreeMap<Vec<u8>, u64> },
    Symlink(Vec<u8>),
    Fifo,
}

impl Node {
    pub(super) fn file() -> Self {
        Self::File(Contents::default())
    }

    pub(super) fn directory() -> Self {
        Self::Directory {
            entries: BTreeMap::new(),
        }
    }

    fn is_directory(&self) -> bool {
        matches!(self, Self::Directory { .. })
    }
}

#[derive(Debug, Clone)]
struct Inode {
    node: Node,
    mode: u32,
    open: usize,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Debug, Clone)]
pub(super) struct Model {
    inodes: BTreeMap<u64, Inode>,
    next: u64,
}

/// Runs of equal bytes, as text.
#[derive(Default)]
pub(super) struct Runs(Vec<(u64, u64, u8)>);

impl Runs {
    pub(super) fn push(&mut self, at: u64, byte: u8) {
        match self.0.last_mut() {
            Some((_, end, last)) if *end == at && *last == byte => *end += 1,
            _ => self.0.push((at, at + 1, byte)),
        }
    }
}

impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (start, end, byte) in &self.0 {
            write!(f, "[{start}..{end}]={byte} ")?;
        }
        Ok(())
    }
}

type Outcome = Result<(), Errno>;

impl Model {
    /// Before the first operation.
    pub(super) fn unfounded() -> Self {
        Self::new()
    }

    pub(super) fn new() -> Self {
        let root = Inode {
            node: Node::directory(),
            mode: 0o755,
            open: 0,
            xattrs: BTreeMap::new(),
        };
        Self {
            inodes: BTreeMap::from([(1, root)]),
            next: 2,
        }
    }

    pub(super) fn numbers(&self, choose: impl Fn(&Node) -> bool) -> Vec<u64> {
        let chosen = self.inodes.iter().filter(|(_, inode)| choose(&inode.node));
        chosen.map(|(ino, _)| *ino).collect()
    }

    fn entries(&mut self, ino: u64) -> &mut BTreeMap<Vec<u8>, u64> {
        match &mut self.inodes.get_mut(&ino).unwrap().node {
            Node::Directory { entries } => entries,
            other => panic!("not a directory: {other:?}"),
        }
    }

    fn find(&self, parent: u64, name: &[u8]) -> Option<u64> {
        match &self.inodes[&parent].node {
            Node::Directory { entries } => entries.get(name).copied(),
            _ => None,
        }
    }

    fn links(&self, ino: u64) -> usize {
        let all = self.inodes.values().map(|inode| match &inode.node {
            Node::Directory { entries } => entries.values().filter(|&&to| to == ino).count(),
            _ => 0,
        });
        all.sum()
    }

    fn sweep(&mut self, ino: u64) {
        if ino != 1 && self.links(ino) == 0 && self.inodes[&ino].open == 0 {
            self.inodes.remove(&ino);
        }
    }

    fn is_directory(&self, ino: u64) -> bool {
        self.inodes[&ino].node.is_directory()
    }

    fn is_empty(&self, ino: u64) -> bool {
        matches!(&self.inodes[&ino].node, Node::Directory { entries } if entries.is_empty())
    }

    fn is_within(&self, ino: u64, ancestor: u64) -> bool {
        ino == ancestor
            || match &self.inodes[&ancestor].node {
                Node::Directory { entries } => {
                    entries.values().any(|&child| self.is_within(ino, child))
                }
                _ => false,
            }
    }

    pub(super) fn make(&mut self, parent: u64, name: &[u8], node: Node) -> Result<u64, Errno> {
        if self.find(parent, name).is_some() {
            return Err(Errno::EEXIST);
        }
        let mode = match &node {
            Node::File(_) => 0o644,
            Node::Directory { .. } => 0o755,
            Node::Symlink(_) => 0o777,
            Node::Fifo => 0o600,
        };
        // A set-group-id directory hands the bit down.
        let inherited = if node.is_directory() {
            self.inodes[&parent].mode & 0o2000
        } else {
            0
        };
        let ino = self.next;
        self.next += 1;
        self.inodes.insert(
            ino,
            Inode {
                node,
                mode: mode | inherited,
                open: 0,
                xattrs: BTreeMap::new(),
            },
        );
        self.entries(parent).insert(name.to_vec(), ino);
        Ok(ino)
    }

    pub(super) fn link(&mut self, ino: u64, parent: u64, name: &[u8]) -> Outcome {
        if self.links(ino) == 0 {
            return Err(Errno::ENOENT);
        }
        if self.find(parent, name).is_some() {
            return Err(Errno::EEXIST);
        }
        self.entries(parent).insert(name.to_vec(), ino);
        Ok(())
    }

    pub(super) fn unlink(&mut self, parent: u64, name: &[u8]) -> Outcome {
        let ino = self.find(parent, name).ok_or(Errno::ENOENT)?;
        if self.is_directory(ino) {
            return Err(Errno::EISDIR);
        }
        self.entries(parent).remove(name);
        self.sweep(ino);
        Ok(())
    }

    pub(super) fn rmdir(&mut self, parent: u64, name: &[u8]) -> Outcome {
        let ino = self.find(parent, name).ok_or(Errno::ENOENT)?;
        if !self.is_directory(ino) {
            return Err(Errno::ENOTDIR);
        }
        if !self.is_empty(ino) {
            return Err(Errno::ENOTEMPTY);
        }
        self.entries(parent).remove(name);
        self.sweep(ino);
        Ok(())
    }

    pub(super) fn rename(
        &mut self,
        (parent, name): (u64, &[u8]),
        (new_parent, new_name): (u64, &[u8]),
        mode: RenameMode,
    ) -> Outcome {
        let from = self.find(parent, name).ok_or(Errno::ENOENT)?;
        if self.is_within(new_parent, from) {
            return Err(Errno::EINVAL);
        }
        let to = self.find(new_parent, new_name);
        match (mode, to) {
            (RenameMode::NoReplace, Some(_)) => return Err(Errno::EEXIST),
            (RenameMode::Exchange, None) => return Err(Errno::ENOENT),
            (RenameMode::Exchange, Some(to)) => {
                if from == to {
                    return Ok(());
                }
                if self.is_within(parent, to) {
                    return Err(Errno::EINVAL);
                }
                self.entries(parent).insert(name.to_vec(), to);
                self.entries(new_parent).insert(new_name.to_vec(), from);
                return Ok(());
            }
            (_, Some(to)) if to == from => return Ok(()),
            (_, Some(to)) => {
                match (self.is_directory(from), self.is_directory(to)) {
                    (true, false) => return Err(Errno::ENOTDIR),
                    (false, true) => return Err(Errno::EISDIR),
                    (true, true) if !self.is_empty(to) => return Err(Errno::ENOTEMPTY),
                    _ => {}
                }
                self.entries(new_parent).remove(new_name);
                self.sweep(to);
            }
            (_, None) => {}
        }
        self.entries(parent).remove(name);
        self.entries(new_parent).insert(new_name.to_vec(), from);
        Ok(())
    }

    fn file(&mut self, ino: u64) -> Result<&mut Contents, Errno> {
        match &mut self.inodes.get_mut(&ino).unwrap().node {
            Node::File(contents) => Ok(contents),
            _ => Err(Errno::EINVAL),
        }
    }

    fn clear_privileges(&mut self, ino: u64) {
        let mode = &mut self.inodes.get_mut(&ino).unwrap().mode;
        *mode &= !0o4000;
        if *mode & 0o010 != 0 {
            *mode &= !0o2000;
        }
    }

    pub(super) fn write(&mut self, ino: u64, offset: u64, length: usize, byte: u8) -> Outcome {
        let file = self.file(ino)?;
        let end = offset + length as u64;
        file.bytes.extend((offset..end).map(|at| (at, byte)));
        file.size = file.size.max(end);
        self.clear_privileges(ino);
        Ok(())
    }

    pub(super) fn truncate(&mut self, ino: u64, size: u64) -> Outcome {
        let file = self.file(ino)?;
        file.size = size;
        file.bytes.split_off(&size);
        self.clear_privileges(ino);
        Ok(())
    }

    pub(super) fn fallocate(&mut self, ino: u64, offset: u64, length: u64, mode: i32) -> Outcome {
        let file = self.file(ino)?;
        let end = offset + length;
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
            file.bytes.retain(|at, _| !(offset..end).contains(at));
        }
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
            file.size = file.size.max(end);
        }
        self.clear_privileges(ino);
        Ok(())
    }

    pub(super) fn set_xattr(
        &mut self,
        ino: u64,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
    ) -> Outcome {
        let xattrs = &mut self.inodes.get_mut(&ino).unwrap().xattrs;
        match (mode, xattrs.contains_key(name)) {
            (XattrMode::Create, true) => Err(Errno::EEXIST),
            (XattrMode::Replace, false) => Err(Errno::ENODATA),
            _ => {
                xattrs.insert(name.to_vec(), value.to_vec());
                Ok(())
            }
        }
    }

    pub(super) fn remove_xattr(&mut self, ino: u64, name: &[u8]) -> Outcome {
        let xattrs = &mut self.inodes.get_mut(&ino).unwrap().xattrs;
        xattrs.remove(name).map(|_| ()).ok_or(Errno::ENODATA)
    }

    pub(super) fn chmod(&mut self, ino: u64, mode: u32) {
        self.inodes.get_mut(&ino).unwrap().mode = mode;
    }

    pub(super) fn open(&mut self, ino: u64) {
        self.inodes.get_mut(&ino).unwrap().open += 1;
    }

    pub(super) fn close(&mut self, ino: u64) {
        self.inodes.get_mut(&ino).unwrap().open -= 1;
        self.sweep(ino);
    }

    /// The same text as the filesystem's dump.
    pub(super) fn dump(&self) -> String {
        let mut text = String::new();
        self.walk(1, "", &mut text);
        text
    }

    fn walk(&self, ino: u64, path: &str, text: &mut String) {
        use fmt::Write as _;
        let inode = &self.inodes[&ino];
        let (kind, links) = match &inode.node {
            Node::Directory { entries } => {
                let below = entries.values().filter(|&&to| self.is_directory(to));
                (libc::S_IFDIR, 2 + below.count())
            }
            Node::File(_) => (libc::S_IFREG, self.links(ino)),
            Node::Symlink(_) => (libc::S_IFLNK, self.links(ino)),
            Node::Fifo => (libc::S_IFIFO, self.links(ino)),
        };
        let mode = kind | inode.mode;
        let _ = write!(text, "{path} #{ino} mode {mode:o} links {links}");
        for (name, value) in &inode.xattrs {
            let (name, first) = (name.escape_ascii(), value.first());
            let _ = write!(text, " {name}={}x{first:?}", value.len());
        }
        match &inode.node {
            Node::Directory { entries } => {
                text.push('\n');
                for (name, child) in entries {
                    self.walk(*child, &format!("{path}/{}", name.escape_ascii()), text);
                }
            }
            Node::Symlink(target) => {
                let _ = writeln!(text, " -> {}", target.escape_ascii());
            }
            Node::File(contents) => {
                let mut runs = Runs::default();
                for (&at, &byte) in &contents.bytes {
                    runs.push(at, byte);
                }
                let _ = writeln!(text, " size {}: {runs}", contents.size);
            }
            Node::Fifo => text.push('\n'),
        }
    }
}
