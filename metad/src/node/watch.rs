//! Watches: every watcher walks through the history of the state machine at its own pace.
//!
//! ```text
//! apply -> history (bounded, shared) -> one task a watcher: filter, decode -> queue of QUEUE events -> the wire
//! ```
//!
//! Apply never waits for a watcher: what one has not taken lies in the history, once for all, and whoever falls behind the history
//! or does not take an event for [`Limits::stall`] is cut off and told so; it may resume where it was.

use super::freshness::Fresh;
use crate::machine::Machine;
use crate::machine::history::Noted;
use crate::state::kv::KvError;
use crate::state::row::{self, Table};
use parking_lot::Mutex;
use qsfs_proto::api::MetadError;
use qsfs_proto::server::{CallError, Watch};
use qsfs_proto::watch::{Change, WatchEvent, WatchRequest};
use qsfs_zstor::id::{DatafileId, VolumeId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

/// Events between a watcher's task and the wire, which has buffers of its own.
const QUEUE: usize = 16;

/// What watchers may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Watchers of this node.
    pub watchers_max: usize,
    /// Of them, those of one certificate's subject.
    pub per_caller_max: usize,
    /// An event not taken for so long cuts its watcher off.
    pub stall: Duration,
    /// Without any change, progress is told so often.
    pub progress: Duration,
    /// A node that was not up to date for so long serves no watch: another one may know more.
    pub stale_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            watchers_max: 1_024,
            per_caller_max: 64,
            stall: Duration::from_secs(10),
            progress: Duration::from_secs(2),
            stale_max: Duration::from_secs(10),
        }
    }
}

/// All watchers of a node.
pub struct Watchers {
    machine: Machine,
    fresh: Fresh,
    limits: Limits,
    stop: CancellationToken,
    counts: Mutex<BTreeMap<String, usize>>,
}

/// A watcher's place; given back when dropped.
struct Place {
    watchers: Arc<Watchers>,
    caller: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.watchers.counts.lock();
        if let Some(count) = counts.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.caller);
            }
        }
    }
}

fn busy(text: String) -> CallError {
    MetadError::Busy(text).into()
}

impl Watchers {
    /// Of a node; all end with `stop`.
    pub fn new(machine: Machine, fresh: Fresh, limits: Limits, stop: CancellationToken) -> Self {
        Self {
            machine,
            fresh,
            limits,
            stop,
            counts: Mutex::default(),
        }
    }

    fn place(self: &Arc<Self>, caller: &str) -> Result<Place, CallError> {
        let mut counts = self.counts.lock();
        let all: usize = counts.values().sum();
        if all >= self.limits.watchers_max {
            return Err(busy(format!("this metad serves {all} watches already")));
        }
        let own = counts.entry(caller.to_owned()).or_default();
        if *own >= self.limits.per_caller_max {
            return Err(busy(format!("{caller} has {own} watches here already")));
        }
        *own += 1;
        Ok(Place {
            watchers: Arc::clone(self),
            caller: caller.to_owned(),
        })
    }

    /// Is what this node has applied too old to be watched?
    fn check_fresh(&self) -> Result<(), CallError> {
        let since = match self.fresh.age() {
            Some(age) if age <= self.limits.stale_max => return Ok(()),
            Some(age) => format!("for {} s", age.as_secs()),
            None => "since it was started".into(),
        };
        let text = format!("this metad was not up to date {since}: watch at another");
        Err(MetadError::Unreachable(text).into())
    }

    /// Begins one. `caller` names whose it is.
    pub fn open(self: &Arc<Self>, caller: &str, request: WatchRequest) -> Result<Watch, CallError> {
        self.check_fresh()?;
        let place = self.place(caller)?;
        let after = request
            .after
            .unwrap_or(*self.machine.applied_index().borrow());
        // Said at once, so that a client can look elsewhere.
        self.machine.history_after(after).map_err(too_old)?;
        let (sender, events) = mpsc::channel(QUEUE);
        let (end, ended) = oneshot::channel();
        let watcher = Watcher {
            watchers: Arc::clone(self),
            request,
            position: after,
            sender,
        };
        tokio::spawn(async move {
            let _place = place;
            if let Err(Some(error)) = watcher.run().await {
                // Whoever watched may be gone.
                let _ = end.send(error);
            }
        });
        Ok(Watch { events, ended })
    }
}

