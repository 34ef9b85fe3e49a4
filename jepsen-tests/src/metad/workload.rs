//! What clients do to a cluster while it suffers: volumes, a few at a time, each used by all clients until it is used up.
//!
//! Clients act on what they believe: a writer goes on under an epoch that it may have lost, a commit that got no answer is tried
//! again by anyone, a record is swapped by the version that was listed last.

use super::final_state::{record_seen, salt_of, volume_seen};
use super::history::{Datafile, HeadSeen, Kind, Operation, Process, Recorder};
use qsfs_proto::api::{Applied, Head, MetadError, Mutation, VolumeSettings};
use qsfs_proto::client::{MetadClient, PAGE_MAX};
use qsfs_proto::server::RequestId;
use qsfs_zstor::id::{
    BackendId, ClientId, DatafileId, Epoch, KeyId, ShardHash, Stream, VolumeId, VolumeName,
};
use qsfs_zstor::policy::{Geometry, Policy};
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Volumes in use at once.
const VOLUMES_AT_ONCE: usize = 2;
/// Operations on a volume until another one takes its place: as many as a search for an order can bear.
const OPERATIONS_A_VOLUME: usize = 120;

/// Times a request without an answer is asked again.
const REPEATS_OF_LOST: u32 = 2;
/// Share of answered requests that are asked again.
const REPEATED: f64 = 0.1;

/// The policy of all volumes: the loss of a location and of a node must be survived.
pub fn policy() -> Policy {
    Policy {
        geometry: Geometry::new(2, 2).expect("a constant"),
        survive_locations: 1,
        survive_nodes: 1,
    }
}

/// What all clients know together.
pub struct Workload {
    recorder: Recorder,
    backends: Vec<BackendId>,
    shared: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    open: Vec<Known>,
    /// Id of each volume by key.
    all: BTreeMap<String, VolumeId>,
    attempts: u64,
    values: u64,
}

/// What is believed of a volume.
#[derive(Clone)]
struct Known {
    key: String,
    id: VolumeId,
    made: bool,
    operations: usize,
    newest: u64,
    first_meta: Option<u64>,
    data: Vec<u64>,
    /// Commits without an answer.
    lost: Vec<Datafile>,
    listed: Vec<EncodingRecord>,
}

impl Workload {
    /// Over these backends: shards are placed on the first `k + m`, or moved among all.
    pub fn new(recorder: Recorder, backends: Vec<BackendId>) -> Self {
        Self {
            recorder,
            backends,
            shared: Mutex::default(),
        }
    }

    /// Id of every volume that was used, by key.
    pub fn volumes(&self) -> BTreeMap<String, VolumeId> {
        self.lock().all.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // No step under the lock can leave it half done.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One of the volumes in use.
    fn pick(&self, rng: &mut StdRng) -> Known {
        let mut shared = self.lock();
        shared
            .open
            .retain(|volume| volume.operations < OPERATIONS_A_VOLUME);
        while shared.open.len() < VOLUMES_AT_ONCE {
            let number = shared.all.len() as u64 + 1;
            let mut bytes = [0; VolumeId::LEN];
            bytes[..8].copy_from_slice(&number.to_be_bytes());
            let known = Known {
                key: format!("v{number}"),
                id: VolumeId::from_bytes(bytes),
                made: false,
                operations: 0,
                newest: 0,
                first_meta: None,
                data: Vec::new(),
                lost: Vec::new(),
                listed: Vec::new(),
            };
            shared.all.insert(known.key.clone(), known.id);
            shared.open.push(known);
        }
        let at = rng.random_range(0..shared.open.len());
        shared.open[at].operations += 1;
        shared.open[at].clone()
    }

    fn update(&self, key: &str, change: impl FnOnce(&mut Known)) {
        let mut shared = self.lock();
        if let Some(known) = shared.open.iter_mut().find(|known| known.key == key) {
            change(known);
        }
    }

    fn value(&self) -> u64 {
        let mut shared = self.lock();
        shared.values += 1;
        shared.values
    }

    fn datafile(&self, key: &str, meta: bool) -> Datafile {
        let mut shared = self.lock();
        shared.attempts += 1;
        let attempt = shared.attempts;
        let known = shared.open.iter_mut().find(|known| known.key == key);
        let id = known.map_or(attempt, |known| {
            known.newest += 1;
            known.newest
        });
        Datafile { id, attempt, meta }
    }

    fn record(&self, volume: VolumeId, datafile: Datafile, epoch: u64) -> EncodingRecord {
        let geometry = policy().geometry;
        let backends = self.backends.iter().cycle().take(geometry.total());
        let shards = backends.map(|backend| Shard {
            backend: *backend,
            hash: ShardHash::from_bytes([1; 32]),
            state: ShardState::Stored,
        });
        EncodingRecord {
            volume,
            datafile: DatafileId(datafile.id),
            stream: if datafile.meta {
                Stream::Meta
            } else {
                Stream::Data
            },
            epoch: Epoch(epoch),
            salt: salt_of(datafile.attempt),
            geometry,
            chunk_bytes: 1 << 20,
            plain_bytes: 100,
            object_bytes: 200,
            shard_bytes: 100,
            piece_bytes: 1 << 20,
            shards: shards.collect(),
            version: 0,
        }
    }
}

/// One client.
pub struct Actor<'a> {
    workload: &'a Workload,
    process: Process,
    client: MetadClient,
    number: u64,
    rng: StdRng,
    /// Number of the newest request.
    sequence: u64,
    /// Epoch it believes to hold, by volume.
    epochs: HashMap<String, u64>,
}

