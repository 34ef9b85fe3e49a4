//! The first contact: a process that has only a token becomes a member with a certificate.
//!
//! The key is made here and stays here; the server proves itself by the CA whose BLAKE3 the token holds, before the token's secret is sent.

use crate::api::{JoinGrant, JoinRequest, MetadError, Role};
use crate::channel::{connect, describe, versioned};
use crate::identity::{Identity, KeyRequest};
use crate::server::CallError;
use crate::tls::grpc_join_config;
use crate::token::JoinToken;
use crate::wire::pb::join_client::JoinClient;
use crate::wire::{Wire, error_of, pb};
use rand::Rng;
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// Joining with all its attempts.
const JOIN_DEADLINE: Duration = Duration::from_secs(30);
/// One attempt.
const ATTEMPT_DEADLINE: Duration = Duration::from_secs(10);
/// After each round over the endpoints.
const ROUND_PAUSE: Duration = Duration::from_millis(250);

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
    if joiner.role != token.role() {
        return Err(MetadError::Token(format!(
            "it is for role {}, not {}",
            token.role(),
            joiner.role
        )));
    }
    let config = grpc_join_config(token.ca_hash())
        .map_err(|error| MetadError::Unreachable(error.to_string()))?;
    let key = KeyRequest::new().map_err(|error| MetadError::Invalid(error.to_string()))?;
    let request = JoinRequest {
        secret: token.secret(),
        role: joiner.role,
        csr_pem: key.csr_pem().to_owned(),
        name: joiner.name,
        location: joiner.location,
        address: joiner.address,
    };
    let grant = ask_around(token, config, &request).await?;
    let identity = key
        .finish(grant.cert_pem.clone(), grant.ca_pem.clone())
        .map_err(|error| MetadError::Token(format!("the grant cannot be used: {error}")))?;
    let pinned = identity
        .ca_der()
        .is_ok_and(|ca| *blake3::hash(&ca).as_bytes() == token.ca_hash());
    if !pinned || identity.cluster() != token.cluster() || identity.role() != token.role() {
        return Err(MetadError::Token(
            "the grant is of another cluster or role than the token".into(),
        ));
    }
    Ok((identity, grant))
}

async fn ask_around(
    token: &JoinToken,
    config: Arc<ClientConfig>,
    request: &JoinRequest,
) -> Result<JoinGrant, MetadError> {
    let deadline = Instant::now() + JOIN_DEADLINE;
    let mut last = MetadError::Unreachable("the token names no endpoint".into());
    let mut hinted: Option<String> = None;
    let mut cycle = token.endpoints().iter().cycle();
    // Ends at the deadline.
    for step in 0_usize.. {
        if step > 0 && step.is_multiple_of(token.endpoints().len() + 1) {
            // Drawn before the wait: the generator must not be held over it.
            let pause = ROUND_PAUSE.mul_f64(rand::rng().random_range(0.5..1.5));
            sleep(pause).await;
        }
        if Instant::now() >= deadline {
            break;
        }
        let Some(address) = hinted.take().or_else(|| cycle.next().cloned()) else {
            break;
        };
        match ask(&address, config.clone(), request).await {
            Ok(grant) => return Ok(grant),
            Err(CallError::NotLeader { leader }) => {
                last = MetadError::NoQuorum(format!("{address} does not lead"));
                hinted = leader;
            }
            Err(CallError::Refused(
                error @ (MetadError::NoQuorum(_)
                | MetadError::Unreachable(_)
                | MetadError::Unknown(_)),
            )) => last = error,
            Err(CallError::Refused(error) | CallError::Decided(error)) => return Err(error),
        }
    }
    Err(last)
}

async fn ask(
    address: &str,
    config: Arc<ClientConfig>,
    request: &JoinRequest,
) -> Result<JoinGrant, CallError> {
    let unreachable = |reason: String| {
        CallError::Refused(MetadError::Unreachable(format!("{address}: {reason}")))
    };
    let attempt = async {
        let channel = connect(address, config, ATTEMPT_DEADLINE)
            .await
            .map_err(unreachable)?;
        let mut stub = JoinClient::new(versioned(channel));
        let message: pb::JoinRequest = request.to_wire();
        match stub.join(message).await {
            Ok(grant) => JoinGrant::from_wire(grant.into_inner())
                .map_err(|error| unreachable(format!("its answer does not parse: {error}"))),
            Err(status) => Err(error_of(&status).unwrap_or_else(|| unreachable(describe(&status)))),
        }
    };
    timeout(ATTEMPT_DEADLINE, attempt)
        .await
        .unwrap_or_else(|_| {
            Err(unreachable(format!(
                "no answer within {ATTEMPT_DEADLINE:?}"
            )))
        })
}
