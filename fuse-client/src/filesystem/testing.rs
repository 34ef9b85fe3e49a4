//! A store in memory, for tests of what stands on it.

use crate::filesystem::Caller;
use crate::namespace::{Namespace, Time};
use crate::ports::{Capacity, DataExtent, Store, StoreError};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use qsfs_zstor::id::DatafileId;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Datafiles in memory, the journal as a list of records. Datafiles are small so that tests cross their ends, unless
/// made larger.
pub(crate) struct MemoryStore {
    datafile_bytes: usize,
    /// Datafile n is at n - 1.
    data: Mutex<Vec<Vec<u8>>>,
    journal: Mutex<Vec<Vec<u8>>>,
    keep_journal: bool,
    /// Reads are not local and must be fetched.
    pub(crate) remote: AtomicBool,
    pub(crate) fenced: AtomicBool,
    pub(crate) fetches: AtomicU64,
    pub(crate) prefetched: AtomicU64,
    pub(crate) syncs: AtomicU64,
}

impl MemoryStore {
    pub(crate) fn new(datafile_bytes: usize) -> Self {
        Self {
            datafile_bytes,
            data: Mutex::new(vec![Vec::new()]),
            journal: Mutex::default(),
            keep_journal: true,
            remote: AtomicBool::new(false),
            fenced: AtomicBool::new(false),
            fetches: AtomicU64::new(0),
            prefetched: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
        }
    }

    /// All records so far.
    pub(crate) fn journal(&self) -> Vec<Vec<u8>> {
        self.journal.lock().clone()
    }

    fn bytes(&self, datafile: DatafileId, offset: u64, bytes: usize) -> Option<Vec<u8>> {
        let data = self.data.lock();
        let datafile = data.get(usize::try_from(datafile.0).ok()?.checked_sub(1)?)?;
        let offset = usize::try_from(offset).ok()?;
        Some(datafile.get(offset..offset + bytes)?.to_vec())
    }
}

impl Store for MemoryStore {
    fn append_data(&self, mut data: &[u8]) -> Result<Vec<DataExtent>, StoreError> {
        let mut datafiles = self.data.lock();
        let mut extents = Vec::new();
        while !data.is_empty() {
            let id = DatafileId(datafiles.len() as u64);
            let last = datafiles.last_mut().expect("there is always one");
            let room = self.datafile_bytes - last.len();
            if room == 0 {
                datafiles.push(Vec::with_capacity(self.datafile_bytes));
                continue;
            }
            let (part, rest) = data.split_at(room.min(data.len()));
            extents.push(DataExtent {
                datafile: id,
                offset: last.len() as u64,
                bytes: u32::try_from(part.len()).expect("test data is small"),
                crc: crc32fast::hash(part),
            });
            last.extend_from_slice(part);
            data = rest;
        }
        Ok(extents)
    }

    fn append_journal(&self, record: &[u8]) -> Result<(), StoreError> {
        if self.fenced.load(Ordering::Relaxed) {
            return Err(StoreError::Fenced(qsfs_zstor::id::Epoch(2)));
        }
        if self.keep_journal {
            self.journal.lock().push(record.to_vec());
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn read_local(
        &self,
        datafile: DatafileId,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<bool, StoreError> {
        if self.remote.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let data = self.data.lock();
        let start = usize::try_from(offset).expect("test data is small");
        let index = usize::try_from(datafile.0).expect("few datafiles") - 1;
        buf.copy_from_slice(&data[index][start..start + buf.len()]);
        Ok(true)
    }

    fn fetch(
        &self,
        datafile: DatafileId,
        offset: u64,
        bytes: u32,
    ) -> BoxFuture<'static, Result<Bytes, StoreError>> {
        self.fetches.fetch_add(1, Ordering::Relaxed);
        let found = self.bytes(datafile, offset, bytes as usize);
        async move {
            tokio::task::yield_now().await;
            found
                .map(Bytes::from)
                .ok_or_else(|| StoreError::Unavailable {
                    datafile,
                    reason: "no such bytes".into(),
                })
        }
        .boxed()
    }

    fn capacity(&self) -> Capacity {
        Capacity {
            total_bytes: 1 << 40,
            free_bytes: 1 << 39,
        }
    }

    fn prefetch(&self, _datafile: DatafileId, _offset: u64, bytes: u32) {
        self.prefetched
            .fetch_add(u64::from(bytes), Ordering::Relaxed);
    }
}

/// A caller at the given second.
pub(crate) fn at(seconds: i64) -> Caller {
    Caller {
        uid: 1000,
        gid: 100,
        now: Time { seconds, nanos: 7 },
    }
}

/// A namespace that plays the records.
pub(crate) fn replayed(dir: &std::path::Path, records: &[Vec<u8>]) -> Namespace {
    let namespace = Namespace::open(dir).expect("open");
    for record in records {
        namespace.replay(record).expect("replay");
    }
    namespace
}

/// A temporary directory in memory where the machine has one: what is tested is not the disk.
pub(crate) fn scratch() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory).expect("make a directory in /dev/shm")
    } else {
        tempfile::tempdir().expect("make a temporary directory")
    }
}
