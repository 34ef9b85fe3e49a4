//! A follower: a read-only session that goes on when the head does.

use crate::cluster::all_records;
use crate::error::MountError;
use crate::fetch::Fetcher;
use crate::namespace::Namespace;
use crate::push::transfer::TransferContext;
use crate::recover::{fetch_meta, follow};
use qsfs_proto::api::Volume;
use qsfs_zstor::id::Stream;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Time between looks at the head.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// See the module.
pub(super) struct Follower {
    pub(super) context: TransferContext,
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) namespace: Arc<Namespace>,
    pub(super) volume: Volume,
}

impl Follower {
    /// Runs until cancelled.
    pub(super) async fn run(mut self, cancelled: CancellationToken) {
        let mut told = String::new();
        loop {
            tokio::select! {
                () = cancelled.cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            match self.look().await {
                Ok(()) => told.clear(),
                Err(error) => {
                    let text = error.to_string();
                    if text != told {
                        tracing::warn!(%error, "this follower cannot go on now; mount again if that stays so");
                        told = text;
                    }
                }
            }
        }
    }

    async fn look(&mut self) -> Result<(), MountError> {
        let cluster = &self.context.cluster;
        let volume = cluster
            .volume_by_id(self.volume.id)
            .await
            .map_err(MountError::metad("look at the head"))?;
        let known = self.volume.head.datafile;
        if volume.head.datafile <= known {
            return Ok(());
        }
        let records = all_records(cluster.as_ref(), volume.id, Some(Stream::Meta)).await;
        let mut records = records.map_err(MountError::metad("list the meta stream"))?;
        records.retain(|record| record.datafile > known && record.datafile <= volume.head.datafile);
        let ids: Vec<_> = records.iter().map(|record| record.datafile).collect();
        let store = &self.context.store;
        for record in records {
            fetch_meta(store.dir(), store.media(), &self.fetcher, &volume, record).await?;
        }
        let (media, dir, namespace) = (
            Arc::clone(store.media()),
            store.dir().clone(),
            Arc::clone(&self.namespace),
        );
        let replayed = tokio::task::spawn_blocking(move || follow(&media, &dir, &namespace, &ids));
        replayed
            .await
            .map_err(|error| MountError::Task(error.to_string()))??;
        self.volume = volume;
        Ok(())
    }
}
