//! A node's service, as an unreliable network shows it: answers get lost, mutations arrive again later.

use super::world::World;
use async_trait::async_trait;
use qsfs_proto::api::{
    Agent, AgentOrder, AgentReport, Applied, Backend, BackendFacts, ClusterSettings, Freshness,
    JoinGrant, JoinRequest, Member, Mutation, PlacementAnswer, TokenInfo, Volume,
};
use qsfs_proto::identity::PeerIdentity;
use qsfs_proto::server::{CallError, Consistency, MetadService, RequestId, Watch};
use qsfs_proto::status::Status;
use qsfs_proto::watch::WatchRequest;
use qsfs_zstor::id::{AgentId, BackendId, DatafileId, MetadId, Stream, VolumeId, VolumeName};
use qsfs_zstor::record::EncodingRecord;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Around the real service.
pub struct UnreliableService {
    /// Draws what happens.
    pub world: Arc<World>,
    /// What answers.
    pub inner: Arc<dyn MetadService>,
}

type Answer<T> = Result<T, CallError>;

#[async_trait]
impl MetadService for UnreliableService {
    async fn join(&self, request: JoinRequest) -> Answer<JoinGrant> {
        self.inner.join(request).await
    }

    async fn mutate(
        &self,
        caller: &PeerIdentity,
        id: RequestId,
        mutation: Mutation,
    ) -> Answer<Applied> {
        let mutation = super::broken::proposed(&self.world, mutation);
        let fate = self.world.draw_fate();
        if let Some(later) = fate.again_after {
            let (inner, caller, copy) = (Arc::clone(&self.inner), caller.clone(), mutation.clone());
            tokio::spawn(async move {
                tokio::time::sleep(later).await;
                drop(inner.mutate(&caller, id, copy).await);
            });
        }
        let answer = self.inner.mutate(caller, id, mutation).await;
        if fate.answer_lost {
            std::future::pending::<()>().await;
        }
        answer
    }

    async fn barrier(&self, consistency: Consistency) -> Answer<Freshness> {
        let consistency = super::broken::consistency(&self.world, consistency);
        let told = self.inner.barrier(consistency).await?;
        Ok(super::broken::freshness(&self.world, told))
    }

    async fn volume(&self, caller: &PeerIdentity, name: &VolumeName) -> Answer<Volume> {
        self.inner.volume(caller, name).await
    }

    async fn volume_by_id(&self, caller: &PeerIdentity, id: VolumeId) -> Answer<Volume> {
        self.inner.volume_by_id(caller, id).await
    }

    async fn volumes(&self, caller: &PeerIdentity) -> Answer<Vec<Volume>> {
        self.inner.volumes(caller).await
    }

    async fn records(
        &self,
        caller: &PeerIdentity,
        volume: VolumeId,
        datafiles: &[DatafileId],
    ) -> Answer<Vec<EncodingRecord>> {
        self.inner.records(caller, volume, datafiles).await
    }

    async fn list_records(
        &self,
        caller: &PeerIdentity,
        volume: VolumeId,
        stream: Option<Stream>,
        after: DatafileId,
        limit: u32,
    ) -> Answer<Vec<EncodingRecord>> {
        let inner = &self.inner;
        inner
            .list_records(caller, volume, stream, after, limit)
            .await
    }

    async fn backends(&self, caller: &PeerIdentity) -> Answer<Vec<Backend>> {
        self.inner.backends(caller).await
    }

    async fn backend_facts(&self, caller: &PeerIdentity) -> Answer<Vec<BackendFacts>> {
        self.inner.backend_facts(caller).await
    }

    async fn agents(&self, caller: &PeerIdentity) -> Answer<Vec<Agent>> {
        self.inner.agents(caller).await
    }

    async fn backend_shards(
        &self,
        caller: &PeerIdentity,
        backend: BackendId,
        after: (VolumeId, DatafileId),
        limit: u32,
    ) -> Answer<Vec<(EncodingRecord, u32)>> {
        self.inner
            .backend_shards(caller, backend, after, limit)
            .await
    }

    async fn placement(
        &self,
        caller: &PeerIdentity,
        volume: VolumeId,
        shard_bytes: u64,
    ) -> Answer<PlacementAnswer> {
        self.inner.placement(caller, volume, shard_bytes).await
    }

    async fn status(&self, caller: &PeerIdentity) -> Answer<Status> {
        self.inner.status(caller).await
    }

    async fn members(&self, caller: &PeerIdentity) -> Answer<Vec<Member>> {
        self.inner.members(caller).await
    }

    async fn settings(&self, caller: &PeerIdentity) -> Answer<ClusterSettings> {
        self.inner.settings(caller).await
    }

    async fn tokens(&self, caller: &PeerIdentity) -> Answer<Vec<TokenInfo>> {
        self.inner.tokens(caller).await
    }

    async fn issue_client_certificate(
        &self,
        caller: &PeerIdentity,
        csr_pem: &str,
        volume: Option<VolumeId>,
    ) -> Answer<String> {
        self.inner
            .issue_client_certificate(caller, csr_pem, volume)
            .await
    }

    async fn renew_certificate(&self, caller: &PeerIdentity, csr_pem: &str) -> Answer<String> {
        self.inner.renew_certificate(caller, csr_pem).await
    }

    async fn certificate_life_ms(&self, caller: &PeerIdentity) -> Answer<u64> {
        self.inner.certificate_life_ms(caller).await
    }

    fn heard_certificate(&self, caller: &PeerIdentity, expires_ms: u64) {
        self.inner.heard_certificate(caller, expires_ms);
    }

    async fn scrub(&self, caller: &PeerIdentity, backend: Option<BackendId>) -> Answer<()> {
        self.inner.scrub(caller, backend).await
    }

    async fn remove_member(&self, caller: &PeerIdentity, member: MetadId) -> Answer<()> {
        self.inner.remove_member(caller, member).await
    }

    async fn transfer_leader(&self, caller: &PeerIdentity, to: MetadId) -> Answer<()> {
        self.inner.transfer_leader(caller, to).await
    }

    async fn watch(&self, caller: &PeerIdentity, request: WatchRequest) -> Answer<Watch> {
        self.inner.watch(caller, request).await
    }

    async fn agent_session(
        &self,
        caller: &PeerIdentity,
        agent: AgentId,
        reports: mpsc::Receiver<AgentReport>,
    ) -> Answer<mpsc::Receiver<AgentOrder>> {
        self.inner.agent_session(caller, agent, reports).await
    }
}
