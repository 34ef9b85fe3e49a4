//! *The* append-only framed file: 0-db entries, the Raft log and the client's journal all use it.
//!
//! ```text
//! [file header, written twice][frame][frame]...[frame][zeros up to the preallocated length]
//! frame = 32-byte header, payload, zeros to the next multiple of 8
//! ```
//!
//! The byte rulers are in `docs/format.md`, section "zdb datafile".
//!
//! Invariants:
//! - A frame header's checksum covers the file's random salt and the frame's own offset, so a copy of a frame (in a payload, say)
//!   is never taken for one.
//! - Every frame says up to which offset the file was durable when it was written. Bytes that do not verify are therefore told
//!   apart at open: before a later frame's durable offset they are *damage* (reported, never dropped in silence); after it
//!   they are a *torn tail*, never acknowledged to anyone, and cut.
//! - A failed append leaves nothing behind; a failed sync stops the file for good ([`DatafileError::Stopped`]), because after it
//!   nobody knows what the disk holds.
//! - A frame is returned only if its checksums verify.

mod buffers;
mod frame;
mod layout;
mod reader;
mod scan;
#[cfg(test)]
mod tests;

pub(crate) use frame::frame_bytes;
pub use frame::{FRAME_HEADER_BYTES, FRAME_PAYLOAD_MAX, KIND_MARK, KIND_VOID};
pub(crate) use reader::FrameHead;
pub use reader::{DatafileReader, Frame, Frames, SyncHandle};
pub use scan::{Damage, FrameView, ScanReport, Tail};

use crate::media::{Media, OpenMode};
use frame::{FILE_HEADER_BYTES, FileHeader};
use layout::{Direct, Layout};
use reader::Shared;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What a datafile is for, and which one it is; checked at open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatafileHeader {
    /// Four letters naming the user of the file.
    pub purpose: [u8; 4],
    /// The user's number of the file.
    pub id: u64,
}

/// Why a datafile could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum DatafileError {
    /// The operating system refused.
    #[error("cannot {step} {path}: {source}", path = path.display())]
    Io {
        /// What was attempted.
        step: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file has no readable header. If it is also empty of frames it was being created when the machine stopped.
    #[error("{path} has no valid datafile header ({reason}); it holds {bytes} bytes", path = path.display())]
    NoHeader {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
        /// Its length. Up to 64 bytes, or all zeros: it never held a frame.
        bytes: u64,
        /// No byte of it can have held a frame: it may be removed.
        never_born: bool,
    },
    /// The file belongs to something else.
    #[error("{path} is not the expected datafile: it says purpose {found:?}, expected {expected:?}", path = path.display())]
    Foreign {
        /// Which file.
        path: PathBuf,
        /// What its header says.
        found: DatafileHeader,
        /// What was asked for.
        expected: DatafileHeader,
    },
    /// Written by a newer version of this software.
    #[error("{path} has datafile format version {found}; this program reads version {known}: use a newer program", path = path.display())]
    Version {
        /// Which file.
        path: PathBuf,
        /// The version it says.
        found: u32,
        /// The version this program knows.
        known: u32,
    },
    /// Bytes do not verify. They are never returned.
    #[error("{path} is damaged at byte {offset} ({bytes} bytes)", path = path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where the damage begins.
        offset: u64,
        /// How far it reaches.
        bytes: u64,
    },
    /// There is no frame at this offset.
    #[error("{path} has no frame at byte {offset}", path = path.display())]
    NoFrame {
        /// Which file.
        path: PathBuf,
        /// Where one was expected.
        offset: u64,
    },
    /// A payload larger than [`FRAME_PAYLOAD_MAX`].
    #[error("a frame of {bytes} bytes is larger than the limit")]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
    /// An earlier sync failed (or a failed append could not be undone): the file takes no more writes.
    #[error("{path} takes no more writes since an earlier write or sync of it failed; close and open it again once the disk is well", path = path.display())]
    Stopped {
        /// Which file.
        path: PathBuf,
    },
}

impl DatafileError {
    /// Is it a full disk?
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if crate::media::is_disk_full(source))
    }
}

