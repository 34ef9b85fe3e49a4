//! Push, fetch, the same with two shards missing, and rebuild, per geometry, over a real cluster.

use crate::cluster::{self, Cluster};
use crate::files;
use crate::report::{Report, Row};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const REBUILD_DEADLINE: Duration = Duration::from_secs(300);
/// Backends per location, so that one backend takes one shard.
const GEOMETRIES: [(&str, &str, f64); 3] =
    [("4+2", "4", 6.0), ("4+4", "4", 8.0), ("10+5", "8", 15.0)];

/// Runs all geometries with a file of `bytes`.
pub(crate) fn run(root: &Path, bytes: u64, report: &mut Report) -> Result<()> {
    for (geometry, backends, total) in GEOMETRIES {
        one(
            &root.join(geometry),
            geometry,
            backends,
            total,
            bytes,
            report,
        )
        .with_context(|| format!("measure {geometry}"))?;
    }
    report.note(
        "Push is `qsfs sync` of a freshly written file; fetch is a sequential read after `cache evict --all`. Client, \
         agents and metad share the machine's cores; every byte crosses TLS and reaches the disks before it counts. \
         MB/s are of plaintext, for rebuild of shard bytes made."
            .to_owned(),
    );
    Ok(())
}

fn one(
    root: &Path,
    geometry: &str,
    backends: &str,
    total: f64,
    bytes: u64,
    report: &mut Report,
) -> Result<()> {
    let arguments = [
        "--policy",
        geometry,
        "--backends",
        backends,
        "--down-after",
        "3s",
        "--lost-after",
        "20s",
        "--push-interval",
        "1h",
    ];
    let cluster = Cluster::start(root, &arguments)?;
    let file = cluster.mount().join("pushed");
    let all = || Ok::<f64, anyhow::Error>(cluster.cpu_seconds()? + cluster::cpu_seconds("self"));
    let (megabytes, gib) = (bytes as f64 / 1e6, bytes as f64 / f64::from(1u32 << 30));
    let mut row = |what: String, ours, cpu: Option<f64>, predecessor| {
        report.row(Row {
            what,
            unit: "MB/s",
            plain: None,
            memory: None,
            ours,
            cpu,
            predecessor,
        });
    };

    let before = all()?;
    files::write_sequential(&file, bytes, 21)?;
    let after_write = all()?;
    let seconds = cluster.sync()?;
    row(
        format!("push {geometry} (what the mount had not pushed yet while writing)"),
        megabytes / seconds,
        Some((all()? - after_write) / gib),
        Some(82.0),
    );
    let whole = all()? - before;
    cluster.evict()?;
    let before = all()?;
    let rate = files::read_sequential(&file)?;
    row(
        format!("fetch {geometry}"),
        rate,
        Some((all()? - before) / gib),
        Some(75.0),
    );

    let removed = remove_backends(&cluster, 2)?;
    cluster.evict()?;
    let before = all()?;
    let rate = files::read_sequential(&file)?;
    row(
        format!("fetch {geometry}, two backends gone"),
        rate,
        Some((all()? - before) / gib),
        Some(27.0),
    );

    let (shard_bytes, seconds) = rebuild(&cluster, &removed, megabytes * total, total)?;
    row(
        format!("rebuild {geometry}, two backends"),
        shard_bytes / seconds,
        None,
        Some(14.0),
    );
    row(
        format!("write and push {geometry}, CPU-seconds per GiB in the CPU column"),
        megabytes / seconds,
        Some(whole / gib),
        None,
    );
    Ok(())
}

/// Deletes the directories of `count` backends for good.
fn remove_backends(cluster: &Cluster, count: usize) -> Result<Vec<PathBuf>> {
    let mut directories = Vec::new();
    for (name, _) in cluster
        .processes()?
        .into_iter()
        .filter(|(name, _)| name.starts_with("agent"))
    {
        for entry in fs::read_dir(cluster.data().join(name).join("data"))? {
            let path = entry?.path();
            if path.is_dir()
                && path
                    .file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with("backend"))
            {
                directories.push(path);
            }
        }
    }
    directories.sort();
    if directories.len() < count {
        bail!(
            "found {} backend directories below {}",
            directories.len(),
            cluster.data().display()
        );
    }
    directories.truncate(count);
    directories.iter().try_for_each(fs::remove_dir_all)?;
    Ok(directories)
}

/// Waits until nothing is pending; MB of shards made, and the seconds in which it was done.
fn rebuild(
    cluster: &Cluster,
    removed: &[PathBuf],
    stored_megabytes: f64,
    total: f64,
) -> Result<(f64, f64)> {
    let pending = || -> Result<u64> {
        cluster.status()?["resilver"]["pending_shards"]
            .as_u64()
            .context("resilver.pending_shards in status")
    };
    let deadline = Instant::now() + REBUILD_DEADLINE;
    let wait = |done: &dyn Fn(u64) -> bool| -> Result<()> {
        while !done(pending()?) {
            if Instant::now() > deadline {
                bail!(
                    "re-silver of {removed:?} did not end: {}",
                    cluster.status()?["resilver"]
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    };
    wait(&|pending| pending > 0)?;
    let began = Instant::now();
    wait(&|pending| pending == 0)?;
    Ok((
        stored_megabytes / total * removed.len() as f64,
        began.elapsed().as_secs_f64(),
    ))
}
