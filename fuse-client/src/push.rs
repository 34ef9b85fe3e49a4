//! Push: from sealed local datafiles to durable shards to the commit that makes them count.
//!
//! ```text
//! store --Sealed--> [lifecycle core] --Transfer--> encode, place, store --Commit--> metad --> .pushed, head moved
//!                        ^  backoff, lost answers, order of data before meta  |
//!                        +-----------------------------------------------------+
//! ```
//!
//! One task owns the [`lifecycle`] core and does what it says; transfers and commits run beside it and report back.
//! Invariants: see the core. A degraded placement is pushed all the same; what is below policy is remembered and
//! said by `sync`.

pub mod checkpoint;
pub mod encode;
pub mod lifecycle;
pub mod policy;
pub mod spool;
pub mod transfer;

use crate::store::{LocalStore, StoreEvent};
use lifecycle::{Action, Event, Lifecycle, Sealed};
use qsfs_proto::api::{Head, MetadError, Mutation};
use qsfs_zstor::id::{DatafileId, Epoch, Stream};
use qsfs_zstor::record::EncodingRecord;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use transfer::{StoredStripe, TransferContext, transfer};

/// Transfers at once.
pub const TRANSFERS_MAX: usize = 2;
/// Deadline of one commit.
pub const COMMIT_DEADLINE: Duration = Duration::from_secs(20);

/// What is known of the queue, for whoever waits or asks.
#[derive(Debug, Clone, Default)]
pub struct PushStatus {
    /// Not committed yet.
    pub waiting: Arc<BTreeSet<DatafileId>>,
    /// Why pushing does not go on; `None` when all is well.
    pub blocked: Option<String>,
    /// Committed below policy by this mount, or found so at mount.
    pub below_policy: Arc<BTreeSet<DatafileId>>,
    /// What the last degraded placement missed.
    pub missing: String,
    /// Head as committed.
    pub head: Head,
    /// Another writer took over.
    pub fenced: Option<Epoch>,
}

/// What happens to datafiles that the mount must know about.
pub trait PushObserver: Send + Sync + 'static {
    /// Committed: eviction may drop it, reads may use this record.
    fn committed(&self, records: &[EncodingRecord]);
    /// Of these committed data datafiles, those that nothing names any more.
    fn still_dead(&self, datafiles: &[DatafileId]) -> Vec<DatafileId>;
    /// Released: they are no longer to be listed as dead.
    fn released(&self, datafiles: &[DatafileId]);
    /// A writer waits for space.
    fn space_wanted(&self);
    /// A checkpoint may be due.
    fn sealed(&self);
    /// Another writer took over.
    fn fenced(&self, epoch: Epoch);
}

enum Command {
    /// Take in what the store sealed so far, retry now, then answer.
    Hurry(tokio::sync::oneshot::Sender<()>),
}

enum Done {
    Encoded(DatafileId),
    Transferred(DatafileId, Result<StoredStripe, String>),
    Committed(Vec<DatafileId>, Result<(), MetadError>),
    Answered(Vec<DatafileId>, Result<Vec<EncodingRecord>, MetadError>),
}

/// The handle to the running push.
#[derive(Debug, Clone)]
pub struct Pusher {
    commands: mpsc::UnboundedSender<Command>,
    status: watch::Receiver<PushStatus>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hurry")
    }
}

/// Why waiting for the queue ended early.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettleError {
    /// Another writer took over.
    #[error("fenced: another writer took over at epoch {0}; what was not pushed is kept aside")]
    Fenced(Epoch),
    /// The deadline passed.
    #[error("not everything is committed yet: {waiting} datafiles wait; {why}")]
    Deadline {
        /// Datafiles not committed.
        waiting: usize,
        /// Why, as far as known.
        why: String,
    },
    /// The push ended.
    #[error("push has ended")]
    Ended,
}

