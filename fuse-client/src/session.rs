//! One mounted volume without its kernel half: lease, recovery, store, push, fetch and cache put together.
//!
//! ```text
//! begin: lease -> records -> recover -> push, cache, filesystem        (then `run` mounts the filesystem)
//! end:   push what is at risk -> stop -> set aside if fenced -> give the lease back
//! ```

mod follower;
mod info;
mod observer;
mod sync;
#[cfg(test)]
mod tests;

use crate::backends::{Backends, Connector};
use crate::cache::{Cache, Evicted};
use crate::cluster::{Cluster, all_records};
use crate::control::{Progress, Report};
use crate::error::MountError;
use crate::fetch::Fetcher;
use crate::filesystem::{Caller, FileSystem, FileSystemOptions};
use crate::lease::{self, Lease};
use crate::namespace::Namespace;
use crate::ports::Store;
use crate::push::policy::meets_policy;
use crate::push::transfer::TransferContext;
use crate::push::{self, Pusher};
use crate::recover::{RecoverFrom, Recovered, RecoveryReport, recover};
use crate::state::ClientFile;
use crate::store::layout::StateDir;
use crate::store::{LocalStore, StoreEvent, StoreSettings};
use crate::volume_store::VolumeStore;
use observer::Observer;
use parking_lot::Mutex;
use qsfs_proto::api::{ClientReport, Volume, VolumeSettings};
use qsfs_zdb::media::Media;
use qsfs_zstor::id::{ClientId, DatafileId, Epoch};
use qsfs_zstor::key::VolumeKey;
use qsfs_zstor::record::EncodingRecord;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
pub use sync::SyncError;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Time between looks at the volume's settings and the backends.
const REFRESH_EVERY: Duration = Duration::from_secs(10);

/// What a session is made of.
pub struct SessionParts {
    /// metad.
    pub cluster: Arc<dyn Cluster>,
    /// Connections to backends.
    pub connector: Arc<dyn Connector>,
    /// The volume as first looked up.
    pub volume: Volume,
    /// Its key.
    pub key: VolumeKey,
    /// State directory, locked by the caller.
    pub dir: StateDir,
    /// Disk.
    pub media: Arc<dyn Media>,
    /// Holder of leases.
    pub client: ClientId,
    /// What is known of the state directory.
    pub client_file: ClientFile,
    /// Take the lease from a living holder.
    pub takeover: bool,
    /// A follower.
    pub read_only: bool,
    /// Cache limit; `None`: the default.
    pub cache_limit_bytes: Option<u64>,
    /// Who owns the root of a new volume.
    pub founder: Caller,
}

/// See the module.
pub struct Session {
    /// The filesystem to mount.
    pub filesystem: Arc<FileSystem>,
    /// What recovery did.
    pub recovery: RecoveryReport,
    context: TransferContext,
    store: Arc<VolumeStore>,
    fetcher: Arc<Fetcher>,
    cache: Arc<Cache>,
    observer: Arc<Observer>,
    pusher: Option<Pusher>,
    push_task: Mutex<Option<JoinHandle<()>>>,
    lease: Option<Lease>,
    volume: Volume,
    tasks: CancellationToken,
    pushing: CancellationToken,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("volume", &self.volume.name)
            .finish_non_exhaustive()
    }
}

/// Settings of the local store for a volume.
pub fn store_settings(settings: &VolumeSettings) -> StoreSettings {
    StoreSettings {
        datafile_bytes: settings.datafile_bytes.max(1 << 12),
        push_interval: Duration::from_millis(settings.push_interval_ms.max(100)),
        ..StoreSettings::default()
    }
}

