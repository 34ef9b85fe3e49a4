//! Three nodes in one process, one of whose disks hangs and fails.
#![expect(
    clippy::result_large_err,
    reason = "openraft's errors are as large as they are"
)]

use super::hanging::HangingMedia;
use super::proposal;
use crate::ground::Ground;
use crate::log::gate::Gated;
use crate::log::storage::LogStore;
use crate::machine::Machine;
use crate::node::raft_config;
use crate::raft::{Raft, TypeConfig};
use openraft::error::{InstallSnapshotError, RPCError, RaftError, RemoteError, Unreachable};
use openraft::network::{RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use openraft::{AnyError, BasicNode};
use parking_lot::Mutex;
use qsfs_zdb::media::DiskMedia;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);

type Registry = Arc<Mutex<BTreeMap<u64, Raft>>>;

/// Function calls instead of sockets; what a leader sends passes its log as in the real network.
#[derive(Clone)]
struct Wire {
    log: LogStore,
    registry: Registry,
    target: u64,
}

type Called<A, E = RaftError<u64>> = Result<A, RPCError<u64, BasicNode, E>>;

impl Wire {
    fn peer<E: std::error::Error>(&self) -> Result<Raft, RPCError<u64, BasicNode, E>> {
        let found = self.registry.lock().get(&self.target).cloned();
        found.ok_or_else(|| {
            RPCError::Unreachable(Unreachable::new(&AnyError::error("it is not there")))
        })
    }

    fn remote<A, E: std::error::Error>(&self, answer: Result<A, E>) -> Called<A, E> {
        answer.map_err(|error| RPCError::RemoteError(RemoteError::new(self.target, error)))
    }
}

impl RaftNetworkFactory<TypeConfig> for Wire {
    type Network = Self;

    async fn new_client(&mut self, target: u64, _: &BasicNode) -> Self {
        Self {
            target,
            ..self.clone()
        }
    }
}

impl RaftNetwork<TypeConfig> for Wire {
    async fn append_entries(
        &mut self,
        mut rpc: AppendEntriesRequest<TypeConfig>,
        _: RPCOption,
    ) -> Called<AppendEntriesResponse<u64>> {
        if let Err(silent) = self.log.hold_back(&mut rpc) {
            return Err(RPCError::Unreachable(Unreachable::new(&silent)));
        }
        self.remote(self.peer()?.append_entries(rpc).await)
    }

    async fn install_snapshot(
        &mut self,
        rpc: InstallSnapshotRequest<TypeConfig>,
        _: RPCOption,
    ) -> Called<InstallSnapshotResponse<u64>, RaftError<u64, InstallSnapshotError>> {
        self.remote(self.peer()?.install_snapshot(rpc).await)
    }

    async fn vote(&mut self, rpc: VoteRequest<u64>, _: RPCOption) -> Called<VoteResponse<u64>> {
        self.remote(self.peer()?.vote(rpc).await)
    }
}

struct Node {
    id: u64,
    media: HangingMedia,
    log: LogStore,
    machine: Machine,
    raft: Raft,
    _dir: tempfile::TempDir,
}

