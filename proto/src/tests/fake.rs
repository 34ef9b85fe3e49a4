//! A metad that keeps nothing but what the tests ask about.

use crate::api::{
    Agent, AgentOrder, AgentReport, Applied, Backend, BackendFacts, ClusterSettings, Freshness,
    JoinGrant, JoinRequest, Member, MetadError, Mutation, PlacementAnswer, Role, TokenInfo, Volume,
    VolumeSettings,
};
use crate::ca::{CertificateAuthority, LEAF_VALIDITY};
use crate::client::{MetadClient, Timing};
use crate::identity::{LiveIdentity, PeerIdentity};
use crate::raft::RaftRpc;
use crate::server::{
    CallError, Consistency, MetadService, Places, RaftTransport, RequestId, ServeError, Watch,
    serve_within,
};
use crate::status::{Status, StatusVerdict};
use crate::watch::{WatchEvent, WatchRequest};
use async_trait::async_trait;
use bytes::Bytes;
use qsfs_zstor::id::{
    AgentId, BackendId, ClientId, ClusterId, DatafileId, Epoch, KeyId, MetadId, Stream, VolumeId,
    VolumeName,
};
use qsfs_zstor::policy::{Geometry, Policy};
use qsfs_zstor::record::EncodingRecord;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(super) type Tamper = Box<dyn Fn(&mut JoinGrant) + Send + Sync>;

/// What all nodes of a made-up cluster agree on.
pub(super) struct Cluster {
    pub(super) ca: CertificateAuthority,
    /// Address of the node that leads.
    pub(super) leader: Mutex<Option<String>>,
    /// Answers given, by mutation.
    pub(super) answers: Mutex<BTreeMap<RequestId, Applied>>,
    /// So many of the next mutations are applied, but never answered.
    pub(super) lose_answers: AtomicUsize,
    pub(super) joins: AtomicUsize,
    /// So many facts of 60 kB are answered.
    pub(super) fat_facts: AtomicUsize,
    /// Of certificates that are renewed.
    pub(super) certificate_life: Mutex<Duration>,
    /// What a grant is changed into before it is answered.
    pub(super) tamper: Mutex<Option<Tamper>>,
    /// Certificates shown, and when they end.
    pub(super) heard: Mutex<Vec<(PeerIdentity, u64)>>,
    /// What watches tell, and from which index on it is remembered.
    pub(super) history: tokio::sync::watch::Sender<(u64, Vec<WatchEvent>)>,
    /// Nodes that were asked for a watch, and after what.
    pub(super) watches: Mutex<Vec<(String, Option<u64>)>>,
}

impl Cluster {
    pub(super) fn new() -> Arc<Self> {
        let cluster = ClusterId::random(&mut rand::rng());
        Arc::new(Self {
            ca: CertificateAuthority::create(cluster).unwrap(),
            leader: Mutex::new(None),
            answers: Mutex::default(),
            lose_answers: AtomicUsize::new(0),
            joins: AtomicUsize::new(0),
            fat_facts: AtomicUsize::new(0),
            certificate_life: Mutex::new(LEAF_VALIDITY),
            tamper: Mutex::default(),
            heard: Mutex::default(),
            history: tokio::sync::watch::Sender::default(),
            watches: Mutex::default(),
        })
    }

    pub(super) fn lead(&self, node: Option<&Node>) {
        *self.leader.lock().unwrap() = node.map(|node| node.address.clone());
    }

    pub(super) fn applied(&self) -> usize {
        self.answers.lock().unwrap().len()
    }
}

pub(super) struct Node {
    pub(super) address: String,
    pub(super) shutdown: CancellationToken,
    pub(super) serving: JoinHandle<Result<(), ServeError>>,
    /// Orders that a test sends into the newest agent session, and the reports that came.
    pub(super) session: Arc<Mutex<Option<mpsc::Sender<AgentOrder>>>>,
    pub(super) reports: mpsc::Receiver<AgentReport>,
}

impl Node {
    pub(super) async fn start(cluster: &Arc<Cluster>, id: u64) -> Self {
        let identity = cluster.ca.issue(Role::Metad, &id.to_string()).unwrap();
        Self::start_as(cluster, &identity).await
    }

