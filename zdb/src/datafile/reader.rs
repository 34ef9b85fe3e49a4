//! What readers and syncers of a datafile share with its writer.

use super::frame::{
    FILE_HEADER_BYTES, FRAME_HEADER, FRAME_HEADER_BYTES, FileHeader, FileHeaderRead, FrameHeader,
    VERSION, frame_bytes,
};
use super::scan::{FrameView, ScanReport, Step, Tail, Window};
use super::{DatafileError, DatafileHeader, KIND_MARK, KIND_VOID};
use crate::media::{Media, MediaFile, OpenMode};
use bytes::Bytes;
use parking_lot::Mutex;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) file: Box<dyn MediaFile>,
    pub(super) path: PathBuf,
    pub(super) header: FileHeader,
    /// Where the next frame goes.
    pub(super) written: AtomicU64,
    /// Everything before is on disk.
    pub(super) durable: AtomicU64,
    stopped: AtomicBool,
    /// Held while syncing: the kernel tells a failed write-back to one of two that sync at once, and the other must not think that
    /// all is well.
    syncing: Mutex<()>,
}

impl Shared {
    pub(super) fn new(
        file: Box<dyn MediaFile>,
        path: &Path,
        header: FileHeader,
        length: u64,
    ) -> Self {
        Self {
            file,
            path: path.to_owned(),
            header,
            written: AtomicU64::new(length),
            durable: AtomicU64::new(length),
            stopped: AtomicBool::new(false),
            syncing: Mutex::new(()),
        }
    }

    pub(super) fn open(
        media: &Arc<dyn Media>,
        path: &Path,
        mode: OpenMode,
        expected: DatafileHeader,
    ) -> Result<Self, DatafileError> {
        let fail = |step| {
            move |source| DatafileError::Io {
                step,
                path: path.to_owned(),
                source,
            }
        };
        let file = media.open(path, mode).map_err(fail("open"))?;
        let bytes = file.length().map_err(fail("measure"))?;
        let no_header = |reason, never_born| DatafileError::NoHeader {
            path: path.to_owned(),
            reason,
            bytes,
            never_born,
        };
        if bytes < FILE_HEADER_BYTES {
            return Err(no_header("it is too short", true));
        }
        let mut raw = [0; 64];
        file.read_exact_at(&mut raw, 0)
            .map_err(fail("read the header of"))?;
        match FileHeader::decode(&raw) {
            FileHeaderRead::Valid(header) if header.header == expected => {
                Ok(Self::new(file, path, header, bytes))
            }
            FileHeaderRead::Valid(header) => Err(DatafileError::Foreign {
                path: path.to_owned(),
                found: header.header,
                expected,
            }),
            FileHeaderRead::OtherVersion(found) => Err(DatafileError::Version {
                path: path.to_owned(),
                found,
                known: VERSION,
            }),
            FileHeaderRead::Invalid(reason) => Err(no_header(reason, bytes == FILE_HEADER_BYTES)),
        }
    }

    pub(super) fn io(&self, step: &'static str, source: io::Error) -> DatafileError {
        DatafileError::Io {
            step,
            path: self.path.clone(),
            source,
        }
    }

    pub(super) fn check_running(&self) -> Result<(), DatafileError> {
        if self.stopped.load(Ordering::Acquire) {
            return Err(DatafileError::Stopped {
                path: self.path.clone(),
            });
        }
        Ok(())
    }

    pub(super) fn write_out(&self, offset: u64, length: u64) -> Result<(), DatafileError> {
        // The kernel tells of a failed write-back here or at the next sync, not at both.
        let _syncing = self.syncing.lock();
        self.check_running()?;
        self.file.write_out(offset, length).map_err(|source| {
            self.stop();
            self.io("write out", source)
        })
    }

    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    fn damaged(&self, offset: u64, bytes: u64) -> DatafileError {
        DatafileError::Damaged {
            path: self.path.clone(),
            offset,
            bytes,
        }
    }
}

/// A verified frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Where it stands.
    pub offset: u64,
    /// The user's kind.
    pub kind: u8,
    /// Its payload, prefix included.
    pub payload: Bytes,
}

impl Frame {
    /// Where the frame after it stands.
    pub fn next_offset(&self) -> u64 {
        self.offset + frame_bytes(self.payload.len() as u64)
    }
}

