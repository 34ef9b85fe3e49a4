//! A disk that harms what is received of snapshots, or dies at a step: then nothing reaches it any more, as if its process were killed.

use parking_lot::Mutex;
use qsfs_metad::ground::{Store, Stores};
use qsfs_metad::state::kv::{Batch, KvError, Pair, RowKey};
use qsfs_zdb::media::{Identity, Media, MediaFile, MediaLock, OpenMode, Space};
use std::io;
use std::path::Path;
use std::sync::Arc;

#[derive(Debug, Default)]
struct Mood {
    /// So many snapshots that are received are harmed.
    harm: u32,
    /// The next that reaches the disk after a snapshot was received is counted, up to the one at which it dies.
    dies_at: Option<u32>,
    steps: u32,
    counting: bool,
    dead: bool,
    /// What is received is harmed as it is synced.
    harmed: u32,
    /// What becomes of the next page of rows that is read.
    rots: Option<Rot>,
    /// Its name, if it cannot be read.
    unreadable: Option<Vec<u8>>,
}

/// How a page goes bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rot {
    /// A bit of it flips.
    Flips,
    /// The disk cannot read it.
    Unreadable,
}

/// What to do. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Switch(Arc<Mutex<Mood>>);

impl Switch {
    /// The next so many received snapshots do not hold what was sent.
    pub(super) fn harm(&self, times: u32) {
        self.0.lock().harm = times;
    }

    /// The next page of rows that is read is not as it was written, from then on.
    pub(super) fn rot(&self, how: Rot) {
        self.0.lock().rots = Some(how);
    }

    pub(super) fn harmed(&self) -> u32 {
        self.0.lock().harmed
    }

    /// From the sync of a received snapshot on, so many steps go through, then none.
    pub(super) fn die_at(&self, steps: u32) {
        self.0.lock().dies_at = Some(steps);
    }

    pub(super) fn is_dead(&self) -> bool {
        self.0.lock().dead
    }

    fn step(&self) -> io::Result<()> {
        let mut mood = self.0.lock();
        if mood.counting && !mood.dead {
            mood.dead = mood.dies_at.is_some_and(|dies_at| mood.steps >= dies_at);
            mood.steps += 1;
        }
        if mood.dead {
            return Err(io::Error::other("the disk is dead"));
        }
        Ok(())
    }
}

fn is_received(path: &Path) -> bool {
    let name = path.file_name().and_then(std::ffi::OsStr::to_str);
    name.is_some_and(|name| name.starts_with("incoming-"))
}

#[derive(Debug)]
pub(super) struct FaultyMedia {
    below: Arc<dyn Media>,
    switch: Switch,
}

impl FaultyMedia {
    pub(super) fn over(below: Arc<dyn Media>, switch: &Switch) -> Self {
        let switch = switch.clone();
        Self { below, switch }
    }
}

#[derive(Debug)]
struct FaultyFile {
    below: Box<dyn MediaFile>,
    switch: Switch,
    received: bool,
}

impl MediaFile for FaultyFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.below.read_at(buffer, offset)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.switch.step()?;
        self.below.write_all_at(bytes, offset)
    }
    fn write_vectored_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.switch.step()?;
        self.below.write_vectored_at(parts, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        if self.received {
            let mut mood = self.switch.0.lock();
            mood.counting = true;
            if mood.harm > 0 {
                mood.harm -= 1;
                mood.harmed += 1;
                let middle = self.below.length()? / 2;
                let mut byte = [0];
                self.below.read_exact_at(&mut byte, middle)?;
                self.below.write_all_at(&[byte[0] ^ 0x10], middle)?;
            }
        }
        self.switch.step()?;
        self.below.sync_data()
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.switch.step()?;
        self.below.allocate(offset, length)
    }
    fn truncate(&self, length: u64) -> io::Result<()> {
        self.switch.step()?;
        self.below.truncate(length)
    }
    fn length(&self) -> io::Result<u64> {
        self.below.length()
    }
}

impl Media for FaultyMedia {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn MediaFile>> {
        if mode == OpenMode::CreateNew {
            self.switch.step()?;
        }
        Ok(Box::new(FaultyFile {
            below: self.below.open(path, mode)?,
            switch: self.switch.clone(),
            received: is_received(path),
        }))
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.switch.step()?;
        self.below.create_dir_all(path)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.switch.step()?;
        self.below.remove(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.switch.step()?;
        self.below.remove_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.switch.step()?;
        self.below.rename(from, to)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.below.list(dir)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.switch.step()?;
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

/// Rows on such a disk.
#[derive(Debug)]
pub(super) struct FaultyStores {
    below: Arc<dyn Stores>,
    switch: Switch,
}

impl FaultyStores {
    pub(super) fn over(below: Arc<dyn Stores>, switch: &Switch) -> Self {
        let switch = switch.clone();
        Self { below, switch }
    }
}

#[derive(Debug)]
struct FaultyStore {
    below: Arc<dyn Store>,
    switch: Switch,
}

impl FaultyStore {
    fn readable(&self, reads: impl Fn(&[u8]) -> bool) -> Result<(), KvError> {
        match &self.switch.0.lock().unreadable {
            Some(name) if reads(name) => {
                let error = io::Error::from(nix::errno::Errno::EIO);
                Err(sled::Error::from(error).into())
            }
            _ => Ok(()),
        }
    }
}

impl Store for FaultyStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KvError> {
        let Some(mut page) = self.below.get(key)? else {
            return Ok(None);
        };
        if key.first() == Some(&b'p') {
            let rots = self.switch.0.lock().rots.take();
            if rots == Some(Rot::Flips) {
                let middle = page.len() / 2;
                page[middle] ^= 0x10;
                let rotten = (RowKey::from_slice(key), Some(page.clone()));
                self.below.write(&[rotten].into())?;
            } else if rots == Some(Rot::Unreadable) {
                self.switch.0.lock().unreadable = Some(key.to_vec());
            }
        }
        self.readable(|name| name == key)?;
        Ok(Some(page))
    }
    fn range(&self, from: &[u8], until: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
        self.readable(|name| from <= name && name < until)?;
        self.below.range(from, until, max)
    }
    fn write(&self, batch: &Batch) -> Result<(), KvError> {
        self.switch.step().map_err(sled::Error::from)?;
        self.below.write(batch)
    }
    fn flush(&self) -> Result<(), KvError> {
        self.switch.step().map_err(sled::Error::from)?;
        self.below.flush()
    }
    fn verify(&self) -> Result<(), KvError> {
        self.readable(|_| true)?;
        self.below.verify()
    }
}

impl Stores for FaultyStores {
    fn open(&self, dir: &Path) -> Result<Arc<dyn Store>, KvError> {
        self.switch.step().map_err(sled::Error::from)?;
        Ok(Arc::new(FaultyStore {
            below: self.below.open(dir)?,
            switch: self.switch.clone(),
        }))
    }
    fn exists(&self, dir: &Path) -> bool {
        self.below.exists(dir)
    }
    fn remove(&self, dir: &Path) -> io::Result<()> {
        self.switch.step()?;
        self.below.remove(dir)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.switch.step()?;
        // What is made in its place stands elsewhere on the disk.
        self.switch.0.lock().unreadable = None;
        self.below.rename(from, to)
    }
    fn list(&self, parent: &Path) -> io::Result<Vec<String>> {
        self.below.list(parent)
    }
}
