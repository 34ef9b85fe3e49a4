//! One stream of numbered calls to one node, shared by all who call it: what a call costs of its own is a frame each way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Response, Status, Streaming};

/// A frame that comes back.
pub(crate) trait Numbered: Send + 'static {
    /// What it says.
    type Reply: Send + 'static;

    /// The call it is about, and the reply, if it is one that is known here.
    fn open(self) -> (u64, Option<Self::Reply>);
}

/// The stream: frames `C` go out, frames `R` come back. It ends when this is dropped.
pub(crate) struct Line<C, R: Numbered> {
    calls: mpsc::Sender<C>,
    waiting: Arc<Mutex<Waiting<R::Reply>>>,
    _ended: DropGuard,
}

/// Who waits for a reply.
struct Waiting<T> {
    newest: u64,
    /// `None`: the stream is over.
    replies: Option<HashMap<u64, oneshot::Sender<T>>>,
}

/// A call's place among those who wait; given up when dropped, however the call ends.
struct Place<'a, T> {
    waiting: &'a Mutex<Waiting<T>>,
    call: u64,
}

impl<T> Drop for Place<'_, T> {
    fn drop(&mut self) {
        if let Some(replies) = &mut lock(self.waiting).replies {
            replies.remove(&self.call);
        }
    }
}

fn lock<T>(waiting: &Mutex<Waiting<T>>) -> MutexGuard<'_, Waiting<T>> {
    // No step under the lock can leave it half done.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

fn broken() -> Status {
    Status::unavailable("the connection broke before the reply")
}

impl<C: Send + 'static, R: Numbered> Line<C, R> {
    /// `begin` hands the calls to the rpc. At most `calls_max` frames wait to be sent. `None`: the node has no such stream.
    pub(crate) async fn open<F>(
        calls_max: usize,
        begin: impl FnOnce(ReceiverStream<C>) -> F,
    ) -> Result<Option<Self>, Status>
    where
        F: Future<Output = Result<Response<Streaming<R>>, Status>>,
    {
        let (calls, receiver) = mpsc::channel(calls_max);
        let replies = match begin(ReceiverStream::new(receiver)).await {
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

    /// Sends what `frame` makes of the call's number and waits for the reply. The caller sets the deadline.
    pub(crate) async fn call(&self, frame: impl FnOnce(u64) -> C) -> Result<R::Reply, Status> {
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
        let frame = frame(place.call);
        self.calls.send(frame).await.map_err(|_| broken())?;
        wait.await.map_err(|_| broken())
    }
}

/// Until the stream ends.
async fn deliver<R: Numbered>(mut replies: Streaming<R>, waiting: &Mutex<Waiting<R::Reply>>) {
    while let Ok(Some(frame)) = replies.message().await {
        let (call, reply) = frame.open();
        let found = match &mut lock(waiting).replies {
            Some(replies) => replies.remove(&call),
            None => return,
        };
        if let (Some(found), Some(reply)) = (found, reply) {
            // A caller whose deadline ended does not wait any more.
            drop(found.send(reply));
        }
    }
}
