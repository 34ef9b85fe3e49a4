//! What datafiles there are locally, how far each has come, and what is at risk.

use super::layout::{DatafileName, Stage};
use parking_lot::RwLock;
use qsfs_zstor::id::{DatafileId, Stream};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One sealed or pushed local datafile.
#[derive(Debug)]
pub struct LocalFile {
    /// Name, with the stage.
    pub name: DatafileName,
    /// Bytes of contents.
    pub bytes: u64,
    /// When its first byte was written, ms since the Unix epoch.
    pub first_byte_ms: u64,
    /// Meta only: data up to here must be committed first.
    pub barrier: DatafileId,
    /// Meta only: a complete checkpoint.
    pub checkpoint: bool,
    /// Meta only: dead once this is the head.
    pub dead: Vec<DatafileId>,
    pub(super) last_used: AtomicU64,
}

impl LocalFile {
    fn at_stage(&self, stage: Stage) -> Self {
        Self {
            name: DatafileName { stage, ..self.name },
            bytes: self.bytes,
            first_byte_ms: self.first_byte_ms,
            barrier: self.barrier,
            checkpoint: self.checkpoint,
            dead: Vec::new(),
            last_used: AtomicU64::new(self.last_used()),
        }
    }

    /// Logical time of the last read.
    pub fn last_used(&self) -> u64 {
        self.last_used.load(Ordering::Relaxed)
    }
}

/// Acknowledged bytes that no committed datafile holds yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AtRisk {
    /// Bytes of both streams.
    pub bytes: u64,
    /// When the oldest of them was written, ms since the Unix epoch; `None` when nothing is at risk.
    pub oldest_ms: Option<u64>,
}

impl AtRisk {
    /// Takes one more file into account.
    pub fn add(&mut self, bytes: u64, first_byte_ms: u64) {
        self.bytes += bytes;
        self.oldest_ms = Some(
            self.oldest_ms
                .map_or(first_byte_ms, |oldest| oldest.min(first_byte_ms)),
        );
    }
}

/// Sealed and pushed datafiles, by id.
#[derive(Debug, Default)]
pub struct Catalog {
    files: RwLock<BTreeMap<DatafileId, Arc<LocalFile>>>,
    clock: AtomicU64,
}

impl Catalog {
    /// Notes a file.
    pub fn insert(&self, file: LocalFile) -> Arc<LocalFile> {
        let file = Arc::new(file);
        self.touch(&file);
        self.files.write().insert(file.name.id, Arc::clone(&file));
        file
    }

    /// The file, if it is local.
    pub fn get(&self, id: DatafileId) -> Option<Arc<LocalFile>> {
        self.files.read().get(&id).cloned()
    }

    /// Forgets a file.
    pub fn remove(&self, id: DatafileId) -> Option<Arc<LocalFile>> {
        self.files.write().remove(&id)
    }

    /// Notes that it is committed.
    pub fn set_pushed(&self, id: DatafileId) {
        if let Some(file) = self.files.write().get_mut(&id) {
            *file = Arc::new(file.at_stage(Stage::Pushed));
        }
    }

    /// Notes a use.
    pub fn touch(&self, file: &LocalFile) {
        file.last_used.store(
            self.clock.fetch_add(1, Ordering::Relaxed),
            Ordering::Relaxed,
        );
    }

    /// All, by id.
    pub fn all(&self) -> Vec<Arc<LocalFile>> {
        self.files.read().values().cloned().collect()
    }

    /// Those of one stream at one stage, by id.
    pub fn at(&self, stream: Stream, stage: Stage) -> Vec<Arc<LocalFile>> {
        let wanted =
            |file: &&Arc<LocalFile>| file.name.stream == stream && file.name.stage == stage;
        self.files.read().values().filter(wanted).cloned().collect()
    }

    /// Bytes of sealed files that are not committed.
    pub fn at_risk(&self) -> AtRisk {
        let mut risk = AtRisk::default();
        for file in self
            .files
            .read()
            .values()
            .filter(|file| file.name.stage == Stage::Sealed)
        {
            risk.add(file.bytes, file.first_byte_ms);
        }
        risk
    }

    /// Bytes of all.
    pub fn bytes(&self) -> u64 {
        self.files.read().values().map(|file| file.bytes).sum()
    }
}
