//! Raft messages between metad nodes: postcard inside proto's opaque calls.
//!
//! The certificate of the caller names its Raft id; a request in the name of another node is refused.

mod notices;

use super::consensus::Consensus;
use super::facts::NodeFacts;
use super::receiving::Receiving;
use super::vigil::Spoken;
use crate::ground::unknown_entry;
use crate::log::storage::LogStore;
use crate::machine::Machine;
use crate::raft::proposed::{decode_append, encode_append};
use crate::raft::{LogId, Raft, TypeConfig};
use async_trait::async_trait;
use bytes::Bytes;
use notices::Notices;
use openraft::error::{
    InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Timeout, Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use openraft::{AnyError, BasicNode, RPCTypes};
use parking_lot::Mutex;
use qsfs_proto::dial::Dial;
use qsfs_proto::identity::LiveIdentity;
use qsfs_proto::raft::{RaftCallError, RaftPeer, RaftRpc};
use qsfs_proto::server::RaftTransport;
use qsfs_proto::tls::TlsError;
use qsfs_zstor::id::MetadId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::time::Instant;

/// Bytes of one snapshot chunk: far below proto's message limit.
pub const SNAPSHOT_CHUNK_BYTES: u64 = 2 << 20;

/// Longest wait for the answer to one chunk.
const SNAPSHOT_CALL: Duration = Duration::from_secs(10);

/// Longest wait until the other end has read a whole snapshot and made a state of it.
pub const SNAPSHOT_READ: Duration = Duration::from_secs(1_800);

/// Pause before an unreachable peer is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// Between two complaints of the same kind.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// What a peer said of itself counts for so long; it says it every second.
const FACTS_FRESH: Duration = Duration::from_secs(30);

/// Version of the payload encoding, first byte of every payload.
const PAYLOAD_VERSION: u8 = 1;

/// What a payload that cannot be read is answered with.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// Of a version that is not spoken here.
    #[error(
        "raft payload version {0:?} is not spoken here: use the same program on all metad nodes"
    )]
    Version(Option<u8>),
    /// Does not decode.
    #[error("raft payload does not decode: {0}")]
    Malformed(#[from] postcard::Error),
}

fn encode<T: Serialize>(value: &T) -> Bytes {
    postcard::to_extend(value, vec![PAYLOAD_VERSION])
        .expect("raft messages always encode")
        .into()
}

fn decode<T: DeserializeOwned>(payload: &Bytes) -> Result<T, PayloadError> {
    Ok(postcard::from_bytes(&body_of(payload)?)?)
}

fn body_of(payload: &Bytes) -> Result<Bytes, PayloadError> {
    match payload.first() {
        Some(&PAYLOAD_VERSION) => Ok(payload.slice(1..)),
        other => Err(PayloadError::Version(other.copied())),
    }
}

/// How a node reaches others.
#[derive(Clone)]
pub enum Way {
    /// TCP and TLS, as this identity.
    Tls(LiveIdentity),
    /// What a simulation has instead.
    Over(Arc<dyn Dial>),
}

impl Way {
    fn to(&self, target: MetadId, address: &str) -> Result<RaftPeer, TlsError> {
        match self {
            Self::Tls(identity) => RaftPeer::new(target, address, identity),
            Self::Over(dial) => Ok(RaftPeer::over(target, address, Arc::clone(dial))),
        }
    }
}

/// Makes connections to peers.
#[derive(Clone)]
pub struct Network {
    way: Way,
    me: u64,
    heard: Heard,
    peers: Peers,
    own_facts: Arc<Mutex<NodeFacts>>,
    peers_facts: PeersFacts,
}

/// What each peer said of itself, and when.
type PeersFacts = Arc<Mutex<BTreeMap<u64, (Instant, NodeFacts)>>>;

/// The one connection to each peer, at its newest address. Snapshots have their own: their chunks would hold up all else.
type Peers = Arc<Mutex<BTreeMap<u64, (String, RaftPeer)>>>;

/// When each peer replied last.
type Heard = Arc<Mutex<BTreeMap<u64, Instant>>>;

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Network({})", self.me)
    }
}

