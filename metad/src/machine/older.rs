//! A state of format 1, in which every row was a value of the store's own: it is copied into a new directory of the present format.

use super::rows::{Fill, Rows};
use super::{MachineError, mover};
use crate::ground::Ground;
use crate::state::kv::{Batch, RowKey};
use std::path::Path;

/// Rows copied at once.
const COPY_ROWS: usize = 4_096;

/// Copies a generation of format 1 into the next one, which becomes the current one.
pub(super) fn copy(ground: &Ground, state: &Path, generation: u64) -> Result<Rows, MachineError> {
    let old = ground.stores.open(&Rows::dir(state, generation))?;
    old.verify()?;
    let copied = super::fill_generation(ground, state, generation + 1, |kv| {
        let mut batch = Batch::new();
        mover::scan(old.as_ref(), &[], |key, value| {
            batch.insert(RowKey::from_slice(key), Some(value.to_vec()));
            if batch.len() == COPY_ROWS && kv.commit(std::mem::take(&mut batch)) != Fill::Room {
                kv.relieve()?;
            }
            Ok(true)
        })?;
        kv.commit(batch);
        Ok(())
    })?;
    super::make_current(ground, state, &copied)?;
    Ok(copied)
}
