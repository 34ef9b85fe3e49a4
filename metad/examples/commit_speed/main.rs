//! Commits per second of three metad processes on this machine, and, where etcd is installed, of three etcd processes in the same run.
//!
//! ```text
//! cargo run --release -p qsfs-metad --example commit_speed -- [--seconds 4] [--widths 1,8,64,256] [--etcd] [--kills 0] [--dir D] [--program QSFS]
//! ```
//!
//! One commit is one encoding record of four shards, whose log entry is about 256 bytes; one put of etcd is a key of 32 bytes and
//! a value of 256. Both are durable on a majority when they are answered. Callers share one connection per eight, as etcd's own
//! benchmark does with `--conns`. metad's side is a whole command of its state machine, over mutual TLS; etcd's is without TLS.
//! With `--program` the three are `QSFS metad serve`, what a user runs; without it they are this program, whose allocator is the C library's.
//! CPU is of all processes.

mod cluster;
mod etcd;
mod kills;

use anyhow::{Context as _, Result, bail};
use cluster::Cluster;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Callers that share a connection.
pub(crate) const CALLERS_PER_CONNECTION: usize = 8;
/// `USER_HZ`, which is 100 wherever Linux says anything to processes.
const TICKS_PER_SECOND: f64 = 100.0;

struct Options {
    seconds: u64,
    widths: Vec<usize>,
    etcd: bool,
    kills: usize,
    dir: Option<PathBuf>,
    program: Option<PathBuf>,
}

fn options() -> Result<Options> {
    let mut options = Options {
        seconds: 4,
        widths: vec![1, 8, 64, 256],
        etcd: false,
        kills: 0,
        dir: None,
        program: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .with_context(|| format!("{name} wants a value"))
        };
        match name.as_str() {
            "--seconds" => options.seconds = value()?.parse()?,
            "--widths" => {
                let parsed: Result<_, _> = value()?.split(',').map(str::parse).collect();
                options.widths = parsed?;
            }
            "--kills" => options.kills = value()?.parse()?,
            "--dir" => options.dir = Some(value()?.into()),
            "--program" => options.program = Some(value()?.into()),
            "--etcd" => options.etcd = true,
            other => bail!("{other} is no option; see the head of this example's source"),
        }
    }
    Ok(options)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("serve") {
        return cluster::serve(
            arguments
                .next()
                .context("serve wants a data directory")?
                .into(),
        );
    }
    let options = options()?;
    let temporary = tempfile::tempdir()?;
    let root = options
        .dir
        .clone()
        .unwrap_or_else(|| temporary.path().to_owned());
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(run(&options, &root))
}

async fn run(options: &Options, root: &std::path::Path) -> Result<()> {
    let mut cluster = Cluster::start(&root.join("metad"), options.program.as_deref()).await?;
    println!("log entry of one commit: {} bytes", cluster.entry_bytes());
    let span = Duration::from_secs(options.seconds);
    let mut leader = cluster.leader().await?;
    for width in &options.widths {
        let before = cpu_seconds(&cluster.pids());
        let latencies = cluster.commits(*width, span).await?;
        report("metad", *width, &latencies, &before, &cluster.pids());
        let leads = cluster.leader().await?;
        if leads != leader {
            println!("metad: the leader changed meanwhile");
            leader = leads;
        }
    }
    println!("metad resident now/peak, MiB: {}", memory(&cluster.pids()));
    if options.kills > 0 {
        kills::run(&mut cluster, options.kills).await?;
    }
    drop(cluster);
    if options.etcd {
        let etcd = etcd::Etcd::start(&root.join("etcd")).await?;
        for width in &options.widths {
            let before = cpu_seconds(&etcd.pids());
            let latencies = etcd.puts(*width, span).await?;
            report("etcd ", *width, &latencies, &before, &etcd.pids());
        }
        println!("etcd  resident now/peak, MiB: {}", memory(&etcd.pids()));
    }
    Ok(())
}

/// Latencies of what was answered within a span.
pub(crate) struct Latencies {
    pub(crate) ms: Vec<f64>,
    pub(crate) seconds: f64,
}

/// Runs callers until the span is over and gathers what each measured.
pub(crate) async fn gather<F: Future<Output = Result<Vec<f64>>> + Send + 'static>(
    callers: impl Iterator<Item = F>,
) -> Result<Latencies> {
    let began = Instant::now();
    let tasks: Vec<_> = callers.map(tokio::spawn).collect();
    let mut ms = Vec::new();
    for task in tasks {
        ms.extend(task.await??);
    }
    let seconds = began.elapsed().as_secs_f64();
    ms.sort_by(f64::total_cmp);
    Ok(Latencies { ms, seconds })
}

pub(crate) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or(0.0)
}

/// `before`: CPU-seconds of `pids` and this process when the span began.
fn report(name: &str, width: usize, latencies: &Latencies, before: &[f64], pids: &[u32]) {
    let answers = latencies.ms.len() as f64;
    let spent = cpu_seconds(pids);
    let each = spent.iter().zip(before);
    let each = each.map(|(now, then)| format!("{:.0}", (now - then) * 1e6 / answers.max(1.0)));
    println!(
        "{name} {width:>4} callers: {:>6.0} per second, p50 {:>6.2} ms, p99 {:>6.2} ms, CPU us each (members, callers): {}",
        answers / latencies.seconds,
        percentile(&latencies.ms, 50),
        percentile(&latencies.ms, 99),
        each.collect::<Vec<_>>().join(" "),
    );
}

/// CPU-seconds spent by processes and, last, by this one.
fn cpu_seconds(pids: &[u32]) -> Vec<f64> {
    let of = |pid: u32| -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // proc_pid_stat(5): utime and stime are fields 14 and 15, the 12th and 13th behind the name.
        let behind = text.rsplit_once(')').map_or("", |(_, behind)| behind);
        let ticks = behind.split_whitespace().skip(11).take(2);
        ticks.filter_map(|ticks| ticks.parse::<f64>().ok()).sum()
    };
    let pids = pids.iter().copied().chain([std::process::id()]);
    pids.map(|pid| of(pid) / TICKS_PER_SECOND).collect()
}

/// Resident MiB of processes, now and at their highest.
fn memory(pids: &[u32]) -> String {
    let mib = |pid: u32, field: &str| -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(field));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
        kib.unwrap_or(0.0) / 1024.0
    };
    let each = pids
        .iter()
        .map(|pid| format!("{:.0}/{:.0}", mib(*pid, "VmRSS:"), mib(*pid, "VmHWM:")));
    each.collect::<Vec<_>>().join("  ")
}