    pub(super) async fn start_as(
        cluster: &Arc<Cluster>,
        identity: impl Into<LiveIdentity>,
    ) -> Self {
        Self::start_at(cluster, identity, "127.0.0.1:0").await
    }

    pub(super) async fn start_at(
        cluster: &Arc<Cluster>,
        identity: impl Into<LiveIdentity>,
        address: &str,
    ) -> Self {
        Self::start_within(cluster, identity, address, Places::default()).await
    }

    pub(super) async fn start_within(
        cluster: &Arc<Cluster>,
        identity: impl Into<LiveIdentity>,
        address: &str,
        places: Places,
    ) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shutdown = CancellationToken::new();
        let session = Arc::new(Mutex::new(None));
        let (report, reports) = mpsc::channel(16);
        let fake = Arc::new(Fake {
            cluster: cluster.clone(),
            address: address.clone(),
            session: session.clone(),
            report,
        });
        let (identity, token): (LiveIdentity, _) = (identity.into(), shutdown.clone());
        let serving = tokio::spawn(async move {
            serve_within(places, listener, identity, (fake.clone(), fake), token).await
        });
        Self {
            address,
            shutdown,
            serving,
            session,
            reports,
        }
    }

    pub(super) async fn stop(self) {
        self.shutdown.cancel();
        self.serving.await.unwrap().unwrap();
    }
}

/// Short, so that tests of lost answers end soon.
pub(super) const TIMING: Timing = Timing {
    attempt: Duration::from_millis(400),
    connect: Duration::from_secs(5),
    read: Duration::from_secs(10),
    mutation: Duration::from_secs(10),
    backoff: Duration::from_millis(5),
    backoff_max: Duration::from_millis(50),
};

pub(super) fn client_as(identity: impl Into<LiveIdentity>, nodes: &[&Node]) -> MetadClient {
    let endpoints = nodes.iter().map(|node| node.address.clone()).collect();
    let client = ClientId::random(&mut rand::rng());
    MetadClient::with_timing(endpoints, identity, client, TIMING).unwrap()
}

pub(super) fn admin(cluster: &Cluster, nodes: &[&Node]) -> MetadClient {
    client_as(&cluster.ca.issue(Role::Admin, "root").unwrap(), nodes)
}

pub(super) fn revoke(prefix: &str) -> Mutation {
    Mutation::RevokeToken {
        prefix: prefix.into(),
    }
}

pub(super) fn volume(id: u8) -> Volume {
    Volume {
        id: VolumeId::from_bytes([id; 16]),
        name: format!("v{id}").parse().unwrap(),
        policy: Policy {
            geometry: Geometry::new(4, 4).unwrap(),
            survive_locations: 1,
            survive_nodes: 1,
        },
        key_id: KeyId::from_bytes([7; 16]),
        epoch: Epoch(3),
        lease: None,
        head: Default::default(),
        settings: VolumeSettings::default(),
        created_ms: 5,
    }
}

struct Fake {
    cluster: Arc<Cluster>,
    address: String,
    session: Arc<Mutex<Option<mpsc::Sender<AgentOrder>>>>,
    report: mpsc::Sender<AgentReport>,
}

impl Fake {
    fn lead(&self) -> Result<(), CallError> {
        let leader = self.cluster.leader.lock().unwrap().clone();
        if leader.as_ref() == Some(&self.address) {
            Ok(())
        } else {
            Err(CallError::NotLeader { leader })
        }
    }
}

#[async_trait]
impl RaftTransport for Fake {
    async fn handle(&self, from: MetadId, rpc: RaftRpc, payload: Bytes) -> Result<Bytes, String> {
        match rpc {
            RaftRpc::Vote => Err(format!("no vote for {from}")),
            RaftRpc::Append | RaftRpc::Snapshot | RaftRpc::ReadIndex => Ok(payload),
        }
    }
}

#[async_trait]
impl MetadService for Fake {
    async fn join(&self, request: JoinRequest) -> Result<JoinGrant, CallError> {
        self.cluster.joins.fetch_add(1, Ordering::SeqCst);
        self.lead()?;
        let ca = &self.cluster.ca;
        let subject = format!("{}/{}", request.location, request.name);
        let cert_pem = ca
            .sign(&request.csr_pem, request.role, &subject, LEAF_VALIDITY)
            .map_err(|error| MetadError::Invalid(error.to_string()))?;
        let mut grant = JoinGrant {
            cluster: ca.cluster(),
            cert_pem,
            ca_pem: ca.ca_pem().to_owned(),
            endpoints: vec![self.address.clone()],
            metad_id: None,
            ca_key_pem: None,
        };
        if let Some(tamper) = &*self.cluster.tamper.lock().unwrap() {
            tamper(&mut grant);
        }
        Ok(grant)
    }

