//! The journal record: one logical change of the namespace.
//!
//! A record is `version (1 byte) | postcard(Operation)`. It says everything the change needs (inode numbers, times,
//! extents), so that live execution and replay run the same `apply` and reach the same rows. Records are
//! numbered from 1 without gaps; framing and checksums belong to the datafile that carries them.

use crate::ports::DataExtent;
use qsfs_zstor::id::DatafileId;
use serde::{Deserialize, Serialize};

/// Version byte of the records written now.
pub const RECORD_VERSION: u8 = 1;

/// Longest record accepted: an xattr value is at most 64 KiB and a write names at most a few extents.
pub const RECORD_BYTES_MAX: usize = 1 << 20;

/// Seconds and nanoseconds since 1970, as `stat(2)` shows them; may be negative.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Time {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// Inode number of a file, directory, symlink or special file. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ino(pub u64);

impl Ino {
    /// The root directory.
    pub const ROOT: Self = Self(1);
}

/// One numbered change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// 1 for the first operation of the volume, then without gaps.
    pub sequence: u64,
    /// When it was done; becomes the mtime and ctime of what it touches.
    pub time: Time,
    /// What was done.
    pub action: Action,
}

/// What `rename` does when the new name exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RenameMode {
    /// Replace it, if it is of a compatible kind.
    Replace,
    /// Fail (`RENAME_NOREPLACE`).
    NoReplace,
    /// Swap the two (`RENAME_EXCHANGE`).
    Exchange,
}

/// What `setxattr` does when the attribute exists or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum XattrMode {
    /// Create or replace.
    Any,
    /// Fail if it exists (`XATTR_CREATE`).
    Create,
    /// Fail if it does not (`XATTR_REPLACE`).
    Replace,
}

/// The kinds of change. Variants are only ever added at the end: their order is the encoding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// A new file, directory, symlink or special file.
    Create {
        /// Directory that gets the name.
        parent: Ino,
        /// The name.
        name: Vec<u8>,
        /// Number of the new inode; greater than any before.
        ino: Ino,
        /// Type and permission bits (`st_mode`).
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Device number of special files.
        rdev: u32,
        /// Symlink target, else empty.
        target: Vec<u8>,
    },
    /// Another name for a non-directory.
    Link {
        /// What gets the name.
        ino: Ino,
        /// Directory that gets the name.
        parent: Ino,
        /// The name.
        name: Vec<u8>,
    },
    /// Removes a name of a non-directory.
    Unlink {
        /// Directory.
        parent: Ino,
        /// Name.
        name: Vec<u8>,
        /// Also removes the inode if this was its last name; false while somebody has it open.
        reap: bool,
    },
    /// Removes an empty directory.
    Rmdir {
        /// Directory that holds it.
        parent: Ino,
        /// Name.
        name: Vec<u8>,
    },
    /// Moves a name.
    Rename {
        /// Old directory.
        parent: Ino,
        /// Old name.
        name: Vec<u8>,
        /// New directory.
        new_parent: Ino,
        /// New name.
        new_name: Vec<u8>,
        /// What happens to an entry of the new name.
        mode: RenameMode,
        /// As in [`Action::Unlink`], for a replaced file.
        reap: bool,
    },
    /// Changes attributes and size.
    SetAttr {
        /// Whose.
        ino: Ino,
        /// New permission bits.
        mode: Option<u32>,
        /// New owner.
        uid: Option<u32>,
        /// New group.
        gid: Option<u32>,
        /// New size: cuts or extends with a hole.
        size: Option<u64>,
        /// New access time.
        atime: Option<Time>,
        /// New modification time.
        mtime: Option<Time>,
        /// Drops set-user-id, set-group-id (of group executables) and file capabilities.
        clear_privileges: bool,
    },
    /// Contents written; `extents` lie one after the other from `offset` on.
    Write {
        /// File.
        ino: Ino,
        /// First byte in the file.
        offset: u64,
        /// Where the bytes are.
        extents: Vec<DataExtent>,
        /// As in [`Action::SetAttr`].
        clear_privileges: bool,
    },
    /// A range becomes a hole.
    Punch {
        /// File.
        ino: Ino,
        /// First byte.
        offset: u64,
        /// Length; may be 0 if only the size is extended.
        bytes: u64,
        /// The file is at least this long afterwards.
        extend_to: u64,
        /// As in [`Action::SetAttr`].
        clear_privileges: bool,
    },
    /// Sets an extended attribute.
    SetXattr {
        /// Whose.
        ino: Ino,
        /// Full name with its namespace, such as `user.x`.
        name: Vec<u8>,
        /// Value.
        value: Vec<u8>,
        /// What must be true before.
        mode: XattrMode,
    },
    /// Removes an extended attribute.
    RemoveXattr {
        /// Whose.
        ino: Ino,
        /// Full name.
        name: Vec<u8>,
    },
    /// Removes (a bounded part of) an inode that has no name and is open no more; repeated until it is gone.
    Reap {
        /// Whose.
        ino: Ino,
    },
    /// Datafiles without live bytes that the store has given up; they are no longer listed as dead.
    Released {
        /// Which.
        datafiles: Vec<DatafileId>,
    },
}

