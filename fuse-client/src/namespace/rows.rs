//! Keys and values of the namespace's rows.
//!
//! One ordered key space; the first byte of a key says what the row is. Numbers in keys are big-endian so that
//! the order of keys is the order of numbers. Values are `postcard | version (1 byte)`.
//!
//! ```text
//! i <ino:8>                 inode
//! d <parent:8> <name>       name -> inode, kind, cookie
//! c <parent:8> <cookie:8>   the same entry in the order of its cookie, for readdir
//! e <ino:8> <offset:8>      extent that starts at this byte of the file
//! x <ino:8> <name>          extended attribute (raw value)
//! o <ino:8>                 orphan: no name, perhaps still open
//! l <datafile:8>            live bytes of a data datafile
//! m                         applied sequence, next inode, counts, clock
//! ```

use super::operation::{Ino, Time};
use fjall::Slice;
use qsfs_zstor::id::DatafileId;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Version byte of row values.
const ROW_VERSION: u8 = 1;

/// The one row that says how far the namespace is.
pub(super) const META_KEY: &[u8] = b"m";

/// A row that does not decode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("row {key} does not decode: {reason}")]
pub struct RowError {
    pub(super) key: String,
    pub(super) reason: String,
}

/// What a file is, without its names and contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Inode {
    pub(super) mode: u32,
    pub(super) nlink: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) rdev: u32,
    pub(super) size: u64,
    /// Bytes that extents cover.
    pub(super) allocated: u64,
    pub(super) atime: Time,
    pub(super) mtime: Time,
    pub(super) ctime: Time,
    pub(super) btime: Time,
    /// Of a directory: the directory that holds it (the root holds itself). Else 0.
    pub(super) parent: u64,
    /// Of a directory: number of entries, so that emptiness needs no scan.
    pub(super) entries: u64,
    /// Start of the last extent, if known: appends need no search.
    pub(super) tail: Option<u64>,
    /// Number of extended attributes.
    pub(super) xattrs: u32,
    /// Symlink target.
    pub(super) target: Vec<u8>,
}

impl Inode {
    pub(super) fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind() == libc::S_IFDIR
    }

    pub(super) fn is_file(&self) -> bool {
        self.kind() == libc::S_IFREG
    }
}

/// A name in a directory (row `d`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Dirent {
    pub(super) ino: u64,
    /// `S_IFMT` bits.
    pub(super) kind: u32,
    pub(super) cookie: u64,
}

/// The same by cookie (row `c`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CookieEntry {
    pub(super) ino: u64,
    pub(super) kind: u32,
    pub(super) name: Vec<u8>,
}

/// Where a run of the file is (row `e`); its start is in the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ExtentRow {
    pub(super) datafile: u64,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// Row `m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    pub(super) applied_sequence: u64,
    pub(super) next_ino: u64,
    pub(super) inodes: u64,
    pub(super) clock: Time,
}

pub(super) fn encode<T: Serialize>(value: &T) -> Slice {
    postcard::to_extend(value, Vec::with_capacity(96))
        .map(|mut bytes: Vec<u8>| {
            bytes.push(ROW_VERSION);
            bytes
        })
        .expect("writing plain data into a vector cannot fail")
        .into()
}

pub(super) fn decode<T: DeserializeOwned>(key: &[u8], value: &[u8]) -> Result<T, RowError> {
    let fail = |reason: String| RowError {
        key: key.escape_ascii().to_string(),
        reason,
    };
    match value.split_last() {
        Some((&ROW_VERSION, body)) => {
            postcard::from_bytes(body).map_err(|error| fail(error.to_string()))
        }
        Some((version, _)) => Err(fail(format!("version {version}"))),
        None => Err(fail("empty".into())),
    }
}

fn numbered(tag: u8, number: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(32);
    key.push(tag);
    key.extend_from_slice(&number.to_be_bytes());
    key
}

pub(super) fn inode_key(ino: Ino) -> Vec<u8> {
    numbered(b'i', ino.0)
}

pub(super) fn dirent_key(parent: Ino, name: &[u8]) -> Vec<u8> {
    let mut key = numbered(b'd', parent.0);
    key.extend_from_slice(name);
    key
}

pub(super) fn cookie_key(parent: Ino, cookie: u64) -> Vec<u8> {
    let mut key = numbered(b'c', parent.0);
    key.extend_from_slice(&cookie.to_be_bytes());
    key
}

pub(super) fn extent_key(ino: Ino, offset: u64) -> Vec<u8> {
    let mut key = numbered(b'e', ino.0);
    key.extend_from_slice(&offset.to_be_bytes());
    key
}

pub(super) fn xattr_key(ino: Ino, name: &[u8]) -> Vec<u8> {
    let mut key = numbered(b'x', ino.0);
    key.extend_from_slice(name);
    key
}

/// First key after all extended attributes of the inode.
pub(super) fn xattr_end(ino: Ino) -> Vec<u8> {
    numbered(b'x', ino.0 + 1)
}

pub(super) fn orphan_key(ino: Ino) -> Vec<u8> {
    numbered(b'o', ino.0)
}

pub(super) fn live_key(datafile: DatafileId) -> Vec<u8> {
    numbered(b'l', datafile.0)
}

/// The number after the tag byte (or after a first number, with `at` = 9).
pub(super) fn number_in(key: &[u8], at: usize) -> Result<u64, RowError> {
    key.get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u64::from_be_bytes)
        .ok_or_else(|| RowError {
            key: key.escape_ascii().to_string(),
            reason: "key too short".into(),
        })
}
