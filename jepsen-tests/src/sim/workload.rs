//! What clients do: they fight for the leases of a few volumes, commit, release, swap and read. Every call goes into the history.

use super::host::address;
use super::net::SimDial;
use super::world::{CLUSTER, World};
use crate::metad::final_state::{record_seen, salt_of, volume_seen};
use crate::metad::history::{Datafile, HeadSeen, Operation, Process};
use qsfs_proto::api::{
    Applied, BackendAddress, Head, MetadError, Mutation, Role, ShardReport, Volume, VolumeSettings,
};
use qsfs_proto::client::{MetadClient, Timing};
use qsfs_proto::identity::PeerIdentity;
use qsfs_zstor::id::{BackendId, ClientId, DatafileId, Epoch, KeyId, ShardHash, Stream, VolumeId};
use qsfs_zstor::policy::{Geometry, Policy};
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Clients of a run; the last one only reads, so that it keeps asking a leader that no write goes to any more.
pub const CLIENTS: usize = 4;
/// Volumes they fight for.
pub const VOLUMES: u8 = 2;
/// Nodes that are asked what they know by themselves: those of the beginning.
const NODES: usize = 3;
/// Backends, two at each of three locations.
const BACKENDS: u64 = 6;
/// Deadlines: short, so that much ends in doubt.
const TIMING: Timing = Timing {
    attempt: Duration::from_millis(700),
    connect: Duration::from_millis(400),
    read: Duration::from_millis(1_500),
    mutation: Duration::from_millis(2_500),
    backoff: Duration::from_millis(20),
    backoff_max: Duration::from_millis(200),
};

/// Numbers that are given out once in a run.
#[derive(Debug, Default)]
pub struct Numbers {
    datafile: AtomicU64,
    attempt: AtomicU64,
}

/// Key of a volume in the history.
pub fn key_of(volume: u8) -> String {
    format!("v{volume}")
}

/// Its id.
pub fn volume_id(volume: u8) -> VolumeId {
    VolumeId::from_bytes([volume; 16])
}

/// Two data and two parity shards.
pub fn policy() -> Policy {
    Policy {
        geometry: Geometry::new(2, 2).expect("in range"),
        survive_locations: 1,
        survive_nodes: 1,
    }
}

/// A client of all hosts that may be metads.
pub fn client(world: &World, number: u8) -> MetadClient {
    let nodes = world.nodes.lock();
    let all = nodes.iter().map(|slot| address(&slot.name)).collect();
    client_of(all, number)
}

fn client_of(endpoints: Vec<String>, number: u8) -> MetadClient {
    let me = PeerIdentity::new(CLUSTER, Role::Admin, format!("admin-{number}"));
    let dial = Arc::new(SimDial {
        me: me.expect("a name is a subject"),
    });
    let id = ClientId::from_bytes([number; 16]);
    MetadClient::over(endpoints, dial, CLUSTER, id, TIMING).expect("endpoints are well formed")
}