impl Session {
    /// Acquires the lease, recovers, and starts everything but the kernel half. Must be called within a multi-thread runtime.
    pub async fn begin(mut parts: SessionParts) -> Result<Self, MountError> {
        let tasks = CancellationToken::new();
        let cluster = Arc::clone(&parts.cluster);
        let lease = if parts.read_only {
            None
        } else {
            let (volume, client) = (parts.volume.id, parts.client);
            Some(lease::acquire(cluster.as_ref(), volume, client, parts.takeover).await?)
        };
        let observer = Observer::new(parts.volume.id);
        if let Some(lease) = lease {
            start_renewal(&cluster, lease, &observer, &tasks);
        }
        // The guard gives up the lease if anything below fails.
        let mut undo = Undo {
            cluster,
            lease,
            tasks: tasks.clone(),
            armed: true,
        };
        let gathered = Gathered::gather(&mut parts, lease).await?;
        let session = Self::assemble(parts, gathered, lease, observer, tasks).await?;
        undo.armed = false;
        session.start_refresh();
        Ok(session)
    }

    async fn assemble(
        parts: SessionParts,
        gathered: Gathered,
        lease: Option<Lease>,
        observer: Arc<Observer>,
        tasks: CancellationToken,
    ) -> Result<Self, MountError> {
        let Gathered {
            volume,
            records,
            backends,
            fetcher,
            recovered,
        } = gathered;
        let Recovered {
            opened,
            namespace,
            report,
        } = recovered;
        let local = opened.store;
        let context = TransferContext {
            store: Arc::clone(&local),
            cluster: parts.cluster,
            backends: Arc::clone(&backends),
            volume: volume.id,
            policy: volume.policy,
            key: parts.key,
            epoch: lease.map_or(volume.epoch, |lease| lease.epoch),
            stored_bytes: Arc::new(AtomicU64::new(0)),
        };
        let cache = Arc::new(Cache::new(Arc::clone(&local), parts.cache_limit_bytes));
        let store = Arc::new(VolumeStore::new(
            Arc::clone(&local),
            Arc::clone(&fetcher),
            backends,
            volume.policy.geometry,
            volume.settings.quota_bytes,
            tokio::runtime::Handle::current(),
        ));
        if parts.read_only {
            local.set_read_only();
        }
        observer.attach(&local, &namespace, &cache, &records);
        let options = FileSystemOptions {
            read_only: parts.read_only,
            control_socket: Some(parts.dir.control_socket()),
        };
        let (names, bytes) = (Arc::clone(&namespace), Arc::clone(&store) as Arc<dyn Store>);
        let make = move || FileSystem::new(names, bytes, options, parts.founder);
        let made = tokio::task::spawn_blocking(make).await;
        let filesystem = Arc::new(made.map_err(|error| MountError::Task(error.to_string()))??);
        observer.attach_filesystem(&filesystem);
        let mut session = Self {
            filesystem,
            recovery: report,
            context,
            store,
            fetcher,
            cache,
            observer,
            pusher: None,
            push_task: Mutex::new(None),
            lease,
            volume,
            tasks,
            pushing: CancellationToken::new(),
        };
        if parts.read_only {
            session.start_following(namespace);
        } else {
            session.start_pushing(opened.events, &records);
        }
        Ok(session)
    }

    fn start_following(&self, namespace: Arc<Namespace>) {
        let follower = follower::Follower {
            context: self.context.clone(),
            fetcher: Arc::clone(&self.fetcher),
            namespace,
            volume: self.volume.clone(),
        };
        tokio::spawn(follower.run(self.tasks.clone()));
    }

    fn start_pushing(
        &mut self,
        events: mpsc::UnboundedReceiver<StoreEvent>,
        records: &[EncodingRecord],
    ) {
        let below = below_now(&self.context, records);
        let seen = Arc::clone(&self.observer) as Arc<dyn push::PushObserver>;
        let (pusher, task) = Pusher::start(
            self.context.clone(),
            self.volume.head,
            below,
            events,
            seen,
            self.pushing.clone(),
        );
        self.observer.attach_pusher(&pusher);
        self.pusher = Some(pusher);
        *self.push_task.lock() = Some(task);
    }

