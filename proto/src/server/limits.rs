//! What one connection may make this node hold, and how many streams it may open: a member with a certificate can be hostile, or broken.
//!
//! ```text
//! request frames --count--> Account of the call --> of its connection (PENDING_BYTES_MAX) --> of all (PENDING_BYTES_MAX_ALL)
//! ```
//!
//! Bytes count from their arrival until the call ends, in a stream of mutations until their mutation is answered. Who is over a limit is told
//! which one, with `Busy`; nothing it sent before is harmed. metad nodes are not counted: they are the cluster.

use crate::api::MetadError;
use crate::wire::status_of;
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

/// Bytes of requests of one connection that are not answered yet.
pub const PENDING_BYTES_MAX: usize = 64 << 20;
/// The same of all connections.
pub const PENDING_BYTES_MAX_ALL: usize = 512 << 20;
/// Streams of mutations of one connection. A client needs one.
pub const MUTATION_STREAMS_MAX: usize = 4;
/// Agent sessions of one connection. An agent needs one.
pub const SESSIONS_MAX: usize = 4;
/// Reads of one connection that are worked on or whose answer was not taken yet; further ones wait.
pub const READS_MAX: usize = 32;
/// Bytes of one report of an agent.
pub const REPORT_BYTES_MAX: usize = 1 << 20;
/// Bytes of an answer that are handed over at once.
const ANSWER_PIECE_BYTES: usize = 64 << 10;
/// What is around a message in a gRPC stream.
const MESSAGE_PREFIX_BYTES: usize = 5;

fn busy(text: String) -> Status {
    status_of(&MetadError::Busy(text).into())
}

/// Shared by the calls of one connection.
pub(super) struct ConnectionLimits {
    pending: AtomicUsize,
    all: Arc<AtomicUsize>,
    mutation_streams: Arc<Semaphore>,
    sessions: Arc<Semaphore>,
    reads: Arc<Semaphore>,
}

impl fmt::Debug for ConnectionLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnectionLimits({:?} bytes)", self.pending)
    }
}

impl ConnectionLimits {
    /// Of a new connection; `all` is shared by all of a server.
    pub(super) fn new(all: Arc<AtomicUsize>) -> Self {
        Self {
            pending: AtomicUsize::new(0),
            all,
            mutation_streams: Arc::new(Semaphore::new(MUTATION_STREAMS_MAX)),
            sessions: Arc::new(Semaphore::new(SESSIONS_MAX)),
            reads: Arc::new(Semaphore::new(READS_MAX)),
        }
    }

    /// A place for a stream of mutations.
    pub(super) fn mutation_stream(&self) -> Result<OwnedSemaphorePermit, Status> {
        let place = self.mutation_streams.clone().try_acquire_owned();
        place.map_err(|_| {
            busy(format!(
                "this connection has {MUTATION_STREAMS_MAX} streams of mutations already, and may have no more"
            ))
        })
    }

    /// A place for an agent's session.
    pub(super) fn session(&self) -> Result<OwnedSemaphorePermit, Status> {
        let place = self.sessions.clone().try_acquire_owned();
        place.map_err(|_| {
            busy(format!(
                "this connection has {SESSIONS_MAX} agent sessions already, and may have no more"
            ))
        })
    }

    fn take(&self, bytes: usize) -> Result<(), Status> {
        let own = self.pending.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let all = self.all.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let refused = if own > PENDING_BYTES_MAX {
            format!(
                "the requests of this connection that wait for answers hold more than {} MiB",
                PENDING_BYTES_MAX >> 20
            )
        } else if all > PENDING_BYTES_MAX_ALL {
            format!(
                "the requests that wait for answers here hold more than {} MiB",
                PENDING_BYTES_MAX_ALL >> 20
            )
        } else {
            return Ok(());
        };
        self.release(bytes);
        Err(busy(refused))
    }

    fn release(&self, bytes: usize) {
        self.pending.fetch_sub(bytes, Ordering::Relaxed);
        self.all.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What one call holds; given back when it is dropped.
pub(super) struct Account {
    connection: Arc<ConnectionLimits>,
    held: AtomicUsize,
    read: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Account {
    /// Waits for the turn of a read, which lasts until its answer was taken or the call is given up.
    pub(super) async fn turn_to_read(&self) {
        // The semaphore is never closed.
        let turn = self.connection.reads.clone().acquire_owned().await.ok();
        *self.read.lock().unwrap_or_else(PoisonError::into_inner) = turn;
    }

    fn take(&self, bytes: usize) -> Result<(), Status> {
        self.connection.take(bytes)?;
        self.held.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// A message of a stream, so many bytes, is dealt with.
    pub(super) fn release_message(&self, bytes: usize) {
        let wanted = bytes + MESSAGE_PREFIX_BYTES;
        let mut released = 0;
        // A message may be shorter in our form than it was on the wire, never below zero.
        let _ = self
            .held
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                released = wanted.min(held);
                Some(held - released)
            });
        self.connection.release(released);
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.connection.release(*self.held.get_mut());
    }
}

/// Counts the bytes of every request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Metering;

impl<S> Layer<S> for Metering {
    type Service = Metered<S>;

    fn layer(&self, inner: S) -> Metered<S> {
        Metered { inner }
    }
}

/// See [`Metering`].
#[derive(Debug, Clone)]
pub(super) struct Metered<S> {
    inner: S,
}

type Answering<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

impl<S, B> Service<Request<Body>> for Metered<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answering<Response<Body>, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let limits = request.extensions().get::<super::ConnectedPeer>();
        let Some(connection) = limits.and_then(|peer| peer.limits.clone()) else {
            let answering = self.inner.call(request);
            return Box::pin(async move { Ok(answering.await?.map(Body::new)) });
        };
        let account = Arc::new(Account {
            connection,
            held: AtomicUsize::new(0),
            read: Mutex::default(),
        });
        request.extensions_mut().insert(account.clone());
        let counted = account.clone();
        let request = request.map(|inner| {
            Body::new(Counted {
                inner,
                account: counted,
            })
        });
        let answering = self.inner.call(request);
        Box::pin(async move {
            let answer = answering.await?;
            Ok(answer.map(|inner| {
                Body::new(Held {
                    inner: Body::new(inner),
                    rest: Bytes::new(),
                    _account: account,
                })
            }))
        })
    }
}

/// An answer: the call lasts until it was taken. It is handed over in pieces, because HTTP/2 takes a whole piece as soon as the other
/// end wants any of it.
struct Held {
    inner: Body,
    rest: Bytes,
    _account: Arc<Account>,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.rest.is_empty() {
            let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
            match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => self.rest = data,
                Some(Ok(Err(other))) => return Poll::Ready(Some(Ok(other))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        let bytes = self.rest.len().min(ANSWER_PIECE_BYTES);
        let piece = self.rest.split_to(bytes);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.inner.is_end_stream()
    }
}

/// A request: every byte counts.
struct Counted {
    inner: Body,
    account: Arc<Account>,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(refused) = self.account.take(data.len())
        {
            return Poll::Ready(Some(Err(refused)));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
