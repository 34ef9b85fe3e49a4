//! Finds out early that the leader is dead.
//!
//! openraft waits out a lease and an election timeout, and looks at them only every 225 ms: a second or two in all when votes split. But
//! a process that is gone is told from one that is slow or cut off: its machine refuses connections to it. So a voter to whom the leader
//! has not spoken for `SILENCE` knocks at the leader's address. Only if that is *refused* it asks for votes as soon as the others'
//! lease of the dead leader is over; voters do so in the order of their ids, far enough apart that the first one wins.
//!
//! A busy leader's machine accepts connections for it, and a machine that is gone refuses nothing: both are left to openraft's timeouts. A
//! wrong guess would cost one election, as any does; who may lead is still decided by votes.

use crate::raft::Raft;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// A leader that sent nothing for so long, two heartbeats, is knocked at.
const SILENCE: Duration = Duration::from_millis(300);
/// A connection that is neither made nor refused in this time says nothing.
const KNOCK: Duration = Duration::from_millis(200);
/// After so much silence the others' lease (450 ms) is over, even if the leader's last message reached them somewhat later.
const LEASE_OVER: Duration = Duration::from_millis(500);
/// From one voter's turn to the next one's: longer than an election takes.
const TURN: Duration = Duration::from_millis(150);
/// After an election was asked for, openraft's timeouts have the word for so long.
const PATIENCE: Duration = Duration::from_secs(1);

/// When each node spoke last as leader. Clones share it.
#[derive(Debug, Clone)]
pub struct Spoken {
    since: Instant,
    last: Arc<Mutex<BTreeMap<u64, Instant>>>,
}

impl Default for Spoken {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            last: Arc::default(),
        }
    }
}

impl Spoken {
    /// It spoke just now.
    pub fn note(&self, leader: u64) {
        self.last.lock().insert(leader, Instant::now());
    }

    fn silent_for(&self, leader: u64) -> Duration {
        let last = self.last.lock().get(&leader).copied();
        last.unwrap_or(self.since).elapsed()
    }
}

/// The leader that this voter follows.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Followed {
    leader: u64,
    address: String,
    term: u64,
    /// How many other voters have their turn before this one.
    rank: u32,
}

/// `None` for a leader, a learner, and while nobody leads.
fn followed(raft: &Raft) -> Option<Followed> {
    let metrics = raft.metrics();
    let metrics = metrics.borrow();
    let membership = metrics.membership_config.membership();
    let leader = metrics.current_leader.filter(|id| *id != metrics.id)?;
    Some(Followed {
        leader,
        address: membership.get_node(&leader)?.addr.clone(),
        term: metrics.current_term,
        rank: rank(membership.voter_ids(), metrics.id, leader)?,
    })
}

fn rank(voters: impl Iterator<Item = u64>, own: u64, leader: u64) -> Option<u32> {
    let mut others: Vec<u64> = voters.filter(|id| *id != leader).collect();
    others.sort_unstable();
    u32::try_from(others.iter().position(|id| *id == own)?).ok()
}

/// Is it certain that nobody listens there?
async fn refuses(address: &str) -> bool {
    match timeout(KNOCK, TcpStream::connect(address)).await {
        Ok(Err(error)) => error.kind() == ErrorKind::ConnectionRefused,
        Ok(Ok(_)) | Err(_) => false,
    }
}

/// How long to wait still before this voter's turn.
fn wait_for_turn(silent: Duration, rank: u32) -> Duration {
    (LEASE_OVER + TURN * rank).saturating_sub(silent)
}

/// Runs until `stop`.
pub(crate) async fn run(raft: Raft, spoken: Spoken, stop: CancellationToken) {
    stop.run_until_cancelled(async {
        loop {
            sleep(LOOK).await;
            if let Some(dead) = find_dead(&raft, &spoken).await {
                tracing::info!(leader = dead.leader, "the leader is gone; asking for votes");
                if let Err(error) = raft.trigger().elect().await {
                    tracing::debug!(%error, "raft has stopped");
                }
                sleep(PATIENCE).await;
            }
        }
    })
    .await;
}

/// A leader that is gone, when it is this voter's turn to replace it.
async fn find_dead(raft: &Raft, spoken: &Spoken) -> Option<Followed> {
    let found = followed(raft)?;
    let is_silent = || spoken.silent_for(found.leader) >= SILENCE;
    if !is_silent() || !refuses(&found.address).await {
        return None;
    }
    sleep(wait_for_turn(spoken.silent_for(found.leader), found.rank)).await;
    // Meanwhile another may have been elected, or voted for.
    let same = followed(raft).as_ref() == Some(&found);
    (same && is_silent()).then_some(found)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_who_is_not_there_refuses() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        // Nobody accepts, as when the process is busy or stopped.
        assert!(!refuses(&address).await);
        drop(listener);
        assert!(refuses(&address).await);
        assert!(!refuses("not an address").await);
    }

    #[test]
    fn voters_have_their_turns_one_after_the_other_and_none_within_the_lease() {
        let voters = || [5, 3, 9].into_iter();
        assert_eq!(rank(voters(), 5, 3), Some(0));
        assert_eq!(rank(voters(), 9, 3), Some(1));
        assert_eq!(rank(voters(), 9, 5), Some(1));
        assert_eq!(rank(voters(), 4, 5), None, "a learner");
        let lease = Duration::from_millis(crate::node::ELECTION_MS.1);
        for silent_ms in [300, 440, 700] {
            let silent = Duration::from_millis(silent_ms);
            let [first, second] = [0, 1].map(|rank| silent + wait_for_turn(silent, rank));
            assert!(first > lease && second >= first);
            assert!(silent > LEASE_OVER || second == first + TURN);
        }
    }
}
