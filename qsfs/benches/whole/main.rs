//! `just bench`: what the machine can do and what QSFS does, in one run, as ratios. Never a timed test.
//!
//! Usage: `cargo bench -p qsfs -- [mount|memory|shards|metad ...] [--mib N] [--write FILE]`

mod cluster;
mod files;
mod memory_fs;
mod metad;
mod mount;
mod report;
mod shards;

use anyhow::{Context, Result, bail};
use report::Report;
use std::path::PathBuf;

const PARTS: [&str; 4] = ["mount", "shards", "metad", "memory"];

struct Wanted {
    parts: Vec<String>,
    mib: u64,
    write: Option<PathBuf>,
}

fn wanted() -> Result<Wanted> {
    let mut wanted = Wanted {
        parts: Vec::new(),
        mib: 1024,
        write: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--bench" => {}
            "--mib" => wanted.mib = words.next().context("--mib N")?.parse()?,
            "--write" => wanted.write = Some(words.next().context("--write FILE")?.into()),
            part if PARTS.contains(&part) => wanted.parts.push(part.to_owned()),
            other => bail!("{other:?} is none of {PARTS:?}, --mib N, --write FILE"),
        }
    }
    if wanted.parts.is_empty() {
        wanted.parts = PARTS.map(String::from).to_vec();
    }
    Ok(wanted)
}

fn main() -> Result<()> {
    let wanted = wanted()?;
    let root = tempfile::Builder::new().prefix("qsfs-bench-").tempdir()?;
    let mut report = Report::default();
    for part in &wanted.parts {
        eprintln!("== {part}");
        match part.as_str() {
            "mount" => mount::run(root.path(), wanted.mib << 20, &mut report)?,
            "shards" => shards::run(root.path(), wanted.mib << 20, &mut report)?,
            "metad" => metad::run(root.path(), &mut report)?,
            _ => mount::memory(root.path(), 4 << 30, &mut report)?,
        }
    }
    let table = report.markdown();
    println!("{table}");
    if let Some(path) = wanted.write {
        let command = format!(
            "cargo bench -p qsfs -- {} --mib {}",
            wanted.parts.join(" "),
            wanted.mib
        );
        let text = format!(
            "# Benchmarks\n\nMade by `{command}` on {}.\n\n{table}",
            machine()
        );
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// What it ran on, as far as `/proc` tells.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or(" : unknown CPU");
    let cores = cpu
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let memory = read("/proc/meminfo");
    let kib = memory
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse::<u64>().ok())
        .unwrap_or(0);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!(
        "{cores} cores of {}, {} GiB of memory, Linux {}",
        model.trim_start_matches([' ', '\t', ':']).trim(),
        kib >> 20,
        kernel.split('-').next().unwrap_or_default().trim()
    )
}
