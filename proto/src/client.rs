//! The metad client: finds the leader, repeats what was lost exactly once, and always ends.
//!
//! Every method has an overall deadline ([`Timing`]) within which it tries endpoint after endpoint, following leader hints, with a
//! deadline per attempt and jittered backoff. A mutation keeps its [`RequestId`] through all attempts, so metad applies it once.
//! It ends as the answer; as `NoQuorum` or `Unreachable` when certainly no attempt was applied; as `Unknown` otherwise.

mod attempt;
mod open;
mod session;
mod watching;

pub use watching::Watching;

use crate::api::{
    Agent, AgentOrder, AgentReport, Applied, Backend, BackendFacts, ClusterSettings, Freshness,
    Member, MetadError, Mutation, PlacementAnswer, TokenInfo, Volume,
};
use crate::channel::endpoint_of;
use crate::dial::{Dial, TlsDial};
use crate::identity::LiveIdentity;
use crate::server::{Consistency, RequestId};
use crate::status::Status;
use crate::verb::{Answer, Query};
use crate::watch::WatchRequest;
use crate::wire::{Wire, WireError, pb};
use attempt::{Kind, Nodes};
use bytes::Bytes;
use prost::Message as _;
use qsfs_zstor::id::{
    AgentId, BackendId, ClientId, ClusterId, DatafileId, MetadId, Stream, VolumeId, VolumeName,
};
use qsfs_zstor::record::EncodingRecord;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout_at};
use tonic::Request;

/// Most mutations of one client in flight; more wait for their turn (within their deadline).
pub const MUTATIONS_IN_FLIGHT_MAX: usize = 64;
/// Most entries asked for in one page of a listing.
pub const PAGE_MAX: u32 = 1_024;
/// Most records of one commit, and ids of one `records` call.
pub const RECORDS_MAX: usize = 1_024;

/// Deadlines of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// One attempt with one node, from sending to answer.
    pub attempt: Duration,
    /// TCP and TLS handshake.
    pub connect: Duration,
    /// A whole read, with all its attempts.
    pub read: Duration,
    /// A whole mutation, with all its attempts.
    pub mutation: Duration,
    /// First pause between two rounds over the endpoints; doubles, with jitter, up to `backoff_max`.
    pub backoff: Duration,
    /// Longest pause.
    pub backoff_max: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            attempt: Duration::from_secs(5),
            connect: Duration::from_secs(2),
            read: Duration::from_secs(15),
            mutation: Duration::from_secs(30),
            backoff: Duration::from_millis(20),
            // A new leader is there within about half a second: whoever waits much longer between rounds misses it.
            backoff_max: Duration::from_millis(100),
        }
    }
}

/// A client of one cluster. Clones share connections and the session.
#[derive(Clone)]
pub struct MetadClient {
    shared: Arc<Shared>,
    consistency: Consistency,
    observed: Option<Observed>,
}

/// What is known of the freshness of all answers that a client of [`MetadClient::observed`] got.
#[derive(Debug, Clone, Default)]
pub struct Observed(Arc<Mutex<Option<Freshness>>>);

impl Observed {
    /// The lowest index and the highest age of the answers so far; `None` before the first. A listing of several pages may be
    /// watched on from this index: nothing after it is missed, though some of it may be in the listing already.
    pub fn freshness(&self) -> Option<Freshness> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, answer: Freshness) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let so_far = all.unwrap_or(answer);
        *all = Some(Freshness {
            applied: so_far.applied.min(answer.applied),
            age_ms: so_far.age_ms.zip(answer.age_ms).map(|(a, b)| a.max(b)),
        });
    }
}

struct Shared {
    nodes: Nodes,
    client: ClientId,
    session: u64,
    applied: AtomicU64,
    sequences: Mutex<Sequences>,
    in_flight: Semaphore,
}

#[derive(Default)]
struct Sequences {
    newest: u64,
    pending: BTreeSet<u64>,
}

/// One mutation's number; no longer pending when dropped, however its call ends.
struct Pending<'a> {
    shared: &'a Shared,
    id: RequestId,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.shared.sequences().pending.remove(&self.id.sequence);
    }
}

