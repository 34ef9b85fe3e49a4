//! The namespace: what files exist, what they are called, and which bytes of which datafile they consist of.
//!
//! ```text
//! filesystem --plan--> Operation --apply--> rows (draft) --journal ok--> commit
//! recovery  --record-> Operation --apply--> rows (draft) --------------> commit
//! ```
//!
//! The rows are a cache of the journal: every change is an [`Operation`], numbered without gaps, and
//! `apply` is the only thing that changes rows, when the filesystem runs as well as when it is recovered.
//! Invariants: the journal is written before rows become visible; [`Namespace::applied_sequence`] and the rows
//! always agree; replaying a record twice does nothing.

pub(crate) mod apply;
mod checkpoint;
pub(crate) mod extents;
pub(crate) mod operation;
mod rows;
mod table;
#[cfg(test)]
mod tests;

pub use apply::{ApplyError, FILE_BYTES_MAX};
pub use checkpoint::{BATCH_BYTES_MAX, Loader, Snapshot};
pub use extents::{EXTENT_BYTES_MAX, FileExtent};
pub use operation::{
    Action, Ino, Operation, RECORD_BYTES_MAX, RECORD_VERSION, RecordError, RenameMode, Time,
    XattrMode,
};
pub use rows::RowError;
pub use table::TableError;

use crate::ports::DataExtent;
use parking_lot::Mutex;
use qsfs_zstor::id::DatafileId;
use rows::{
    CookieEntry, Dirent, Inode, META_KEY, Meta, cookie_key, dirent_key, inode_key, live_key,
    number_in, orphan_key, xattr_end, xattr_key,
};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use table::{Draft, Layer, Rows, Table, View};

/// Why the namespace cannot do it.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The rows on the disk cannot be used; [`Namespace::reset`] and rebuild from checkpoint and journal.
    #[error("open the namespace: {0}")]
    Unusable(&'static str),
    /// A directory cannot be removed.
    #[error("remove the namespace directory {path}: {source}")]
    Reset {
        /// Which.
        path: String,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// Rows cannot be read or written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A journal record does not decode.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A record is missing between the last applied one and this one.
    #[error("journal record {found} follows {applied}: records between them are missing")]
    Gap {
        /// Last one applied.
        applied: u64,
        /// The one offered.
        found: u64,
    },
    /// A record decodes, yet cannot have been written in this state.
    #[error("journal record {sequence} does not apply: {source}")]
    Replay {
        /// Which.
        sequence: u64,
        /// Cause.
        #[source]
        source: ApplyError,
    },
    /// A checkpoint batch of another version, or no batch.
    #[error("checkpoint batch has version {version}, this program reads version 1")]
    Batch {
        /// Version found.
        version: u8,
    },
    /// A checkpoint that is not whole.
    #[error("checkpoint is not whole: {0}")]
    Checkpoint(&'static str),
}

/// Attributes as `stat(2)` shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub ino: Ino,
    /// Type and permission bits.
    pub mode: u32,
    /// Number of names (directories: 2 + subdirectories).
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of special files.
    pub rdev: u32,
    /// Size in bytes.
    pub size: u64,
    /// Bytes that are not holes.
    pub allocated: u64,
    /// Last access, as far as it was set explicitly.
    pub atime: Time,
    /// Last change of the contents.
    pub mtime: Time,
    /// Last change of anything.
    pub ctime: Time,
    /// Creation.
    pub btime: Time,
}

impl Attributes {
    fn new(ino: Ino, inode: &Inode) -> Self {
        Self {
            ino,
            mode: inode.mode,
            nlink: inode.nlink,
            uid: inode.uid,
            gid: inode.gid,
            rdev: inode.rdev,
            size: inode.size,
            allocated: inode.allocated,
            atime: inode.atime,
            mtime: inode.mtime,
            ctime: inode.ctime,
            btime: inode.btime,
        }
    }

    /// `S_IFMT` bits.
    pub const fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
}

/// A directory entry as `readdir` hands it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name.
    pub name: Vec<u8>,
    /// What it names.
    pub ino: Ino,
    /// `S_IFMT` bits.
    pub kind: u32,
    /// Place in the directory; the next page starts after it. Never changes while the entry exists.
    pub cookie: u64,
}