impl Pusher {
    /// Starts the task. `events` are the store's; the task ends with `shutdown`.
    pub fn start(
        context: TransferContext,
        head: Head,
        below_policy: BTreeSet<DatafileId>,
        events: mpsc::UnboundedReceiver<StoreEvent>,
        observer: Arc<dyn PushObserver>,
        shutdown: tokio_util::sync::CancellationToken,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (done, results) = mpsc::unbounded_channel();
        let below_policy = Arc::new(below_policy);
        let (status, watched) = watch::channel(PushStatus {
            head,
            below_policy,
            ..PushStatus::default()
        });
        let worker = Worker {
            context: Arc::new(context),
            observer,
            core: Lifecycle::new(head, TRANSFERS_MAX),
            stripes: BTreeMap::new(),
            errors: BTreeMap::new(),
            status,
            done,
            started: Instant::now(),
            wake_at: None,
        };
        let task = tokio::spawn(worker.run(events, inbox, results, shutdown));
        (
            Self {
                commands,
                status: watched,
            },
            task,
        )
    }

    /// The queue now.
    pub fn status(&self) -> PushStatus {
        self.status.borrow().clone()
    }

    /// Takes in what is sealed and tries again at once what waits for a retry.
    pub async fn hurry(&self) -> Result<(), SettleError> {
        let (sender, answer) = tokio::sync::oneshot::channel();
        self.commands
            .send(Command::Hurry(sender))
            .map_err(|_| SettleError::Ended)?;
        answer.await.map_err(|_| SettleError::Ended)
    }

    /// Waits until every datafile up to `target` is committed.
    pub async fn settled(&self, target: DatafileId, deadline: Instant) -> Result<(), SettleError> {
        let mut status = self.status.clone();
        loop {
            let now = status.borrow_and_update().clone();
            if let Some(epoch) = now.fenced {
                return Err(SettleError::Fenced(epoch));
            }
            let waiting = now.waiting.range(..=target).count();
            if waiting == 0 {
                return Ok(());
            }
            match tokio::time::timeout_at(deadline.into(), status.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(SettleError::Ended),
                Err(_) => {
                    let why = now.blocked.unwrap_or_else(|| "pushing goes on".to_owned());
                    return Err(SettleError::Deadline { waiting, why });
                }
            }
        }
    }
}

struct Worker {
    context: Arc<TransferContext>,
    observer: Arc<dyn PushObserver>,
    core: Lifecycle,
    stripes: BTreeMap<DatafileId, StoredStripe>,
    errors: BTreeMap<DatafileId, String>,
    status: watch::Sender<PushStatus>,
    done: mpsc::UnboundedSender<Done>,
    started: Instant,
    wake_at: Option<Instant>,
}