impl<'a> Actor<'a> {
    /// The client of this number.
    pub fn new(workload: &'a Workload, client: MetadClient, number: u64, rng: StdRng) -> Self {
        Self {
            process: workload.recorder.process(),
            workload,
            client,
            number,
            rng,
            sequence: 0,
            epochs: HashMap::new(),
        }
    }

    /// Does one thing and notes how it ended.
    pub async fn act(&mut self) {
        let volume = self.workload.pick(&mut self.rng);
        if !volume.made {
            return self.create(&volume).await;
        }
        let Some(epoch) = self.epochs.get(&volume.key).copied() else {
            return match self.rng.random_range(0..10) {
                0..3 => self.acquire(&volume).await,
                choice => self.act_on_any(&volume, choice).await,
            };
        };
        match self.rng.random_range(0..100) {
            0..30 => self.commit(&volume, epoch).await,
            30..36 => {
                let renew = Mutation::RenewLease {
                    volume: volume.id,
                    epoch: Epoch(epoch),
                    report: qsfs_proto::api::ClientReport::default(),
                };
                let _ = self
                    .write(&volume, Operation::RenewLease { epoch }, renew)
                    .await;
            }
            36..42 => self.release(&volume, epoch).await,
            42..45 => {
                let release = Mutation::ReleaseLease {
                    volume: volume.id,
                    epoch: Epoch(epoch),
                };
                let _ = self
                    .write(&volume, Operation::ReleaseLease { epoch }, release)
                    .await;
            }
            45..50 => self.acquire(&volume).await,
            choice => self.act_on_any(&volume, choice % 10).await,
        }
    }

    /// What needs no lease.
    async fn act_on_any(&mut self, volume: &Known, choice: u32) {
        match choice {
            0..4 => self.set_quota(volume).await,
            4..6 => self.read(volume).await,
            6 => self.read_stale(volume).await,
            7..9 => self.list(volume).await,
            _ => self.swap(volume).await,
        }
    }

    /// Asks for a change and notes the end; the answer, if it took effect. A request whose answer is lost is repeated, and now and then
    /// one that was answered is, as if its answer had been lost: by a process that knows nothing of it but its name.
    async fn write(
        &mut self,
        volume: &Known,
        operation: Operation,
        mutation: Mutation,
    ) -> Result<Applied, Kind> {
        self.sequence += 1;
        let id = RequestId {
            client: ClientId::from_bytes([0x77; ClientId::LEN]),
            session: self.number,
            sequence: self.sequence,
            oldest_pending: self.sequence,
        };
        let mut ended = self.ask(volume, &operation, &mutation, id).await;
        for _ in 0..REPEATS_OF_LOST {
            if !matches!(ended, Err(Kind::Unknown)) {
                break;
            }
            ended = self.ask(volume, &operation, &mutation, id).await;
        }
        if ended.is_ok() && self.rng.random_bool(REPEATED) {
            // What comes back is the checkers' to judge.
            let _ = self.ask(volume, &operation, &mutation, id).await;
        }
        ended
    }

