//! Proposals that arrive while others are under way share one log entry.
//!
//! ```text
//! propose -> queue -> group -> one log entry -> one fdatasync on every node -> one answer each
//! ```
//!
//! An entry of its own for every proposal would cost a write, a message to each follower, a sync and several turns of openraft's loop each.
//! So one group is under way at a time; whatever arrives meanwhile goes as the next one. Several at once would overlap a little better and
//! be smaller: on busy cores they cost more than they gain (8 callers 5,700 commits/s with one, 5,050 with two; 256 callers 15,300 and
//! 13,700; `commit_speed -- --seconds 2`, one run each of an earlier build). What is answered is unchanged: a proposal is answered after its group is applied, hence durable on a majority.

use super::DEADLINE;
use super::returning::Returning;
use crate::raft::proposed::Proposed;
use crate::raft::{Raft, TypeConfig};
use crate::state::Outcome;
use crate::state::command::{Command, Entry, Reply};
use openraft::error::{ClientWriteError, Fatal};
use openraft::raft::ClientWriteResult;
use qsfs_proto::api::MetadError;
use qsfs_proto::server::CallError;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::{sleep, timeout};

/// Proposals waiting for a group; more wait to be queued, within their deadline.
const WAITING_MAX: usize = 4_096;

/// Proposals of one group.
const GROUP_ENTRIES_MAX: usize = 512;

/// Encoded bytes of a group, unless its only proposal is larger: far below a log frame's and a message's limit.
const GROUP_BYTES_MAX: usize = 1 << 20;

/// Whatever is under way for longer (no majority answers) does not hold up the next group. Raft may even never answer: when a snapshot
/// brought what was proposed.
const PATIENCE: Duration = Duration::from_millis(500);

/// Longest wait for callers who propose again as soon as they are answered; see [`Returning`].
const RETURN: Duration = Duration::from_millis(1);

/// What a group has around its proposals.
const GROUP_HEAD_BYTES: usize = 32;

type Answer = Result<Reply, CallError>;

struct Proposal {
    entry: Entry,
    answer: oneshot::Sender<Answer>,
}

/// Hands proposals to the task that groups them.
#[derive(Clone)]
pub(super) struct Proposer {
    raft: Raft,
    queue: mpsc::Sender<Proposal>,
    /// Held by what is under way, for [`PATIENCE`] at most.
    place: Arc<Mutex<()>>,
    /// The newest group was of one proposal.
    lonely: Arc<AtomicBool>,
}

fn stopping() -> CallError {
    MetadError::Unknown("this node is stopping".into()).into()
}

impl Proposer {
    /// Starts the task; it ends with the last clone.
    pub(super) fn start(raft: Raft) -> Self {
        let (queue, waiting) = mpsc::channel(WAITING_MAX);
        let proposer = Self {
            raft,
            queue,
            place: Arc::default(),
            lonely: Arc::new(AtomicBool::new(true)),
        };
        let grouping = Grouping {
            raft: proposer.raft.clone(),
            waiting,
            held_back: None,
            place: Arc::clone(&proposer.place),
            lonely: Arc::clone(&proposer.lonely),
        };
        tokio::spawn(grouping.run());
        proposer
    }

    /// Proposes and waits until it is applied. Who stops waiting does not take the proposal back.
    pub(super) async fn propose(&self, entry: Entry) -> Answer {
        if self.lonely.load(Ordering::Relaxed)
            && let Ok(place) = self.place.try_lock()
        {
            // Nothing is under way, and nobody else seems to propose: the shortest way.
            let mut written = pin!(written(self.raft.client_write_ff(entry.into()).await));
            if let Ok(result) = timeout(PATIENCE, &mut written).await {
                return one(result);
            }
            drop(place);
            return one(written.await);
        }
        let (answer, wait) = oneshot::channel();
        let proposal = Proposal { entry, answer };
        // Not queued, not proposed.
        let refused = |_| MetadError::NoQuorum("this node is stopping".into());
        self.queue.send(proposal).await.map_err(refused)?;
        wait.await.map_err(|_| stopping())?
    }
}

/// What goes together.
struct Group {
    proposals: Vec<Proposal>,
    bytes: usize,
}

/// The task that groups.
struct Grouping {
    raft: Raft,
    waiting: mpsc::Receiver<Proposal>,
    /// What did not fit into the group before.
    held_back: Option<Proposal>,
    place: Arc<Mutex<()>>,
    lonely: Arc<AtomicBool>,
}

