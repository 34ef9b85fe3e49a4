//! A node without data directory and certificates, on any ground: what simulations run. From the log upwards all is as in a daemon.

use super::facts::NodeFacts;
use super::network::{Network, Way};
use super::{Core, NodeError, Running, start_on, stopped};
use crate::birth;
use crate::ground::Ground;
use crate::log::storage::LogStore;
use crate::machine::Machine;
use crate::node::consensus::Consensus;
use crate::state::command::Genesis;
use qsfs_proto::ca::CertificateAuthority;
use qsfs_proto::dial::Dial;
use qsfs_proto::server::{MetadService, RaftTransport};
use qsfs_zstor::id::{ClusterId, MetadId};
use std::path::PathBuf;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// What a bare node is made of.
pub struct BareOptions {
    /// What it stands on.
    pub ground: Ground,
    /// Where log, state and snapshots are.
    pub dir: PathBuf,
    /// Cluster.
    pub cluster: ClusterId,
    /// Raft id.
    pub id: MetadId,
    /// It has voted before, so a vote that is missing was lost.
    pub took_part: bool,
    /// The way to its peers.
    pub dial: Arc<dyn Dial>,
    /// Signs who joins.
    pub authority: CertificateAuthority,
}

/// A running node. Its tasks end with the runtime, or with [`Self::stop`].
pub struct Bare {
    core: Core,
    running: Running,
    stop: CancellationToken,
}

impl Bare {
    /// Opens log and state and starts Raft and what the service needs.
    pub async fn start(options: BareOptions) -> Result<Self, NodeError> {
        let core = start_on(
            &options.ground,
            &options.dir,
            (options.cluster, options.id),
            options.took_part,
            Network::new(Way::Over(options.dial), options.id),
        )
        .await?;
        let started_ms = options.ground.clock.now_ms();
        let facts = NodeFacts::of(options.ground.program, started_ms);
        core.network.change_own_facts(|own| *own = facts);
        let stop = CancellationToken::new();
        let running = Running::start(&core, options.authority, &stop);
        Ok(Self {
            core,
            running,
            stop,
        })
    }

    /// Makes it the first node of a new cluster.
    pub async fn initialize(&self, genesis: Genesis) -> Result<(), NodeError> {
        birth::begin(&self.core.raft, genesis, self.running.consensus.now_ms()).await
    }

    /// What answers clients.
    pub fn service(&self) -> Arc<dyn MetadService> {
        self.running.service.clone()
    }

    /// What answers peers.
    pub fn transport(&self) -> Arc<dyn RaftTransport> {
        self.running.inbound.clone()
    }

    /// Its log.
    pub fn log(&self) -> &LogStore {
        &self.core.log
    }

    /// Proposals and linearizable reads.
    pub fn consensus(&self) -> &Consensus {
        &self.running.consensus
    }

    /// The state.
    pub fn machine(&self) -> &Machine {
        &self.core.machine
    }

    /// Returns when Raft gives up, with why.
    pub async fn failed(&self) -> String {
        stopped(&self.core).await
    }

    /// Ends its tasks; Raft goes on until the runtime ends.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}
