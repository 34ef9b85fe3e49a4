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
use tokio::time::{Instant, sleep, timeout_at};

/// After each round over the endpoints.
const ROUND_PAUSE: Duration = Duration::from_millis(250);

/// Deadlines of joining.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadlines {
    /// With all its attempts.
    pub(crate) whole: Duration,
    /// One attempt.
    pub(crate) attempt: Duration,
}

const DEADLINES: Deadlines = Deadlines {
    whole: Duration::from_secs(30),
    attempt: Duration::from_secs(10),
};

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
/// When no answer came in the end it may have been carried out all the same, and the error says so ([`MetadError::Unknown`]).
pub async fn join(token: &JoinToken, joiner: Joiner) -> Result<(Identity, JoinGrant), MetadError> {
    join_within(token, joiner, DEADLINES).await
}

/// [`join`] with other deadlines.
pub(crate) async fn join_within(
    token: &JoinToken,
    joiner: Joiner,
    deadlines: Deadlines,
) -> Result<(Identity, JoinGrant), MetadError> {
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
    let grant = ask_around(token, config, &request, deadlines).await?;
    let identity = key
        .finish(grant.cert_pem.clone(), grant.ca_pem.clone())
        .map_err(|error| MetadError::Token(format!("the grant cannot be used: {error}")))?;
    let pinned = identity
        .ca_der()
        .is_ok_and(|ca| *blake3::hash(&ca).as_bytes() == token.ca_hash());
    if !pinned
        || grant.cluster != token.cluster()
        || identity.cluster() != token.cluster()
        || identity.role() != token.role()
    {
        return Err(MetadError::Token(
            "the grant is of another cluster or role than the token".into(),
        ));
    }
    Ok((identity, grant))
}

/// How one attempt ended without a grant.
enum Failed {
    /// Said by a node.
    Refused(CallError),
    /// No answer. `sent`: it may have been carried out.
    Lost { reason: String, sent: bool },
}

async fn ask_around(
    token: &JoinToken,
    config: Arc<ClientConfig>,
    request: &JoinRequest,
    deadlines: Deadlines,
) -> Result<JoinGrant, MetadError> {
    let deadline = Instant::now() + deadlines.whole;
    let mut last = MetadError::Unreachable("the token names no endpoint".into());
    let mut uncertain: Option<String> = None;
    let mut hinted: Option<String> = None;
    let mut cycle = token.endpoints().iter().cycle();
    // Ends at the deadline.
    for step in 0_usize.. {
        if step > 0 && step.is_multiple_of(token.endpoints().len() + 1) {
            // Drawn before the wait: the generator must not be held over it.
            let pause = ROUND_PAUSE.mul_f64(rand::rng().random_range(0.5..1.5));
            sleep(pause).await;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let Some(address) = hinted.take().or_else(|| cycle.next().cloned()) else {
            break;
        };
        let limit = left.min(deadlines.attempt);
        match ask(&address, config.clone(), request, limit).await {
            Ok(grant) => return Ok(grant),
            Err(Failed::Refused(CallError::NotLeader { leader })) => {
                last = MetadError::NoQuorum(format!("{address} does not lead"));
                hinted = leader;
            }
            Err(Failed::Refused(CallError::Refused(
                error @ (MetadError::NoQuorum(_) | MetadError::Unreachable(_)),
            ))) => last = error,
            Err(Failed::Refused(CallError::Refused(MetadError::Unknown(reason)))) => {
                uncertain = Some(format!("{address}: {reason}"));
            }
            Err(Failed::Refused(CallError::Refused(error) | CallError::Decided(error))) => {
                return Err(error);
            }
            Err(Failed::Lost { reason, sent }) => {
                let reason = format!("{address}: {reason}");
                if sent {
                    uncertain = Some(reason);
                } else {
                    last = MetadError::Unreachable(reason);
                }
            }
        }
    }
    Err(uncertain.map_or(last, |reason| {
        MetadError::Unknown(format!(
            "{reason}; the token may count as used now: if joining again is refused, make another with `qsfs token create`"
        ))
    }))
}

async fn ask(
    address: &str,
    config: Arc<ClientConfig>,
    request: &JoinRequest,
    limit: Duration,
) -> Result<JoinGrant, Failed> {
    let deadline = Instant::now() + limit;
    let lost = |reason: String, sent: bool| Failed::Lost { reason, sent };
    let connected = timeout_at(deadline, connect(address, config, limit)).await;
    let channel = connected
        .map_err(|_| lost(format!("no connection within {limit:?}"), false))?
        .map_err(|reason| lost(reason, false))?;
    let mut stub = JoinClient::new(versioned(channel));
    let message: pb::JoinRequest = request.to_wire();
    match timeout_at(deadline, stub.join(message)).await {
        Err(_) => Err(lost(format!("no answer within {limit:?}"), true)),
        Ok(Ok(grant)) => JoinGrant::from_wire(grant.into_inner())
            .map_err(|error| lost(format!("its answer does not parse: {error}"), true)),
        Ok(Err(status)) => Err(match error_of(&status) {
            Some(error) => Failed::Refused(error),
            None => lost(describe(&status), true),
        }),
    }
}
