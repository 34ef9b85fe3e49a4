//! A cluster in memory for tests: metad's rules as far as a mount can notice them, and backends that fail on demand.

#![expect(clippy::unwrap_used, reason = "tests")]

use crate::backends::{Connector, PieceStore};
use crate::cluster::Cluster;
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use qsfs_proto::api::{
    Applied, Backend, BackendAddress, BackendFacts, ClusterSettings, Head, Intent, Lease,
    MetadError, Mutation, PlacementAnswer, ShardReport, Verdict, Volume, VolumeSettings,
};
use qsfs_zdb::client::ClientError;
use qsfs_zstor::id::{AgentId, BackendId, DatafileId, Epoch, KeyId, Stream, VolumeId, VolumeName};
use qsfs_zstor::key::VolumeKey;
use qsfs_zstor::piece::PieceKey;
use qsfs_zstor::placement::{Candidate, choose};
use qsfs_zstor::policy::{Geometry, Policy};
use qsfs_zstor::record::EncodingRecord;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// What goes wrong at a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Answers nothing, at once.
    Down,
    /// Takes nothing.
    Full,
    /// Never answers.
    Hangs,
    /// Dies after so many more values were stored.
    DiesAfter(usize),
}

#[derive(Default)]
pub(crate) struct World {
    pub(crate) volume: Option<Volume>,
    pub(crate) records: BTreeMap<DatafileId, EncodingRecord>,
    pub(crate) reports: Vec<ShardReport>,
    pub(crate) released: Vec<DatafileId>,
    pub(crate) pieces: BTreeMap<(BackendId, Vec<u8>), Bytes>,
    pub(crate) trouble: BTreeMap<BackendId, Trouble>,
    pub(crate) backends: Vec<Backend>,
    pub(crate) facts: Vec<BackendFacts>,
    /// The next so many commits are applied, and their answers lost.
    pub(crate) lose_commit_answers: usize,
    pub(crate) unreachable: bool,
    pub(crate) commits: usize,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct FakeCluster(pub(crate) Arc<Mutex<World>>);

pub(crate) const KEY: [u8; 32] = [0x5a; 32];

impl FakeCluster {
    /// Two locations, two nodes each, `per_node` backends per node.
    pub(crate) fn new(geometry: &str, survive_locations: u32, per_node: u64) -> Self {
        let geometry: Geometry = geometry.parse().unwrap();
        let policy = Policy {
            geometry,
            survive_locations,
            survive_nodes: survive_locations,
        };
        let mut backends = Vec::new();
        for node in 0..4_u64 {
            for slot in 0..per_node {
                let id = BackendId(node * per_node + slot + 1);
                backends.push(Backend {
                    id,
                    agent: AgentId(node + 1),
                    location: format!("loc{}", node / 2 + 1).parse().unwrap(),
                    node: format!("n{}", node + 1).parse().unwrap(),
                    address: BackendAddress {
                        endpoint: format!("127.0.0.1:{}", id.0),
                        namespace: "shards".to_owned(),
                        password: None,
                        tls: false,
                    },
                    capacity_bytes: 1 << 40,
                    verdict: Verdict::Up,
                    verdict_since_ms: 0,
                    intent: Intent::Serve,
                });
            }
        }
        let volume = Volume {
            id: VolumeId::from_bytes([9; 16]),
            name: "dev".parse().unwrap(),
            policy,
            key_id: KeyId::from_bytes([8; 16]),
            epoch: Epoch(0),
            lease: None,
            head: Head::default(),
            settings: VolumeSettings {
                push_interval_ms: 3_600_000,
                datafile_bytes: 3 << 20,
                quota_bytes: 0,
            },
            created_ms: 0,
        };
        Self(Arc::new(Mutex::new(World {
            volume: Some(volume),
            backends,
            ..World::default()
        })))
    }

    pub(crate) fn key() -> VolumeKey {
        VolumeKey::from_bytes(KEY)
    }

    pub(crate) fn volume_now(&self) -> Volume {
        self.0.lock().volume.clone().unwrap()
    }

    pub(crate) fn set_trouble(&self, backends: &[u64], trouble: Option<Trouble>) {
        let mut world = self.0.lock();
        for backend in backends {
            match trouble {
                Some(trouble) => world.trouble.insert(BackendId(*backend), trouble),
                None => world.trouble.remove(&BackendId(*backend)),
            };
        }
    }

    pub(crate) fn set_verdict(&self, backends: &[u64], verdict: Verdict) {
        let mut world = self.0.lock();
        for backend in &mut world.backends {
            if backends.contains(&backend.id.0) {
                backend.verdict = verdict;
            }
        }
    }

    /// Deletes the pieces of these shards of all stripes.
    pub(crate) fn lose_shards(&self, shards: &[u32]) {
        self.0
            .lock()
            .pieces
            .retain(|(_, key), _| !shards.contains(&PieceKey::from_bytes(key).unwrap().shard));
    }

