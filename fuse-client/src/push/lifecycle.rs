//! The way of a sealed datafile to its commit: the pure core of push.
//!
//! ```text
//! sealed -> encoding -> storing -> stored -> committing -> committed
//!    ^__________|__________|                    |  ^
//!    (backoff, then a new attempt)              v  |
//!                                             asking   (the answer was lost: is the record there?)
//! ```
//!
//! Invariants:
//! - a meta datafile is committed only after every data datafile up to its barrier, and in the order of ids;
//! - the head moves with the commit of a meta datafile and never goes back;
//! - at most `transfers_max` transfers run, at most one commit is in flight;
//! - a datafile leaves the queue only by being committed (or when the writer is fenced).
//!
//! The queue is fed from the file suffixes of the state directory, so it survives a restart.

use qsfs_proto::api::Head;
use qsfs_zstor::id::{DatafileId, Stream};
use std::collections::{BTreeMap, BTreeSet};

/// Most records in one commit.
pub const COMMIT_RECORDS_MAX: usize = 64;
/// First wait after a failed attempt; doubles with each further one.
pub const BACKOFF_FIRST_MS: u64 = 250;
/// Longest wait between attempts.
pub const BACKOFF_MAX_MS: u64 = 15_000;

/// A sealed datafile that is to be committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Which.
    pub id: DatafileId,
    /// Stream.
    pub stream: Stream,
    /// Meta only: a complete checkpoint, recovery can begin here.
    pub checkpoint: bool,
    /// Meta only: data datafiles up to this id must be committed first.
    pub barrier: DatafileId,
    /// Meta only: committed data datafiles that nothing names any more once this is the head.
    pub dead: Vec<DatafileId>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A datafile was sealed (or found sealed at start).
    Sealed(Sealed),
    /// The object is made, its shards are being stored.
    Encoded(DatafileId),
    /// All `k + m` shards are durable.
    Stored(DatafileId),
    /// The attempt failed; another one follows.
    TransferFailed(DatafileId),
    /// The commit was accepted.
    Committed(Vec<DatafileId>),
    /// The commit was certainly not applied; it is tried again.
    CommitFailed(Vec<DatafileId>),
    /// The commit was refused for what it says (a backend left meanwhile): other shards are made.
    CommitRefused(Vec<DatafileId>),
    /// The answer to the commit was lost.
    CommitUnknown(Vec<DatafileId>),
    /// Answer to [`Action::Ask`]: those of the batch that are committed.
    Answered {
        /// The batch that was asked about.
        batch: Vec<DatafileId>,
        /// Those that metad has, of our attempt.
        present: BTreeSet<DatafileId>,
    },
    /// It could not be asked either.
    AskFailed(Vec<DatafileId>),
    /// Time went by.
    Tick,
    /// Somebody waits: retry now.
    Hurry,
    /// Another writer took over: nothing is started any more.
    Fenced,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Encode, place and store this datafile under a fresh salt.
    Transfer(DatafileId),
    /// Commit these records, and the head with them.
    Commit {
        /// In order of ids.
        batch: Vec<DatafileId>,
        /// New head when a meta datafile is among them.
        head: Option<Head>,
    },
    /// Ask metad which of these are committed.
    Ask(Vec<DatafileId>),
    /// They are committed: note it locally.
    Committed(Vec<DatafileId>),
    /// The head that named these is gone: release them.
    Release {
        /// Data datafiles that are dead.
        dead: Vec<DatafileId>,
        /// Meta datafiles before this are no longer needed.
        meta_before: DatafileId,
    },
    /// Come back with [`Event::Tick`] at this time at the latest.
    WakeAt(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Sealed { not_before_ms: u64 },
    Encoding,
    Storing,
    Stored { not_before_ms: u64 },
    Committing,
    Asking { not_before_ms: u64, asked: bool },
}

#[derive(Debug, Clone)]
struct Entry {
    file: Sealed,
    phase: Phase,
    failures: u32,
}

/// The queue of one writer.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    entries: BTreeMap<DatafileId, Entry>,
    head: Head,
    transfers_max: usize,
    fenced: bool,
}

