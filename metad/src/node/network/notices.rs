//! What is committed is told to a follower together with the next entries, or alone after a lull.
//!
//! openraft makes a message of its own of every commit and sends no entries to that follower before its answer: twice the messages, and
//! whoever proposes meanwhile waits. A message without entries to a follower that has just answered is therefore kept, and openraft
//! told that it was answered. The next entries carry what it said; if none come within [`LULL`], it is sent after all.
//!
//! What this makes openraft believe too much: that the follower has acknowledged this leader up to a lull later than it did, which it
//! only shows as a number. Rounds of heartbeats for readers have a connection of their own each, which never
//! was answered before: they are always sent.

use super::WayTo;
use crate::raft::{LogId, TypeConfig};
use openraft::network::RPCOption;
use openraft::raft::AppendEntriesRequest;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

/// Longest time for which a message without entries is kept.
pub(super) const LULL: Duration = Duration::from_millis(5);

/// The deadline of one that is sent at last.
const DEADLINE: Duration = Duration::from_millis(super::super::HEARTBEAT_MS);

/// Of one replication to one follower.
#[derive(Default)]
pub(super) struct Notices {
    /// When the newest request that was answered was sent.
    answered: Option<Instant>,
    kept: Arc<Kept>,
    telling: Option<AbortOnDropHandle<()>>,
}

#[derive(Default)]
struct Kept {
    /// The newest one, and since when one is kept.
    newest: Mutex<Option<(Instant, AppendEntriesRequest<TypeConfig>)>>,
    filled: Notify,
}

impl Notices {
    /// Keeps a message without entries, if the follower has just answered. Otherwise it has to be sent now.
    pub(super) fn keep(
        &mut self,
        request: &AppendEntriesRequest<TypeConfig>,
        way: &Arc<WayTo>,
    ) -> bool {
        if self.answered.is_none_or(|at| at.elapsed() >= LULL) {
            return false;
        }
        let copy = AppendEntriesRequest {
            vote: request.vote,
            prev_log_id: request.prev_log_id,
            entries: Vec::new(),
            leader_commit: request.leader_commit,
        };
        let mut newest = self.kept.newest.lock();
        let since = newest.as_ref().map(|(since, _)| *since);
        *newest = Some((since.unwrap_or_else(Instant::now), copy));
        drop(newest);
        if since.is_none() {
            self.kept.filled.notify_one();
        }
        if self.telling.is_none() {
            let telling = tell(Arc::clone(&self.kept), Arc::clone(way));
            self.telling = Some(AbortOnDropHandle::new(tokio::spawn(telling)));
        }
        true
    }

    /// A request sent at that time was answered; it told that so much is committed.
    pub(super) fn answered(&mut self, sent: Instant, told: Option<LogId>) {
        self.answered = Some(sent);
        let mut newest = self.kept.newest.lock();
        if newest
            .as_ref()
            .is_some_and(|(_, kept)| kept.leader_commit <= told)
        {
            *newest = None;
        }
    }
}

/// Sends what was kept for a lull. Its answer is of no use: whatever is amiss, the next request meets it too.
async fn tell(kept: Arc<Kept>, way: Arc<WayTo>) {
    loop {
        kept.filled.notified().await;
        loop {
            let since = kept.newest.lock().as_ref().map(|(since, _)| *since);
            let Some(due) = since.map(|since| since + LULL) else {
                break;
            };
            if Instant::now() < due {
                sleep_until(due).await;
                continue;
            }
            let request = kept.newest.lock().take();
            if let Some((_, request)) = request {
                drop(way.append(request, &RPCOption::new(DEADLINE)).await);
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::{Network, Way};
    use super::*;
    use crate::ground::Ground;
    use crate::log::storage::LogStore;
    use crate::machine::Machine;
    use crate::raft::Vote;
    use async_trait::async_trait;
    use openraft::CommittedLeaderId;
    use qsfs_proto::dial::{ByteStream, Dial};
    use qsfs_zstor::id::MetadId;
    use std::io;
    use std::sync::OnceLock;

    /// Says that it was asked, and connects to nobody.
    struct Asked(Notify);

    #[async_trait]
    impl Dial for Asked {
        async fn dial(&self, _: &str) -> io::Result<Box<dyn ByteStream>> {
            self.0.notify_one();
            Err(io::ErrorKind::ConnectionRefused.into())
        }
    }

    fn committed(index: u64) -> AppendEntriesRequest<TypeConfig> {
        AppendEntriesRequest {
            vote: Vote::new_committed(1, 1),
            prev_log_id: None,
            entries: Vec::new(),
            leader_commit: Some(LogId::new(CommittedLeaderId::new(1, 1), index)),
        }
    }

    #[tokio::test]
    async fn what_is_committed_is_told_with_the_next_entries_or_after_a_lull() {
        let asked = Arc::new(Asked(Notify::new()));
        let dir = tempfile::tempdir().unwrap();
        let way = Arc::new(WayTo {
            network: Network::new(Way::Over(asked.clone()), MetadId(1)),
            target: 2,
            address: "peer:1".into(),
            log: LogStore::open(&Ground::real(), &dir.path().join("log")).unwrap(),
            machine: Machine::open(dir.path()).unwrap(),
            bulk: OnceLock::new(),
        });
        let mut notices = Notices::default();
        // A machine may be too slow for a lull: the answers of this test are from the future.
        let soon = Instant::now() + Duration::from_secs(600);
        assert!(!notices.keep(&committed(3), &way), "it never answered");
        notices.answered(soon, committed(2).leader_commit);
        assert!(notices.keep(&committed(3), &way));
        // Entries told it.
        notices.answered(soon, committed(3).leader_commit);
        assert!(notices.kept.newest.lock().is_none());
        // Entries told less, as when the leader's own disk is behind.
        assert!(notices.keep(&committed(4), &way));
        notices.answered(soon, committed(3).leader_commit);
        // So it is sent by itself.
        let told = tokio::time::timeout(Duration::from_secs(60), asked.0.notified());
        assert!(told.await.is_ok());
        notices.answered(Instant::now() - LULL, None);
        assert!(!notices.keep(&committed(5), &way), "the answer is too old");
    }
}
