//! openraft's view of the log, and why a leader may replicate what it has not made durable.
//!
//! openraft waits for an append before it replicates, so that a commit would cost the leader's fdatasync and then a follower's. A leader
//! therefore reports an append when it is *written*, and the [`Watermark`] says up to where the log is *durable*:
//!
//! ```text
//! leader    write --> report --> replicate --> a majority has written --> openraft: "committed" --> gate --> apply, answer
//!             \----> fdatasync -------------------------------------> watermark ----------------/
//! follower  write --> fdatasync --> report --> acknowledge
//! ```
//!
//! What openraft takes for committed on a leader is committed once the watermark covers it: then this node and the followers that
//! acknowledged are a majority that holds it durably. Before that nothing of it is to be seen:
//!
//! 1. *Apply* waits for the watermark ([`super::gate`]), hence so do answers, linearizable reads, snapshots and what is purged.
//! 2. *Followers* are told at most the watermark as committed ([`LogStore::hold_back`]); they never apply more than the leader might.
//! 3. *Membership* entries are reported when durable, as a follower's are: the second step of a change needs the first one committed.
//!
//! An undurable tail exists only while its writer leads, and only in the term in which it wrote it:
//!
//! 4. *Stepping down and voting* begin with `save_vote`, which first makes the whole log durable. What a follower acknowledges, also of
//!    entries that it holds from its own days as a leader, is durable, and so is what it claims to hold when it votes.
//! 5. *A restart ends the term.* openraft lets a node whose vote says that it leads go on doing so at once. It may have lost its tail,
//!    while a follower holds it: in the same term it would give the same ids to other entries. So its own vote is given back to it as
//!    not committed; it waits to be elected again, in a higher term. Opening the log makes durable what it finds.
//!
//! A leader that loses its tail thus loses only what nobody has seen; while it runs, its memory and the followers' disks hold the entry, and
//! any new leader needs a vote of that majority, which (4) makes durable first. A failed sync is fatal: the watermark stands still,
//! apply fails, and the node stops. A disk that hangs must not make a leader that commits nothing for ever: after [`STALLED`] it
//! sends no more heartbeats ([`Silent`]), and the others elect one of them.

use super::LogError;
use super::segments::{Amount, Segments};
use super::syncer::Syncer;
use super::watermark::Watermark;
use crate::durable;
use crate::ground::{self, Ground, Work};
use crate::raft::{LogEntry, LogId, StorageError, TypeConfig, Vote};
use openraft::AnyError;
use openraft::raft::AppendEntriesRequest;
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{
    CommittedLeaderId, EntryPayload, LogState, OptionalSend, RaftLogId, RaftLogReader,
    StorageIOError,
};
use parking_lot::Mutex;
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// A leader whose log has not become durable for so long falls silent.
pub const STALLED: Duration = Duration::from_millis(500);

/// Why a leader says nothing.
#[derive(Debug, thiserror::Error)]
#[error("the Raft log of this node does not become durable: its disk hangs")]
pub struct Silent;

/// Encoded bytes of one batch of entries handed to replication.
pub const READ_BYTES_MAX: u64 = 2 << 20;

/// The log, shared by the consensus module and its replication readers.
#[derive(Debug, Clone)]
pub struct LogStore {
    segments: Arc<Mutex<Segments>>,
    syncer: Syncer,
    work: Arc<dyn Work>,
    watermark: Watermark,
    /// The node that leads when this is its committed vote. Without one nobody does, and every append is durable when reported.
    own: Option<u64>,
    /// The vote as saved by this process.
    vote: Arc<Mutex<Option<Vote>>>,
}

impl LogStore {
    /// Opens or creates the log of a directory.
    pub fn open(ground: &Ground, dir: &Path) -> Result<Self, LogError> {
        let media = Arc::clone(&ground.media);
        let segments = Segments::open(media, dir, ground.sizes.segment_bytes, ground.program)?;
        let (_, last) = segments.bounds();
        let watermark = Watermark::new(last.map_or(0, |last| last.index + 1));
        let started = Syncer::start(watermark.clone(), &ground.work);
        let syncer = started.map_err(|source| LogError::Io {
            step: "start the syncing thread of",
            path: dir.to_owned(),
            source,
        })?;
        Ok(Self {
            segments: Arc::new(Mutex::new(segments)),
            syncer,
            work: Arc::clone(&ground.work),
            watermark,
            own: None,
            vote: Arc::default(),
        })
    }

