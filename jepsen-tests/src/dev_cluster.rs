//! A cluster of real processes that never outlives its test, not even when the test panics.

use crate::binary::{Binary, Outcome};
use crate::process;
use crate::wait::{holds, wait_for, wait_within};
use nix::sys::signal::Signal;
use qsfs_proto::status::{Status, VolumeStatus};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;
use tempfile::TempDir;

/// How long a cluster may take to stand, on a loaded machine in a debug build.
const START_PATIENCE: Duration = Duration::from_secs(180);

/// Bytes of each log shown when a test fails.
const LOG_TAIL_BYTES: u64 = 3_000;

/// What `qsfs dev` is started with.
#[derive(Debug, Clone, Default)]
pub struct DevOptions {
    /// Further arguments, such as `--policy 2+2`.
    pub arguments: Vec<String>,
}

impl DevOptions {
    /// With these further arguments.
    pub fn with(arguments: &[&str]) -> Self {
        Self {
            arguments: arguments.iter().map(|text| (*text).to_owned()).collect(),
        }
    }
}

/// A running `qsfs dev`.
pub struct DevCluster {
    binary: Binary,
    base: Option<TempDir>,
    mount: PathBuf,
    data: PathBuf,
    options: DevOptions,
    dev: Option<Child>,
}

/// Why a test that needs a mount cannot run here; `None` when it can.
///
/// # Panics
/// When CI (or `QSFS_REQUIRE_FUSE=1`) says that such tests must run.
pub fn skip_reason() -> Option<String> {
    let missing = match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => None,
        Err(error) => Some(format!("/dev/fuse cannot be opened: {error}")),
    };
    let required = ["QSFS_REQUIRE_FUSE", "CI"]
        .iter()
        .any(|name| std::env::var(name).is_ok_and(|value| !value.is_empty() && value != "0"));
    match missing {
        Some(reason) if required => panic!("this run requires FUSE, and {reason}"),
        Some(reason) => {
            println!("skipped: {reason}");
            Some(reason)
        }
        None => None,
    }
}

impl DevCluster {
    /// Starts `qsfs dev` and waits until the mount stands.
    ///
    /// # Panics
    /// With the logs, when it does not.
    pub fn start(binary: &Path, options: DevOptions) -> Self {
        let base = tempfile::Builder::new()
            .prefix("qsfs-test-")
            .tempdir()
            .expect("a temporary directory can be made");
        let mount = base.path().join("mnt");
        let data = base.path().join("dev");
        fs::create_dir(&mount).expect("mount point can be made");
        let mut cluster = Self {
            binary: Binary::new(binary, base.path().join("home"))
                .with_cluster(data.join("cluster.toml")),
            mount,
            data,
            options,
            dev: None,
            base: Some(base),
        };
        cluster.up();
        cluster
    }

