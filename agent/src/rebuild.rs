//! Making one shard again: the shell that carries out a rebuild job, row by row.
//!
//! ```text
//! look at the record ─▶ rows: fetch k pieces ─▶ reconstruct ─▶ store ─▶ … ─▶ hash = record's? ─▶ swap ─▶ report
//! ```
//!
//! Invariants: nothing is recorded before all pieces are durable and the shard's hash is the record's; pieces are
//! removed only after a fresh look shows that no record places the shard there; what is in memory is the window, not
//! the shard. A crash at any point leaves at most pieces that belong to no record; they are swept later.

use crate::cluster::{Cluster, Swap};
use crate::jobs::{Outcome, ShardKey};
use crate::store::{PieceStore, Stores};
use crate::survivors::{Row, Survivors};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use qsfs_proto::api::{MetadError, RebuildJob};
use qsfs_zstor::codec::{RebuildError, ShardRebuilder, Stripe};
use qsfs_zstor::id::BackendId;
use qsfs_zstor::piece::PieceKey;
use qsfs_zstor::record::{EncodingRecord, ShardState};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Attempts to record the new place while the record changes under us (other shards of it are being rebuilt).
const SWAP_TRIES_MAX: u32 = 16;
/// Deletions in flight for one shard.
const DELETES_IN_FLIGHT: usize = 8;

