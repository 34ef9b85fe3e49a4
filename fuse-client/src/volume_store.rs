//! The store the filesystem sees: the local store, and the shards behind it.

use crate::admission::{self, Admission, Room};
use crate::backends::Backends;
use crate::fetch::Fetcher;
use crate::ports::{Capacity, DataExtent, Store, StoreError};
use crate::store::LocalStore;
use bytes::Bytes;
use futures::future::BoxFuture;
use qsfs_zstor::id::DatafileId;
use qsfs_zstor::policy::Geometry;
use std::sync::Arc;
use tokio::runtime::Handle;

/// See the module.
#[derive(Debug)]
pub struct VolumeStore {
    local: Arc<LocalStore>,
    fetcher: Arc<Fetcher>,
    backends: Arc<Backends>,
    geometry: Geometry,
    quota_bytes: u64,
    runtime: Handle,
    admission: Admission,
}

const VOLUME_FULL: &str = "the backends have no room for it at this volume's policy; remove something and run `qsfs sync`, or add \
     backends";

impl VolumeStore {
    /// Puts them together. `runtime` runs fetches that are asked for from other threads.
    pub fn new(
        local: Arc<LocalStore>,
        fetcher: Arc<Fetcher>,
        backends: Arc<Backends>,
        geometry: Geometry,
        quota_bytes: u64,
        runtime: Handle,
    ) -> Self {
        Self {
            local,
            fetcher,
            backends,
            geometry,
            quota_bytes,
            runtime,
            admission: Admission::default(),
        }
    }

    fn room(&self) -> Option<Room> {
        admission::room(&self.backends, &self.local, self.geometry)
    }

    /// The local half.
    pub const fn local(&self) -> &Arc<LocalStore> {
        &self.local
    }
}

impl Store for VolumeStore {
    fn append_data(&self, data: &[u8]) -> Result<Vec<DataExtent>, StoreError> {
        let left = || self.room().map(|room| room.left_bytes);
        if !self.admission.admit(data.len() as u64, left) {
            return Err(StoreError::NoSpace(VOLUME_FULL.to_owned()));
        }
        self.local.append_data(data)
    }

    fn append_journal(&self, record: &[u8]) -> Result<(), StoreError> {
        self.local.append_journal(record)
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.local.sync()
    }

    fn read_local(
        &self,
        datafile: DatafileId,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<bool, StoreError> {
        self.local.read_data(datafile, offset, buf)
    }

    fn fetch(
        &self,
        datafile: DatafileId,
        offset: u64,
        bytes: u32,
    ) -> BoxFuture<'static, Result<Bytes, StoreError>> {
        let fetcher = Arc::clone(&self.fetcher);
        Box::pin(async move { fetcher.read(datafile, offset, bytes).await })
    }

    fn capacity(&self) -> Capacity {
        let Some(room) = self.room() else {
            return Capacity::default();
        };
        let (mut total_bytes, mut free_bytes) = (room.total_bytes, room.left_bytes);
        if self.quota_bytes > 0 {
            let used = total_bytes.saturating_sub(free_bytes);
            total_bytes = total_bytes.min(self.quota_bytes);
            free_bytes = free_bytes.min(self.quota_bytes.saturating_sub(used));
        }
        Capacity {
            total_bytes,
            free_bytes,
        }
    }

    fn may_wait(&self) -> bool {
        self.local.held().is_some()
    }

    fn prefetch(&self, datafile: DatafileId, offset: u64, bytes: u32) {
        let _inside = self.runtime.enter();
        self.fetcher.prefetch(datafile, offset, bytes);
    }
}
