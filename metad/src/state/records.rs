//! Encoding records: commit, swap, report, release, and the index by backend.
//!
//! Invariants: a record changes only here; its version rises at every change; the index row of every shard exists exactly
//! while a record places that shard on that backend; the sums of backends and volumes agree with the records.

use super::kv::{Kv, KvError, RowKey, after, prefix_end};
use super::row::{Key, Table, array_at, number_at};
use super::{State, Stop, tombstones};
use crate::placing;
use qsfs_proto::api::{Applied, Head, Intent, MetadError, Mutation, ShardReport, Volume};
use qsfs_zstor::id::{BackendId, DatafileId, Epoch, Stream, VolumeId};
use qsfs_zstor::record::{EncodingRecord, ShardState};
use std::collections::HashSet;

/// Records in one commit at most.
pub const COMMIT_RECORDS_MAX: usize = 256;

/// Reports in one command at most.
pub const REPORTS_MAX: usize = 1_024;

/// Datafiles released at once at most.
pub const RELEASE_MAX: usize = 4_096;

fn key(volume: VolumeId, datafile: DatafileId) -> RowKey {
    Key::of(Table::Record)
        .bytes(volume.as_bytes())
        .number(datafile.0)
        .done()
}

fn index_key(backend: BackendId, record: &EncodingRecord, shard: u32) -> RowKey {
    Key::of(Table::RecordByBackend)
        .number(backend.0)
        .bytes(record.volume.as_bytes())
        .number(record.datafile.0)
        .shard(shard)
        .done()
}

fn invalid<T>(text: String) -> Result<T, Stop> {
    Err(MetadError::Invalid(text).into())
}

/// All or nothing: epoch, geometry, placement and head order are checked before anything is written.
pub(super) fn commit<K: Kv>(
    state: &mut State<K>,
    (id, epoch): (VolumeId, Epoch),
    records: &[EncodingRecord],
    head: Option<&Head>,
) -> Result<Applied, Stop> {
    let volume = state.written_by(id, epoch)?;
    if records.len() > COMMIT_RECORDS_MAX {
        return invalid(format!("{} records in one commit", records.len()));
    }
    let mut seen = HashSet::new();
    for record in records {
        check_record(state, record, &volume)?;
        if !seen.insert(record.datafile) {
            return invalid(format!("datafile {} twice in one commit", record.datafile));
        }
        match state.record(id, record.datafile)? {
            // Committed before, by a request whose answer was lost together with its sequence.
            Some(known) if known.salt == record.salt => {}
            Some(_) => {
                return Err(MetadError::Exists(format!("datafile {}", record.datafile)).into());
            }
            None if state.tombstone_of(record)?.is_some() => {
                return invalid(format!(
                    "this encoding of datafile {} was released; encode it anew",
                    record.datafile
                ));
            }
            None => state.add(record)?,
        }
    }
    if let Some(head) = head {
        check_head(state, &volume, head)?;
        state.put_volume(&Volume {
            head: *head,
            ..Volume::clone(&volume)
        });
    }
    Ok(Applied::Done)
}

fn check_record<K: Kv>(
    state: &mut State<K>,
    record: &EncodingRecord,
    volume: &Volume,
) -> Result<(), Stop> {
    let name = record.datafile;
    if record.volume != volume.id || record.datafile.0 == 0 || record.version != 0 {
        return invalid(format!(
            "record of datafile {name} names another volume, or a version"
        ));
    }
    if record.epoch > volume.epoch {
        return invalid(format!("datafile {name} was encoded under a future epoch"));
    }
    if record.shards.len() != record.geometry.total() {
        return invalid(format!(
            "datafile {name} has {} shards",
            record.shards.len()
        ));
    }
    let data = record.geometry.data() as u64;
    if record.piece_bytes == 0
        || record.chunk_bytes == 0
        || record.shard_bytes.saturating_mul(data) < record.object_bytes
    {
        return invalid(format!("sizes of datafile {name} contradict each other"));
    }
    for shard in &record.shards {
        if shard.state != ShardState::Stored {
            return invalid(format!("datafile {name} has a shard that is not stored"));
        }
        match state.seen_backend(shard.backend)? {
            Some(backend) if backend.intent != Intent::Retire => {}
            _ => {
                let text = format!("backend {}", shard.backend);
                return Err(MetadError::NotFound(text).into());
            }
        }
    }
    if !placing::survives_one_backend(record) {
        return Err(MetadError::PolicyUnmet(format!(
            "datafile {name} would not survive the loss of one backend"
        ))
        .into());
    }
    Ok(())
}

