//! The shell of a scrub tour: one task per backend that does what the [`scrub`](crate::scrub) core says.
//!
//! Invariants: pieces are read from the media as far as the backend can; what looks bad is compared with a fresh
//! record before it becomes a finding (the shard may have moved while it was being read); metad away means wait.

use crate::cluster::Cluster;
use crate::jobs::ShardKey;
use crate::orphans::{Claim, ORPHAN_GRACE_MS, Orphans, claim};
use crate::scrub::{Action, Event, Tour};
use crate::store::PieceStore;
use crate::survivors::{PieceProblem, check_value};
use crate::tour_file::TourFile;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use parking_lot::Mutex;
use qsfs_proto::api::ClusterSettings;
use qsfs_zstor::codec::{ShardHashes, Stripe};
use qsfs_zstor::id::{BackendId, DatafileId, VolumeId};
use qsfs_zstor::piece::PieceKey;
use qsfs_zstor::record::{EncodingRecord, ShardState};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Records per question to metad.
const PAGE_RECORDS: u32 = 64;
/// Pieces read ahead.
const READ_AHEAD: usize = 3;

/// Now, in ms since the epoch.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// For heartbeats.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Progress {
    /// See [`qsfs_proto::api::BackendFacts`].
    pub(crate) last_scrub_ms: u64,
    /// Bytes read in the running tour; `None` when none runs.
    pub(crate) toured_bytes: Option<u64>,
    /// Damaged shards found.
    pub(crate) found: u64,
}

/// One backend's tour.
pub(crate) struct TourTask {
    pub(crate) backend: BackendId,
    pub(crate) cluster: Arc<dyn Cluster>,
    pub(crate) store: Arc<dyn PieceStore>,
    pub(crate) file: TourFile,
    pub(crate) progress: Arc<Mutex<Progress>>,
    pub(crate) settings: watch::Receiver<Option<ClusterSettings>>,
    pub(crate) orders: mpsc::Receiver<()>,
    pub(crate) shutdown: CancellationToken,
}

impl TourTask {
    /// Runs until shutdown. Nothing begins before the cluster's settings are known.
    pub(crate) async fn run(mut self) {
        let (cursor, mut orphans) = self.file.load();
        let mut tour = Tour::new(self.backend, cursor);
        let shutdown = self.shutdown.clone();
        let mut event = Event::Tick;
        let mut until_ms = None;
        if self.settings.borrow().is_some() {
            self.settings.mark_changed();
        }
        loop {
            // Orders and settings that came while something was being done.
            let mut actions = Vec::new();
            while let Some(early) = self.pending() {
                actions.extend(tour.step(now_ms(), early));
            }
            actions.extend(tour.step(now_ms(), event));
            self.show(&tour);
            let mut next = None;
            for action in actions {
                match action {
                    Action::Save(cursor) => self.file.save_cursor(&cursor),
                    Action::Report(report) => {
                        tracing::warn!(volume = %report.volume, datafile = %report.datafile, shard = report.shard, backend = %report.backend, state = ?report.state, "scrub found a bad shard");
                        if let Err(error) = self.cluster.report_shards(vec![report]).await {
                            tracing::warn!(%error, "cannot report a bad shard; the next tour will find it again");
                        }
                    }
                    Action::Wait { until_ms: until } => until_ms = Some(until),
                    work => next = Some(work),
                }
            }
            event = match next {
                Some(work) => tokio::select! {
                    event = self.work(work, &mut orphans) => event,
                    () = shutdown.cancelled() => return,
                },
                None => match self.wait(until_ms.take().flatten()).await {
                    Some(event) => event,
                    None => return,
                },
            };
        }
    }

    fn show(&self, tour: &Tour) {
        let cursor = tour.cursor();
        *self.progress.lock() = Progress {
            last_scrub_ms: cursor.last_scrub_ms,
            toured_bytes: cursor.touring.then_some(cursor.bytes),
            found: tour.found(),
        };
    }

    fn pending(&mut self) -> Option<Event> {
        if self.settings.has_changed().unwrap_or(false) {
            return self.take_settings();
        }
        self.orders.try_recv().ok().map(|()| Event::Ordered)
    }

