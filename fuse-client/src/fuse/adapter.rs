//! The kernel's requests, one method each.

use super::convert::{answer, caller, file_attr, file_type, ino, nothing, now, time_change};
use super::opened::OpenedInodes;
use super::syncer::Syncer;
use crate::filesystem::{AttributeChange, ContentsRead, FileSystem, FsError, Seek};
use crate::namespace::{Attributes, RenameMode, XattrMode};
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, Notifier, OpenFlags,
    RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};
use std::cell::RefCell;
use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// Largest write the kernel sends, and about what it reads at once.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Requests the kernel may have under way for read-ahead and the like.
const BACKGROUND_REQUESTS_MAX: u16 = 64;
/// Inode numbers are never reused.
const GENERATION: Generation = Generation(0);
/// Unit of `statfs`.
const STATFS_BLOCK_BYTES: u32 = 4096;

thread_local! {
    /// What local reads of this worker are gathered in.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// See the module.
pub(super) struct Adapter {
    filesystem: Arc<FileSystem>,
    runtime: Handle,
    ttl: Duration,
    /// Whether the kernel may keep pages, and the absence of names, because nobody else changes them.
    exclusive: bool,
    opened: Arc<OpenedInodes>,
    syncer: Syncer,
    notifier: Arc<OnceLock<Notifier>>,
    ended: watch::Sender<bool>,
}

impl Adapter {
    pub(super) fn new(
        filesystem: Arc<FileSystem>,
        runtime: Handle,
        ttl: Duration,
        opened: Arc<OpenedInodes>,
        ended: watch::Sender<bool>,
    ) -> std::io::Result<Self> {
        Ok(Self {
            exclusive: !filesystem.is_read_only(),
            syncer: Syncer::start(Arc::clone(&filesystem))?,
            filesystem,
            runtime,
            ttl,
            opened,
            notifier: Arc::default(),
            ended,
        })
    }

    pub(super) fn notifier_slot(&self) -> Arc<OnceLock<Notifier>> {
        Arc::clone(&self.notifier)
    }

    fn open_flags(&self) -> FopenFlags {
        if self.exclusive {
            FopenFlags::FOPEN_KEEP_CACHE
        } else {
            FopenFlags::empty()
        }
    }

    fn reply_entry(
        &self,
        step: &'static str,
        made: Result<Attributes, FsError>,
        reply: ReplyEntry,
    ) {
        match made {
            Ok(attributes) => reply.entry(&self.ttl, &file_attr(&attributes), GENERATION),
            Err(error) => reply.error(answer(step, &error)),
        }
    }

    fn reply_attr(&self, step: &'static str, found: Result<Attributes, FsError>, reply: ReplyAttr) {
        match found {
            Ok(attributes) => reply.attr(&self.ttl, &file_attr(&attributes)),
            Err(error) => reply.error(answer(step, &error)),
        }
    }

    /// Answers a read whose bytes are partly not local, when they have come.
    fn read_remote(&self, mut buffer: Vec<u8>, read: ContentsRead, reply: ReplyData) {
        buffer.truncate(read.bytes);
        let completion = self.filesystem.complete(buffer, read.missing);
        self.runtime.spawn(async move {
            match completion.await {
                Ok(buffer) => reply.data(&buffer),
                Err(error) => reply.error(answer("read", &error)),
            }
        });
    }

    fn truncate_on_open(&self, request: &Request, file: INodeNo) -> Result<(), FsError> {
        let change = AttributeChange {
            size: Some(0),
            ..AttributeChange::default()
        };
        self.filesystem
            .setattr(ino(file), change, caller(request))
            .map(|_| ())
    }
}

fn reply_empty(step: &'static str, outcome: Result<(), FsError>, reply: ReplyEmpty) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(answer(step, &error)),
    }
}