impl Grouping {
    async fn run(mut self) {
        let mut returning = Returning::default();
        // How many the newest group answered, and how many waited then.
        let (mut answered, mut backlog) = (0, 0);
        while let Some(first) = self.next().await {
            let place = Arc::clone(&self.place);
            // Whatever arrives while this waits joins the group.
            let under_way = place.lock().await;
            // Answers go out together, so that proposals come in together: those that have arrived already are read first.
            tokio::task::yield_now().await;
            let mut group = Group {
                bytes: encoded_bytes(&first.entry),
                proposals: vec![first],
            };
            self.gather(&mut group);
            let expected = returning.expected(answered);
            if expected > 0 {
                let all = self.await_more(&mut group, backlog + expected).await;
                returning.waited(all);
            }
            // Whose caller has given up is not proposed any more.
            let is_open = |proposal: &Proposal| !proposal.answer.is_closed();
            group.proposals.retain(is_open);
            let (asked, left) = (group.proposals.len(), self.waiting.len());
            if asked > 0 {
                self.lonely.store(asked == 1, Ordering::Relaxed);
                self.propose(group).await;
            }
            if expected == 0 && answered > 0 {
                returning.seen(self.waiting.len().saturating_sub(left) >= answered);
            }
            answered = asked;
            backlog = self.waiting.len() + usize::from(self.held_back.is_some());
            drop(under_way);
        }
    }

    async fn next(&mut self) -> Option<Proposal> {
        match self.held_back.take() {
            Some(proposal) => Some(proposal),
            None => self.waiting.recv().await,
        }
    }

    /// There is room for more.
    fn has_room(&self, group: &Group) -> bool {
        self.held_back.is_none() && group.proposals.len() < GROUP_ENTRIES_MAX
    }

    fn add(&mut self, group: &mut Group, next: Proposal) {
        let bytes = encoded_bytes(&next.entry);
        if group.bytes + bytes > GROUP_BYTES_MAX {
            self.held_back = Some(next);
        } else {
            group.bytes += bytes;
            group.proposals.push(next);
        }
    }

    /// Takes what is there.
    fn gather(&mut self, group: &mut Group) {
        while self.has_room(group)
            && let Ok(next) = self.waiting.try_recv()
        {
            self.add(group, next);
        }
    }

    /// Waits until a group is so large, for [`RETURN`] at most. Did it become so?
    async fn await_more(&mut self, group: &mut Group, proposals: usize) -> bool {
        let mut end = pin!(sleep(RETURN));
        while group.proposals.len() < proposals && self.has_room(group) {
            tokio::select! {
                biased;
                next = self.waiting.recv() => match next {
                    Some(next) => self.add(group, next),
                    None => return false,
                },
                () = &mut end => return false,
            }
        }
        true
    }

    /// Proposes it and answers everyone; after [`PATIENCE`] aside.
    async fn propose(&self, group: Group) {
        let room = group.bytes + GROUP_HEAD_BYTES;
        let (entry, answers) = merge(group.proposals);
        let submitted = self.raft.client_write_ff(Proposed::new(entry, room)).await;
        let mut written = Box::pin(written(submitted));
        match timeout(PATIENCE, &mut written).await {
            Ok(result) => deliver(result, answers),
            Err(_) => drop(tokio::spawn(async move {
                if let Ok(result) = timeout(DEADLINE, written).await {
                    deliver(result, answers);
                }
            })),
        }
    }
}

type Submitted = Result<oneshot::Receiver<ClientWriteResult<TypeConfig>>, Fatal<u64>>;

/// What became of an entry that was handed to Raft.
async fn written(submitted: Submitted) -> Result<Option<Outcome>, CallError> {
    let unknown = |text: String| CallError::from(MetadError::Unknown(text));
    let receiver = submitted.map_err(|fatal| unknown(fatal.to_string()))?;
    match receiver.await.map_err(|_| stopping())? {
        Ok(response) => Ok(response.data.0),
        Err(ClientWriteError::ForwardToLeader(forward)) => Err(CallError::NotLeader {
            leader: forward.leader_node.map(|node| node.addr),
        }),
        Err(error) => Err(unknown(error.to_string())),
    }
}

/// The answer to an entry of one proposal.
fn one(result: Result<Option<Outcome>, CallError>) -> Answer {
    match result? {
        Some(outcome) => outcome.map_err(CallError::Decided),
        None => Err(MetadError::Unknown("the entry carried no command".into()).into()),
    }
}

fn encoded_bytes(entry: &Entry) -> usize {
    postcard::experimental::serialized_size(entry).unwrap_or(GROUP_BYTES_MAX)
}

/// One entry for all; a proposal that is alone stays as it is.
fn merge(proposals: Vec<Proposal>) -> (Entry, Vec<oneshot::Sender<Answer>>) {
    let (mut entries, answers): (Vec<_>, Vec<_>) = proposals
        .into_iter()
        .map(|proposal| (proposal.entry, proposal.answer))
        .unzip();
    if entries.len() == 1 {
        return (entries.remove(0), answers);
    }
    let newest_ms = entries.iter().map(|entry| entry.time_ms).max();
    let group = Entry::internal(newest_ms.unwrap_or(0), Command::Group(entries));
    (group, answers)
}

/// Everyone gets their own; a caller that went away does not wait any more.
fn deliver(result: Result<Option<Outcome>, CallError>, answers: Vec<oneshot::Sender<Answer>>) {
    match result {
        Ok(Some(Ok(Reply::Group(outcomes)))) if outcomes.len() == answers.len() => {
            for (outcome, answer) in outcomes.into_iter().zip(answers) {
                drop(answer.send(outcome.map_err(CallError::Decided)));
            }
        }
        other => {
            let same = one(other);
            for answer in answers {
                drop(answer.send(same.clone()));
            }
        }
    }
}