    fn take_settings(&mut self) -> Option<Event> {
        let settings = self.settings.borrow_and_update().clone()?;
        Some(Event::Settings {
            interval_ms: settings.scrub_interval_ms,
            bytes_per_s: settings.scrub_bytes_per_s,
        })
    }

    /// Waits for time, an order or new settings; `None` at shutdown.
    async fn wait(&mut self, until_ms: Option<u64>) -> Option<Event> {
        let pause = until_ms.map(|until| Duration::from_millis(until.saturating_sub(now_ms())));
        tokio::select! {
            () = self.shutdown.cancelled() => None,
            order = self.orders.recv() => order.map(|()| Event::Ordered),
            changed = self.settings.changed() => {
                changed.ok()?;
                Some(self.take_settings().unwrap_or(Event::Tick))
            }
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => Some(Event::Tick),
        }
    }

    async fn work(&mut self, action: Action, orphans: &mut Orphans) -> Event {
        match action {
            Action::FetchPage { after } => {
                if after.1 == DatafileId(0) {
                    // What is read from now on comes from the media, or was read from there in this tour.
                    self.store.forget_cached().await;
                }
                match self
                    .cluster
                    .backend_shards(self.backend, after, PAGE_RECORDS)
                    .await
                {
                    Ok(shards) => Event::Page(shards),
                    Err(error) => self.unavailable(&error),
                }
            }
            Action::Check { record, shard } => self.check(&record, shard).await,
            Action::Sweep => match self.sweep(orphans).await {
                Ok(()) => Event::Swept,
                Err(error) => self.unavailable(&error),
            },
            Action::Wait { .. } | Action::Report(_) | Action::Save(_) => Event::Tick,
        }
    }

    fn unavailable(&self, error: &dyn std::fmt::Display) -> Event {
        tracing::info!(backend = %self.backend, %error, "scrub waits");
        Event::Unavailable
    }

    async fn check(&self, record: &EncodingRecord, shard: u32) -> Event {
        let finding = match verify_shard(&self.store, record, shard).await {
            Ok(bytes) => {
                return Event::Checked {
                    bytes,
                    finding: None,
                };
            }
            Err(problem) => problem,
        };
        let Some(state) = finding.finding() else {
            return self.unavailable(&finding);
        };
        // The page of records may be older than a swap or a release.
        match self
            .cluster
            .records(record.volume, &[record.datafile])
            .await
        {
            Ok(records) => {
                let key = ShardKey::of(record, shard);
                let here = records
                    .iter()
                    .any(|now| claim(&key, self.backend, Some(now), false) == Claim::Here);
                Event::Checked {
                    bytes: record.shard_bytes,
                    finding: here.then_some(state),
                }
            }
            Err(error) => self.unavailable(&error),
        }
    }

    /// Looks for keys that belong to no record.
    async fn sweep(&self, orphans: &mut Orphans) -> Result<(), String> {
        let grace_ms = self
            .settings
            .borrow()
            .as_ref()
            .map_or(ORPHAN_GRACE_MS, |settings| {
                ORPHAN_GRACE_MS.max(2 * settings.tombstone_grace_ms)
            });
        let mut met = BTreeSet::new();
        let mut from = None;
        loop {
            let page = self
                .store
                .keys(from)
                .await
                .map_err(|error| error.to_string())?;
            let mut shards: BTreeMap<ShardKey, (u64, Vec<Bytes>)> = BTreeMap::new();
            for stored in page.keys {
                // A key that is not a piece's is another program's, in an attached 0-db.
                if let Some(piece) = PieceKey::from_bytes(&stored.key) {
                    let entry = shards.entry(shard_key(&piece)).or_default();
                    entry.0 = entry.0.max(stored.set_ms);
                    entry.1.push(stored.key);
                }
            }
            for key in self.judge(&shards, orphans, grace_ms).await? {
                for piece in &shards[&key].1 {
                    self.store
                        .delete(piece)
                        .await
                        .map_err(|error| error.to_string())?;
                }
                tracing::info!(volume = %key.volume, datafile = %key.datafile, shard = key.shard, backend = %self.backend, "swept pieces that belong to no record");
            }
            met.extend(shards.keys().filter(|key| orphans.contains(key)).copied());
            match page.next {
                Some(next) => from = Some(next),
                None => break,
            }
        }
        orphans.keep_met(&met);
        self.file.save_orphans(orphans);
        Ok(())
    }

