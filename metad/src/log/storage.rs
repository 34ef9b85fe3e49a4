//! openraft's view of the log.

use super::LogError;
use super::segments::Segments;
use super::syncer::Syncer;
use crate::durable;
use crate::ground::{self, Ground, Work};
use crate::raft::{LogEntry, LogId, StorageError, TypeConfig, Vote};
use openraft::AnyError;
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader, StorageIOError};
use parking_lot::Mutex;
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;

/// Encoded bytes of one batch of entries handed to replication.
pub const READ_BYTES_MAX: u64 = 2 << 20;

/// The log, shared by the consensus module and its replication readers.
#[derive(Debug, Clone)]
pub struct LogStore {
    segments: Arc<Mutex<Segments>>,
    syncer: Syncer,
    work: Arc<dyn Work>,
}

impl LogStore {
    /// Opens or creates the log of a directory.
    pub fn open(ground: &Ground, dir: &Path) -> Result<Self, LogError> {
        let media = Arc::clone(&ground.media);
        let segments = Segments::open(media, dir, ground.sizes.segment_bytes)?;
        let syncer = Syncer::start(&ground.work).map_err(|source| LogError::Io {
            step: "start the syncing thread of",
            path: dir.to_owned(),
            source,
        })?;
        Ok(Self {
            segments: Arc::new(Mutex::new(segments)),
            syncer,
            work: Arc::clone(&ground.work),
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

    /// Encoded bytes appended since it was opened.
    pub fn appended_bytes(&self) -> u64 {
        self.segments.lock().appended_bytes()
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
        let (media, path) = {
            let segments = self.segments.lock();
            (segments.media(), segments.vote_path())
        };
        let vote = *vote;
        let stored = ground::blocking(&self.work, move || durable::store(&*media, &path, &vote));
        let failed = |text: String| StorageIOError::write_vote(AnyError::error(text)).into();
        match stored.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        let segments = self.segments.lock();
        segments
            .load_vote()
            .map_err(|error| StorageIOError::read_vote(AnyError::error(error.to_string())).into())
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
        let appended = self.segments.lock().append(entries);
        let handle = appended.map_err(|error| write_failed(&error))?;
        self.syncer
            .flush(handle, callback)
            .map_err(|error| write_failed(&error))
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let truncated = self.segments.lock().truncate(log_id.index);
        truncated.map_err(|error| write_failed(&error))
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let segments = Arc::clone(&self.segments);
        let purged = ground::blocking(&self.work, move || segments.lock().purge(log_id));
        match purged.await {
            Ok(result) => result.map_err(|error| write_failed(&error)),
            Err(error) => {
                Err(StorageIOError::write_logs(AnyError::error(error.to_string())).into())
            }
        }
    }
}