    async fn mutate(
        &self,
        _caller: &PeerIdentity,
        id: RequestId,
        mutation: Mutation,
    ) -> Result<Applied, CallError> {
        self.lead()?;
        if let Mutation::RevokeToken { prefix } = &mutation {
            match prefix.as_str() {
                "fenced" => return Err(MetadError::Fenced { current: Epoch(9) }.into()),
                "no quorum" => return Err(MetadError::NoQuorum("one of three".into()).into()),
                _ => {}
            }
        }
        let version = u64::try_from(self.cluster.applied()).unwrap();
        let answer = self
            .cluster
            .answers
            .lock()
            .unwrap()
            .entry(id)
            .or_insert(Applied::Version(version))
            .clone();
        let lose =
            self.cluster
                .lose_answers
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                    left.checked_sub(1)
                });
        if lose.is_ok() {
            std::future::pending::<()>().await;
        }
        Ok(answer)
    }

    async fn barrier(&self, consistency: Consistency) -> Result<Freshness, CallError> {
        match consistency {
            Consistency::Linearizable => self.lead()?,
            Consistency::Stale => {}
        }
        Ok(Freshness {
            applied: 42,
            age_ms: (consistency == Consistency::Stale).then_some(1_234),
        })
    }

    async fn volume(&self, _: &PeerIdentity, name: &VolumeName) -> Result<Volume, CallError> {
        match name.as_str() {
            "v1" => Ok(volume(1)),
            "v2" => Ok(volume(2)),
            _ => Err(MetadError::NoSuchVolume(name.to_string()).into()),
        }
    }

    async fn volume_by_id(&self, _: &PeerIdentity, id: VolumeId) -> Result<Volume, CallError> {
        Ok(volume(id.as_bytes()[0]))
    }

    async fn volumes(&self, _: &PeerIdentity) -> Result<Vec<Volume>, CallError> {
        Ok(vec![volume(1), volume(2)])
    }

    async fn records(
        &self,
        _: &PeerIdentity,
        _: VolumeId,
        _: &[DatafileId],
    ) -> Result<Vec<EncodingRecord>, CallError> {
        Ok(Vec::new())
    }

    async fn list_records(
        &self,
        _: &PeerIdentity,
        _: VolumeId,
        _: Option<Stream>,
        _: DatafileId,
        _: u32,
    ) -> Result<Vec<EncodingRecord>, CallError> {
        Ok(Vec::new())
    }

    async fn backends(&self, _: &PeerIdentity) -> Result<Vec<Backend>, CallError> {
        Ok(Vec::new())
    }

    async fn backend_facts(&self, _: &PeerIdentity) -> Result<Vec<BackendFacts>, CallError> {
        let fat = crate::api::BackendFacts {
            problem: "x".repeat(60_000),
            ..Default::default()
        };
        let count = self.cluster.fat_facts.load(Ordering::SeqCst);
        Ok(vec![fat; count])
    }

    async fn agents(&self, _: &PeerIdentity) -> Result<Vec<Agent>, CallError> {
        Ok(Vec::new())
    }

    async fn backend_shards(
        &self,
        _: &PeerIdentity,
        _: BackendId,
        _: (VolumeId, DatafileId),
        _: u32,
    ) -> Result<Vec<(EncodingRecord, u32)>, CallError> {
        Ok(Vec::new())
    }

    async fn placement(
        &self,
        _: &PeerIdentity,
        _: VolumeId,
        _: u64,
    ) -> Result<PlacementAnswer, CallError> {
        Err(MetadError::PolicyUnmet("no backends".into()).into())
    }

    async fn status(&self, _: &PeerIdentity) -> Result<Status, CallError> {
        Ok(Status {
            schema_version: crate::status::SCHEMA_VERSION,
            verdict: StatusVerdict::Ok,
            findings: Vec::new(),
            quorum: Default::default(),
            volumes: Vec::new(),
            resilver: Default::default(),
            rot: Default::default(),
            backends: Vec::new(),
        })
    }

    async fn members(&self, _: &PeerIdentity) -> Result<Vec<Member>, CallError> {
        Ok(Vec::new())
    }

    async fn settings(&self, _: &PeerIdentity) -> Result<ClusterSettings, CallError> {
        Ok(ClusterSettings::default())
    }

    async fn tokens(&self, _: &PeerIdentity) -> Result<Vec<TokenInfo>, CallError> {
        Ok(Vec::new())
    }

    async fn issue_client_certificate(
        &self,
        _: &PeerIdentity,
        csr_pem: &str,
        volume: Option<VolumeId>,
    ) -> Result<String, CallError> {
        let subject = volume.map_or("*".into(), |volume| volume.to_string());
        let ca = &self.cluster.ca;
        ca.sign(csr_pem, Role::Client, &subject, LEAF_VALIDITY)
            .map_err(|error| MetadError::Invalid(error.to_string()).into())
    }

    async fn renew_certificate(
        &self,
        caller: &PeerIdentity,
        csr_pem: &str,
    ) -> Result<String, CallError> {
        self.lead()?;
        let life = *self.cluster.certificate_life.lock().unwrap();
        let signed = self
            .cluster
            .ca
            .sign(csr_pem, caller.role, &caller.subject, life);
        signed.map_err(|error| MetadError::Invalid(error.to_string()).into())
    }

    async fn certificate_life_ms(&self, _: &PeerIdentity) -> Result<u64, CallError> {
        Ok(1)
    }

    fn heard_certificate(&self, caller: &PeerIdentity, expires_ms: u64) {
        let mut heard = self.cluster.heard.lock().unwrap();
        heard.push((caller.clone(), expires_ms));
    }

    async fn scrub(&self, _: &PeerIdentity, _: Option<BackendId>) -> Result<(), CallError> {
        Ok(())
    }

    async fn remove_member(&self, _: &PeerIdentity, _: MetadId) -> Result<(), CallError> {
        Ok(())
    }

    async fn transfer_leader(&self, _: &PeerIdentity, _: MetadId) -> Result<(), CallError> {
        Ok(())
    }

    async fn watch(&self, _: &PeerIdentity, request: WatchRequest) -> Result<Watch, CallError> {
        let asked = (self.address.clone(), request.after);
        self.cluster.watches.lock().unwrap().push(asked);
        let mut history = self.cluster.history.subscribe();
        history.mark_changed();
        let mut position = request.after.unwrap_or(0);
        let floor = history.borrow().0;
        if position < floor {
            return Err(MetadError::TooOld { oldest: floor }.into());
        }
        let (sender, events) = mpsc::channel(4);
        let (end, ended) = oneshot::channel();
        tokio::spawn(async move {
            let _end = end;
            let mut news = vec![WatchEvent::Began(position)];
            loop {
                for event in news {
                    position = position.max(event.index());
                    if sender.send(event).await.is_err() {
                        return;
                    }
                }
                if history.changed().await.is_err() {
                    return;
                }
                let all = history.borrow_and_update().1.clone();
                news = all.into_iter().filter(|e| e.index() > position).collect();
            }
        });
        Ok(Watch { events, ended })
    }

    async fn agent_session(
        &self,
        _: &PeerIdentity,
        _: AgentId,
        mut reports: mpsc::Receiver<AgentReport>,
    ) -> Result<mpsc::Receiver<AgentOrder>, CallError> {
        self.lead()?;
        let (sender, orders) = mpsc::channel(4);
        // Whoever takes the sender out of there ends the session by dropping it.
        let own = sender.downgrade();
        *self.session.lock().unwrap() = Some(sender);
        let (sink, newest) = (self.report.clone(), self.session.clone());
        tokio::spawn(async move {
            while let Some(report) = reports.recv().await {
                if sink.send(report).await.is_err() {
                    return;
                }
            }
            // Who says nothing more gets no orders either.
            let mut newest = newest.lock().unwrap();
            newest.take_if(|newest| own.upgrade().is_some_and(|own| newest.same_channel(&own)));
        });
        Ok(orders)
    }
}
