//! The state machine behind the log: nothing is applied before it is durable here. Why: [`super::storage`].

use super::storage::LogStore;
use crate::machine::Machine;
use crate::machine::snapshot::{Meta, SnapshotFile};
use crate::raft::{LogEntry, LogId, Response, StorageError, StoredMembership, TypeConfig};
use openraft::storage::RaftStateMachine;
use openraft::{AnyError, OptionalSend, RaftLogId, Snapshot, StorageIOError};

/// A [`Machine`] whose applies wait for the log's watermark.
#[derive(Debug, Clone)]
pub struct Gated {
    machine: Machine,
    log: LogStore,
}

impl Gated {
    /// The machine that applies what stands in this log.
    pub fn new(machine: Machine, log: LogStore) -> Self {
        Self { machine, log }
    }
}

impl RaftStateMachine<TypeConfig> for Gated {
    type SnapshotBuilder = Machine;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), StorageError> {
        self.machine.applied_state().await
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Response>, StorageError>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<_> = entries.into_iter().collect();
        if let Some(last) = entries.last() {
            let end = last.get_log_id().index + 1;
            let durable = self.log.watermark().wait(end).await;
            durable.map_err(|error| {
                StorageError::from(StorageIOError::write_logs(AnyError::error(
                    error.to_string(),
                )))
            })?;
        }
        RaftStateMachine::apply(&mut self.machine, entries).await
    }

    async fn get_snapshot_builder(&mut self) -> Machine {
        self.machine.get_snapshot_builder().await
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<SnapshotFile>, StorageError> {
        self.machine.begin_receiving_snapshot().await
    }

    async fn install_snapshot(
        &mut self,
        meta: &Meta,
        snapshot: Box<SnapshotFile>,
    ) -> Result<(), StorageError> {
        self.machine.install_snapshot(meta, snapshot).await
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, StorageError> {
        self.machine.get_current_snapshot().await
    }
}
