//! What the mount asks of metad, as a port: [`MetadClient`] in production, a small fake in tests.

use async_trait::async_trait;
use qsfs_proto::api::{
    Applied, Backend, BackendFacts, ClusterSettings, MetadError, Mutation, PlacementAnswer, Volume,
};
use qsfs_proto::client::MetadClient;
use qsfs_zstor::id::{DatafileId, Stream, VolumeId, VolumeName};
use qsfs_zstor::record::EncodingRecord;
use std::time::Duration;

/// Records per page of a listing.
pub const RECORDS_PAGE: u32 = 1024;

/// metad, as the mount needs it. Every call has a deadline of its own.
#[async_trait]
pub trait Cluster: Send + Sync + 'static {
    /// A volume by name.
    async fn volume(&self, name: &VolumeName) -> Result<Volume, MetadError>;
    /// A volume by id.
    async fn volume_by_id(&self, id: VolumeId) -> Result<Volume, MetadError>;
    /// Those of the named records that exist.
    async fn records(
        &self,
        volume: VolumeId,
        datafiles: &[DatafileId],
    ) -> Result<Vec<EncodingRecord>, MetadError>;
    /// One ascending page after `after`; empty at the end.
    async fn list_records(
        &self,
        volume: VolumeId,
        stream: Option<Stream>,
        after: DatafileId,
        limit: u32,
    ) -> Result<Vec<EncodingRecord>, MetadError>;
    /// All backends.
    async fn backends(&self) -> Result<Vec<Backend>, MetadError>;
    /// What they said of themselves lately.
    async fn backend_facts(&self) -> Result<Vec<BackendFacts>, MetadError>;
    /// Where a new stripe goes.
    async fn placement(
        &self,
        volume: VolumeId,
        shard_bytes: u64,
    ) -> Result<PlacementAnswer, MetadError>;
    /// Cluster settings.
    async fn settings(&self) -> Result<ClusterSettings, MetadError>;
    /// Applies a mutation exactly once, or says that it does not know.
    async fn mutate(&self, mutation: Mutation, deadline: Duration) -> Result<Applied, MetadError>;
}

#[async_trait]
impl Cluster for MetadClient {
    async fn volume(&self, name: &VolumeName) -> Result<Volume, MetadError> {
        Self::volume(self, name).await
    }

    async fn volume_by_id(&self, id: VolumeId) -> Result<Volume, MetadError> {
        Self::volume_by_id(self, id).await
    }

    async fn records(
        &self,
        volume: VolumeId,
        datafiles: &[DatafileId],
    ) -> Result<Vec<EncodingRecord>, MetadError> {
        Self::records(self, volume, datafiles).await
    }

    async fn list_records(
        &self,
        volume: VolumeId,
        stream: Option<Stream>,
        after: DatafileId,
        limit: u32,
    ) -> Result<Vec<EncodingRecord>, MetadError> {
        Self::list_records(self, volume, stream, after, limit).await
    }

    async fn backends(&self) -> Result<Vec<Backend>, MetadError> {
        // Asked now and then: the time to learn of metad nodes that joined after we began. Not to know them yet is no error.
        let _ = self.members().await;
        Self::backends(self).await
    }

    async fn backend_facts(&self) -> Result<Vec<BackendFacts>, MetadError> {
        Self::backend_facts(self).await
    }

    async fn placement(
        &self,
        volume: VolumeId,
        shard_bytes: u64,
    ) -> Result<PlacementAnswer, MetadError> {
        Self::placement(self, volume, shard_bytes).await
    }

    async fn settings(&self) -> Result<ClusterSettings, MetadError> {
        Self::settings(self).await
    }

    async fn mutate(&self, mutation: Mutation, deadline: Duration) -> Result<Applied, MetadError> {
        self.mutate_within(mutation, deadline).await
    }
}

/// All records of a volume (or of one stream), page by page.
pub async fn all_records(
    cluster: &dyn Cluster,
    volume: VolumeId,
    stream: Option<Stream>,
) -> Result<Vec<EncodingRecord>, MetadError> {
    let mut all = Vec::new();
    let mut after = DatafileId(0);
    loop {
        let page = cluster
            .list_records(volume, stream, after, RECORDS_PAGE)
            .await?;
        let Some(last) = page.last() else {
            return Ok(all);
        };
        after = last.datafile;
        all.extend(page);
    }
}
