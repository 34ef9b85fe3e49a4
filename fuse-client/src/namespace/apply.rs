//! `apply`: what an operation does to the rows. Live execution and replay both run this and nothing else.
//!
//! It checks what must hold for the result to be a filesystem (names exist or not, directories are empty, no loops)
//! and fails without effect otherwise; who may do what is decided above, by the kernel and the filesystem core.

use super::extents;
use super::operation::{Action, Ino, Operation, RenameMode, Time, XattrMode};
use super::rows::{
    self, CookieEntry, Dirent, Inode, Meta, cookie_key, dirent_key, inode_key, live_key,
    orphan_key, xattr_end, xattr_key,
};
use super::table::{Draft, Rows, TableError};
use crate::ports::DataExtent;
use qsfs_zstor::id::DatafileId;
use std::ops::ControlFlow;

/// Largest file: offsets are signed in POSIX.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;
/// Most names one inode may have.
pub(crate) const LINKS_MAX: u32 = i32::MAX as u32;
/// Most extended attributes of one inode: their names must fit one `listxattr` answer of 64 KiB.
pub(crate) const XATTRS_MAX: u32 = 255;
/// Extents removed in one operation when a file goes away; the rest follows in further operations.
pub(crate) const REAP_EXTENTS: usize = 8192;

/// File capabilities; dropped together with the set-user-id bit.
const CAPABILITY_XATTR: &[u8] = b"security.capability";

