//! Real metad processes in network namespaces of their own, and what can be done to them.
//!
//! ```text
//!  a namespace of all kinds for the whole run (unshare): network, mounts, processes
//!    bridge 10.77.0.254, here runs the harness
//!      ├── veth ── namespace m1 10.77.0.11 ── `qsfs metad serve`, its disk: a small file system of its own
//!      ├── veth ── namespace m2 …
//!      └── veth ── namespace c1 10.77.0.101 ── a client thread
//! ```
//!
//! Nothing of it is seen outside, and nothing outlives the first process of the run, however it ends: with it go all processes, and
//! with these all namespaces, mounts and addresses. Only the work directory is left, which whoever began the run removes.

use super::plan::Fault;
use anyhow::{Context as _, bail};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Most nodes at once.
pub const NODES_MAX: usize = 5;
/// Bytes of a node's disk, in MiB: more than what a node uses and the 256 MiB below which it says that its disk is nearly full.
const DISK_MIB: u32 = 768;
/// For a node to say where its cluster file is, and for any command.
const PATIENCE: Duration = Duration::from_secs(60);
const PORT: u16 = 7400;

/// What the disks of nodes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// Memory: a sync costs nothing.
    Tmpfs,
    /// ext4 in a file of the work directory: a sync is one of the real disk.
    Loop,
}

/// One node.
pub struct Node {
    /// Also the name of its namespace.
    pub name: String,
    child: Option<Child>,
    number: usize,
    /// It was started and should run.
    expected: bool,
}

/// All of it.
pub struct Arena {
    work: PathBuf,
    binary: PathBuf,
    disk: Disk,
    nodes: Vec<Node>,
    clients: usize,
}

/// Runs a tool to its end; its output.
fn tool(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} {} failed: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn ip(line: &str) -> anyhow::Result<()> {
    tool("ip", &line.split(' ').collect::<Vec<_>>()).map(drop)
}

impl Arena {
    /// Namespaces, wires and disks; no process yet. Must run where all of it is private (see the module).
    pub fn new(work: &Path, binary: &Path, clients: usize, disk: Disk) -> anyhow::Result<Self> {
        fs::create_dir_all("/run/netns")?;
        tool("mount", &["-t", "tmpfs", "netns", "/run/netns"])?;
        ip("link set lo up")?;
        ip("link add name hub type bridge")?;
        ip("addr add 10.77.0.254/24 dev hub")?;
        ip("link set hub up")?;
        let mut arena = Self {
            work: work.to_owned(),
            binary: binary.to_owned(),
            disk,
            nodes: Vec::new(),
            clients,
        };
        for number in 0..NODES_MAX {
            let name = format!("m{}", number + 1);
            plug(&name, &host(number))?;
            arena.nodes.push(Node {
                name,
                child: None,
                number,
                expected: false,
            });
            arena.make_disk(number)?;
        }
        for number in 0..clients {
            plug(&format!("c{number}"), &client_host(number))?;
        }
        Ok(arena)
    }

    fn make_disk(&self, number: usize) -> anyhow::Result<()> {
        let at = self.disk_of(number);
        fs::create_dir_all(&at)?;
        let at = at.to_string_lossy().into_owned();
        match self.disk {
            Disk::Tmpfs => {
                let size = format!("size={DISK_MIB}m");
                tool("mount", &["-t", "tmpfs", "-o", &size, "disk", &at])?;
            }
            Disk::Loop => {
                let image = format!("{at}.img");
                File::create(&image)?.set_len(u64::from(DISK_MIB) << 20)?;
                tool("mkfs.ext4", &["-q", "-m", "0", &image])?;
                tool("mount", &["-o", "loop", &image, &at])?;
            }
        }
        Ok(())
    }

    fn disk_of(&self, number: usize) -> PathBuf {
        self.work.join(format!("disk{}", number + 1))
    }

    /// Data directory of a node.
    pub fn data(&self, number: usize) -> PathBuf {
        self.disk_of(number).join("data")
    }