fn check_head<K: Kv>(state: &State<K>, volume: &Volume, head: &Head) -> Result<(), Stop> {
    let old = volume.head;
    if head.datafile < old.datafile || head.recover_from < old.recover_from {
        return invalid(format!(
            "head would go back from {} to {} (recovery from {} to {})",
            old.datafile, head.datafile, old.recover_from, head.recover_from
        ));
    }
    if head.recover_from > head.datafile {
        return invalid("recovery would begin after the head".into());
    }
    for datafile in [head.datafile, head.recover_from] {
        match state.record(volume.id, datafile)? {
            Some(record) if record.stream == Stream::Meta => {}
            _ => {
                return invalid(format!(
                    "meta datafile {datafile} of the head is not committed"
                ));
            }
        }
    }
    Ok(())
}

/// Unknown datafiles are ignored; what recovery needs is not released.
pub(super) fn release<K: Kv>(
    state: &mut State<K>,
    (id, epoch): (VolumeId, Epoch),
    datafiles: &[DatafileId],
    now_ms: u64,
) -> Result<Applied, Stop> {
    let volume = state.written_by(id, epoch)?;
    if datafiles.len() > RELEASE_MAX {
        return invalid(format!("{} datafiles released at once", datafiles.len()));
    }
    let due_ms = now_ms.saturating_add(state.settings()?.tombstone_grace_ms);
    for datafile in datafiles {
        let Some(record) = state.record(id, *datafile)? else {
            continue;
        };
        if record.stream == Stream::Meta && record.datafile >= volume.head.recover_from {
            return invalid(format!(
                "meta datafile {datafile} is needed to recover the head"
            ));
        }
        bury(state, &record, due_ms)?;
    }
    Ok(Applied::Done)
}

/// Turns a record into a tombstone.
pub(super) fn bury<K: Kv>(
    state: &mut State<K>,
    record: &EncodingRecord,
    due_ms: u64,
) -> Result<(), KvError> {
    state.remove(record)?;
    let places = (0u32..)
        .zip(&record.shards)
        .map(|(index, shard)| (shard.backend, index));
    tombstones::bury(state, record, places, due_ms)
}

/// Compare-and-swap of one shard's backend. The old place, if it is another one, is buried.
pub(super) fn swap<K: Kv>(
    state: &mut State<K>,
    mutation: &Mutation,
    now_ms: u64,
) -> Result<Applied, Stop> {
    let Mutation::SwapShard {
        volume,
        datafile,
        shard,
        from,
        to,
        version,
    } = mutation
    else {
        return invalid("not a swap".into());
    };
    let Some(old) = state.record(*volume, *datafile)? else {
        return Err(MetadError::NotFound(format!("datafile {datafile} of {volume}")).into());
    };
    let current = old.version;
    let Some(place) = old.shards.get(*shard as usize) else {
        return invalid(format!("datafile {datafile} has no shard {shard}"));
    };
    if current != *version || place.backend != *from {
        return Err(MetadError::VersionConflict { current }.into());
    }
    match state.backend(*to)? {
        Some(backend) if from == to || backend.intent == Intent::Serve => {}
        Some(backend) => return invalid(format!("backend {} takes no shards", backend.id)),
        None => return Err(MetadError::NotFound(format!("backend {to}")).into()),
    }
    let mut new = old.clone();
    let repaired = place.state != ShardState::Stored;
    new.shards[*shard as usize].backend = *to;
    new.shards[*shard as usize].state = ShardState::Stored;
    new.version += 1;
    if !placing::survives_one_backend(&new) {
        return Err(MetadError::PolicyUnmet(format!(
            "datafile {datafile} would not survive the loss of backend {to}"
        ))
        .into());
    }
    if from != to && !tombstones::take_back(state, &new, *to, *shard)? {
        return invalid(format!(
            "deletion of the old shard on backend {to} is under way"
        ));
    }
    state.replace(&old, &new)?;
    if from != to {
        let due_ms = now_ms.saturating_add(state.settings()?.tombstone_grace_ms);
        tombstones::bury(state, &new, [(*from, *shard)], due_ms)?;
    }
    if repaired {
        let mut rot = state.rot()?;
        rot.repaired += 1;
        state.put_rot(&rot);
    }
    Ok(Applied::Version(new.version))
}

