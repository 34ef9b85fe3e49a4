//! The shell around a [`MetadService`]: TLS, limits, who may say what, and the wire.
//!
//! Invariants: no request body of a caller without certificate is read except a join; the role table (`server/roles.rs`) is asked before every verb; a
//! slow or hostile connection costs at most one of its [`Places`] and ends by a deadline.

mod accept;
mod grpc;
mod limits;
mod roles;
mod watching;

use accept::{ConnectedPeer, Connection, incoming, known};
use grpc::{Grpc, check_member, check_metad, check_version};
use limits::Metering;

pub use limits::{
    MUTATION_STREAMS_MAX, PENDING_BYTES_MAX, PENDING_BYTES_MAX_ALL, READS_MAX, REPORT_BYTES_MAX,
    SESSIONS_MAX,
};

use crate::api::{
    Agent, AgentOrder, AgentReport, Applied, Backend, BackendFacts, ClusterSettings, Freshness,
    JoinGrant, JoinRequest, Member, MetadError, Mutation, PlacementAnswer, TokenInfo, Volume,
};
use crate::dial::ByteStream;
use crate::identity::{LiveIdentity, PeerIdentity};
use crate::raft::{RAFT_FRAME_BYTES_MAX, RaftRpc};
use crate::status::Status;
use crate::tls::{self, ClientAuth, TlsError};
use crate::watch::{WatchEvent, WatchRequest};
use crate::wire::pb::join_server::JoinServer;
use crate::wire::pb::metad_server::MetadServer;
use crate::wire::pb::raft_server::RaftServer;
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use qsfs_zstor::id::{
    AgentId, BackendId, ClientId, DatafileId, MetadId, Stream, VolumeId, VolumeName,
};
use qsfs_zstor::record::EncodingRecord;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;

/// Places for connections of a metad node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// All, handshakes included; who comes after waits to be accepted.
    pub connections: usize,
    /// Of these, those of agents, clients and admins: the rest is for handshakes and for the other metad nodes.
    pub members: usize,
    /// Of one identity. All clients that joined by token are one.
    pub each: usize,
    /// Handshakes at once; who comes after is closed.
    pub handshakes: usize,
    /// Of strangers.
    pub strangers: usize,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            connections: 4_096,
            members: 3_584,
            each: 1_024,
            handshakes: 512,
            strangers: 64,
        }
    }
}

/// Orders or reports that may wait in an agent session, each way.
pub const SESSION_QUEUE_MAX: usize = 64;
/// Largest request or answer outside the Raft channel.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Largest join request.
const JOIN_BYTES_MAX: usize = 128 << 10;
/// Most calls in flight on one connection.
pub const STREAMS_MAX: u32 = 256;
/// Open calls may take so long after `shutdown`.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);
/// Between HTTP/2 pings, at both ends.
pub(crate) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// A ping without answer for so long: the connection is dead.
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// Names one mutation for exactly-once: a repeat of it must be answered as the first time, not applied again.
///
/// `session` is drawn at random by every `MetadClient`; its sequences begin at 1 and rise by 1 per mutation. Several may be in
/// flight at once and arrive in any order: whoever keeps answers keys them by (client, session, sequence), may forget all
/// of that session below `oldest_pending`, and must refuse a sequence below an `oldest_pending` it has seen.
/// At most [`crate::client::MUTATIONS_IN_FLIGHT_MAX`] of a session are pending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId {
    /// Client state directory (or whatever the process is identified by).
    pub client: ClientId,
    /// One `MetadClient` of it.
    pub session: u64,
    /// Number of the mutation in the session.
    pub sequence: u64,
    /// Lowest sequence of the session that has not ended at the client.
    pub oldest_pending: u64,
}

/// How fresh a read must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Consistency {
    /// Sees every mutation answered before it began. Leader only.
    #[default]
    Linearizable,
    /// What this node has applied; any node.
    Stale,
}

/// Why a [`MetadService`] did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The caller gets this.
    #[error(transparent)]
    Refused(#[from] MetadError),
    /// The same, and it is what the state answered to the proposal: whoever repeats the request id gets no other answer.
    #[error(transparent)]
    Decided(MetadError),
    /// The client library goes on with another node; never seen by its user.
    #[error("not the leader")]
    NotLeader {
        /// `host:port` of the leader, when known.
        leader: Option<String>,
    },
}

