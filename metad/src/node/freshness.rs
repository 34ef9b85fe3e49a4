//! How old what this node has applied may be, at most.
//!
//! Every second the node asks the leader up to where everything is committed, which the leader answers after a majority confirmed that
//! it leads; once that much is applied here, this node was up to date at the moment *before it asked*. So the age is an upper
//! bound by this node's own clock alone: neither a leader that was deposed without knowing it nor a message that was long under
//! way can make it too small.

use super::consensus::Consensus;
use super::facts::cluster_level;
use super::network::Network;
use parking_lot::Mutex;
use qsfs_zstor::id::MetadId;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Between two questions.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Longest wait for an answer, and then for its index to be applied.
const ASK_DEADLINE: Duration = Duration::from_secs(3);

/// When this node was known to be up to date.
#[derive(Debug, Clone, Default)]
pub struct Fresh {
    at: Arc<Mutex<Option<Instant>>>,
}

impl Fresh {
    /// How old what is applied here is at most; `None`: it has not been up to date since the node was started.
    pub fn age(&self) -> Option<Duration> {
        (*self.at.lock()).map(|at| at.elapsed())
    }

    pub(super) fn up_to_date_at(&self, asked: Instant) {
        let mut at = self.at.lock();
        *at = (*at).max(Some(asked));
    }
}

/// Asks until `stop`.
pub(super) async fn run(
    consensus: Consensus,
    network: Network,
    fresh: Fresh,
    stop: CancellationToken,
) {
    loop {
        let asked = Instant::now();
        if consensus.leads() {
            let rows = consensus.machine().read(|state| state.members());
            let members = rows.unwrap_or_default();
            let levels = members.iter().map(|row| network.facts_of(row.id));
            let level = cluster_level(levels.map(|facts| Some(facts?.feature_level)));
            consensus.set_cluster_level(level);
        }
        if let Ok(Some(index)) = timeout(ASK_DEADLINE, committed(&consensus, &network)).await {
            let mut applied = consensus.machine().applied_index();
            let reached = timeout(ASK_DEADLINE, applied.wait_for(|applied| *applied >= index));
            if matches!(reached.await, Ok(Ok(_))) {
                fresh.up_to_date_at(asked);
            }
        }
        tokio::select! {
            () = sleep(ASK_EVERY) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Up to where is everything committed?
async fn committed(consensus: &Consensus, network: &Network) -> Option<u64> {
    if consensus.leads() {
        return consensus.barrier().await.ok();
    }
    let (leader, address) = {
        let metrics = consensus.raft().metrics();
        let metrics = metrics.borrow();
        let leader = metrics.current_leader?;
        let node = metrics.membership_config.membership().get_node(&leader)?;
        (leader, node.addr.clone())
    };
    let asked = network.read_index(MetadId(leader), &address, ASK_DEADLINE);
    asked.await.ok()
}
