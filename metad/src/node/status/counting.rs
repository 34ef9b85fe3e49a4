//! What is wrong with the records, as a node that does not lead can say it: by looking at all of them.
//!
//! A leader keeps that up ([`crate::plan::index`]); the sums in the state say how many records and bytes there are, not how many are below
//! policy, for that depends on what is agreed on of every backend. So a follower walks through them, aside and seldom: one walk at a
//! time serves all who ask, nobody waits long for it, and its outcome is used again for some times as long as it took. With
//! millions of records the first who ask are told that it still counts.

use super::health;
use crate::ground;
use crate::machine::Machine;
use crate::plan::index::{Index, VolumeHealth};
use crate::state::kv::KvError;
use parking_lot::Mutex;
use qsfs_zstor::id::VolumeId;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

/// Longest wait for a walk.
const WAIT: Duration = Duration::from_millis(500);

/// What a walk found is used for so many times as long as it took: what walks cost stays below this share of one core.
const REUSED: u32 = 20;

/// What a walk found.
#[derive(Debug, Clone, Default)]
pub(super) struct Count {
    pub(super) health: BTreeMap<VolumeId, VolumeHealth>,
    pub(super) pending_shards: u64,
    pub(super) bad_shards: u64,
}

#[derive(Debug, Default)]
struct Walks {
    newest: Option<(Instant, Duration, Arc<Count>)>,
    running: Option<watch::Receiver<()>>,
}

/// The walks of a node.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counting {
    walks: Arc<Mutex<Walks>>,
}

impl Counting {
    /// The newest count; none if the first walk takes longer than anyone waits.
    pub(super) async fn ask(&self, machine: &Machine) -> Option<Arc<Count>> {
        let mut ended = {
            let mut walks = self.walks.lock();
            if let Some((at, took, count)) = &walks.newest
                && at.elapsed() < *took * REUSED
            {
                return Some(Arc::clone(count));
            }
            match &walks.running {
                Some(running) => running.clone(),
                None => {
                    let ended = self.begin(machine);
                    walks.running = Some(ended.clone());
                    ended
                }
            }
        };
        // Ended or not: what is known is answered.
        _ = timeout(WAIT, ended.changed()).await;
        let walks = self.walks.lock();
        walks.newest.as_ref().map(|(_, _, count)| Arc::clone(count))
    }

    fn begin(&self, machine: &Machine) -> watch::Receiver<()> {
        let (tell, ended) = watch::channel(());
        let (walks, machine) = (Arc::clone(&self.walks), machine.clone());
        let work = Arc::clone(&machine.ground().work);
        tokio::spawn(async move {
            let began = Instant::now();
            let walked = ground::blocking(&work, move || walk(&machine)).await;
            let mut walks = walks.lock();
            walks.running = None;
            match walked {
                Ok(Ok(count)) => {
                    walks.newest = Some((Instant::now(), began.elapsed(), Arc::new(count)));
                }
                Ok(Err(error)) => tracing::error!(%error, "the records cannot be counted"),
                Err(_) => {}
            }
            drop(walks);
            // Who does not wait any more is not told.
            _ = tell.send(());
        });
        ended
    }
}

/// In steps, so that applies get on.
#[expect(
    clippy::redundant_closure,
    reason = "the bare function is not general enough over the lifetime of the view"
)]
fn walk(machine: &Machine) -> Result<Count, KvError> {
    let mut index = machine.read(|state| Index::begin(state))?;
    while machine.read(|state| index.advance(state))? {}
    let (pending_shards, bad_shards) = index.pending_shards();
    Ok(Count {
        health: health(&index),
        pending_shards,
        bad_shards,
    })
}

#[cfg(test)]
#[path = "counting/tests.rs"]
mod tests;
