//! The channel between metad nodes: opaque payloads of the Raft library, one call at a time or many at once.

use crate::channel::{Versioned, connect_over, describe, versioned};
use crate::dial::{Dial, TlsDial};
use crate::identity::LiveIdentity;
use crate::line::{Line, Numbered};
use crate::tls::TlsError;
use crate::wire::pb::raft_client::RaftClient;
use crate::wire::pb::raft_reply::Kind;
use crate::wire::pb::{RaftAnswer, RaftCall, RaftMessage, RaftReply};
use crate::wire::{Wire, error_of};
use bytes::Bytes;
use qsfs_zstor::id::MetadId;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout_at};
use tonic::{Request, Status};

/// Largest payload of one call or reply.
pub const RAFT_MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Most calls of one peer that are worked on at once in its stream; more wait to be read.
pub(crate) const RAFT_CALLS_IN_FLIGHT_MAX: usize = 64;
/// A payload and what is around it.
pub(crate) const RAFT_FRAME_BYTES_MAX: usize = RAFT_MESSAGE_BYTES_MAX + 4_096;

/// What a payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RaftRpc {
    /// Append entries.
    Append,
    /// Request a vote.
    Vote,
    /// A chunk of a snapshot.
    Snapshot,
    /// Up to where is everything committed, confirmed by a majority now?
    ReadIndex,
}

/// Why a peer gave no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RaftCallError {
    /// No connection, or it broke: the request may or may not have arrived.
    #[error("metad {target} at {address} is unreachable: {reason}")]
    Unreachable {
        /// Peer.
        target: MetadId,
        /// `host:port`.
        address: String,
        /// Why.
        reason: String,
    },
    /// No reply in time: the request may or may not have arrived.
    #[error("metad {target} at {address} did not reply within {deadline:?}")]
    Timeout {
        /// Peer.
        target: MetadId,
        /// `host:port`.
        address: String,
        /// Deadline given.
        deadline: Duration,
    },
    /// The peer replied with an error.
    #[error("metad {target} at {address} refused: {reason}")]
    Refused {
        /// Peer.
        target: MetadId,
        /// `host:port`.
        address: String,
        /// Its words.
        reason: String,
    },
}

/// One peer. Cheap to clone; connects when first called and again when the connection breaks.
#[derive(Clone)]
pub struct RaftPeer {
    target: MetadId,
    address: String,
    dial: Arc<dyn Dial>,
    open: Arc<Mutex<Option<Open>>>,
}

/// A connection, and its stream of calls. Clones share both.
#[derive(Clone)]
struct Open {
    /// Under which it was dialled ([`Dial::generation`]).
    generation: u64,
    stub: RaftClient<Versioned>,
    /// `None`: a peer of a version that has no such stream.
    line: Arc<OnceCell<Option<Line<RaftCall, RaftAnswer>>>>,
}

impl Numbered for RaftAnswer {
    type Reply = RaftReply;

    fn open(self) -> (u64, Option<RaftReply>) {
        (self.call, self.reply)
    }
}

impl Open {
    async fn call(
        mut self,
        message: RaftMessage,
        in_line: bool,
        deadline: Duration,
    ) -> Result<RaftReply, Status> {
        if in_line {
            let mut stub = self.stub.clone();
            let line = self.line.get_or_try_init(|| {
                Line::open(RAFT_CALLS_IN_FLIGHT_MAX, async move |calls| {
                    stub.calls(calls).await
                })
            });
            if let Some(line) = line.await? {
                let message = Some(message);
                return line.call(|call| RaftCall { call, message }).await;
            }
        }
        let mut request = Request::new(message);
        request.set_timeout(deadline);
        Ok(self.stub.call(request).await?.into_inner())
    }
}

impl RaftPeer {
    /// `target` is checked at the other end: a peer that moved to another address is not mistaken for it.
    pub fn new(
        target: MetadId,
        address: &str,
        identity: impl Into<LiveIdentity>,
    ) -> Result<Self, TlsError> {
        Ok(Self::over(target, address, TlsDial::of(identity.into())?))
    }

    /// [`Self::new`] over whatever `dial` opens.
    pub fn over(target: MetadId, address: &str, dial: Arc<dyn Dial>) -> Self {
        Self {
            target,
            address: address.to_owned(),
            dial,
            open: Arc::default(),
        }
    }

    /// Sends and waits for the reply, at most `deadline`. Entries go through one stream, in order; all else is a call of its own.
    pub async fn call(
        &self,
        rpc: RaftRpc,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, RaftCallError> {
        let until = Instant::now() + deadline;
        let open = match self.known() {
            Some(open) => open,
            None => match timeout_at(until, self.connect(deadline)).await {
                Ok(connected) => connected.map_err(|reason| self.unreachable(reason))?,
                Err(_) => return Err(self.late(deadline)),
            },
        };
        let message = RaftMessage {
            target: self.target.to_wire(),
            rpc: rpc.to_wire(),
            payload,
        };
        let in_line = rpc == RaftRpc::Append;
        let sent = open.clone().call(message, in_line, deadline);
        match timeout_at(until, sent).await {
            Ok(Ok(reply)) => match reply.kind {
                Some(Kind::Payload(reply)) => Ok(reply),
                Some(Kind::Error(reason)) => Err(self.refused(reason)),
                None => Err(self.refused("an empty reply".into())),
            },
            Ok(Err(status)) => match error_of(&status) {
                Some(error) => Err(self.refused(error.to_string())),
                None => {
                    self.forget(&open);
                    Err(self.unreachable(describe(&status)))
                }
            },
            Err(_) => {
                // It may hang (a partition); the next call connects anew.
                self.forget(&open);
                Err(self.late(deadline))
            }
        }
    }

    fn unreachable(&self, reason: String) -> RaftCallError {
        RaftCallError::Unreachable {
            target: self.target,
            address: self.address.clone(),
            reason,
        }
    }

    fn late(&self, deadline: Duration) -> RaftCallError {
        RaftCallError::Timeout {
            target: self.target,
            address: self.address.clone(),
            deadline,
        }
    }

    fn refused(&self, reason: String) -> RaftCallError {
        RaftCallError::Refused {
            target: self.target,
            address: self.address.clone(),
            reason,
        }
    }

    async fn connect(&self, deadline: Duration) -> Result<Open, String> {
        let generation = self.dial.generation();
        let channel = connect_over(&self.address, self.dial.clone(), deadline).await?;
        let open = Open {
            generation,
            stub: RaftClient::new(versioned(channel))
                .max_decoding_message_size(RAFT_FRAME_BYTES_MAX)
                .max_encoding_message_size(RAFT_FRAME_BYTES_MAX),
            line: Arc::default(),
        };
        *self.lock() = Some(open.clone());
        Ok(open)
    }

    /// The connection there is, unless another certificate was taken up since.
    fn known(&self) -> Option<Open> {
        let open = self.lock().clone();
        open.filter(|open| open.generation == self.dial.generation())
    }

    /// Lets go of this connection, not of a newer one.
    fn forget(&self, failed: &Open) {
        let mut open = self.lock();
        let is_it = |known: &Open| Arc::ptr_eq(&known.line, &failed.line);
        if open.as_ref().is_some_and(is_it) {
            *open = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
