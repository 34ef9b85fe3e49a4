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
}

/// Runs it.
pub(crate) async fn run(arguments: &UmountArguments) -> anyhow::Result<()> {
    let patience = Duration::from_secs(arguments.timeout);
    let found = qsfs_fuse_client::control::find(&arguments.dir);
    let found = match found {
        Ok(found) => found,
        Err(_) if crate::mount::is_mounted(&arguments.dir) => {
            // Its process is dead: there is nothing to push with.
            detach(&arguments.dir)?;
            anyhow::bail!(
                "the mount's process was dead; {} is detached, what was at risk is in its state directory: mount it again",
                arguments.dir.display()
            );
        }
        Err(error) => return Err(refusal(error)),
    };
    let client = Client::new(found.socket.clone());
    let timeout_ms = Some(units::millis(patience));
    match with_bar("pushing", &client, &Request::Unmount { timeout_ms }).await {
        Ok(_) => wait_ended(&found.root, &found.socket).await,
        Err(error @ ControlError::Refused { .. }) => {
            let failure = left_behind(&client, error).await;
            detach(&found.root)?;
            Err(failure)
        }
        Err(error) => Err(refusal(error)),
    }
}

/// Unmounts although not everything is pushed; files that are open there stay usable until they are closed.
pub(crate) fn detach(root: &Path) -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(umount2(root, MntFlags::MNT_DETACH)?);
    }
    let helper = std::process::Command::new("fusermount3")
        .arg("-uz")
        .arg(root)
        .status();
    match helper {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => anyhow::bail!("fusermount3 -uz {} ended with {status}", root.display()),
        Err(error) => anyhow::bail!("fusermount3 (package fuse3): {error}"),
    }
}

/// The refusal, with what stays at risk and where.
async fn left_behind(client: &Client, error: ControlError) -> anyhow::Error {
    let code = error.exit_code();
    let mut text = format!("not everything could be pushed: {error}");
    if let Ok(Answer::Report(report)) = client.ask(&Request::Report, |_| {}).await {
        text = format!(
            "{text}; {} stay at risk, in {}: the next mount with this state directory pushes them",
            units::bytes(report.at_risk_bytes),
            report.state_dir.display()
        );
    }
    Failure::new(code, text).into()
}

/// Until the mount is gone, and then its process: it removes its socket when the lease is given back, so that the next
/// mount, here or elsewhere, does not find the volume held.
async fn wait_ended(root: &Path, socket: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + END_PATIENCE;
    while crate::mount::is_mounted(root) || socket.exists() {
        if Instant::now() >= deadline {
            let text = format!(
                "the mount at {} has not ended: files may still be open there (`fuser -m {}`), or the end of the push \
                 waits for the cluster (`qsfs status`)",
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
        Err(error) => Err(left_behind(&client, error).await),
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