impl Shared {
    fn sequences(&self) -> MutexGuard<'_, Sequences> {
        // No step under the lock can leave it half done.
        self.sequences
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn number(&self) -> Pending<'_> {
        let mut sequences = self.sequences();
        sequences.newest += 1;
        let sequence = sequences.newest;
        sequences.pending.insert(sequence);
        let oldest_pending = sequences.pending.first().copied().unwrap_or(sequence);
        let id = RequestId {
            client: self.client,
            session: self.session,
            sequence,
            oldest_pending,
        };
        Pending { shared: self, id }
    }

    async fn send(
        &self,
        id: RequestId,
        mutation: &Mutation,
        deadline: Instant,
    ) -> Result<Applied, MetadError> {
        let message = pb::MutateRequest {
            id: id.to_wire(),
            mutation: mutation.to_wire(),
        };
        // Once for all attempts.
        let message = Bytes::from(message.encode_to_vec());
        let applied = self.nodes.run(Kind::Mutation, deadline, |open, limit| {
            open.mutate(message.clone(), limit)
        });
        Applied::from_wire(applied.await?).map_err(unreadable)
    }
}

impl fmt::Debug for MetadClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetadClient")
            .field("client", &self.shared.client)
            .field("consistency", &self.consistency)
            .finish_non_exhaustive()
    }
}

/// An agent's half of its session.
pub type AgentSession = (
    mpsc::Sender<AgentReport>,
    mpsc::Receiver<Result<AgentOrder, MetadError>>,
);

impl MetadClient {
    /// Connects when first used. `endpoints` are `host:port`; those of the other metad nodes are learned by the way.
    pub fn new(
        endpoints: Vec<String>,
        identity: impl Into<LiveIdentity>,
        client: ClientId,
    ) -> Result<Self, MetadError> {
        Self::with_timing(endpoints, identity, client, Timing::default())
    }

    /// [`Self::new`] with other deadlines.
    pub fn with_timing(
        endpoints: Vec<String>,
        identity: impl Into<LiveIdentity>,
        client: ClientId,
        timing: Timing,
    ) -> Result<Self, MetadError> {
        let identity = identity.into();
        let cluster = identity.peer().cluster;
        let dial =
            TlsDial::of(identity).map_err(|error| MetadError::Unreachable(error.to_string()))?;
        Self::over(endpoints, dial, cluster, client, timing)
    }

    /// [`Self::with_timing`] over whatever `dial` opens.
    pub fn over(
        endpoints: Vec<String>,
        dial: Arc<dyn Dial>,
        cluster: ClusterId,
        client: ClientId,
        timing: Timing,
    ) -> Result<Self, MetadError> {
        if endpoints.is_empty() {
            return Err(MetadError::Invalid("no metad endpoints are given".into()));
        }
        for endpoint in &endpoints {
            endpoint_of(endpoint).map_err(MetadError::Invalid)?;
        }
        let shared = Shared {
            nodes: Nodes::new(endpoints, dial, cluster, timing),
            client,
            session: rand::random(),
            applied: AtomicU64::new(0),
            sequences: Mutex::default(),
            in_flight: Semaphore::new(MUTATIONS_IN_FLIGHT_MAX),
        };
        Ok(Self {
            shared: Arc::new(shared),
            consistency: Consistency::Linearizable,
            observed: None,
        })
    }

    /// The same client, whose reads any node answers from what it has applied. For when there is no quorum.
    #[must_use]
    pub fn stale(&self) -> Self {
        Self {
            consistency: Consistency::Stale,
            ..self.clone()
        }
    }

    /// The same client, and what tells how fresh the answers to its reads were.
    #[must_use]
    pub fn observed(&self) -> (Self, Observed) {
        let observed = Observed::default();
        let client = Self {
            observed: Some(observed.clone()),
            ..self.clone()
        };
        (client, observed)
    }

    /// Watches changes until it is dropped: goes on at another node by itself when one dies, falls silent or cannot keep up. It ends with
    /// an error when there is no going on: denied, or too old. See [`crate::watch`].
    pub fn watch(&self, request: WatchRequest) -> Watching {
        Watching::start(self.shared.clone(), request)
    }

    /// Highest applied index behind an answer to a read so far.
    pub fn applied(&self) -> u64 {
        self.shared.applied.load(Ordering::Relaxed)
    }

    /// Applies a mutation exactly once, within [`Timing::mutation`].
    pub async fn mutate(&self, mutation: Mutation) -> Result<Applied, MetadError> {
        let deadline = self.shared.nodes.timing.mutation;
        self.mutate_within(mutation, deadline).await
    }

    /// Applies a mutation exactly once, within `deadline`. `Unknown` means: it may have been applied or not, and will not be later
    /// by this call.
    pub async fn mutate_within(
        &self,
        mutation: Mutation,
        deadline: Duration,
    ) -> Result<Applied, MetadError> {
        let shared = &*self.shared;
        let deadline = Instant::now() + deadline;
        let turn = timeout_at(deadline, shared.in_flight.acquire()).await;
        let _turn = turn.map_err(|_| {
            MetadError::NoQuorum(format!(
                "not sent: {MUTATIONS_IN_FLIGHT_MAX} earlier mutations still wait for their answers"
            ))
        })?;
        let pending = shared.number();
        shared.send(pending.id, &mutation, deadline).await
    }

