//! metad over the network, as the [`Cluster`] an agent asks.

use crate::cluster::{Cluster, Session, Swap};
use async_trait::async_trait;
use qsfs_proto::api::{MetadError, Mutation, ShardReport};
use qsfs_proto::client::MetadClient;
use qsfs_zstor::id::{AgentId, BackendId, DatafileId, VolumeId};
use qsfs_zstor::record::EncodingRecord;

#[async_trait]
impl Cluster for MetadClient {
    async fn session(&self, agent: AgentId) -> Result<Session, MetadError> {
        let (reports, orders) = self.agent_session(agent).await?;
        Ok(Session { reports, orders })
    }

    async fn swap_shard(&self, swap: Swap) -> Result<(), MetadError> {
        let Swap {
            volume,
            datafile,
            shard,
            from,
            to,
            version,
        } = swap;
        let mutation = Mutation::SwapShard {
            volume,
            datafile,
            shard,
            from,
            to,
            version,
        };
        self.mutate(mutation).await.map(drop)
    }

    async fn report_shards(&self, reports: Vec<ShardReport>) -> Result<(), MetadError> {
        self.mutate(Mutation::ReportShards { reports })
            .await
            .map(drop)
    }

    async fn backend_shards(
        &self,
        backend: BackendId,
        after: (VolumeId, DatafileId),
        limit: u32,
    ) -> Result<Vec<(EncodingRecord, u32)>, MetadError> {
        Self::backend_shards(self, backend, after, limit).await
    }

    async fn records(
        &self,
        volume: VolumeId,
        datafiles: &[DatafileId],
    ) -> Result<Vec<EncodingRecord>, MetadError> {
        Self::records(self, volume, datafiles).await
    }

    async fn has_later_record(
        &self,
        volume: VolumeId,
        datafile: DatafileId,
    ) -> Result<bool, MetadError> {
        Ok(!self
            .list_records(volume, None, datafile, 1)
            .await?
            .is_empty())
    }
}