    /// Where a node listens.
    pub fn address(&self, number: usize) -> String {
        format!("{}:{PORT}", host(number))
    }

    /// The context file that the bootstrap wrote.
    pub fn cluster_file(&self) -> PathBuf {
        self.work.join("cluster.toml")
    }

    /// Number of the node at an address.
    pub fn at(&self, address: &str) -> Option<usize> {
        (0..NODES_MAX).find(|number| self.address(*number) == address)
    }

    /// Nodes that were started and not stopped on purpose.
    pub fn expected(&self) -> Vec<usize> {
        let expected = self.nodes.iter().filter(|node| node.expected);
        expected.map(|node| node.number).collect()
    }

    /// Name of a node.
    pub fn name(&self, number: usize) -> &str {
        &self.nodes[number].name
    }

    /// Begins the cluster with node 0; its join tokens for metads.
    pub fn bootstrap(&mut self, lease_ttl: Duration) -> anyhow::Result<Vec<String>> {
        let lease = format!("{}ms", lease_ttl.as_millis());
        let file = self.cluster_file().to_string_lossy().into_owned();
        // Nobody beats for the backends of the workload: they must not be given up for it.
        let settings = [
            "--lease-ttl",
            &lease,
            "--down-after",
            "30d",
            "--lost-after",
            "60d",
        ];
        let mut arguments = vec!["--cluster", &file, "metad", "bootstrap"];
        arguments.extend(settings);
        let said = self.spawn(0, &arguments, true, Some("cluster file: "))?;
        let tokens = said.iter().filter_map(|line| line.strip_prefix("metad "));
        Ok(tokens.map(str::to_owned).collect())
    }

    /// Starts a node that joins by a token.
    pub fn join(&mut self, number: usize, token: &str) -> anyhow::Result<()> {
        self.spawn(number, &["metad", "join", token], true, None)
            .map(drop)
    }

    /// Starts a node on its data.
    pub fn serve(&mut self, number: usize) -> anyhow::Result<()> {
        self.spawn(number, &["metad", "serve"], false, None)
            .map(drop)
    }

