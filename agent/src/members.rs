//! Which metad nodes there are, learned again and again: an agent joins through one of them and must find the others when that
//! one is gone, also after a restart.

use crate::config::{Config, DataDir};
use qsfs_proto::client::MetadClient;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Between two questions.
const ASK_EVERY: Duration = Duration::from_secs(5);
/// The same while only one node is known: with it gone, nobody would be left to ask.
const ASK_EVERY_ALONE: Duration = Duration::from_millis(500);

/// Keeps the endpoints of the configuration true.
pub(crate) struct MembersWatch {
    pub(crate) client: MetadClient,
    pub(crate) config: Config,
    pub(crate) data: Arc<DataDir>,
    pub(crate) shutdown: CancellationToken,
}

impl MembersWatch {
    /// Until shutdown.
    pub(crate) async fn run(mut self) {
        let shutdown = self.shutdown.clone();
        tokio::select! {
            () = self.again_and_again() => {}
            () = shutdown.cancelled() => {}
        }
    }

    async fn again_and_again(&mut self) {
        loop {
            // Who does not answer now is asked again; the client keeps what it knows.
            if let Ok(members) = self.client.members().await {
                let mut endpoints: Vec<String> =
                    members.into_iter().map(|member| member.address).collect();
                endpoints.sort_unstable();
                self.remember(endpoints);
            }
            let alone = self.config.metad.len() < 2;
            tokio::time::sleep(if alone { ASK_EVERY_ALONE } else { ASK_EVERY }).await;
        }
    }

    fn remember(&mut self, endpoints: Vec<String>) {
        if endpoints.is_empty() || endpoints == self.config.metad {
            return;
        }
        self.config.metad = endpoints;
        match self.data.save(&self.config) {
            Ok(()) => {
                tracing::info!(
                    endpoints = self.config.metad.join(" "),
                    "metad nodes are known"
                );
            }
            Err(error) => tracing::warn!(%error, "cannot keep the addresses of the metad nodes"),
        }
    }
}
