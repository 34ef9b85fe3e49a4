//! A cluster in memory for tests: records with compare-and-swap, and backends whose values can be harmed.
#![expect(clippy::unwrap_used, reason = "tests")]

use crate::cluster::{Cluster, Session, Swap};
use crate::store::{KeyPage, PieceStore, StoreError, StoredKey, Stores};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use qsfs_proto::api::{AgentOrder, AgentReport, MetadError, RebuildJob, ShardReport};
use qsfs_zstor::codec::{ShardHashes, Stripe, StripeEncoder};
use qsfs_zstor::id::{AgentId, BackendId, DatafileId, Epoch, Salt, Stream, VolumeId};
use qsfs_zstor::key::ObjectIds;
use qsfs_zstor::policy::Geometry;
use qsfs_zstor::record::EncodingRecord;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Waits for a condition, with a deadline.
pub(crate) async fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    for _ in 0..3_000 {
        if let Some(value) = condition() {
            return value;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("did not happen in time: {what}");
}

/// A backend in memory.
#[derive(Default)]
pub(crate) struct MemStore {
    pub(crate) values: Mutex<BTreeMap<Vec<u8>, (Bytes, u64)>>,
    /// Answers nothing any more.
    pub(crate) away: Mutex<bool>,
    /// So many more values fit; `None` is all.
    pub(crate) room: Mutex<Option<usize>>,
}

impl MemStore {
    fn here(&self) -> Result<(), StoreError> {
        if *self.away.lock() {
            return Err(StoreError::Unavailable("away".into()));
        }
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.values.lock().len()
    }

    /// Flips one bit of the payload of the `nth` value.
    pub(crate) fn flip(&self, nth: usize) {
        let mut values = self.values.lock();
        let (value, _) = values.values_mut().nth(nth).unwrap();
        let mut bytes = value.to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        *value = Bytes::from(bytes);
    }

    pub(crate) fn lose(&self, nth: usize) {
        let mut values = self.values.lock();
        let key = values.keys().nth(nth).unwrap().clone();
        values.remove(&key);
    }

    pub(crate) fn snapshot(&self) -> BTreeMap<Vec<u8>, Bytes> {
        self.values
            .lock()
            .iter()
            .map(|(key, (value, _))| (key.clone(), value.clone()))
            .collect()
    }
}

#[async_trait]
impl PieceStore for MemStore {
    async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.here()?;
        Ok(self.values.lock().get(key).map(|(value, _)| value.clone()))
    }

    async fn set(&self, key: &[u8], value: Bytes) -> Result<(), StoreError> {
        self.here()?;
        if let Some(room) = &mut *self.room.lock() {
            *room = room
                .checked_sub(1)
                .ok_or_else(|| StoreError::Full("no room".into()))?;
        }
        self.values.lock().insert(key.to_vec(), (value, 1));
        Ok(())
    }

    async fn delete(&self, key: &[u8]) -> Result<bool, StoreError> {
        self.here()?;
        Ok(self.values.lock().remove(key).is_some())
    }

    async fn keys(&self, from: Option<Bytes>) -> Result<KeyPage, StoreError> {
        self.here()?;
        let values = self.values.lock();
        let after = from.as_deref().unwrap_or_default();
        let page: Vec<StoredKey> = values
            .iter()
            .filter(|(key, _)| key.as_slice() > after)
            .take(7)
            .map(|(key, (_, set_ms))| StoredKey {
                key: Bytes::from(key.clone()),
                set_ms: *set_ms,
            })
            .collect();
        Ok(KeyPage {
            next: page.last().map(|last| last.key.clone()),
            keys: page,
        })
    }
}

/// metad in memory.
#[derive(Default)]
pub(crate) struct FakeMetad {
    pub(crate) records: Mutex<BTreeMap<(VolumeId, DatafileId), EncodingRecord>>,
    pub(crate) reports: Mutex<Vec<ShardReport>>,
    pub(crate) away: Mutex<bool>,
    /// So many swaps first meet a record that changed meanwhile.
    pub(crate) conflicts: Mutex<u32>,
    pub(crate) said: Mutex<Vec<AgentReport>>,
    pub(crate) orders: Mutex<Option<mpsc::Sender<Result<AgentOrder, MetadError>>>>,
    pub(crate) sessions: Mutex<u32>,
    /// Where the session's reports are collected.
    pub(crate) this: Mutex<std::sync::Weak<FakeMetad>>,
}

impl FakeMetad {
    pub(crate) fn new() -> Arc<Self> {
        let fake = Arc::new(Self::default());
        *fake.this.lock() = Arc::downgrade(&fake);
        fake
    }

    fn here(&self) -> Result<(), MetadError> {
        if *self.away.lock() {
            return Err(MetadError::NoQuorum("away".into()));
        }
        Ok(())
    }

    pub(crate) fn record(&self, like: &EncodingRecord) -> EncodingRecord {
        self.records.lock()[&(like.volume, like.datafile)].clone()
    }

    pub(crate) async fn order(&self, order: AgentOrder) {
        let sender = eventually("a session", || self.orders.lock().clone()).await;
        sender.send(Ok(order)).await.unwrap();
    }
}

#[async_trait]
impl Cluster for FakeMetad {
    async fn session(&self, _agent: AgentId) -> Result<Session, MetadError> {
        self.here()?;
        let (reports, mut said) = mpsc::channel(16);
        let (orders, receiver) = mpsc::channel(16);
        *self.orders.lock() = Some(orders);
        *self.sessions.lock() += 1;
        let this = self.this.lock().upgrade().unwrap();
        tokio::spawn(async move {
            while let Some(report) = said.recv().await {
                this.said.lock().push(report);
            }
        });
        Ok(Session {
            reports,
            orders: receiver,
        })
    }