/// Why bytes are not a journal record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Written by a newer program, or not a record.
    #[error(
        "journal record has version {0}, this program reads version {RECORD_VERSION}: use the version of qsfs that wrote it, or newer"
    )]
    Version(u8),
    /// Empty or longer than any record is.
    #[error("journal record of {0} bytes: a record has 1 to {RECORD_BYTES_MAX}")]
    Length(usize),
    /// Does not decode.
    #[error("journal record does not decode: {0}")]
    Malformed(String),
}

impl Operation {
    /// The record's bytes.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![RECORD_VERSION])
            .expect("writing plain data into a vector cannot fail")
    }

    /// Reads a record; limits first, nothing may follow it.
    pub fn decode(record: &[u8]) -> Result<Self, RecordError> {
        if record.len() > RECORD_BYTES_MAX {
            return Err(RecordError::Length(record.len()));
        }
        let (&version, body) = record.split_first().ok_or(RecordError::Length(0))?;
        if version != RECORD_VERSION {
            return Err(RecordError::Version(version));
        }
        match postcard::take_from_bytes(body) {
            Ok((operation, [])) => Ok(operation),
            Ok((_, rest)) => Err(RecordError::Malformed(format!(
                "{} bytes too many",
                rest.len()
            ))),
            Err(error) => Err(RecordError::Malformed(error.to_string())),
        }
    }

    /// The extents whose data must be there for the record to be replayed.
    pub fn extents(&self) -> &[DataExtent] {
        match &self.action {
            Action::Write { extents, .. } => extents,
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write() -> Operation {
        Operation {
            sequence: 7,
            time: Time {
                seconds: 1_700_000_000,
                nanos: 5,
            },
            action: Action::Write {
                ino: Ino(9),
                offset: 4096,
                extents: vec![DataExtent {
                    datafile: DatafileId(3),
                    offset: 100,
                    bytes: 4096,
                    crc: 0xdead_beef,
                }],
                clear_privileges: false,
            },
        }
    }

    #[test]
    fn the_encoding_of_version_1_stays_as_it_is() {
        let hex: String = write()
            .encode()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, "010780c49fd50c05060980200103648020effdb6f50d00");
    }

    #[test]
    fn a_4k_write_costs_less_than_100_bytes_of_journal() {
        assert!(write().encode().len() < 100);
    }

    #[test]
    fn damaged_records_are_refused() {
        let record = write().encode();
        assert_eq!(Operation::decode(&record), Ok(write()));
        for cut in 0..record.len() {
            assert!(
                Operation::decode(&record[..cut]).is_err(),
                "cut at {cut} is accepted"
            );
        }
        let mut longer = record.clone();
        longer.push(0);
        assert!(Operation::decode(&longer).is_err());
        let mut newer = record;
        newer[0] = 2;
        assert_eq!(Operation::decode(&newer), Err(RecordError::Version(2)));
        assert!(Operation::decode(&vec![1; RECORD_BYTES_MAX + 1]).is_err());
    }
}
