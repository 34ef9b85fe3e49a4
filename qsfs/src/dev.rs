//! `qsfs dev`: a whole cluster of real processes on one machine, this binary re-executed.
//!
//! ```text
//!   D/dev.toml              who runs where, chosen once: names, addresses, options
//!   D/cluster.toml          admin context        D/volume.kit   recovery kit of the volume `dev`
//!   D/NAME/{data/,log,pid}  per process: metad-1..3, agent-LOCATION-N, mount
//! ```
//!
//! Every process is its own group, so that Ctrl-C reaches only the foreground `qsfs dev`, which ends the others in order: the
//! mount (pushing what is at risk), the agents, the metad nodes.

mod layout;
mod process;
mod requirements;
mod take_down;
mod up;

use crate::table::{Table, print, print_json};
use crate::units::parse_duration;
use anyhow::Context as _;
use clap::{Args, Subcommand};
use layout::{Kind, Layout, Member};
use process::Process;
use qsfs_agent::options::parse_size;
use qsfs_zstor::policy::Geometry;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// `qsfs dev DIR` and its verbs.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct DevArguments {
    #[command(subcommand)]
    command: Option<DevCommand>,
    #[command(flatten)]
    up: UpArguments,
}

/// Verbs of `qsfs dev`.
#[derive(Debug, Subcommand)]
pub(crate) enum DevCommand {
    /// Start a cluster and mount its volume, in the foreground (the same as `qsfs dev DIR`)
    Up(UpArguments),
    /// List the processes of a running one
    Ps {
        #[command(flatten)]
        data: DataDirectory,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Kill processes with SIGKILL
    Kill {
        /// Process, or location for all of its processes
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        data: DataDirectory,
    },
    /// Start processes that do not run
    Start {
        /// Process, or location for all of its processes
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        data: DataDirectory,
    },
    /// End it all: push, unmount, stop
    Down {
        #[command(flatten)]
        data: DataDirectory,
        /// Do not wait for data at risk to be pushed
        #[arg(long)]
        no_push: bool,
    },
}

/// Where a running one is.
#[derive(Debug, Args)]
pub(crate) struct DataDirectory {
    /// Its data directory, as printed at start
    #[arg(long, value_name = "D")]
    data_dir: PathBuf,
}

/// `qsfs dev up`.
#[derive(Debug, Args)]
pub(crate) struct UpArguments {
    /// Where the volume is mounted; made when missing
    #[arg(required = true)]
    dir: Option<PathBuf>,
    /// Where everything is kept [default: a temporary directory, removed at the end unless --keep]
    #[arg(long, value_name = "D")]
    data_dir: Option<PathBuf>,
    /// Keep a temporary data directory at the end
    #[arg(long)]
    keep: bool,
    /// Do not wait at the end for data at risk to be pushed
    #[arg(long)]
    no_push: bool,
    #[command(flatten)]
    options: DevOptions,
}

/// What a new cluster is like; kept with it.
#[derive(Debug, Clone, Args, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct DevOptions {
    /// Locations with agents
    #[arg(long, default_value = "2", value_parser = clap::value_parser!(u32).range(1..=16))]
    locations: u32,
    /// Backends per location, on two agents
    #[arg(long, default_value = "4", value_parser = clap::value_parser!(u32).range(1..=32))]
    backends: u32,
    /// Data and parity shards
    #[arg(long, default_value = "4+4", value_name = "K+M")]
    policy: Geometry,
    /// Bytes each backend may hold
    #[arg(long, default_value = "16GiB", value_parser = size, value_name = "SIZE")]
    capacity: u64,
    /// Data is pushed at the latest so long after it was written
    #[arg(long, default_value = "15s", value_parser = parse_duration)]
    push_interval: Duration,
    /// A datafile is sealed when it is so large
    #[arg(long, default_value = "64MiB", value_parser = size, value_name = "SIZE")]
    datafile_size: u64,
    /// Local bytes of the mount above which committed datafiles are evicted
    #[arg(long, value_parser = size, value_name = "SIZE")]
    cache_limit: Option<u64>,
    /// Between heartbeats of an agent
    #[arg(long, default_value = "500ms", value_parser = parse_duration)]
    heartbeat: Duration,
    /// Silence after which a backend is down
    #[arg(long, default_value = "3s", value_parser = parse_duration)]
    down_after: Duration,
    /// Down for so long, a backend is lost and its shards are rebuilt elsewhere
    #[arg(long, default_value = "15s", value_parser = parse_duration)]
    lost_after: Duration,
    /// Between scrub tours of a backend
    #[arg(long, default_value = "1h", value_parser = parse_duration)]
    scrub_interval: Duration,
    /// How long pieces of released datafiles are kept
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    tombstone_grace: Duration,
    /// Life of the writer's lease without renewal
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    lease_ttl: Duration,
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

/// Runs one.
pub(crate) async fn run(arguments: DevArguments) -> anyhow::Result<()> {
    let command = arguments.command.unwrap_or(DevCommand::Up(arguments.up));
    match command {
        DevCommand::Up(arguments) => up::run(arguments).await,
        DevCommand::Ps { data, json } => ps(&data.open()?, json),
        DevCommand::Kill { names, data } => kill(&data.open()?, &names).await,
        DevCommand::Start { names, data } => start(&data.open()?, &names).await,
        DevCommand::Down { data, no_push } => take_down::run(&data.open()?, no_push).await,
    }
}

impl DataDirectory {
    fn open(&self) -> anyhow::Result<Layout> {
        Layout::load(&self.data_dir)
    }
}

fn ps(layout: &Layout, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        let rows: Vec<_> = layout
            .members()
            .iter()
            .map(|member| {
                let pid = Process::of(layout, member).pid();
                json!({
                    "name": member.name, "location": member.location, "address": member.address,
                    "running": pid.is_some(), "pid": pid,
                })
            })
            .collect();
        return print_json("processes", &rows);
    }
    print(&table(layout).render())
}

