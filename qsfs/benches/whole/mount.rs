//! What a person feels through the mount, beside a plain directory and a memory filesystem in the same run.

use crate::cluster::{self, Cluster};
use crate::files::{self, SMALL_BYTES, SMALL_FILES, Small};
use crate::memory_fs::MemoryFs;
use crate::report::{Report, Row};
use anyhow::Result;
use std::fs;
use std::path::Path;
use std::time::Instant;

/// Files of the repository that is cloned.
const REPOSITORY_FILES: usize = 2_000;

struct Measured {
    write: f64,
    warm: f64,
    local: f64,
    random: f64,
    small: Small,
    clone: f64,
    write_cpu: f64,
    small_cpu: f64,
}

/// All of them on one directory. `cpu` tells the CPU-seconds of whoever serves it.
fn measure(
    dir: &Path,
    repository: &Path,
    bytes: u64,
    cpu: &dyn Fn() -> Result<f64>,
) -> Result<Measured> {
    let file = dir.join("sequential");
    let gib = bytes as f64 / f64::from(1u32 << 30);
    let before = cpu()?;
    let write = files::write_sequential(&file, bytes, 11)?;
    let write_cpu = (cpu()? - before) / gib;
    let warm = files::read_sequential(&file)?;
    files::drop_pages(&file)?;
    let local = files::read_sequential(&file)?;
    files::drop_pages(&file)?;
    let random = files::read_random(&file)?;
    let before = cpu()?;
    let small = files::small_files(dir)?;
    let small_cpu = cpu()? - before;
    let clone = files::clone(repository, &dir.join("clone"))?;
    fs::remove_dir_all(dir.join("clone"))?;
    Ok(Measured {
        write,
        warm,
        local,
        random,
        small,
        clone,
        write_cpu,
        small_cpu,
    })
}

/// One row per measurement, three places side by side.
fn compare(plain: &Measured, memory: &Measured, ours: &Measured, report: &mut Report) {
    let mut row = |what: &str, unit, plain, memory, ours, cpu, predecessor| {
        let what = what.to_owned();
        report.row(Row {
            what,
            unit,
            plain: Some(plain),
            memory: Some(memory),
            ours,
            cpu,
            predecessor,
        });
    };
    row(
        "sequential write, 1 MiB blocks, fsync at the end",
        "MB/s",
        plain.write,
        memory.write,
        ours.write,
        Some(ours.write_cpu),
        Some(51.0),
    );
    row(
        "sequential read, warm",
        "MB/s",
        plain.warm,
        memory.warm,
        ours.warm,
        None,
        Some(231.0),
    );
    row(
        "sequential read, kernel pages dropped (local datafiles)",
        "MB/s",
        plain.local,
        memory.local,
        ours.local,
        None,
        Some(231.0),
    );
    row(
        "4 KiB random read, kernel pages dropped",
        "reads/s",
        plain.random,
        memory.random,
        ours.random,
        None,
        None,
    );
    let cpu = Some(ours.small_cpu);
    row(
        "10,000 files of 4 KiB: create+write+close",
        "files/s",
        plain.small.create,
        memory.small.create,
        ours.small.create,
        cpu,
        Some(1265.0),
    );
    row(
        "10,000 files: stat",
        "files/s",
        plain.small.stat,
        memory.small.stat,
        ours.small.stat,
        None,
        None,
    );
    row(
        "10,000 files: read",
        "files/s",
        plain.small.read,
        memory.small.read,
        ours.small.read,
        None,
        None,
    );
    row(
        "10,000 files: unlink",
        "files/s",
        plain.small.unlink,
        memory.small.unlink,
        ours.small.unlink,
        None,
        None,
    );
    row(
        "git clone of 2,000 files",
        "clones/s",
        1.0 / plain.clone,
        1.0 / memory.clone,
        1.0 / ours.clone,
        None,
        None,
    );
}

/// Runs the whole comparison with a file of `bytes`.
pub(crate) fn run(root: &Path, bytes: u64, report: &mut Report) -> Result<()> {
    let repository = root.join("repository");
    files::make_repository(&repository, REPOSITORY_FILES)?;
    let this = || Ok(cluster::cpu_seconds("self"));

    let plain_dir = root.join("plain");
    fs::create_dir_all(&plain_dir)?;
    let plain = measure(&plain_dir, &repository, bytes, &this)?;

    let memory_dir = root.join("memory");
    fs::create_dir_all(&memory_dir)?;
    let session = MemoryFs::mount(&memory_dir)?;
    let memory = measure(&memory_dir, &repository, bytes, &this);
    session.umount_and_join()?;
    let memory = memory?;

    let cluster = Cluster::start(&root.join("ours"), &[])?;
    let all = || Ok(cluster.cpu_seconds()? + cluster::cpu_seconds("self"));
    let ours = measure(&cluster.mount(), &repository, bytes, &all)?;
    let gib = bytes as f64 / f64::from(1u32 << 30);

    compare(&plain, &memory, &ours, report);

    cluster.sync()?;
    cluster.evict()?;
    let before = all()?;
    let evicted = files::read_sequential(&cluster.mount().join("sequential"))?;
    report.row(Row {
        what: "sequential read, evicted".into(),
        unit: "MB/s",
        plain: Some(plain.local),
        memory: Some(memory.local),
        ours: evicted,
        cpu: Some((all()? - before) / gib),
        predecessor: Some(75.0),
    });
    report.note(format!(
        "Sequential file: {} MiB of incompressible bytes; CPU-seconds are per GiB of all processes (client, agents, \
         metad, caller), for small files per whole workload ({SMALL_FILES} files of {SMALL_BYTES} bytes).",
        bytes >> 20
    ));
    Ok(())
}

/// Writes, pushes, evicts and fetches `bytes` (4 GiB in the issue) and tells the peaks of memory.
pub(crate) fn memory(root: &Path, bytes: u64, report: &mut Report) -> Result<()> {
    let cluster = Cluster::start(&root.join("memory-run"), &[])?;
    let file = cluster.mount().join("large");
    let began = Instant::now();
    files::write_sequential(&file, bytes, 3)?;
    cluster.sync()?;
    cluster.evict()?;
    files::read_sequential(&file)?;
    let seconds = began.elapsed().as_secs_f64();
    for (process, limit) in [("mount", 512.0), ("agent", 256.0), ("metad", 256.0)] {
        report.row(Row {
            what: format!("peak resident memory of {process} (limit {limit} MiB)"),
            unit: "MiB",
            plain: None,
            memory: None,
            ours: cluster.peak_mib(process)?,
            cpu: None,
            predecessor: None,
        });
    }
    report.note(format!(
        "Memory was taken while writing, pushing and fetching {} MiB in {seconds:.0} s.",
        bytes >> 20
    ));
    Ok(())
}