    /// The same under an id that the caller gave it, and may give again: who asks once more gets the first answer, and nothing is done
    /// again, until a later id of the session says that nobody waits for it. The session must not be this client's own.
    pub async fn mutate_as(
        &self,
        id: RequestId,
        mutation: &Mutation,
    ) -> Result<Applied, MetadError> {
        let deadline = Instant::now() + self.shared.nodes.timing.mutation;
        self.shared.send(id, mutation, deadline).await
    }

    /// By name.
    pub async fn volume(&self, name: &VolumeName) -> Result<Volume, MetadError> {
        match self.ask(Query::Volume(name.clone())).await? {
            Answer::Volume(volume) => Ok(*volume),
            _ => Err(mismatch()),
        }
    }

    /// By id.
    pub async fn volume_by_id(&self, id: VolumeId) -> Result<Volume, MetadError> {
        match self.ask(Query::VolumeById(id)).await? {
            Answer::Volume(volume) => Ok(*volume),
            _ => Err(mismatch()),
        }
    }

    /// All that our certificate opens.
    pub async fn volumes(&self) -> Result<Vec<Volume>, MetadError> {
        match self.ask(Query::Volumes).await? {
            Answer::Volumes(volumes) => Ok(volumes),
            _ => Err(mismatch()),
        }
    }

    /// Those of the named records that exist; any number of them.
    pub async fn records(
        &self,
        volume: VolumeId,
        datafiles: &[DatafileId],
    ) -> Result<Vec<EncodingRecord>, MetadError> {
        let mut found = Vec::new();
        for page in datafiles.chunks(RECORDS_MAX) {
            let datafiles = page.to_vec();
            match self.ask(Query::Records { volume, datafiles }).await? {
                Answer::Records(records) => found.extend(records),
                _ => return Err(mismatch()),
            }
        }
        Ok(found)
    }

    /// One page of records in ascending order, after `after`, of one stream or both. At most [`PAGE_MAX`]; an empty page is the end.
    pub async fn list_records(
        &self,
        volume: VolumeId,
        stream: Option<Stream>,
        after: DatafileId,
        limit: u32,
    ) -> Result<Vec<EncodingRecord>, MetadError> {
        let query = Query::ListRecords {
            volume,
            stream,
            after,
            limit: limit.clamp(1, PAGE_MAX),
        };
        match self.ask(query).await? {
            Answer::Records(records) => Ok(records),
            _ => Err(mismatch()),
        }
    }

    /// All backends.
    pub async fn backends(&self) -> Result<Vec<Backend>, MetadError> {
        match self.ask(Query::Backends).await? {
            Answer::Backends(backends) => Ok(backends),
            _ => Err(mismatch()),
        }
    }

    /// What the backends said in their newest heartbeats.
    pub async fn backend_facts(&self) -> Result<Vec<BackendFacts>, MetadError> {
        match self.ask(Query::BackendFacts).await? {
            Answer::BackendFacts(facts) => Ok(facts),
            _ => Err(mismatch()),
        }
    }

    /// All agents.
    pub async fn agents(&self) -> Result<Vec<Agent>, MetadError> {
        match self.ask(Query::Agents).await? {
            Answer::Agents(agents) => Ok(agents),
            _ => Err(mismatch()),
        }
    }

    /// One page of the shards that records place on a backend. At most about [`PAGE_MAX`]; an empty page is the end.
    pub async fn backend_shards(
        &self,
        backend: BackendId,
        after: (VolumeId, DatafileId),
        limit: u32,
    ) -> Result<Vec<(EncodingRecord, u32)>, MetadError> {
        let query = Query::BackendShards {
            backend,
            after,
            limit: limit.clamp(1, PAGE_MAX),
        };
        match self.ask(query).await? {
            Answer::BackendShards(shards) => Ok(shards),
            _ => Err(mismatch()),
        }
    }

    /// Where a new stripe of the volume should go now.
    pub async fn placement(
        &self,
        volume: VolumeId,
        shard_bytes: u64,
    ) -> Result<PlacementAnswer, MetadError> {
        let query = Query::Placement {
            volume,
            shard_bytes,
        };
        match self.ask(query).await? {
            Answer::Placement(placement) => Ok(placement),
            _ => Err(mismatch()),
        }
    }

    /// The whole status.
    pub async fn status(&self) -> Result<Status, MetadError> {
        match self.ask(Query::Status).await? {
            Answer::Status(status) => Ok(*status),
            _ => Err(mismatch()),
        }
    }

