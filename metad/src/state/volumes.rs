//! Volumes: name, policy, lease and epoch, head.

use super::command::Reply;
use super::kv::{Kv, KvError, RowKey, prefix_end};
use super::row::{Key, PAGE_ROWS, Table, decode};
use super::{State, Stop, busy, records};
use crate::placing;
use qsfs_proto::api::{Applied, Head, Lease, MetadError, Mutation, Volume, VolumeSettings};
use qsfs_zstor::id::{ClientId, DatafileId, Epoch, VolumeId, VolumeName};
use qsfs_zstor::record::EncodingRecord;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Records turned into tombstones by one reaping entry.
pub const REAP_RECORDS: usize = 256;

/// Longest `host:pid` of a lease holder.
pub const HOLDER_BYTES_MAX: usize = 256;

/// Smallest and largest size of a datafile.
pub const DATAFILE_BYTES: std::ops::RangeInclusive<u64> = (64 << 10)..=(4 << 30);

/// Sums over a volume's records, kept up by commit and release.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeTotals {
    /// Committed datafiles.
    pub datafiles: u64,
    /// Their plaintext bytes.
    pub bytes: u64,
}

fn key(id: VolumeId) -> RowKey {
    Key::of(Table::Volume).bytes(id.as_bytes()).done()
}

fn name_key(name: &VolumeName) -> RowKey {
    Key::of(Table::VolumeName)
        .bytes(name.as_str().as_bytes())
        .done()
}

fn doomed_key(id: VolumeId) -> RowKey {
    Key::of(Table::Doomed).bytes(id.as_bytes()).done()
}

fn check(settings: &VolumeSettings) -> Result<(), MetadError> {
    if settings.push_interval_ms < 100 {
        return Err(MetadError::Invalid(
            "push interval must be at least 100 ms".into(),
        ));
    }
    if !DATAFILE_BYTES.contains(&settings.datafile_bytes) {
        return Err(MetadError::Invalid(
            "datafile size must be 64 KiB to 4 GiB".into(),
        ));
    }
    Ok(())
}

pub(super) fn create<K: Kv>(
    state: &mut State<K>,
    mutation: &Mutation,
    now_ms: u64,
) -> Result<Applied, Stop> {
    let Mutation::CreateVolume {
        id,
        name,
        policy,
        key_id,
        settings,
    } = mutation
    else {
        return Err(MetadError::Invalid("not a volume creation".into()).into());
    };
    check(settings)?;
    if let Some(known) = state.volume(*id)? {
        return if known.name == *name && known.key_id == *key_id {
            Ok(Applied::Volume(Box::new(known)))
        } else {
            Err(MetadError::Exists(format!("volume id {id}")).into())
        };
    }
    if state.has(&doomed_key(*id))? {
        return Err(MetadError::Exists(format!("volume id {id}, being deleted")).into());
    }
    if state.volume_id(name)?.is_some() {
        return Err(MetadError::Exists(format!("volume {name}")).into());
    }
    placing::check_creation(policy, &state.backends()?).map_err(MetadError::PolicyUnmet)?;
    let volume = Volume {
        id: *id,
        name: name.clone(),
        policy: *policy,
        key_id: *key_id,
        epoch: Epoch(0),
        lease: None,
        head: Head::default(),
        settings: settings.clone(),
        created_ms: now_ms,
    };
    state.put_row(name_key(name), id);
    state.put_volume(&volume);
    Ok(Applied::Volume(Box::new(volume)))
}

pub(super) fn alter<K: Kv>(
    state: &mut State<K>,
    id: VolumeId,
    settings: &VolumeSettings,
) -> Result<Applied, Stop> {
    check(settings)?;
    let mut volume = state.known_volume(id)?;
    volume.settings = settings.clone();
    state.put_volume(&volume);
    Ok(Applied::Volume(Box::new(volume)))
}

/// The volume is gone at once; its records become tombstones a page at a time ([`reap`]).
pub(super) fn delete<K: Kv>(
    state: &mut State<K>,
    id: VolumeId,
    now_ms: u64,
) -> Result<Applied, Stop> {
    let volume = state.known_volume(id)?;
    if let Some(lease) = &volume.lease
        && lease.expires_ms > now_ms
    {
        return Err(held(lease, volume.epoch).into());
    }
    state.delete(key(id));
    state.delete(name_key(&volume.name));
    state.put(doomed_key(id), Vec::new());
    state.touch().volumes = true;
    Ok(Applied::Done)
}

/// Buries the next records of a deleted volume; says whether any are left.
pub(super) fn reap<K: Kv>(state: &mut State<K>, id: VolumeId, now_ms: u64) -> Result<Reply, Stop> {
    if !state.has(&doomed_key(id))? {
        return Ok(Reply::Remaining(false));
    }
    let due_ms = now_ms.saturating_add(state.settings()?.tombstone_grace_ms);
    let page = state.records_after(id, DatafileId(0), REAP_RECORDS)?;
    for record in &page {
        records::bury(state, record, due_ms)?;
    }
    let remaining = page.len() == REAP_RECORDS;
    if !remaining {
        state.delete(doomed_key(id));
        state.delete_busy(busy::Name::Totals(id));
        state.touch().volumes = true;
    }
    Ok(Reply::Remaining(remaining))
}