/// What a metad node answers. `caller` is what the client's certificate says; the role and the volume a certificate is bound
/// to were checked already, what only the state knows (is this the caller's own agent id?) was not.
///
/// A method's future may be dropped when the caller's deadline ends: what must go on then belongs into a task.
#[async_trait]
pub trait MetadService: Send + Sync + 'static {
    /// A process without certificate joins. May be repeated with the same signing request when its answer was lost:
    /// then the token counts as used by it and the grant is given again.
    async fn join(&self, request: JoinRequest) -> Result<JoinGrant, CallError>;

    /// Applies a mutation exactly once per `id`.
    async fn mutate(
        &self,
        caller: &PeerIdentity,
        id: RequestId,
        mutation: Mutation,
    ) -> Result<Applied, CallError>;

    /// Called before every read: returns when local state is as fresh as asked, and says how fresh it is.
    /// Linearizable on a node that does not lead is `NotLeader`.
    async fn barrier(&self, consistency: Consistency) -> Result<Freshness, CallError>;

    /// By name.
    async fn volume(&self, caller: &PeerIdentity, name: &VolumeName) -> Result<Volume, CallError>;

    /// By id.
    async fn volume_by_id(&self, caller: &PeerIdentity, id: VolumeId) -> Result<Volume, CallError>;

    /// All; the shell drops those that the caller's certificate does not open.
    async fn volumes(&self, caller: &PeerIdentity) -> Result<Vec<Volume>, CallError>;

    /// Those of the named records that exist.
    async fn records(
        &self,
        caller: &PeerIdentity,
        volume: VolumeId,
        datafiles: &[DatafileId],
    ) -> Result<Vec<EncodingRecord>, CallError>;

    /// In ascending order, those after `after`, at most `limit` (0 < limit <= [`crate::client::PAGE_MAX`]).
    async fn list_records(
        &self,
        caller: &PeerIdentity,
        volume: VolumeId,
        stream: Option<Stream>,
        after: DatafileId,
        limit: u32,
    ) -> Result<Vec<EncodingRecord>, CallError>;

    /// All.
    async fn backends(&self, caller: &PeerIdentity) -> Result<Vec<Backend>, CallError>;

    /// Of the newest heartbeats; those never heard of are left out.
    async fn backend_facts(&self, caller: &PeerIdentity) -> Result<Vec<BackendFacts>, CallError>;

    /// All.
    async fn agents(&self, caller: &PeerIdentity) -> Result<Vec<Agent>, CallError>;

    /// Shards that records place on a backend, ascending by (volume, datafile), after `after`, at most `limit`.
    /// All shards of one record come in one page.
    async fn backend_shards(
        &self,
        caller: &PeerIdentity,
        backend: BackendId,
        after: (VolumeId, DatafileId),
        limit: u32,
    ) -> Result<Vec<(EncodingRecord, u32)>, CallError>;

    /// Where a new stripe should go now.
    async fn placement(
        &self,
        caller: &PeerIdentity,
        volume: VolumeId,
        shard_bytes: u64,
    ) -> Result<PlacementAnswer, CallError>;

    /// The whole status.
    async fn status(&self, caller: &PeerIdentity) -> Result<Status, CallError>;

    /// metad nodes.
    async fn members(&self, caller: &PeerIdentity) -> Result<Vec<Member>, CallError>;

    /// Settings of the cluster.
    async fn settings(&self, caller: &PeerIdentity) -> Result<ClusterSettings, CallError>;

    /// Tokens that are not forgotten yet.
    async fn tokens(&self, caller: &PeerIdentity) -> Result<Vec<TokenInfo>, CallError>;

    /// Signs a client certificate for one volume, or for all (`None`). Answers PEM.
    async fn issue_client_certificate(
        &self,
        caller: &PeerIdentity,
        csr_pem: &str,
        volume: Option<VolumeId>,
    ) -> Result<String, CallError>;

    /// Signs a new certificate for the caller itself: role and subject are those of its present one, never of the request.
    /// Whoever is gone (its agent, its volume) is refused. Answers PEM.
    async fn renew_certificate(
        &self,
        caller: &PeerIdentity,
        csr_pem: &str,
    ) -> Result<String, CallError>;

    /// How long certificates live that are made now, in ms.
    async fn certificate_life_ms(&self, caller: &PeerIdentity) -> Result<u64, CallError>;

    /// A member has connected with a certificate that ends then (ms since the epoch).
    fn heard_certificate(&self, caller: &PeerIdentity, expires_ms: u64);

    /// Begins a scrub tour of one backend or of all.
    async fn scrub(
        &self,
        caller: &PeerIdentity,
        backend: Option<BackendId>,
    ) -> Result<(), CallError>;

    /// Takes a metad node out of the membership.
    async fn remove_member(&self, caller: &PeerIdentity, member: MetadId) -> Result<(), CallError>;

    /// Makes another voter the leader.
    async fn transfer_leader(&self, caller: &PeerIdentity, to: MetadId) -> Result<(), CallError>;

    /// Changes from what this node has applied, as they come. `request` is narrowed to what the caller may watch; the shell drops
    /// single changes that it may not see. Must not wait for a slow reader longer than a limit.
    async fn watch(&self, caller: &PeerIdentity, request: WatchRequest)
    -> Result<Watch, CallError>;

    /// An agent's session with the leader. Reports arrive on `reports` until the agent is gone; the session ends when the
    /// returned channel's sender is dropped (leadership lost). `agent` must be checked to be the caller's own.
    async fn agent_session(
        &self,
        caller: &PeerIdentity,
        agent: AgentId,
        reports: mpsc::Receiver<AgentReport>,
    ) -> Result<mpsc::Receiver<AgentOrder>, CallError>;
}