impl Lifecycle {
    /// An empty queue behind the committed `head`.
    pub const fn new(head: Head, transfers_max: usize) -> Self {
        Self {
            entries: BTreeMap::new(),
            head,
            transfers_max,
            fenced: false,
        }
    }

    /// The head as last committed by this writer.
    pub const fn head(&self) -> Head {
        self.head
    }

    /// Datafiles that are not committed yet.
    pub fn waiting(&self) -> usize {
        self.entries.len()
    }

    /// Datafiles that are not committed yet.
    pub fn ids(&self) -> impl Iterator<Item = DatafileId> + '_ {
        self.entries.keys().copied()
    }

    /// True while one of `ids` is not committed.
    pub fn any_waiting(&self, up_to: DatafileId) -> bool {
        self.entries.range(..=up_to).next().is_some()
    }

    /// Takes an event in, says what to do.
    pub fn step(&mut self, now_ms: u64, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Sealed(file) => {
                let phase = Phase::Sealed { not_before_ms: 0 };
                self.entries.entry(file.id).or_insert(Entry {
                    file,
                    phase,
                    failures: 0,
                });
            }
            Event::Encoded(id) => self.set(&[id], Phase::Storing),
            Event::Stored(id) => self.set(&[id], Phase::Stored { not_before_ms: 0 }),
            Event::TransferFailed(id) => self.failed(now_ms, &[id], |not_before_ms| {
                Phase::Sealed { not_before_ms }
            }),
            Event::Committed(batch) => self.committed(&batch, &mut actions),
            Event::CommitFailed(batch) => {
                self.failed(now_ms, &batch, |not_before_ms| Phase::Stored {
                    not_before_ms,
                });
            }
            Event::CommitRefused(batch) => {
                self.failed(now_ms, &batch, |not_before_ms| Phase::Sealed {
                    not_before_ms,
                });
            }
            Event::CommitUnknown(batch) | Event::AskFailed(batch) => {
                let asking = |not_before_ms| Phase::Asking {
                    not_before_ms,
                    asked: false,
                };
                self.failed(now_ms, &batch, asking);
            }
            Event::Answered { batch, present } => {
                let (there, absent): (Vec<_>, Vec<_>) =
                    batch.into_iter().partition(|id| present.contains(id));
                self.set(&absent, Phase::Stored { not_before_ms: 0 });
                self.committed(&there, &mut actions);
            }
            Event::Tick => {}
            Event::Hurry => self.hurry(),
            Event::Fenced => self.fenced = true,
        }
        if !self.fenced {
            self.start_transfers(now_ms, &mut actions);
            self.ask_or_commit(now_ms, &mut actions);
            actions.extend(self.next_wake(now_ms).map(Action::WakeAt));
        }
        actions
    }

    fn set(&mut self, ids: &[DatafileId], phase: Phase) {
        for id in ids {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.phase = phase;
            }
        }
    }

    fn failed(&mut self, now_ms: u64, ids: &[DatafileId], phase: impl Fn(u64) -> Phase) {
        for id in ids {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.phase = phase(now_ms + backoff_ms(entry.failures));
                entry.failures = entry.failures.saturating_add(1);
            }
        }
    }

    fn hurry(&mut self) {
        for entry in self.entries.values_mut() {
            match &mut entry.phase {
                Phase::Sealed { not_before_ms }
                | Phase::Stored { not_before_ms }
                | Phase::Asking {
                    not_before_ms,
                    asked: false,
                } => *not_before_ms = 0,
                Phase::Encoding | Phase::Storing | Phase::Committing | Phase::Asking { .. } => {}
            }
        }
    }

    fn committed(&mut self, batch: &[DatafileId], actions: &mut Vec<Action>) {
        let before = self.head;
        let mut dead = Vec::new();
        let mut done = Vec::new();
        for id in batch {
            let Some(entry) = self.entries.remove(id) else {
                continue;
            };
            done.push(*id);
            if entry.file.stream == Stream::Meta {
                self.head = self.head_after(&entry.file);
                dead.extend(entry.file.dead);
            }
        }
        if !done.is_empty() {
            actions.push(Action::Committed(done));
        }
        if !dead.is_empty() || self.head.recover_from != before.recover_from {
            actions.push(Action::Release {
                dead,
                meta_before: self.head.recover_from,
            });
        }
    }

    fn head_after(&self, meta: &Sealed) -> Head {
        let first = meta.checkpoint || self.head.recover_from == DatafileId(0);
        Head {
            datafile: self.head.datafile.max(meta.id),
            recover_from: if first {
                meta.id
            } else {
                self.head.recover_from
            },
        }
    }

    fn start_transfers(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let running = |entry: &&Entry| matches!(entry.phase, Phase::Encoding | Phase::Storing);
        let free = self
            .transfers_max
            .saturating_sub(self.entries.values().filter(running).count());
        let due = |entry: &&mut Entry| matches!(entry.phase, Phase::Sealed { not_before_ms } if not_before_ms <= now_ms);
        for entry in self.entries.values_mut().filter(due).take(free) {
            entry.phase = Phase::Encoding;
            actions.push(Action::Transfer(entry.file.id));
        }
    }

    fn ask_or_commit(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let busy = |entry: &Entry| {
            matches!(
                entry.phase,
                Phase::Committing | Phase::Asking { asked: true, .. }
            )
        };
        if self.entries.values().any(busy) {
            return;
        }
        let unknown: Vec<&mut Entry> = self
            .entries
            .values_mut()
            .filter(|entry| matches!(entry.phase, Phase::Asking { .. }))
            .collect();
        if !unknown.is_empty() {
            let due = |entry: &&mut Entry| matches!(entry.phase, Phase::Asking { not_before_ms, .. } if not_before_ms <= now_ms);
            if unknown.iter().all(due) {
                let mut batch = Vec::new();
                for entry in unknown {
                    entry.phase = Phase::Asking {
                        not_before_ms: 0,
                        asked: true,
                    };
                    batch.push(entry.file.id);
                }
                actions.push(Action::Ask(batch));
            }
            return;
        }
        if let Some(commit) = self.next_commit(now_ms) {
            actions.push(commit);
        }
    }

    /// Data that is stored goes first; else the oldest meta datafile if all data it names is committed.
    fn next_commit(&mut self, now_ms: u64) -> Option<Action> {
        let ready = |entry: &Entry| matches!(entry.phase, Phase::Stored { not_before_ms } if not_before_ms <= now_ms);
        let data: Vec<DatafileId> = self
            .entries
            .values()
            .filter(|entry| entry.file.stream == Stream::Data && ready(entry))
            .map(|entry| entry.file.id)
            .take(COMMIT_RECORDS_MAX)
            .collect();
        if !data.is_empty() {
            self.set(&data, Phase::Committing);
            return Some(Action::Commit {
                batch: data,
                head: None,
            });
        }
        let meta = self
            .entries
            .values()
            .find(|entry| entry.file.stream == Stream::Meta)?;
        let named = |entry: &Entry| entry.file.stream == Stream::Data;
        let waits = self
            .entries
            .range(..=meta.file.barrier)
            .any(|(_, entry)| named(entry));
        if waits || !ready(meta) {
            return None;
        }
        let (id, head) = (meta.file.id, self.head_after(&meta.file));
        self.set(&[id], Phase::Committing);
        Some(Action::Commit {
            batch: vec![id],
            head: Some(head),
        })
    }

    fn next_wake(&self, now_ms: u64) -> Option<u64> {
        self.entries
            .values()
            .filter_map(|entry| match entry.phase {
                Phase::Sealed { not_before_ms }
                | Phase::Stored { not_before_ms }
                | Phase::Asking {
                    not_before_ms,
                    asked: false,
                } => Some(not_before_ms),
                Phase::Encoding | Phase::Storing | Phase::Committing | Phase::Asking { .. } => None,
            })
            .filter(|at| *at > now_ms)
            .min()
    }
}

/// Wait after the given number of earlier failures.
fn backoff_ms(failures: u32) -> u64 {
    BACKOFF_FIRST_MS
        .saturating_mul(1 << failures.min(10))
        .min(BACKOFF_MAX_MS)
}

#[cfg(test)]
#[path = "lifecycle_tests.rs"]
mod tests;
