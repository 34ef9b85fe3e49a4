//! Pieces that no record needs any more: of released datafiles, and of shards that moved.
//!
//! ```text
//! waiting (grace) -> ordered (the leader told the agent) -> gone (the agent said so)
//! ```
//!
//! A waiting place may be taken back by a swap (a shard moves home again); an ordered one may not, because the deletion may
//! run at any moment. One tombstone per encoding attempt holds the record once; its places are indexed by backend and due
//! time.

use super::command::Reply;
use super::kv::{Kv, KvError, RowKey, prefix_end};
use super::row::{Key, PAGE_ROWS, Table, array_at, number_at};
use super::{State, Stop};
use qsfs_proto::api::{Applied, MetadError};
use qsfs_zstor::id::{BackendId, DatafileId, Salt, VolumeId};
use qsfs_zstor::record::EncodingRecord;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Deletions in one order command at most.
pub const ORDER_PLACES_MAX: usize = 1_024;

/// One shard of one encoding attempt on one backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// Where.
    pub backend: BackendId,
    /// Volume.
    pub volume: VolumeId,
    /// Datafile.
    pub datafile: DatafileId,
    /// Encoding attempt.
    pub salt: Salt,
    /// Shard.
    pub shard: u32,
}

/// When a place may be deleted, and whether that was ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Due {
    /// Log time.
    pub due_ms: u64,
    /// Told to the agent.
    pub ordered: bool,
}

/// What is to be deleted of one encoding attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// The record as it was last.
    pub record: EncodingRecord,
    /// Where pieces of it are left.
    pub places: BTreeMap<(BackendId, u32), Due>,
}

fn key(volume: VolumeId, datafile: DatafileId, salt: Salt) -> RowKey {
    Key::of(Table::Tombstone)
        .bytes(volume.as_bytes())
        .number(datafile.0)
        .bytes(salt.as_bytes())
        .done()
}

fn due_key(place: &Place, due_ms: u64) -> RowKey {
    Key::of(Table::TombstoneDue)
        .number(place.backend.0)
        .number(due_ms)
        .bytes(place.volume.as_bytes())
        .number(place.datafile.0)
        .bytes(place.salt.as_bytes())
        .shard(place.shard)
        .done()
}

fn place_of(key: &[u8]) -> Result<(Place, u64), KvError> {
    let place = Place {
        backend: BackendId(number_at(key, 1)?),
        volume: VolumeId::from_bytes(array_at(key, 17)?),
        datafile: DatafileId(number_at(key, 33)?),
        salt: Salt::from_bytes(array_at(key, 41)?),
        shard: u32::from(array_at::<1>(key, 57)?[0]),
    };
    Ok((place, number_at(key, 9)?))
}

fn place(record: &EncodingRecord, backend: BackendId, shard: u32) -> Place {
    Place {
        backend,
        volume: record.volume,
        datafile: record.datafile,
        salt: record.salt,
        shard,
    }
}

/// Buries shards of a record.
pub(super) fn bury<K: Kv>(
    state: &mut State<K>,
    record: &EncodingRecord,
    places: impl IntoIterator<Item = (BackendId, u32)>,
    due_ms: u64,
) -> Result<(), KvError> {
    let key = key(record.volume, record.datafile, record.salt);
    let mut tombstone = state.row(&key)?.unwrap_or_else(|| Tombstone {
        record: record.clone(),
        places: BTreeMap::new(),
    });
    tombstone.record = record.clone();
    for (backend, shard) in places {
        let due = Due {
            due_ms,
            ordered: false,
        };
        tombstone.places.entry((backend, shard)).or_insert_with(|| {
            state.put(due_key(&place(record, backend, shard), due_ms), Vec::new());
            due
        });
    }
    state.put_row(key, &tombstone);
    state.touch().tombstones = true;
    Ok(())
}

