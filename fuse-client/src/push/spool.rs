//! Where an object lies between encryption and erasure coding: in memory when small, else in an unlinked file.
//!
//! It holds ciphertext only. It is gone with the process.

use parking_lot::RwLock;
use qsfs_zdb::media::{Media, MediaFile, OpenMode};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Objects up to this size are kept in memory; with two transfers at once that is the larger part of the push budget.
pub const MEMORY_BYTES_MAX: u64 = 66 << 20;

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// See the module.
#[derive(Debug)]
pub enum Spool {
    /// Small.
    Memory(RwLock<Vec<u8>>),
    /// Large.
    File(Box<dyn MediaFile>),
}

impl Spool {
    /// Room for an object of at most `bytes`.
    pub fn new(media: &Arc<dyn Media>, dir: &Path, bytes: u64) -> io::Result<Self> {
        if bytes <= MEMORY_BYTES_MAX {
            let capacity = usize::try_from(bytes).unwrap_or(0);
            return Ok(Self::Memory(RwLock::new(Vec::with_capacity(capacity))));
        }
        media.create_dir_all(dir)?;
        let path = dir.join(format!(
            "{}-{}",
            std::process::id(),
            SERIAL.fetch_add(1, Ordering::Relaxed)
        ));
        if media.exists(&path) {
            media.remove(&path)?;
        }
        let file = media.open(&path, OpenMode::CreateNew)?;
        media.remove(&path)?;
        Ok(Self::File(file))
    }

    /// Writes at an offset.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Memory(memory) => {
                let mut memory = memory.write();
                let at = usize::try_from(offset).map_err(io::Error::other)?;
                if memory.len() < at + bytes.len() {
                    memory.resize(at + bytes.len(), 0);
                }
                memory[at..at + bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
            Self::File(file) => file.write_all_at(bytes, offset),
        }
    }

    /// Fills `buf` from an offset.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Memory(memory) => {
                let memory = memory.read();
                let at = usize::try_from(offset).map_err(io::Error::other)?;
                let from = memory
                    .get(at..at + buf.len())
                    .ok_or(io::ErrorKind::UnexpectedEof)?;
                buf.copy_from_slice(from);
                Ok(())
            }
            Self::File(file) => file.read_exact_at(buf, offset),
        }
    }
}
