//! `certificate renew --data DIR` for an agent: by hand what [`serve`](fn@crate::serve) does by itself, and with a token also after its end.
//!
//! The agent may run meanwhile: it takes what it finds. Who it is (location and node) stays, and so do its backends.

use crate::AgentError;
use crate::config::{Config, DataDir};
use crate::join::parse_token;
use qsfs_proto::api::Role;
use qsfs_proto::client::MetadClient;
use qsfs_proto::identity::{Identity, IdentityError};
use qsfs_proto::join::Joiner;
use qsfs_proto::renewal::{self, Home, IdentityDir, RenewalError};
use qsfs_zstor::id::ClientId;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// What a person does about a certificate that has ended.
pub(crate) const REJOIN_ADVICE: &str = "make a token with `qsfs token create --role agent`, give it with `qsfs certificate renew --data DIR --token-file FILE`, \
                                 and start the agent again; its backends stay as they are";

/// Refuses an identity that has ended: nobody would speak to this agent.
pub(crate) fn check(identity: &Identity) -> Result<(), AgentError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now_ms = now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
    Ok(identity.check_not_ended(now_ms, REJOIN_ADVICE)?)
}

/// A new certificate for the agent of a data directory: asked for with the present one, or with a token when that has ended.
pub async fn renew_certificate(data: &Path, token: Option<&str>) -> Result<Identity, AgentError> {
    let config = DataDir::read(data)?.ok_or_else(|| AgentError::NotJoined(data.to_owned()))?;
    let home = IdentityDir(DataDir::identity_of(data));
    let current = Identity::load(&home.0)?;
    let renewed = match token {
        Some(token) => join_again(data, &config, &current, token).await?,
        None => {
            check(&current)?;
            let own = ClientId::random(&mut rand::rng());
            let client = MetadClient::new(config.metad, &current, own)?;
            renewal::request(&client, &current).await?
        }
    };
    Ok(home.keep(&renewed)?)
}

async fn join_again(
    data: &Path,
    config: &Config,
    current: &Identity,
    token: &str,
) -> Result<Identity, AgentError> {
    let token = parse_token(token)?;
    if token.cluster() != config.cluster {
        return Err(AgentError::OtherCluster {
            path: data.to_owned(),
            found: config.cluster.to_string(),
            wanted: token.cluster().to_string(),
        });
    }
    let joiner = Joiner {
        role: Role::Agent,
        name: config.node.to_string(),
        location: config.location.to_string(),
        address: String::new(),
    };
    let (renewed, _) = qsfs_proto::join::join(&token, joiner).await?;
    if renewed.peer() != current.peer() {
        let other = IdentityError::OtherIdentity {
            found: renewed.peer().clone(),
            wanted: current.peer().clone(),
        };
        return Err(RenewalError::from(other).into());
    }
    Ok(renewed)
}
