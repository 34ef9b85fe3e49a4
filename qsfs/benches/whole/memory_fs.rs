//! A filesystem in memory over the same FUSE crate: what the kernel and the crate cost, without us.

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

const TTL: Duration = Duration::from_secs(60);

struct Node {
    attr: FileAttr,
    content: Vec<u8>,
    entries: BTreeMap<OsString, u64>,
}

#[derive(Default)]
struct Tree {
    nodes: BTreeMap<u64, Node>,
    newest: u64,
}

impl Tree {
    fn add(&mut self, kind: FileType, perm: u16) -> u64 {
        self.newest += 1;
        let now = SystemTime::now();
        let attr = FileAttr {
            ino: INodeNo(self.newest),
            size: 0,
            blocks: 0,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        self.nodes.insert(
            self.newest,
            Node {
                attr,
                content: Vec::new(),
                entries: BTreeMap::new(),
            },
        );
        self.newest
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> Option<&Node> {
        let number = self.nodes.get(&parent.0)?.entries.get(name)?;
        self.nodes.get(number)
    }

    fn add_child(
        &mut self,
        parent: INodeNo,
        name: &OsStr,
        kind: FileType,
        perm: u16,
    ) -> Option<FileAttr> {
        if !self.nodes.contains_key(&parent.0) {
            return None;
        }
        let number = self.add(kind, perm);
        self.nodes
            .get_mut(&parent.0)?
            .entries
            .insert(name.to_owned(), number);
        Some(self.nodes.get(&number)?.attr)
    }

    fn remove_child(&mut self, parent: INodeNo, name: &OsStr) -> bool {
        let removed = self
            .nodes
            .get_mut(&parent.0)
            .and_then(|node| node.entries.remove(name));
        removed.is_some_and(|number| self.drop_link(number))
    }

    /// One name less; the last one takes the node with it.
    fn drop_link(&mut self, number: u64) -> bool {
        let Some(node) = self.nodes.get_mut(&number) else {
            return false;
        };
        node.attr.nlink = node.attr.nlink.saturating_sub(1);
        if node.attr.nlink == 0 {
            self.nodes.remove(&number);
        }
        true
    }
}

/// The filesystem: a map behind one lock.
pub(crate) struct MemoryFs(Mutex<Tree>);

impl MemoryFs {
    /// Mounts an empty one with the settings the real mount uses.
    pub(crate) fn mount(at: &Path) -> io::Result<BackgroundSession> {
        let mut tree = Tree::default();
        tree.add(FileType::Directory, 0o755);
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("memory".into()),
            MountOption::Subtype("bench".into()),
        ];
        config.n_threads = Some(4);
        config.clone_fd = true;
        fuser::spawn_mount(Self(Mutex::new(tree)), at, &config)
    }

    fn with<T>(&self, work: impl FnOnce(&mut Tree) -> T) -> T {
        work(&mut self.0.lock().expect("no holder panics"))
    }
}

impl Filesystem for MemoryFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _granted = config.set_max_write(1 << 20);
        let _granted =
            config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS | InitFlags::FUSE_ASYNC_READ);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.with(|tree| tree.child(parent, name).map(|node| node.attr)) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.with(|tree| tree.nodes.get(&ino.0).map(|node| node.attr)) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let attr = self.with(|tree| {
            let node = tree.nodes.get_mut(&ino.0)?;
            if let Some(size) = size {
                node.content.resize(usize::try_from(size).ok()?, 0);
                node.attr.size = size;
            }
            if let Some(mode) = mode {
                node.attr.perm = u16::try_from(mode & 0o7777).ok()?;
            }
            Some(node.attr)
        });
        match attr {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn mkdir(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        match self.with(|tree| tree.add_child(parent, name, FileType::Directory, 0o755)) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn symlink(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let attr = self.with(|tree| {
            let attr = tree.add_child(parent, name, FileType::Symlink, 0o777)?;
            tree.nodes.get_mut(&attr.ino.0)?.content =
                target.as_os_str().as_encoded_bytes().to_vec();
            Some(attr)
        });
        match attr {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.with(|tree| tree.nodes.get(&ino.0).map(|node| node.content.clone())) {
            Some(target) => reply.data(&target),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if self.with(|tree| tree.remove_child(parent, name)) {
            reply.ok()
        } else {
            reply.error(Errno::ENOENT)
        }
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.unlink(req, parent, name, reply);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.with(|tree| {
            let number = tree.nodes.get_mut(&parent.0)?.entries.remove(name)?;
            let target = tree.nodes.get_mut(&newparent.0)?;
            let replaced = target.entries.insert(newname.to_owned(), number)?;
            Some(tree.drop_link(replaced))
        });
        reply.ok();
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let attr = self.with(|tree| {
            tree.nodes
                .get_mut(&newparent.0)?
                .entries
                .insert(newname.to_owned(), ino.0);
            let node = tree.nodes.get_mut(&ino.0)?;
            node.attr.nlink += 1;
            Some(node.attr)
        });
        match attr {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn create(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match self.with(|tree| tree.add_child(parent, name, FileType::RegularFile, 0o644)) {
            Some(attr) => {
                reply.created(
                    &TTL,
                    &attr,
                    Generation(0),
                    FileHandle(0),
                    FopenFlags::FOPEN_KEEP_CACHE,
                );
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.with(|tree| match tree.nodes.get(&ino.0) {
            Some(node) => {
                let from = usize::try_from(offset)
                    .unwrap_or(usize::MAX)
                    .min(node.content.len());
                let to = from.saturating_add(size as usize).min(node.content.len());
                reply.data(&node.content[from..to]);
            }
            None => reply.error(Errno::ENOENT),
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self.with(|tree| {
            let node = tree.nodes.get_mut(&ino.0)?;
            let from = usize::try_from(offset).ok()?;
            if node.content.len() < from + data.len() {
                node.content.resize(from + data.len(), 0);
            }
            node.content[from..from + data.len()].copy_from_slice(data);
            node.attr.size = node.content.len() as u64;
            node.attr.mtime = SystemTime::now();
            u32::try_from(data.len()).ok()
        });
        match written {
            Some(bytes) => reply.written(bytes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn getxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _size: u32,
        reply: ReplyXattr,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.with(|tree| {
            let Some(node) = tree.nodes.get(&ino.0) else {
                return;
            };
            let skip = usize::try_from(offset).unwrap_or(usize::MAX);
            for (index, (name, number)) in node.entries.iter().enumerate().skip(skip) {
                let kind = tree
                    .nodes
                    .get(number)
                    .map_or(FileType::RegularFile, |child| child.attr.kind);
                if reply.add(INodeNo(*number), index as u64 + 1, kind, name) {
                    break;
                }
            }
        });
        reply.ok();
    }
}
