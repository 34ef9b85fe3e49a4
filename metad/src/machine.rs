//! The state machine as openraft sees it: the replicated state in sled, and its snapshots.
//!
//! ```text
//! state/current -> state/{generation:08x}/ (sled)        snapshot/{index:020}-{term}.snap
//! apply: State::apply over rows -> one batch { rows, last_applied, membership } in memory
//! rows:  memory -> blocks -> sled, see `rows`, `mover`, `directory`, `block`, `sled_kv`
//! ```
//!
//! Invariants: a batch holds what was applied together with the id of the last applied entry, so the two never disagree; the store is
//! flushed and its file synced before a snapshot is reported, hence before the log is purged; an installed snapshot is built
//! in a directory of its own and becomes current by one rename.

pub mod block;
pub mod directory;
pub mod history;
mod mover;
mod older;
pub mod raft_machine;
pub mod rows;
mod seen;
pub mod sled_kv;
pub mod snapshot;

#[cfg(test)]
mod tests;

use crate::durable::{self, DurableError};
use crate::ground::Ground;
use crate::raft::{LogEntry, LogId, Response, StoredMembership};
use crate::state::command::MemberRow;
use crate::state::known::Known;
use crate::state::kv::{Batch, Kv, KvError, RowKey};
use crate::state::{State, Touched};
use history::{History, Noted, Page};
use openraft::{EntryPayload, RaftLogId};
use parking_lot::{Mutex, RwLock};
use qsfs_zstor::id::MetadId;
use rows::{Fill, Rows};
use serde::{Deserialize, Serialize};
use snapshot::Meta;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Row that holds what Raft needs to know of the state. Sorts after all nouns and is not one of them.
pub const RAFT_ROW: &[u8] = b"\xffraft";

/// Why the state machine cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// sled or a row.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// The pointer to the current directory.
    #[error(transparent)]
    Durable(#[from] DurableError),
    /// The disk refused.
    #[error("cannot {step} {path}: {source}", path = path.display())]
    Io {
        /// Verb phrase.
        step: &'static str,
        /// What.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// An entry that this program does not know.
    #[error("nothing is applied any more: {0}")]
    Unknown(String),
    /// A snapshot does not verify.
    #[error("snapshot {path} is damaged: {reason}", path = path.display())]
    Snapshot {
        /// File.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl MachineError {
    /// The disk was full: that says nothing of what is on it.
    fn is_for_want_of_room(&self) -> bool {
        let source = match self {
            Self::Io { source, .. }
            | Self::Durable(DurableError::Io { source, .. })
            | Self::Kv(KvError::Store(sled::Error::Io(source))) => source,
            _ => return false,
        };
        matches!(
            source.kind(),
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
        )
    }

    pub(crate) fn io(step: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { step, path, source }
    }
}

/// What Raft needs to know of the state, committed with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaftRow {
    /// Newest applied entry.
    pub applied: Option<LogId>,
    /// Newest membership.
    pub membership: StoredMembership,
}

/// A state made from a snapshot, not in use yet.
#[derive(Debug)]
pub struct Prepared(Rows);

struct Current {
    kv: Rows,
    raft: RaftRow,
}

/// The state machine, shared by the consensus module and the service.
#[derive(Clone)]
pub struct Machine {
    shared: Arc<Shared>,
}

struct Shared {
    ground: Ground,
    dir: PathBuf,
    /// Readers see whole batches only: apply commits under the write lock.
    current: RwLock<Current>,
    /// What apply touched, while somebody follows.
    touched: Mutex<Option<Touched>>,
    /// What the newest apply knew of the rows as it left them.
    known: Mutex<Known>,
    /// Rows are being moved aside.
    moving: AtomicBool,
    /// The snapshot that was read whole and is as it was written.
    verified: Mutex<Option<PathBuf>>,
    /// Why that failed.
    move_failed: Mutex<Option<MachineError>>,
    changed: tokio::sync::watch::Sender<u64>,
    history: History,
    incoming: Mutex<u64>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Machine({})", self.shared.dir.display())
    }
}

impl Machine {
    /// Opens or creates the state under a directory. A state that does not open is said, set aside, and rebuilt from the newest
    /// snapshot; the log then brings it up to date.
    pub fn open(dir: &Path) -> Result<Self, MachineError> {
        Self::open_on(&Ground::real(), dir)
    }