impl Worker {
    async fn run(
        mut self,
        mut events: mpsc::UnboundedReceiver<StoreEvent>,
        mut commands: mpsc::UnboundedReceiver<Command>,
        mut results: mpsc::UnboundedReceiver<Done>,
        shutdown: tokio_util::sync::CancellationToken,
    ) {
        loop {
            let wake = self.wake_at;
            let sleep = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                Some(done) = results.recv() => self.on_done(done).await,
                Some(event) = events.recv() => self.on_store_event(event).await,
                Some(Command::Hurry(answer)) = commands.recv() => {
                    while let Ok(event) = events.try_recv() {
                        self.on_store_event(event).await;
                    }
                    self.step(Event::Hurry).await;
                    let _ = answer.send(());
                }
                () = sleep => {
                    self.wake_at = None;
                    self.step(Event::Tick).await;
                }
            }
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    async fn on_store_event(&mut self, event: StoreEvent) {
        match event {
            StoreEvent::Sealed(file) => {
                let sealed = Sealed {
                    id: file.name.id,
                    stream: file.name.stream,
                    checkpoint: file.checkpoint,
                    barrier: file.barrier,
                    dead: file.dead.clone(),
                };
                self.step(Event::Sealed(sealed)).await;
                self.observer.sealed();
            }
            StoreEvent::SpaceWanted => self.observer.space_wanted(),
            StoreEvent::Failed(why) => {
                self.errors.insert(DatafileId(0), why);
                self.publish();
            }
        }
    }

    async fn on_done(&mut self, done: Done) {
        match done {
            Done::Encoded(id) => self.step(Event::Encoded(id)).await,
            Done::Transferred(id, Ok(stripe)) => {
                self.errors.remove(&id);
                self.stripes.insert(id, stripe);
                self.step(Event::Stored(id)).await;
            }
            Done::Transferred(id, Err(why)) => {
                tracing::warn!(datafile = %id, %why, "push failed; it is tried again");
                self.errors.insert(id, why);
                self.step(Event::TransferFailed(id)).await;
            }
            Done::Committed(batch, result) => self.on_commit_answer(batch, result).await,
            Done::Answered(batch, Ok(records)) => {
                // Of this attempt, or of an earlier one of this epoch: a sealed datafile never changes.
                let ours = |record: &EncodingRecord| {
                    self.stripes.get(&record.datafile).is_some_and(|stripe| {
                        stripe.record.salt == record.salt || stripe.record.epoch == record.epoch
                    })
                };
                let present = records
                    .iter()
                    .filter(|record| ours(record))
                    .map(|record| record.datafile)
                    .collect();
                self.step(Event::Answered { batch, present }).await;
            }
            Done::Answered(batch, Err(error)) => {
                self.note_error(&batch, &error);
                self.step(Event::AskFailed(batch)).await;
            }
        }
    }

    async fn on_commit_answer(&mut self, batch: Vec<DatafileId>, result: Result<(), MetadError>) {
        let Err(error) = result else {
            return self.step(Event::Committed(batch)).await;
        };
        tracing::warn!(?batch, %error, "commit failed");
        self.note_error(&batch, &error);
        match error {
            MetadError::Fenced { current } => self.on_fenced(current).await,
            // There already: perhaps by an attempt whose answer was lost.
            MetadError::Unknown(_) | MetadError::Exists(_) => {
                self.step(Event::CommitUnknown(batch)).await;
            }
            MetadError::NoQuorum(_) | MetadError::Unreachable(_) => {
                self.step(Event::CommitFailed(batch)).await
            }
            _ => self.step(Event::CommitRefused(batch)).await,
        }
    }

    async fn on_fenced(&mut self, epoch: Epoch) {
        self.context.store.fence(epoch);
        self.observer.fenced(epoch);
        self.status
            .send_modify(|status| status.fenced = Some(epoch));
        self.step(Event::Fenced).await;
    }

    fn note_error(&mut self, batch: &[DatafileId], error: &MetadError) {
        for id in batch {
            self.errors.insert(*id, format!("commit: {error}"));
        }
    }

    /// Feeds the core and does what it says, in order.
    async fn step(&mut self, event: Event) {
        self.wake_at = None;
        for action in self.core.step(self.now_ms(), event) {
            match action {
                Action::Transfer(id) => self.start_transfer(id),
                Action::Commit { batch, head } => self.start_commit(batch, head),
                Action::Ask(batch) => self.start_ask(batch),
                Action::Committed(batch) => self.finish_commit(&batch).await,
                Action::Release { dead, meta_before } => self.start_release(dead, meta_before),
                Action::WakeAt(at_ms) => {
                    self.wake_at = Some(self.started + Duration::from_millis(at_ms))
                }
            }
        }
        self.publish();
    }

    fn publish(&self) {
        let waiting: BTreeSet<DatafileId> = self.core.ids().collect();
        let head = self.core.head();
        let blocked = self.errors.first_key_value().map(|(id, why)| match id.0 {
            0 => why.clone(),
            _ => format!("datafile {id}: {why}"),
        });
        self.status.send_modify(|status| {
            status.waiting = Arc::new(waiting);
            status.head = head;
            status.blocked = blocked;
        });
    }

    fn start_transfer(&self, id: DatafileId) {
        let (context, done) = (Arc::clone(&self.context), self.done.clone());
        tokio::spawn(async move {
            let result = match context.store.catalog().get(id) {
                Some(file) => {
                    let encoded = done.clone();
                    let tell = move || drop(encoded.send(Done::Encoded(id)));
                    transfer(&context, &file, tell)
                        .await
                        .map_err(|error| error.to_string())
                }
                None => Err("the local datafile is gone".to_owned()),
            };
            let _ = done.send(Done::Transferred(id, result));
        });
    }

    fn start_commit(&self, batch: Vec<DatafileId>, head: Option<Head>) {
        let records = batch
            .iter()
            .filter_map(|id| self.stripes.get(id))
            .map(|stripe| stripe.record.clone())
            .collect();
        let (volume, epoch) = (self.context.volume, self.context.epoch);
        let mutation = Mutation::CommitDatafiles {
            volume,
            epoch,
            records,
            head,
        };
        let (cluster, done) = (Arc::clone(&self.context.cluster), self.done.clone());
        tokio::spawn(async move {
            let result = cluster.mutate(mutation, COMMIT_DEADLINE).await.map(|_| ());
            let _ = done.send(Done::Committed(batch, result));
        });
    }

    fn start_ask(&self, batch: Vec<DatafileId>) {
        let (cluster, done, volume) = (
            Arc::clone(&self.context.cluster),
            self.done.clone(),
            self.context.volume,
        );
        tokio::spawn(async move {
            let result = cluster.records(volume, &batch).await;
            let _ = done.send(Done::Answered(batch, result));
        });
    }

    async fn finish_commit(&mut self, batch: &[DatafileId]) {
        let stripes: Vec<StoredStripe> = batch
            .iter()
            .filter_map(|id| self.stripes.remove(id))
            .collect();
        for id in batch {
            self.errors.remove(id);
        }
        let (store, ids) = (Arc::clone(&self.context.store), batch.to_vec());
        let marked = tokio::task::spawn_blocking(move || store.mark_pushed(&ids)).await;
        if let Ok(Err(error)) = marked {
            // The shards are committed; the next mount notes it.
            tracing::warn!(?batch, %error, "cannot note that datafiles are committed");
        }
        let degraded: Vec<&StoredStripe> = stripes
            .iter()
            .filter(|stripe| !stripe.full_policy)
            .collect();
        if let Some(last) = degraded.last() {
            tracing::warn!(datafiles = degraded.len(), missing = %last.missing, "pushed below policy");
            self.status.send_modify(|status| {
                let below = Arc::make_mut(&mut status.below_policy);
                below.extend(degraded.iter().map(|stripe| stripe.record.datafile));
                status.missing.clone_from(&last.missing);
            });
        }
        let records: Vec<EncodingRecord> =
            stripes.into_iter().map(|stripe| stripe.record).collect();
        self.observer.committed(&records);
    }

    fn start_release(&self, dead: Vec<DatafileId>, meta_before: DatafileId) {
        let (context, observer) = (Arc::clone(&self.context), Arc::clone(&self.observer));
        tokio::spawn(async move {
            let dead = observer.still_dead(&dead);
            release(&context, dead, meta_before, observer.as_ref()).await;
        });
    }
}

/// Releases dead data datafiles and meta datafiles before a checkpoint: in metad, then locally.
async fn release(
    context: &TransferContext,
    dead: Vec<DatafileId>,
    meta_before: DatafileId,
    observer: &dyn PushObserver,
) {
    let old = |file: &Arc<crate::store::catalog::LocalFile>| file.name.id < meta_before;
    let pushed = context
        .store
        .catalog()
        .at(Stream::Meta, crate::store::layout::Stage::Pushed);
    let mut datafiles: Vec<DatafileId> = pushed
        .iter()
        .filter(|file| old(file))
        .map(|file| file.name.id)
        .collect();
    datafiles.extend(&dead);
    if datafiles.is_empty() {
        return;
    }
    let (volume, epoch) = (context.volume, context.epoch);
    let mutation = Mutation::ReleaseDatafiles {
        volume,
        epoch,
        datafiles: datafiles.clone(),
    };
    match context.cluster.mutate(mutation, COMMIT_DEADLINE).await {
        Ok(_) => {
            for id in &datafiles {
                context.store.drop_local(*id);
            }
            observer.released(&dead);
        }
        // Nothing is lost but space: what is dead is found again at the next seal.
        Err(error) => tracing::warn!(?datafiles, %error, "cannot release datafiles now"),
    }
}

/// Seals what is open and waits until all of it is in the queue; answers the newest datafile that must be committed.
pub async fn seal_now(store: &Arc<LocalStore>, deadline: Instant) -> Result<DatafileId, String> {
    let store = Arc::clone(store);
    let sealed = tokio::task::spawn_blocking(move || {
        store.sync().map_err(|error| error.to_string())?;
        store.rotate();
        let target = store.last_id();
        match store.wait_sealed(deadline) {
            Ok(true) => Ok(target),
            Ok(false) => Err("the deadline passed while datafiles were being sealed".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    });
    sealed.await.map_err(|error| error.to_string())?
}

/// Bytes stored so far by all transfers; for progress bars.
pub fn stored_bytes(context: &TransferContext) -> u64 {
    context.stored_bytes.load(Ordering::Relaxed)
}
