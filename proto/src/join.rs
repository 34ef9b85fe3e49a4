//! The first contact: a process that has only a token becomes a member with a certificate.
//!
//! The key is made here and stays here; the server proves itself by the CA whose BLAKE3 the token holds, before the token's secret is sent.

use crate::api::{JoinGrant, MetadError, Role};
use crate::identity::Identity;
use crate::token::JoinToken;

/// Who wants to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joiner {
    /// Must be the token's role.
    pub role: Role,
    /// Node (metad, agent) or client name.
    pub name: String,
    /// Location; empty for clients.
    pub location: String,
    /// metad only: `host:port` where it will listen; else empty.
    pub address: String,
}

/// Joins with the leader, whichever of the token's endpoints finds it. A lost answer is asked for again with the same key.
pub async fn join(token: &JoinToken, joiner: Joiner) -> Result<(Identity, JoinGrant), MetadError> {
    let _ = (token, joiner);
    Err(MetadError::Unreachable("wire is not there yet".into()))
}
