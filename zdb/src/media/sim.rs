//! A filesystem in memory that forgets what was not synced.
//!
//! Model of a crash ([`SimMedia::restart`]): of the writes since a file's last sync, a random prefix is there whole, of the rest
//! random 512-byte sectors (what a lost length change would have covered is gone); a truncation that was lost takes everything
//! after it along; of the names created, renamed or removed since `sync_dir`, a random prefix is there.

use super::{Identity, Media, MediaFile, MediaLock, OpenMode, PAGE_BYTES, Space};
use parking_lot::{Condvar, Mutex};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SECTOR_BYTES: usize = 512;

/// What goes wrong, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The n-th changing operation from now (0 = the next) is cut short and everything after it fails, until [`SimMedia::restart`].
    CrashAfter(u64),
    /// The n-th file sync from now fails, and what it should have stored is forgotten at the next restart.
    FailSync(u64),
    /// The disk holds this many bytes of files.
    Capacity(u64),
    /// None of the above any more, also if it was to come yet; the disk is as large as memory again.
    Healthy,
}

/// A filesystem in memory; clones share it.
#[derive(Debug, Clone, Default)]
pub struct SimMedia {
    world: Arc<Mutex<World>>,
}

#[derive(Debug, Default)]
struct World {
    files: BTreeMap<u64, SimFileState>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    name_changes: Vec<NameChange>,
    dirs: BTreeMap<PathBuf, u64>,
    locked: BTreeSet<PathBuf>,
    next_inode: u64,
    operations: u64,
    crash_at: Option<u64>,
    crashed: bool,
    fail_sync_in: Option<u64>,
    capacity: Option<u64>,
    /// Syncs that may still begin; `None`: all.
    syncs_allowed: Option<u64>,
    syncs_held: usize,
    sync_allowed: Arc<Condvar>,
}

#[derive(Debug, Default, Clone)]
struct SimFileState {
    current: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Length(usize),
}

#[derive(Debug, Clone)]
enum NameChange {
    Create(PathBuf, u64),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Self::Create(path, inode) => {
                names.insert(path.clone(), *inode);
            }
            Self::Remove(path) => {
                names.remove(path);
            }
            Self::Rename(from, to) => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
        }
    }

    fn touches(&self, dir: &Path) -> bool {
        match self {
            Self::Create(path, _) | Self::Remove(path) => path.parent() == Some(dir),
            Self::Rename(from, to) => from.parent() == Some(dir) || to.parent() == Some(dir),
        }
    }
}

fn crashed() -> io::Error {
    io::Error::other("simulated crash")
}