/// Whether a record changed anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replayed {
    /// Yes.
    Applied,
    /// It was applied before.
    Known,
}

/// See the module.
pub struct Namespace {
    table: Table,
    /// Also the lock that puts operations in order.
    writer: Mutex<Meta>,
    /// Copies of the meta row that may be read inside and outside the lock.
    applied: AtomicU64,
    inodes: AtomicU64,
    clock: Mutex<Time>,
}

impl std::fmt::Debug for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Namespace")
            .field("applied_sequence", &self.applied_sequence())
            .finish_non_exhaustive()
    }
}

const EMPTY: Meta = Meta {
    applied_sequence: 0,
    next_ino: Ino::ROOT.0 + 1,
    inodes: 1,
    clock: Time {
        seconds: 0,
        nanos: 0,
    },
};

impl Namespace {
    /// Opens (or makes) the namespace in `dir`. If this fails, [`Namespace::reset`] and rebuild.
    pub fn open(dir: &Path) -> Result<Self, NamespaceError> {
        let table = Table::open(dir)?;
        let meta = table.view().get_as::<Meta>(META_KEY)?;
        let namespace = Self {
            table,
            writer: Mutex::new(EMPTY),
            applied: AtomicU64::default(),
            inodes: AtomicU64::default(),
            clock: Mutex::default(),
        };
        match meta {
            Some(meta) => namespace.adopt(meta),
            None => namespace.found()?,
        }
        Ok(namespace)
    }

    /// Writes the rows of an empty namespace: a root directory and nothing else.
    fn found(&self) -> Result<(), NamespaceError> {
        let mut used = false;
        self.table.view().scan(b"", &[0xff], &mut |_, _| {
            used = true;
            Ok(ControlFlow::Break(()))
        })?;
        if used {
            return Err(NamespaceError::Unusable(
                "loading a checkpoint into it was interrupted",
            ));
        }
        self.table.commit(empty_rows());
        self.adopt(EMPTY);
        Ok(())
    }

    fn adopt(&self, meta: Meta) {
        self.publish(&meta);
        *self.writer.lock() = meta;
    }

    fn publish(&self, meta: &Meta) {
        self.applied.store(meta.applied_sequence, Ordering::Release);
        self.inodes.store(meta.inodes, Ordering::Release);
        *self.clock.lock() = meta.clock;
    }