    /// One try of a request.
    async fn ask(
        &mut self,
        volume: &Known,
        operation: &Operation,
        mutation: &Mutation,
        id: RequestId,
    ) -> Result<Applied, Kind> {
        let name = format!("c{}/{}", id.session, id.sequence);
        let call = self
            .process
            .invoke_as(&volume.key, operation.clone(), Some(name));
        match self.client.mutate_as(id, mutation).await {
            Ok(applied) => {
                call.end(Ok(answered(operation.clone(), &applied)));
                Ok(applied)
            }
            Err(error) => {
                let ended = call.end(Err(&error));
                // Most who are fenced believe it; some go on.
                if matches!(error, MetadError::Fenced { .. }) && self.rng.random_bool(0.6) {
                    self.epochs.remove(&volume.key);
                }
                Err(ended)
            }
        }
    }

    async fn create(&mut self, volume: &Known) {
        let settings = VolumeSettings::default();
        let operation = Operation::CreateVolume {
            quota_bytes: settings.quota_bytes,
        };
        let Ok(name) = volume.key.parse::<VolumeName>() else {
            return;
        };
        let create = Mutation::CreateVolume {
            id: volume.id,
            name,
            policy: policy(),
            key_id: KeyId::from_bytes([3; KeyId::LEN]),
            settings,
        };
        if self.write(volume, operation, create).await.is_ok() {
            self.workload.update(&volume.key, |known| known.made = true);
        }
    }

    async fn set_quota(&mut self, volume: &Known) {
        let bytes = self.workload.value();
        let alter = Mutation::AlterVolume {
            volume: volume.id,
            settings: VolumeSettings {
                quota_bytes: bytes,
                ..VolumeSettings::default()
            },
        };
        let _ = self
            .write(volume, Operation::SetQuota { bytes }, alter)
            .await;
    }

    async fn acquire(&mut self, volume: &Known) {
        let takeover = self.rng.random_bool(0.7);
        let operation = Operation::AcquireLease {
            client: self.number,
            takeover,
            epoch: None,
        };
        let mut client = [0; ClientId::LEN];
        client[..8].copy_from_slice(&self.number.to_be_bytes());
        let acquire = Mutation::AcquireLease {
            volume: volume.id,
            client: ClientId::from_bytes(client),
            holder: format!("c{}:1", self.number),
            takeover,
        };
        if let Ok(Applied::Epoch(epoch)) = self.write(volume, operation, acquire).await {
            self.epochs.insert(volume.key.clone(), epoch.0);
        }
    }

    async fn commit(&mut self, volume: &Known, epoch: u64) {
        let again = volume.lost.choose(&mut self.rng).copied();
        let datafile = match again.filter(|_| self.rng.random_bool(0.5)) {
            Some(datafile) => datafile,
            None => {
                let meta = self.rng.random_bool(0.5);
                self.workload.datafile(&volume.key, meta)
            }
        };
        let first = volume.first_meta.unwrap_or(datafile.id);
        let head = datafile.meta.then_some(HeadSeen {
            datafile: datafile.id,
            recover_from: first.min(datafile.id),
        });
        let operation = Operation::CommitDatafiles {
            epoch,
            datafiles: vec![datafile],
            head,
        };
        let commit = Mutation::CommitDatafiles {
            volume: volume.id,
            epoch: Epoch(epoch),
            records: vec![self.workload.record(volume.id, datafile, epoch)],
            head: head.map(|head| Head {
                datafile: DatafileId(head.datafile),
                recover_from: DatafileId(head.recover_from),
            }),
        };
        let ended = self.write(volume, operation, commit).await;
        self.workload.update(&volume.key, |known| match ended {
            Ok(_) => {
                known.lost.retain(|lost| *lost != datafile);
                if datafile.meta {
                    known.first_meta.get_or_insert(datafile.id);
                } else {
                    known.data.push(datafile.id);
                }
            }
            Err(Kind::Unknown) => known.lost.push(datafile),
            Err(_) => {}
        });
    }

