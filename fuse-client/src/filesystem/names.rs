//! Names: lookup, creating, linking, removing, renaming, listing.

use super::{Caller, FileSystem, FsError, NAME_BYTES_MAX, TARGET_BYTES_MAX};
use crate::namespace::apply::REAP_EXTENTS;
use crate::namespace::{Action, Attributes, Entry, Ino, Plan, RenameMode, Time};
use std::ops::ControlFlow;

/// Cookies of the two entries that have no row.
const DOT_COOKIE: u64 = 1;
const DOT_DOT_COOKIE: u64 = 2;

/// One line of `readdir`.
#[derive(Debug)]
pub struct DirectoryEntry {
    /// Name, inode, kind and the cookie after which the next page starts.
    pub entry: Entry,
    /// With `readdirplus`, for all but `.` and `..`.
    pub attributes: Option<Attributes>,
}

/// What is made, besides its name and owner.
#[derive(Default)]
struct NewInode<'a> {
    mode: u32,
    rdev: u32,
    target: &'a [u8],
}

impl NewInode<'_> {
    fn of(kind: u32, permissions: u32) -> Self {
        Self {
            mode: kind | (permissions & 0o7777),
            ..Self::default()
        }
    }
}

fn check_name(name: &[u8]) -> Result<(), FsError> {
    if name.len() > NAME_BYTES_MAX {
        return Err(FsError::NameTooLong);
    }
    if name.is_empty() || name == b"." || name == b".." {
        return Err(FsError::Invalid("name"));
    }
    if name.iter().any(|byte| matches!(byte, b'/' | 0)) {
        return Err(FsError::Invalid("name holds / or NUL"));
    }
    Ok(())
}