/// A watch that began.
#[derive(Debug)]
pub struct Watch {
    /// What is told.
    pub events: mpsc::Receiver<WatchEvent>,
    /// Why it ended, after the last event; dropped without a word: the node is stopping.
    pub ended: oneshot::Receiver<CallError>,
}

/// Takes what Raft peers send. Payloads are opaque here.
#[async_trait]
pub trait RaftTransport: Send + Sync + 'static {
    /// `from` is what the peer's certificate says. The error text goes to the peer.
    async fn handle(&self, from: MetadId, rpc: RaftRpc, payload: Bytes) -> Result<Bytes, String>;
}

/// Why a server ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The identity cannot serve.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// HTTP/2 or the listener failed.
    #[error("serving: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves until `shutdown`; then no new calls are taken and open ones have a short while to end. New connections are served with the
/// identity as it is then; a connection ends with the certificate that its other end showed.
pub async fn serve(
    listener: TcpListener,
    identity: impl Into<LiveIdentity>,
    service: Arc<dyn MetadService>,
    raft: Arc<dyn RaftTransport>,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let places = Places::default();
    serve_within(places, listener, identity.into(), (service, raft), shutdown).await
}

/// [`serve`] with other limits.
pub(crate) async fn serve_within(
    places: Places,
    listener: TcpListener,
    identity: LiveIdentity,
    (service, raft): (Arc<dyn MetadService>, Arc<dyn RaftTransport>),
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let config = tls::grpc_server_config(&identity, ClientAuth::Optional)?;
    let kill = CancellationToken::new();
    // However this future ends, its connections do too.
    let _kill_at_end = kill.clone().drop_guard();
    let grpc = Arc::new(Grpc {
        own: identity.peer().clone(),
        service,
        raft,
        shutdown: shutdown.clone(),
    });
    serve_connections(incoming(listener, config, places, kill), grpc, shutdown).await
}

/// [`serve`] on connections whose other ends are known already: for simulations, which have no TLS.
pub async fn serve_known(
    connections: impl futures::Stream<Item = (Box<dyn ByteStream>, Option<PeerIdentity>)> + Send + Unpin,
    own: PeerIdentity,
    service: Arc<dyn MetadService>,
    raft: Arc<dyn RaftTransport>,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let kill = CancellationToken::new();
    let _kill_at_end = kill.clone().drop_guard();
    let grpc = Arc::new(Grpc {
        own,
        service,
        raft,
        shutdown: shutdown.clone(),
    });
    let incoming = connections.map(move |(stream, peer)| Ok(known(stream, peer, &kill)));
    serve_connections(incoming, grpc, shutdown).await
}

async fn serve_connections(
    incoming: impl futures::Stream<Item = io::Result<Connection>> + Send,
    grpc: Arc<Grpc>,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let join = JoinServer::from_arc(grpc.clone()).max_decoding_message_size(JOIN_BYTES_MAX);
    let metad = MetadServer::from_arc(grpc.clone())
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let raft = RaftServer::from_arc(grpc)
        .max_decoding_message_size(RAFT_FRAME_BYTES_MAX)
        .max_encoding_message_size(RAFT_FRAME_BYTES_MAX);
    let serving = Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .layer(Metering)
        .add_service(InterceptedService::new(join, check_version))
        .add_service(InterceptedService::new(metad, check_member))
        .add_service(InterceptedService::new(raft, check_metad))
        .serve_with_incoming_shutdown(incoming, shutdown.clone().cancelled_owned());
    tokio::select! {
        ended = serving => Ok(ended?),
        () = async {
            shutdown.cancelled().await;
            sleep(SHUTDOWN_GRACE).await;
        } => Ok(()),
    }
}
