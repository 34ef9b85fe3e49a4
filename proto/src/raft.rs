//! The channel between metad nodes: opaque payloads of the Raft library, one call at a time or many at once.

use crate::identity::Identity;
use crate::tls::TlsError;
use bytes::Bytes;
use qsfs_zstor::id::MetadId;
use std::time::Duration;

/// Largest payload of one call or reply.
pub const RAFT_MESSAGE_BYTES_MAX: usize = 64 << 20;

/// What a payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RaftRpc {
    /// Append entries.
    Append,
    /// Request a vote.
    Vote,
    /// A chunk of a snapshot.
    Snapshot,
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
}

impl RaftPeer {
    /// `target` is checked at the other end: a peer that moved to another address is not mistaken for it.
    pub fn new(target: MetadId, address: &str, identity: &Identity) -> Result<Self, TlsError> {
        let _ = identity;
        Ok(Self {
            target,
            address: address.to_owned(),
        })
    }

    /// Sends and waits for the reply, at most `deadline`.
    pub async fn call(
        &self,
        rpc: RaftRpc,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, RaftCallError> {
        let _ = (rpc, payload, deadline);
        Err(RaftCallError::Unreachable {
            target: self.target,
            address: self.address.clone(),
            reason: "wire is not there yet".into(),
        })
    }
}
