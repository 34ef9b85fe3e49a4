//! Contents: read, write, holes.

use super::{Caller, FileSystem, FsError};
use crate::namespace::{Action, FILE_BYTES_MAX, FileExtent, Ino};
use crate::ports::StoreError;
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt, try_join_all};
use qsfs_zstor::id::DatafileId;
use std::sync::Arc;

/// Sequential readers of data that is not local have this much asked for ahead of them.
const READ_AHEAD_BYTES: u64 = 8 << 20;
/// Longest single fetch: longer holes in the local data are fetched in parallel parts.
const FETCH_BYTES_MAX: u32 = 1 << 20;
/// Extents looked at in one step of `lseek`.
const SEEK_EXTENTS: usize = 1024;

/// Bytes of a read that are not local.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// Where in the buffer they go.
    pub at: usize,
    /// Which datafile has them.
    pub datafile: DatafileId,
    /// Where in it.
    pub offset: u64,
    /// How many.
    pub bytes: u32,
}

/// What a read got so far.
#[derive(Debug, PartialEq, Eq)]
pub struct ContentsRead {
    /// Bytes of the buffer that count; less than asked for at the end of the file.
    pub bytes: usize,
    /// What must be fetched before the buffer is right; empty if all was local.
    pub missing: Vec<Missing>,
}

/// What `lseek` looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// `SEEK_DATA`
    Data,
    /// `SEEK_HOLE`
    Hole,
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("lengths within a buffer fit usize")
}

impl FileSystem {
    /// Writes; visible at once, durable after [`FileSystem::sync`]. May wait if the store says so. Answers whether
    /// set-user-id or set-group-id were cleared, which the writer's kernel cannot know.
    pub fn write(
        &self,
        ino: Ino,
        offset: u64,
        data: &[u8],
        clear_privileges: bool,
        caller: Caller,
    ) -> Result<bool, FsError> {
        self.writable()?;
        if data.is_empty() {
            return Ok(false);
        }
        offset
            .checked_add(data.len() as u64)
            .filter(|&end| end <= FILE_BYTES_MAX)
            .ok_or(FsError::TooBig)?;
        let extents = self.store.append_data(data)?;
        debug_assert_eq!(
            extents
                .iter()
                .map(|extent| u64::from(extent.bytes))
                .sum::<u64>(),
            data.len() as u64,
            "the store appends all or fails"
        );
        let mut cleared = false;
        self.execute(caller.now, |plan| {
            cleared = clear_privileges
                && plan
                    .attributes(ino)?
                    .is_some_and(|file| file.mode & (libc::S_ISUID | libc::S_ISGID) != 0);
            Ok(Action::Write {
                ino,
                offset,
                extents,
                clear_privileges: cleared,
            })
        })?;
        Ok(cleared)
    }

    /// Reads what is local into `buffer`, zeroes for holes, and names what is missing.
    pub fn read(&self, ino: Ino, offset: u64, buffer: &mut [u8]) -> Result<ContentsRead, FsError> {
        let end = offset.saturating_add(buffer.len() as u64);
        let (size, extents) = self
            .namespace
            .contents(ino, offset, end)?
            .ok_or(FsError::NotRegular)?;
        let end = end.min(size);
        let bytes = to_usize(end.saturating_sub(offset));
        let mut missing = Vec::new();
        let mut filled = offset;
        for run in runs(&extents, offset, end) {
            buffer[to_usize(filled - offset)..to_usize(run.start - offset)].fill(0);
            let at = to_usize(run.start - offset);
            let part = &mut buffer[at..at + to_usize(run.bytes)];
            if !self.store.read_local(run.datafile, run.offset, part)? {
                missing.push(Missing {
                    at,
                    datafile: run.datafile,
                    offset: run.offset,
                    bytes: u32::try_from(run.bytes).expect("a run is within one buffer"),
                });
            }
            filled = run.end();
        }
        if filled < end {
            buffer[to_usize(filled - offset)..bytes].fill(0);
        }
        if !missing.is_empty() {
            self.read_ahead(ino, offset, end, size)?;
        }
        Ok(ContentsRead { bytes, missing })
    }

    /// Tells the store what a sequential reader will want next.
    fn read_ahead(&self, ino: Ino, start: u64, end: u64, size: u64) -> Result<(), FsError> {
        let Some((from, to)) = self.handles.read_ahead(ino, start, end, READ_AHEAD_BYTES) else {
            return Ok(());
        };
        let to = to.min(size);
        if from >= to {
            return Ok(());
        }
        for run in runs(
            &self.namespace.extents(ino, from, to, usize::MAX)?,
            from,
            to,
        ) {
            let bytes = u32::try_from(run.bytes).expect("a run is within the read-ahead window");
            self.store.prefetch(run.datafile, run.offset, bytes);
        }
        Ok(())
    }

