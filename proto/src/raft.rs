//! The channel between metad nodes: opaque payloads of the Raft library, one call at a time or many at once.

use crate::channel::{Versioned, connect_over, describe, versioned};
use crate::dial::{Dial, TlsDial};
use crate::identity::Identity;
use crate::tls::TlsError;
use crate::wire::pb::RaftMessage;
use crate::wire::pb::raft_client::RaftClient;
use crate::wire::pb::raft_reply::Kind;
use crate::wire::{Wire, error_of};
use bytes::Bytes;
use qsfs_zstor::id::MetadId;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::timeout;
use tonic::Request;

/// Largest payload of one call or reply.
pub const RAFT_MESSAGE_BYTES_MAX: usize = 64 << 20;
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
    open: Arc<Mutex<Option<Stub>>>,
}

type Stub = RaftClient<Versioned>;

impl RaftPeer {
    /// `target` is checked at the other end: a peer that moved to another address is not mistaken for it.
    pub fn new(target: MetadId, address: &str, identity: &Identity) -> Result<Self, TlsError> {
        Ok(Self::over(target, address, TlsDial::of(identity)?))
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

    /// Sends and waits for the reply, at most `deadline`.
    pub async fn call(
        &self,
        rpc: RaftRpc,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, RaftCallError> {
        let ended = timeout(deadline, self.send(rpc, payload, deadline)).await;
        let (target, address) = (self.target, self.address.clone());
        match ended {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(Failed::Unreachable(reason))) => {
                self.forget();
                Err(RaftCallError::Unreachable {
                    target,
                    address,
                    reason,
                })
            }
            Ok(Err(Failed::Refused(reason))) => Err(RaftCallError::Refused {
                target,
                address,
                reason,
            }),
            Err(_) => {
                // It may hang (a partition); the next call connects anew.
                self.forget();
                Err(RaftCallError::Timeout {
                    target,
                    address,
                    deadline,
                })
            }
        }
    }

    async fn send(
        &self,
        rpc: RaftRpc,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, Failed> {
        let mut stub = self.stub(deadline).await.map_err(Failed::Unreachable)?;
        let mut request = Request::new(RaftMessage {
            target: self.target.to_wire(),
            rpc: rpc.to_wire(),
            payload,
        });
        request.set_timeout(deadline);
        let reply = stub
            .call(request)
            .await
            .map_err(|status| match error_of(&status) {
                Some(error) => Failed::Refused(error.to_string()),
                None => Failed::Unreachable(describe(&status)),
            })?;
        match reply.into_inner().kind {
            Some(Kind::Payload(reply)) => Ok(reply),
            Some(Kind::Error(reason)) => Err(Failed::Refused(reason)),
            None => Err(Failed::Refused("an empty reply".into())),
        }
    }

    async fn stub(&self, deadline: Duration) -> Result<Stub, String> {
        if let Some(stub) = self.lock().as_ref() {
            return Ok(stub.clone());
        }
        let channel = connect_over(&self.address, self.dial.clone(), deadline).await?;
        let stub = RaftClient::new(versioned(channel))
            .max_decoding_message_size(RAFT_FRAME_BYTES_MAX)
            .max_encoding_message_size(RAFT_FRAME_BYTES_MAX);
        *self.lock() = Some(stub.clone());
        Ok(stub)
    }

    fn forget(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Stub>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Failed {
    Unreachable(String),
    Refused(String),
}