impl FileSystem {
    /// What a name in a directory names.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Option<Attributes>, FsError> {
        if name.len() > NAME_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        match name {
            b"." => Ok(Some(self.getattr(parent)?)),
            b".." => match self.namespace.parent(parent)? {
                Some(ino) => Ok(Some(self.getattr(ino)?)),
                None => Err(FsError::NotDirectory),
            },
            _ => Ok(self.namespace.lookup(parent, name)?),
        }
    }

    fn make(
        &self,
        parent: Ino,
        name: &[u8],
        new: NewInode<'_>,
        caller: Caller,
        prepare: impl FnOnce(Ino),
    ) -> Result<Attributes, FsError> {
        let NewInode { mode, rdev, target } = new;
        check_name(name)?;
        let mut new = None;
        self.execute(caller.now, |plan| {
            let directory = plan.attributes(parent)?.ok_or(FsError::NotFound)?;
            // A set-group-id directory hands down its group, and to directories the bit itself.
            let inherits = directory.mode & libc::S_ISGID != 0;
            let is_dir = mode & libc::S_IFMT == libc::S_IFDIR;
            prepare(plan.new_ino);
            new = Some(plan.new_ino);
            Ok(Action::Create {
                parent,
                name: name.to_vec(),
                ino: plan.new_ino,
                mode: if inherits && is_dir {
                    mode | libc::S_ISGID
                } else {
                    mode
                },
                uid: caller.uid,
                gid: if inherits { directory.gid } else { caller.gid },
                rdev,
                target: target.to_vec(),
            })
        })?;
        self.getattr(new.ok_or(FsError::NotFound)?)
    }

    /// A new regular file, open.
    pub fn create(
        &self,
        parent: Ino,
        name: &[u8],
        permissions: u32,
        caller: Caller,
    ) -> Result<Attributes, FsError> {
        let mut opened = None;
        let new = NewInode::of(libc::S_IFREG, permissions);
        let made = self.make(parent, name, new, caller, |ino| {
            self.handles.open(ino);
            opened = Some(ino);
        });
        if let (Err(_), Some(ino)) = (&made, opened) {
            // The number may be that of another thread's file by now, and this the last close of it.
            self.release(ino, caller.now)?;
        }
        made
    }

    /// A new regular or special file, not open.
    pub fn mknod(
        &self,
        parent: Ino,
        name: &[u8],
        mode: u32,
        rdev: u32,
        caller: Caller,
    ) -> Result<Attributes, FsError> {
        match mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK | libc::S_IFCHR | libc::S_IFBLK => {
                let new = NewInode {
                    mode,
                    rdev,
                    target: b"",
                };
                self.make(parent, name, new, caller, |_| {})
            }
            _ => Err(FsError::Invalid("type of mknod")),
        }
    }

    /// A new directory.
    pub fn mkdir(
        &self,
        parent: Ino,
        name: &[u8],
        permissions: u32,
        caller: Caller,
    ) -> Result<Attributes, FsError> {
        let new = NewInode::of(libc::S_IFDIR, permissions);
        self.make(parent, name, new, caller, |_| {})
    }

    /// A new symlink.
    pub fn symlink(
        &self,
        parent: Ino,
        name: &[u8],
        target: &[u8],
        caller: Caller,
    ) -> Result<Attributes, FsError> {
        if target.len() > TARGET_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        let new = NewInode {
            target,
            ..NewInode::of(libc::S_IFLNK, 0o777)
        };
        self.make(parent, name, new, caller, |_| {})
    }

    /// Target of a symlink.
    pub fn readlink(&self, ino: Ino) -> Result<Vec<u8>, FsError> {
        self.namespace
            .target(ino)?
            .ok_or(FsError::Invalid("not a symlink"))
    }

    /// Another name for a file.
    pub fn link(
        &self,
        ino: Ino,
        parent: Ino,
        name: &[u8],
        caller: Caller,
    ) -> Result<Attributes, FsError> {
        check_name(name)?;
        self.execute(caller.now, |_| {
            Ok(Action::Link {
                ino,
                parent,
                name: name.to_vec(),
            })
        })?;
        self.getattr(ino)
    }

    /// Whether the inode behind a name may go with the name, and whether that takes more than one step.
    fn leaving(
        &self,
        plan: &Plan<'_, '_>,
        parent: Ino,
        name: &[u8],
    ) -> Result<(bool, Option<Ino>), FsError> {
        let Some((ino, kind)) = plan.entry(parent, name)? else {
            return Ok((true, None));
        };
        let last = kind != libc::S_IFDIR
            && plan
                .attributes(ino)?
                .is_some_and(|attributes| attributes.nlink == 1);
        if !last {
            return Ok((true, None));
        }
        let reap = self.handles.orphan(ino);
        let large = plan
            .attributes(ino)?
            .is_some_and(|attributes| attributes.allocated > REAP_EXTENTS as u64);
        Ok((reap, (reap && large).then_some(ino)))
    }

    /// Removes a name of a file.
    pub fn unlink(&self, parent: Ino, name: &[u8], caller: Caller) -> Result<(), FsError> {
        let mut rest = None;
        self.execute(caller.now, |plan| {
            let (reap, more) = self.leaving(plan, parent, name)?;
            rest = more;
            Ok(Action::Unlink {
                parent,
                name: name.to_vec(),
                reap,
            })
        })?;
        rest.map_or(Ok(()), |ino| self.reap(ino, caller.now))
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: Ino, name: &[u8], caller: Caller) -> Result<(), FsError> {
        self.execute(caller.now, |_| {
            Ok(Action::Rmdir {
                parent,
                name: name.to_vec(),
            })
        })
    }

    /// Moves a name; `mode` says what becomes of an entry of the new name.
    pub fn rename(
        &self,
        (parent, name): (Ino, &[u8]),
        (new_parent, new_name): (Ino, &[u8]),
        mode: RenameMode,
        caller: Caller,
    ) -> Result<(), FsError> {
        check_name(name)?;
        check_name(new_name)?;
        let mut rest = None;
        self.execute(caller.now, |plan| {
            let same = plan.entry(parent, name)?.map(|(ino, _)| ino)
                == plan.entry(new_parent, new_name)?.map(|(ino, _)| ino);
            let (reap, more) = if mode == RenameMode::Replace && !same {
                self.leaving(plan, new_parent, new_name)?
            } else {
                (true, None)
            };
            rest = more;
            Ok(Action::Rename {
                parent,
                name: name.to_vec(),
                new_parent,
                new_name: new_name.to_vec(),
                mode,
                reap,
            })
        })?;
        rest.map_or(Ok(()), |ino| self.reap(ino, caller.now))
    }

    /// Opens a file: from now on it lives until [`FileSystem::release`], with or without a name.
    pub fn open(&self, ino: Ino) -> Result<Attributes, FsError> {
        // No operation runs in between: an unlink sees the handle, or this sees the unlink.
        let found = self.namespace.still(|| {
            let found = self.namespace.attributes(ino);
            if matches!(found, Ok(Some(_))) {
                self.handles.open(ino);
            }
            found
        })?;
        found.ok_or(FsError::NotFound)
    }

    /// Closes one handle; the last one of a file without names removes the file.
    pub fn release(&self, ino: Ino, now: Time) -> Result<(), FsError> {
        if self.handles.close(ino) {
            self.reap(ino, now)?;
        }
        Ok(())
    }

    /// Opens a directory for reading; answers its handle.
    pub fn opendir(&self, ino: Ino) -> Result<u64, FsError> {
        if self.getattr(ino)?.kind() != libc::S_IFDIR {
            return Err(FsError::NotDirectory);
        }
        Ok(self.handles.open_directory(self.namespace.newest_cookie()))
    }

    /// Closes a directory handle.
    pub fn releasedir(&self, handle: u64) {
        self.handles.close_directory(handle);
    }

    /// Hands out the entries after the cookie `offset`, in the order they were made, until `visit` breaks. What was
    /// made after the handle was opened (or rewound) is not shown, so that reading ends.
    pub fn readdir(
        &self,
        ino: Ino,
        handle: u64,
        offset: u64,
        with_attributes: bool,
        visit: &mut dyn FnMut(DirectoryEntry) -> ControlFlow<()>,
    ) -> Result<(), FsError> {
        let newest = self.namespace.newest_cookie();
        let limit = self.handles.directory_limit(handle, offset, newest);
        let dots: [(&[u8], u64); 2] = [(b".", DOT_COOKIE), (b"..", DOT_DOT_COOKIE)];
        for (name, cookie) in dots {
            if offset < cookie {
                let target = if cookie == DOT_COOKIE {
                    ino
                } else {
                    self.namespace.parent(ino)?.ok_or(FsError::NotFound)?
                };
                let entry = Entry {
                    name: name.to_vec(),
                    ino: target,
                    kind: libc::S_IFDIR,
                    cookie,
                };
                let line = DirectoryEntry {
                    entry,
                    attributes: None,
                };
                if visit(line).is_break() {
                    return Ok(());
                }
            }
        }
        let after = offset.max(DOT_DOT_COOKIE);
        self.namespace
            .entries(ino, after, with_attributes, &mut |entry, attributes| {
                if entry.cookie > limit {
                    return ControlFlow::Break(());
                }
                visit(DirectoryEntry { entry, attributes })
            })?;
        Ok(())
    }
}
