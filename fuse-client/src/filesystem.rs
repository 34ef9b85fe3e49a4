//! The filesystem core: POSIX operations on domain types, without a kernel.
//!
//! ```text
//! fuse --calls--> FileSystem --Operation--> Namespace (rows)
//!                     \--bytes, records--> Store (datafiles, journal)
//! ```
//!
//! Life of a write: contents are appended to the store outside the namespace's lock; then, inside it, the operation is
//! planned, checked, journaled and made visible. So the journal's order is the order in which changes were seen, and
//! whatever is there after a crash is a prefix of what was done. Permissions are checked by the kernel
//! (`default_permissions`); this checks everything else.

mod attributes;
mod contents;
mod handles;
mod names;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use attributes::{AttributeChange, TimeChange, XATTR_VALUE_BYTES_MAX};
pub use contents::{ContentsRead, Missing, Seek};
pub use names::DirectoryEntry;

use crate::namespace::{
    Action, ApplyError, Attributes, Ino, Namespace, NamespaceError, Plan, Time,
};
use crate::ports::{Capacity, Store, StoreError};
use handles::Handles;
use qsfs_zstor::id::DatafileId;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Longest name of a directory entry.
pub const NAME_BYTES_MAX: usize = 255;
/// Longest symlink target.
pub const TARGET_BYTES_MAX: usize = 4095;

/// Extended attribute of the root directory that answers the path of the control socket; never listed.
pub const CONTROL_XATTR: &[u8] = b"user.qsfs.control";

/// Why an operation failed. `errno.rs` says what the system call answers.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// No such inode or name.
    #[error("no such file or directory")]
    NotFound,
    /// Something below what is not a directory.
    #[error("not a directory")]
    NotDirectory,
    /// Contents of a directory.
    #[error("is a directory")]
    IsDirectory,
    /// A name or target that is too long.
    #[error("name too long")]
    NameTooLong,
    /// An argument outside what the operation takes.
    #[error("invalid argument: {0}")]
    Invalid(&'static str),
    /// Contents of something that has none.
    #[error("not a regular file")]
    NotRegular,
    /// Past the largest offset.
    #[error("file too big")]
    TooBig,
    /// `lseek` found no data or hole.
    #[error("no data there")]
    NoDataThere,
    /// No such extended attribute.
    #[error("no such extended attribute")]
    NoXattr,
    /// Something that `docs/semantics.md` names as missing.
    #[error("not supported: {0}")]
    NotSupported(&'static str),
    /// What nobody may do.
    #[error("not permitted: {0}")]
    NotPermitted(&'static str),
    /// A follower, or a writer that was fenced.
    #[error("read-only: {0}")]
    ReadOnly(&'static str),
    /// The namespace refuses.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The namespace cannot be read.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

/// Who asks, and when.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Time of the request.
    pub now: Time,
}

/// How the filesystem behaves.
#[derive(Debug, Clone, Default)]
pub struct FileSystemOptions {
    /// Every change fails with EROFS: a follower.
    pub read_only: bool,
    /// What [`CONTROL_XATTR`] answers.
    pub control_socket: Option<PathBuf>,
}

/// See the module.
pub struct FileSystem {
    namespace: Arc<Namespace>,
    store: Arc<dyn Store>,
    options: FileSystemOptions,
    handles: Handles,
    fenced: AtomicBool,
}

impl std::fmt::Debug for FileSystem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileSystem")
            .field("namespace", &self.namespace)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl FileSystem {
    /// The filesystem of a recovered namespace. A writer also removes what was unlinked but open when the last
    /// mount ended, and gives the root of a new volume to the user who mounts it.
    pub fn new(
        namespace: Arc<Namespace>,
        store: Arc<dyn Store>,
        options: FileSystemOptions,
        founder: Caller,
    ) -> Result<Self, FsError> {
        let filesystem = Self {
            namespace,
            store,
            options,
            handles: Handles::default(),
            fenced: AtomicBool::new(false),
        };
        if !filesystem.options.read_only {
            if filesystem.namespace.applied_sequence() == 0 {
                filesystem.found(founder)?;
            }
            for orphan in filesystem.namespace.orphans()? {
                filesystem.reap(orphan, founder.now)?;
            }
        }
        Ok(filesystem)
    }

    fn found(&self, founder: Caller) -> Result<(), FsError> {
        self.execute(founder.now, |_| {
            Ok(Action::SetAttr {
                ino: Ino::ROOT,
                mode: None,
                uid: Some(founder.uid),
                gid: Some(founder.gid),
                size: None,
                atime: Some(founder.now),
                mtime: Some(founder.now),
                clear_privileges: false,
            })
        })
    }

    /// The namespace below.
    pub fn namespace(&self) -> &Arc<Namespace> {
        &self.namespace
    }

    /// The store below.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Whether changes are refused from the start.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// From now on every change fails with EROFS: another writer took over. Reads go on.
    pub fn fence(&self) {
        self.fenced.store(true, Ordering::Release);
    }

    /// What `statfs` answers, without waiting, with the number of inodes.
    pub fn statfs(&self) -> (Capacity, u64) {
        (self.store.capacity(), self.namespace.inodes())
    }

    /// Returns when everything done so far is on the local disk. May wait for it.
    pub fn sync(&self) -> Result<(), FsError> {
        if self.options.read_only {
            return Ok(());
        }
        Ok(self.store.sync()?)
    }

    /// Attributes.
    pub fn getattr(&self, ino: Ino) -> Result<Attributes, FsError> {
        self.namespace.attributes(ino)?.ok_or(FsError::NotFound)
    }

    /// Datafiles without live bytes that the store has given up: they are listed as dead no longer.
    pub fn datafiles_released(&self, datafiles: Vec<DatafileId>, now: Time) -> Result<(), FsError> {
        self.execute(now, |_| Ok(Action::Released { datafiles }))
    }

    fn writable(&self) -> Result<(), FsError> {
        if self.options.read_only {
            Err(FsError::ReadOnly("mounted as a follower"))
        } else if self.fenced.load(Ordering::Acquire) {
            Err(FsError::ReadOnly("another writer took over"))
        } else {
            Ok(())
        }
    }

    /// Plans, journals and applies one operation, in order with all others.
    fn execute(
        &self,
        now: Time,
        plan: impl FnOnce(&Plan<'_, '_>) -> Result<Action, FsError>,
    ) -> Result<(), FsError> {
        self.writable()?;
        self.namespace.execute(now, plan, |record| {
            self.store.append_journal(record).map_err(FsError::from)
        })
    }

    /// Removes an inode without names, in bounded steps.
    fn reap(&self, ino: Ino, now: Time) -> Result<(), FsError> {
        // Asked between operations: the unlink that made the last close reap may still be on its way into the rows.
        while self.namespace.still(|| self.namespace.is_orphan(ino))? {
            let mut opened_again = false;
            let step = self.execute(now, |_| {
                // Whoever looked it up before it lost its name may have opened it since: then that close reaps.
                opened_again = !self.handles.orphan(ino);
                if opened_again {
                    return Err(FsError::NotFound);
                }
                Ok(Action::Reap { ino })
            });
            if opened_again {
                return Ok(());
            }
            step?;
        }
        Ok(())
    }
}
