//! One metad node without Raft, over the real wire: it signs certificates, keeps records, hands out orders.

use async_trait::async_trait;
use parking_lot::Mutex;
use qsfs_proto::api::{
    Agent, AgentOrder, AgentReport, Applied, Backend, BackendFacts, ClusterSettings, Freshness,
    Intent, JoinGrant, JoinRequest, Member, MetadError, Mutation, PlacementAnswer, Role,
    ShardReport, TokenInfo, Verdict, Volume,
};
use qsfs_proto::ca::CertificateAuthority;
use qsfs_proto::identity::PeerIdentity;
use qsfs_proto::raft::RaftRpc;
use qsfs_proto::server::{
    CallError, Consistency, MetadService, RaftTransport, RequestId, Watch, serve,
};
use qsfs_proto::status::Status;
use qsfs_proto::token::JoinToken;
use qsfs_proto::watch::WatchRequest;
use qsfs_zstor::id::{
    AgentId, BackendId, ClusterId, DatafileId, MetadId, Stream, VolumeId, VolumeName,
};
use qsfs_zstor::record::{EncodingRecord, ShardState};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Waits for a condition, with a deadline.
pub(crate) async fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    for _ in 0..3_000 {
        if let Some(value) = condition() {
            return value;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("did not happen in time: {what}");
}

pub(crate) struct Fake {
    pub(crate) ca: CertificateAuthority,
    pub(crate) endpoint: String,
    pub(crate) used: Mutex<BTreeSet<String>>,
    pub(crate) agents: Mutex<Vec<Agent>>,
    pub(crate) backends: Mutex<Vec<Backend>>,
    pub(crate) records: Mutex<BTreeMap<(VolumeId, DatafileId), EncodingRecord>>,
    pub(crate) reports: Mutex<Vec<ShardReport>>,
    pub(crate) said: Mutex<Vec<(AgentId, AgentReport)>>,
    pub(crate) sessions: Mutex<BTreeMap<AgentId, mpsc::Sender<AgentOrder>>>,
}

/// A running [`Fake`].
pub(crate) struct Node {
    pub(crate) fake: Arc<Fake>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Node {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let ca = CertificateAuthority::create(ClusterId::random(&mut rand::rng())).unwrap();
        let identity = ca.issue(Role::Metad, "1").unwrap();
        let fake = Arc::new(Fake {
            ca,
            endpoint,
            used: Mutex::default(),
            agents: Mutex::default(),
            backends: Mutex::default(),
            records: Mutex::default(),
            reports: Mutex::default(),
            said: Mutex::default(),
            sessions: Mutex::default(),
        });
        let stop = CancellationToken::new();
        let (service, ending) = (Service(Arc::clone(&fake)), stop.clone());
        let task = tokio::spawn(async move {
            serve(
                listener,
                &identity,
                Arc::new(service),
                Arc::new(NoRaft),
                ending,
            )
            .await
            .unwrap();
        });
        Self { fake, stop, task }
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

impl Fake {
    pub(crate) fn token(&self, role: Role) -> JoinToken {
        let endpoints = vec![self.endpoint.clone()];
        JoinToken::new(
            role,
            self.ca.cluster(),
            self.ca.fingerprint(),
            endpoints,
            &mut rand::rng(),
        )
        .unwrap()
    }

    pub(crate) async fn order(&self, agent: AgentId, order: AgentOrder) {
        let sender = eventually("a session", || {
            self.sessions
                .lock()
                .get(&agent)
                .filter(|sender| !sender.is_closed())
                .cloned()
        })
        .await;
        sender.send(order).await.unwrap();
    }

    pub(crate) fn record(&self, like: &EncodingRecord) -> EncodingRecord {
        self.records.lock()[&(like.volume, like.datafile)].clone()
    }

    fn apply(&self, mutation: Mutation) -> Result<Applied, CallError> {
        match mutation {
            Mutation::RegisterAgent { location, node } => {
                let mut agents = self.agents.lock();
                let known = agents
                    .iter()
                    .find(|agent| agent.location == location && agent.node == node);
                let id = known.map_or(AgentId(agents.len() as u64 + 1), |agent| agent.id);
                if known.is_none() {
                    agents.push(Agent { id, location, node });
                }
                Ok(Applied::Agent(id))
            }
            Mutation::RegisterBackend {
                agent,
                address,
                capacity_bytes,
            } => {
                let of = self
                    .agents
                    .lock()
                    .iter()
                    .find(|known| known.id == agent)
                    .cloned()
                    .unwrap();
                let mut backends = self.backends.lock();
                let id = BackendId(backends.len() as u64);
                backends.push(Backend {
                    id,
                    agent,
                    location: of.location,
                    node: of.node,
                    address,
                    capacity_bytes,
                    verdict: Verdict::Up,
                    verdict_since_ms: 0,
                    intent: Intent::Serve,
                });
                Ok(Applied::Backend(id))
            }
            Mutation::SwapShard {
                volume,
                datafile,
                shard,
                from,
                to,
                version,
            } => {
                let mut records = self.records.lock();
                let record = records.get_mut(&(volume, datafile)).unwrap();
                if record.version != version {
                    return Err(MetadError::VersionConflict {
                        current: record.version,
                    }
                    .into());
                }
                let slot = &mut record.shards[shard as usize];
                assert_eq!(slot.backend, from);
                slot.backend = to;
                slot.state = ShardState::Stored;
                record.version += 1;
                Ok(Applied::Version(record.version))
            }
            Mutation::ReportShards { reports } => {
                self.reports.lock().extend(reports);
                Ok(Applied::Done)
            }
            other => panic!("an agent says {other:?}"),
        }
    }
}

struct NoRaft;

#[async_trait]
impl RaftTransport for NoRaft {
    async fn handle(
        &self,
        _: MetadId,
        _: RaftRpc,
        _: bytes::Bytes,
    ) -> Result<bytes::Bytes, String> {
        Err("no Raft here".into())
    }
}

struct Service(Arc<Fake>);

fn not_here<T>() -> Result<T, CallError> {
    Err(MetadError::Invalid("an agent does not ask this".into()).into())
}

#[async_trait]
impl MetadService for Service {
    async fn join(&self, request: JoinRequest) -> Result<JoinGrant, CallError> {
        if !self.0.used.lock().insert(request.secret.0.clone()) {
            return Err(MetadError::Token("used already".into()).into());
        }
        let subject = format!("{}/{}", request.location, request.name);
        let validity = Duration::from_secs(3_600);
        let cert_pem = self
            .0
            .ca
            .sign(&request.csr_pem, request.role, &subject, validity);
        Ok(JoinGrant {
            cluster: self.0.ca.cluster(),
            cert_pem: cert_pem.map_err(|error| MetadError::Invalid(error.to_string()))?,
            ca_pem: self.0.ca.ca_pem().to_owned(),
            endpoints: vec![self.0.endpoint.clone()],
            metad_id: None,
            ca_key_pem: None,
        })
    }

    async fn mutate(
        &self,
        _: &PeerIdentity,
        _: RequestId,
        mutation: Mutation,
    ) -> Result<Applied, CallError> {
        self.0.apply(mutation)
    }

    async fn barrier(&self, _: Consistency) -> Result<Freshness, CallError> {
        Ok(Freshness {
            applied: 1,
            age_ms: Some(0),
        })
    }

    async fn watch(&self, _: &PeerIdentity, _: WatchRequest) -> Result<Watch, CallError> {
        unreachable!("agents do not watch")
    }

    async fn records(
        &self,
        _: &PeerIdentity,
        volume: VolumeId,
        datafiles: &[DatafileId],
    ) -> Result<Vec<EncodingRecord>, CallError> {
        let records = self.0.records.lock();
        Ok(datafiles
            .iter()
            .filter_map(|datafile| records.get(&(volume, *datafile)).cloned())
            .collect())
    }

    async fn list_records(
        &self,
        _: &PeerIdentity,
        volume: VolumeId,
        _: Option<Stream>,
        after: DatafileId,
        limit: u32,
    ) -> Result<Vec<EncodingRecord>, CallError> {
        let records = self.0.records.lock();
        let later = records
            .values()
            .filter(|record| record.volume == volume && record.datafile > after);
        Ok(later.take(limit as usize).cloned().collect())
    }

    async fn backend_shards(
        &self,
        _: &PeerIdentity,
        backend: BackendId,
        after: (VolumeId, DatafileId),
        _: u32,
    ) -> Result<Vec<(EncodingRecord, u32)>, CallError> {
        let records = self.0.records.lock();
        let later = records
            .values()
            .filter(|record| (record.volume, record.datafile) > after);
        let shards = later.flat_map(|record| {
            let here = (0u32..)
                .zip(&record.shards)
                .filter(|(_, shard)| shard.backend == backend);
            here.map(|(index, _)| (record.clone(), index))
                .collect::<Vec<_>>()
        });
        Ok(shards.collect())
    }

    async fn agent_session(
        &self,
        _: &PeerIdentity,
        agent: AgentId,
        mut reports: mpsc::Receiver<AgentReport>,
    ) -> Result<mpsc::Receiver<AgentOrder>, CallError> {
        let (sender, orders) = mpsc::channel(16);
        let settings = ClusterSettings {
            heartbeat_ms: 50,
            scrub_bytes_per_s: 0,
            ..ClusterSettings::default()
        };
        sender.send(AgentOrder::Settings(settings)).await.unwrap();
        let backends = self.0.backends.lock().clone();
        sender.send(AgentOrder::Backends(backends)).await.unwrap();
        self.0.sessions.lock().insert(agent, sender);
        let fake = Arc::clone(&self.0);
        tokio::spawn(async move {
            while let Some(report) = reports.recv().await {
                fake.said.lock().push((agent, report));
            }
        });
        Ok(orders)
    }

    async fn backends(&self, _: &PeerIdentity) -> Result<Vec<Backend>, CallError> {
        Ok(self.0.backends.lock().clone())
    }

    async fn agents(&self, _: &PeerIdentity) -> Result<Vec<Agent>, CallError> {
        Ok(self.0.agents.lock().clone())
    }

    async fn volume(&self, _: &PeerIdentity, _: &VolumeName) -> Result<Volume, CallError> {
        not_here()
    }

    async fn volume_by_id(&self, _: &PeerIdentity, _: VolumeId) -> Result<Volume, CallError> {
        not_here()
    }

    async fn volumes(&self, _: &PeerIdentity) -> Result<Vec<Volume>, CallError> {
        not_here()
    }

    async fn backend_facts(&self, _: &PeerIdentity) -> Result<Vec<BackendFacts>, CallError> {
        not_here()
    }

    async fn placement(
        &self,
        _: &PeerIdentity,
        _: VolumeId,
        _: u64,
    ) -> Result<PlacementAnswer, CallError> {
        not_here()
    }

    async fn status(&self, _: &PeerIdentity) -> Result<Status, CallError> {
        not_here()
    }

    async fn members(&self, _: &PeerIdentity) -> Result<Vec<Member>, CallError> {
        not_here()
    }

    async fn settings(&self, _: &PeerIdentity) -> Result<ClusterSettings, CallError> {
        not_here()
    }

    async fn tokens(&self, _: &PeerIdentity) -> Result<Vec<TokenInfo>, CallError> {
        not_here()
    }

    async fn issue_client_certificate(
        &self,
        _: &PeerIdentity,
        _: &str,
        _: Option<VolumeId>,
    ) -> Result<String, CallError> {
        not_here()
    }

    async fn renew_certificate(&self, _: &PeerIdentity, _: &str) -> Result<String, CallError> {
        not_here()
    }

    async fn certificate_life_ms(&self, _: &PeerIdentity) -> Result<u64, CallError> {
        not_here()
    }

    fn heard_certificate(&self, _: &PeerIdentity, _: u64) {}

    async fn scrub(&self, _: &PeerIdentity, _: Option<BackendId>) -> Result<(), CallError> {
        not_here()
    }

    async fn remove_member(&self, _: &PeerIdentity, _: MetadId) -> Result<(), CallError> {
        not_here()
    }

    async fn transfer_leader(&self, _: &PeerIdentity, _: MetadId) -> Result<(), CallError> {
        not_here()
    }
}