impl Network {
    /// Calls as this identity.
    pub fn new(way: Way, me: MetadId) -> Self {
        Self {
            way,
            me: me.0,
            heard: Heard::default(),
            peers: Peers::default(),
            own_facts: Arc::default(),
            peers_facts: PeersFacts::default(),
        }
    }

    /// What this node says of itself.
    pub fn own_facts(&self) -> NodeFacts {
        self.own_facts.lock().clone()
    }

    /// From now on it says this.
    pub fn change_own_facts(&self, change: impl FnOnce(&mut NodeFacts)) {
        change(&mut self.own_facts.lock());
    }

    fn heard_facts(&self, of: MetadId, facts: NodeFacts) {
        let mut known = self.peers_facts.lock();
        known.insert(of.0, (Instant::now(), facts));
    }

    /// What a node said of itself lately; to the leader they all do.
    pub fn facts_of(&self, node: MetadId) -> Option<NodeFacts> {
        if node.0 == self.me {
            return Some(self.own_facts());
        }
        let facts = self.peers_facts.lock();
        let (at, facts) = facts.get(&node.0)?;
        (at.elapsed() < FACTS_FRESH).then(|| facts.clone())
    }

    /// Asks a leader up to where everything is committed, which it answers after a majority confirmed that it leads.
    pub async fn read_index(
        &self,
        leader: MetadId,
        address: &str,
        deadline: Duration,
    ) -> Result<u64, String> {
        let peer = self.peer(leader, address).map_err(|e| e.to_string())?;
        let facts = serde_json::to_string(&self.own_facts()).map_err(|e| e.to_string())?;
        let reply = peer.call(RaftRpc::ReadIndex, encode(&facts), deadline);
        let reply = reply.await;
        decode(&reply.map_err(|error| error.to_string())?).map_err(|error| error.to_string())
    }

    fn peer(&self, target: MetadId, address: &str) -> Result<RaftPeer, TlsError> {
        let mut peers = self.peers.lock();
        match peers.get(&target.0) {
            Some((known, peer)) if known == address => Ok(peer.clone()),
            _ => {
                let peer = self.way.to(target, address)?;
                peers.insert(target.0, (address.to_owned(), peer.clone()));
                Ok(peer)
            }
        }
    }

    /// Did this peer reply to anything lately?
    pub fn heard_within(&self, peer: MetadId, span: Duration) -> bool {
        let heard = self.heard.lock();
        heard.get(&peer.0).is_some_and(|at| at.elapsed() < span)
    }
}

/// The network of a running Raft: what it sends passes its log.
#[derive(Clone)]
pub struct Outbound {
    network: Network,
    log: LogStore,
    machine: Machine,
}

