//! What is open: counts per inode (so that an unlinked file lives until its last close), where sequential readers
//! are, and how far an open directory is read. Soft state; lost with the process, as the kernel's handles are.

use crate::namespace::Ino;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug, Default, Clone, Copy)]
struct OpenFile {
    count: u64,
    /// Lost its last name while open.
    orphan: bool,
    /// End of the last read.
    read_end: u64,
    /// Reads in a row that began where the one before ended.
    sequential: u32,
    /// Up to here read-ahead was asked for.
    ahead: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Handles {
    files: Mutex<HashMap<Ino, OpenFile>>,
    /// Greatest cookie that a directory handle shows.
    directories: Mutex<HashMap<u64, u64>>,
    next_directory: AtomicU64,
}

impl Handles {
    pub(super) fn open(&self, ino: Ino) {
        self.files.lock().entry(ino).or_default().count += 1;
    }

    /// True if this was the last handle of a file without names.
    pub(super) fn close(&self, ino: Ino) -> bool {
        let mut files = self.files.lock();
        let Some(file) = files.get_mut(&ino) else {
            return false;
        };
        file.count = file.count.saturating_sub(1);
        if file.count > 0 {
            return false;
        }
        files.remove(&ino).is_some_and(|file| file.orphan)
    }

    /// The file loses its last name. True if nobody has it open, so that it can go at once.
    pub(super) fn orphan(&self, ino: Ino) -> bool {
        match self.files.lock().get_mut(&ino) {
            Some(file) => {
                file.orphan = true;
                false
            }
            None => true,
        }
    }

    /// Notes a read that had to go to the shards; answers the range to read ahead, if reading is sequential.
    pub(super) fn read_ahead(
        &self,
        ino: Ino,
        start: u64,
        end: u64,
        window: u64,
    ) -> Option<(u64, u64)> {
        let mut files = self.files.lock();
        let file = files.get_mut(&ino)?;
        // The kernel's own read-ahead sends several requests at once, in any order.
        let near = start <= file.read_end.saturating_add(window)
            && end.saturating_add(window) >= file.read_end;
        file.sequential = if near {
            file.sequential.saturating_add(1)
        } else {
            file.ahead = 0;
            0
        };
        file.read_end = if near { file.read_end.max(end) } else { end };
        if file.sequential < 2 {
            return None;
        }
        let (from, to) = (
            file.read_end.max(file.ahead),
            file.read_end.saturating_add(window),
        );
        // Half a window at a time, so that hints are few and large.
        (to.saturating_sub(from) >= window / 2).then(|| {
            file.ahead = to;
            (from, to)
        })
    }

    pub(super) fn open_directory(&self, limit: u64) -> u64 {
        let handle = self.next_directory.fetch_add(1, Ordering::Relaxed);
        self.directories.lock().insert(handle, limit);
        handle
    }

    pub(super) fn close_directory(&self, handle: u64) {
        self.directories.lock().remove(&handle);
    }

    /// The handle's limit; a rewound directory gets a new one.
    pub(super) fn directory_limit(&self, handle: u64, offset: u64, newest: u64) -> u64 {
        match self.directories.lock().get_mut(&handle) {
            Some(limit) => {
                if offset == 0 {
                    *limit = newest;
                }
                *limit
            }
            None => newest,
        }
    }
}
