//! Tells metad of shards that were found missing or corrupt, without making the reader wait.

use crate::cluster::Cluster;
use qsfs_proto::api::{Mutation, ShardReport};
use qsfs_zstor::id::{BackendId, DatafileId};
use qsfs_zstor::record::{EncodingRecord, ShardState};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Reports waiting at most; more are found again by the next read.
const REPORTS_MAX: usize = 256;
/// The same shard is not reported again within this time.
const AGAIN_AFTER: Duration = Duration::from_secs(60);
/// Deadline of one report.
const DEADLINE: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(super) struct Reporter {
    reports: mpsc::Sender<ShardReport>,
}

impl Reporter {
    /// Starts the task; it ends when the reporter is dropped.
    pub(super) fn start(cluster: Arc<dyn Cluster>) -> Self {
        let (reports, inbox) = mpsc::channel(REPORTS_MAX);
        tokio::spawn(run(cluster, inbox));
        Self { reports }
    }

    /// Queues a report.
    pub(super) fn report(&self, record: &EncodingRecord, shard: usize, state: ShardState) {
        let report = ShardReport {
            volume: record.volume,
            datafile: record.datafile,
            shard: u32::try_from(shard).unwrap_or(u32::MAX),
            backend: record.shards[shard].backend,
            state,
            by_scrub: false,
        };
        // A full queue means that many were reported just now.
        let _ = self.reports.try_send(report);
    }
}

async fn run(cluster: Arc<dyn Cluster>, mut inbox: mpsc::Receiver<ShardReport>) {
    let mut told: HashMap<(DatafileId, u32, BackendId), Instant> = HashMap::new();
    let mut batch = Vec::new();
    while inbox.recv_many(&mut batch, REPORTS_MAX).await > 0 {
        told.retain(|_, at| at.elapsed() < AGAIN_AFTER);
        let mut reports = std::mem::take(&mut batch);
        reports.retain(|report| {
            let key = (report.datafile, report.shard, report.backend);
            told.insert(key, Instant::now()).is_none()
        });
        if reports.is_empty() {
            continue;
        }
        tracing::warn!(shards = reports.len(), first = ?reports[0], "shards found bad by a read are reported");
        let keys: Vec<_> = reports
            .iter()
            .map(|report| (report.datafile, report.shard, report.backend))
            .collect();
        if let Err(error) = cluster
            .mutate(Mutation::ReportShards { reports }, DEADLINE)
            .await
        {
            tracing::warn!(%error, "cannot report bad shards now; the next read that meets them tries again");
            for key in keys {
                told.remove(&key);
            }
        }
    }
}
