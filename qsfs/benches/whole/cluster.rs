//! A real cluster of `qsfs dev` for one measurement, taken down when dropped.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The binary under measurement.
pub(crate) const QSFS: &str = env!("CARGO_BIN_EXE_qsfs");
const START_DEADLINE: Duration = Duration::from_secs(90);

/// Processes, their directory and the mount.
pub(crate) struct Cluster {
    root: PathBuf,
}

impl Cluster {
    /// Starts one below `root` with extra arguments of `qsfs dev up`; returns when it is mounted.
    pub(crate) fn start(root: &Path, arguments: &[&str]) -> Result<Self> {
        let cluster = Self {
            root: root.to_owned(),
        };
        fs::create_dir_all(cluster.mount())?;
        let log = fs::File::create(root.join("dev.log"))?;
        let mut child = Command::new(QSFS)
            .args(["dev", "up"])
            .arg(cluster.mount())
            .arg("--data-dir")
            .arg(cluster.data())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let began = Instant::now();
        let parent = nix::sys::stat::stat(root)?.st_dev;
        while nix::sys::stat::stat(&cluster.mount()).map_or(parent, |stat| stat.st_dev) == parent {
            if let Some(status) = child.try_wait()? {
                bail!(
                    "qsfs dev ended with {status}: {}",
                    fs::read_to_string(root.join("dev.log"))?
                );
            }
            if began.elapsed() > START_DEADLINE {
                bail!(
                    "qsfs dev did not mount: {}",
                    fs::read_to_string(root.join("dev.log"))?
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(cluster)
    }

    /// Where it is mounted.
    pub(crate) fn mount(&self) -> PathBuf {
        self.root.join("mnt")
    }

    /// Its `--data-dir`.
    pub(crate) fn data(&self) -> PathBuf {
        self.root.join("dev")
    }

    /// Runs `qsfs` against it.
    pub(crate) fn qsfs(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new(QSFS)
            .env("QSFS_CLUSTER", self.data().join("cluster.toml"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            bail!(
                "qsfs {}: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// `qsfs sync`; seconds.
    pub(crate) fn sync(&self) -> Result<f64> {
        let began = Instant::now();
        self.qsfs(&[
            "sync",
            &self.mount().display().to_string(),
            "--timeout",
            "600",
        ])?;
        Ok(began.elapsed().as_secs_f64())
    }

    /// `qsfs cache evict --all`.
    pub(crate) fn evict(&self) -> Result<()> {
        self.qsfs(&[
            "cache",
            "evict",
            &self.mount().display().to_string(),
            "--all",
        ])
        .map(drop)
    }

    /// `status --json`.
    pub(crate) fn status(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&self.qsfs(&["status", "--json"])?)?)
    }

    /// Names and pids of what runs.
    pub(crate) fn processes(&self) -> Result<Vec<(String, u32)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.data())? {
            let entry = entry?;
            let Ok(text) = fs::read_to_string(entry.path().join("pid")) else {
                continue;
            };
            if let Some(pid) = text
                .split_whitespace()
                .next()
                .and_then(|word| word.parse().ok())
            {
                found.push((entry.file_name().to_string_lossy().into_owned(), pid));
            }
        }
        found.sort();
        Ok(found)
    }

    /// CPU-seconds of all its processes so far.
    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        Ok(self
            .processes()?
            .iter()
            .map(|(_, pid)| cpu_seconds(&pid.to_string()))
            .sum())
    }

    /// Peak resident MiB of the processes whose name begins so.
    pub(crate) fn peak_mib(&self, name: &str) -> Result<f64> {
        let peak = |pid: u32| -> Option<f64> {
            let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
            line.split_whitespace()
                .nth(1)?
                .parse::<f64>()
                .ok()
                .map(|kib| kib / 1024.0)
        };
        let peaks = self
            .processes()?
            .into_iter()
            .filter(|(process, _)| process.starts_with(name));
        Ok(peaks.filter_map(|(_, pid)| peak(pid)).fold(0.0, f64::max))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let down = Command::new(QSFS)
            .args(["dev", "down", "--data-dir"])
            .arg(self.data())
            .output();
        if let Err(error) = down.context("qsfs dev down") {
            eprintln!("{error:#}");
        }
    }
}

/// User and system CPU-seconds of a process (`self` for this one).
pub(crate) fn cpu_seconds(process: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let fields: Vec<&str> = text
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks = |index: usize| {
        fields
            .get(index)
            .and_then(|field| field.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    (ticks(11) + ticks(12)) / 100.0
}