    /// The log of this node, which may lead.
    #[must_use]
    pub fn of_node(self, own: u64) -> Self {
        Self {
            own: Some(own),
            ..self
        }
    }

    /// Up to where it is durable.
    pub fn watermark(&self) -> &Watermark {
        &self.watermark
    }

    /// Takes out of what a leader is about to send what nobody may see yet.
    ///
    /// # Errors
    /// [`Silent`] when nothing may be sent.
    pub fn hold_back(&self, request: &mut AppendEntriesRequest<TypeConfig>) -> Result<(), Silent> {
        if self.syncer.lag() > STALLED {
            return Err(Silent);
        }
        let end = self.watermark.end();
        if let Some(committed) = request.leader_commit
            && committed.index >= end
        {
            let newest = end.checked_sub(1);
            request.leader_commit = newest.and_then(|index| self.segments.lock().id_at(index));
        }
        Ok(())
    }

    /// Takes back what a leader says is committed, as far as more than `most` lies between the applied entry and it: openraft reads
    /// all of that into memory, and queues it without a limit. The leader says it again with its next message.
    ///
    /// Up to the entry before those of a request this log is the leader's if it holds that entry itself; what stands there before
    /// something committed is committed as well. Of what lies behind that entry nothing is known: it may be of an old term. So a
    /// request is changed only if it is too much already without its own entries.
    pub fn hold_commit(
        &self,
        request: &mut AppendEntriesRequest<TypeConfig>,
        applied: u64,
        most: Amount,
    ) {
        let (Some(committed), Some(before)) = (request.leader_commit, request.prev_log_id) else {
            return;
        };
        let segments = self.segments.lock();
        let known = committed.index.min(before.index);
        if segments.amount(Some(applied), known).within(most)
            || segments.id_at(before.index) != Some(before)
        {
            return;
        }
        if let Some(fitting) = segments.fitting(applied, most)
            && fitting < known
        {
            request.leader_commit = segments.id_at(fitting);
        }
    }

    /// Waits until all that was written is durable.
    async fn settle(&self) -> Result<(), LogError> {
        let (_, last) = self.bounds();
        let end = last.map_or(0, |last| last.index + 1);
        self.watermark.wait(end).await
    }

    /// May these be reported before they are durable? Only what this node appends as the leader that it is.
    fn leads_with(&self, entries: &[LogEntry]) -> bool {
        let vote = *self.vote.lock();
        let (Some(vote), Some(own)) = (vote, self.own) else {
            return false;
        };
        let term = CommittedLeaderId::new(vote.leader_id().term, own);
        vote.is_committed()
            && vote.leader_id().voted_for() == Some(own)
            && entries.iter().all(|entry| {
                *entry.get_log_id().committed_leader_id() == term
                    && !matches!(entry.payload, EntryPayload::Membership(_))
            })
    }

    /// Some entries from an index on; none at the end.
    pub fn entries(&self, from: u64) -> Result<Vec<LogEntry>, LogError> {
        self.segments.lock().read(from, u64::MAX, READ_BYTES_MAX)
    }

    /// Is the vote readable, and there if this node has taken part? Read at once rather than in the middle of an election.
    pub fn check_vote(&self, took_part: bool) -> Result<(), LogError> {
        let segments = self.segments.lock();
        match segments.load_vote()? {
            None if took_part => Err(LogError::Gone {
                path: segments.vote_path(),
            }),
            _ => Ok(()),
        }
    }

    /// Voids what this log holds in the place of an applied entry and behind it: a crash took back that it was voided before the state
    /// came from a snapshot. What is applied was agreed on, so nothing else was in its place.
    pub fn void_other_than(&self, applied: LogId) -> Result<(), LogError> {
        let mut segments = self.segments.lock();
        let other = segments
            .id_at(applied.index)
            .filter(|held| *held != applied);
        if let Some(held) = other {
            tracing::warn!(%held, %applied, "entries that were not agreed on are voided once more");
            segments.truncate(applied.index)?;
            self.watermark.cut(applied.index);
        }
        Ok(())
    }

