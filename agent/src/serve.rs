//! `agent serve`: hosts the backends and does what metad orders.

use crate::{AgentError, ServeOptions};
use tokio_util::sync::CancellationToken;

/// Serves until `shutdown`.
pub async fn serve(options: ServeOptions, shutdown: CancellationToken) -> Result<(), AgentError> {
    shutdown.cancelled().await;
    Err(AgentError::NotJoined(options.data))
}