    fn spawn(
        &mut self,
        number: usize,
        arguments: &[&str],
        named: bool,
        until: Option<&str>,
    ) -> anyhow::Result<Vec<String>> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_file(number))?;
        let mut command = self.command(&["ip", "netns", "exec", self.name(number)]);
        command.arg(&self.binary).args(arguments);
        command.arg("--data").arg(self.data(number));
        if named {
            command.args(["--name", self.name(number)]);
            command.args(["--location", &format!("loc{}", number + 1)]);
            command.args(["--listen", &self.address(number)]);
        }
        command.stderr(log);
        command.stdout(match until {
            Some(_) => Stdio::piped(),
            None => Stdio::null(),
        });
        let mut child = command.spawn().context("cannot start a metad")?;
        let output = child.stdout.take();
        self.nodes[number].child = Some(child);
        self.nodes[number].expected = true;
        let (Some(until), Some(output)) = (until, output) else {
            return Ok(Vec::new());
        };
        let (said, hearing) = mpsc::channel();
        let until = until.to_owned();
        std::thread::spawn(move || {
            let mut heard = Vec::new();
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let last = line.starts_with(&until);
                heard.push(line);
                if last {
                    let _ = said.send(heard);
                    return;
                }
            }
        });
        let said = hearing.recv_timeout(PATIENCE);
        said.map_err(|_| anyhow::anyhow!("the first metad did not begin: {}", self.log_end(number)))
    }

    fn command(&self, line: &[&str]) -> Command {
        let mut command = Command::new(line[0]);
        command
            .args(&line[1..])
            .env("HOME", &self.work)
            .env("NO_COLOR", "1")
            .env_remove("QSFS_CLUSTER")
            .env_remove("XDG_CONFIG_HOME")
            .stdin(Stdio::null());
        command
    }

    /// Runs `qsfs ARGUMENTS` with the admin's context, from the bridge; exit code and what it said.
    pub fn qsfs(&self, arguments: &[&str]) -> anyhow::Result<(i32, String)> {
        let mut command = self.command(&["timeout", "45"]);
        let output = command
            .arg(&self.binary)
            .arg("--cluster")
            .arg(self.cluster_file())
            .args(arguments)
            .output()
            .context("cannot run qsfs")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        Ok((output.status.code().unwrap_or(-1), text))
    }

    fn log_file(&self, number: usize) -> PathBuf {
        self.work.join(format!("m{}.log", number + 1))
    }

    /// The last of what a node logged.
    pub fn log_end(&self, number: usize) -> String {
        let log = fs::read_to_string(self.log_file(number)).unwrap_or_default();
        let from = log.floor_char_boundary(log.len().saturating_sub(3_000));
        log[from..].to_owned()
    }

    /// Bytes that a node has logged.
    pub fn log_bytes(&self, number: usize) -> usize {
        fs::read(self.log_file(number)).map_or(0, |log| log.len())
    }

    /// What a node logged after so many bytes.
    pub fn log_from(&self, number: usize, bytes: usize) -> String {
        let log = fs::read(self.log_file(number)).unwrap_or_default();
        String::from_utf8_lossy(log.get(bytes..).unwrap_or_default()).into_owned()
    }

    /// Copies what all nodes logged.
    pub fn save_logs(&self, to: &Path) -> anyhow::Result<()> {
        for number in 0..NODES_MAX {
            let from = self.log_file(number);
            if from.exists() {
                fs::copy(&from, to.join(format!("m{}.log", number + 1)))?;
            }
        }
        Ok(())
    }

    fn signal(&self, number: usize, signal: Signal) {
        if let Some(child) = &self.nodes[number].child {
            crate::process::signal(child.id().cast_signed(), signal);
        }
    }

    /// SIGSTOP.
    pub fn pause(&self, number: usize) {
        self.signal(number, Signal::SIGSTOP);
    }

    /// SIGCONT.
    pub fn resume(&self, number: usize) {
        self.signal(number, Signal::SIGCONT);
    }

    /// kill -9, and waits until it is gone.
    pub fn kill(&mut self, number: usize) -> anyhow::Result<()> {
        self.nodes[number].expected = false;
        if let Some(mut child) = self.nodes[number].child.take() {
            // A process that has ended by itself is gone as well.
            let _ = child.kill();
            child.wait()?;
        }
        Ok(())
    }

    /// SIGTERM to several at the same moment, and waits until they are gone.
    pub fn stop(&mut self, numbers: &[usize]) -> anyhow::Result<()> {
        // None of them sees another one go.
        for number in numbers {
            self.pause(*number);
        }
        for number in numbers {
            self.signal(*number, Signal::SIGTERM);
        }
        for number in numbers {
            self.resume(*number);
        }
        for number in numbers {
            self.nodes[*number].expected = false;
            let Some(mut child) = self.nodes[*number].child.take() else {
                continue;
            };
            let deadline = Instant::now() + PATIENCE;
            while child.try_wait()?.is_none() {
                if Instant::now() > deadline {
                    let _ = child.kill();
                    child.wait()?;
                    bail!(
                        "{} did not end: {}",
                        self.name(*number),
                        self.log_end(*number)
                    );
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// Nodes that should run and do not, with how they ended.
    pub fn dead(&mut self) -> anyhow::Result<Vec<(usize, String)>> {
        let mut dead = Vec::new();
        for node in self.nodes.iter_mut().filter(|node| node.expected) {
            if let Some(child) = &mut node.child
                && let Some(status) = child.try_wait()?
            {
                dead.push((node.number, status.to_string()));
            }
        }
        Ok(dead)
    }

    /// Fills the disk of a node to the last byte; also once more, with what was given back meanwhile.
    pub fn fill(&self, number: usize) -> anyhow::Result<()> {
        let mut ballast = File::options()
            .create(true)
            .append(true)
            .open(self.disk_of(number).join("ballast"))?;
        // Most of it without writing it: on a real disk that would take a while.
        const PART: i64 = 1 << 20;
        let mut end = i64::try_from(ballast.metadata()?.len())?;
        while fallocate(&ballast, FallocateFlags::empty(), end, PART).is_ok() {
            end += PART;
        }
        for size in [1 << 20, 4096, 1] {
            let block = vec![0u8; size];
            while ballast.write_all(&block).is_ok() {}
        }
        Ok(())
    }

    /// Gives the space back.
    pub fn free(&self, number: usize) -> anyhow::Result<()> {
        Ok(fs::remove_file(self.disk_of(number).join("ballast"))?)
    }

    /// A disk that was lost: whatever the node had is gone. It must not run.
    pub fn wipe(&self, number: usize) -> anyhow::Result<()> {
        Ok(fs::remove_dir_all(self.data(number))?)
    }

    /// Loses the packets that a fault of the network loses. Replaces what was lost before.
    pub fn cut(&self, fault: Fault, of: usize, others: &[usize]) -> anyhow::Result<()> {
        let hosts = |numbers: &[usize]| numbers.iter().map(|n| host(*n)).collect::<Vec<_>>();
        match fault {
            Fault::Alone(_) => {
                self.lose(of, &hosts(others))?;
                self.each_loses(others, of)
            }
            Fault::Deaf(_) => self.lose(of, &hosts(others)),
            Fault::Mute(_) => self.each_loses(others, of),
            Fault::Bridge => match others {
                [other, ..] => {
                    self.lose(of, &hosts(&[*other]))?;
                    self.each_loses(&[*other], of)
                }
                [] => Ok(()),
            },
            Fault::Unreached(_) => {
                let half: Vec<_> = (0..self.clients).step_by(2).map(client_host).collect();
                self.lose(of, &half)
            }
            _ => Ok(()),
        }
    }

    fn each_loses(&self, numbers: &[usize], of: usize) -> anyhow::Result<()> {
        for number in numbers {
            self.lose(*number, &[host(of)])?;
        }
        Ok(())
    }

    /// From now on nothing that these hosts send arrives at a node.
    fn lose(&self, number: usize, from: &[String]) -> anyhow::Result<()> {
        let rules = format!(
            "flush ruleset\ntable inet faults {{\n chain arriving {{\n  type filter hook input priority 0\n  ip saddr {{ {} }} drop\n }}\n}}\n",
            from.join(", ")
        );
        self.nft(number, &rules)
    }

    /// All packets arrive again.
    pub fn reconnect(&self) -> anyhow::Result<()> {
        (0..NODES_MAX).try_for_each(|number| self.nft(number, "flush ruleset\n"))
    }

    fn nft(&self, number: usize, rules: &str) -> anyhow::Result<()> {
        let mut child = Command::new("ip")
            .args(["netns", "exec", self.name(number), "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("cannot run nft")?;
        let mut input = child.stdin.take().context("it is piped")?;
        input.write_all(rules.as_bytes())?;
        drop(input);
        if !child.wait()?.success() {
            bail!("nft refused:\n{rules}");
        }
        Ok(())
    }
}

fn host(number: usize) -> String {
    format!("10.77.0.{}", 11 + number)
}

fn client_host(number: usize) -> String {
    format!("10.77.0.{}", 101 + number)
}

/// A namespace with a wire to the bridge.
fn plug(name: &str, address: &str) -> anyhow::Result<()> {
    ip(&format!("netns add {name}"))?;
    ip(&format!(
        "link add {name} type veth peer name eth0 netns {name}"
    ))?;
    ip(&format!("link set {name} master hub up"))?;
    ip(&format!("-n {name} addr add {address}/24 dev eth0"))?;
    ip(&format!("-n {name} link set eth0 up"))?;
    ip(&format!("-n {name} link set lo up"))
}

/// Moves the calling thread into the namespace of a client: all its sockets are there from now on.
pub fn enter_client(number: usize) -> anyhow::Result<()> {
    let path = format!("/run/netns/c{number}");
    let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {path}"))
}