impl Node {
    async fn start(id: u64, registry: &Registry) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let media = HangingMedia::over(Arc::new(DiskMedia));
        let ground = Ground {
            media: Arc::new(media.clone()),
            ..Ground::real()
        };
        let log = LogStore::open(&ground, &dir.path().join("log"));
        let log = log.unwrap().of_node(id);
        let machine = Machine::open(dir.path()).unwrap();
        let wire = Wire {
            log: log.clone(),
            registry: Arc::clone(registry),
            target: 0,
        };
        let gated = Gated::new(machine.clone(), log.clone());
        let raft = Raft::new(id, raft_config(), wire, log.clone(), gated).await;
        let raft = raft.unwrap();
        registry.lock().insert(id, raft.clone());
        Self {
            id,
            media,
            log,
            machine,
            raft,
            _dir: dir,
        }
    }

    fn leads(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        metrics.running_state.is_ok()
            && metrics.current_leader == Some(self.id)
            && metrics.state == openraft::ServerState::Leader
    }

    fn applied(&self) -> u64 {
        self.machine.raft_row().applied.map_or(0, |id| id.index)
    }

    fn held(&self) -> u64 {
        self.log.bounds().1.map_or(0, |id| id.index)
    }

    async fn write(&self) -> u64 {
        let written = self.raft.client_write(proposal(1).into()).await.unwrap();
        written.log_id.index
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn three() -> Vec<Node> {
    let registry = Registry::default();
    let mut nodes = Vec::new();
    for id in 1..=3 {
        nodes.push(Node::start(id, &registry).await);
    }
    let members: BTreeMap<u64, BasicNode> = (1..=3).map(|id| (id, BasicNode::new(""))).collect();
    nodes[0].raft.initialize(members).await.unwrap();
    until("nobody leads", || nodes.iter().any(Node::leads)).await;
    nodes
}

fn split(nodes: &[Node]) -> (&Node, Vec<&Node>) {
    let leader = nodes.iter().find(|node| node.leads()).unwrap();
    let others = nodes.iter().filter(|node| node.id != leader.id).collect();
    (leader, others)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_disk_hangs_commits_nothing_and_is_replaced_and_nothing_acknowledged_is_lost()
 {
    let nodes = three().await;
    let (leader, others) = split(&nodes);
    let mut acknowledged = leader.write().await;
    for _ in 0..20 {
        acknowledged = acknowledged.max(leader.write().await);
    }

    leader.media.hang();
    let raft = leader.raft.clone();
    let hopeless = tokio::spawn(async move { raft.client_write(proposal(2).into()).await });
    until("the entry does not reach the followers", || {
        others.iter().all(|other| other.held() > acknowledged)
    })
    .await;
    // Both followers hold it durably, and openraft takes it for committed.
    assert!(!hopeless.is_finished());
    until("the leader with the hanging disk is not replaced", || {
        assert_eq!(leader.applied(), acknowledged);
        others.iter().any(|other| other.leads())
    })
    .await;
    assert!(!hopeless.is_finished());

    leader.media.fail();
    until("a failed sync does not stop the node", || {
        leader.raft.metrics().borrow().running_state.is_err()
    })
    .await;
    assert!(hopeless.await.unwrap().is_err());
    assert_eq!(leader.applied(), acknowledged);

    let successor = others.iter().find(|other| other.leads()).unwrap();
    let newest = successor.write().await;
    assert!(newest > acknowledged);
    for index in 0..=acknowledged {
        let entries = successor.log.entries(index).unwrap();
        assert_eq!(entries[0].log_id.index, index);
    }
    until("the other does not follow", || {
        others.iter().all(|other| other.applied() >= newest)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_apply_nothing_that_their_leader_has_not_made_durable() {
    let nodes = three().await;
    let (leader, others) = split(&nodes);
    let acknowledged = leader.write().await;
    until("the followers do not follow", || {
        others.iter().all(|other| other.applied() == acknowledged)
    })
    .await;
    leader.media.hang();
    let raft = leader.raft.clone();
    let write = tokio::spawn(async move { raft.client_write(proposal(2).into()).await });
    until("the entry does not reach the followers", || {
        others.iter().all(|other| other.held() > acknowledged)
    })
    .await;
    // What it says from now on would carry the commit.
    leader.raft.trigger().heartbeat().await.unwrap();
    leader.media.until_one_hangs();
    for node in &nodes {
        assert_eq!(node.applied(), acknowledged);
    }
    leader.media.recover();
    until("it is not applied though it is durable", || {
        nodes.iter().all(|node| node.applied() > acknowledged)
    })
    .await;
    assert!(write.await.unwrap().is_ok());
}
