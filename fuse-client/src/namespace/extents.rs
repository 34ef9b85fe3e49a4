//! Which bytes of a file are where: extents, and the count of live bytes per datafile.
//!
//! Invariants: extents of a file do not overlap and do not pass its size; `allocated` is their sum; the live bytes
//! of a datafile are the sum of all extents (of all files) that point into it.

use super::apply::ApplyError;
use super::operation::Ino;
use super::rows::{self, ExtentRow, Inode, extent_key, live_key};
use super::table::{Draft, Rows, TableError};
use crate::ports::DataExtent;
use qsfs_zstor::id::DatafileId;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// Extents that continue each other in the file and in the datafile are merged up to this length.
pub const EXTENT_BYTES_MAX: u64 = 64 << 20;

/// A run of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileExtent {
    /// First byte in the file.
    pub start: u64,
    /// Where the bytes are.
    pub datafile: DatafileId,
    /// First byte in the datafile.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

impl FileExtent {
    /// One past the last byte in the file.
    pub const fn end(&self) -> u64 {
        self.start + self.bytes
    }

    fn decode(key: &[u8], value: &[u8]) -> Result<Self, TableError> {
        let row: ExtentRow = rows::decode(key, value)?;
        Ok(Self {
            start: rows::number_in(key, 9)?,
            datafile: DatafileId(row.datafile),
            offset: row.offset,
            bytes: row.bytes,
        })
    }

    /// The part from `start` (in the file) on.
    const fn after(self, start: u64) -> Self {
        let skipped = start - self.start;
        Self {
            start,
            datafile: self.datafile,
            offset: self.offset + skipped,
            bytes: self.bytes - skipped,
        }
    }
}

/// The extent that begins before `start`, nearest to it.
fn before(rows: &impl Rows, ino: Ino, start: u64) -> Result<Option<FileExtent>, TableError> {
    rows.last(&extent_key(ino, 0), &extent_key(ino, start))?
        .map(|(key, value)| FileExtent::decode(&key, &value))
        .transpose()
}

/// The extents that have bytes in `start..end`, in order, at most `limit`.
pub(super) fn overlapping(
    rows: &impl Rows,
    ino: Ino,
    start: u64,
    end: u64,
    limit: usize,
) -> Result<Vec<FileExtent>, TableError> {
    let mut found = Vec::new();
    if let Some(extent) = before(rows, ino, start)?
        && extent.end() > start
    {
        found.push(extent);
    }
    rows.scan(
        &extent_key(ino, start),
        &extent_key(ino, end),
        &mut |key, value| {
            if found.len() >= limit {
                return Ok(ControlFlow::Break(()));
            }
            found.push(FileExtent::decode(key, value)?);
            Ok(ControlFlow::Continue(()))
        },
    )?;
    found.truncate(limit);
    Ok(found)
}

fn put(draft: &mut Draft<'_>, ino: Ino, extent: FileExtent) {
    draft.put(
        extent_key(ino, extent.start),
        rows::encode(&ExtentRow {
            datafile: extent.datafile.0,
            offset: extent.offset,
            bytes: extent.bytes,
        }),
    );
}

fn count_live(draft: &mut Draft<'_>, datafile: DatafileId, change: i128) -> Result<(), ApplyError> {
    let key = live_key(datafile);
    let live: u64 = draft.get_as(&key)?.unwrap_or(0);
    let live = u64::try_from(i128::from(live) + change)
        .map_err(|_| ApplyError::Inconsistent("live bytes of a datafile below zero"))?;
    draft.put(key, rows::encode(&live));
    Ok(())
}

/// Makes `start..end` a hole.
pub(super) fn cut(
    draft: &mut Draft<'_>,
    ino: Ino,
    inode: &mut Inode,
    start: u64,
    end: u64,
) -> Result<(), ApplyError> {
    if inode.allocated == 0 || start >= inode.size || start >= end {
        return Ok(());
    }
    if inode.tail.is_some_and(|tail| end > tail) {
        inode.tail = None;
    }
    let mut freed = BTreeMap::<DatafileId, u64>::new();
    for extent in overlapping(draft, ino, start, end, usize::MAX)? {
        let gone = extent.end().min(end) - extent.start.max(start);
        *freed.entry(extent.datafile).or_default() += gone;
        if extent.start < start {
            put(
                draft,
                ino,
                FileExtent {
                    bytes: start - extent.start,
                    ..extent
                },
            );
        } else {
            draft.delete(extent_key(ino, extent.start));
        }
        if extent.end() > end {
            put(draft, ino, extent.after(end));
        }
    }
    release(draft, inode, &freed)
}

fn release(
    draft: &mut Draft<'_>,
    inode: &mut Inode,
    freed: &BTreeMap<DatafileId, u64>,
) -> Result<(), ApplyError> {
    for (&datafile, &bytes) in freed {
        count_live(draft, datafile, -i128::from(bytes))?;
        inode.allocated = inode
            .allocated
            .checked_sub(bytes)
            .ok_or(ApplyError::Inconsistent(
                "allocated bytes of a file below zero",
            ))?;
    }
    Ok(())
}

/// Puts an extent into a hole at `start`. The size is not touched; it must be that from before the write.
pub(super) fn insert(
    draft: &mut Draft<'_>,
    ino: Ino,
    inode: &mut Inode,
    start: u64,
    data: &DataExtent,
) -> Result<(), ApplyError> {
    let bytes = u64::from(data.bytes);
    let left = match inode.tail {
        _ if inode.allocated == 0 => None,
        Some(tail) if start >= inode.size => draft
            .get(&extent_key(ino, tail))?
            .map(|value| FileExtent::decode(&extent_key(ino, tail), &value))
            .transpose()?,
        _ => before(draft, ino, start)?,
    };
    let merged = match left {
        Some(left)
            if left.end() == start
                && left.datafile == data.datafile
                && left.offset + left.bytes == data.offset
                && left.bytes + bytes <= EXTENT_BYTES_MAX =>
        {
            FileExtent {
                bytes: left.bytes + bytes,
                ..left
            }
        }
        _ => FileExtent {
            start,
            datafile: data.datafile,
            offset: data.offset,
            bytes,
        },
    };
    put(draft, ino, merged);
    if merged.end() >= inode.size {
        inode.tail = Some(merged.start);
    }
    inode.allocated += bytes;
    count_live(draft, data.datafile, i128::from(bytes))
}

/// Removes up to `limit` extents of a file that is going away; true when none is left.
pub(super) fn drain(
    draft: &mut Draft<'_>,
    ino: Ino,
    inode: &mut Inode,
    limit: usize,
) -> Result<bool, ApplyError> {
    if inode.allocated == 0 {
        return Ok(true);
    }
    inode.tail = None;
    let mut freed = BTreeMap::<DatafileId, u64>::new();
    for extent in overlapping(draft, ino, 0, u64::MAX, limit)? {
        *freed.entry(extent.datafile).or_default() += extent.bytes;
        draft.delete(extent_key(ino, extent.start));
    }
    release(draft, inode, &freed)?;
    Ok(inode.allocated == 0)
}