    async fn swap_shard(&self, swap: Swap) -> Result<(), MetadError> {
        self.here()?;
        let mut records = self.records.lock();
        let record = records
            .get_mut(&(swap.volume, swap.datafile))
            .ok_or_else(|| MetadError::NotFound("record".into()))?;
        let mut conflicts = self.conflicts.lock();
        if *conflicts > 0 {
            *conflicts -= 1;
            record.version += 1;
        }
        if record.version != swap.version {
            return Err(MetadError::VersionConflict {
                current: record.version,
            });
        }
        let slot = &mut record.shards[swap.shard as usize];
        assert_eq!(slot.backend, swap.from);
        slot.backend = swap.to;
        slot.state = qsfs_zstor::record::ShardState::Stored;
        record.version += 1;
        Ok(())
    }

    async fn report_shards(&self, reports: Vec<ShardReport>) -> Result<(), MetadError> {
        self.here()?;
        self.reports.lock().extend(reports);
        Ok(())
    }

    async fn backend_shards(
        &self,
        backend: BackendId,
        after: (VolumeId, DatafileId),
        limit: u32,
    ) -> Result<Vec<(EncodingRecord, u32)>, MetadError> {
        self.here()?;
        let records = self.records.lock();
        let later = records.range((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded));
        let mut found = Vec::new();
        for record in later.map(|(_, record)| record) {
            let here = (0u32..)
                .zip(&record.shards)
                .filter(|(_, shard)| shard.backend == backend);
            found.extend(here.map(|(index, _)| (record.clone(), index)));
            if found.len() >= limit as usize {
                break;
            }
        }
        Ok(found)
    }

    async fn records(
        &self,
        volume: VolumeId,
        datafiles: &[DatafileId],
    ) -> Result<Vec<EncodingRecord>, MetadError> {
        self.here()?;
        let records = self.records.lock();
        Ok(datafiles
            .iter()
            .filter_map(|datafile| records.get(&(volume, *datafile)).cloned())
            .collect())
    }

    async fn has_later_record(
        &self,
        volume: VolumeId,
        datafile: DatafileId,
    ) -> Result<bool, MetadError> {
        self.here()?;
        Ok(self
            .records
            .lock()
            .keys()
            .any(|key| key.0 == volume && key.1 > datafile))
    }
}

/// `count` backends in memory, all of this agent, numbered from 0; and metad.
pub(crate) struct Bench {
    pub(crate) metad: Arc<FakeMetad>,
    pub(crate) backends: Vec<Arc<MemStore>>,
    pub(crate) stores: Arc<Stores>,
}

impl Bench {
    pub(crate) fn new(count: u64) -> Self {
        let backends: Vec<Arc<MemStore>> = (0..count).map(|_| Arc::default()).collect();
        let stores = Arc::new(Stores::new(Box::new(|_| {
            unreachable!("all are hosted here")
        })));
        for (id, store) in (0..).zip(&backends) {
            stores.host(BackendId(id), Arc::clone(store) as Arc<dyn PieceStore>);
        }
        Self {
            metad: FakeMetad::new(),
            backends,
            stores,
        }
    }

    /// Stores a stripe of `object_bytes` on the first backends and commits it.
    pub(crate) async fn commit(
        &self,
        datafile: u64,
        geometry: &str,
        object_bytes: u64,
    ) -> EncodingRecord {
        let (record, pieces) = encode(datafile, geometry, object_bytes);
        for (backend, key, value) in pieces {
            self.backends[backend].set(&key, value).await.unwrap();
        }
        self.metad
            .records
            .lock()
            .insert((record.volume, record.datafile), record.clone());
        record
    }

    pub(crate) fn job(&self, record: &EncodingRecord, shard: u32, to: u64) -> RebuildJob {
        RebuildJob {
            record: self.metad.record(record),
            shard,
            to: BackendId(to),
        }
    }
}

/// A record, and all pieces as (shard index, key, value).
pub(crate) fn encode(
    datafile: u64,
    geometry: &str,
    object_bytes: u64,
) -> (EncodingRecord, Vec<(usize, Vec<u8>, Bytes)>) {
    let geometry: Geometry = geometry.parse().unwrap();
    let ids = ObjectIds {
        volume: VolumeId::from_bytes([1; 16]),
        stream: Stream::Data,
        datafile: DatafileId(datafile),
        epoch: Epoch(1),
        salt: Salt::from_bytes([u8::try_from(datafile).unwrap(); 16]),
    };
    let layout = qsfs_zstor::codec::Layout::new(geometry, object_bytes, 8 << 10).unwrap();
    let stripe = Stripe::new(ids, 1 << 20, object_bytes, layout).unwrap();
    let encoder = StripeEncoder::new(stripe);
    let mut hashes = ShardHashes::new(&stripe);
    let mut pieces = Vec::new();
    for row in 0..encoder.rows() {
        let made = encoder.encode_row(row, |offset, buffer| {
            for (at, byte) in (offset..).zip(buffer) {
                *byte = blake3::hash(&(at / 32 + datafile).to_le_bytes()).as_bytes()
                    [(at % 32) as usize];
            }
            Ok::<(), ()>(())
        });
        for (shard, piece) in made.unwrap().into_iter().enumerate() {
            hashes.add(&piece.header);
            pieces.push((shard, piece.header.key().to_bytes().to_vec(), piece.value));
        }
    }
    let backends: Vec<BackendId> = (0..geometry.total() as u64).map(BackendId).collect();
    (
        stripe.record(&hashes.all().unwrap(), &backends).unwrap(),
        pieces,
    )
}
