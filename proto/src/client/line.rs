//! One stream of mutations to one metad node, shared by all callers of a client: what a call costs of its own is a frame each way.

use crate::channel::Versioned;
use crate::client::MUTATIONS_IN_FLIGHT_MAX;
use crate::wire::pb::metad_client::MetadClient as Stub;
use crate::wire::pb::mutate_reply::Kind;
use crate::wire::{pb, status_with};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{OnceCell, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Request, Status, Streaming};

/// A connection that has proven to be a node of our cluster. Clones share it, and its stream of mutations.
#[derive(Clone)]
pub(super) struct Open {
    pub(super) stub: Stub<Versioned>,
    /// `None`: a node of a version that has no such stream.
    line: Arc<OnceCell<Option<Line>>>,
}

impl Open {
    pub(super) fn new(stub: Stub<Versioned>) -> Self {
        Self {
            stub,
            line: Arc::default(),
        }
    }

    /// Sends one mutation and waits for its reply. The caller sets the deadline; `limit` tells it to a node that is asked one by one.
    pub(super) async fn mutate(
        mut self,
        message: pb::MutateRequest,
        limit: Duration,
    ) -> Result<pb::Applied, Status> {
        let stub = self.stub.clone();
        match self.line.get_or_try_init(|| Line::open(stub)).await? {
            Some(line) => line.call(message).await,
            None => {
                let mut request = Request::new(message);
                request.set_timeout(limit);
                Ok(self.stub.mutate(request).await?.into_inner())
            }
        }
    }
}

/// The stream. It ends when this is dropped.
struct Line {
    calls: mpsc::Sender<pb::MutateCall>,
    waiting: Arc<Mutex<Waiting>>,
    _ended: DropGuard,
}

/// Who waits for a reply.
#[derive(Default)]
struct Waiting {
    newest: u64,
    /// `None`: the stream is over.
    replies: Option<HashMap<u64, oneshot::Sender<Kind>>>,
}

/// A call's place among those who wait; given up when dropped, however the call ends.
struct Place<'a> {
    waiting: &'a Mutex<Waiting>,
    call: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(replies) = &mut lock(self.waiting).replies {
            replies.remove(&self.call);
        }
    }
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    // No step under the lock can leave it half done.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

fn broken() -> Status {
    Status::unavailable("the connection broke before the reply")
}

impl Line {
    async fn open(mut stub: Stub<Versioned>) -> Result<Option<Self>, Status> {
        let (calls, receiver) = mpsc::channel(MUTATIONS_IN_FLIGHT_MAX);
        let replies = match stub.mutations(ReceiverStream::new(receiver)).await {
            Ok(replies) => replies.into_inner(),
            Err(status) if status.code() == Code::Unimplemented => return Ok(None),
            Err(status) => return Err(status),
        };
        let waiting = Arc::new(Mutex::new(Waiting {
            newest: 0,
            replies: Some(HashMap::new()),
        }));
        let ended = CancellationToken::new();
        let guard = ended.clone().drop_guard();
        let delivering = Arc::clone(&waiting);
        tokio::spawn(async move {
            ended
                .run_until_cancelled(deliver(replies, &delivering))
                .await;
            // Whoever waits learns by its sender that no reply will come.
            lock(&delivering).replies = None;
        });
        Ok(Some(Self {
            calls,
            waiting,
            _ended: guard,
        }))
    }

    async fn call(&self, request: pb::MutateRequest) -> Result<pb::Applied, Status> {
        let (reply, wait) = oneshot::channel();
        let place = {
            let mut waiting = lock(&self.waiting);
            waiting.newest += 1;
            let call = waiting.newest;
            let replies = waiting.replies.as_mut().ok_or_else(broken)?;
            replies.insert(call, reply);
            Place {
                waiting: &self.waiting,
                call,
            }
        };
        let frame = pb::MutateCall {
            call: place.call,
            request: Some(request),
        };
        self.calls.send(frame).await.map_err(|_| broken())?;
        match wait.await.map_err(|_| broken())? {
            Kind::Applied(applied) => Ok(applied),
            Kind::Failure(failure) => Err(status_with(Code::Unknown, &failure)),
        }
    }
}

/// Until the stream ends.
async fn deliver(mut replies: Streaming<pb::MutateReply>, waiting: &Mutex<Waiting>) {
    while let Ok(Some(reply)) = replies.message().await {
        let found = match &mut lock(waiting).replies {
            Some(replies) => replies.remove(&reply.call),
            None => return,
        };
        if let (Some(found), Some(kind)) = (found, reply.kind) {
            // A caller whose deadline ended does not wait any more.
            drop(found.send(kind));
        }
    }
}