    /// metad nodes. This client knows their addresses from then on: who asks now and then finds the cluster also when the
    /// nodes it began with are gone.
    pub async fn members(&self) -> Result<Vec<Member>, MetadError> {
        match self.ask(Query::Members).await? {
            Answer::Members(members) => {
                let addresses = members.iter().map(|member| member.address.as_str());
                self.shared.nodes.learn_members(addresses);
                Ok(members)
            }
            _ => Err(mismatch()),
        }
    }

    /// Settings of the cluster.
    pub async fn settings(&self) -> Result<ClusterSettings, MetadError> {
        match self.ask(Query::Settings).await? {
            Answer::Settings(settings) => Ok(settings),
            _ => Err(mismatch()),
        }
    }

    /// Join tokens. Admin.
    pub async fn tokens(&self) -> Result<Vec<TokenInfo>, MetadError> {
        match self.ask(Query::Tokens).await? {
            Answer::Tokens(tokens) => Ok(tokens),
            _ => Err(mismatch()),
        }
    }

    /// A client certificate (PEM) for one volume, or for all (`None`). Admin.
    pub async fn issue_client_certificate(
        &self,
        csr_pem: &str,
        volume: Option<VolumeId>,
    ) -> Result<String, MetadError> {
        let csr_pem = csr_pem.to_owned();
        match self
            .ask(Query::IssueClientCertificate { csr_pem, volume })
            .await?
        {
            Answer::Certificate(pem) => Ok(pem),
            _ => Err(mismatch()),
        }
    }

    /// A new certificate (PEM) for the key of the request, of the process that asks: who it is comes from the certificate of its
    /// connection alone.
    pub async fn renew_certificate(&self, csr_pem: &str) -> Result<String, MetadError> {
        match self
            .ask(Query::RenewCertificate(csr_pem.to_owned()))
            .await?
        {
            Answer::Certificate(pem) => Ok(pem),
            _ => Err(mismatch()),
        }
    }

    /// For how long certificates are made, in ms.
    pub async fn certificate_life_ms(&self) -> Result<u64, MetadError> {
        match self.ask(Query::CertificateLife).await? {
            Answer::CertificateLife(life_ms) => Ok(life_ms),
            _ => Err(mismatch()),
        }
    }

    /// Begins a scrub tour of one backend or of all. Admin.
    pub async fn scrub(&self, backend: Option<BackendId>) -> Result<(), MetadError> {
        self.done(Query::Scrub { backend }).await
    }

    /// Takes a metad node out of the membership. Admin.
    pub async fn remove_member(&self, member: MetadId) -> Result<(), MetadError> {
        self.done(Query::RemoveMember(member)).await
    }

    /// Makes another voter the leader. Admin.
    pub async fn transfer_leader(&self, to: MetadId) -> Result<(), MetadError> {
        self.done(Query::TransferLeader(to)).await
    }

    /// Opens the agent's session with the leader. It ends (the receiver gives `None`, perhaps after an error) when the leader
    /// changes or the connection breaks; the caller opens another, with backoff.
    pub async fn agent_session(&self, agent: AgentId) -> Result<AgentSession, MetadError> {
        let nodes = &self.shared.nodes;
        let deadline = Instant::now() + nodes.timing.read;
        nodes
            .run(Kind::Read, deadline, |open, _| {
                session::open(open.stub, agent)
            })
            .await
    }

    async fn done(&self, query: Query) -> Result<(), MetadError> {
        match self.ask(query).await? {
            Answer::Done => Ok(()),
            _ => Err(mismatch()),
        }
    }

    async fn ask(&self, query: Query) -> Result<Answer, MetadError> {
        let shared = &*self.shared;
        let deadline = Instant::now() + shared.nodes.timing.read;
        let message = pb::AskRequest {
            stale: self.consistency == Consistency::Stale,
            query: query.to_wire(),
        };
        let reply = shared.nodes.run(Kind::Read, deadline, |open, limit| {
            let mut stub = open.stub;
            let mut request = Request::new(message.clone());
            request.set_timeout(limit);
            async move { Ok(stub.ask(request).await?.into_inner()) }
        });
        let reply = reply.await?;
        shared.applied.fetch_max(reply.applied, Ordering::Relaxed);
        if let Some(observed) = &self.observed {
            observed.add(Freshness {
                applied: reply.applied,
                age_ms: reply.age_ms,
            });
        }
        Answer::from_wire(reply.answer).map_err(unreadable)
    }
}

fn unreadable(error: WireError) -> MetadError {
    MetadError::Unreachable(format!("metad's answer does not parse: {error}"))
}

fn mismatch() -> MetadError {
    MetadError::Unreachable("metad answered something else than was asked".into())
}
