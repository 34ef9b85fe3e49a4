//! What so many encoding records cost: applying, memory, disk, snapshots, starting, pages, planning, catching up, a change of leader.
//!
//! ```text
//! cargo run --release -p qsfs-metad --example scale -- [--records 5000000] [--commits 200000] [--dir D] [--no-cluster]
//! ```
//!
//! First single commits through the state machine, without network and log: CPU of one commit on one node. Then records are loaded
//! through the same apply, 256 in an entry, and a cluster of three processes is made out of them by way of a backup.

mod cluster;
mod load;

use anyhow::{Context as _, Result, bail};
use load::Loader;
use nix::sys::resource::{UsageWho, getrusage};
use qsfs_metad::machine::Machine;
use qsfs_metad::machine::rows::Fill;
use qsfs_metad::plan::index::Index;
use qsfs_metad::raft::LogEntry;
use qsfs_zstor::id::DatafileId;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Entries that openraft hands over at once, about.
const ENTRIES_AT_ONCE: u64 = 64;
/// Commits of one entry when proposals are grouped.
const GROUP: u64 = 64;
/// Looks at pages.
const LOOKS: u64 = 300;

struct Options {
    records: u64,
    commits: u64,
    cluster: bool,
    dir: Option<PathBuf>,
}

fn options() -> Result<Options> {
    let mut options = Options {
        records: 5_000_000,
        commits: 200_000,
        cluster: true,
        dir: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || {
            let value = arguments.next();
            value.with_context(|| format!("{name} wants a value"))
        };
        match name.as_str() {
            "--records" => options.records = value()?.parse()?,
            "--commits" => options.commits = value()?.parse()?,
            "--dir" => options.dir = Some(value()?.into()),
            "--no-cluster" => options.cluster = false,
            other => bail!("{other} is no option; see the head of this example's source"),
        }
    }
    Ok(options)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("serve") => return cluster::serve(Path::new(&arguments[2])),
        Some("open") => return open(Path::new(&arguments[2])),
        _ => {}
    }
    let options = options()?;
    let temporary = tempfile::tempdir()?;
    let root = options.dir.as_deref().unwrap_or(temporary.path());
    let runtime = tokio::runtime::Runtime::new()?;
    if options.commits > 0 {
        for group in [1, GROUP] {
            commits(
                &root.join(format!("commits-{group}")),
                options.commits,
                group,
            )?;
        }
    }
    if options.records == 0 {
        return Ok(());
    }
    let data = root.join("loaded");
    let context = runtime.block_on(cluster::born(&data))?;
    let backup = loaded(&data, options.records)?;
    child("open", &data)?;
    if options.cluster {
        runtime.block_on(cluster::run(root, &backup, &context))?;
    }
    Ok(())
}

pub(crate) fn child(what: &str, data: &Path) -> Result<()> {
    let status = std::process::Command::new(std::env::current_exe()?)
        .arg(what)
        .arg(data)
        .status()?;
    status.success().then_some(()).context("a child failed")
}

/// User and system time of this process or thread.
fn cpu(who: UsageWho) -> Result<Duration> {
    let used = getrusage(who)?;
    let micros = |time: nix::sys::time::TimeVal| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        Duration::from_secs(seconds)
            + Duration::from_micros(u64::try_from(time.tv_usec()).unwrap_or(0))
    };
    Ok(micros(used.user_time()) + micros(used.system_time()))
}

/// Single commits, each with a session, as callers send them.
fn commits(dir: &Path, count: u64, group: u64) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    let machine = Machine::open(dir)?;
    let mut loader = Loader::new(&machine)?;
    let (mut applying, mut moving) = (Duration::ZERO, Duration::ZERO);
    let whole = cpu(UsageWho::RUSAGE_SELF)?;
    let mut making = Duration::ZERO;
    for _ in 0..count / (group * ENTRIES_AT_ONCE) {
        let at = cpu(UsageWho::RUSAGE_THREAD)?;
        let entries: Vec<LogEntry> = (0..ENTRIES_AT_ONCE)
            .map(|_| loader.commits(group))
            .collect();
        let began = cpu(UsageWho::RUSAGE_THREAD)?;
        making += began - at;
        let (_, fill) = machine.apply(entries)?;
        let applied = cpu(UsageWho::RUSAGE_THREAD)?;
        applying += applied - began;
        if fill != Fill::Room {
            machine.relieve()?;
            moving += cpu(UsageWho::RUSAGE_THREAD)? - applied;
        }
    }
    let began = cpu(UsageWho::RUSAGE_THREAD)?;
    machine.relieve()?;
    moving += cpu(UsageWho::RUSAGE_THREAD)? - began;
    let whole = cpu(UsageWho::RUSAGE_SELF)? - whole;
    let behind = whole.saturating_sub(making + applying + moving);
    let count = count / (group * ENTRIES_AT_ONCE) * (group * ENTRIES_AT_ONCE);
    let each = |time: Duration| time.as_secs_f64() * 1e6 / count as f64;
    println!(
        "{count} commits, {group} an entry: CPU of each {:.2} us: apply {:.2}, move {:.2}, the store's threads {:.2}",
        each(applying + moving + behind),
        each(applying),
        each(moving),
        each(behind)
    );
    Ok(())
}