/// One frame to append: `prefix` and `parts` one after the other are its payload.
#[derive(Debug, Clone, Copy)]
pub struct FrameParts<'a> {
    /// The user's kind, 1 to 239.
    pub kind: u8,
    /// The first bytes of the payload, with a checksum of their own: they stay readable when the rest is damaged.
    pub prefix: &'a [u8],
    /// The rest of the payload.
    pub parts: &'a [&'a [u8]],
}

/// What the header of a datafile says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identified {
    /// The random number that tells this file from every other of its name.
    pub(crate) salt: u32,
    /// Length of the file.
    pub(crate) bytes: u64,
}

/// The writing end of a datafile. One exists per file; readers and sync handles are cheap clones.
#[derive(Debug)]
pub struct Datafile {
    shared: Arc<Shared>,
    length: u64,
    allocated: u64,
    /// The file's length right after the last mark.
    marked_at: u64,
    direct: Direct,
}

impl Datafile {
    /// Make a new datafile, durable (name and header) when this returns.
    pub fn create(
        media: &Arc<dyn Media>,
        path: &Path,
        header: DatafileHeader,
    ) -> Result<Self, DatafileError> {
        let fail = |step| {
            move |source| DatafileError::Io {
                step,
                path: path.to_owned(),
                source,
            }
        };
        let file = media
            .open(path, OpenMode::CreateNew)
            .map_err(fail("create"))?;
        let file_header = FileHeader {
            header,
            salt: rand::random(),
        };
        file.write_all_at(&file_header.encode(), 0)
            .map_err(fail("write the header of"))?;
        file.sync_data().map_err(fail("sync"))?;
        if let Some(dir) = path.parent() {
            media.sync_dir(dir).map_err(fail("sync the directory of"))?;
        }
        Ok(Self::assemble(
            Shared::new(file, path, file_header, FILE_HEADER_BYTES),
            FILE_HEADER_BYTES,
        ))
    }

    /// Open for writing: scan, cut the torn tail, report damage. `expected.id` must agree too.
    pub fn open(
        media: &Arc<dyn Media>,
        path: &Path,
        expected: DatafileHeader,
    ) -> Result<(Self, ScanReport), DatafileError> {
        Self::open_visiting(media, path, expected, Tail::Cut, &mut |_| {})
    }