/// What runs where.
fn table(layout: &Layout) -> Table {
    let mut table = Table::new(&["NAME", "LOCATION", "ADDRESS", "PID", "LOG"]);
    for member in layout.members() {
        let process = Process::of(layout, member);
        table.row(vec![
            member.name.clone(),
            member.location.clone(),
            member.address.clone(),
            process
                .pid()
                .map_or_else(|| "not running".to_owned(), |pid| pid.to_string()),
            process.log().display().to_string(),
        ]);
    }
    table
}

async fn kill(layout: &Layout, names: &[String]) -> anyhow::Result<()> {
    let members = layout.select(names)?;
    let processes: Vec<Process> = members
        .iter()
        .map(|member| Process::of(layout, member))
        .collect();
    // All at once, as when a location loses its power.
    let killed: Vec<&Process> = processes.iter().filter(|process| process.kill()).collect();
    for process in &killed {
        process.wait_gone(Duration::from_secs(10)).await?;
    }
    let names: Vec<&str> = killed.iter().map(|process| process.name()).collect();
    print(&match names.is_empty() {
        true => "nothing to kill: none of them runs\n".to_owned(),
        false => format!("killed {}\n", names.join(", ")),
    })
}

async fn start(layout: &Layout, names: &[String]) -> anyhow::Result<()> {
    let mut started = Vec::new();
    for member in order(layout.select(names)?) {
        let process = Process::of(layout, member);
        if process.pid().is_some() {
            continue;
        }
        up::start_again(layout, member)
            .await
            .with_context(|| format!("starting {}", member.name))?;
        started.push(member.name.as_str());
    }
    print(&match started.is_empty() {
        true => "nothing to start: all of them run\n".to_owned(),
        false => format!("started {}\n", started.join(", ")),
    })
}

/// metad nodes before agents before the mount: each needs the ones before it.
fn order(mut members: Vec<&Member>) -> Vec<&Member> {
    members.sort_by_key(|member| match member.kind {
        Kind::Metad => 0,
        Kind::Agent => 1,
        Kind::Mount => 2,
    });
    members
}