    /// Fetches what was missing into the buffer of the read; all parts at once.
    pub fn complete(
        self: &Arc<Self>,
        mut buffer: Vec<u8>,
        missing: Vec<Missing>,
    ) -> BoxFuture<'static, Result<Vec<u8>, FsError>> {
        let parts: Vec<Missing> = missing.into_iter().flat_map(split).collect();
        let fetches: Vec<_> = parts
            .iter()
            .map(|part| self.store.fetch(part.datafile, part.offset, part.bytes))
            .collect();
        async move {
            let fetched: Vec<Bytes> = try_join_all(fetches).await?;
            for (part, bytes) in parts.iter().zip(fetched) {
                let place = &mut buffer[part.at..part.at + part.bytes as usize];
                if bytes.len() != place.len() {
                    return Err(FsError::Store(StoreError::Unavailable {
                        datafile: part.datafile,
                        reason: format!(
                            "a fetch answered {} bytes instead of {}",
                            bytes.len(),
                            place.len()
                        ),
                    }));
                }
                place.copy_from_slice(&bytes);
            }
            Ok(buffer)
        }
        .boxed()
    }

    /// `fallocate`: punching holes, zeroing, extending. Space is not reserved.
    pub fn fallocate(
        &self,
        ino: Ino,
        offset: u64,
        bytes: u64,
        mode: i32,
        clear_privileges: bool,
        caller: Caller,
    ) -> Result<(), FsError> {
        const KNOWN: i32 =
            libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        if mode & !KNOWN != 0 {
            return Err(FsError::NotSupported("this mode of fallocate"));
        }
        let end = offset
            .checked_add(bytes)
            .filter(|&end| end <= FILE_BYTES_MAX)
            .ok_or(FsError::TooBig)?;
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let zero = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
        if bytes == 0 || (mode & libc::FALLOC_FL_PUNCH_HOLE != 0 && !keep_size) {
            return Err(FsError::Invalid("fallocate"));
        }
        self.execute(caller.now, |_| {
            Ok(Action::Punch {
                ino,
                offset,
                bytes: if zero { bytes } else { 0 },
                extend_to: if keep_size { 0 } else { end },
                clear_privileges,
            })
        })
    }

    /// `SEEK_DATA` and `SEEK_HOLE`.
    pub fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64, FsError> {
        let (size, _) = self
            .namespace
            .contents(ino, offset, offset)?
            .ok_or(FsError::NotRegular)?;
        if offset >= size {
            return Err(FsError::NoDataThere);
        }
        let mut at = offset;
        loop {
            let extents = self.namespace.extents(ino, at, size, SEEK_EXTENTS)?;
            if what == Seek::Data {
                return match extents.first() {
                    Some(extent) => Ok(extent.start.max(offset)),
                    None => Err(FsError::NoDataThere),
                };
            }
            for extent in &extents {
                if extent.start > at {
                    return Ok(at);
                }
                at = extent.end();
            }
            if extents.len() < SEEK_EXTENTS || at >= size {
                return Ok(at.min(size));
            }
        }
    }
}

/// The extents cut to `start..end`, with those that continue each other joined.
fn runs(extents: &[FileExtent], start: u64, end: u64) -> Vec<FileExtent> {
    let mut runs = Vec::<FileExtent>::with_capacity(extents.len());
    for extent in extents {
        let (from, to) = (extent.start.max(start), extent.end().min(end));
        if from >= to {
            continue;
        }
        let cut = FileExtent {
            start: from,
            datafile: extent.datafile,
            offset: extent.offset + (from - extent.start),
            bytes: to - from,
        };
        match runs.last_mut() {
            Some(last)
                if last.end() == cut.start
                    && last.datafile == cut.datafile
                    && last.offset + last.bytes == cut.offset =>
            {
                last.bytes += cut.bytes;
            }
            _ => runs.push(cut),
        }
    }
    runs
}

/// Parts of at most [`FETCH_BYTES_MAX`].
fn split(missing: Missing) -> impl Iterator<Item = Missing> {
    (0..missing.bytes)
        .step_by(FETCH_BYTES_MAX as usize)
        .map(move |from| Missing {
            at: missing.at + from as usize,
            offset: missing.offset + u64::from(from),
            bytes: FETCH_BYTES_MAX.min(missing.bytes - from),
            ..missing
        })
}