    async fn judge(
        &self,
        shards: &BTreeMap<ShardKey, (u64, Vec<Bytes>)>,
        orphans: &mut Orphans,
        grace_ms: u64,
    ) -> Result<Vec<ShardKey>, String> {
        let mut datafiles: BTreeMap<VolumeId, BTreeSet<DatafileId>> = BTreeMap::new();
        for key in shards.keys() {
            datafiles
                .entry(key.volume)
                .or_default()
                .insert(key.datafile);
        }
        let mut doomed = Vec::new();
        for (volume, wanted) in datafiles {
            let wanted: Vec<DatafileId> = wanted.into_iter().collect();
            let records = self
                .cluster
                .records(volume, &wanted)
                .await
                .map_err(|error| error.to_string())?;
            let records: BTreeMap<DatafileId, EncodingRecord> = records
                .into_iter()
                .map(|record| (record.datafile, record))
                .collect();
            for (key, (set_ms, _)) in shards.range(first_of(volume)..=last_of(volume)) {
                let record = records.get(&key.datafile);
                let later = record.is_none()
                    && self
                        .cluster
                        .has_later_record(volume, key.datafile)
                        .await
                        .map_err(|error| error.to_string())?;
                let claim = claim(key, self.backend, record, later);
                if orphans.judge(*key, *set_ms, claim, now_ms(), grace_ms) {
                    doomed.push(*key);
                }
            }
        }
        Ok(doomed)
    }
}

fn shard_key(piece: &PieceKey) -> ShardKey {
    ShardKey {
        volume: piece.volume,
        datafile: piece.datafile,
        salt: piece.salt,
        shard: piece.shard,
    }
}

fn first_of(volume: VolumeId) -> ShardKey {
    ShardKey {
        volume,
        datafile: DatafileId(0),
        salt: qsfs_zstor::id::Salt::from_bytes([0; 16]),
        shard: 0,
    }
}

fn last_of(volume: VolumeId) -> ShardKey {
    ShardKey {
        volume,
        datafile: DatafileId(u64::MAX),
        salt: qsfs_zstor::id::Salt::from_bytes([0xff; 16]),
        shard: u32::MAX,
    }
}

/// Reads every piece of a shard and compares the whole with the record; bytes read.
pub(crate) async fn verify_shard(
    store: &Arc<dyn PieceStore>,
    record: &EncodingRecord,
    shard: u32,
) -> Result<u64, PieceProblem> {
    let stripe = match Stripe::of(record) {
        Ok(stripe) => stripe,
        Err(error) => {
            // That is metad's trouble, not the backend's; the tour must not stay here for ever.
            tracing::error!(volume = %record.volume, datafile = %record.datafile, %error, "record makes no sense; its shard is not scrubbed");
            return Ok(0);
        }
    };
    let mut hashes = ShardHashes::new(&stripe);
    let mut pieces = stream::iter(stripe.shard_keys(shard))
        .map(|key| async move { (key.piece, store.get(&key.to_bytes()).await) })
        .buffered(READ_AHEAD);
    while let Some((piece, got)) = pieces.next().await {
        let (header, _) = check_value(got, &stripe, shard, piece)?;
        hashes.add(&header);
    }
    let expected = record.shards.get(shard as usize).map(|slot| slot.hash);
    if hashes.shard(shard as usize) != expected {
        let state = ShardState::Corrupt;
        return Err(PieceProblem::Corrupt(format!(
            "{state:?}: every piece is sound, the shard is not the one of the record"
        )));
    }
    Ok(stripe.layout().stored_shard_bytes())
}

#[cfg(test)]
mod tests;
