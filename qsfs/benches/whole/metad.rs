//! Commits per second of three metad processes: one encoding record a commit, durable on a majority before the answer.

use crate::cluster::Cluster;
use crate::report::{Report, Row};
use anyhow::{Context as _, Result, bail};
use qsfs_proto::api::{Applied, Mutation};
use qsfs_proto::client::MetadClient;
use qsfs_proto::context::Context;
use qsfs_zstor::id::{
    BackendId, ClientId, DatafileId, Epoch, Salt, ShardHash, Stream, VolumeId, VolumeName,
};
use qsfs_zstor::policy::Geometry;
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const WIDTHS: [usize; 3] = [1, 8, 64];
const SECONDS: u64 = 5;

/// Runs all widths on one cluster.
pub(crate) fn run(root: &Path, report: &mut Report) -> Result<()> {
    let cluster = Cluster::start(&root.join("metad-run"), &[])?;
    let kit = root.join("bench.kit").display().to_string();
    cluster.qsfs(&[
        "volume", "create", "bench", "--policy", "4+4", "--kit", &kit,
    ])?;
    let context = Context::find(Some(&cluster.data().join("cluster.toml")))?;
    let runtime = tokio::runtime::Runtime::new()?;
    let next = Arc::new(AtomicU64::new(1));
    for width in WIDTHS {
        let (commits, latencies) = runtime.block_on(commits(&context, width, Arc::clone(&next)))?;
        report.row(Row {
            what: format!(
                "metad commits, {width} callers (p50 {:.1} ms, p99 {:.1} ms)",
                percentile(&latencies, 50),
                percentile(&latencies, 99)
            ),
            unit: "commits/s",
            plain: None,
            memory: None,
            ours: commits,
            cpu: None,
            predecessor: None,
        });
    }
    report.row(Row {
        what: "peak resident memory of metad during that".into(),
        unit: "MiB",
        plain: None,
        memory: None,
        ours: cluster.peak_mib("metad")?,
        cpu: None,
        predecessor: None,
    });
    Ok(())
}

fn percentile(sorted_ms: &[f64], percent: usize) -> f64 {
    sorted_ms
        .get(sorted_ms.len() * percent / 100)
        .copied()
        .unwrap_or(0.0)
}

async fn commits(context: &Context, width: usize, next: Arc<AtomicU64>) -> Result<(f64, Vec<f64>)> {
    let client = |byte: u8| context.client(ClientId::from_bytes([byte; 16]));
    let holder = client(1)?;
    let name: VolumeName = "bench".parse()?;
    let volume = holder.volume(&name).await?.id;
    let lease = Mutation::AcquireLease {
        volume,
        client: ClientId::from_bytes([1; 16]),
        holder: "bench:1".into(),
        takeover: true,
    };
    let Applied::Epoch(epoch) = holder.mutate(lease).await? else {
        bail!("a lease was not answered with an epoch");
    };
    let backends: Arc<Vec<BackendId>> = Arc::new(
        holder
            .backends()
            .await?
            .iter()
            .map(|backend| backend.id)
            .collect(),
    );
    let began = Instant::now();
    let until = began + Duration::from_secs(SECONDS);
    let mut callers = Vec::new();
    for caller in 0..width {
        let client = client(u8::try_from(caller + 2)?)?;
        let (next, backends) = (Arc::clone(&next), Arc::clone(&backends));
        callers.push(tokio::spawn(async move {
            one(client, volume, epoch, &backends, &next, until).await
        }));
    }
    let mut latencies = Vec::new();
    for caller in callers {
        latencies.extend(caller.await.context("caller")??);
    }
    let seconds = began.elapsed().as_secs_f64();
    let commits = latencies.len() as f64 / seconds;
    latencies.sort_by(f64::total_cmp);
    Ok((commits, latencies))
}

async fn one(
    client: MetadClient,
    volume: VolumeId,
    epoch: Epoch,
    backends: &[BackendId],
    next: &AtomicU64,
    until: Instant,
) -> Result<Vec<f64>> {
    let mut latencies = Vec::new();
    while Instant::now() < until {
        let record = record(
            volume,
            epoch,
            DatafileId(next.fetch_add(1, Ordering::Relaxed)),
            backends,
        )?;
        let began = Instant::now();
        client
            .mutate(Mutation::CommitDatafiles {
                volume,
                epoch,
                records: vec![record],
                head: None,
            })
            .await?;
        latencies.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(latencies)
}

/// A record as a push would commit it; nothing is stored behind it.
fn record(
    volume: VolumeId,
    epoch: Epoch,
    datafile: DatafileId,
    backends: &[BackendId],
) -> Result<EncodingRecord> {
    let geometry = Geometry::new(4, 4)?;
    let shards = backends
        .iter()
        .cycle()
        .take(geometry.total())
        .map(|backend| Shard {
            backend: *backend,
            hash: ShardHash::from_bytes([7; 32]),
            state: ShardState::Stored,
        });
    Ok(EncodingRecord {
        volume,
        datafile,
        stream: Stream::Data,
        epoch,
        salt: Salt::from_bytes([9; 16]),
        geometry,
        chunk_bytes: 1 << 20,
        plain_bytes: 64 << 20,
        object_bytes: 64 << 20,
        shard_bytes: 16 << 20,
        piece_bytes: 1 << 20,
        shards: shards.collect(),
        version: 0,
    })
}
