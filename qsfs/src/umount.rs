//! `qsfs umount`: push what is at risk, then unmount.

use crate::exit::{self, Failure};
use crate::{progress, units};
use clap::Args;
use nix::mount::{MntFlags, umount2};
use qsfs_fuse_client::control::{Answer, Client, ControlError, Progress, Request};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::Instant;

/// For the mount to vanish once everything is pushed.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// `qsfs umount`.
#[derive(Debug, Args)]
pub(crate) struct UmountArguments {
    /// Where it is mounted
    dir: PathBuf,
    /// How long to push what is at risk, in seconds
    #[arg(long, default_value = "600", value_name = "S")]
    timeout: u64,
    /// Unmount now; what is at risk stays in the state directory, for the next mount
    #[arg(long)]
    no_push: bool,
}

/// Runs it.
pub(crate) async fn run(arguments: &UmountArguments) -> anyhow::Result<()> {
    let patience = match arguments.no_push {
        true => Duration::ZERO,
        false => Duration::from_secs(arguments.timeout),
    };
    let found = qsfs_fuse_client::control::find(&arguments.dir);
    let found = match found {
        Ok(found) => found,
        Err(_) if crate::mount::is_mounted(&arguments.dir) => {
            // Its process is dead: there is nothing to push with.
            umount2(&arguments.dir, MntFlags::MNT_DETACH)?;
            anyhow::bail!(
                "the mount's process was dead; {} is detached, what was at risk is in its state directory: mount it again",
                arguments.dir.display()
            );
        }
        Err(error) => return Err(refusal(error)),
    };
    let timeout_ms = Some(units::millis(patience));
    let asked = with_bar(
        "pushing",
        &Client::new(found.socket),
        &Request::Unmount { timeout_ms },
    )
    .await;
    asked.map(drop).map_err(refusal)?;
    wait_unmounted(&found.root).await
}

async fn wait_unmounted(root: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + END_PATIENCE;
    while crate::mount::is_mounted(root) {
        if Instant::now() >= deadline {
            let text = format!(
                "{} is still in use: see `fuser -m {}`",
                root.display(),
                root.display()
            );
            return Err(Failure::new(exit::ERROR, text).into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Pushes what is at risk, content with what the backends that are up allow; says what stayed behind.
pub(crate) async fn push_at_risk(dir: &Path, patience: Duration) -> anyhow::Result<()> {
    let client = Client::find(dir).map_err(refusal)?;
    let request = Request::Sync {
        timeout_ms: Some(units::millis(patience)),
        allow_degraded: true,
    };
    match with_bar("pushing", &client, &request).await {
        Ok(_) => Ok(()),
        Err(error) => {
            let mut text = error.to_string();
            if let Ok(Answer::Report(report)) = client.ask(&Request::Report, |_| {}).await {
                text = format!(
                    "{text}; {} stay at risk, in {}",
                    units::bytes(report.at_risk_bytes),
                    report.state_dir.display()
                );
            }
            Err(Failure::new(error.exit_code(), text).into())
        }
    }
}

/// Asks, with a bar for the bytes that are pushed meanwhile.
pub(crate) async fn with_bar(
    verb: &str,
    client: &Client,
    request: &Request,
) -> Result<Answer, ControlError> {
    let bar = progress::bytes(verb);
    let answer = client
        .ask(request, |step: Progress| {
            bar.set_length(step.total_bytes);
            bar.set_position(step.done_bytes);
            bar.set_message(match step.blocked.is_empty() {
                true => verb.to_owned(),
                false => format!("waits: {}", step.blocked),
            });
        })
        .await;
    bar.finish_and_clear();
    answer
}

/// With the exit code that the mount gave.
pub(crate) fn refusal(error: ControlError) -> anyhow::Error {
    Failure::new(error.exit_code(), error.to_string()).into()
}