/// Takes a waiting place back, so that a shard may live there again. False: its deletion was ordered.
pub(super) fn take_back<K: Kv>(
    state: &mut State<K>,
    record: &EncodingRecord,
    backend: BackendId,
    shard: u32,
) -> Result<bool, KvError> {
    let place = place(record, backend, shard);
    match state
        .tombstone(&place)?
        .map(|t| t.places.get(&(backend, shard)).copied())
    {
        Some(Some(due)) if due.ordered => Ok(false),
        Some(Some(_)) => remove(state, &place).map(|_| true),
        _ => Ok(true),
    }
}

fn remove<K: Kv>(state: &mut State<K>, place: &Place) -> Result<bool, KvError> {
    let key = key(place.volume, place.datafile, place.salt);
    let Some(mut tombstone) = state.row::<Tombstone>(&key)? else {
        return Ok(false);
    };
    let Some(due) = tombstone.places.remove(&(place.backend, place.shard)) else {
        return Ok(false);
    };
    state.delete(due_key(place, due.due_ms));
    if tombstone.places.is_empty() {
        state.delete(key);
    } else {
        state.put_row(key, &tombstone);
    }
    state.touch().tombstones = true;
    Ok(true)
}

pub(super) fn order<K: Kv>(
    state: &mut State<K>,
    places: &[Place],
    now_ms: u64,
) -> Result<Reply, Stop> {
    if places.len() > ORDER_PLACES_MAX {
        return Err(MetadError::Invalid(format!("{} deletions at once", places.len())).into());
    }
    for place in places {
        let key = key(place.volume, place.datafile, place.salt);
        if let Some(mut tombstone) = state.row::<Tombstone>(&key)?
            && let Some(due) = tombstone.places.get_mut(&(place.backend, place.shard))
            && due.due_ms <= now_ms
            && !due.ordered
        {
            due.ordered = true;
            state.put_row(key, &tombstone);
        }
    }
    Ok(Reply::Applied(Applied::Done))
}

/// Idempotent: what is not there any more was deleted before. A place that was never ordered stays.
pub(super) fn deleted<K: Kv>(state: &mut State<K>, place: &Place) -> Result<Reply, Stop> {
    let due = state
        .tombstone(place)?
        .and_then(|t| t.places.get(&(place.backend, place.shard)).copied());
    if due.is_some_and(|due| due.ordered) {
        remove(state, place)?;
    }
    Ok(Reply::Applied(Applied::Done))
}

/// A retired backend owes nobody a deletion.
pub(super) fn forget_backend<K: Kv>(
    state: &mut State<K>,
    backend: BackendId,
) -> Result<(), KvError> {
    let prefix = Key::of(Table::TombstoneDue).number(backend.0).done();
    loop {
        let page = state.range(&prefix, &prefix_end(&prefix), PAGE_ROWS)?;
        for (key, _) in &page {
            remove(state, &place_of(key)?.0)?;
        }
        if page.len() < PAGE_ROWS {
            return Ok(());
        }
    }
}

impl<K: Kv> State<K> {
    /// The tombstone a place belongs to.
    pub fn tombstone(&self, place: &Place) -> Result<Option<Tombstone>, KvError> {
        self.row(&key(place.volume, place.datafile, place.salt))
    }

    /// The tombstone of one encoding attempt.
    pub fn tombstone_of(&self, record: &EncodingRecord) -> Result<Option<Tombstone>, KvError> {
        self.row(&key(record.volume, record.datafile, record.salt))
    }

    /// Places on a backend in order of due time, with that time; the earliest `max`.
    pub fn tombstones_due(
        &self,
        backend: BackendId,
        max: usize,
    ) -> Result<Vec<(Place, u64)>, KvError> {
        let prefix = Key::of(Table::TombstoneDue).number(backend.0).done();
        let page = self.range(&prefix, &prefix_end(&prefix), max)?;
        page.iter().map(|(key, _)| place_of(key)).collect()
    }
}