/// A report about a shard that has moved, or is reported already, is ignored.
pub(super) fn report<K: Kv>(
    state: &mut State<K>,
    reports: &[ShardReport],
) -> Result<Applied, Stop> {
    if reports.len() > REPORTS_MAX {
        return invalid(format!("{} reports at once", reports.len()));
    }
    let mut rot = state.rot()?;
    for report in reports {
        let Some(old) = state.record(report.volume, report.datafile)? else {
            continue;
        };
        let mut new = old.clone();
        match new.shards.get_mut(report.shard as usize) {
            Some(shard)
                if shard.backend == report.backend
                    && shard.state == ShardState::Stored
                    && report.state != ShardState::Stored =>
            {
                shard.state = report.state;
            }
            _ => continue,
        }
        new.version += 1;
        state.replace(&old, &new)?;
        if report.by_scrub {
            rot.found_by_scrub += 1;
        } else {
            rot.found_by_read += 1;
        }
    }
    state.put_rot(&rot);
    Ok(Applied::Done)
}

impl<K: Kv> State<K> {
    /// One record.
    pub fn record(
        &self,
        volume: VolumeId,
        datafile: DatafileId,
    ) -> Result<Option<EncodingRecord>, KvError> {
        self.row(&key(volume, datafile))
    }

    /// At most `max` `(volume, datafile, shard)` placed on a backend, after the given one.
    pub fn shards_on(
        &self,
        backend: BackendId,
        start_after: Option<(VolumeId, DatafileId, u32)>,
        max: usize,
    ) -> Result<Vec<(VolumeId, DatafileId, u32)>, KvError> {
        let prefix = Key::of(Table::RecordByBackend).number(backend.0);
        let from = match start_after {
            Some((volume, datafile, shard)) => {
                let key = prefix.clone().bytes(volume.as_bytes()).number(datafile.0);
                after(&key.shard(shard.min(u32::from(u8::MAX))).done())
            }
            None => prefix.clone().done(),
        };
        let page = self.range(&from, &prefix_end(&prefix.done()), max)?;
        page.iter()
            .map(|(key, _)| {
                let volume = VolumeId::from_bytes(array_at(key, 9)?);
                let datafile = DatafileId(number_at(key, 25)?);
                Ok((volume, datafile, u32::from(array_at::<1>(key, 33)?[0])))
            })
            .collect()
    }

    pub(crate) fn add(&mut self, record: &EncodingRecord) -> Result<(), KvError> {
        let mut totals = self.volume_totals(record.volume)?;
        totals.datafiles += 1;
        totals.bytes += record.plain_bytes;
        self.put_volume_totals(record.volume, totals);
        self.count(record, true)?;
        self.write(record);
        Ok(())
    }

    fn remove(&mut self, record: &EncodingRecord) -> Result<(), KvError> {
        let mut totals = self.volume_totals(record.volume)?;
        totals.datafiles -= 1;
        totals.bytes -= record.plain_bytes;
        self.put_volume_totals(record.volume, totals);
        self.count(record, false)?;
        self.delete(key(record.volume, record.datafile));
        self.touch()
            .records
            .insert((record.volume, record.datafile));
        Ok(())
    }

    fn replace(&mut self, old: &EncodingRecord, new: &EncodingRecord) -> Result<(), KvError> {
        self.count(old, false)?;
        self.count(new, true)?;
        self.write(new);
        Ok(())
    }

    fn write(&mut self, record: &EncodingRecord) {
        self.put_row(key(record.volume, record.datafile), record);
        self.touch()
            .records
            .insert((record.volume, record.datafile));
    }

    /// Adds a record to the index and the sums by backend, or takes it out.
    fn count(&mut self, record: &EncodingRecord, add: bool) -> Result<(), KvError> {
        for (index, shard) in (0u32..).zip(&record.shards) {
            let key = index_key(shard.backend, record, index);
            if add {
                self.put(key, Vec::new());
            } else {
                self.delete(key);
            }
        }
        for (backend, shards) in placing::per_backend(record) {
            let mut load = self.backend_load(backend)?;
            let bytes = shards * record.shard_bytes;
            if add {
                load.shards += shards;
                load.bytes += bytes;
            } else {
                load.shards -= shards;
                load.bytes -= bytes;
            }
            self.put_backend_load(backend, load);
        }
        Ok(())
    }
}
