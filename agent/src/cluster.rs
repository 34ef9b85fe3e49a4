//! The seam to metad: what an agent asks of it. [`MetadClient`] is the one that talks to a real cluster.
//!
//! [`MetadClient`]: qsfs_proto::client::MetadClient

use async_trait::async_trait;
use qsfs_proto::api::{AgentOrder, AgentReport, MetadError, ShardReport};
use qsfs_zstor::id::{AgentId, BackendId, DatafileId, VolumeId};
use qsfs_zstor::record::EncodingRecord;
use tokio::sync::mpsc;

/// One bidirectional stream to the leader; it ends when the leader changes.
#[derive(Debug)]
pub struct Session {
    /// What the agent says.
    pub reports: mpsc::Sender<AgentReport>,
    /// What metad wants.
    pub orders: mpsc::Receiver<Result<AgentOrder, MetadError>>,
}

/// Compare-and-swap of one shard's backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Swap {
    /// Volume.
    pub volume: VolumeId,
    /// Datafile.
    pub datafile: DatafileId,
    /// Index of the shard.
    pub shard: u32,
    /// Where it was.
    pub from: BackendId,
    /// Where it is now.
    pub to: BackendId,
    /// Version of the record that was looked at.
    pub version: u64,
}

/// metad, as an agent sees it. Every call has a deadline of its own.
#[async_trait]
pub trait Cluster: Send + Sync + 'static {
    /// Opens the agent's session with the leader.
    async fn session(&self, agent: AgentId) -> Result<Session, MetadError>;
    /// Records a shard's new place.
    async fn swap_shard(&self, swap: Swap) -> Result<(), MetadError>;
    /// Tells which shards are bad.
    async fn report_shards(&self, reports: Vec<ShardReport>) -> Result<(), MetadError>;
    /// Shards that records place on a backend, after the given record, whole records only.
    async fn backend_shards(
        &self,
        backend: BackendId,
        after: (VolumeId, DatafileId),
        limit: u32,
    ) -> Result<Vec<(EncodingRecord, u32)>, MetadError>;
    /// The records of these datafiles, linearizable; unknown ones are left out.
    async fn records(
        &self,
        volume: VolumeId,
        datafiles: &[DatafileId],
    ) -> Result<Vec<EncodingRecord>, MetadError>;
    /// Is there a record of a later datafile in this volume?
    async fn has_later_record(
        &self,
        volume: VolumeId,
        datafile: DatafileId,
    ) -> Result<bool, MetadError>;
}