fn write_into(contents: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if contents.len() < offset + bytes.len() {
        contents.resize(offset + bytes.len(), 0);
    }
    contents[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn position(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl World {
    /// Count a changing operation; true when it is the one that the crash cuts short.
    fn begin(&mut self) -> io::Result<bool> {
        if self.crashed {
            return Err(crashed());
        }
        let now = self.operations;
        self.operations += 1;
        if self.crash_at == Some(now) {
            self.crashed = true;
            return Ok(true);
        }
        Ok(false)
    }

    /// Count an operation that a crash prevents entirely.
    fn begin_whole(&mut self) -> io::Result<()> {
        if self.begin()? {
            Err(crashed())
        } else {
            Ok(())
        }
    }

    /// Count a sync; an error if it is the one that fails.
    fn fail_sync_if_due(&mut self, inode: u64) -> io::Result<()> {
        match self.fail_sync_in {
            Some(0) => {
                self.fail_sync_in = None;
                // The kernel marks the lost pages clean: no later sync stores them.
                state(self, inode)?.pending.clear();
                return Err(io::Error::other("simulated failure of a sync"));
            }
            Some(more) => self.fail_sync_in = Some(more - 1),
            None => {}
        }
        Ok(())
    }

    fn alive(&self) -> io::Result<()> {
        if self.crashed { Err(crashed()) } else { Ok(()) }
    }

    fn used(&self) -> u64 {
        let held: BTreeSet<u64> = self.names.values().copied().collect();
        held.iter()
            .filter_map(|inode| self.files.get(inode))
            .map(|file| file.current.len() as u64)
            .sum()
    }

    fn change_name(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.name_changes.push(change);
    }
}

impl SimMedia {
    /// An empty, unlimited, faultless disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// Arrange for something to go wrong.
    pub fn inject(&self, fault: Fault) {
        let mut world = self.world.lock();
        match fault {
            Fault::CrashAfter(operations) => world.crash_at = Some(world.operations + operations),
            Fault::FailSync(syncs) => world.fail_sync_in = Some(syncs),
            Fault::Capacity(bytes) => world.capacity = Some(bytes),
            Fault::Healthy => {
                (world.crash_at, world.fail_sync_in, world.capacity) = (None, None, None);
            }
        }
    }

    /// Let only so many file syncs begin from now on; the next ones are held until more are allowed (`None`: all).
    pub fn allow_syncs(&self, syncs: Option<u64>) {
        let mut world = self.world.lock();
        world.syncs_allowed = syncs;
        world.sync_allowed.notify_all();
    }

    /// Syncs that are held now.
    pub fn syncs_held(&self) -> usize {
        self.world.lock().syncs_held
    }

    /// Changing operations so far (writes, syncs, names, lengths).
    pub fn operations(&self) -> u64 {
        self.world.lock().operations
    }

    /// Has the injected crash happened?
    pub fn crashed(&self) -> bool {
        self.world.lock().crashed
    }

    /// The disk as the machine finds it after losing power now. The old handle stays crashed.
    pub fn restart(&self, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut old = self.world.lock();
        old.crashed = true;
        let mut names = old.durable_names.clone();
        let kept = random.random_range(0..=old.name_changes.len());
        for change in &old.name_changes[..kept] {
            change.apply(&mut names);
        }
        let files = names
            .values()
            .filter_map(|inode| Some((*inode, old.files.get(inode)?.after_crash(&mut random))))
            .collect();
        // A directory whose removal outlived that of what was in it is no state a filesystem can be in.
        let mut dirs = old.dirs.clone();
        for dir in names.keys().filter_map(|path| path.parent()) {
            dirs.entry(dir.to_owned()).or_insert(u64::MAX);
        }
        Self {
            world: Arc::new(Mutex::new(World {
                files,
                durable_names: names.clone(),
                names,
                dirs,
                next_inode: old.next_inode,
                capacity: old.capacity,
                ..World::default()
            })),
        }
    }

    /// Another disk, with what is durable on this one now.
    pub fn clone_durable(&self) -> Self {
        let old = self.world.lock();
        let files = old.files.iter().map(|(inode, file)| {
            let file = SimFileState {
                current: file.durable.clone(),
                durable: file.durable.clone(),
                pending: Vec::new(),
            };
            (*inode, file)
        });
        Self {
            world: Arc::new(Mutex::new(World {
                files: files.collect(),
                names: old.durable_names.clone(),
                durable_names: old.durable_names.clone(),
                dirs: old.dirs.clone(),
                next_inode: old.next_inode,
                capacity: old.capacity,
                ..World::default()
            })),
        }
    }

    /// Flip bits of a stored byte: rot.
    pub fn flip(&self, path: &Path, offset: u64, mask: u8) {
        let mut world = self.world.lock();
        let Some(inode) = world.names.get(path).copied() else {
            return;
        };
        if let (Some(file), Ok(at)) = (world.files.get_mut(&inode), position(offset)) {
            for contents in [&mut file.current, &mut file.durable] {
                if let Some(byte) = contents.get_mut(at) {
                    *byte ^= mask;
                }
            }
        }
    }

    /// Flip bits of a byte of every file that has no name (any more) but is open: rot where only its owner can find it.
    pub fn flip_unnamed(&self, offset: usize, mask: u8) {
        let mut world = self.world.lock();
        let named: BTreeSet<u64> = world.names.values().copied().collect();
        let unnamed = world.files.iter_mut();
        for (_, file) in unnamed.filter(|(inode, _)| !named.contains(inode)) {
            if let Some(byte) = file.current.get_mut(offset) {
                *byte ^= mask;
            }
        }
    }

    /// Lose a directory and everything in it for good. Open handles keep working, as on a real disk.
    pub fn remove_tree(&self, dir: &Path) {
        let mut world = self.world.lock();
        world.names.retain(|path, _| !path.starts_with(dir));
        world.durable_names.retain(|path, _| !path.starts_with(dir));
        world.dirs.retain(|path, _| !path.starts_with(dir));
        world.locked.retain(|path| !path.starts_with(dir));
    }

    /// The bytes of a file.
    pub fn contents(&self, path: &Path) -> Option<Vec<u8>> {
        let world = self.world.lock();
        let inode = world.names.get(path)?;
        Some(world.files.get(inode)?.current.clone())
    }
}

impl SimFileState {
    fn after_crash(&self, random: &mut StdRng) -> Self {
        let mut contents = self.durable.clone();
        let whole = random.random_range(0..=self.pending.len());
        let chance = *[0.0, 0.5, 1.0]
            .get(random.random_range(0..3_usize))
            .unwrap_or(&0.5);
        for (index, change) in self.pending.iter().enumerate() {
            match change {
                Change::Write { offset, bytes } if index < whole => {
                    write_into(&mut contents, *offset, bytes);
                }
                Change::Write { offset, bytes } => {
                    for (sector, part) in bytes.chunks(SECTOR_BYTES).enumerate() {
                        if random.random_bool(chance) {
                            write_into(&mut contents, offset + sector * SECTOR_BYTES, part);
                        }
                    }
                }
                Change::Length(length) if index < whole => contents.resize(*length, 0),
                Change::Length(_) => break,
            }
        }
        Self {
            durable: contents.clone(),
            current: contents,
            pending: Vec::new(),
        }
    }
}

#[derive(Debug)]
struct SimFile {
    world: Arc<Mutex<World>>,
    inode: u64,
    /// It takes whole pages only, as a disk does past the page cache.
    by_pages: bool,
}

#[derive(Debug)]
struct SimLock {
    world: Arc<Mutex<World>>,
    path: PathBuf,
}

impl MediaLock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        self.world.lock().locked.remove(&self.path);
    }
}

impl Media for SimMedia {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn MediaFile>> {
        let mut world = self.world.lock();
        world.alive()?;
        let inode = match (world.names.get(path).copied(), mode) {
            (Some(_), OpenMode::CreateNew) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(inode), _) => inode,
            (None, OpenMode::CreateNew) => {
                world.begin_whole()?;
                if !path
                    .parent()
                    .is_some_and(|dir| world.dirs.contains_key(dir))
                {
                    return Err(io::ErrorKind::NotFound.into());
                }
                world.next_inode += 1;
                let inode = world.next_inode;
                world.files.insert(inode, SimFileState::default());
                world.change_name(NameChange::Create(path.to_owned(), inode));
                inode
            }
            (None, _) => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(Box::new(SimFile {
            world: Arc::clone(&self.world),
            inode,
            by_pages: false,
        }))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut world = self.world.lock();
        world.alive()?;
        for dir in path.ancestors() {
            if !world.dirs.contains_key(dir) {
                world.next_inode += 1;
                let inode = world.next_inode;
                world.dirs.insert(dir.to_owned(), inode);
            }
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut world = self.world.lock();
        world.begin_whole()?;
        if !world.names.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        world.change_name(NameChange::Remove(path.to_owned()));
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut world = self.world.lock();
        world.begin_whole()?;
        if world.names.keys().any(|name| name.starts_with(path)) {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        world.dirs.remove(path);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut world = self.world.lock();
        world.begin_whole()?;
        if !world.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        world.change_name(NameChange::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let world = self.world.lock();
        world.alive()?;
        if !world.dirs.contains_key(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let paths = world.names.keys().chain(world.dirs.keys());
        let mut names: Vec<String> = paths
            .filter(|path| path.parent() == Some(dir))
            .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut world = self.world.lock();
        world.begin_whole()?;
        let changes = std::mem::take(&mut world.name_changes);
        for change in changes {
            if change.touches(dir) {
                change.apply(&mut world.durable_names);
            } else {
                world.name_changes.push(change);
            }
        }
        Ok(())
    }

    fn exists(&self, path: &Path) -> bool {
        let world = self.world.lock();
        world.names.contains_key(path) || world.dirs.contains_key(path)
    }

    fn identity(&self, path: &Path) -> io::Result<Identity> {
        let world = self.world.lock();
        world.alive()?;
        let inode = world.names.get(path).or_else(|| world.dirs.get(path));
        inode
            .map(|&inode| Identity { device: 1, inode })
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn space(&self, _path: &Path) -> io::Result<Space> {
        let world = self.world.lock();
        let total_bytes = world.capacity.unwrap_or(1 << 50);
        Ok(Space {
            total_bytes,
            free_bytes: total_bytes.saturating_sub(world.used()),
        })
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn MediaLock>> {
        let mut world = self.world.lock();
        world.alive()?;
        if !world.locked.insert(path.to_owned()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(SimLock {
            world: Arc::clone(&self.world),
            path: path.to_owned(),
        }))
    }
}

impl SimFile {
    fn with<T>(&self, change: impl FnOnce(&mut World, u64) -> io::Result<T>) -> io::Result<T> {
        change(&mut self.world.lock(), self.inode)
    }

    fn wait_until_allowed(&self) {
        let mut world = self.world.lock();
        let allowed = Arc::clone(&world.sync_allowed);
        world.syncs_held += 1;
        while world.syncs_allowed == Some(0) && !world.crashed {
            allowed.wait(&mut world);
        }
        world.syncs_held -= 1;
        world.syncs_allowed = world.syncs_allowed.map(|more| more.saturating_sub(1));
    }
}

fn state(world: &mut World, inode: u64) -> io::Result<&mut SimFileState> {
    world
        .files
        .get_mut(&inode)
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

impl MediaFile for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(|world, inode| {
            world.alive()?;
            let file = state(world, inode)?;
            let from = position(offset)?.min(file.current.len());
            let bytes = buffer.len().min(file.current.len() - from);
            buffer[..bytes].copy_from_slice(&file.current[from..from + bytes]);
            Ok(bytes)
        })
    }

    fn read_cached_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        self.read_at(buffer, offset).map(Some)
    }

    fn past_cache(&self) -> Option<Box<dyn MediaFile>> {
        Some(Box::new(Self {
            world: Arc::clone(&self.world),
            inode: self.inode,
            by_pages: true,
        }))
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let places = [bytes.as_ptr().addr(), bytes.len(), position(offset)?];
        if self.by_pages && places.iter().any(|place| place % PAGE_BYTES != 0) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.with(|world, inode| {
            let cut_short = world.begin()?;
            let offset = position(offset)?;
            let used = world.used();
            let room = world.capacity.map(|capacity| capacity.saturating_sub(used));
            let file = state(world, inode)?;
            let growth = (offset + bytes.len()).saturating_sub(file.current.len()) as u64;
            let full = room.is_some_and(|room| growth > room);
            let bytes = if cut_short || full {
                &bytes[..bytes.len() / 2]
            } else {
                bytes
            };
            // What fits of a write to a full disk is written, as by the kernel.
            if !full || growth == 0 {
                write_into(&mut file.current, offset, bytes);
                file.pending.push(Change::Write {
                    offset,
                    bytes: bytes.to_vec(),
                });
            }
            match (cut_short, full) {
                (true, _) => Err(crashed()),
                (_, true) => Err(io::ErrorKind::StorageFull.into()),
                _ => Ok(()),
            }
        })
    }

    fn write_vectored_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.write_all_at(&parts.concat(), offset)
    }

    fn write_out(&self, _offset: u64, _length: u64) -> io::Result<()> {
        // What reached the disk is not durable: a crash loses it as it loses other writes.
        self.with(|world, inode| {
            world.begin_whole()?;
            world.fail_sync_if_due(inode)
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.wait_until_allowed();
        self.with(|world, inode| {
            world.begin_whole()?;
            world.fail_sync_if_due(inode)?;
            let file = state(world, inode)?;
            file.pending.clear();
            file.durable.clone_from(&file.current);
            Ok(())
        })
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = position(offset + length)?;
        self.with(|world, inode| {
            world.begin_whole()?;
            let file = state(world, inode)?;
            if end > file.current.len() {
                file.current.resize(end, 0);
                file.pending.push(Change::Length(end));
            }
            Ok(())
        })
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        let length = position(length)?;
        self.with(|world, inode| {
            world.begin_whole()?;
            let file = state(world, inode)?;
            file.current.resize(length, 0);
            file.pending.push(Change::Length(length));
            Ok(())
        })
    }

    fn length(&self) -> io::Result<u64> {
        self.with(|world, inode| {
            world.alive()?;
            Ok(state(world, inode)?.current.len() as u64)
        })
    }
}