/// Why a rebuild failed.
#[derive(Debug, thiserror::Error)]
enum JobError {
    #[error("metad: {0}")]
    Metad(#[from] MetadError),
    #[error("backend {0} is not of this agent")]
    NotOurs(BackendId),
    #[error("datafile was released meanwhile")]
    Released,
    #[error("shard is on backend {0} meanwhile")]
    Moved(BackendId),
    #[error("cannot read enough survivors: {0}")]
    Survivors(String),
    #[error("cannot store on backend {backend}: {reason}")]
    Store { backend: BackendId, reason: String },
    #[error(transparent)]
    Rebuild(#[from] RebuildError),
    #[error("record changed {SWAP_TRIES_MAX} times while the new place was being recorded")]
    Contended,
}

/// Carries out orders.
pub(crate) struct Rebuilder {
    /// metad.
    pub(crate) cluster: Arc<dyn Cluster>,
    /// Backends.
    pub(crate) stores: Arc<Stores>,
}

enum Look {
    /// Still to be made.
    Wanted(EncodingRecord),
    /// Somebody (an earlier run) did it.
    Done,
}

impl Rebuilder {
    /// Runs a rebuild to its end.
    pub(crate) async fn rebuild(
        &self,
        job: &RebuildJob,
        window_rows: u32,
        cancel: CancellationToken,
    ) -> Outcome {
        let mut wrote = false;
        let run = self.run(job, window_rows as usize, &mut wrote);
        let result = tokio::select! {
            result = run => Some(result),
            () = cancel.cancelled() => None,
        };
        match result {
            Some(Ok(bytes)) => {
                tracing::info!(volume = %job.record.volume, datafile = %job.record.datafile, shard = job.shard, backend = %job.to, bytes, "rebuilt shard");
                Outcome::Rebuilt { bytes }
            }
            failed => {
                if wrote {
                    self.remove_partial(job).await;
                }
                let Some(Err(error)) = failed else {
                    return Outcome::Cancelled;
                };
                tracing::warn!(volume = %job.record.volume, datafile = %job.record.datafile, shard = job.shard, backend = %job.to, %error, "rebuild failed");
                Outcome::Failed {
                    error: error.to_string(),
                }
            }
        }
    }

    async fn run(
        &self,
        job: &RebuildJob,
        window: usize,
        wrote: &mut bool,
    ) -> Result<u64, JobError> {
        let target = self.stores.own(job.to).ok_or(JobError::NotOurs(job.to))?;
        let record = match self.look(job).await? {
            Look::Wanted(record) => record,
            Look::Done => return Ok(0),
        };
        let stripe = Stripe::of(&record).map_err(RebuildError::from)?;
        let survivors = Survivors::new(&record, stripe, job.shard, &self.stores);
        let in_place = record.shards[job.shard as usize].backend == job.to;
        *wrote = true;
        let made = loop {
            let mut rebuilder = ShardRebuilder::new(&record, job.shard)?;
            let bytes = copy_rows(&mut rebuilder, &survivors, job, &target, window, in_place).await;
            match bytes.and_then(|bytes| Ok(rebuilder.verify().map(|()| bytes)?)) {
                // Every piece was sound and the whole is wrong: some shard is not the one that was committed.
                Err(JobError::Rebuild(RebuildError::HashMismatch(_)))
                    if survivors.find_liars() || survivors.exclude(job.shard) => {}
                result => break result,
            }
        };
        let swapped = match made {
            Ok(bytes) => self.swap(job, record).await.map(|()| bytes),
            Err(error) => Err(error),
        };
        // After the swap: a report changes the record's version.
        let reports = survivors.reports();
        if !reports.is_empty() {
            tracing::warn!(count = reports.len(), volume = %job.record.volume, datafile = %job.record.datafile, "found bad survivors");
            if let Err(error) = self.cluster.report_shards(reports).await {
                tracing::warn!(%error, "cannot report bad survivors; a scrub will find them again");
            }
        }
        swapped
    }

    async fn fresh(&self, job: &RebuildJob) -> Result<EncodingRecord, JobError> {
        let records = self
            .cluster
            .records(job.record.volume, &[job.record.datafile])
            .await?;
        records
            .into_iter()
            .find(|record| ShardKey::of(record, job.shard) == ShardKey::of(&job.record, job.shard))
            .filter(|record| record.shards.len() > job.shard as usize)
            .ok_or(JobError::Released)
    }

    async fn look(&self, job: &RebuildJob) -> Result<Look, JobError> {
        let record = self.fresh(job).await?;
        let now = &record.shards[job.shard as usize];
        let planned_from = job.record.shards[job.shard as usize].backend;
        if now.backend == job.to && now.state == ShardState::Stored && planned_from != job.to {
            return Ok(Look::Done);
        }
        if now.backend != planned_from && now.backend != job.to {
            return Err(JobError::Moved(now.backend));
        }
        Ok(Look::Wanted(record))
    }

    async fn swap(&self, job: &RebuildJob, mut record: EncodingRecord) -> Result<(), JobError> {
        let from = record.shards[job.shard as usize].backend;
        for _ in 0..SWAP_TRIES_MAX {
            let swap = Swap {
                volume: record.volume,
                datafile: record.datafile,
                shard: job.shard,
                from,
                to: job.to,
                version: record.version,
            };
            match self.cluster.swap_shard(swap).await {
                Ok(()) => return Ok(()),
                // Another shard of the record was swapped or reported: what was made is as good as before.
                Err(MetadError::VersionConflict { .. } | MetadError::Unknown(_)) => {}
                Err(error) => return Err(error.into()),
            }
            record = self.fresh(job).await?;
            let now = &record.shards[job.shard as usize];
            if now.backend == job.to && now.state == ShardState::Stored {
                return Ok(());
            }
            if now.backend != from {
                return Err(JobError::Moved(now.backend));
            }
        }
        Err(JobError::Contended)
    }

    /// Removes what a failed run stored, unless a record places the shard there.
    async fn remove_partial(&self, job: &RebuildJob) {
        let unclaimed = match self.fresh(job).await {
            Ok(record) => record.shards[job.shard as usize].backend != job.to,
            Err(JobError::Released) => true,
            Err(error) => {
                tracing::warn!(%error, datafile = %job.record.datafile, shard = job.shard, "cannot ask whether the pieces of a failed rebuild are in use; they are left for the sweep");
                false
            }
        };
        let Some(target) = self.stores.own(job.to).filter(|_| unclaimed) else {
            return;
        };
        if let Err(error) = delete_shard(&target, &job.record, job.shard).await {
            tracing::warn!(%error, datafile = %job.record.datafile, shard = job.shard, backend = %job.to, "cannot remove the pieces of a failed rebuild; they are left for the sweep");
        }
    }

    /// Deletes a shard's pieces, unless a record still places it there.
    pub(crate) async fn delete(
        &self,
        backend: BackendId,
        record: &EncodingRecord,
        shard: u32,
    ) -> Outcome {
        let failed = |error: String| {
            tracing::warn!(volume = %record.volume, datafile = %record.datafile, shard, %backend, error, "cannot delete shard");
            Outcome::Failed { error }
        };
        let records = match self
            .cluster
            .records(record.volume, &[record.datafile])
            .await
        {
            Ok(records) => records,
            Err(error) => return failed(error.to_string()),
        };
        let key = ShardKey::of(record, shard);
        let claimed = records.iter().any(|now| {
            ShardKey::of(now, shard) == key
                && now
                    .shards
                    .get(shard as usize)
                    .is_some_and(|slot| slot.backend == backend)
        });
        if claimed {
            return failed("a record places the shard here again".to_owned());
        }
        let Some(store) = self.stores.own(backend) else {
            return failed(format!("backend {backend} is not of this agent"));
        };
        match delete_shard(&store, record, shard).await {
            Ok(pieces) => {
                tracing::debug!(volume = %record.volume, datafile = %record.datafile, shard, %backend, pieces, "deleted shard");
                Outcome::Deleted
            }
            Err(error) => failed(error),
        }
    }
}

/// Streams all rows through the rebuilder to the target; bytes stored.
async fn copy_rows(
    rebuilder: &mut ShardRebuilder,
    survivors: &Survivors,
    job: &RebuildJob,
    target: &Arc<dyn PieceStore>,
    window: usize,
    in_place: bool,
) -> Result<u64, JobError> {
    let (sender, receiver) = mpsc::channel::<(PieceKey, Bytes)>(1);
    let stored_bytes = rebuilder.stripe().layout().stored_shard_bytes();
    let read = async move {
        let mut rows = stream::iter(0..rebuilder.rows())
            .map(|row| async move { (row, fetch(survivors, row).await) })
            .buffered(window);
        while let Some((row, fetched)) = rows.next().await {
            let fetched = fetched.map_err(JobError::Survivors)?;
            let present: Vec<(usize, &[u8])> = fetched
                .iter()
                .map(|(shard, payload)| (*shard, payload.as_ref()))
                .collect();
            let own = present
                .iter()
                .any(|(shard, _)| *shard == job.shard as usize);
            let piece = rebuilder.rebuild_row(row, &present)?;
            let skip = in_place && own;
            if !skip
                && sender
                    .send((piece.header.key(), piece.value))
                    .await
                    .is_err()
            {
                // The writer ended: it says why.
                break;
            }
        }
        Ok::<(), JobError>(())
    };
    let receiver = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut writes = receiver
        .map(|(key, value)| async move { target.set(&key.to_bytes(), value).await })
        .buffer_unordered(window.div_ceil(2));
    let write = async move {
        while let Some(stored) = writes.next().await {
            stored.map_err(|error| JobError::Store {
                backend: job.to,
                reason: error.to_string(),
            })?;
        }
        Ok(())
    };
    let ((), ()) = futures::future::try_join(read, write).await?;
    Ok(stored_bytes)
}

async fn fetch(survivors: &Survivors, row: u32) -> Result<Row, String> {
    match survivors.fetch_own(row).await {
        Some(own) => Ok(own),
        None => survivors.fetch_row(row).await,
    }
}

/// Deletes all pieces of a shard; how many there were.
pub(crate) async fn delete_shard(
    store: &Arc<dyn PieceStore>,
    record: &EncodingRecord,
    shard: u32,
) -> Result<u64, String> {
    let stripe = Stripe::of(record).map_err(|error| error.to_string())?;
    let mut deletions = stream::iter(stripe.shard_keys(shard))
        .map(|key| async move { store.delete(&key.to_bytes()).await })
        .buffer_unordered(DELETES_IN_FLIGHT);
    let mut pieces = 0;
    while let Some(deleted) = deletions.next().await {
        pieces += u64::from(deleted.map_err(|error| error.to_string())?);
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests;