/// Reads frames; cheap to clone, works beside the writer.
#[derive(Debug, Clone)]
pub struct DatafileReader {
    shared: Arc<Shared>,
}

impl DatafileReader {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Read the frame at an offset.
    pub fn read(&self, offset: u64) -> Result<Frame, DatafileError> {
        let mut raw = [0; FRAME_HEADER];
        self.read_exact(offset, &mut raw)?;
        let header = FrameHeader::decode(&raw, self.shared.header.salt, offset)
            .ok_or_else(|| self.shared.damaged(offset, FRAME_HEADER_BYTES))?;
        self.read_sized(offset, header.payload_bytes)
    }

    /// Read the frame at an offset whose payload size is known: one read for header and payload.
    pub fn read_sized(&self, offset: u64, payload_bytes: u32) -> Result<Frame, DatafileError> {
        let mut buffer = super::buffers::take(FRAME_HEADER + payload_bytes as usize);
        self.read_exact(offset, buffer.bytes_mut())?;
        self.verified(offset, buffer)
    }

    /// As [`DatafileReader::read_sized`]; `None` if that would have to wait for the disk.
    pub(crate) fn read_cached(
        &self,
        offset: u64,
        payload_bytes: u32,
    ) -> Result<Option<Frame>, DatafileError> {
        let mut buffer = super::buffers::take(FRAME_HEADER + payload_bytes as usize);
        self.check_range(offset, buffer.as_ref().len() as u64)?;
        let wanted = buffer.as_ref().len();
        match self.shared.file.read_cached_at(buffer.bytes_mut(), offset) {
            Ok(Some(bytes)) if bytes == wanted => self.verified(offset, buffer).map(Some),
            // Part of it, an error: whoever waits for the disk finds out.
            Ok(_) | Err(_) => Ok(None),
        }
    }

    fn verified(
        &self,
        offset: u64,
        buffer: super::buffers::Buffer,
    ) -> Result<Frame, DatafileError> {
        let (raw, payload) = buffer.as_ref().split_at(FRAME_HEADER);
        let damaged = || self.shared.damaged(offset, buffer.as_ref().len() as u64);
        let header =
            FrameHeader::decode(raw, self.shared.header.salt, offset).ok_or_else(damaged)?;
        if !header.verify_payload(payload) {
            return Err(damaged());
        }
        Ok(Frame {
            offset,
            kind: header.kind,
            payload: buffer.freeze().slice(FRAME_HEADER..),
        })
    }

    fn check_range(&self, offset: u64, bytes: u64) -> Result<(), DatafileError> {
        let end = offset.checked_add(bytes);
        if offset < FILE_HEADER_BYTES
            || end.is_none_or(|end| end > self.shared.written.load(Ordering::Acquire))
        {
            return Err(DatafileError::NoFrame {
                path: self.shared.path.clone(),
                offset,
            });
        }
        Ok(())
    }

    fn read_exact(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DatafileError> {
        self.check_range(offset, buffer.len() as u64)?;
        match self.shared.file.read_exact_at(buffer, offset) {
            Ok(()) => Ok(()),
            // Shorter than it was: someone cut it, which is damage and not an I/O error.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.shared.damaged(offset, buffer.len() as u64))
            }
            Err(error) => Err(self.shared.io("read", error)),
        }
    }

    /// The frames from an offset (0 means from the first) on, up to what is written now.
    pub fn frames(&self, from: u64) -> Frames {
        let end = self.shared.written.load(Ordering::Acquire);
        Frames {
            window: Window::new(end),
            shared: Arc::clone(&self.shared),
            next: from.max(FILE_HEADER_BYTES),
        }
    }

    /// The heads of frames from an offset (0 means from the first) on, up to what is written now.
    pub(crate) fn heads(&self, from: u64) -> Heads {
        let end = self.shared.written.load(Ordering::Acquire);
        Heads {
            window: Window::new(end),
            shared: Arc::clone(&self.shared),
            next: from.max(FILE_HEADER_BYTES),
        }
    }

