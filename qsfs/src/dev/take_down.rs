//! Ending: the mount first, pushing what is at risk, then the agents, then the metad nodes.

use super::layout::{Kind, Layout};
use super::process::{Process, is_ours};
use super::up::foreground_pid;
use anyhow::bail;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;

/// For pushing what is at risk.
const PUSH_PATIENCE: Duration = Duration::from_secs(120);

/// For a process to end after SIGTERM.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// `qsfs dev down`: asks the foreground process if there is one, else does it.
pub(super) async fn run(layout: &Layout, no_push: bool) -> anyhow::Result<()> {
    let Some(pid) = foreground_pid(layout.dir()) else {
        return all(layout, no_push).await;
    };
    let signal = Pid::from_raw(pid);
    let _ = kill(signal, Signal::SIGTERM);
    if no_push {
        // The second signal says: do not wait.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let _ = kill(signal, Signal::SIGTERM);
    }
    let deadline = Instant::now() + PUSH_PATIENCE + 3 * END_PATIENCE;
    while is_ours(pid, Path::new("dev")) {
        if Instant::now() >= deadline {
            bail!(
                "the foreground process (pid {pid}) does not end; end it with `kill -9 {pid}` and run this again"
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Ends everything that runs.
pub(super) async fn all(layout: &Layout, no_push: bool) -> anyhow::Result<()> {
    let left_behind = end_mount(layout, no_push).await;
    for kind in [Kind::Agent, Kind::Metad] {
        let processes: Vec<Process> = layout
            .of_kind(kind)
            .map(|member| Process::of(layout, member))
            .filter(Process::terminate)
            .collect();
        for process in &processes {
            process.wait_gone(END_PATIENCE).await?;
        }
    }
    left_behind
}

async fn end_mount(layout: &Layout, no_push: bool) -> anyhow::Result<()> {
    let Some(member) = layout.of_kind(Kind::Mount).next() else {
        return Ok(());
    };
    let process = Process::of(layout, member);
    let mut outcome = Ok(());
    if process.pid().is_some() && !no_push {
        outcome = crate::umount::push_at_risk(layout.mount(), PUSH_PATIENCE).await;
    }
    if no_push {
        process.kill();
    } else {
        process.terminate();
    }
    process.wait_gone(PUSH_PATIENCE).await?;
    detach(layout.mount());
    outcome
}

/// Takes away what a dead mount left in the tree.
pub(super) fn detach(mount: &Path) {
    if crate::mount::is_mounted(mount) {
        // Somebody else may have taken it away meanwhile.
        let _ = crate::umount::detach(mount);
    }
}
