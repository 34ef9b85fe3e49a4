//! Which files the kernel may hold pages of: those opened since it last forgot them.

use parking_lot::Mutex;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

/// Beyond this many, every file of the volume is taken for opened.
const OPENED_MAX: usize = 1 << 20;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct OpenedInodes {
    inodes: Mutex<HashSet<u64>>,
    overflowed: AtomicBool,
}

impl OpenedInodes {
    pub(super) fn insert(&self, ino: u64) {
        let mut inodes = self.inodes.lock();
        if inodes.len() < OPENED_MAX || inodes.contains(&ino) {
            inodes.insert(ino);
        } else {
            self.overflowed.store(true, Ordering::Release);
        }
    }

    pub(super) fn forget(&self, ino: u64) {
        self.inodes.lock().remove(&ino);
    }

    /// `None`: too many to know.
    pub(super) fn all(&self) -> Option<Vec<u64>> {
        if self.overflowed.load(Ordering::Acquire) {
            return None;
        }
        Some(self.inodes.lock().iter().copied().collect())
    }
}