impl Outbound {
    /// Sends in the name of this log, and the snapshots of this state.
    pub fn new(network: Network, log: LogStore, machine: Machine) -> Self {
        Self {
            network,
            log,
            machine,
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Outbound {
    type Network = Connection;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Connection {
        let way = WayTo {
            network: self.network.clone(),
            target,
            address: node.addr.clone(),
            log: self.log.clone(),
            machine: self.machine.clone(),
            bulk: OnceLock::new(),
        };
        Connection {
            way: Arc::new(way),
            notices: Notices::default(),
        }
    }
}

/// What openraft speaks to one peer through.
pub struct Connection {
    way: Arc<WayTo>,
    notices: Notices,
}

/// The way to one peer.
struct WayTo {
    network: Network,
    target: u64,
    address: String,
    log: LogStore,
    machine: Machine,
    /// The connection for snapshots.
    bulk: OnceLock<RaftPeer>,
}

type CallResult<T, E> = Result<T, RPCError<u64, BasicNode, E>>;

type Appended = CallResult<AppendEntriesResponse<u64>, RaftError<u64>>;

impl WayTo {
    fn peer(&self, rpc: RaftRpc) -> Result<RaftPeer, TlsError> {
        let (network, target) = (&self.network, MetadId(self.target));
        if rpc != RaftRpc::Snapshot {
            return network.peer(target, &self.address);
        }
        if let Some(bulk) = self.bulk.get() {
            return Ok(bulk.clone());
        }
        let bulk = network.way.to(target, &self.address)?;
        Ok(self.bulk.get_or_init(|| bulk).clone())
    }

    async fn append(
        &self,
        mut request: AppendEntriesRequest<TypeConfig>,
        option: &RPCOption,
    ) -> (Option<LogId>, Appended) {
        if let Err(silent) = self.log.hold_back(&mut request) {
            return (None, Err(RPCError::Unreachable(Unreachable::new(&silent))));
        }
        let payload = encode_append(&request, vec![PAYLOAD_VERSION]).into();
        let answer = self.call(RaftRpc::Append, payload, option, RPCTypes::AppendEntries);
        (request.leader_commit, answer.await)
    }

    async fn call<A, E>(
        &self,
        rpc: RaftRpc,
        payload: Bytes,
        option: &RPCOption,
        action: RPCTypes,
    ) -> CallResult<A, E>
    where
        A: DeserializeOwned,
        E: std::error::Error + DeserializeOwned,
    {
        let peer = self
            .peer(rpc)
            .map_err(|error| RPCError::Network(NetworkError::new(&error)))?;
        let reply = peer.call(rpc, payload, option.hard_ttl()).await;
        let reply = match reply {
            Ok(reply) => reply,
            Err(error @ RaftCallError::Unreachable { .. }) => {
                return Err(RPCError::Unreachable(Unreachable::new(&error)));
            }
            Err(RaftCallError::Timeout { .. }) => {
                return Err(RPCError::Timeout(Timeout {
                    action,
                    id: self.network.me,
                    target: self.target,
                    timeout: option.hard_ttl(),
                }));
            }
            Err(error @ RaftCallError::Refused { .. }) => {
                return Err(RPCError::Network(NetworkError::new(&error)));
            }
        };
        let mut heard = self.network.heard.lock();
        heard.insert(self.target, Instant::now());
        drop(heard);
        let answer: Result<A, E> = decode(&reply)
            .map_err(|error| RPCError::Network(NetworkError::new(&AnyError::new(&error))))?;
        answer.map_err(|error| RPCError::RemoteError(RemoteError::new(self.target, error)))
    }
}

impl RaftNetwork<TypeConfig> for Connection {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Appended {
        if rpc.entries.is_empty() && self.notices.keep(&rpc, &self.way) {
            return Ok(AppendEntriesResponse::Success);
        }
        let began = Instant::now();
        let (told, answer) = self.way.append(rpc, &option).await;
        if matches!(answer, Ok(AppendEntriesResponse::Success)) {
            self.notices.answered(began, told);
        }
        answer
    }

    async fn install_snapshot(
        &mut self,
        rpc: InstallSnapshotRequest<TypeConfig>,
        _: RPCOption,
    ) -> CallResult<InstallSnapshotResponse<u64>, RaftError<u64, InstallSnapshotError>> {
        // The other end reads a whole snapshot before it answers the last chunk: it is asked again until it has.
        let call = RPCOption::new(SNAPSHOT_CALL);
        loop {
            let sent = self.way.call(
                RaftRpc::Snapshot,
                encode(&rpc),
                &call,
                RPCTypes::InstallSnapshot,
            );
            match sent.await {
                Err(RPCError::Timeout(_)) if rpc.done => {}
                Err(error @ RPCError::Network(_)) if rpc.done => {
                    // It did not verify there. Before the last chunk a refusal says only: later.
                    self.way.machine.doubt_snapshot();
                    return Err(error);
                }
                ended => return ended,
            }
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<u64>,
        option: RPCOption,
    ) -> CallResult<VoteResponse<u64>, RaftError<u64>> {
        self.way
            .call(RaftRpc::Vote, encode(&rpc), &option, RPCTypes::Vote)
            .await
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY))
    }
}

/// Takes what peers send.
#[derive(Clone)]
pub struct Inbound {
    raft: Raft,
    receiving: Receiving,
    said: Arc<Mutex<Option<Instant>>>,
    spoken: Spoken,
    consensus: Consensus,
    network: Network,
    log: LogStore,
}

impl Inbound {
    /// Hands it to this Raft, which keeps this log.
    pub fn new(raft: Raft, consensus: Consensus, network: Network, log: LogStore) -> Self {
        let machine = consensus.machine().clone();
        Self {
            receiving: Receiving::new(raft.clone(), machine),
            said: Arc::default(),
            raft,
            consensus,
            network,
            log,
            spoken: Spoken::default(),
        }
    }

    /// Says now and then that a leader's entries cannot be taken: nothing is guessed, this node stays where it is.
    fn say_unknown(&self, from: MetadId, error: &str) {
        let mut said = self.said.lock();
        if said.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
            *said = Some(Instant::now());
            tracing::error!(%from, %error, "the leader's entries are refused; this metad stays behind until it is upgraded");
        }
    }

    /// When each peer spoke last as leader.
    pub fn spoken(&self) -> &Spoken {
        &self.spoken
    }
}

impl Inbound {
    /// A node that was removed does not know it, and must not unsettle those who are left. (What it sends as leader is of an old term.)
    fn check_member(&self, from: MetadId) -> Result<(), String> {
        let machine = self.consensus.machine();
        let removed = machine.read(|state| state.was_removed(from));
        if removed.map_err(|error| error.to_string())? {
            return Err(format!("metad {from} was removed from the cluster"));
        }
        Ok(())
    }
}

/// The node in whose name a request speaks must be the one that sent it.
fn check_sender(from: MetadId, vote: &crate::raft::Vote) -> Result<(), String> {
    match vote.leader_id().voted_for() {
        Some(claimed) if claimed != from.0 => {
            Err(format!("metad {from} spoke in the name of metad {claimed}"))
        }
        _ => Ok(()),
    }
}

#[async_trait]
impl RaftTransport for Inbound {
    async fn handle(&self, from: MetadId, rpc: RaftRpc, payload: Bytes) -> Result<Bytes, String> {
        let text = |error: PayloadError| error.to_string();
        match rpc {
            RaftRpc::Append => {
                // The peer's certificate and the version verified: what does not decode is of a newer program.
                let body = body_of(&payload).map_err(text)?;
                let mut request = decode_append(&body)
                    .map_err(|error| unknown_entry(&error.to_string()))
                    .inspect_err(|error| self.say_unknown(from, error))?;
                check_sender(from, &request.vote)?;
                self.spoken.note(from.0);
                let machine = self.consensus.machine();
                let (program, sizes) = (machine.ground().program, machine.ground().sizes);
                let mut entries = request.entries.iter();
                let known = entries.try_for_each(|entry| program.check(entry));
                if let Err(error) = &known {
                    self.say_unknown(from, error);
                    // Of what it holds it still hears how much is committed.
                    request.entries.clear();
                }
                let most = sizes.applied_at_once;
                self.log.hold_commit(&mut request, machine.applied(), most);
                let answer = self.raft.append_entries(request).await;
                known?;
                Ok(encode(&answer))
            }
            RaftRpc::Vote => {
                let request: VoteRequest<u64> = decode(&payload).map_err(text)?;
                check_sender(from, &request.vote)?;
                self.check_member(from)?;
                Ok(encode(&self.raft.vote(request).await))
            }
            RaftRpc::Snapshot => {
                let request: InstallSnapshotRequest<TypeConfig> = decode(&payload).map_err(text)?;
                check_sender(from, &request.vote)?;
                Ok(encode(&self.receiving.take(from, request).await?))
            }
            RaftRpc::ReadIndex => {
                let facts: String = decode(&payload).map_err(text)?;
                let facts = serde_json::from_str(&facts).map_err(|error| error.to_string())?;
                self.check_member(from)?;
                self.network.heard_facts(from, facts);
                let index = self.consensus.barrier().await;
                Ok(encode(&index.map_err(|error| error.to_string())?))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::Vote;

    /// The certificate says who speaks (proto's tests); here it must be the one in whose name the message speaks.
    #[test]
    fn a_metad_that_speaks_in_the_name_of_another_is_refused() {
        assert!(check_sender(MetadId(2), &Vote::new(5, 2)).is_ok());
        assert!(check_sender(MetadId(2), &Vote::new_committed(5, 2)).is_ok());
        for vote in [Vote::new(5, 3), Vote::new_committed(5, 3)] {
            let refused = check_sender(MetadId(2), &vote);
            assert!(refused.is_err_and(|text| text.contains("in the name of metad 3")));
        }
    }
}
