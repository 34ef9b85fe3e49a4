//! Proposals that arrive while others are under way share one log entry.
//!
//! ```text
//! propose -> queue -> group -> one log entry -> one fdatasync on every node -> one answer each
//! ```
//!
//! An entry of its own for every proposal would cost a write, a turn of openraft's loop and an apply each. Up to [`GROUPS_MAX`] groups are
//! under way; whatever arrives while all are waits for the first that ends and goes as one. What is answered is unchanged: a
//! proposal is answered after its group is applied, hence durable on a majority.

use crate::raft::{Raft, TypeConfig};
use crate::state::Outcome;
use crate::state::command::{Command, Entry, Reply};
use openraft::error::{ClientWriteError, Fatal};
use openraft::raft::ClientWriteResult;
use qsfs_proto::api::MetadError;
use qsfs_proto::server::CallError;
use std::sync::Arc;
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Proposals waiting for a group; more wait to be queued, within their deadline.
const WAITING_MAX: usize = 4_096;

/// Proposals of one group.
const GROUP_ENTRIES_MAX: usize = 512;

/// Encoded bytes of a group, unless its only proposal is larger: far below a log frame's and a message's limit.
const GROUP_BYTES_MAX: usize = 1 << 20;

/// Groups under way at once. Eight callers commit a third more with 8 than with 2; 64 and 256 do not care.
const GROUPS_MAX: usize = 8;

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
    places: Arc<Semaphore>,
}

fn stopping() -> CallError {
    MetadError::Unknown("this node is stopping".into()).into()
}

impl Proposer {
    /// Starts the task; it ends with the last clone.
    pub(super) fn start(raft: Raft) -> Self {
        let (queue, waiting) = mpsc::channel(WAITING_MAX);
        let places = Arc::new(Semaphore::new(GROUPS_MAX));
        tokio::spawn(group(raft.clone(), waiting, Arc::clone(&places)));
        Self {
            raft,
            queue,
            places,
        }
    }

    /// Proposes and waits until it is applied. Who stops waiting does not take the proposal back.
    pub(super) async fn propose(&self, entry: Entry) -> Answer {
        // The semaphore is fair: a place is free here only if no group waits for one.
        if let Ok(_place) = self.places.try_acquire() {
            let submitted = self.raft.client_write_ff(entry.into()).await;
            return one(written(submitted).await);
        }
        let (answer, wait) = oneshot::channel();
        let proposal = Proposal { entry, answer };
        // Not queued, not proposed.
        let refused = |_| MetadError::NoQuorum("this node is stopping".into());
        self.queue.send(proposal).await.map_err(refused)?;
        wait.await.map_err(|_| stopping())?
    }
}

async fn group(raft: Raft, mut waiting: mpsc::Receiver<Proposal>, places: Arc<Semaphore>) {
    let mut held_back: Option<Proposal> = None;
    loop {
        let first = match held_back.take() {
            Some(proposal) => proposal,
            None => match waiting.recv().await {
                Some(proposal) => proposal,
                None => return,
            },
        };
        // Whatever arrives while this waits joins the group.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let mut bytes = encoded_bytes(&first.entry);
        let mut proposals = vec![first];
        while proposals.len() < GROUP_ENTRIES_MAX
            && let Ok(next) = waiting.try_recv()
        {
            bytes += encoded_bytes(&next.entry);
            if bytes > GROUP_BYTES_MAX {
                held_back = Some(next);
                break;
            }
            proposals.push(next);
        }
        // Whose caller has given up is not proposed any more.
        proposals.retain(|proposal| !proposal.answer.is_closed());
        if proposals.is_empty() {
            continue;
        }
        let raft = raft.clone();
        let (entry, answers) = merge(proposals);
        // Submitted here, so that groups enter the log in the order of their proposals; awaited aside.
        let submitted = raft.client_write_ff(entry.into()).await;
        tokio::spawn(async move {
            let result = written(submitted).await;
            drop(place);
            deliver(result, answers);
        });
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
