//! Attributes and extended attributes.

use super::{CONTROL_XATTR, Caller, FileSystem, FsError, NAME_BYTES_MAX};
use crate::namespace::{Action, Attributes, Ino, Time, XattrMode};
use std::os::unix::ffi::OsStrExt;

/// Longest value of an extended attribute, as everywhere on Linux.
pub const XATTR_VALUE_BYTES_MAX: usize = 64 << 10;

/// Prefixes of the extended attributes that are kept.
const XATTR_PREFIXES: [&[u8]; 3] = [b"user.", b"security.", b"trusted."];

/// A new time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeChange {
    /// The time of the request.
    Now,
    /// This one.
    At(Time),
}

/// What `chmod`, `chown`, `truncate` and `utimensat` change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AttributeChange {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<TimeChange>,
    /// Modification time.
    pub mtime: Option<TimeChange>,
}

impl FileSystem {
    /// Changes attributes. Changing the owner, or the size by anybody but root, clears set-user-id,
    /// set-group-id and file capabilities, as a local filesystem does.
    pub fn setattr(
        &self,
        ino: Ino,
        change: AttributeChange,
        caller: Caller,
    ) -> Result<Attributes, FsError> {
        if change != AttributeChange::default() {
            let time = |change: TimeChange| match change {
                TimeChange::Now => caller.now,
                TimeChange::At(time) => time,
            };
            let owner = change.uid.is_some() || change.gid.is_some();
            self.execute(caller.now, |_| {
                Ok(Action::SetAttr {
                    ino,
                    mode: change.mode,
                    uid: change.uid,
                    gid: change.gid,
                    size: change.size,
                    atime: change.atime.map(time),
                    mtime: change.mtime.map(time),
                    clear_privileges: owner || (change.size.is_some() && caller.uid != 0),
                })
            })?;
        }
        self.getattr(ino)
    }

    fn check_xattr(name: &[u8]) -> Result<(), FsError> {
        if name.len() > NAME_BYTES_MAX {
            return Err(FsError::Invalid("name of an extended attribute too long"));
        }
        let kept = |prefix: &&[u8]| name.starts_with(prefix) && name.len() > prefix.len();
        if XATTR_PREFIXES.iter().any(kept) {
            Ok(())
        } else {
            Err(FsError::NotSupported(
                "extended attributes other than user., security. and trusted.",
            ))
        }
    }

    /// Sets an extended attribute.
    pub fn setxattr(
        &self,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
        caller: Caller,
    ) -> Result<(), FsError> {
        Self::check_xattr(name)?;
        if value.len() > XATTR_VALUE_BYTES_MAX {
            return Err(FsError::Invalid("value of an extended attribute too long"));
        }
        if ino == Ino::ROOT && name == CONTROL_XATTR {
            return Err(FsError::NotPermitted(
                "this attribute is answered by the mount",
            ));
        }
        self.execute(caller.now, |_| {
            Ok(Action::SetXattr {
                ino,
                name: name.to_vec(),
                value: value.to_vec(),
                mode,
            })
        })
    }

    /// Value of an extended attribute.
    pub fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>, FsError> {
        if ino == Ino::ROOT && name == CONTROL_XATTR {
            let socket = self.options.control_socket.as_ref();
            return socket
                .map(|path| path.as_os_str().as_bytes().to_vec())
                .ok_or(FsError::NoXattr);
        }
        Self::check_xattr(name)?;
        self.namespace.xattr(ino, name)?.ok_or(FsError::NoXattr)
    }

    /// Names of the extended attributes, each ended by NUL.
    pub fn listxattr(&self, ino: Ino) -> Result<Vec<u8>, FsError> {
        let mut list = Vec::new();
        for name in self.namespace.xattrs(ino)? {
            list.extend_from_slice(&name);
            list.push(0);
        }
        Ok(list)
    }

    /// Removes an extended attribute.
    pub fn removexattr(&self, ino: Ino, name: &[u8], caller: Caller) -> Result<(), FsError> {
        Self::check_xattr(name)?;
        self.execute(caller.now, |_| {
            Ok(Action::RemoveXattr {
                ino,
                name: name.to_vec(),
            })
        })
    }
}