    async fn release(&mut self, volume: &Known, epoch: u64) {
        let Some(id) = volume.data.choose(&mut self.rng).copied() else {
            return self.read(volume).await;
        };
        let operation = Operation::ReleaseDatafiles {
            epoch,
            datafiles: vec![id],
        };
        let release = Mutation::ReleaseDatafiles {
            volume: volume.id,
            epoch: Epoch(epoch),
            datafiles: vec![DatafileId(id)],
        };
        let _ = self.write(volume, operation, release).await;
    }

    async fn swap(&mut self, volume: &Known) {
        let Some(record) = volume.listed.choose(&mut self.rng) else {
            return self.list(volume).await;
        };
        let shard = self.rng.random_range(0..record.shards.len());
        let from = record.shards[shard].backend;
        let to = *self.backends().choose(&mut self.rng).unwrap_or(&from);
        let shard = u32::try_from(shard).unwrap_or(0);
        let operation = Operation::SwapShard {
            datafile: record.datafile.0,
            shard,
            from: from.0,
            to: to.0,
            version: record.version,
            swapped: None,
        };
        let swap = Mutation::SwapShard {
            volume: volume.id,
            datafile: record.datafile,
            shard,
            from,
            to,
            version: record.version,
        };
        let _ = self.write(volume, operation, swap).await;
    }

    fn backends(&self) -> &'a [BackendId] {
        &self.workload.backends
    }

    async fn read(&mut self, volume: &Known) {
        let asked = Operation::ReadVolume { seen: None };
        let call = self.process.invoke(&volume.key, asked);
        match self.client.volume_by_id(volume.id).await {
            Ok(found) => {
                let seen = Some(volume_seen(&found));
                call.end(Ok(Operation::ReadVolume { seen }));
            }
            Err(error) => {
                call.end(Err(&error));
            }
        }
    }

    /// What some node knows by itself, and how old that is at most.
    async fn read_stale(&mut self, volume: &Known) {
        let asked = Operation::StaleRead {
            seen: None,
            age_ms: None,
        };
        let call = self.process.invoke(&volume.key, asked);
        let (client, observed) = self.client.stale().observed();
        match client.volume_by_id(volume.id).await {
            Ok(found) => {
                call.end(Ok(Operation::StaleRead {
                    seen: Some(volume_seen(&found)),
                    age_ms: observed.freshness().and_then(|fresh| fresh.age_ms),
                }));
            }
            Err(error) => {
                call.end(Err(&error));
            }
        }
    }

    async fn list(&mut self, volume: &Known) {
        let asked = Operation::ListRecords { seen: None };
        let call = self.process.invoke(&volume.key, asked);
        let page = self
            .client
            .list_records(volume.id, None, DatafileId(0), PAGE_MAX)
            .await;
        match page {
            Ok(records) => {
                let seen = Some(records.iter().map(record_seen).collect());
                call.end(Ok(Operation::ListRecords { seen }));
                self.workload
                    .update(&volume.key, |known| known.listed = records);
            }
            Err(error) => {
                call.end(Err(&error));
            }
        }
    }
}

/// What was asked, with the answer filled in.
fn answered(mut operation: Operation, applied: &Applied) -> Operation {
    match (&mut operation, applied) {
        (Operation::AcquireLease { epoch, .. }, Applied::Epoch(granted)) => {
            *epoch = Some(granted.0);
        }
        (Operation::SwapShard { swapped, .. }, Applied::Version(version)) => {
            *swapped = Some(*version);
        }
        _ => {}
    }
    operation
}

/// Asks again, for at most so many tries, what must go through because nothing is wrong yet.
pub async fn insist(client: &MetadClient, mutation: Mutation) -> Result<Applied, MetadError> {
    const TRIES: u32 = 5;
    let mut tries = 0;
    loop {
        match client.mutate(mutation.clone()).await {
            Err(MetadError::NoQuorum(_) | MetadError::Unreachable(_) | MetadError::Unknown(_))
                if tries < TRIES =>
            {
                tries += 1
            }
            ended => return ended,
        }
    }
}
