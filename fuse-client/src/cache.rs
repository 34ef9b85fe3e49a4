//! The cache: committed datafiles that are still on the local disk, dropped when room is needed.
//!
//! The [`eviction`] core decides; this carries it out. A datafile that was dropped is read from its shards.

pub mod eviction;

use crate::store::LocalStore;
use crate::store::layout::Stage;
use eviction::{Action, Event, Eviction, LocalFile};
use parking_lot::Mutex;
use qsfs_zstor::id::{DatafileId, Stream};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Cache limit unless the mount says otherwise ...
pub const DEFAULT_LIMIT_BYTES: u64 = 10 << 30;
/// ... but not more than this share of the disk.
pub const DISK_SHARE_PERCENT: u64 = 80;
/// When a writer meets a disk with less room than this, everything that may go goes.
const DISK_RESERVE_BYTES: u64 = 256 << 20;

/// What is local.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CacheStatus {
    /// Limit.
    pub limit_bytes: u64,
    /// Bytes of all local datafiles.
    pub local_bytes: u64,
    /// Of them, those that may be dropped.
    pub evictable_bytes: u64,
    /// Datafiles that may be dropped.
    pub evictable_datafiles: u64,
    /// Bytes of data that is not committed.
    pub uncommitted_bytes: u64,
    /// Bytes of the meta stream, kept for a quick start.
    pub meta_bytes: u64,
    /// Damaged local copies dropped because shards replace them.
    pub damaged_dropped: u64,
}

/// What `evict --all` did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Evicted {
    /// Datafiles dropped.
    pub datafiles: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Files whose pages the kernel dropped.
    pub kernel_files: u64,
    /// What stayed, and why; one line each.
    pub kept: Vec<String>,
}

/// See the module.
#[derive(Debug)]
pub struct Cache {
    store: Arc<LocalStore>,
    core: Mutex<Eviction>,
}

impl Cache {
    /// A cache with this limit; `None`: the default.
    pub fn new(store: Arc<LocalStore>, limit_bytes: Option<u64>) -> Self {
        let limit_bytes = limit_bytes.unwrap_or_else(|| {
            let space = store.media().space(store.dir().root());
            space.map_or(DEFAULT_LIMIT_BYTES, |space| {
                DEFAULT_LIMIT_BYTES.min(space.total_bytes / 100 * DISK_SHARE_PERCENT)
            })
        });
        Self {
            store,
            core: Mutex::new(Eviction::new(limit_bytes)),
        }
    }

    fn files(&self) -> Vec<LocalFile> {
        let evictable = |file: &crate::store::catalog::LocalFile| {
            file.name.stream == Stream::Data && file.name.stage == Stage::Pushed
        };
        let closed = self.store.catalog().all();
        let mut files: Vec<LocalFile> = closed
            .iter()
            .map(|file| LocalFile {
                id: file.name.id,
                bytes: file.bytes,
                evictable: evictable(file),
                last_used: file.last_used(),
            })
            .collect();
        // What is open counts, and may not go.
        let (id, bytes) = (DatafileId(u64::MAX), self.store.open_bytes());
        files.push(LocalFile {
            id,
            bytes,
            evictable: false,
            last_used: u64::MAX,
        });
        files
    }

    /// Looks whether something must go, or writers must wait.
    pub fn tend(&self) {
        let files = self.files();
        let actions = self.core.lock().step(Event::Files(files));
        self.carry_out(actions);
    }

    /// A writer found no room.
    pub fn make_room(&self) {
        let space = self.store.media().space(self.store.dir().root());
        if space.is_ok_and(|space| space.free_bytes < DISK_RESERVE_BYTES) {
            let files = self.files();
            let actions = self.core.lock().step(Event::EvictAll(files));
            self.carry_out(actions);
        } else {
            self.tend();
        }
    }

    /// Drops all that may go and says what stayed.
    pub fn evict_all(&self) -> Evicted {
        let files = self.files();
        let actions = self.core.lock().step(Event::EvictAll(files));
        let (datafiles, bytes) = self.carry_out(actions);
        let status = self.status();
        let mut kept = Vec::new();
        if status.uncommitted_bytes > 0 {
            kept.push(format!(
                "{} bytes of data are not committed yet: run `qsfs sync` first",
                status.uncommitted_bytes
            ));
        }
        if status.meta_bytes > 0 {
            kept.push(format!(
                "{} bytes of journal and checkpoint stay for a quick start",
                status.meta_bytes
            ));
        }
        Evicted {
            datafiles,
            bytes,
            kernel_files: 0,
            kept,
        }
    }

    fn carry_out(&self, actions: Vec<Action>) -> (u64, u64) {
        let (mut datafiles, mut bytes) = (0, 0);
        for action in actions {
            match action {
                Action::Drop(ids) => {
                    for id in ids {
                        let file = self.store.catalog().get(id);
                        // It may have been used or dropped meanwhile; what is not committed never goes.
                        let Some(file) = file.filter(|file| file.name.stage == Stage::Pushed)
                        else {
                            continue;
                        };
                        datafiles += 1;
                        bytes += file.bytes;
                        self.store.drop_local(id);
                    }
                }
                Action::HoldWriters { bytes } => {
                    let limit = self.core.lock().limit_bytes();
                    self.store.hold_writers(Some(format!(
                        "{bytes} local bytes cannot be dropped because they are not committed, and the cache limit is \
                         {limit} bytes"
                    )));
                }
                Action::ReleaseWriters => self.store.hold_writers(None),
            }
        }
        (datafiles, bytes)
    }

    /// What is local now.
    pub fn status(&self) -> CacheStatus {
        let mut status = CacheStatus {
            limit_bytes: self.core.lock().limit_bytes(),
            local_bytes: self.store.local_bytes(),
            uncommitted_bytes: self.store.open_bytes(),
            damaged_dropped: self
                .store
                .counters()
                .damaged_dropped
                .load(std::sync::atomic::Ordering::Relaxed),
            ..CacheStatus::default()
        };
        for file in self.store.catalog().all() {
            match (file.name.stream, file.name.stage) {
                (Stream::Meta, _) => status.meta_bytes += file.bytes,
                (Stream::Data, Stage::Pushed) => {
                    status.evictable_bytes += file.bytes;
                    status.evictable_datafiles += 1;
                }
                (Stream::Data, _) => status.uncommitted_bytes += file.bytes,
            }
        }
        status
    }
}