    /// Keeps settings and backends fresh.
    fn start_refresh(&self) {
        let (context, cache, cancelled) = (
            self.context.clone(),
            Arc::clone(&self.cache),
            self.tasks.clone(),
        );
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = cancelled.cancelled() => return,
                    () = tokio::time::sleep(REFRESH_EVERY) => {}
                }
                // Nothing depends on it: what is stale is asked for again when it matters.
                let _ = context.backends.refresh(REFRESH_EVERY / 2).await;
                if let Ok(volume) = context.cluster.volume_by_id(context.volume).await {
                    context.store.set_settings(store_settings(&volume.settings));
                }
                let cache = Arc::clone(&cache);
                let _ = tokio::task::spawn_blocking(move || cache.tend()).await;
            }
        });
    }

    /// Epoch held; that of the volume for a follower.
    pub const fn epoch(&self) -> Epoch {
        self.context.epoch
    }

    /// The volume as it was when the session began.
    pub const fn volume(&self) -> &Volume {
        &self.volume
    }

    /// The local store.
    pub fn local(&self) -> &Arc<LocalStore> {
        self.store.local()
    }

    /// The fetcher.
    pub const fn fetcher(&self) -> &Arc<Fetcher> {
        &self.fetcher
    }

    /// Completes when another writer took over.
    pub async fn fenced(&self) -> Epoch {
        self.observer.until_fenced().await
    }

    /// Drops all local datafiles and everything in memory that may go. Blocking.
    pub fn evict_all(&self) -> Evicted {
        self.fetcher.clear();
        self.cache.evict_all()
    }

    /// The cache.
    pub const fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// State, for `report`. The caller fills in where it is mounted.
    pub fn report(&self) -> Report {
        let status = self.pusher.as_ref().map(Pusher::status).unwrap_or_default();
        let client = self.observer.client_report();
        let counters = self.fetcher.counters();
        Report {
            volume: self.volume.name.to_string(),
            mountpoint: PathBuf::new(),
            state_dir: self.local().dir().root().to_owned(),
            pid: std::process::id(),
            read_only: self.lease.is_none(),
            epoch: self.context.epoch.0,
            fenced_by: self.local().fenced().map(|epoch| epoch.0),
            head: status.head.datafile.0,
            at_risk_bytes: client.at_risk_bytes,
            at_risk_age_s: client.at_risk_age_s,
            datafiles_waiting: status.waiting.len() as u64,
            below_policy: status.below_policy.len() as u64,
            push_blocked: client.push_blocked,
            store_failure: self.local().failure().unwrap_or_default().to_owned(),
            writers_held: self.local().held().unwrap_or_default(),
            cache: self.cache.status(),
            pieces_fetched: counters.pieces.load(Ordering::Relaxed),
            reconstructed: counters.reconstructed.load(Ordering::Relaxed),
            shards_reported: counters.reported.load(Ordering::Relaxed),
        }
    }

    /// Ends: pushes what is at risk until the deadline, stops all tasks, gives the lease back. What stayed behind is the
    /// error; it is in the state directory and the next mount pushes it.
    pub async fn end(
        &self,
        deadline: Instant,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<(), MountError> {
        let pushed = match self.sync(deadline, true, progress).await {
            Ok(_) | Err(SyncError::ReadOnly) => Ok(()),
            Err(SyncError::Settle(error)) => Err(MountError::Settle(error)),
            Err(error) => Err(MountError::Task(error.to_string())),
        };
        self.stop().await;
        if let Err(error) = &pushed {
            let risk = self.local().at_risk();
            tracing::error!(%error, bytes = risk.bytes, "the mount ends with bytes at risk");
        }
        if let Some(epoch) = self.local().fenced() {
            self.set_aside(epoch);
        } else if let Some(lease) = self.lease {
            lease::release(self.context.cluster.as_ref(), lease).await;
        }
        pushed
    }

    /// Stops all tasks without pushing; for tests of what a crash leaves.
    pub async fn stop(&self) {
        self.tasks.cancel();
        self.pushing.cancel();
        let task = self.push_task.lock().take();
        if let Some(task) = task {
            let _ = task.await;
        }
        let (local, filesystem) = (Arc::clone(self.local()), Arc::clone(&self.filesystem));
        let stopped = tokio::task::spawn_blocking(move || {
            local.stop();
            filesystem.namespace().flush()
        });
        match stopped.await {
            Ok(Ok(())) => {}
            // The journal has it all: the next mount replays it.
            Ok(Err(error)) => tracing::warn!(%error, "the namespace could not be flushed"),
            Err(error) => tracing::warn!(%error, "the local store could not be stopped"),
        }
    }

    fn set_aside(&self, epoch: Epoch) {
        match self
            .local()
            .set_aside(&format!("epoch-{}", self.context.epoch))
        {
            Ok(paths) => {
                for path in paths {
                    tracing::error!(
                        path = %path.display(), taken_over_at = %epoch,
                        "never pushed before another writer took over: kept aside"
                    );
                }
            }
            Err(error) => {
                tracing::error!(%error, "cannot move aside what was not pushed; it stays where it is")
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.tasks.cancel();
        self.pushing.cancel();
        self.store.local().stop();
    }
}

/// What is read before anything is started.
struct Gathered {
    volume: Volume,
    records: Arc<Vec<EncodingRecord>>,
    backends: Arc<Backends>,
    fetcher: Arc<Fetcher>,
    recovered: Recovered,
}

impl Gathered {
    async fn gather(parts: &mut SessionParts, lease: Option<Lease>) -> Result<Self, MountError> {
        let cluster = Arc::clone(&parts.cluster);
        let id = parts.volume.id;
        let volume = cluster.volume_by_id(id).await;
        let volume = volume.map_err(MountError::metad("look up the volume"))?;
        let records = all_records(cluster.as_ref(), id, None).await;
        let records = Arc::new(records.map_err(MountError::metad("list the volume's records"))?);
        let connector = Arc::clone(&parts.connector);
        let backends = Arc::new(Backends::new(Arc::clone(&cluster), connector));
        let listed = backends.refresh(Duration::ZERO).await;
        listed.map_err(MountError::metad("list the backends"))?;
        let fetcher = Fetcher::new(cluster, Arc::clone(&backends), id, parts.key.clone());
        let recovered = recover(RecoverFrom {
            dir: parts.dir.clone(),
            media: Arc::clone(&parts.media),
            volume: volume.clone(),
            records: Arc::clone(&records),
            last_epoch: parts.client_file.epoch(),
            settings: store_settings(&volume.settings),
            fetcher: Arc::clone(&fetcher),
        })
        .await?;
        // Only now: an epoch noted earlier would make half a recovery look whole.
        let epoch = lease.map_or(volume.epoch, |lease| lease.epoch);
        parts.client_file.set_epoch(epoch);
        parts.client_file.save(&parts.dir)?;
        Ok(Self {
            volume,
            records,
            backends,
            fetcher,
            recovered,
        })
    }
}

/// Gives the lease back when beginning failed half-way.
struct Undo {
    cluster: Arc<dyn Cluster>,
    lease: Option<Lease>,
    tasks: CancellationToken,
    armed: bool,
}

impl Drop for Undo {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        self.tasks.cancel();
        if let (Some(lease), Ok(runtime)) = (self.lease, tokio::runtime::Handle::try_current()) {
            let cluster = Arc::clone(&self.cluster);
            runtime.spawn(async move { lease::release(cluster.as_ref(), lease).await });
        }
    }
}

fn start_renewal(
    cluster: &Arc<dyn Cluster>,
    lease: Lease,
    observer: &Arc<Observer>,
    tasks: &CancellationToken,
) {
    let (told, fenced) = (Arc::clone(observer), Arc::clone(observer));
    let report = move || -> ClientReport { told.client_report() };
    let fenced = move |epoch| push::PushObserver::fenced(fenced.as_ref(), epoch);
    tokio::spawn(lease::keep(
        Arc::clone(cluster),
        lease,
        report,
        fenced,
        tasks.clone(),
    ));
}

fn below_now(context: &TransferContext, records: &[EncodingRecord]) -> BTreeSet<DatafileId> {
    records
        .iter()
        .filter(|record| !meets_policy(context, record))
        .map(|record| record.datafile)
        .collect()
}