fn too_old(oldest: u64) -> CallError {
    MetadError::TooOld { oldest }.into()
}

struct Watcher {
    watchers: Arc<Watchers>,
    request: WatchRequest,
    position: u64,
    sender: mpsc::Sender<WatchEvent>,
}

/// Why a watch ended; `None`: nobody is there any more, or the node stops.
type End = Option<CallError>;

impl Watcher {
    async fn run(mut self) -> Result<(), End> {
        let Watchers { limits, stop, .. } = &*Arc::clone(&self.watchers);
        let mut applied = self.watchers.machine.applied_index();
        self.send(WatchEvent::Began(self.position)).await?;
        let mut told = Instant::now();
        loop {
            applied.borrow_and_update();
            let from = self.position;
            let page = self.watchers.machine.history_after(from);
            let page = page.map_err(|oldest| Some(too_old(oldest)))?;
            for noted in page.entries {
                let changes = changes(&noted, &self.request).map_err(|error| {
                    tracing::error!(%error, "a change cannot be read");
                    Some(MetadError::Unreachable(error.to_string()).into())
                })?;
                self.position = noted.index;
                if !changes.is_empty() {
                    let index = noted.index;
                    self.send(WatchEvent::Changes { index, changes }).await?;
                    told = Instant::now();
                }
            }
            self.position = page.through;
            if told.elapsed() >= limits.progress {
                self.watchers.check_fresh().map_err(Some)?;
                self.send(WatchEvent::Progress(self.position)).await?;
                told = Instant::now();
            }
            if self.position != from {
                continue;
            }
            tokio::select! {
                changed = applied.changed() => changed.map_err(|_| None)?,
                () = sleep_until(told + limits.progress) => {}
                () = self.sender.closed() => return Err(None),
                () = stop.cancelled() => return Err(None),
            }
        }
    }

    async fn send(&self, event: WatchEvent) -> Result<(), End> {
        let Watchers { limits, stop, .. } = &*self.watchers;
        tokio::select! {
            sent = timeout(limits.stall, self.sender.send(event)) => match sent {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) => Err(None),
                Err(_) => {
                    let text = format!("the watch was cut off: nothing was taken for {:?}; resume it", limits.stall);
                    Err(Some(busy(text)))
                }
            },
            () = stop.cancelled() => Err(None),
        }
    }
}

/// What of an entry is asked for.
fn changes(noted: &Noted, request: &WatchRequest) -> Result<Vec<Change>, KvError> {
    let mut found = Vec::new();
    for (key, value) in &noted.rows {
        if let Some(change) = change(key, value.as_deref(), request)? {
            found.push(change);
        }
    }
    Ok(found)
}

fn change(
    key: &[u8],
    value: Option<&[u8]>,
    request: &WatchRequest,
) -> Result<Option<Change>, KvError> {
    const RECORD: u8 = Table::Record as u8;
    const VOLUME: u8 = Table::Volume as u8;
    const BACKEND: u8 = Table::Backend as u8;
    let of_volume = || -> Result<Option<VolumeId>, KvError> {
        let id = VolumeId::from_bytes(row::array_at(key, 1)?);
        Ok(Some(id).filter(|id| request.volume.is_none_or(|wanted| wanted == *id)))
    };
    Ok(match (key.first(), value) {
        (Some(&RECORD), value) if request.records => match (of_volume()?, value) {
            (None, _) => None,
            (Some(_), Some(value)) => Some(Change::Record(Box::new(row::decode(key, value)?))),
            (Some(volume), None) => Some(Change::RecordRemoved {
                volume,
                datafile: DatafileId(row::number_at(key, 17)?),
            }),
        },
        (Some(&VOLUME), value) if request.volumes => match (of_volume()?, value) {
            (None, _) => None,
            (Some(_), Some(value)) => Some(Change::Volume(Box::new(row::decode(key, value)?))),
            (Some(volume), None) => Some(Change::VolumeRemoved(volume)),
        },
        (Some(&BACKEND), Some(value)) if request.backends => {
            Some(Change::Backend(row::decode(key, value)?))
        }
        (Some(&(RECORD | VOLUME | BACKEND)), _) => None,
        // The only other row that is noted.
        (_, Some(value)) if request.settings => Some(Change::Settings(row::decode(key, value)?)),
        _ => None,
    })
}

#[cfg(test)]
#[path = "watch/tests.rs"]
mod tests;