/// Tries until it succeeds; for what must be there before anything goes wrong.
pub async fn insist(client: &MetadClient, mutation: Mutation) -> Applied {
    loop {
        match client.mutate(mutation.clone()).await {
            Ok(applied) => return applied,
            Err(error) => {
                tracing::debug!(%error, "once more");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn settings(quota_bytes: u64) -> VolumeSettings {
    VolumeSettings {
        quota_bytes,
        ..VolumeSettings::default()
    }
}

/// Backends and volumes.
pub async fn prepare(world: &World, client: &MetadClient) {
    for number in 1..=BACKENDS {
        let location = format!("loc{}", number.div_ceil(2));
        let register = Mutation::RegisterAgent {
            location: location.parse().expect("a name"),
            node: format!("n{number}").parse().expect("a name"),
        };
        let Applied::Agent(agent) = insist(client, register).await else {
            continue;
        };
        let register = Mutation::RegisterBackend {
            agent,
            address: BackendAddress {
                endpoint: format!("n{number}:9900"),
                namespace: "a".into(),
                password: None,
                tls: true,
            },
            capacity_bytes: 1 << 40,
        };
        insist(client, register).await;
    }
    let mut process = world.recorder.process();
    for volume in 1..=VOLUMES {
        let create = Mutation::CreateVolume {
            id: volume_id(volume),
            name: key_of(volume).parse().expect("a name"),
            policy: policy(),
            key_id: KeyId::from_bytes([volume; KeyId::LEN]),
            settings: settings(0),
        };
        let operation = Operation::CreateVolume { quota_bytes: 0 };
        let call = process.invoke(&key_of(volume), operation.clone());
        insist(client, create).await;
        call.end(Ok(operation));
    }
}

/// One client.
pub struct Worker {
    world: Arc<World>,
    client: MetadClient,
    process: Process,
    numbers: Arc<Numbers>,
    random: StdRng,
    number: u64,
    reads_only: bool,
    /// Epoch held or once held, by volume.
    epochs: [Option<u64>; VOLUMES as usize + 1],
    /// Meta datafiles committed, by volume.
    metas: [Vec<u64>; VOLUMES as usize + 1],
    /// A record as it was before this client asked for a swap of it, by volume.
    swapped: [Option<EncodingRecord>; VOLUMES as usize + 1],
}

impl Worker {
    /// Client number `number`, counted from 1.
    pub fn new(world: &Arc<World>, numbers: &Arc<Numbers>, number: u8, reads_only: bool) -> Self {
        Self {
            world: Arc::clone(world),
            client: client(world, number),
            process: world.recorder.process(),
            numbers: Arc::clone(numbers),
            random: StdRng::seed_from_u64(world.seed.wrapping_mul(31) + u64::from(number)),
            number: u64::from(number),
            reads_only,
            epochs: [None; VOLUMES as usize + 1],
            metas: Default::default(),
            swapped: Default::default(),
        }
    }

    /// Works until the world says that it is enough.
    pub async fn run(mut self) {
        while self.world.working.load(Ordering::Relaxed) {
            let volume = self.random.random_range(1..=VOLUMES);
            let operation = self.choose(volume).await;
            self.perform(volume, operation).await;
            let pause = self.random.random_range(5..60);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn choose(&mut self, volume: u8) -> Operation {
        let held = self.epochs[usize::from(volume)];
        let stale = Operation::StaleRead {
            seen: None,
            age_ms: None,
        };
        if self.reads_only {
            let stale = self.random.random_bool(0.5).then_some(stale);
            return stale.unwrap_or(Operation::ReadVolume { seen: None });
        }
        match (self.random.random_range(0..100), held) {
            (0..8, _) | (8..68, None) => Operation::AcquireLease {
                client: self.number,
                takeover: self.random.random_bool(0.3),
                epoch: None,
            },
            (8..48, Some(epoch)) => self.commit(volume, epoch),
            (48..54, Some(epoch)) => Operation::RenewLease { epoch },
            (54..57, Some(epoch)) => Operation::ReleaseLease { epoch },
            (57..61, Some(epoch)) => self.release(volume, epoch),
            (61..69, Some(_)) => match self.swap(volume).await {
                Some(swap) => swap,
                None => Operation::ListRecords { seen: None },
            },
            (69..72, _) => match self.report(volume).await {
                Some(report) => report,
                None => Operation::ListRecords { seen: None },
            },
            (72..76, _) | (68, None) => Operation::SetQuota {
                // Each once, and none is what a volume begins with: the checkers tell by the number who set it.
                bytes: 1 + self.numbers.attempt.fetch_add(1, Ordering::Relaxed),
            },
            (76..82, _) => Operation::ListRecords { seen: None },
            (82..85, _) => stale,
            _ => Operation::ReadVolume { seen: None },
        }
    }

    fn commit(&mut self, volume: u8, epoch: u64) -> Operation {
        let attempt = self.numbers.attempt.fetch_add(1, Ordering::Relaxed);
        let id = self.numbers.datafile.fetch_add(1, Ordering::Relaxed) + 1;
        let meta = self.random.random_bool(0.5);
        let known = &self.metas[usize::from(volume)];
        let head = if meta {
            let newest = known.last().copied().unwrap_or(id).min(id);
            let recover_from = if self.random.random_bool(0.5) {
                id
            } else {
                newest
            };
            Some(HeadSeen {
                datafile: id,
                recover_from,
            })
        } else if known.len() > 1 && self.random.random_bool(0.15) {
            // One that is over: it must be refused.
            known.choose(&mut self.random).map(|old| HeadSeen {
                datafile: *old,
                recover_from: *old,
            })
        } else {
            None
        };
        Operation::CommitDatafiles {
            epoch,
            datafiles: vec![Datafile { id, attempt, meta }],
            head,
        }
    }

    fn release(&mut self, volume: u8, epoch: u64) -> Operation {
        let known = &self.metas[usize::from(volume)];
        let old = known[..known.len().saturating_sub(1)].choose(&mut self.random);
        Operation::ReleaseDatafiles {
            epoch,
            datafiles: old.copied().into_iter().collect(),
        }
    }

    /// One of a few records, again and again the same ones, so that those who change them meet.
    async fn some_record(&mut self, volume: u8) -> Option<EncodingRecord> {
        let after = DatafileId(0);
        let listed = self.client.list_records(volume_id(volume), None, after, 50);
        let records = listed.await.ok()?;
        let few = records.get(..records.len().min(4))?;
        few.choose(&mut self.random).cloned()
    }

    /// Somebody found a shard damaged; perhaps one that has moved meanwhile.
    async fn report(&mut self, volume: u8) -> Option<Operation> {
        let record = self.some_record(volume).await?;
        let shard = self.random.random_range(0..record.shards.len());
        Some(Operation::ReportShard {
            datafile: record.datafile.0,
            shard: u32::try_from(shard).ok()?,
            backend: record.shards[shard].backend.0,
        })
    }

    /// A swap made from a record as it is now, or, as rebuilds that overtake each other do, as it was: often as this client itself has
    /// swapped it.
    async fn swap(&mut self, volume: u8) -> Option<Operation> {
        let overtaken = self.swapped[usize::from(volume)].take();
        let record = match overtaken {
            Some(record) => record,
            None => self.some_record(volume).await?,
        };
        if self.random.random_bool(0.7) {
            self.swapped[usize::from(volume)] = Some(record.clone());
        }
        let shard = self.random.random_range(0..record.shards.len());
        let free: Vec<u64> = (1..=BACKENDS)
            .filter(|backend| !record.shards.iter().any(|s| s.backend.0 == *backend))
            .collect();
        let free = *free.choose(&mut self.random)?;
        if self.random.random_bool(0.5) {
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        Some(Operation::SwapShard {
            datafile: record.datafile.0,
            shard: u32::try_from(shard).ok()?,
            from: record.shards[shard].backend.0,
            to: free,
            version: record.version,
            swapped: None,
        })
    }

    async fn perform(&mut self, volume: u8, operation: Operation) {
        let key = key_of(volume);
        let bad_place = self.random.random_bool(0.05);
        let (client, number) = (self.client.clone(), self.number);
        // Whoever it is, it answers by itself.
        let at = self.random.random_range(0..NODES);
        let call = self.process.invoke(&key, operation.clone());
        let result = match &operation {
            Operation::StaleRead { .. } => stale_read(&self.world, number, at, volume).await,
            _ => ask(&client, number, volume, &operation, bad_place).await,
        };
        let text = match &result {
            Ok(done) => format!("ok {done:?}"),
            Err(error) => format!("{operation:?}: {error}"),
        };
        let name = format!("c{number}");
        self.world.note(&name, format_args!("{key} {text}"));
        let (epochs, metas) = (
            &mut self.epochs[usize::from(volume)],
            &mut self.metas[usize::from(volume)],
        );
        match &result {
            Ok(Operation::AcquireLease { epoch, .. }) => *epochs = *epoch,
            Ok(Operation::CommitDatafiles { datafiles, .. }) => {
                metas.extend(datafiles.iter().filter(|d| d.meta).map(|d| d.id));
            }
            Ok(Operation::ReleaseDatafiles { datafiles, .. }) => {
                metas.retain(|id| !datafiles.contains(id));
            }
            // Some go on for a while as if they had not heard.
            Err(MetadError::Fenced { .. }) if self.random.random_bool(0.5) => *epochs = None,
            _ => {}
        }
        call.end(match &result {
            Ok(done) => Ok(done.clone()),
            Err(error) => Err(error),
        });
    }
}

fn record(volume: u8, datafile: &Datafile, epoch: u64, bad_place: bool) -> EncodingRecord {
    let shards = (0..4).map(|shard| Shard {
        backend: BackendId(if bad_place {
            1
        } else {
            (datafile.id + shard) % BACKENDS + 1
        }),
        hash: ShardHash::from_bytes([1; ShardHash::LEN]),
        state: ShardState::Stored,
    });
    EncodingRecord {
        volume: volume_id(volume),
        datafile: DatafileId(datafile.id),
        stream: if datafile.meta {
            Stream::Meta
        } else {
            Stream::Data
        },
        epoch: Epoch(epoch),
        salt: salt_of(datafile.attempt),
        geometry: policy().geometry,
        chunk_bytes: 1 << 20,
        plain_bytes: 100,
        object_bytes: 200,
        shard_bytes: 100,
        piece_bytes: 1 << 20,
        shards: shards.collect(),
        version: 0,
    }
}

fn corrupt(volume: VolumeId, datafile: u64, shard: u32, backend: u64) -> Mutation {
    let report = ShardReport {
        volume,
        datafile: DatafileId(datafile),
        shard,
        backend: BackendId(backend),
        state: ShardState::Corrupt,
        by_scrub: false,
    };
    Mutation::ReportShards {
        reports: vec![report],
    }
}

/// What one node knows of a volume, and how old that is at most.
async fn stale_read(
    world: &World,
    number: u64,
    at: usize,
    volume: u8,
) -> Result<Operation, MetadError> {
    let name = world.nodes.lock()[at].name.clone();
    let number = u8::try_from(number).unwrap_or(0);
    let (client, observed) = client_of(vec![address(&name)], number).stale().observed();
    let found = client.volume_by_id(volume_id(volume)).await?;
    Ok(Operation::StaleRead {
        seen: Some(volume_seen(&found)),
        age_ms: observed.freshness().and_then(|fresh| fresh.age_ms),
    })
}

async fn ask(
    client: &MetadClient,
    number: u64,
    volume: u8,
    operation: &Operation,
    bad_place: bool,
) -> Result<Operation, MetadError> {
    let id = volume_id(volume);
    let mut done = operation.clone();
    let mutation = match operation {
        Operation::ReadVolume { .. } => {
            let seen: Volume = client.volume_by_id(id).await?;
            return Ok(Operation::ReadVolume {
                seen: Some(volume_seen(&seen)),
            });
        }
        Operation::ListRecords { .. } => {
            let after = DatafileId(0);
            let records = client.list_records(id, None, after, 1_024).await?;
            return Ok(Operation::ListRecords {
                seen: Some(records.iter().map(record_seen).collect()),
            });
        }
        Operation::SetQuota { bytes } => Mutation::AlterVolume {
            volume: id,
            settings: settings(*bytes),
        },
        Operation::AcquireLease { takeover, .. } => Mutation::AcquireLease {
            volume: id,
            client: ClientId::from_bytes([u8::try_from(number).unwrap_or(0); 16]),
            holder: format!("c{number}"),
            takeover: *takeover,
        },
        Operation::RenewLease { epoch } => Mutation::RenewLease {
            volume: id,
            epoch: Epoch(*epoch),
            report: Default::default(),
        },
        Operation::ReleaseLease { epoch } => Mutation::ReleaseLease {
            volume: id,
            epoch: Epoch(*epoch),
        },
        Operation::CommitDatafiles {
            epoch,
            datafiles,
            head,
        } => Mutation::CommitDatafiles {
            volume: id,
            epoch: Epoch(*epoch),
            records: datafiles
                .iter()
                .map(|datafile| record(volume, datafile, *epoch, bad_place && head.is_none()))
                .collect(),
            head: head.map(|head| Head {
                datafile: DatafileId(head.datafile),
                recover_from: DatafileId(head.recover_from),
            }),
        },
        Operation::ReleaseDatafiles { epoch, datafiles } => Mutation::ReleaseDatafiles {
            volume: id,
            epoch: Epoch(*epoch),
            datafiles: datafiles.iter().copied().map(DatafileId).collect(),
        },
        Operation::SwapShard {
            datafile,
            shard,
            from,
            to,
            version,
            ..
        } => Mutation::SwapShard {
            volume: id,
            datafile: DatafileId(*datafile),
            shard: *shard,
            from: BackendId(*from),
            to: BackendId(*to),
            version: *version,
        },
        Operation::ReportShard {
            datafile,
            shard,
            backend,
        } => corrupt(id, *datafile, *shard, *backend),
        Operation::CreateVolume { .. } | Operation::DeleteVolume | Operation::StaleRead { .. } => {
            return Err(MetadError::Invalid("not part of this workload".into()));
        }
    };
    let applied = client.mutate(mutation).await?;
    match (&mut done, applied) {
        (Operation::AcquireLease { epoch, .. }, Applied::Epoch(granted)) => {
            *epoch = Some(granted.0);
        }
        (Operation::SwapShard { swapped, .. }, Applied::Version(version)) => {
            *swapped = Some(version);
        }
        _ => {}
    }
    Ok(done)
}