    /// The same on other ground.
    pub fn open_on(ground: &Ground, dir: &Path) -> Result<Self, MachineError> {
        let state = make_dirs(ground, dir)?;
        snapshot::remove_unfinished(&*ground.media, dir)?;
        let generation: u64 = durable::load(&*ground.media, &state.join("current"))?.unwrap_or(0);
        let opened = open_generation(ground, &state, generation);
        let current = match opened {
            Ok(current) => current,
            // Not damage: nothing is set aside for it.
            Err(error @ MachineError::Kv(KvError::NewerFormat { .. })) => return Err(error),
            Err(error) if error.is_for_want_of_room() => return Err(error),
            Err(error) => {
                tracing::error!(%error, "the state does not open; rebuilding it from the newest snapshot");
                rebuild(ground, dir, generation)?
            }
        };
        remove_other_generations(ground, &state, &current.kv)?;
        let applied = current.raft.applied.map_or(0, |id| id.index);
        Ok(Self {
            shared: Arc::new(Shared {
                ground: ground.clone(),
                dir: dir.to_owned(),
                current: RwLock::new(current),
                touched: Mutex::new(None),
                known: Mutex::default(),
                moving: AtomicBool::new(false),
                verified: Mutex::new(None),
                move_failed: Mutex::new(None),
                changed: tokio::sync::watch::Sender::new(applied),
                history: History::new(applied),
                incoming: Mutex::new(0),
            }),
        })
    }

    /// A state that begins with the rows of a backup, in a cluster of which only the given member is left.
    pub fn reborn(
        dir: &Path,
        backup: &Path,
        member: impl FnOnce(MetadId) -> MemberRow,
    ) -> Result<Self, MachineError> {
        let ground = Ground::real();
        let state = make_dirs(&ground, dir)?;
        let kv = load_generation(&ground, &state, 0, backup, |_| Ok(()))?;
        make_current(&ground, &state, &kv)?;
        let mut changes = State::new(&kv);
        changes.begin_again(member)?;
        let (mut batch, _) = changes.into_changes();
        // The log begins anew: nothing of it is applied, and nobody votes yet.
        batch.insert(RowKey::from_slice(RAFT_ROW), None);
        kv.commit(batch);
        kv.flush()?;
        drop(kv);
        Self::open(dir)
    }

    /// A state that is older than the newest snapshot, which a crash while one was being installed leaves, is made anew from that. The
    /// log, of which everything up to `purged` is gone, must be able to do the rest.
    pub fn catch_up(&self, purged: Option<LogId>) -> Result<(), MachineError> {
        let media = &*self.shared.ground.media;
        let applied = self.raft_row().applied;
        if let Some(path) = snapshot::newest(media, &self.shared.dir)? {
            let meta = snapshot::read_meta(media, &path)?;
            if meta.last_log_id > applied && meta.last_log_id >= purged {
                tracing::warn!(
                    applied = applied.map_or(0, |id| id.index), snapshot = %path.display(),
                    "the state is older than the newest snapshot; it is made anew from that"
                );
                return self.install(self.prepare(&path, &meta)?);
            }
        }
        let Some(purged) = purged.filter(|purged| applied.map(|id| id.index) < Some(purged.index))
        else {
            return Ok(());
        };
        Err(MachineError::Snapshot {
            path: self.shared.dir.join("snapshot"),
            reason: format!(
                "the state is older than the log, which begins after {purged}, and no snapshot closes the gap"
            ),
        })
    }

    /// Reads under one consistent view. Keep it short: apply waits.
    pub fn read<T>(&self, read: impl FnOnce(&State<&Rows>) -> T) -> T {
        let current = self.shared.current.read();
        read(&State::new(&current.kv))
    }

    /// Where it is.
    pub(crate) fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// Removes what is left of snapshots that were received and of states that were made of them and are not in use.
    pub(crate) fn tidy(&self) -> Result<(), MachineError> {
        let ground = &self.shared.ground;
        snapshot::remove_incoming(&*ground.media, &self.shared.dir)?;
        let state = self.shared.dir.join("state");
        remove_other_generations(ground, &state, &self.shared.current.read().kv)
    }

    /// What it stands on.
    pub(crate) fn ground(&self) -> &Ground {
        &self.shared.ground
    }

    /// What of the state is not as it was written, once that was met: the next start makes it again.
    pub fn rot(&self) -> Option<String> {
        self.shared.current.read().kv.rot()
    }

    /// What Raft knows of the state.
    pub fn raft_row(&self) -> RaftRow {
        self.shared.current.read().raft.clone()
    }

    /// Index of the newest applied entry.
    pub fn applied(&self) -> u64 {
        *self.shared.changed.borrow()
    }

    /// Index of the newest applied entry, as it grows.
    pub fn applied_index(&self) -> tokio::sync::watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// What was changed after an index, if that is remembered; else the oldest index that can be asked about.
    pub fn history_after(&self, index: u64) -> Result<Page, u64> {
        self.shared.history.after(index)
    }

