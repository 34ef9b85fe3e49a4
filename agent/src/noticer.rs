//! Tells metad of damage that the engine itself met, between two scrubs.
//!
//! Invariants: a piece is read once more before it becomes a finding (what is damaged may be an old value that nobody
//! needs); the same damage is told once; what could not be told is told later.

use crate::cluster::Cluster;
use crate::jobs::ShardKey;
use crate::orphans::{Claim, claim};
use crate::store::{Noticed, PieceStore};
use crate::survivors::check_value;
use qsfs_proto::api::{ClusterSettings, MetadError, ShardReport};
use qsfs_zstor::codec::Stripe;
use qsfs_zstor::id::BackendId;
use qsfs_zstor::piece::PieceKey;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Places remembered; more damage than that is a matter for a scrub.
const TOLD_MAX: usize = 65_536;
/// Damaged pieces looked at per heartbeat.
const LOOKED_AT_MAX: usize = 64;

/// See the module.
pub(crate) struct Noticer {
    pub(crate) cluster: Arc<dyn Cluster>,
    pub(crate) stores: BTreeMap<BackendId, Arc<dyn PieceStore>>,
    pub(crate) settings: watch::Receiver<Option<ClusterSettings>>,
    pub(crate) shutdown: CancellationToken,
}

impl Noticer {
    /// Looks once per heartbeat until shutdown.
    pub(crate) async fn run(self) {
        let mut told: BTreeSet<(BackendId, Noticed)> = BTreeSet::new();
        let shutdown = self.shutdown.clone();
        loop {
            let pause_ms = self
                .settings
                .borrow()
                .as_ref()
                .map_or(1_000, |settings| settings.heartbeat_ms.max(50));
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(Duration::from_millis(pause_ms)) => {}
            }
            for (backend, store) in &self.stores {
                let mut news: Vec<Noticed> = store.noticed().await;
                news.retain(|noticed| !told.contains(&(*backend, noticed.clone())));
                news.truncate(LOOKED_AT_MAX.min(TOLD_MAX.saturating_sub(told.len())));
                for noticed in news {
                    match self.tell(*backend, store, &noticed).await {
                        Ok(()) => drop(told.insert((*backend, noticed))),
                        Err(error) => {
                            tracing::debug!(%backend, %error, "damage that was noticed is told later");
                            break;
                        }
                    }
                }
            }
        }
    }

    async fn tell(
        &self,
        backend: BackendId,
        store: &Arc<dyn PieceStore>,
        noticed: &Noticed,
    ) -> Result<(), MetadError> {
        let Some(piece) = PieceKey::from_bytes(&noticed.key) else {
            return Ok(());
        };
        let key = ShardKey {
            volume: piece.volume,
            datafile: piece.datafile,
            salt: piece.salt,
            shard: piece.shard,
        };
        let records = self
            .cluster
            .records(piece.volume, &[piece.datafile])
            .await?;
        let Some(record) = records
            .into_iter()
            .find(|record| claim(&key, backend, Some(record), false) == Claim::Here)
        else {
            return Ok(());
        };
        let Ok(stripe) = Stripe::of(&record) else {
            return Ok(());
        };
        let read = check_value(
            store.get(&noticed.key).await,
            &stripe,
            piece.shard,
            piece.piece,
        );
        let Some(state) = read.err().and_then(|problem| problem.finding()) else {
            return Ok(());
        };
        tracing::warn!(%backend, volume = %piece.volume, datafile = %piece.datafile, shard = piece.shard, place = noticed.place, "backend noticed a damaged piece");
        let report = ShardReport {
            volume: piece.volume,
            datafile: piece.datafile,
            shard: piece.shard,
            backend,
            state,
            by_scrub: false,
        };
        self.cluster.report_shards(vec![report]).await
    }
}
