//! What the parts of a session tell each other.

use crate::cache::Cache;
use crate::filesystem::FileSystem;
use crate::namespace::Namespace;
use crate::push::{PushObserver, Pusher, checkpoint};
use crate::store::LocalStore;
use crate::store::layout::Stage;
use parking_lot::Mutex;
use qsfs_proto::api::ClientReport;
use qsfs_zstor::id::{DatafileId, Epoch, Stream, VolumeId};
use qsfs_zstor::record::EncodingRecord;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use tokio::sync::watch;

struct Attached {
    store: Arc<LocalStore>,
    namespace: Arc<Namespace>,
    cache: Arc<Cache>,
}

/// See the module.
pub(super) struct Observer {
    volume: VolumeId,
    attached: OnceLock<Attached>,
    filesystem: OnceLock<Arc<FileSystem>>,
    pusher: OnceLock<Pusher>,
    /// Committed data datafiles.
    committed: Mutex<BTreeSet<DatafileId>>,
    /// Released, and not yet said so in the journal.
    released: Mutex<Vec<DatafileId>>,
    checkpointing: AtomicBool,
    /// Set before anything is stopped, so that what is attached meanwhile is stopped too.
    outrun_by: Mutex<Option<Epoch>>,
    /// Told after everything is stopped.
    fenced: watch::Sender<Option<Epoch>>,
    own: Weak<Self>,
}

impl Observer {
    pub(super) fn new(volume: VolumeId) -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            volume,
            attached: OnceLock::new(),
            filesystem: OnceLock::new(),
            pusher: OnceLock::new(),
            committed: Mutex::default(),
            released: Mutex::default(),
            checkpointing: AtomicBool::new(false),
            outrun_by: Mutex::new(None),
            fenced: watch::channel(None).0,
            own: Weak::clone(own),
        })
    }

    pub(super) fn attach(
        &self,
        store: &Arc<LocalStore>,
        namespace: &Arc<Namespace>,
        cache: &Arc<Cache>,
        records: &[EncodingRecord],
    ) {
        let data = records
            .iter()
            .filter(|record| record.stream == Stream::Data)
            .map(|record| record.datafile);
        self.committed.lock().extend(data);
        let own = Weak::clone(&self.own);
        store.set_dead_source(Box::new(move || {
            own.upgrade().map(|own| own.dead()).unwrap_or_default()
        }));
        let (store, namespace, cache) =
            (Arc::clone(store), Arc::clone(namespace), Arc::clone(cache));
        if self
            .attached
            .set(Attached {
                store,
                namespace,
                cache,
            })
            .is_err()
        {
            tracing::warn!("a session is put together twice");
        }
        let outrun_by = *self.outrun_by.lock();
        if let Some(epoch) = outrun_by {
            PushObserver::fenced(self, epoch);
        }
    }

    pub(super) fn attach_filesystem(&self, filesystem: &Arc<FileSystem>) {
        let _ = self.filesystem.set(Arc::clone(filesystem));
        if self.outrun_by.lock().is_some() {
            filesystem.fence();
        }
    }

    pub(super) fn attach_pusher(&self, pusher: &Pusher) {
        let _ = self.pusher.set(pusher.clone());
    }

    pub(super) async fn until_fenced(&self) -> Epoch {
        let mut fenced = self.fenced.subscribe();
        loop {
            if let Some(epoch) = *fenced.borrow_and_update() {
                return epoch;
            }
            if fenced.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    pub(super) fn client_report(&self) -> ClientReport {
        let Some(Attached { store, .. }) = self.attached.get() else {
            // Being recovered: nothing is known yet, and nothing is wrong.
            return ClientReport::default();
        };
        let risk = store.at_risk();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let blocked = self.pusher.get().and_then(|pusher| pusher.status().blocked);
        ClientReport {
            at_risk_bytes: risk.bytes,
            at_risk_age_s: risk
                .oldest_ms
                .map_or(0, |oldest| now_ms.saturating_sub(oldest) / 1000),
            local_bytes: store.local_bytes(),
            push_blocked: store
                .failure()
                .map(str::to_owned)
                .or(blocked)
                .unwrap_or_default(),
        }
    }

    /// Committed data datafiles without a live byte. Called before a journal is closed.
    fn dead(&self) -> Vec<DatafileId> {
        let Some(Attached {
            store, namespace, ..
        }) = self.attached.get()
        else {
            return Vec::new();
        };
        self.journal_released(store);
        let live = match namespace.live_datafiles() {
            Ok(live) => live,
            Err(error) => {
                tracing::warn!(%error, "live bytes cannot be read: nothing is released now");
                return Vec::new();
            }
        };
        let live: BTreeSet<DatafileId> = live
            .into_iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(id, _)| id)
            .collect();
        self.committed.lock().difference(&live).copied().collect()
    }

    /// Says in the journal what was released, when the journal is about to be pushed anyway: a record of its own would put
    /// bytes at risk after every sync.
    fn journal_released(&self, store: &LocalStore) {
        if store.at_risk().bytes == 0 || store.fenced().is_some() {
            return;
        }
        let released = std::mem::take(&mut *self.released.lock());
        let Some(filesystem) = self.filesystem.get().filter(|_| !released.is_empty()) else {
            return;
        };
        if let Err(error) = filesystem.datafiles_released(released, crate::fuse::now()) {
            tracing::warn!(%error, "released datafiles stay listed as dead");
        }
    }

    /// Runs blocking work beside the push.
    fn beside(&self, work: impl FnOnce(&Attached) + Send + 'static) {
        let Some(own) = self.own.upgrade() else {
            return;
        };
        tokio::task::spawn_blocking(move || {
            if let Some(attached) = own.attached.get() {
                work(attached);
            }
        });
    }

    fn checkpoint_due(&self, store: &LocalStore) -> bool {
        let recover_from = self
            .pusher
            .get()
            .map_or(DatafileId(0), |pusher| pusher.status().head.recover_from);
        let files = store.catalog().all();
        let meta: Vec<_> = files
            .iter()
            .filter(|file| file.name.stream == Stream::Meta)
            .collect();
        if meta
            .iter()
            .any(|file| file.checkpoint && file.name.stage == Stage::Sealed)
        {
            return false;
        }
        let first = meta.iter().find(|file| file.name.id == recover_from);
        let checkpoint_bytes = first
            .filter(|file| file.checkpoint)
            .map_or(0, |file| file.bytes);
        let journal_bytes: u64 = meta
            .iter()
            .map(|file| file.bytes)
            .sum::<u64>()
            .saturating_sub(checkpoint_bytes);
        checkpoint::due(journal_bytes, checkpoint_bytes)
    }
}