    /// Removes the namespace's files; the next [`Namespace::open`] starts empty.
    pub fn reset(dir: &Path) -> Result<(), NamespaceError> {
        match std::fs::remove_dir_all(dir) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(NamespaceError::Reset {
                    path: dir.display().to_string(),
                    source,
                })
            }
            _ => Ok(()),
        }
    }

    /// Number of the last operation the rows contain; 0 before the first.
    pub fn applied_sequence(&self) -> u64 {
        self.applied.load(Ordering::Acquire)
    }

    /// Time of the newest operation.
    pub fn clock(&self) -> Time {
        *self.clock.lock()
    }

    /// Number of inodes, the root included.
    pub fn inodes(&self) -> u64 {
        self.inodes.load(Ordering::Acquire)
    }

    /// Number of the operation in a journal record.
    pub fn record_sequence(record: &[u8]) -> Result<u64, RecordError> {
        Ok(Operation::decode(record)?.sequence)
    }

    /// The extents a journal record names: data that must be there before it may be replayed.
    pub fn record_extents(record: &[u8]) -> Result<Vec<DataExtent>, RecordError> {
        Ok(Operation::decode(record)?.extents().to_vec())
    }

    /// Applies a journal record; one that was applied before is skipped, one that leaves a gap is refused.
    pub fn replay(&self, record: &[u8]) -> Result<Replayed, NamespaceError> {
        let operation = Operation::decode(record)?;
        let mut meta = self.writer.lock();
        if operation.sequence <= meta.applied_sequence {
            return Ok(Replayed::Known);
        }
        if operation.sequence != meta.applied_sequence + 1 {
            return Err(NamespaceError::Gap {
                applied: meta.applied_sequence,
                found: operation.sequence,
            });
        }
        self.table.check()?;
        let mut draft = Draft::new(self.table.view());
        let mut next = *meta;
        apply::apply(&mut draft, &mut next, &operation).map_err(|source| {
            NamespaceError::Replay {
                sequence: operation.sequence,
                source,
            }
        })?;
        let changes = draft.finish();
        self.table.commit(changes);
        *meta = next;
        self.publish(&meta);
        Ok(Replayed::Applied)
    }

    /// Plans, journals and applies one operation, alone. `plan` sees the namespace as it is and the number a new
    /// inode would get; `journal` gets the record. If either fails nothing has happened.
    pub(crate) fn execute<E: From<ApplyError>>(
        &self,
        now: Time,
        plan: impl FnOnce(&Plan<'_, '_>) -> Result<Action, E>,
        journal: impl FnOnce(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut meta = self.writer.lock();
        self.table.check().map_err(ApplyError::from)?;
        let mut draft = Draft::new(self.table.view());
        let action = plan(&Plan {
            draft: &draft,
            new_ino: Ino(meta.next_ino),
        })?;
        let operation = Operation {
            sequence: meta.applied_sequence + 1,
            time: now,
            action,
        };
        let mut next = *meta;
        apply::apply(&mut draft, &mut next, &operation)?;
        let changes = draft.finish();
        journal(&operation.encode())?;
        self.table.commit(changes);
        *meta = next;
        self.publish(&meta);
        Ok(())
    }

    /// Runs `check` while no operation can happen.
    pub(crate) fn still<T>(&self, check: impl FnOnce() -> T) -> T {
        let _meta = self.writer.lock();
        check()
    }

    /// A dump of all rows, consistent at its sequence, while operations go on.
    pub fn snapshot(&self) -> Result<Snapshot, NamespaceError> {
        let meta = self.writer.lock();
        self.table.flush()?;
        Ok(Snapshot::new(meta.applied_sequence, &self.table))
    }

    /// Empties the namespace to fill it from a checkpoint. Nothing else may use it meanwhile.
    pub fn load(&self) -> Result<Loader<'_>, NamespaceError> {
        let _meta = self.writer.lock();
        self.table.clear()?;
        Ok(Loader::new(self))
    }

    /// Hands everything applied so far to fjall and to the disk.
    pub fn flush(&self) -> Result<(), NamespaceError> {
        let _meta = self.writer.lock();
        self.table.flush()?;
        Ok(self.table.persist()?)
    }

    /// Bytes of the datafile that files still refer to.
    pub fn live_bytes(&self, datafile: DatafileId) -> Result<u64, NamespaceError> {
        Ok(self
            .table
            .view()
            .get_as(&live_key(datafile))?
            .unwrap_or_default())
    }

    /// Data datafiles that files refer to or did until lately (0), with their live bytes.
    pub fn live_datafiles(&self) -> Result<Vec<(DatafileId, u64)>, NamespaceError> {
        let mut found = Vec::new();
        self.table
            .view()
            .scan(b"l", &[b'l' + 1], &mut |key, value| {
                found.push((DatafileId(number_in(key, 1)?), rows::decode(key, value)?));
                Ok(ControlFlow::Continue(()))
            })?;
        Ok(found)
    }

    /// Data datafiles that no file refers to any more and that were not reported as released.
    pub fn dead_datafiles(&self) -> Result<Vec<DatafileId>, NamespaceError> {
        let datafiles = self.live_datafiles()?;
        Ok(datafiles
            .into_iter()
            .filter_map(|(datafile, live)| (live == 0).then_some(datafile))
            .collect())
    }

    /// Attributes of an inode.
    pub fn attributes(&self, ino: Ino) -> Result<Option<Attributes>, NamespaceError> {
        let inode = self.table.view().get_as::<Inode>(&inode_key(ino))?;
        Ok(inode.map(|inode| Attributes::new(ino, &inode)))
    }

    /// What a name in a directory names.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Option<Attributes>, NamespaceError> {
        let view = self.table.view();
        let Some(entry) = view.get_as::<Dirent>(&dirent_key(parent, name))? else {
            return Ok(None);
        };
        let ino = Ino(entry.ino);
        let inode = view.get_as::<Inode>(&inode_key(ino))?;
        Ok(inode.map(|inode| Attributes::new(ino, &inode)))
    }

    /// What a path below the root names; symlinks are not followed, `..` is not understood.
    pub fn lookup_path(&self, path: &Path) -> Result<Option<Attributes>, NamespaceError> {
        let mut found = self.attributes(Ino::ROOT)?;
        for component in path.components() {
            if let (std::path::Component::Normal(name), Some(parent)) = (component, found) {
                found = self.lookup(parent.ino, name.as_encoded_bytes())?;
            }
        }
        Ok(found)
    }

    /// Directory that holds a directory (the root holds itself).
    pub fn parent(&self, directory: Ino) -> Result<Option<Ino>, NamespaceError> {
        let inode = self.table.view().get_as::<Inode>(&inode_key(directory))?;
        Ok(inode.filter(Inode::is_dir).map(|inode| Ino(inode.parent)))
    }

    /// Target of a symlink.
    pub fn target(&self, ino: Ino) -> Result<Option<Vec<u8>>, NamespaceError> {
        let inode = self.table.view().get_as::<Inode>(&inode_key(ino))?;
        Ok(inode
            .filter(|inode| inode.kind() == libc::S_IFLNK)
            .map(|inode| inode.target))
    }

    /// Entries whose cookie is greater than `after`, in that order, until `visit` breaks. Their attributes come along
    /// if asked for.
    pub fn entries(
        &self,
        directory: Ino,
        after: u64,
        with_attributes: bool,
        visit: &mut dyn FnMut(Entry, Option<Attributes>) -> ControlFlow<()>,
    ) -> Result<(), NamespaceError> {
        let view = self.table.view();
        let (from, to) = (
            cookie_key(directory, after.saturating_add(1)),
            cookie_key(directory, u64::MAX),
        );
        view.scan(&from, &to, &mut |key, value| {
            let row: CookieEntry = rows::decode(key, value)?;
            let ino = Ino(row.ino);
            let attributes = if with_attributes {
                view.get_as::<Inode>(&inode_key(ino))?
                    .map(|inode| Attributes::new(ino, &inode))
            } else {
                None
            };
            let entry = Entry {
                name: row.name,
                ino,
                kind: row.kind,
                cookie: number_in(key, 9)?,
            };
            Ok(visit(entry, attributes))
        })?;
        Ok(())
    }

    /// Greatest cookie handed out so far: entries with greater ones are newer.
    pub(crate) fn newest_cookie(&self) -> u64 {
        self.applied_sequence() * 4 + 3
    }

    /// The extents that have bytes in `start..end`, in order, at most `limit`.
    pub fn extents(
        &self,
        ino: Ino,
        start: u64,
        end: u64,
        limit: usize,
    ) -> Result<Vec<FileExtent>, NamespaceError> {
        Ok(extents::overlapping(
            &self.table.view(),
            ino,
            start,
            end,
            limit,
        )?)
    }

    /// All extents of a file, in order.
    pub fn extents_of(&self, ino: Ino) -> Result<Vec<FileExtent>, NamespaceError> {
        self.extents(ino, 0, u64::MAX, usize::MAX)
    }

    /// Size of a regular file with the extents in `start..end`, as of one moment.
    pub(crate) fn contents(
        &self,
        ino: Ino,
        start: u64,
        end: u64,
    ) -> Result<Option<(u64, Vec<FileExtent>)>, NamespaceError> {
        let view: View<'_> = self.table.view();
        let Some(inode) = view
            .get_as::<Inode>(&inode_key(ino))?
            .filter(Inode::is_file)
        else {
            return Ok(None);
        };
        if inode.allocated == 0 || start >= inode.size {
            return Ok(Some((inode.size, Vec::new())));
        }
        let extents = extents::overlapping(&view, ino, start, end, usize::MAX)?;
        Ok(Some((inode.size, extents)))
    }

    /// Value of an extended attribute.
    pub fn xattr(&self, ino: Ino, name: &[u8]) -> Result<Option<Vec<u8>>, NamespaceError> {
        let value = self.table.view().get(&xattr_key(ino, name))?;
        Ok(value.map(|value| value.to_vec()))
    }

    /// Names of all extended attributes.
    pub fn xattrs(&self, ino: Ino) -> Result<Vec<Vec<u8>>, NamespaceError> {
        let mut names = Vec::new();
        self.table
            .view()
            .scan(&xattr_key(ino, b""), &xattr_end(ino), &mut |key, _| {
                names.push(key[9..].to_vec());
                Ok(ControlFlow::Continue(()))
            })?;
        Ok(names)
    }

    /// Inodes without a name that were not removed yet: open now, or when the last mount ended.
    pub fn orphans(&self) -> Result<Vec<Ino>, NamespaceError> {
        let mut found = Vec::new();
        self.table.view().scan(b"o", b"p", &mut |key, _| {
            found.push(Ino(number_in(key, 1)?));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    pub(crate) fn is_orphan(&self, ino: Ino) -> Result<bool, NamespaceError> {
        Ok(self.table.view().get(&orphan_key(ino))?.is_some())
    }

    /// Visits every inode's number.
    pub(crate) fn all_inodes(&self, visit: &mut dyn FnMut(Ino)) -> Result<(), NamespaceError> {
        self.table.view().scan(b"i", b"j", &mut |key, _| {
            visit(Ino(number_in(key, 1)?));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(())
    }
}

/// What an operation is planned with.
pub(crate) struct Plan<'a, 'd> {
    draft: &'d Draft<'a>,
    /// Number for a new inode.
    pub(crate) new_ino: Ino,
}

impl Plan<'_, '_> {
    /// What a name names: inode number and `S_IFMT` bits.
    pub(crate) fn entry(&self, parent: Ino, name: &[u8]) -> Result<Option<(Ino, u32)>, ApplyError> {
        let entry: Option<Dirent> = self.draft.get_as(&dirent_key(parent, name))?;
        Ok(entry.map(|entry| (Ino(entry.ino), entry.kind)))
    }

    /// Attributes.
    pub(crate) fn attributes(&self, ino: Ino) -> Result<Option<Attributes>, ApplyError> {
        let inode: Option<Inode> = self.draft.get_as(&inode_key(ino))?;
        Ok(inode.map(|inode| Attributes::new(ino, &inode)))
    }
}

/// The rows of a namespace at sequence 0.
fn empty_rows() -> Layer {
    let root = Inode {
        mode: libc::S_IFDIR | 0o755,
        nlink: 2,
        uid: 0,
        gid: 0,
        rdev: 0,
        size: 0,
        allocated: 0,
        atime: Time::default(),
        mtime: Time::default(),
        ctime: Time::default(),
        btime: Time::default(),
        parent: Ino::ROOT.0,
        entries: 0,
        tail: None,
        xattrs: 0,
        target: Vec::new(),
    };
    Layer::from([
        (inode_key(Ino::ROOT), Some(rows::encode(&root))),
        (META_KEY.to_vec(), Some(rows::encode(&EMPTY))),
    ])
}
