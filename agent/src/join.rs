//! `agent join`: from a token to an agent that metad knows.

use crate::{AgentError, JoinOptions};
use qsfs_zstor::id::{AgentId, BackendId, ClusterId};

/// What was joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// Cluster.
    pub cluster: ClusterId,
    /// Agent.
    pub agent: AgentId,
    /// Backends, in the order given: directories first, then attached ones.
    pub backends: Vec<BackendId>,
    /// `host:port` by which others reach the hosted backends.
    pub endpoint: String,
}

/// Joins this node to the cluster of the token and registers its backends. Nothing serves yet: call
/// [`serve`](fn@crate::serve) next. A join that was interrupted is finished by calling it again.
pub async fn join(options: JoinOptions) -> Result<Joined, AgentError> {
    Err(AgentError::Unfinished(options.data))
}