    /// Read and verify the whole file, changing nothing; valid frames are shown in order. Nobody may be writing.
    pub(crate) fn inspect(
        &self,
        visit: &mut dyn FnMut(FrameView<'_>),
    ) -> Result<ScanReport, DatafileError> {
        let (report, _) = super::scan::scan(&self.shared, Tail::Keep, FILE_HEADER_BYTES, visit)?;
        Ok(report)
    }

    /// The random number that tells this file from every other of its name.
    pub(crate) fn salt(&self) -> u32 {
        self.shared.header.salt
    }

    /// Bytes in use.
    pub fn len(&self) -> u64 {
        self.shared.written.load(Ordering::Acquire)
    }

    /// Does it hold no frame?
    pub fn is_empty(&self) -> bool {
        self.len() == FILE_HEADER_BYTES
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

/// Frames in order. Damage is one `Err`, after which the frames behind it follow.
#[derive(Debug)]
pub struct Frames {
    shared: Arc<Shared>,
    window: Window,
    next: u64,
}

impl Iterator for Frames {
    type Item = Result<Frame, DatafileError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let offset = self.next;
            match self.window.step(&self.shared, offset) {
                Ok(Step::End) => return None,
                Ok(Step::Frame { header, end, .. }) => {
                    self.next = end;
                    if matches!(header.kind, KIND_VOID | KIND_MARK) {
                        continue;
                    }
                    return Some(Ok(Frame {
                        offset,
                        kind: header.kind,
                        payload: Bytes::copy_from_slice(self.window.payload(&header, offset)),
                    }));
                }
                Ok(Step::Bad { end, .. }) => {
                    self.next = end;
                    return Some(Err(self.shared.damaged(offset, end - offset)));
                }
                Err(error) => {
                    self.next = u64::MAX;
                    return Some(Err(error));
                }
            }
        }
    }
}

/// What a frame says of itself without its payload being read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FrameHead<'a> {
    pub(crate) offset: u64,
    pub(crate) kind: u8,
    /// Verified.
    pub(crate) prefix: &'a [u8],
    /// Prefix included.
    pub(crate) payload_bytes: u32,
    /// CRC-32 of the payload behind the prefix, as the header says; the payload itself was not read.
    pub(crate) rest_crc: u32,
}

/// Heads of frames in order; the payloads are neither read nor verified.
#[derive(Debug)]
pub(crate) struct Heads {
    shared: Arc<Shared>,
    window: Window,
    next: u64,
}

impl Heads {
    /// The next head. Damage is one `Err`, after which the heads behind it follow.
    pub(crate) fn next(&mut self) -> Option<Result<FrameHead<'_>, DatafileError>> {
        let (header, offset) = loop {
            let offset = self.next;
            match self.window.step_head(&self.shared, offset) {
                Ok(Step::End) => return None,
                Ok(Step::Frame { header, end }) => {
                    self.next = end;
                    if !matches!(header.kind, KIND_VOID | KIND_MARK) {
                        break (header, offset);
                    }
                }
                Ok(Step::Bad { end, .. }) => {
                    self.next = end;
                    return Some(Err(self.shared.damaged(offset, end - offset)));
                }
                Err(error) => {
                    self.next = u64::MAX;
                    return Some(Err(error));
                }
            }
        };
        Some(Ok(FrameHead {
            offset,
            kind: header.kind,
            prefix: self.window.prefix(&header, offset),
            payload_bytes: header.payload_bytes,
            rest_crc: header.rest_crc(),
        }))
    }
}

/// Syncs the file without holding its writer.
#[derive(Debug, Clone)]
pub struct SyncHandle {
    shared: Arc<Shared>,
}

impl SyncHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Make everything appended before this call durable; returns the offset up to which it now is.
    pub fn sync(&self) -> Result<u64, DatafileError> {
        let _syncing = self.shared.syncing.lock();
        self.shared.check_running()?;
        let written = self.shared.written.load(Ordering::Acquire);
        if self.shared.durable.load(Ordering::Acquire) >= written {
            return Ok(written);
        }
        if let Err(source) = self.shared.file.sync_data() {
            // After a failed fsync the kernel may have dropped the dirty pages: a second try that "succeeds" would lie.
            self.shared.stop();
            return Err(self.shared.io("sync", source));
        }
        self.shared.durable.fetch_max(written, Ordering::AcqRel);
        Ok(written)
    }
}