    /// Flips a bit in every piece of a shard.
    pub(crate) fn rot_shard(&self, shard: u32) {
        for ((_, key), value) in &mut self.0.lock().pieces {
            if PieceKey::from_bytes(key).unwrap().shard == shard {
                let mut raw = value.to_vec();
                let at = raw.len() - 1;
                raw[at] ^= 1;
                *value = Bytes::from(raw);
            }
        }
    }

    /// Every committed record has every piece where it says, and they verify: invariant 1.
    pub(crate) fn check_stored(&self) {
        let world = self.0.lock();
        for record in world.records.values() {
            let stripe = qsfs_zstor::codec::Stripe::of(record).unwrap();
            for (index, shard) in record.shards.iter().enumerate() {
                for key in stripe.shard_keys(u32::try_from(index).unwrap()) {
                    let value = world.pieces.get(&(shard.backend, key.to_bytes().to_vec()));
                    qsfs_zstor::piece::verify_piece(value.expect("a piece is missing")).unwrap();
                }
            }
        }
    }

    fn check_epoch(world: &World, epoch: Epoch) -> Result<(), MetadError> {
        let current = world.volume.as_ref().unwrap().epoch;
        if epoch == current {
            Ok(())
        } else {
            Err(MetadError::Fenced { current })
        }
    }

    fn apply(world: &mut World, mutation: Mutation) -> Result<Applied, MetadError> {
        match mutation {
            Mutation::AcquireLease {
                client,
                holder,
                takeover,
                ..
            } => {
                let volume = world.volume.as_mut().unwrap();
                if let Some(lease) = volume
                    .lease
                    .as_ref()
                    .filter(|lease| lease.client != client && !takeover)
                {
                    return Err(MetadError::Held {
                        holder: lease.holder.clone(),
                        epoch: volume.epoch,
                    });
                }
                volume.epoch = volume.epoch.next();
                volume.lease = Some(Lease {
                    client,
                    holder,
                    expires_ms: u64::MAX,
                });
                Ok(Applied::Epoch(volume.epoch))
            }
            Mutation::RenewLease { epoch, .. } => {
                Self::check_epoch(world, epoch).map(|()| Applied::Done)
            }
            Mutation::ReleaseLease { epoch, .. } => {
                Self::check_epoch(world, epoch)?;
                world.volume.as_mut().unwrap().lease = None;
                Ok(Applied::Done)
            }
            Mutation::CommitDatafiles {
                epoch,
                records,
                head,
                ..
            } => {
                Self::check_epoch(world, epoch)?;
                if let Some(head) = head {
                    let old = world.volume.as_ref().unwrap().head;
                    if head.datafile <= old.datafile || head.recover_from < old.recover_from {
                        return Err(MetadError::Invalid("the head goes back".to_owned()));
                    }
                    world.volume.as_mut().unwrap().head = head;
                }
                world.commits += 1;
                for record in records {
                    assert!(
                        !world.records.contains_key(&record.datafile),
                        "committed twice"
                    );
                    world.records.insert(record.datafile, record);
                }
                Ok(Applied::Done)
            }
            Mutation::ReleaseDatafiles {
                epoch, datafiles, ..
            } => {
                Self::check_epoch(world, epoch)?;
                for id in datafiles {
                    world.records.remove(&id);
                    world.released.push(id);
                }
                Ok(Applied::Done)
            }
            Mutation::ReportShards { reports } => {
                world.reports.extend(reports);
                Ok(Applied::Done)
            }
            other => Err(MetadError::Invalid(format!("not for a mount: {other:?}"))),
        }
    }

    fn reachable(&self) -> Result<parking_lot::MutexGuard<'_, World>, MetadError> {
        let world = self.0.lock();
        if world.unreachable {
            Err(MetadError::Unreachable("on purpose".to_owned()))
        } else {
            Ok(world)
        }
    }
}

#[async_trait]
impl Cluster for FakeCluster {
    async fn volume(&self, _: &VolumeName) -> Result<Volume, MetadError> {
        Ok(self.reachable()?.volume.clone().unwrap())
    }

    async fn volume_by_id(&self, _: VolumeId) -> Result<Volume, MetadError> {
        Ok(self.reachable()?.volume.clone().unwrap())
    }

    async fn records(
        &self,
        _: VolumeId,
        datafiles: &[DatafileId],
    ) -> Result<Vec<EncodingRecord>, MetadError> {
        let world = self.reachable()?;
        Ok(datafiles
            .iter()
            .filter_map(|id| world.records.get(id).cloned())
            .collect())
    }