    /// How much lies behind one index, up to another.
    pub fn amount(&self, behind: Option<u64>, upto: u64) -> Amount {
        self.segments.lock().amount(behind, upto)
    }

    /// The newest index up to which all may be purged if so much of what stands up to `upto` is kept.
    pub fn purgeable(&self, upto: u64, kept: Amount) -> Option<u64> {
        self.segments.lock().purgeable(upto, kept)
    }

    /// Last purged and last present id.
    pub fn bounds(&self) -> (Option<LogId>, Option<LogId>) {
        self.segments.lock().bounds()
    }
}

fn write_failed(error: &LogError) -> StorageError {
    StorageIOError::write_logs(AnyError::error(error.to_string())).into()
}

fn read_failed(error: &LogError) -> StorageError {
    StorageIOError::read_logs(AnyError::error(error.to_string())).into()
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let from = match range.start_bound() {
        Bound::Included(from) => *from,
        Bound::Excluded(before) => before + 1,
        Bound::Unbounded => 0,
    };
    let until = match range.end_bound() {
        Bound::Included(last) => last + 1,
        Bound::Excluded(until) => *until,
        Bound::Unbounded => u64::MAX,
    };
    (from, until)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<LogEntry>, StorageError> {
        let (from, until) = bounds(&range);
        let segments = self.segments.lock();
        segments
            .read(from, until, u64::MAX)
            .map_err(|error| read_failed(&error))
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<LogEntry>, StorageError> {
        let segments = self.segments.lock();
        segments
            .read(start, end, READ_BYTES_MAX)
            .map_err(|error| read_failed(&error))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError> {
        let (last_purged_log_id, last_log_id) = self.bounds();
        Ok(LogState {
            last_purged_log_id,
            last_log_id,
        })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        let failed = |text: String| StorageIOError::write_vote(AnyError::error(text)).into();
        self.settle()
            .await
            .map_err(|error| failed(error.to_string()))?;
        let (media, path) = {
            let segments = self.segments.lock();
            (segments.media(), segments.vote_path())
        };
        let vote = *vote;
        let stored = ground::blocking(&self.work, move || durable::store(&*media, &path, &vote));
        match stored.await {
            Ok(Ok(())) => {
                *self.vote.lock() = Some(vote);
                Ok(())
            }
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        let found = self.segments.lock().load_vote();
        let failed = |error: LogError| {
            StorageError::from(StorageIOError::read_vote(AnyError::error(
                error.to_string(),
            )))
        };
        let mut vote = found.map_err(failed)?;
        if let Some(vote) = &mut vote
            && self.own.is_some()
            && vote.leader_id().voted_for() == self.own
        {
            vote.committed = false;
        }
        Ok(vote)
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: LogFlushed<TypeConfig>,
    ) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<_> = entries.into_iter().collect();
        let Some(last) = entries.last() else {
            callback.log_io_completed(Ok(()));
            return Ok(());
        };
        let end = last.get_log_id().index + 1;
        let leads = self.leads_with(&entries);
        let appended = self.segments.lock().append(entries);
        let handle = appended.map_err(|error| write_failed(&error))?;
        if leads {
            self.syncer.flush_behind(handle, end, callback);
        } else {
            self.syncer.flush(handle, end, callback);
        }
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        // No sync of what is void now may be under way: it would raise the mark over what is written next.
        self.settle().await.map_err(|error| write_failed(&error))?;
        let truncated = self.segments.lock().truncate(log_id.index);
        self.watermark.cut(log_id.index);
        truncated.map_err(|error| write_failed(&error))
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let segments = Arc::clone(&self.segments);
        let purged = ground::blocking(&self.work, move || segments.lock().purge(log_id));
        match purged.await {
            Ok(result) => result.map_err(|error| write_failed(&error))?,
            Err(error) => {
                return Err(StorageIOError::write_logs(AnyError::error(error.to_string())).into());
            }
        }
        // A snapshot may reach beyond what the log held.
        self.watermark.reach(log_id.index + 1);
        Ok(())
    }
}