/// `getxattr` and `listxattr` are asked first for the size (0), then for the bytes.
fn reply_xattr(step: &'static str, value: Result<Vec<u8>, FsError>, size: u32, reply: ReplyXattr) {
    match value {
        Ok(value) => match u32::try_from(value.len()) {
            Ok(bytes) if size == 0 => reply.size(bytes),
            Ok(bytes) if bytes <= size => reply.data(&value),
            _ => reply.error(Errno::ERANGE),
        },
        Err(error) => reply.error(answer(step, &error)),
    }
}

struct Written {
    filesystem: Arc<FileSystem>,
    notifier: Arc<OnceLock<Notifier>>,
    file: INodeNo,
    offset: u64,
    clear_privileges: bool,
    caller: crate::filesystem::Caller,
}

impl Written {
    fn write(self, data: &[u8], reply: ReplyWrite) {
        let outcome = self.filesystem.write(
            ino(self.file),
            self.offset,
            data,
            self.clear_privileges,
            self.caller,
        );
        match outcome {
            Ok(cleared) => {
                reply.written(u32::try_from(data.len()).expect("a request is at most 1 MiB"));
                if let (true, Some(notifier)) = (cleared, self.notifier.get()) {
                    // A negative offset means the attributes alone.
                    if let Err(error) = notifier.inval_inode(self.file, -1, 0) {
                        tracing::debug!(%error, "the kernel keeps the old mode until it asks again");
                    }
                }
            }
            Err(error) => reply.error(answer("write", &error)),
        }
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let mut wanted = vec![
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        ];
        if self.exclusive {
            wanted.push(InitFlags::FUSE_CACHE_SYMLINKS);
            wanted.push(InitFlags::FUSE_EXPLICIT_INVAL_DATA);
        } else {
            wanted.push(InitFlags::FUSE_AUTO_INVAL_DATA);
        }
        for flag in wanted {
            // An older kernel does without.
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "the kernel does not know this");
            }
        }
        // The answers only tell how much less the kernel takes; it then asks in smaller requests.
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        let _ = config.set_max_background(BACKGROUND_REQUESTS_MAX);
        Ok(())
    }

    fn destroy(&mut self) {
        self.ended.send_replace(true);
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.filesystem.lookup(ino(parent), name.as_bytes()) {
            Ok(Some(found)) => reply.entry(&self.ttl, &file_attr(&found), GENERATION),
            Ok(None) if self.exclusive => reply.entry(&self.ttl, &nothing(), GENERATION),
            Ok(None) => reply.error(Errno::ENOENT),
            Err(error) => reply.error(answer("lookup", &error)),
        }
    }

    fn forget(&self, _request: &Request, file: INodeNo, _lookups: u64) {
        // The kernel forgets an inode with all its lookups at once; should it come back, it is opened again.
        self.opened.forget(file.0);
    }

    fn getattr(
        &self,
        _request: &Request,
        file: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        self.reply_attr("getattr", self.filesystem.getattr(ino(file)), reply);
    }

    fn setattr(
        &self,
        request: &Request,
        file: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = AttributeChange {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(time_change),
            mtime: mtime.map(time_change),
        };
        let outcome = self.filesystem.setattr(ino(file), change, caller(request));
        self.reply_attr("setattr", outcome, reply);
    }

    fn readlink(&self, _request: &Request, file: INodeNo, reply: ReplyData) {
        match self.filesystem.readlink(ino(file)) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(answer("readlink", &error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let caller = caller(request);
        let made = self
            .filesystem
            .mknod(ino(parent), name.as_bytes(), mode, rdev, caller);
        self.reply_entry("mknod", made, reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let caller = caller(request);
        let made = self
            .filesystem
            .mkdir(ino(parent), name.as_bytes(), mode, caller);
        self.reply_entry("mkdir", made, reply);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let caller = caller(request);
        let outcome = self.filesystem.unlink(ino(parent), name.as_bytes(), caller);
        reply_empty("unlink", outcome, reply);
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let caller = caller(request);
        let outcome = self.filesystem.rmdir(ino(parent), name.as_bytes(), caller);
        reply_empty("rmdir", outcome, reply);
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let made = self.filesystem.symlink(
            ino(parent),
            name.as_bytes(),
            target.as_os_str().as_bytes(),
            caller(request),
        );
        self.reply_entry("symlink", made, reply);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mode = if flags.is_empty() {
            RenameMode::Replace
        } else if flags == RenameFlags::RENAME_NOREPLACE {
            RenameMode::NoReplace
        } else if flags == RenameFlags::RENAME_EXCHANGE {
            RenameMode::Exchange
        } else {
            return reply.error(Errno::EINVAL);
        };
        let outcome = self.filesystem.rename(
            (ino(parent), name.as_bytes()),
            (ino(new_parent), new_name.as_bytes()),
            mode,
            caller(request),
        );
        reply_empty("rename", outcome, reply);
    }

    fn link(
        &self,
        request: &Request,
        file: INodeNo,
        parent: INodeNo,
        name: &OsStr,
        reply: ReplyEntry,
    ) {
        let made = self
            .filesystem
            .link(ino(file), ino(parent), name.as_bytes(), caller(request));
        self.reply_entry("link", made, reply);
    }

    fn open(&self, request: &Request, file: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if let Err(error) = self.filesystem.open(ino(file)) {
            return reply.error(answer("open", &error));
        }
        if flags.0 & libc::O_TRUNC != 0
            && let Err(error) = self.truncate_on_open(request, file)
        {
            if let Err(error) = self.filesystem.release(ino(file), now()) {
                tracing::warn!(%error, "closing a file that could not be truncated");
            }
            return reply.error(answer("open", &error));
        }
        self.opened.insert(file.0);
        reply.opened(FileHandle(0), self.open_flags());
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let caller = caller(request);
        match self
            .filesystem
            .create(ino(parent), name.as_bytes(), mode, caller)
        {
            Ok(made) => {
                self.opened.insert(made.ino.0);
                reply.created(
                    &self.ttl,
                    &file_attr(&made),
                    GENERATION,
                    FileHandle(0),
                    self.open_flags(),
                );
            }
            Err(error) => reply.error(answer("create", &error)),
        }
    }

    fn read(
        &self,
        _request: &Request,
        file: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        READ_BUFFER.with_borrow_mut(|buffer| {
            let size = size as usize;
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            match self.filesystem.read(ino(file), offset, &mut buffer[..size]) {
                Ok(read) if read.missing.is_empty() => reply.data(&buffer[..read.bytes]),
                Ok(read) => self.read_remote(std::mem::take(buffer), read, reply),
                Err(error) => reply.error(answer("read", &error)),
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        file: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = Written {
            filesystem: Arc::clone(&self.filesystem),
            notifier: Arc::clone(&self.notifier),
            file,
            offset,
            clear_privileges: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
            caller: caller(request),
        };
        if self.filesystem.store().may_wait() {
            // Bounded by the runtime's blocking threads and by the kernel: one write per file, 64 in the background.
            let data = data.to_vec();
            self.runtime
                .spawn_blocking(move || written.write(&data, reply));
        } else {
            written.write(data, reply);
        }
    }

    fn flush(
        &self,
        _request: &Request,
        _file: INodeNo,
        _handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // The kernel takes this for success and asks no more: a close makes nothing durable that was not.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _request: &Request,
        file: INodeNo,
        _handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply_empty("release", self.filesystem.release(ino(file), now()), reply);
    }

    fn fsync(
        &self,
        _request: &Request,
        _file: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.syncer.sync(reply);
    }

    fn opendir(&self, _request: &Request, file: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.filesystem.opendir(ino(file)) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(error) => reply.error(answer("opendir", &error)),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        file: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let outcome = self
            .filesystem
            .readdir(ino(file), handle.0, offset, false, &mut |line| {
                let entry = line.entry;
                let full = reply.add(
                    INodeNo(entry.ino.0),
                    entry.cookie,
                    file_type(entry.kind),
                    OsStr::from_bytes(&entry.name),
                );
                if full {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
        match outcome {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(answer("readdir", &error)),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        file: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let outcome = self
            .filesystem
            .readdir(ino(file), handle.0, offset, true, &mut |line| {
                let entry = line.entry;
                // Only `.` and `..` come without attributes; of those the kernel takes no more than number and type.
                let attributes = match &line.attributes {
                    Some(attributes) => file_attr(attributes),
                    None => fuser::FileAttr {
                        ino: INodeNo(entry.ino.0),
                        kind: file_type(entry.kind),
                        ..nothing()
                    },
                };
                let full = reply.add(
                    attributes.ino,
                    entry.cookie,
                    OsStr::from_bytes(&entry.name),
                    &self.ttl,
                    &attributes,
                    GENERATION,
                );
                if full {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
        match outcome {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(answer("readdirplus", &error)),
        }
    }

    fn releasedir(
        &self,
        _request: &Request,
        _file: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.filesystem.releasedir(handle.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _file: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.syncer.sync(reply);
    }

    fn statfs(&self, _request: &Request, _file: INodeNo, reply: ReplyStatfs) {
        let (capacity, inodes) = self.filesystem.statfs();
        let block = u64::from(STATFS_BLOCK_BYTES);
        let free = capacity.free_bytes / block;
        reply.statfs(
            capacity.total_bytes / block,
            free,
            free,
            inodes.saturating_add(free),
            free,
            STATFS_BLOCK_BYTES,
            255,
            STATFS_BLOCK_BYTES,
        );
    }

    fn setxattr(
        &self,
        request: &Request,
        file: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let mode = match flags {
            libc::XATTR_CREATE => XattrMode::Create,
            libc::XATTR_REPLACE => XattrMode::Replace,
            _ => XattrMode::Any,
        };
        let outcome =
            self.filesystem
                .setxattr(ino(file), name.as_bytes(), value, mode, caller(request));
        reply_empty("setxattr", outcome, reply);
    }

    fn getxattr(
        &self,
        _request: &Request,
        file: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let value = self.filesystem.getxattr(ino(file), name.as_bytes());
        reply_xattr("getxattr", value, size, reply);
    }

    fn listxattr(&self, _request: &Request, file: INodeNo, size: u32, reply: ReplyXattr) {
        reply_xattr(
            "listxattr",
            self.filesystem.listxattr(ino(file)),
            size,
            reply,
        );
    }

    fn removexattr(&self, request: &Request, file: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let caller = caller(request);
        let outcome = self
            .filesystem
            .removexattr(ino(file), name.as_bytes(), caller);
        reply_empty("removexattr", outcome, reply);
    }

    fn access(&self, _request: &Request, _file: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel decides by mode and owner (`default_permissions`).
        reply.error(Errno::ENOSYS);
    }

    fn bmap(&self, _request: &Request, _file: INodeNo, _block: u32, _index: u64, reply: ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _file: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_bytes: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        request: &Request,
        file: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let caller = caller(request);
        let outcome =
            self.filesystem
                .fallocate(ino(file), offset, length, mode, caller.uid != 0, caller);
        reply_empty("fallocate", outcome, reply);
    }

    fn lseek(
        &self,
        _request: &Request,
        file: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            // The kernel does the others itself.
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(Errno::ENXIO);
        };
        match self.filesystem.seek(ino(file), offset, what) {
            Ok(found) => match i64::try_from(found) {
                Ok(found) => reply.offset(found),
                Err(_) => reply.error(Errno::EOVERFLOW),
            },
            Err(error) => reply.error(answer("lseek", &error)),
        }
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _from: INodeNo,
        _from_handle: FileHandle,
        _from_offset: u64,
        _to: INodeNo,
        _to_handle: FileHandle,
        _to_offset: u64,
        _length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel then copies through its page cache.
        reply.error(Errno::ENOSYS);
    }
}
