//! The seam between the namespace (what files exist) and the local store (where their bytes are).
//!
//! The filesystem core calls [`Store`]; the local store implements it. Neither knows the other's insides.

use bytes::Bytes;
use futures::future::BoxFuture;
use qsfs_zstor::id::{DatafileId, Epoch};
use serde::{Deserialize, Serialize};

/// A run of file contents inside one data datafile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataExtent {
    /// Datafile of the `data` stream.
    pub datafile: DatafileId,
    /// First byte within it.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub bytes: u32,
    /// CRC-32 of the bytes as appended; lets replay cut the journal at data that never reached the disk.
    pub crc: u32,
}

/// What `statfs` and writers need to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capacity {
    /// Bytes the volume can hold, at its geometry, on the backends that are up (as last heard).
    pub total_bytes: u64,
    /// Of them, free.
    pub free_bytes: u64,
}

/// Why the store could not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The local disk (or the cache limit) is full of data that is not committed yet. ENOSPC.
    #[error("no space: {0}")]
    NoSpace(String),
    /// Another writer took over. EROFS; what was not pushed is kept aside.
    #[error("fenced: another writer took over at epoch {0}")]
    Fenced(Epoch),
    /// Too few shards answer, or a deadline passed. EIO.
    #[error("datafile {datafile} cannot be read now: {reason}")]
    Unavailable {
        /// Which.
        datafile: DatafileId,
        /// What was tried and why it failed.
        reason: String,
    },
    /// A local file does not verify and no committed copy can replace it. EIO.
    #[error("local file {path} is damaged at byte {offset}: {advice}")]
    Damaged {
        /// Path of the file.
        path: String,
        /// Where.
        offset: u64,
        /// What to do.
        advice: String,
    },
    /// The local disk failed. The first fsync error is fatal to that file. EIO.
    #[error("{step} {path}: {source}")]
    Io {
        /// Verb phrase.
        step: &'static str,
        /// Path.
        path: String,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// A read-only mount. EROFS.
    #[error("this mount is read-only")]
    ReadOnly,
}

/// Log-structured contents plus the journal. All methods may be called from many threads.
pub trait Store: Send + Sync + 'static {
    /// Appends to the active data datafile. Returns without waiting for the disk. May split over a seal.
    fn append_data(&self, data: &[u8]) -> Result<Vec<DataExtent>, StoreError>;

    /// Appends one journal record (an encoded `namespace::Operation`) to the active meta datafile, handed to the
    /// operating system before return so that a killed process loses nothing; durable after [`Store::sync`].
    /// The caller serialises calls in operation order.
    fn append_journal(&self, record: &[u8]) -> Result<(), StoreError>;

    /// Blocks until everything appended before the call, by anyone, is durable: data first, then journal. Callers
    /// that wait at the same time share one round of fdatasync (group commit).
    fn sync(&self) -> Result<(), StoreError>;

    /// Fills `buf` from the datafile if those bytes are local and verify; `Ok(false)` means: use [`Store::fetch`].
    fn read_local(
        &self,
        datafile: DatafileId,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<bool, StoreError>;

    /// Reads bytes from the shards (reconstructing what is missing); never longer than its deadline.
    fn fetch(
        &self,
        datafile: DatafileId,
        offset: u64,
        bytes: u32,
    ) -> BoxFuture<'static, Result<Bytes, StoreError>>;

    /// As last heard; never waits for the network.
    fn capacity(&self) -> Capacity;

    /// Whether [`Store::append_data`] may have to wait now (for space, for the push interval): then it is not
    /// called from a thread that answers the kernel. Must be cheap.
    fn may_wait(&self) -> bool {
        false
    }

    /// A hint that these bytes, which are not local, are about to be read. Returns at once; the store bounds what
    /// it does about it.
    fn prefetch(&self, datafile: DatafileId, offset: u64, bytes: u32) {
        let _ = (datafile, offset, bytes);
    }
}