    /// Open for writing and show every valid frame, in order, to `visit` while scanning.
    pub fn open_visiting(
        media: &Arc<dyn Media>,
        path: &Path,
        expected: DatafileHeader,
        tail: Tail,
        visit: &mut dyn FnMut(FrameView<'_>),
    ) -> Result<(Self, ScanReport), DatafileError> {
        Self::open_behind(media, path, expected, tail, FILE_HEADER_BYTES, visit)
    }

    /// Open for writing as [`Datafile::open_visiting`] does, but scan only from an offset on: the caller knows that a frame begins
    /// there (or the file ends), that everything before it is durable, and what it is.
    pub(crate) fn open_behind(
        media: &Arc<dyn Media>,
        path: &Path,
        expected: DatafileHeader,
        tail: Tail,
        from: u64,
        visit: &mut dyn FnMut(FrameView<'_>),
    ) -> Result<(Self, ScanReport), DatafileError> {
        let shared = Shared::open(media, path, OpenMode::ReadWrite, expected)?;
        let (report, mend) = scan::scan(&shared, tail, from, visit)?;
        mend.carry_out(&shared)?;
        let length = report.length;
        shared.written.store(length, Ordering::Release);
        shared.durable.store(length, Ordering::Release);
        Ok((Self::assemble(shared, length), report))
    }

    /// Which file it is and how long, from its header alone.
    pub(crate) fn identify(
        media: &Arc<dyn Media>,
        path: &Path,
        expected: DatafileHeader,
    ) -> Result<Identified, DatafileError> {
        let shared = Shared::open(media, path, OpenMode::Read, expected)?;
        Ok(Identified {
            salt: shared.header.salt,
            bytes: shared.written.load(Ordering::Acquire),
        })
    }

    /// Look at a datafile without changing anything.
    pub fn inspect(
        media: &Arc<dyn Media>,
        path: &Path,
        expected: DatafileHeader,
        visit: &mut dyn FnMut(FrameView<'_>),
    ) -> Result<(DatafileReader, ScanReport), DatafileError> {
        let shared = Shared::open(media, path, OpenMode::Read, expected)?;
        let (report, _) = scan::scan(&shared, Tail::Cut, FILE_HEADER_BYTES, visit)?;
        shared.written.store(report.length, Ordering::Release);
        Ok((DatafileReader::new(Arc::new(shared)), report))
    }

    fn assemble(shared: Shared, length: u64) -> Self {
        Self {
            shared: Arc::new(shared),
            length,
            allocated: length,
            marked_at: 0,
            direct: Direct::default(),
        }
    }

    /// Append one frame; returns its offset. Durable after a sync that started later.
    pub fn append(&mut self, kind: u8, parts: &[&[u8]]) -> Result<u64, DatafileError> {
        let offset = self.length;
        self.append_batch(&[FrameParts {
            kind,
            prefix: &[],
            parts,
        }])?;
        Ok(offset)
    }

    /// Append frames; returns their offsets. All or none of them are in the file afterwards.
    pub fn append_batch(&mut self, frames: &[FrameParts<'_>]) -> Result<Vec<u64>, DatafileError> {
        for frame in frames {
            assert!(
                (1..=frame::KIND_USER_MAX).contains(&frame.kind),
                "frame kinds of users are 1 to 239"
            );
        }
        self.append_frames(frames, &[], false)
    }

    /// As [`Datafile::append_batch`], for frames the CRC-32 of whose parts (all of them, one after the other) is known already, each.
    /// The caller answers for it: a frame with a wrong one is damaged from the beginning. What is large goes past the page cache: for
    /// what is not read again soon.
    pub(crate) fn append_summed(
        &mut self,
        frames: &[FrameParts<'_>],
        rest_crcs: &[u32],
    ) -> Result<Vec<u64>, DatafileError> {
        assert_eq!(frames.len(), rest_crcs.len(), "one checksum for each frame");
        self.append_frames(frames, rest_crcs, true)
    }

    /// Write zeros behind what is in use, so that the next small appends change neither the file's length nor its blocks: their syncs
    /// then need not write the filesystem's journal. Durable with the next sync; advisory as [`Datafile::preallocate`].
    pub(crate) fn fill_ahead(&mut self, bytes: u64) -> Result<(), DatafileError> {
        self.shared.check_running()?;
        let from = self.allocated.max(self.length);
        let zeros = vec![0; usize::try_from(bytes).unwrap_or(0)];
        if let Err(source) = self.shared.file.write_all_at(&zeros, from) {
            self.undo_append();
            return Err(self.shared.io("fill", source));
        }
        self.allocated = from + bytes;
        Ok(())
    }

    /// Bytes behind what is in use that are filled or preallocated.
    pub(crate) fn ahead_bytes(&self) -> u64 {
        self.allocated.saturating_sub(self.length)
    }

    /// Give back what was filled or preallocated and not used.
    pub(crate) fn trim(&mut self) -> Result<(), DatafileError> {
        if self.allocated > self.length {
            self.shared
                .file
                .truncate(self.length)
                .map_err(|source| self.shared.io("trim", source))?;
            self.allocated = self.length;
        }
        Ok(())
    }

    /// Sync, then say so in the file: everything before the mark was durable. Call when a file is closed or complete; it makes the
    /// next open certain that what does not verify is damage and not a torn tail.
    pub fn mark(&mut self) -> Result<(), DatafileError> {
        self.sync()?;
        let mark = FrameParts {
            kind: KIND_MARK,
            prefix: &[],
            parts: &[],
        };
        self.append_frames(&[mark], &[], false)?;
        self.sync()
    }

    /// Say in the file that everything so far is durable, without a sync: for a file that is idle. Nothing happens if a mark stands
    /// there already or something is not durable yet.
    pub fn mark_idle(&mut self) -> Result<(), DatafileError> {
        let durable = self.shared.durable.load(Ordering::Acquire);
        if durable != self.length || self.marked_at == self.length {
            return Ok(());
        }
        let mark = FrameParts {
            kind: KIND_MARK,
            prefix: &[],
            parts: &[],
        };
        self.append_frames(&[mark], &[], false)?;
        // The mark itself is not durable, and need not be: losing it loses nothing.
        self.marked_at = self.length;
        Ok(())
    }

    /// `rest_crcs`: of the frames' parts, or nothing.
    fn append_frames(
        &mut self,
        frames: &[FrameParts<'_>],
        rest_crcs: &[u32],
        past_cache: bool,
    ) -> Result<Vec<u64>, DatafileError> {
        self.shared.check_running()?;
        let durable = self.shared.durable.load(Ordering::Acquire);
        let salt = self.shared.header.salt;
        let file = &*self.shared.file;
        let past_cache =
            past_cache && frames.iter().any(layout::is_large) && self.direct.is_there(file);
        let mut layout = Layout::new(self.length, salt, durable, past_cache);
        for (number, frame) in frames.iter().enumerate() {
            layout.push(frame, rest_crcs.get(number).copied())?;
        }
        if let Err(source) = layout.write(file, &mut self.direct) {
            self.undo_append();
            return Err(self.shared.io("append to", source));
        }
        self.length = layout.end;
        self.allocated = self.allocated.max(layout.end);
        self.shared.written.store(layout.end, Ordering::Release);
        Ok(layout.placed.iter().map(|placed| placed.offset).collect())
    }

    /// A partly written batch must not be found by a later scan behind the next, shorter frame.
    fn undo_append(&mut self) {
        let undone = self.shared.file.truncate(self.length);
        self.allocated = self.length;
        if let Err(error) = undone {
            tracing::error!(path = %self.shared.path.display(), %error, "cannot undo a failed append: the datafile stops");
            self.shared.stop();
        }
    }

    /// Reserve disk space for what is to come (extends the file with zeros). Advisory: an error leaves the file usable.
    pub fn preallocate(&mut self, bytes: u64) -> Result<(), DatafileError> {
        if bytes > self.allocated {
            self.shared
                .file
                .allocate(self.allocated, bytes - self.allocated)
                .map_err(|source| self.shared.io("preallocate", source))?;
            self.allocated = bytes;
        }
        Ok(())
    }

    /// Let what was appended from an offset on reach the disk, and wait for that. It is not durable before a sync, which then has little left
    /// to do. A failure stops the file, as a failed sync does.
    pub(crate) fn write_out(&self, from: u64) -> Result<(), DatafileError> {
        self.shared
            .write_out(from, self.length.saturating_sub(from))
    }

    /// Did a sync fail, or could a failed append not be undone? Nobody knows then what the disk holds.
    pub(crate) fn is_stopped(&self) -> bool {
        self.shared.check_running().is_err()
    }

    /// Make everything appended so far durable.
    pub fn sync(&self) -> Result<(), DatafileError> {
        self.sync_handle().sync().map(|_| ())
    }

    /// A handle to sync with while the writer goes on appending.
    pub fn sync_handle(&self) -> SyncHandle {
        SyncHandle::new(Arc::clone(&self.shared))
    }

    /// A handle to read with while the writer goes on appending.
    pub fn reader(&self) -> DatafileReader {
        DatafileReader::new(Arc::clone(&self.shared))
    }

    /// Read the frame at an offset.
    pub fn read(&self, offset: u64) -> Result<Frame, DatafileError> {
        self.reader().read(offset)
    }

    /// The frames from an offset (0 means from the first) on.
    pub fn frames(&self, from: u64) -> Frames {
        self.reader().frames(from)
    }

    /// Bytes in use: where the next frame goes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Does it hold no frame?
    pub fn is_empty(&self) -> bool {
        self.length == FILE_HEADER_BYTES
    }

    /// Purpose and id.
    pub fn header(&self) -> DatafileHeader {
        self.shared.header.header
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }
}