fn loaded(data: &Path, records: u64) -> Result<PathBuf> {
    let machine = Machine::open(data)?;
    let mut loader = Loader::new(&machine)?;
    let began = Instant::now();
    while loader.records() < records {
        let (_, fill) = machine.apply(vec![loader.bulk()])?;
        if fill != Fill::Room {
            machine.relieve()?;
        }
    }
    machine.flush()?;
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{} records loaded in {seconds:.1} s, {} MiB on disk, resident now/peak {}",
        loader.records(),
        size(&data.join("state"))? >> 20,
        memory(std::process::id())
    );
    index(&machine)?;
    pages(&machine, loader.records())?;
    let backup = data.with_extension("backup");
    if backup.exists() {
        std::fs::remove_file(&backup)?;
    }
    let copied = Instant::now();
    let longest = pause(&machine, &mut loader, || Ok(machine.copy_to(&backup)?))?;
    println!(
        "a copy (backup or snapshot) of {} MiB takes {:.1} s; longest apply meanwhile {longest:.1} ms; resident {}",
        size(&backup)? >> 20,
        copied.elapsed().as_secs_f64(),
        memory(std::process::id())
    );
    let facts = Instant::now();
    let found = qsfs_metad::backup::verify(&backup)?;
    println!(
        "verifying it takes {:.1} s: {} rows, {} records",
        facts.elapsed().as_secs_f64(),
        found.rows,
        found.records
    );
    std::fs::copy(
        data.join("ca-key.pem"),
        qsfs_metad::backup::key_path(&backup),
    )?;
    machine.flush()?;
    Ok(backup)
}

/// Longest apply of single commits, in ms, while `work` is done.
fn pause(
    machine: &Machine,
    loader: &mut Loader,
    work: impl Fn() -> Result<()> + Sync,
) -> Result<f64> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let working = scope.spawn(|| {
            let worked = work();
            done.store(true, Ordering::Release);
            worked
        });
        let mut longest = Duration::ZERO;
        while !done.load(Ordering::Acquire) {
            let entry = loader.commits(1);
            let began = Instant::now();
            machine.apply(vec![entry])?;
            longest = longest.max(began.elapsed());
            std::thread::sleep(Duration::from_millis(1));
        }
        working.join().expect("the worker does not panic")?;
        Ok(longest.as_secs_f64() * 1e3)
    })
}

/// The planner's index, as a new leader builds it.
#[expect(
    clippy::redundant_closure,
    reason = "the bare function is not general enough over the lifetime of the view"
)]
fn index(machine: &Machine) -> Result<()> {
    let before = resident(std::process::id(), "VmRSS:");
    let began = Instant::now();
    let mut longest = Duration::ZERO;
    let mut index = machine.read(|state| Index::begin(state))?;
    let mut steps = 0;
    loop {
        let step = Instant::now();
        let more = machine.read(|state| index.advance(state))?;
        longest = longest.max(step.elapsed());
        steps += 1;
        if !more {
            break;
        }
    }
    println!(
        "the planner's index takes {:.1} s in {steps} steps, the longest of {:.1} ms, and {:.0} MiB",
        began.elapsed().as_secs_f64(),
        longest.as_secs_f64() * 1e3,
        resident(std::process::id(), "VmRSS:") - before
    );
    Ok(())
}

/// Pages of 1,000 anywhere.
fn pages(machine: &Machine, records: u64) -> Result<()> {
    let mut list = Vec::new();
    let mut shards = Vec::new();
    for look in 0..LOOKS {
        // Far apart, in no order.
        let at = DatafileId(look * 0x9e37_79b9 % records);
        let began = Instant::now();
        machine.read(|state| state.records_after(load::VOLUME, at, 1_000))?;
        list.push(began.elapsed());
        let began = Instant::now();
        machine.read(|state| {
            let backend = state.backends()?[0].id;
            let page = state.shards_on(backend, Some((load::VOLUME, at, 255)), 1_000)?;
            for (volume, datafile, _) in page {
                state.record(volume, datafile)?;
            }
            Ok::<_, qsfs_metad::state::kv::KvError>(())
        })?;
        shards.push(began.elapsed());
    }
    for (name, mut times) in [
        ("records of a volume", list),
        ("shards of a backend, with records", shards),
    ] {
        times.sort();
        println!(
            "a page of 1,000 {name}: p50 {:.1} ms, longest {:.1} ms",
            times[times.len() / 2].as_secs_f64() * 1e3,
            times[times.len() - 1].as_secs_f64() * 1e3
        );
    }
    Ok(())
}

/// In a process of its own: opening, and what it takes.
fn open(data: &Path) -> Result<()> {
    let began = Instant::now();
    let machine = Machine::open(data)?;
    println!(
        "opening the state takes {:.1} s, applied {}; resident now/peak {}",
        began.elapsed().as_secs_f64(),
        machine.raft_row().applied.map_or(0, |id| id.index),
        memory(std::process::id())
    );
    Ok(())
}

fn size(path: &Path) -> Result<u64> {
    let found = std::fs::metadata(path)?;
    if !found.is_dir() {
        return Ok(found.len());
    }
    let mut sum = 0;
    for entry in std::fs::read_dir(path)? {
        sum += size(&entry?.path())?;
    }
    Ok(sum)
}

fn resident(pid: u32, field: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(field));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

/// Resident MiB of a process, now and at the highest.
pub(crate) fn memory(pid: u32) -> String {
    format!(
        "{:.0}/{:.0} MiB",
        resident(pid, "VmRSS:"),
        resident(pid, "VmHWM:")
    )
}
