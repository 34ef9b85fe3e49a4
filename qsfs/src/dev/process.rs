//! One process of a dev cluster: its directory, log and pid file.
//!
//! A pid file is only believed when the command line of that process names our directory: pids are reused, and a
//! stranger must never be killed. The pid file is removed before a process is ended on purpose; one that ends while it
//! exists ended by itself.

use super::layout::{Layout, Member};
use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::time::Instant;

/// How often a command line that is still empty is looked at again.
const EXEC_LOOKS_MAX: u32 = 100;
/// Between two looks.
const EXEC_LOOK_EVERY: Duration = Duration::from_millis(1);
/// Last bytes of a log that an error shows.
const LOG_TAIL_BYTES: u64 = 2_000;

/// Between two looks whether a process that is no child of ours is gone.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// One process.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    dir: PathBuf,
}

impl Process {
    /// The process of a member.
    pub(super) fn of(layout: &Layout, member: &Member) -> Self {
        Self {
            name: member.name.clone(),
            dir: layout.dir().join(&member.name),
        }
    }

    /// Its name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// `D/NAME/data`.
    pub(super) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// `D/NAME/log`.
    pub(super) fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    fn pid_file(&self) -> PathBuf {
        self.dir.join("pid")
    }

    /// Starts `qsfs ARGUMENTS` as this process, in a group of its own, its log appended to.
    pub(super) fn spawn(&self, mut command: Command) -> anyhow::Result<Child> {
        std::fs::create_dir_all(&self.dir)
            .with_context(|| format!("making {}", self.dir.display()))?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .with_context(|| format!("opening {}", self.log().display()))?;
        let child = command
            .stderr(Stdio::from(log))
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {}", self.name))?;
        let pid = child.id().context("it ended at once")?;
        std::fs::write(self.pid_file(), format!("{pid}\n"))
            .with_context(|| format!("writing {}", self.pid_file().display()))?;
        Ok(child)
    }

    /// Its pid, if it runs.
    pub(super) fn pid(&self) -> Option<i32> {
        read_pid(&self.pid_file()).filter(|pid| is_ours(*pid, &self.dir))
    }

    /// The pid file is there: nobody ended it on purpose.
    pub(super) fn is_wanted(&self) -> bool {
        self.pid_file().exists()
    }

    /// SIGKILL. False when it does not run.
    pub(super) fn kill(&self) -> bool {
        self.signal(Signal::SIGKILL)
    }

    /// SIGTERM. False when it does not run.
    pub(super) fn terminate(&self) -> bool {
        self.signal(Signal::SIGTERM)
    }

    fn signal(&self, signal: Signal) -> bool {
        let pid = self.pid();
        // Also when it is gone already: a stale file says nothing any more.
        let _ = std::fs::rename(self.pid_file(), self.ending_file());
        pid.is_some_and(|pid| kill(Pid::from_raw(pid), signal).is_ok())
    }

    /// Pid of a process that was told to end.
    fn ending_file(&self) -> PathBuf {
        self.dir.join("pid.ending")
    }

    fn ending_pid(&self) -> Option<i32> {
        read_pid(&self.ending_file()).filter(|pid| is_ours(*pid, &self.dir))
    }

    /// Waits until a process that was told to end is gone; after `patience` it is killed.
    pub(super) async fn wait_gone(&self, patience: Duration) -> anyhow::Result<()> {
        let mut deadline = Instant::now() + patience;
        let mut killed = false;
        while let Some(pid) = self.ending_pid() {
            if Instant::now() >= deadline {
                if killed {
                    bail!(
                        "{} (pid {pid}) does not end, not even by SIGKILL",
                        self.name
                    );
                }
                tracing::warn!(name = self.name, pid, "did not end in time, killing it");
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                killed = true;
                deadline = Instant::now() + Duration::from_secs(10);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let _ = std::fs::remove_file(self.ending_file());
        Ok(())
    }

    /// The end of its log.
    pub(super) fn log_tail(&self) -> String {
        tail(&self.log()).unwrap_or_default()
    }
}

/// A pid file's pid.
pub(super) fn read_pid(file: &Path) -> Option<i32> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// That process lives and its command line names `dir`.
pub(super) fn is_ours(pid: i32, dir: &Path) -> bool {
    let alive = std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
    });
    let dir = dir.as_os_str().as_bytes();
    alive
        && command_line(pid)
            .windows(dir.len())
            .any(|window| window == dir)
}

/// A process that was started this very moment has no command line yet: the kernel closes the descriptors that tell
/// its parent of the exec before it sets the arguments.
fn command_line(pid: i32) -> Vec<u8> {
    for _ in 0..EXEC_LOOKS_MAX {
        match std::fs::read(format!("/proc/{pid}/cmdline")) {
            Ok(line) if line.is_empty() => std::thread::sleep(EXEC_LOOK_EVERY),
            other => return other.unwrap_or_default(),
        }
    }
    Vec::new()
}

fn tail(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))
        .ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[tokio::test]
    async fn a_reused_pid_is_not_ours_to_kill() {
        let base = tempfile::tempdir().unwrap();
        let process = Process {
            name: "x".into(),
            dir: base.path().join("x"),
        };
        std::fs::create_dir(&process.dir).unwrap();
        let mut stranger = Command::new("sleep").arg("60").spawn().unwrap();
        std::fs::write(process.pid_file(), stranger.id().unwrap().to_string()).unwrap();
        assert!(!process.kill());
        process.wait_gone(Duration::from_secs(1)).await.unwrap();
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().await.unwrap();
    }

    #[tokio::test]
    async fn our_own_is_killed_and_then_gone() {
        let base = tempfile::tempdir().unwrap();
        let process = Process {
            name: "x".into(),
            dir: base.path().join("x"),
        };
        let mut command = Command::new("sh");
        command.arg("-c").arg("sleep 60; : $0").arg(process.data());
        let mut child = process.spawn(command).unwrap();
        assert!(process.pid().is_some() && process.is_wanted());
        assert!(process.kill() && !process.is_wanted());
        child.wait().await.unwrap();
        process.wait_gone(Duration::from_secs(10)).await.unwrap();
        assert_eq!(process.pid(), None);
    }
}
