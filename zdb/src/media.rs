//! The disk, as the append-only engine sees it.
//!
//! Nothing in this crate (and nothing built on [`crate::datafile`]) touches files except through [`Media`]. There are two:
//! [`DiskMedia`] is the operating system's filesystem; [`SimMedia`] is memory that loses what was not synced, flips
//! bits, runs full and fails its syncs on demand, so that crash tests need no power switch.
//!
//! Invariants every implementation keeps:
//! - bytes written are durable after `sync_data` of that file returned without error, not before;
//! - a created, renamed or removed name is durable after `sync_dir` of its directory;
//! - reads see earlier writes of the same process at once.

mod disk;
mod sim;

pub use disk::DiskMedia;
pub use sim::{Fault, SimMedia};

use std::io;
use std::path::Path;

/// What a file of [`MediaFile::past_cache`] wants multiples of.
pub const PAGE_BYTES: usize = 4096;

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Existing file, reading only.
    Read,
    /// Existing file, reading and writing.
    ReadWrite,
    /// New file, reading and writing; an existing one is an error.
    CreateNew,
}

/// What tells one directory or file from another that later got the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// Room on the filesystem under a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes the filesystem holds in all.
    pub total_bytes: u64,
    /// Bytes still free to this process.
    pub free_bytes: u64,
}

/// Held while a directory is in use; dropping it lets the next owner in.
pub trait MediaLock: Send + Sync + std::fmt::Debug {}

/// A filesystem.
pub trait Media: Send + Sync + std::fmt::Debug {
    /// Open a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn MediaFile>>;
    /// Create a directory and its parents, durable when this returns.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Remove a file's name. Open handles keep working.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Remove an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Rename a file, replacing what has the new name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Names in a directory, sorted.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Make names created, renamed or removed in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Is there something at this path?
    fn exists(&self, path: &Path) -> bool;
    /// Which file or directory is at this path now.
    fn identity(&self, path: &Path) -> io::Result<Identity>;
    /// Room on the filesystem that holds this path.
    fn space(&self, path: &Path) -> io::Result<Space>;
    /// Take the exclusive lock on a file (made if absent). `WouldBlock` when another holder has it.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn MediaLock>>;
}

/// An open file; positions are always explicit, so that one handle serves many threads.
pub trait MediaFile: Send + Sync + std::fmt::Debug {
    /// Read at an offset; fewer bytes than asked (0 at the end) are not an error.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// As [`MediaFile::read_at`], but only what is in memory: `None` (or fewer bytes) if the disk would have to be waited for.
    fn read_cached_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        let _ = (buffer, offset);
        Ok(None)
    }
    /// Write all bytes at an offset.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// The same file, for writes that go past the page cache: the disk takes them from where they lie, so offset, length and memory
    /// must be multiples of [`PAGE_BYTES`]; `InvalidInput` if the filesystem wants more than that. They are no more durable than others
    /// before a sync. `None` where there is no such thing.
    fn past_cache(&self) -> Option<Box<dyn MediaFile>> {
        None
    }
    /// Write all parts, one after the other, from an offset.
    fn write_vectored_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()>;
    /// Let a range that was written reach the disk, and wait for that. Makes nothing durable: what the disk itself has in memory and the
    /// length may be missing after a crash. An error is one of [`MediaFile::sync_data`], which may not repeat it. Files that cannot
    /// do that leave it to the next sync.
    fn write_out(&self, offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, length);
        Ok(())
    }
    /// Make contents (and a changed length) durable.
    fn sync_data(&self) -> io::Result<()>;
    /// Reserve blocks and extend the length with zeros up to `offset + length`.
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()>;
    /// Cut (or extend with zeros) to a length.
    fn truncate(&self, length: u64) -> io::Result<()>;
    /// Length in bytes.
    fn length(&self) -> io::Result<u64>;

    /// Read until the buffer is full; the end of the file before that is `UnexpectedEof`.
    fn read_exact_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.read_at(buffer, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    buffer = buffer.split_at_mut(read).1;
                    offset += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Is this the error of a full disk or an exceeded disk quota?
pub fn is_disk_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
