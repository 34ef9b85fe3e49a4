//! A plain 0-db namespace elsewhere that this agent answers for: its numbers come from NSINFO.

use crate::AgentError;
use crate::client_store::connect_plain;
use crate::config::AttachedConfig;
use crate::local::{Probe, Usage};
use crate::options::AttachSpec;
use async_trait::async_trait;
use qsfs_proto::api::Secret;
use qsfs_zdb::client::ZdbClient;
use std::fs;

/// Reads the password file and asks the server what it is, before anything is asked of metad.
pub(crate) async fn look_at(spec: &AttachSpec) -> Result<AttachedConfig, AgentError> {
    let password = match &spec.password_file {
        None => None,
        Some(path) => {
            let text =
                fs::read_to_string(path).map_err(AgentError::io("read password file", path))?;
            Some(Secret(
                text.lines().next().unwrap_or_default().trim().to_owned(),
            ))
        }
    };
    let mut config = AttachedConfig {
        id: None,
        endpoint: spec.endpoint.clone(),
        namespace: spec.namespace.clone(),
        password,
        capacity_bytes: 0,
    };
    let refused = |reason: String| AgentError::Attach {
        endpoint: spec.endpoint.clone(),
        namespace: spec.namespace.clone(),
        reason,
    };
    let info = connect_plain(&config.address())
        .nsinfo()
        .await
        .map_err(|error| refused(error.to_string()))?;
    if info.sequential {
        return Err(refused(
            "it makes its own keys (mode seq); pieces need mode user".to_owned(),
        ));
    }
    config.capacity_bytes = match spec.capacity_bytes {
        Some(capacity_bytes) => capacity_bytes,
        None => info.data_size_bytes + info.free_bytes(),
    };
    Ok(config)
}

/// Health of an attached backend.
pub(crate) struct AttachedProbe {
    /// Its client.
    pub(crate) client: ZdbClient,
    /// Bytes it may hold.
    pub(crate) capacity_bytes: u64,
}

#[async_trait]
impl Probe for AttachedProbe {
    async fn probe(&self) -> Result<Usage, String> {
        let info = self
            .client
            .nsinfo()
            .await
            .map_err(|error| error.to_string())?;
        if info.locked {
            return Err("the namespace is locked or frozen".to_owned());
        }
        let left = self.capacity_bytes.saturating_sub(info.data_size_bytes);
        Ok(Usage {
            used_bytes: info.data_size_bytes,
            free_bytes: left.min(info.free_bytes()),
            pieces: info.entries,
        })
    }
}