    /// Starts the cluster (again), on what its directory holds.
    ///
    /// # Panics
    /// With the logs, when it does not stand in time.
    pub fn up(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.base().join("dev.log"))
            .expect("log can be opened");
        let child = self
            .binary
            .command()
            .arg("dev")
            .arg("up")
            .arg(&self.mount)
            .arg("--data-dir")
            .arg(&self.data)
            .args(&self.options.arguments)
            .stdout(log.try_clone().expect("log can be shared"))
            .stderr(log)
            .spawn()
            .expect("qsfs can be started");
        self.dev = Some(child);
        wait_within(START_PATIENCE, "qsfs dev to mount", || {
            if let Some(status) = self.dev.as_mut().and_then(|dev| dev.try_wait().ok()?) {
                panic!("qsfs dev ended with {status}");
            }
            holds(process::is_mounted(&self.mount), "not mounted")
        });
    }

    /// Ends it as Ctrl-C does and waits for that.
    ///
    /// # Panics
    /// When it does not end, or not well.
    pub fn interrupt(&mut self) {
        let Some(mut dev) = self.dev.take() else {
            return;
        };
        process::signal(dev.id().cast_signed(), Signal::SIGINT);
        let status = wait_for("qsfs dev to end", || {
            dev.try_wait()
                .map_err(|error| error.to_string())
                .and_then(|status| status.ok_or_else(|| "still running".to_owned()))
        });
        assert!(status.success(), "qsfs dev ended with {status}");
    }

    /// Kills the foreground `qsfs dev` alone, with SIGKILL.
    pub fn kill_foreground(&mut self) {
        if let Some(mut dev) = self.dev.take() {
            let _ = dev.kill();
            let _ = dev.wait();
        }
    }

    /// Directory of everything this cluster has.
    pub fn base(&self) -> &Path {
        self.base.as_ref().expect("taken only on drop").path()
    }

    /// Where the volume is mounted.
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// `--data-dir` of the cluster.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// A plain directory beside the mount, for expectations.
    pub fn scratch(&self, name: &str) -> PathBuf {
        let dir = self.base().join(name);
        fs::create_dir_all(&dir).expect("scratch directory can be made");
        dir
    }

    /// The binary with this cluster's context.
    pub fn binary(&self) -> &Binary {
        &self.binary
    }

    /// Runs `qsfs ARGUMENTS` with this cluster's context.
    pub fn qsfs(&self, arguments: &[&str]) -> Outcome {
        self.binary.run(arguments)
    }

    /// Runs `qsfs dev VERB … --data-dir D`, which must succeed.
    pub fn dev(&self, arguments: &[&str]) -> Outcome {
        let mut command = self.binary.command();
        command
            .arg("dev")
            .args(arguments)
            .arg("--data-dir")
            .arg(&self.data);
        crate::binary::run_within(&mut command, crate::binary::COMMAND_DEADLINE).ok()
    }

    /// `qsfs dev kill NAME…`.
    pub fn kill(&self, names: &[&str]) {
        self.dev(&[&["kill"], names].concat());
    }

    /// `qsfs dev start NAME…`.
    pub fn start_again(&self, names: &[&str]) {
        self.dev(&[&["start"], names].concat());
    }

    /// Pid of a process of the cluster, if it runs.
    pub fn pid(&self, name: &str) -> Option<i32> {
        process::pid_of(&self.data.join(name))
    }

    /// `qsfs sync MOUNT`, which must succeed.
    pub fn sync(&self) {
        self.on_mount(&["sync"], &[]).ok();
    }

    /// `qsfs sync MOUNT` again and again until it succeeds: what came back a moment ago may not take shards yet.
    pub fn sync_in_full(&self) {
        wait_for("a sync at full policy", || {
            let said = self.on_mount(&["sync"], &[]);
            holds(said.code == 0, said.stderr)
        });
    }

    /// `qsfs sync MOUNT --allow-degraded`, which must succeed.
    pub fn sync_degraded(&self) {
        self.on_mount(&["sync"], &["--allow-degraded"]).ok();
    }

    /// `qsfs cache evict MOUNT --all`, which must succeed.
    pub fn evict(&self) -> Outcome {
        self.on_mount(&["cache", "evict"], &["--all"]).ok()
    }

    /// `qsfs VERB MOUNT OPTIONS`.
    pub fn on_mount(&self, verb: &[&str], options: &[&str]) -> Outcome {
        let mount = self.mount.to_str().expect("temporary paths are text");
        self.binary.run([verb, &[mount], options].concat())
    }

    /// `qsfs status --json`, parsed.
    pub fn status(&self) -> Result<Status, String> {
        let said = self.binary.run(["status", "--json"]);
        if said.code != 0 && said.stdout.is_empty() {
            return Err(format!("status ended with {}: {}", said.code, said.stderr));
        }
        serde_json::from_str(&said.stdout).map_err(|error| {
            format!(
                "status is not the JSON of the contract: {error}: {}",
                said.stdout
            )
        })
    }

    /// The volume `dev` in the status.
    pub fn volume(&self) -> Result<VolumeStatus, String> {
        self.status()?
            .volumes
            .into_iter()
            .find(|volume| volume.name == "dev")
            .ok_or_else(|| "status names no volume dev".to_owned())
    }

    /// Waits until the status has no finding, nothing is below policy or pending, and every backend is up (or lost for good).
    pub fn wait_healed(&self, patience: Duration) -> Status {
        wait_within(patience, "the cluster to heal by itself", || {
            let status = self.status()?;
            let settled = |state: &str| ["up", "lost", "retired"].contains(&state);
            let healed = status.findings.is_empty()
                && status.resilver.pending_shards == 0
                && status
                    .backends
                    .iter()
                    .all(|backend| settled(&backend.state))
                && status
                    .volumes
                    .iter()
                    .all(|volume| volume.below_policy == 0 && volume.unreadable == 0);
            if healed {
                Ok(status)
            } else {
                Err(format!(
                    "{:?} {:?} {:?}",
                    status.findings, status.resilver, status.volumes
                ))
            }
        })
    }

    /// Waits until the status has a finding of that name; its subjects.
    pub fn wait_finding(&self, name: &str) -> Vec<String> {
        wait_for(&format!("status to say {name}"), || {
            let status = self.status()?;
            let subjects: Vec<String> = status
                .findings
                .iter()
                .filter(|finding| finding.name == name)
                .map(|finding| finding.subject.clone())
                .collect();
            if subjects.is_empty() {
                Err(format!("{:?}", status.findings))
            } else {
                Ok(subjects)
            }
        })
    }

    /// Directory of every backend of the cluster, as `(agent, directory)`.
    pub fn backend_dirs(&self) -> Vec<(String, PathBuf)> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.data).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with("agent-") {
                continue;
            }
            for backend in fs::read_dir(entry.path().join("data"))
                .into_iter()
                .flatten()
                .flatten()
            {
                if backend
                    .file_name()
                    .to_string_lossy()
                    .starts_with("backend-")
                {
                    found.push((name.clone(), backend.path()));
                }
            }
        }
        found.sort();
        found
    }

    /// The ends of all logs, for a test that failed.
    pub fn logs(&self) -> String {
        let mut files = vec![self.base().join("dev.log")];
        for entry in fs::read_dir(&self.data).into_iter().flatten().flatten() {
            files.push(entry.path().join("log"));
        }
        files.sort();
        files
            .iter()
            .filter_map(|file| Some(format!("--- {}\n{}\n", file.display(), tail(file)?)))
            .collect()
    }

    fn take_down(&mut self) {
        self.kill_foreground();
        // The layout says who runs; the command lines say who else does. The base is unique to this test.
        for (pid, _) in process::all_naming(self.base()) {
            process::signal(pid, Signal::SIGKILL);
        }
        process::unmount_lazily(&self.mount);
        for entry in fs::read_dir(self.base()).into_iter().flatten().flatten() {
            process::unmount_lazily(&entry.path());
        }
    }
}

impl Drop for DevCluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        self.take_down();
        if std::env::var_os("QSFS_TEST_KEEP").is_some()
            && let Some(base) = self.base.take()
        {
            eprintln!("kept: {}", base.keep().display());
        }
    }
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

/// Runs a shell line in `dir`, which must succeed; for the tools a user would use.
///
/// # Panics
/// With what it said, when it fails.
pub fn shell(dir: &Path, line: &str) -> String {
    let mut command = Command::new("bash");
    command
        .args(["-euo", "pipefail", "-c", line])
        .current_dir(dir);
    crate::binary::run_within(&mut command, crate::binary::COMMAND_DEADLINE)
        .ok()
        .stdout
}