    /// As if so many bytes were the limit, from now on.
    #[cfg(test)]
    pub(crate) fn forget_history(&self, bytes_max: usize) {
        self.shared.history.set_limit(bytes_max);
    }

    /// From here on what apply touches is remembered, for [`Self::take_touched`]. Whoever reads after this call and follows what was
    /// touched misses nothing.
    pub fn follow_touched(&self) {
        *self.shared.touched.lock() = Some(Touched::default());
    }

    /// Nobody asks for what was touched any more.
    pub fn forget_touched(&self) {
        *self.shared.touched.lock() = None;
    }

    /// What apply touched since this was asked last; nothing if nobody follows.
    pub fn take_touched(&self) -> Touched {
        let mut touched = self.shared.touched.lock();
        touched.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Applies entries and commits them with the id of the last. Says as well whether [`Self::relieve`] is due.
    pub fn apply(&self, entries: Vec<LogEntry>) -> Result<(Vec<Response>, Fill), MachineError> {
        if let Some(failed) = self.shared.move_failed.lock().take() {
            return Err(failed);
        }
        // Only this function writes, and openraft calls it from one task: reading before the write lock is safe.
        let applier = &*self.shared.ground.applier;
        let program = self.shared.ground.program;
        let mut history = Vec::new();
        let (batch, touched, raft, responses) = {
            let current = self.shared.current.read();
            let known = std::mem::take(&mut *self.shared.known.lock());
            let mut state = State::noting(&current.kv, known);
            let mut raft = current.raft.clone();
            let mut responses = Vec::with_capacity(entries.len());
            for entry in entries {
                let id = *entry.get_log_id();
                program.check(&entry).map_err(MachineError::Unknown)?;
                raft.applied = Some(id);
                responses.push(match entry.payload {
                    EntryPayload::Blank => Response(None),
                    EntryPayload::Normal(proposal) => {
                        Response(Some(applier.apply(&id, &mut state, &proposal)?))
                    }
                    EntryPayload::Membership(membership) => {
                        raft.membership = StoredMembership::new(Some(id), membership);
                        Response(None)
                    }
                });
                let rows = state.take_noted();
                if !rows.is_empty() {
                    let index = id.index;
                    history.push(Noted { index, rows });
                }
            }
            *self.shared.known.lock() = state.take_known();
            let (batch, touched) = state.into_changes();
            (batch, touched, raft, responses)
        };
        Ok((responses, self.commit(batch, touched, raft, history)))
    }

    /// Moves the rows that are only in memory so far to the store below.
    pub fn relieve(&self) -> Result<(), MachineError> {
        let kv = self.shared.current.read().kv.clone();
        Ok(kv.relieve()?)
    }

    fn commit(
        &self,
        mut batch: Batch,
        touched: Touched,
        raft: RaftRow,
        history: Vec<Noted>,
    ) -> Fill {
        batch.insert(
            RowKey::from_slice(RAFT_ROW),
            Some(crate::state::row::encode(&raft)),
        );
        let mut current = self.shared.current.write();
        let fill = current.kv.commit(batch);
        let applied = raft.applied.map_or(0, |id| id.index);
        current.raft = raft;
        if let Some(followed) = self.shared.touched.lock().as_mut() {
            followed.merge(touched);
        }
        drop(current);
        self.shared.history.extend(history, applied);
        self.shared.changed.send_replace(applied);
        fill
    }

    /// Makes what was applied durable.
    pub fn flush(&self) -> Result<(), MachineError> {
        let kv = self.shared.current.read().kv.clone();
        Ok(kv.flush()?)
    }

    /// Makes a state out of a snapshot, aside: nothing of what is in use changes. The snapshot is read whole; one that does not verify
    /// or is another than the announced one is an error and leaves nothing.
    pub fn prepare(&self, path: &Path, meta: &Meta) -> Result<Prepared, MachineError> {
        let state = self.shared.dir.join("state");
        let generation = self.shared.current.read().kv.generation() + 1;
        let ground = &self.shared.ground;
        let announced = |found: &Meta| {
            let right = found.last_log_id == meta.last_log_id;
            let reason = "it is not the announced snapshot".into();
            let path = path.to_owned();
            let wrong = MachineError::Snapshot { path, reason };
            right.then_some(()).ok_or(wrong)
        };
        let kv = load_generation(ground, &state, generation, path, announced);
        if kv.is_err() {
            let dir = Rows::dir(&state, generation);
            if let Err(error) = ground.stores.remove(&dir) {
                tracing::warn!(%error, dir = %dir.display(), "what was begun of a state is not removed");
            }
        }
        Ok(Prepared(kv?))
    }

    /// Replaces the whole state by one made from a snapshot.
    fn install(&self, Prepared(kv): Prepared) -> Result<(), MachineError> {
        let state = self.shared.dir.join("state");
        let ground = &self.shared.ground;
        make_current(ground, &state, &kv)?;
        let raft = load_raft_row(&kv)?;
        let applied = raft.applied.map_or(0, |id| id.index);
        let old = {
            let mut current = self.shared.current.write();
            *self.shared.known.lock() = Known::default();
            std::mem::replace(&mut *current, Current { kv, raft })
        };
        drop(old);
        self.shared.history.restart(applied);
        remove_other_generations(ground, &state, &self.shared.current.read().kv)?;
        self.shared.changed.send_replace(applied);
        Ok(())
    }
}

pub(crate) fn load_raft_row(kv: &Rows) -> Result<RaftRow, KvError> {
    let value = kv.get(RAFT_ROW)?;
    let row = value.map(|value| crate::state::row::decode(RAFT_ROW, &value));
    Ok(row.transpose()?.unwrap_or_default())
}

/// Answers with the directory of the state.
fn make_dirs(ground: &Ground, dir: &Path) -> Result<PathBuf, MachineError> {
    let state = dir.join("state");
    for path in [&state, &dir.join("snapshot")] {
        let made = ground.media.create_dir_all(path);
        made.map_err(MachineError::io("create", path))?;
    }
    Ok(state)
}

fn open_generation(
    ground: &Ground,
    state: &Path,
    generation: u64,
) -> Result<Current, MachineError> {
    let kv = match Rows::open_verified(&*ground.stores, state, generation) {
        Err(KvError::OldFormat) => {
            tracing::info!("the state is of an older format; it is copied into the present one");
            older::copy(ground, state, generation)?
        }
        opened => opened?,
    };
    let raft = load_raft_row(&kv)?;
    Ok(Current { kv, raft })
}

/// Fills a new directory from a snapshot that is the right one, and makes it durable.
fn load_generation(
    ground: &Ground,
    state: &Path,
    generation: u64,
    path: &Path,
    right: impl FnOnce(&Meta) -> Result<(), MachineError>,
) -> Result<Rows, MachineError> {
    fill_generation(ground, state, generation, |kv| {
        let load = |batch| match kv.commit(batch) {
            Fill::Room => Ok(()),
            Fill::Due | Fill::Full => kv.relieve(),
        };
        right(&snapshot::read_rows(&*ground.media, path, load)?)
    })
}

fn make_current(ground: &Ground, state: &Path, kv: &Rows) -> Result<(), MachineError> {
    let current = state.join("current");
    durable::store(&*ground.media, &current, &kv.generation())?;
    Ok(())
}

fn fill_generation(
    ground: &Ground,
    state: &Path,
    generation: u64,
    fill: impl FnOnce(&Rows) -> Result<(), MachineError>,
) -> Result<Rows, MachineError> {
    let dir = Rows::dir(state, generation);
    let stores = &*ground.stores;
    if stores.exists(&dir) {
        stores
            .remove(&dir)
            .map_err(MachineError::io("remove", &dir))?;
    }
    let kv = Rows::open(stores, state, generation)?;
    fill(&kv)?;
    kv.flush()?;
    Ok(kv)
}

fn rebuild(ground: &Ground, dir: &Path, generation: u64) -> Result<Current, MachineError> {
    let state = dir.join("state");
    let aside = state.join(format!("damaged-{generation:08x}"));
    let damaged = Rows::dir(&state, generation);
    let stores = &*ground.stores;
    if stores.exists(&aside) {
        stores
            .remove(&aside)
            .map_err(MachineError::io("remove", &aside))?;
    }
    stores
        .rename(&damaged, &aside)
        .map_err(MachineError::io("set aside", &damaged))?;
    let next = generation + 1;
    let kv = match snapshot::newest(&*ground.media, dir)? {
        Some(path) => load_generation(ground, &state, next, &path, |_| Ok(()))?,
        None => Rows::open(stores, &state, next)?,
    };
    make_current(ground, &state, &kv)?;
    let raft = load_raft_row(&kv)?;
    Ok(Current { kv, raft })
}

fn remove_other_generations(ground: &Ground, state: &Path, kv: &Rows) -> Result<(), MachineError> {
    let names = ground
        .stores
        .list(state)
        .map_err(MachineError::io("list", state))?;
    for name in names {
        let path = state.join(&name);
        let generation = u64::from_str_radix(&name, 16);
        if name.len() == 8 && generation.is_ok_and(|found| found != kv.generation()) {
            ground
                .stores
                .remove(&path)
                .map_err(MachineError::io("remove", &path))?;
        }
    }
    Ok(())
}