/// Why an operation cannot be applied. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// No such name, inode or attribute target. ENOENT.
    #[error("no such file or directory")]
    NotFound,
    /// The name or inode exists already. EEXIST.
    #[error("file exists")]
    Exists,
    /// ENOTDIR.
    #[error("not a directory")]
    NotDirectory,
    /// EISDIR.
    #[error("is a directory")]
    IsDirectory,
    /// ENOTEMPTY.
    #[error("directory not empty")]
    NotEmpty,
    /// EMLINK.
    #[error("too many links")]
    TooManyLinks,
    /// A directory would become its own ancestor. EINVAL.
    #[error("a directory cannot be moved into itself")]
    Loop,
    /// Contents of something that is not a regular file. EINVAL.
    #[error("not a regular file")]
    NotRegular,
    /// EFBIG.
    #[error("file too big")]
    TooBig,
    /// A hard link to a directory. EPERM.
    #[error("directories cannot have hard links")]
    LinkToDirectory,
    /// ENODATA.
    #[error("no such extended attribute")]
    NoXattr,
    /// More than 255. ENOSPC.
    #[error("too many extended attributes on one file")]
    TooManyXattrs,
    /// The rows contradict each other or the record. EIO.
    #[error("the namespace is inconsistent: {0}")]
    Inconsistent(&'static str),
    /// The rows cannot be read. EIO.
    #[error(transparent)]
    Table(#[from] TableError),
}

type Outcome = Result<(), ApplyError>;

/// One application: the draft, the meta row, and the operation's time and number.
pub(super) struct Application<'a, 'd> {
    draft: &'d mut Draft<'a>,
    meta: &'d mut Meta,
    time: Time,
    sequence: u64,
    cookies: u64,
}

/// Applies the operation to the draft, meta row included. After an error the draft is to be thrown away.
pub(super) fn apply(draft: &mut Draft<'_>, meta: &mut Meta, operation: &Operation) -> Outcome {
    if operation.sequence != meta.applied_sequence + 1 {
        return Err(ApplyError::Inconsistent(
            "operation number does not follow the last one",
        ));
    }
    let mut application = Application {
        draft,
        meta,
        time: operation.time,
        sequence: operation.sequence,
        cookies: 0,
    };
    application.run(&operation.action)?;
    meta.applied_sequence = operation.sequence;
    meta.clock = meta.clock.max(operation.time);
    draft.put(rows::META_KEY.to_vec(), rows::encode(meta));
    Ok(())
}

impl Application<'_, '_> {
    fn run(&mut self, action: &Action) -> Outcome {
        match action {
            Action::Create { parent, name, .. } => self.create(action, *parent, name),
            Action::Link { ino, parent, name } => self.link(*ino, *parent, name),
            Action::Unlink { parent, name, reap } => self.unlink(*parent, name, *reap),
            Action::Rmdir { parent, name } => self.rmdir(*parent, name),
            Action::Rename { .. } => self.rename(action),
            Action::SetAttr { ino, .. } => self.set_attr(*ino, action),
            Action::Write {
                ino,
                offset,
                extents,
                clear_privileges,
            } => self.write(*ino, *offset, extents, *clear_privileges),
            Action::Punch {
                ino,
                offset,
                bytes,
                extend_to,
                clear_privileges,
            } => self.punch(*ino, *offset, *bytes, *extend_to, *clear_privileges),
            Action::SetXattr {
                ino,
                name,
                value,
                mode,
            } => self.set_xattr(*ino, name, value, *mode),
            Action::RemoveXattr { ino, name } => self.remove_xattr(*ino, name),
            Action::Reap { ino } => self.reap(*ino),
            Action::Released { datafiles } => self.released(datafiles),
        }
    }

    fn inode(&self, ino: Ino) -> Result<Inode, ApplyError> {
        self.draft
            .get_as(&inode_key(ino))?
            .ok_or(ApplyError::NotFound)
    }

    fn directory(&self, ino: Ino) -> Result<Inode, ApplyError> {
        let inode = self.inode(ino)?;
        if inode.is_dir() {
            Ok(inode)
        } else {
            Err(ApplyError::NotDirectory)
        }
    }

    fn put_inode(&mut self, ino: Ino, inode: &Inode) {
        self.draft.put(inode_key(ino), rows::encode(inode));
    }

    fn entry(&self, parent: Ino, name: &[u8]) -> Result<Option<Dirent>, ApplyError> {
        Ok(self.draft.get_as(&dirent_key(parent, name))?)
    }

    fn need_entry(&self, parent: Ino, name: &[u8]) -> Result<Dirent, ApplyError> {
        self.entry(parent, name)?.ok_or(ApplyError::NotFound)
    }

    /// Adds a name with a cookie greater than all before it, so that a directory being read sees it at its end.
    fn put_entry(&mut self, parent: Ino, name: &[u8], ino: u64, kind: u32) {
        let cookie = self.sequence * 4 + self.cookies;
        self.cookies += 1;
        self.draft.put(
            dirent_key(parent, name),
            rows::encode(&Dirent { ino, kind, cookie }),
        );
        self.draft.put(
            cookie_key(parent, cookie),
            rows::encode(&CookieEntry {
                ino,
                kind,
                name: name.to_vec(),
            }),
        );
    }

    fn delete_entry(&mut self, parent: Ino, name: &[u8], entry: &Dirent) {
        self.draft.delete(dirent_key(parent, name));
        self.draft.delete(cookie_key(parent, entry.cookie));
    }

    /// Counts entries and subdirectories of a directory that changed.
    fn touch_directory(&mut self, ino: Ino, entries: i64, subdirectories: i32) -> Outcome {
        let mut inode = self.directory(ino)?;
        inode.entries =
            inode
                .entries
                .checked_add_signed(entries)
                .ok_or(ApplyError::Inconsistent(
                    "entries of a directory below zero",
                ))?;
        inode.nlink = inode
            .nlink
            .checked_add_signed(subdirectories)
            .ok_or(ApplyError::Inconsistent("links of a directory below zero"))?;
        if inode.nlink > LINKS_MAX {
            return Err(ApplyError::TooManyLinks);
        }
        inode.mtime = self.time;
        inode.ctime = self.time;
        self.put_inode(ino, &inode);
        Ok(())
    }

    fn create(&mut self, action: &Action, parent: Ino, name: &[u8]) -> Outcome {
        let &Action::Create {
            ino,
            mode,
            uid,
            gid,
            rdev,
            ref target,
            ..
        } = action
        else {
            return Err(ApplyError::Inconsistent("not a create"));
        };
        if ino.0 < self.meta.next_ino {
            return Err(ApplyError::Inconsistent("inode number used before"));
        }
        self.directory(parent)?;
        if self.entry(parent, name)?.is_some() {
            return Err(ApplyError::Exists);
        }
        let is_dir = mode & libc::S_IFMT == libc::S_IFDIR;
        let inode = Inode {
            mode,
            nlink: if is_dir { 2 } else { 1 },
            uid,
            gid,
            rdev,
            size: target.len() as u64,
            allocated: 0,
            atime: self.time,
            mtime: self.time,
            ctime: self.time,
            btime: self.time,
            parent: if is_dir { parent.0 } else { 0 },
            entries: 0,
            tail: None,
            xattrs: 0,
            target: target.clone(),
        };
        self.meta.next_ino = ino.0 + 1;
        self.meta.inodes += 1;
        self.put_inode(ino, &inode);
        self.put_entry(parent, name, ino.0, inode.kind());
        self.touch_directory(parent, 1, i32::from(is_dir))
    }

    fn link(&mut self, ino: Ino, parent: Ino, name: &[u8]) -> Outcome {
        let mut inode = self.inode(ino)?;
        if inode.is_dir() {
            return Err(ApplyError::LinkToDirectory);
        }
        if inode.nlink == 0 {
            return Err(ApplyError::NotFound);
        }
        if inode.nlink >= LINKS_MAX {
            return Err(ApplyError::TooManyLinks);
        }
        self.directory(parent)?;
        if self.entry(parent, name)?.is_some() {
            return Err(ApplyError::Exists);
        }
        inode.nlink += 1;
        inode.ctime = self.time;
        self.put_inode(ino, &inode);
        self.put_entry(parent, name, ino.0, inode.kind());
        self.touch_directory(parent, 1, 0)
    }

    fn unlink(&mut self, parent: Ino, name: &[u8], reap: bool) -> Outcome {
        let entry = self.need_entry(parent, name)?;
        if entry.kind == libc::S_IFDIR {
            return Err(ApplyError::IsDirectory);
        }
        self.delete_entry(parent, name, &entry);
        self.touch_directory(parent, -1, 0)?;
        self.drop_link(Ino(entry.ino), reap)
    }

    /// A non-directory lost a name.
    fn drop_link(&mut self, ino: Ino, reap: bool) -> Outcome {
        let mut inode = self.inode(ino)?;
        inode.nlink = inode
            .nlink
            .checked_sub(1)
            .ok_or(ApplyError::Inconsistent("links of a file below zero"))?;
        inode.ctime = self.time;
        self.put_inode(ino, &inode);
        if inode.nlink == 0 {
            self.draft.put(orphan_key(ino), rows::encode(&()));
            if reap {
                self.reap(ino)?;
            }
        }
        Ok(())
    }

    fn rmdir(&mut self, parent: Ino, name: &[u8]) -> Outcome {
        let entry = self.need_entry(parent, name)?;
        if entry.kind != libc::S_IFDIR {
            return Err(ApplyError::NotDirectory);
        }
        self.delete_entry(parent, name, &entry);
        self.touch_directory(parent, -1, -1)?;
        self.remove_directory(Ino(entry.ino))
    }

    fn remove_directory(&mut self, ino: Ino) -> Outcome {
        let inode = self.directory(ino)?;
        if inode.entries != 0 {
            return Err(ApplyError::NotEmpty);
        }
        self.remove_inode(ino, &inode)
    }

    fn remove_inode(&mut self, ino: Ino, inode: &Inode) -> Outcome {
        if inode.xattrs > 0 {
            let mut keys = Vec::new();
            self.draft
                .scan(&xattr_key(ino, b""), &xattr_end(ino), &mut |key, _| {
                    keys.push(key.to_vec());
                    Ok(ControlFlow::Continue(()))
                })?;
            keys.into_iter().for_each(|key| self.draft.delete(key));
        }
        self.draft.delete(inode_key(ino));
        self.meta.inodes = self.meta.inodes.saturating_sub(1);
        Ok(())
    }

    fn reap(&mut self, ino: Ino) -> Outcome {
        if self.draft.get(&orphan_key(ino))?.is_none() {
            return Err(ApplyError::NotFound);
        }
        let mut inode = self.inode(ino)?;
        if extents::drain(self.draft, ino, &mut inode, REAP_EXTENTS)? {
            self.draft.delete(orphan_key(ino));
            self.remove_inode(ino, &inode)
        } else {
            self.put_inode(ino, &inode);
            Ok(())
        }
    }

    fn rename(&mut self, action: &Action) -> Outcome {
        let Action::Rename {
            parent,
            name,
            new_parent,
            new_name,
            mode,
            reap,
        } = action
        else {
            return Err(ApplyError::Inconsistent("not a rename"));
        };
        let (parent, new_parent) = (*parent, *new_parent);
        let from = self.need_entry(parent, name)?;
        self.directory(new_parent)?;
        let to = self.entry(new_parent, new_name)?;
        let from_is_dir = from.kind == libc::S_IFDIR;
        if from_is_dir && self.is_within(new_parent, Ino(from.ino))? {
            return Err(ApplyError::Loop);
        }
        match (mode, to) {
            (RenameMode::NoReplace, Some(_)) => return Err(ApplyError::Exists),
            (RenameMode::Exchange, None) => return Err(ApplyError::NotFound),
            (RenameMode::Exchange, Some(to)) => {
                return self.exchange((parent, name, from), (new_parent, new_name, to));
            }
            (_, Some(to)) if to.ino == from.ino => return Ok(()),
            (RenameMode::Replace, Some(to)) => {
                self.replace_entry(new_parent, new_name, &to, from_is_dir, *reap)?;
            }
            (RenameMode::Replace | RenameMode::NoReplace, None) => {}
        }
        self.delete_entry(parent, name, &from);
        self.touch_directory(parent, -1, -i32::from(from_is_dir))?;
        self.put_entry(new_parent, new_name, from.ino, from.kind);
        self.touch_directory(new_parent, 1, i32::from(from_is_dir))?;
        self.moved(Ino(from.ino), new_parent)
    }

    /// Takes away what a rename replaces.
    fn replace_entry(
        &mut self,
        parent: Ino,
        name: &[u8],
        old: &Dirent,
        by_directory: bool,
        reap: bool,
    ) -> Outcome {
        let is_dir = old.kind == libc::S_IFDIR;
        match (by_directory, is_dir) {
            (true, false) => return Err(ApplyError::NotDirectory),
            (false, true) => return Err(ApplyError::IsDirectory),
            (true, true) | (false, false) => {}
        }
        self.delete_entry(parent, name, old);
        self.touch_directory(parent, -1, -i32::from(is_dir))?;
        if is_dir {
            self.remove_directory(Ino(old.ino))
        } else {
            self.drop_link(Ino(old.ino), reap)
        }
    }

    fn exchange(
        &mut self,
        (parent, name, from): (Ino, &[u8], Dirent),
        (new_parent, new_name, to): (Ino, &[u8], Dirent),
    ) -> Outcome {
        if from.ino == to.ino {
            return Ok(());
        }
        let directory = |entry: &Dirent| i32::from(entry.kind == libc::S_IFDIR);
        if directory(&to) == 1 && self.is_within(parent, Ino(to.ino))? {
            return Err(ApplyError::Loop);
        }
        self.delete_entry(parent, name, &from);
        self.delete_entry(new_parent, new_name, &to);
        self.put_entry(parent, name, to.ino, to.kind);
        self.put_entry(new_parent, new_name, from.ino, from.kind);
        self.touch_directory(parent, 0, directory(&to) - directory(&from))?;
        self.touch_directory(new_parent, 0, directory(&from) - directory(&to))?;
        self.moved(Ino(from.ino), new_parent)?;
        self.moved(Ino(to.ino), parent)
    }

    /// The inode has a new name: its ctime changes and, if it is a directory, its parent.
    fn moved(&mut self, ino: Ino, parent: Ino) -> Outcome {
        let mut inode = self.inode(ino)?;
        inode.ctime = self.time;
        if inode.is_dir() {
            inode.parent = parent.0;
        }
        self.put_inode(ino, &inode);
        Ok(())
    }

    /// Whether `ino` is `ancestor` or below it.
    fn is_within(&self, mut ino: Ino, ancestor: Ino) -> Result<bool, ApplyError> {
        loop {
            if ino == ancestor {
                return Ok(true);
            }
            if ino == Ino::ROOT {
                return Ok(false);
            }
            ino = Ino(self.directory(ino)?.parent);
        }
    }

    fn set_attr(&mut self, ino: Ino, action: &Action) -> Outcome {
        let &Action::SetAttr {
            mode,
            uid,
            gid,
            size,
            atime,
            mtime,
            clear_privileges,
            ..
        } = action
        else {
            return Err(ApplyError::Inconsistent("not a setattr"));
        };
        let mut inode = self.inode(ino)?;
        if let Some(size) = size {
            self.resize(ino, &mut inode, size)?;
            inode.mtime = self.time;
        }
        inode.uid = uid.unwrap_or(inode.uid);
        inode.gid = gid.unwrap_or(inode.gid);
        if clear_privileges {
            self.clear_privileges(ino, &mut inode)?;
        }
        if let Some(mode) = mode {
            inode.mode = inode.kind() | (mode & 0o7777);
        }
        inode.atime = atime.unwrap_or(inode.atime);
        inode.mtime = mtime.unwrap_or(inode.mtime);
        inode.ctime = self.time;
        self.put_inode(ino, &inode);
        Ok(())
    }

    fn resize(&mut self, ino: Ino, inode: &mut Inode, size: u64) -> Outcome {
        if inode.is_dir() {
            return Err(ApplyError::IsDirectory);
        }
        if !inode.is_file() {
            return Err(ApplyError::NotRegular);
        }
        if size > FILE_BYTES_MAX {
            return Err(ApplyError::TooBig);
        }
        extents::cut(self.draft, ino, inode, size, u64::MAX)?;
        inode.size = size;
        Ok(())
    }

    /// What the kernel does to a file that is written by somebody without CAP_FSETID.
    fn clear_privileges(&mut self, ino: Ino, inode: &mut Inode) -> Outcome {
        if inode.is_dir() {
            return Ok(());
        }
        inode.mode &= !libc::S_ISUID;
        if inode.mode & libc::S_IXGRP != 0 {
            inode.mode &= !libc::S_ISGID;
        }
        let key = xattr_key(ino, CAPABILITY_XATTR);
        if inode.xattrs > 0 && self.draft.get(&key)?.is_some() {
            self.draft.delete(key);
            inode.xattrs -= 1;
        }
        Ok(())
    }

    fn write(
        &mut self,
        ino: Ino,
        offset: u64,
        data: &[DataExtent],
        clear_privileges: bool,
    ) -> Outcome {
        let mut inode = self.inode(ino)?;
        if !inode.is_file() {
            return Err(ApplyError::NotRegular);
        }
        let mut start = offset;
        for extent in data {
            let end = start
                .checked_add(u64::from(extent.bytes))
                .filter(|&end| end <= FILE_BYTES_MAX)
                .ok_or(ApplyError::TooBig)?;
            extents::cut(self.draft, ino, &mut inode, start, end)?;
            extents::insert(self.draft, ino, &mut inode, start, extent)?;
            inode.size = inode.size.max(end);
            start = end;
        }
        if clear_privileges {
            self.clear_privileges(ino, &mut inode)?;
        }
        inode.mtime = self.time;
        inode.ctime = self.time;
        self.put_inode(ino, &inode);
        Ok(())
    }

    fn punch(
        &mut self,
        ino: Ino,
        offset: u64,
        bytes: u64,
        extend_to: u64,
        clear_privileges: bool,
    ) -> Outcome {
        let mut inode = self.inode(ino)?;
        if !inode.is_file() {
            return Err(ApplyError::NotRegular);
        }
        let end = offset
            .checked_add(bytes)
            .filter(|end| (*end).max(extend_to) <= FILE_BYTES_MAX)
            .ok_or(ApplyError::TooBig)?;
        extents::cut(self.draft, ino, &mut inode, offset, end)?;
        inode.size = inode.size.max(extend_to);
        if clear_privileges {
            self.clear_privileges(ino, &mut inode)?;
        }
        inode.mtime = self.time;
        inode.ctime = self.time;
        self.put_inode(ino, &inode);
        Ok(())
    }

    fn set_xattr(&mut self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> Outcome {
        let mut inode = self.inode(ino)?;
        let key = xattr_key(ino, name);
        let exists = inode.xattrs > 0 && self.draft.get(&key)?.is_some();
        match (mode, exists) {
            (XattrMode::Create, true) => return Err(ApplyError::Exists),
            (XattrMode::Replace, false) => return Err(ApplyError::NoXattr),
            (_, false) if inode.xattrs >= XATTRS_MAX => return Err(ApplyError::TooManyXattrs),
            (_, false) => inode.xattrs += 1,
            (_, true) => {}
        }
        inode.ctime = self.time;
        self.draft.put(key, value.into());
        self.put_inode(ino, &inode);
        Ok(())
    }

    fn remove_xattr(&mut self, ino: Ino, name: &[u8]) -> Outcome {
        let mut inode = self.inode(ino)?;
        let key = xattr_key(ino, name);
        if inode.xattrs == 0 || self.draft.get(&key)?.is_none() {
            return Err(ApplyError::NoXattr);
        }
        inode.xattrs -= 1;
        inode.ctime = self.time;
        self.draft.delete(key);
        self.put_inode(ino, &inode);
        Ok(())
    }

    fn released(&mut self, datafiles: &[DatafileId]) -> Outcome {
        for &datafile in datafiles {
            let key = live_key(datafile);
            if self.draft.get_as::<u64>(&key)? == Some(0) {
                self.draft.delete(key);
            }
        }
        Ok(())
    }
}
