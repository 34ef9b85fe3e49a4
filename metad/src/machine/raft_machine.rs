//! openraft's view of the state machine. Blocking work runs off the async threads.

use super::rows::Fill;
use super::snapshot::{self, Meta, SnapshotFile};
use super::{Machine, MachineError};
use crate::ground;
use crate::raft::{LogEntry, LogId, Response, StorageError, StoredMembership, TypeConfig};
use crate::state::kv::{KvError, Pair, RowKey, after};
use openraft::storage::RaftStateMachine;
use openraft::{
    AnyError, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta, StorageIOError,
};
use std::sync::atomic::Ordering;

/// Rows copied at once.
const COPY_ROWS: usize = 2_048;

fn failed(error: &MachineError) -> StorageError {
    StorageIOError::write_state_machine(AnyError::error(error.to_string())).into()
}

async fn blocking<T: Send + 'static>(
    machine: &Machine,
    job: impl FnOnce() -> Result<T, MachineError> + Send + 'static,
) -> Result<T, StorageError> {
    match ground::blocking(&machine.shared.ground.work, job).await {
        Ok(result) => result.map_err(|error| failed(&error)),
        Err(error) => {
            Err(StorageIOError::write_state_machine(AnyError::error(error.to_string())).into())
        }
    }
}

impl Machine {
    /// Takes a snapshot while applies go on, and makes it and the state durable.
    pub fn build(&self) -> Result<std::path::PathBuf, MachineError> {
        let path = self.copy(|meta, page| {
            snapshot::write(&*self.shared.ground.media, &self.shared.dir, meta, page)
        })?;
        self.flush()?;
        // What was just written with its hash is believed until somebody doubts it: reading it again would keep applies waiting.
        *self.shared.verified.lock() = Some(path.clone());
        Ok(path)
    }

    /// A file for a snapshot to be received; of what was received before nothing is left.
    pub fn receive(&self) -> Result<SnapshotFile, MachineError> {
        let mut incoming = self.shared.incoming.lock();
        let (ground, dir) = (&self.shared.ground, &self.shared.dir);
        snapshot::remove_incoming(&*ground.media, dir)?;
        *incoming += 1;
        SnapshotFile::create(ground, dir, *incoming)
    }

    /// Gives a received snapshot that was read whole its name; answers with its path.
    pub fn accept(
        &self,
        part: &std::path::Path,
        meta: &Meta,
    ) -> Result<std::path::PathBuf, MachineError> {
        let media = &*self.shared.ground.media;
        let path = snapshot::accept(media, &self.shared.dir, part, meta)?;
        *self.shared.verified.lock() = Some(path.clone());
        Ok(path)
    }

    /// A peer says that the snapshot it was sent is damaged: it is read whole before it is sent again.
    pub fn doubt_snapshot(&self) {
        *self.shared.verified.lock() = None;
    }

    /// Bytes of the newest snapshot; none without one.
    pub fn snapshot_bytes(&self) -> Result<u64, MachineError> {
        snapshot::newest_bytes(&*self.shared.ground.media, &self.shared.dir)
    }

    /// Copies the state while applies go on, in a snapshot's format, to a file of one's own.
    pub fn copy_to(&self, path: &std::path::Path) -> Result<(), MachineError> {
        self.copy(|meta, page| snapshot::write_to(&*self.shared.ground.media, path, meta, page))
    }

    fn copy<T>(
        &self,
        write: impl FnOnce(
            &Meta,
            &mut dyn FnMut() -> Result<Vec<Pair>, KvError>,
        ) -> Result<T, MachineError>,
    ) -> Result<T, MachineError> {
        let (raft, view, generation) = {
            // No apply is under way: what is copied and the id of the last applied entry belong together.
            let current = self.shared.current.write();
            let generation = current.kv.generation();
            (current.raft.clone(), current.kv.view(), generation)
        };
        let id = raft.applied.map_or("empty".to_owned(), |id| id.to_string());
        let meta = SnapshotMeta {
            last_log_id: raft.applied,
            last_membership: raft.membership,
            snapshot_id: id,
        };
        let mut from = RowKey::new();
        write(&meta, &mut || {
            if self.shared.current.read().kv.generation() != generation {
                return Err(KvError::Replaced);
            }
            let page = view.page(&from, COPY_ROWS)?;
            if let Some((last, _)) = page.last() {
                from = after(last);
            }
            Ok(page)
        })
    }

    /// The newest snapshot. One that this process did not write, or that is in doubt, is read whole before it is handed out: one that is
    /// damaged is not sent to others but made anew from the state.
    fn sound_snapshot(&self) -> Result<Option<Snapshot<TypeConfig>>, MachineError> {
        let ground = &self.shared.ground;
        let media = &*ground.media;
        let Some(mut path) = snapshot::newest(media, &self.shared.dir)? else {
            return Ok(None);
        };
        let known = self.shared.verified.lock().clone();
        if known.as_ref() != Some(&path) {
            match snapshot::read_rows(media, &path, |_| Ok(())) {
                Err(error @ MachineError::Snapshot { .. }) => {
                    tracing::error!(%error, "a snapshot is damaged and not used; it is made anew from the state");
                    media
                        .remove(&path)
                        .map_err(MachineError::io("remove", &path))?;
                    path = self.build()?;
                }
                read => drop(read?),
            }
            *self.shared.verified.lock() = Some(path.clone());
        }
        snapshot::as_snapshot(ground, &path).map(Some)
    }

    /// Moves rows to the store while applies go on; a failure is told to the next apply.
    fn relieve_aside(&self) {
        if self.shared.moving.swap(true, Ordering::AcqRel) {
            return;
        }
        let machine = self.clone();
        let moved = self.shared.ground.work.run(Box::new(move || {
            if let Err(error) = machine.relieve() {
                *machine.shared.move_failed.lock() = Some(error);
            }
            machine.shared.moving.store(false, Ordering::Release);
        }));
        tokio::spawn(moved);
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Machine {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError> {
        let machine = self.clone();
        blocking(self, move || {
            let path = machine.build()?;
            snapshot::as_snapshot(&machine.shared.ground, &path)
        })
        .await
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), StorageError> {
        let row = self.raft_row();
        Ok((row.applied, row.membership))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Response>, StorageError>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        // In place: it is memory's work, and handing it over would cost more. What reaches the disk is done aside.
        let applied = Self::apply(self, entries.into_iter().collect());
        let (responses, fill) = applied.map_err(|error| failed(&error))?;
        match fill {
            Fill::Room => {}
            Fill::Due => self.relieve_aside(),
            Fill::Full => {
                let machine = self.clone();
                blocking(self, move || machine.relieve()).await?;
            }
        }
        Ok(responses)
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<SnapshotFile>, StorageError> {
        let file = self.receive();
        file.map(Box::new).map_err(|error| failed(&error))
    }

    async fn install_snapshot(
        &mut self,
        meta: &Meta,
        snapshot: Box<SnapshotFile>,
    ) -> Result<(), StorageError> {
        let mut snapshot = snapshot;
        let prepared = snapshot.take_prepared();
        let part = snapshot.finish().await.map_err(|error| failed(&error))?;
        let (machine, meta) = (self.clone(), meta.clone());
        blocking(self, move || {
            let prepared = match prepared {
                Some(prepared) => prepared,
                None => machine.prepare(&part, &meta)?,
            };
            machine.accept(&part, &meta)?;
            machine.install(prepared)
        })
        .await
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, StorageError> {
        let machine = self.clone();
        blocking(self, move || machine.sound_snapshot()).await
    }
}
