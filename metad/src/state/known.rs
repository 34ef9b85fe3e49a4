//! Rows that nearly every commit reads and hardly any writes, decoded: volumes and backends.
//!
//! What is known is as the state's own view reads it: whatever writes or takes back a row of these tables says so
//! (`Known::forget`). It may outlive one view of a store and be handed to the next, as long as nothing else writes to that store.

use super::State;
use super::busy;
use super::kv::{Kv, KvError};
use super::row::Table;
use qsfs_proto::api::{Backend, Volume};
use qsfs_zstor::id::{BackendId, VolumeId};
use std::collections::HashMap;
use std::sync::Arc;

/// Rows of each kind at most; beyond, all are read again.
const ROWS_MAX: usize = 1_024;

/// See the module.
#[derive(Debug, Default)]
pub struct Known {
    volumes: HashMap<VolumeId, Arc<Volume>>,
    backends: HashMap<BackendId, Arc<Backend>>,
    pub(super) busy: busy::Rows,
}

impl Known {
    /// The row of this key is not what it was.
    pub(super) fn forget(&mut self, key: &[u8]) {
        const VOLUME: u8 = Table::Volume as u8;
        const BACKEND: u8 = Table::Backend as u8;
        match key.first() {
            Some(&VOLUME) => self.volumes.clear(),
            Some(&BACKEND) => self.backends.clear(),
            _ => {}
        }
    }
}

impl<K: Kv> State<K> {
    /// One volume, which is remembered.
    pub(super) fn seen_volume(&mut self, id: VolumeId) -> Result<Option<Arc<Volume>>, KvError> {
        if let Some(volume) = self.known.volumes.get(&id) {
            return Ok(Some(Arc::clone(volume)));
        }
        let Some(volume) = self.volume(id)?.map(Arc::new) else {
            return Ok(None);
        };
        remember(&mut self.known.volumes, id, &volume);
        Ok(Some(volume))
    }

    /// One backend, which is remembered.
    pub(super) fn seen_backend(&mut self, id: BackendId) -> Result<Option<Arc<Backend>>, KvError> {
        if let Some(backend) = self.known.backends.get(&id) {
            return Ok(Some(Arc::clone(backend)));
        }
        let Some(backend) = self.backend(id)?.map(Arc::new) else {
            return Ok(None);
        };
        remember(&mut self.known.backends, id, &backend);
        Ok(Some(backend))
    }
}

fn remember<I: Eq + std::hash::Hash, T>(known: &mut HashMap<I, Arc<T>>, id: I, row: &Arc<T>) {
    if known.len() >= ROWS_MAX {
        known.clear();
    }
    known.insert(id, Arc::clone(row));
}
