//! `qsfs sync`: returns when everything written before is committed on backends.

use crate::umount::{refusal, with_bar};
use clap::Args;
use qsfs_fuse_client::control::{Answer, Client, Request};
use std::path::PathBuf;

/// `qsfs sync`.
#[derive(Debug, Args)]
pub(crate) struct SyncArguments {
    /// A directory of the mount
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Be content with what the backends that are up allow
    #[arg(long)]
    allow_degraded: bool,
    /// Give up after so many seconds
    #[arg(long, value_name = "S", default_value = "600")]
    timeout: u64,
}

/// Runs it.
pub(crate) async fn run(arguments: &SyncArguments) -> anyhow::Result<()> {
    let client = Client::find(&arguments.dir).map_err(refusal)?;
    let request = Request::Sync {
        timeout_ms: Some(arguments.timeout.saturating_mul(1_000)),
        allow_degraded: arguments.allow_degraded,
    };
    let answer = with_bar("syncing", &client, &request)
        .await
        .map_err(refusal)?;
    if let Answer::Synced(synced) = answer
        && synced.below_policy > 0
    {
        eprintln!(
            "{} datafiles are below policy: {}",
            synced.below_policy, synced.missing
        );
    }
    Ok(())
}
