//! Checkpoints: a dump of the namespace in the meta stream, so that recovery need not read the journal from its beginning.
//!
//! ```text
//! rotate (journal J closes, id C is reserved) -> snapshot at sequence s >= end of J -> write C -> rotate data -> close C
//! recovery:  load C, then replay every journal with a higher id; records up to s are known and skipped
//! ```
//!
//! A checkpoint is one meta datafile: begin(sequence), rows, end(number of row frames). It is committed after all data it names,
//! as any meta datafile; the head's `recover_from` then moves to it.

use crate::namespace::{Namespace, NamespaceError, Snapshot};
use crate::ports::StoreError;
use crate::store::LocalStore;
use crate::store::append::{KIND_CHECKPOINT_BEGIN, KIND_CHECKPOINT_END, KIND_CHECKPOINT_ROWS};
use qsfs_zdb::datafile::{Datafile, DatafileError};
use qsfs_zstor::id::DatafileId;

/// A checkpoint is due when the journals since the last one hold so many bytes ...
pub const JOURNAL_BYTES_MIN: u64 = 32 << 20;
/// ... and so many times the bytes of the last checkpoint.
pub const CHECKPOINT_FACTOR: u64 = 4;

/// Why no checkpoint was taken; it is tried again at the next seal.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The namespace cannot be dumped.
    #[error("dump the namespace: {0}")]
    Namespace(#[from] NamespaceError),
    /// The file cannot be made.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file cannot be written.
    #[error("write the checkpoint: {0}")]
    Write(#[from] DatafileError),
}

/// Is a checkpoint due?
pub const fn due(journal_bytes: u64, last_checkpoint_bytes: u64) -> bool {
    journal_bytes >= JOURNAL_BYTES_MIN
        && journal_bytes >= last_checkpoint_bytes.saturating_mul(CHECKPOINT_FACTOR)
}

/// Takes one. Blocking; writers go on meanwhile, journals are not closed.
pub fn take(store: &LocalStore, namespace: &Namespace) -> Result<DatafileId, CheckpointError> {
    let id = store.rotate_for_checkpoint();
    match dump(store, namespace, id) {
        Ok(file) => {
            let barrier = store.rotate_data();
            store.close_checkpoint(id, file, barrier);
            Ok(id)
        }
        Err(error) => {
            store.abandon_checkpoint();
            Err(error)
        }
    }
}

fn dump(
    store: &LocalStore,
    namespace: &Namespace,
    id: DatafileId,
) -> Result<Datafile, CheckpointError> {
    let snapshot = namespace.snapshot()?;
    let mut file = store.create_meta(id)?;
    if let Err(error) = write(&mut file, snapshot) {
        let path = file.path().to_owned();
        drop(file);
        if let Err(error) = store.media().remove(&path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove an unfinished checkpoint");
        }
        return Err(error);
    }
    Ok(file)
}

fn write(file: &mut Datafile, snapshot: Snapshot) -> Result<(), CheckpointError> {
    file.append(KIND_CHECKPOINT_BEGIN, &[&snapshot.sequence().to_le_bytes()])?;
    let mut batches = 0_u64;
    for batch in snapshot {
        file.append(KIND_CHECKPOINT_ROWS, &[&batch?])?;
        batches += 1;
    }
    file.append(KIND_CHECKPOINT_END, &[&batches.to_le_bytes()])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_due_by_bytes_and_by_share() {
        assert!(!due(JOURNAL_BYTES_MIN - 1, 0));
        assert!(due(
            JOURNAL_BYTES_MIN,
            JOURNAL_BYTES_MIN / CHECKPOINT_FACTOR
        ));
        assert!(!due(JOURNAL_BYTES_MIN, JOURNAL_BYTES_MIN));
    }
}
