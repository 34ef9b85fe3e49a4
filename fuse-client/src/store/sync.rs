//! Group commit: one round of fdatasync serves everyone who waits.
//!
//! A caller is served by a round that *starts* after its call. The first of those who wait leads the round, the others
//! sleep until it ends.

use super::{LocalStore, datafile_error, io_error};
use crate::ports::StoreError;
use parking_lot::{Condvar, Mutex};
use std::sync::atomic::Ordering;

#[derive(Debug, Default)]
struct State {
    started: u64,
    finished: u64,
}

/// The rounds of one store.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    state: Mutex<State>,
    ended: Condvar,
}

impl LocalStore {
    /// See [`crate::ports::Store::sync`].
    pub fn sync(&self) -> Result<(), StoreError> {
        let mut state = self.rounds.state.lock();
        let wanted = state.started + 1;
        loop {
            if state.finished >= wanted {
                return self.check_running();
            }
            if state.started == state.finished {
                state.started += 1;
                let mine = state.started;
                drop(state);
                let outcome = self.sync_round();
                if let Err(error) = &outcome {
                    self.fail(error);
                }
                self.rounds.state.lock().finished = mine;
                self.rounds.ended.notify_all();
                return outcome;
            }
            self.rounds.ended.wait(&mut state);
        }
    }

    /// Data first, then the journal. A journal record that slips in behind the data it names is cut at the next open
    /// should power fail right then: it was not acknowledged.
    fn sync_round(&self) -> Result<(), StoreError> {
        self.check_running()?;
        self.counters.sync_rounds.fetch_add(1, Ordering::Relaxed);
        // Before the data: what a journal names up to here was appended by now.
        let (journals, reached) = self.active.journals_to_sync(&self.keeper);
        let data: Vec<_> = self.open_data.read().values().cloned().collect();
        let mut names = false;
        for open in &data {
            open.sync()
                .map_err(|source| io_error("sync", &open.path, source))?;
            names |= !open.name_durable.load(Ordering::Acquire);
        }
        if names {
            let dir = self.dir.datafiles();
            self.media
                .sync_dir(&dir)
                .map_err(|source| io_error("sync directory", &dir, source))?;
            for open in &data {
                open.name_durable.store(true, Ordering::Release);
            }
        }
        for journal in journals {
            journal
                .sync()
                .map_err(|error| datafile_error("sync", &self.dir.datafiles(), error))?;
        }
        if let Some(reached) = reached
            && let Err(error) = self.synced.note(&self.media, &self.dir, reached)
        {
            // Durable all the same; only damage that comes later would be taken for a torn tail.
            tracing::warn!(%error, "cannot note what is synced");
        }
        Ok(())
    }

    /// True when something is not durable yet.
    pub(super) fn dirty(&self) -> bool {
        // Journals know by themselves whether there is something to sync.
        self.open_data.read().values().any(|open| open.dirty())
            || self.active.journal_at_risk().is_some()
    }
}