    async fn list_records(
        &self,
        _: VolumeId,
        stream: Option<Stream>,
        after: DatafileId,
        limit: u32,
    ) -> Result<Vec<EncodingRecord>, MetadError> {
        let world = self.reachable()?;
        let wanted = |record: &&EncodingRecord| stream.is_none_or(|stream| record.stream == stream);
        Ok(world
            .records
            .range(after.next()..)
            .map(|(_, record)| record)
            .filter(wanted)
            .take(limit as usize)
            .cloned()
            .collect())
    }

    async fn backends(&self) -> Result<Vec<Backend>, MetadError> {
        Ok(self.reachable()?.backends.clone())
    }

    async fn backend_facts(&self) -> Result<Vec<BackendFacts>, MetadError> {
        Ok(self.reachable()?.facts.clone())
    }

    async fn placement(
        &self,
        _: VolumeId,
        shard_bytes: u64,
    ) -> Result<PlacementAnswer, MetadError> {
        let world = self.reachable()?;
        let policy = world.volume.as_ref().unwrap().policy;
        let up = world
            .backends
            .iter()
            .filter(|backend| backend.verdict == Verdict::Up);
        let candidates: Vec<Candidate> = up
            .map(|backend| Candidate {
                backend: backend.id,
                location: backend.location.clone(),
                node: backend.node.clone(),
                free_bytes: backend.capacity_bytes,
            })
            .collect();
        let none = vec![None; policy.geometry.total()];
        let placement = choose(&policy, policy.geometry, shard_bytes, &candidates, &none)
            .map_err(|unplaceable| MetadError::PolicyUnmet(unplaceable.missing))?;
        let (backends, full_policy, missing) =
            (placement.backends, placement.full_policy, placement.missing);
        Ok(PlacementAnswer {
            backends,
            full_policy,
            missing,
        })
    }

    async fn settings(&self) -> Result<ClusterSettings, MetadError> {
        let _up = self.reachable()?;
        Ok(ClusterSettings {
            lease_ttl_ms: 600,
            ..ClusterSettings::default()
        })
    }

    async fn mutate(&self, mutation: Mutation, _: Duration) -> Result<Applied, MetadError> {
        let mut world = self.reachable()?;
        let commit = matches!(mutation, Mutation::CommitDatafiles { .. });
        let applied = Self::apply(&mut world, mutation);
        if commit && world.lose_commit_answers > 0 {
            world.lose_commit_answers -= 1;
            return Err(MetadError::Unknown("on purpose".to_owned()));
        }
        applied
    }
}

struct FakeBackend {
    world: Arc<Mutex<World>>,
    id: BackendId,
}

impl FakeBackend {
    async fn admit(&self, storing: bool) -> Result<(), ClientError> {
        let endpoint = format!("backend {}", self.id);
        let dead = || ClientError::Unreachable {
            endpoint: endpoint.clone(),
            reason: "on purpose".to_owned(),
        };
        let trouble = {
            let mut world = self.world.lock();
            match world.trouble.get_mut(&self.id) {
                Some(Trouble::DiesAfter(left)) if storing && *left > 0 => {
                    *left -= 1;
                    return Ok(());
                }
                _ => {}
            }
            world.trouble.get(&self.id).copied()
        };
        match trouble {
            None => Ok(()),
            Some(Trouble::Full) if !storing => Ok(()),
            Some(Trouble::Full) => Err(ClientError::Full {
                endpoint: endpoint.clone(),
            }),
            Some(Trouble::Down | Trouble::DiesAfter(_)) => Err(dead()),
            Some(Trouble::Hangs) => std::future::pending().await,
        }
    }
}

#[async_trait]
impl PieceStore for FakeBackend {
    async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, ClientError> {
        self.admit(false).await?;
        Ok(self
            .world
            .lock()
            .pieces
            .get(&(self.id, key.to_vec()))
            .cloned())
    }

    async fn set(&self, key: &[u8], value: Bytes) -> Result<(), ClientError> {
        self.admit(true).await?;
        self.world
            .lock()
            .pieces
            .insert((self.id, key.to_vec()), value);
        Ok(())
    }

    async fn delete(&self, key: &[u8]) -> Result<bool, ClientError> {
        self.admit(true).await?;
        Ok(self
            .world
            .lock()
            .pieces
            .remove(&(self.id, key.to_vec()))
            .is_some())
    }
}

impl Connector for FakeCluster {
    fn connect(&self, backend: &Backend) -> Arc<dyn PieceStore> {
        Arc::new(FakeBackend {
            world: Arc::clone(&self.0),
            id: backend.id,
        })
    }
}

/// Distinct backends that hold shards of committed records.
pub(crate) fn used_backends(cluster: &FakeCluster) -> BTreeSet<u64> {
    let world = cluster.0.lock();
    world
        .records
        .values()
        .flat_map(|record| record.shards.iter().map(|shard| shard.backend.0))
        .collect()
}