impl PushObserver for Observer {
    fn committed(&self, records: &[EncodingRecord]) {
        let data = records
            .iter()
            .filter(|record| record.stream == Stream::Data)
            .map(|record| record.datafile);
        self.committed.lock().extend(data);
        self.beside(|attached| attached.cache.tend());
    }

    fn still_dead(&self, datafiles: &[DatafileId]) -> Vec<DatafileId> {
        let Some(Attached { namespace, .. }) = self.attached.get() else {
            return Vec::new();
        };
        let committed = self.committed.lock();
        let dead = |id: &&DatafileId| {
            committed.contains(*id) && matches!(namespace.live_bytes(**id), Ok(0))
        };
        datafiles.iter().filter(dead).copied().collect()
    }

    fn released(&self, datafiles: &[DatafileId]) {
        let mut committed = self.committed.lock();
        for id in datafiles {
            committed.remove(id);
        }
        self.released.lock().extend(datafiles);
    }

    fn space_wanted(&self) {
        self.beside(|attached| attached.cache.make_room());
    }

    fn sealed(&self) {
        let Some(own) = self.own.upgrade() else {
            return;
        };
        self.beside(move |attached| {
            attached.cache.tend();
            if !own.checkpoint_due(&attached.store) || own.checkpointing.swap(true, Ordering::AcqRel) {
                return;
            }
            match checkpoint::take(&attached.store, &attached.namespace) {
                Ok(id) => tracing::info!(volume = %own.volume, datafile = %id, "a checkpoint was taken"),
                Err(error) => tracing::warn!(%error, "no checkpoint could be taken; recovery reads the journal"),
            }
            own.checkpointing.store(false, Ordering::Release);
        });
    }

    fn fenced(&self, epoch: Epoch) {
        *self.outrun_by.lock() = Some(epoch);
        if let Some(Attached { store, .. }) = self.attached.get() {
            store.fence(epoch);
            let risk = store.at_risk();
            tracing::error!(
                taken_over_at = %epoch, at_risk_bytes = risk.bytes,
                "another writer took this volume over: writing stops; what was not pushed is kept aside at the end of this mount"
            );
        }
        if let Some(filesystem) = self.filesystem.get() {
            filesystem.fence();
        }
        self.fenced.send_replace(Some(epoch));
    }
}
