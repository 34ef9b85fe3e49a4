//! Push, fetch, the same with two shards missing, and rebuild, per geometry, over a real cluster.

use crate::cluster::{self, Cluster};
use crate::files;
use crate::report::{Report, Row};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const REBUILD_DEADLINE: Duration = Duration::from_secs(300);
/// Geometry, backends per location (so that one backend takes one shard), data shards.
const GEOMETRIES: [(&str, &str, f64); 3] =
    [("4+2", "4", 4.0), ("4+4", "4", 4.0), ("10+5", "8", 10.0)];

/// Runs all geometries with a file of `bytes`.
pub(crate) fn run(root: &Path, bytes: u64, report: &mut Report) -> Result<()> {
    for (geometry, backends, data) in GEOMETRIES {
        one(
            &root.join(geometry),
            geometry,
            backends,
            data,
            bytes,
            report,
        )
        .with_context(|| format!("measure {geometry}"))?;
    }
    report.note(
        "Push is from the first byte written to the end of `qsfs sync`, since sealed datafiles are pushed while the rest \
         is still being written; fetch is a sequential read after `cache evict --all`. Client, \
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
    data: f64,
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
    let began = Instant::now();
    files::write_sequential(&file, bytes, 21)?;
    cluster.sync()?;
    row(
        format!("write and push {geometry}"),
        megabytes / began.elapsed().as_secs_f64(),
        Some((all()? - before) / gib),
        Some(82.0),
    );
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

    let (shard_megabytes, seconds) = rebuild(&cluster, &removed, megabytes / data)?;
    row(
        format!("rebuild {geometry}, two backends"),
        shard_megabytes / seconds,
        None,
        Some(14.0),
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
fn rebuild(cluster: &Cluster, removed: &[PathBuf], shard_megabytes: f64) -> Result<(f64, f64)> {
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
        shard_megabytes * removed.len() as f64,
        began.elapsed().as_secs_f64(),
    ))
}