fn held(lease: &Lease, epoch: Epoch) -> MetadError {
    MetadError::Held {
        holder: lease.holder.clone(),
        epoch,
    }
}

/// Every grant is a new epoch, also for the client that holds the lease: after a crash it must not meet its own old
/// requests.
pub(super) fn acquire<K: Kv>(
    state: &mut State<K>,
    id: VolumeId,
    (client, holder): (ClientId, &String),
    takeover: bool,
    now_ms: u64,
) -> Result<Applied, Stop> {
    if holder.len() > HOLDER_BYTES_MAX {
        return Err(MetadError::Invalid("lease holder is too long".into()).into());
    }
    let mut volume = state.known_volume(id)?;
    if let Some(lease) = &volume.lease
        && lease.client != client
        && lease.expires_ms > now_ms
        && !takeover
    {
        return Err(held(lease, volume.epoch).into());
    }
    volume.epoch = volume.epoch.next();
    volume.lease = Some(Lease {
        client,
        holder: holder.clone(),
        expires_ms: now_ms.saturating_add(state.settings()?.lease_ttl_ms),
    });
    state.put_volume(&volume);
    Ok(Applied::Epoch(volume.epoch))
}

/// An expired lease that nobody took over is renewed: nobody else wrote.
pub(super) fn renew<K: Kv>(
    state: &mut State<K>,
    id: VolumeId,
    epoch: Epoch,
    now_ms: u64,
) -> Result<Applied, Stop> {
    let mut volume = Volume::clone(&*state.written_by(id, epoch)?);
    let ttl_ms = state.settings()?.lease_ttl_ms;
    if let Some(lease) = &mut volume.lease {
        lease.expires_ms = now_ms.saturating_add(ttl_ms);
    }
    state.put_row(key(id), &volume);
    Ok(Applied::Done)
}

pub(super) fn release<K: Kv>(
    state: &mut State<K>,
    id: VolumeId,
    epoch: Epoch,
) -> Result<Applied, Stop> {
    let mut volume = state.known_volume(id)?;
    if volume.epoch != epoch {
        return Err(fenced(&volume).into());
    }
    volume.lease = None;
    state.put_volume(&volume);
    Ok(Applied::Done)
}

fn missing(id: VolumeId) -> Stop {
    MetadError::NoSuchVolume(id.to_string()).into()
}

fn fenced(volume: &Volume) -> MetadError {
    MetadError::Fenced {
        current: volume.epoch,
    }
}

impl<K: Kv> State<K> {
    /// All volumes, by id.
    pub fn volumes(&self) -> Result<Vec<Volume>, KvError> {
        self.rows(&Key::of(Table::Volume).done())
    }

    /// One volume.
    pub fn volume(&self, id: VolumeId) -> Result<Option<Volume>, KvError> {
        self.row(&key(id))
    }

    /// Id of a name.
    pub fn volume_id(&self, name: &VolumeName) -> Result<Option<VolumeId>, KvError> {
        self.row(&name_key(name))
    }

    /// Sums over a volume's records.
    pub fn volume_totals(&self, id: VolumeId) -> Result<VolumeTotals, KvError> {
        self.busy(busy::Name::Totals(id))
    }

    /// Deleted volumes that still have records.
    pub fn doomed_volumes(&self) -> Result<Vec<VolumeId>, KvError> {
        let prefix = Key::of(Table::Doomed).done();
        let page = self.range(&prefix, &prefix_end(&prefix), PAGE_ROWS)?;
        page.iter()
            .map(|(key, _)| super::row::array_at(key, 1).map(VolumeId::from_bytes))
            .collect()
    }

    /// At most `max` records of a volume with ids above `after`.
    pub fn records_after(
        &self,
        volume: VolumeId,
        after: DatafileId,
        max: usize,
    ) -> Result<Vec<EncodingRecord>, KvError> {
        let prefix = Key::of(Table::Record).bytes(volume.as_bytes());
        let from = prefix.clone().number(after.0.saturating_add(1)).done();
        let page = self.range(&from, &prefix_end(&prefix.done()), max)?;
        page.iter().map(|(key, value)| decode(key, value)).collect()
    }

    pub(super) fn known_volume(&self, id: VolumeId) -> Result<Volume, Stop> {
        self.volume(id)?.ok_or_else(|| missing(id))
    }

    /// The volume, if `epoch` is its writer's: no write under an older epoch, none after its release.
    pub(super) fn written_by(&mut self, id: VolumeId, epoch: Epoch) -> Result<Arc<Volume>, Stop> {
        let volume = self.seen_volume(id)?.ok_or_else(|| missing(id))?;
        if volume.epoch == epoch && volume.lease.is_some() {
            Ok(volume)
        } else {
            Err(fenced(&volume).into())
        }
    }

    pub(crate) fn put_volume(&mut self, volume: &Volume) {
        self.put_row(key(volume.id), volume);
        self.touch().volumes = true;
    }

    pub(super) fn put_volume_totals(&mut self, id: VolumeId, totals: VolumeTotals) {
        self.put_busy(busy::Name::Totals(id), totals);
    }
}
