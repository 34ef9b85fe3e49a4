//! A disk on which the syncs of the log's segments hang or fail when told to.

use parking_lot::{Condvar, Mutex};
use qsfs_zdb::media::{Identity, Media, MediaFile, MediaLock, OpenMode, Space};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Mood {
    #[default]
    Well,
    Hanging,
    Failing,
}

#[derive(Debug, Default)]
struct Switch {
    mood: Mutex<(Mood, usize)>,
    changed: Condvar,
}

/// The disk. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct HangingMedia {
    below: Arc<dyn Media>,
    switch: Arc<Switch>,
}

impl HangingMedia {
    pub(super) fn over(below: Arc<dyn Media>) -> Self {
        Self {
            below,
            switch: Arc::default(),
        }
    }

    fn set(&self, mood: Mood) {
        self.switch.mood.lock().0 = mood;
        self.switch.changed.notify_all();
    }

    pub(super) fn hang(&self) {
        self.set(Mood::Hanging);
    }

    pub(super) fn recover(&self) {
        self.set(Mood::Well);
    }

    pub(super) fn fail(&self) {
        self.set(Mood::Failing);
    }

    /// Until a sync hangs.
    pub(super) fn until_one_hangs(&self) {
        let mut mood = self.switch.mood.lock();
        let deadline = Instant::now() + DEADLINE;
        while mood.1 == 0 {
            let late = self.switch.changed.wait_until(&mut mood, deadline);
            assert!(!late.timed_out(), "no sync was begun");
        }
    }
}

impl Switch {
    fn pass(&self) -> io::Result<()> {
        let mut mood = self.mood.lock();
        mood.1 += 1;
        self.changed.notify_all();
        while mood.0 == Mood::Hanging {
            self.changed.wait(&mut mood);
        }
        mood.1 -= 1;
        match mood.0 {
            Mood::Failing => Err(io::Error::other("the disk is gone")),
            _ => Ok(()),
        }
    }
}

#[derive(Debug)]
struct HangingFile {
    below: Box<dyn MediaFile>,
    /// None: no segment of the log.
    switch: Option<Arc<Switch>>,
}

impl MediaFile for HangingFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.below.read_at(buffer, offset)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.below.write_all_at(bytes, offset)
    }
    fn write_vectored_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.below.write_vectored_at(parts, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        if let Some(switch) = &self.switch {
            switch.pass()?;
        }
        self.below.sync_data()
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.below.allocate(offset, length)
    }
    fn truncate(&self, length: u64) -> io::Result<()> {
        self.below.truncate(length)
    }
    fn length(&self) -> io::Result<u64> {
        self.below.length()
    }
}

impl Media for HangingMedia {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn MediaFile>> {
        let segment = path.extension().is_some_and(|extension| extension == "log");
        Ok(Box::new(HangingFile {
            below: self.below.open(path, mode)?,
            switch: segment.then(|| Arc::clone(&self.switch)),
        }))
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.below.create_dir_all(path)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.below.remove(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.below.remove_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.below.rename(from, to)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.below.list(dir)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.below.sync_dir(dir)
    }
    fn exists(&self, path: &Path) -> bool {
        self.below.exists(path)
    }
    fn identity(&self, path: &Path) -> io::Result<Identity> {
        self.below.identity(path)
    }
    fn space(&self, path: &Path) -> io::Result<Space> {
        self.below.space(path)
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn MediaLock>> {
        self.below.lock(path)
    }
}
