//! Reading a whole datafile: what is valid, what is torn, what is damaged.
//!
//! Source: the rule of the module [`super`]: a frame proves that everything before its durable offset had reached the disk.

use super::frame::{
    ALIGNMENT, ALIGNMENT_STEP, FILE_HEADER_BYTES, FRAME_HEADER, FRAME_HEADER_BYTES, FrameHeader,
    has_magic,
};
use super::reader::Shared;
use super::{DatafileError, FrameParts, KIND_MARK, KIND_VOID};
use bytes::Bytes;

/// Bytes read at once while scanning.
const WINDOW_BYTES: usize = 1 << 20;
/// Bytes read at once while stepping over large frames.
const HEAD_BYTES: usize = 1024;
/// A frame as large as this is stepped over.
const LARGE_FRAME_BYTES: u64 = 32 << 10;

/// What happens to valid frames that stand behind a torn one (both were never known to be durable).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// They are cut too: what remains is a prefix of what was appended. For logs.
    Cut,
    /// They stay, the torn bytes are covered by a void frame. For stores whose frames are independent.
    Keep,
}

/// Bytes that were durable and do not verify now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Where they begin.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
    /// The frame's kind, if its header still verifies.
    pub kind: Option<u8>,
    /// Bytes of its payload, if its header still verifies.
    pub payload_bytes: Option<u32>,
    /// The payload's prefix, if it still verifies.
    pub prefix: Option<Bytes>,
}

/// What opening a datafile found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScanReport {
    /// Valid frames of users that remain.
    pub frames: u64,
    /// Where the next frame goes.
    pub length: u64,
    /// Bytes of the torn tail: never durable, cut (or voided).
    pub torn_bytes_cut: u64,
    /// Damage in what was durable. The frames behind it are readable.
    pub damaged: Vec<Damage>,
    /// The last valid frame is a mark: the file was completed and ends where it ended then.
    pub ends_marked: bool,
}

/// A valid frame, as shown while scanning.
#[derive(Debug, Clone, Copy)]
pub struct FrameView<'a> {
    /// Where it stands.
    pub offset: u64,
    /// The user's kind.
    pub kind: u8,
    /// How much of the payload is prefix.
    pub prefix_bytes: usize,
    /// The payload, prefix included.
    pub payload: &'a [u8],
}

/// What must be done to the file after the scan.
#[derive(Debug, Default)]
pub(super) struct Mend {
    truncate_to: Option<u64>,
    voids: Vec<(u64, u64)>,
    /// Everything in the file was known, and known to be durable, before the scan.
    nothing_new: bool,
}

impl Mend {
    /// Idempotent: a crash in between is mended by the next open.
    pub(super) fn carry_out(&self, shared: &Shared) -> Result<(), DatafileError> {
        for &(offset, end) in &self.voids {
            let payload = vec![0; usize::try_from(end - offset - FRAME_HEADER_BYTES).unwrap_or(0)];
            let header = FrameHeader::of(
                &FrameParts {
                    kind: KIND_VOID,
                    prefix: &[],
                    parts: &[&payload],
                },
                None,
                0,
            )?;
            let raw = header.encode(shared.header.salt, offset);
            shared
                .file
                .write_vectored_at(&[&raw, &payload], offset)
                .map_err(|source| shared.io("void the torn bytes of", source))?;
        }
        if let Some(length) = self.truncate_to {
            shared
                .file
                .truncate(length)
                .map_err(|source| shared.io("cut the torn tail of", source))?;
        }
        if self.nothing_new {
            return Ok(());
        }
        // Also when nothing was mended: what the scan found may so far be only in the page cache of a process that crashed.
        shared
            .file
            .sync_data()
            .map_err(|source| shared.io("sync", source))
    }
}

/// What stands at an offset.
#[derive(Debug)]
pub(super) enum Step {
    /// Nothing but zeros up to the end of the file, or the end itself.
    End,
    /// A valid frame.
    Frame { header: FrameHeader, end: u64 },
    /// Bytes that do not verify, up to the next frame header or the end of the file.
    Bad {
        end: u64,
        header: Option<FrameHeader>,
        prefix: Option<Bytes>,
    },
}

/// A moving view of the file.
#[derive(Debug)]
pub(super) struct Window {
    buffer: Vec<u8>,
    start: u64,
    end_of_file: u64,
    /// Bytes read at once.
    read_bytes: usize,
}

impl Window {
    pub(super) fn new(end_of_file: u64) -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            end_of_file,
            read_bytes: WINDOW_BYTES,
        }
    }

    /// Bytes `[offset, offset + bytes)`, fewer at the end of the file.
    fn view(&mut self, shared: &Shared, offset: u64, bytes: usize) -> Result<&[u8], DatafileError> {
        let wanted_end = (offset + bytes as u64).min(self.end_of_file);
        let have = self.start..self.start + self.buffer.len() as u64;
        if offset < have.start || wanted_end > have.end {
            let want = bytes.max(self.read_bytes) as u64;
            let take = want.min(self.end_of_file.saturating_sub(offset));
            let take = usize::try_from(take).unwrap_or(0);
            self.buffer.resize(take, 0);
            self.start = offset;
            if let Err(source) = shared.file.read_exact_at(&mut self.buffer, offset) {
                self.buffer.clear();
                return Err(shared.io("scan", source));
            }
        }
        Ok(self.held(
            offset,
            usize::try_from(wanted_end.saturating_sub(offset)).unwrap_or(0),
        ))
    }

    fn held(&self, offset: u64, bytes: usize) -> &[u8] {
        let at = usize::try_from(offset.saturating_sub(self.start)).unwrap_or(usize::MAX);
        self.buffer.get(at..at + bytes).unwrap_or_default()
    }

    /// The payload of the frame that [`Window::step`] has just returned.
    pub(super) fn payload(&self, header: &FrameHeader, offset: u64) -> &[u8] {
        self.held(offset + FRAME_HEADER_BYTES, header.payload_bytes as usize)
    }

    pub(super) fn step(&mut self, shared: &Shared, offset: u64) -> Result<Step, DatafileError> {
        if offset >= self.end_of_file {
            return Ok(Step::End);
        }
        let salt = shared.header.salt;
        let raw = self.view(shared, offset, FRAME_HEADER)?;
        if let Some(header) = FrameHeader::decode(raw, salt, offset) {
            let end = offset + header.frame_bytes();
            if end <= self.end_of_file {
                let whole = usize::try_from(end - offset).unwrap_or(0);
                let frame = self.view(shared, offset, whole)?;
                let from = FRAME_HEADER;
                let payload = &frame[from..from + header.payload_bytes as usize];
                // Of a void frame nothing is ever read.
                if header.kind == KIND_VOID || header.verify_payload(payload) {
                    return Ok(Step::Frame { header, end });
                }
                let prefix = header.verified_prefix(payload).map(Bytes::from);
                return Ok(Step::Bad {
                    end,
                    header: Some(header),
                    prefix,
                });
            }
        }
        if self.only_zeros_from(shared, offset)? {
            return Ok(Step::End);
        }
        if let Some(bad) = self.flipped_header(shared, offset)? {
            return Ok(bad);
        }
        let end = self.next_header(shared, offset + ALIGNMENT)?;
        Ok(Step::Bad {
            end,
            header: None,
            prefix: None,
        })
    }

    /// One flipped bit in a header must not hide which frame it was: its owner can then say what is lost.
    fn flipped_header(
        &mut self,
        shared: &Shared,
        offset: u64,
    ) -> Result<Option<Step>, DatafileError> {
        let raw = self.view(shared, offset, FRAME_HEADER)?;
        let told = FrameHeader::decode_flipped(raw, shared.header.salt, offset);
        let Some(header) = told.filter(|told| offset + told.frame_bytes() <= self.end_of_file)
        else {
            return Ok(None);
        };
        let end = offset + header.frame_bytes();
        if header.kind == KIND_VOID {
            return Ok(Some(Step::Frame { header, end }));
        }
        let prefix_bytes = usize::from(header.prefix_bytes);
        let prefix = self.view(shared, offset + FRAME_HEADER_BYTES, prefix_bytes)?;
        let prefix = header.verified_prefix(prefix).map(Bytes::from);
        Ok(Some(Step::Bad {
            end,
            header: Some(header),
            prefix,
        }))
    }

    /// As [`Window::step`], but of a frame only header and prefix are read and verified.
    pub(super) fn step_head(
        &mut self,
        shared: &Shared,
        offset: u64,
    ) -> Result<Step, DatafileError> {
        if offset + FRAME_HEADER_BYTES > self.end_of_file {
            return self.step(shared, offset);
        }
        let raw = self.view(shared, offset, FRAME_HEADER)?;
        let Some(header) = FrameHeader::decode(raw, shared.header.salt, offset) else {
            self.read_bytes = WINDOW_BYTES;
            return self.step(shared, offset);
        };
        let end = offset + header.frame_bytes();
        let prefix_bytes = usize::from(header.prefix_bytes);
        let end_of_file = self.end_of_file;
        let head = self.view(shared, offset, FRAME_HEADER + prefix_bytes)?;
        let whole = end <= end_of_file && head.len() == FRAME_HEADER + prefix_bytes;
        if !whole || !header.verify_prefix(&head[FRAME_HEADER..]) {
            return Ok(Step::Bad {
                end: end.min(self.end_of_file),
                header: Some(header),
                prefix: None,
            });
        }
        // Large frames are stepped over; of small ones many are in one window. A void one stands between large ones.
        self.read_bytes = match header.frame_bytes() {
            LARGE_FRAME_BYTES.. => HEAD_BYTES,
            _ if header.kind == KIND_VOID => self.read_bytes,
            _ => WINDOW_BYTES,
        };
        Ok(Step::Frame { header, end })
    }

    /// The prefix of the frame that [`Window::step_head`] has just returned.
    pub(super) fn prefix(&self, header: &FrameHeader, offset: u64) -> &[u8] {
        self.held(
            offset + FRAME_HEADER_BYTES,
            usize::from(header.prefix_bytes),
        )
    }

    fn only_zeros_from(&mut self, shared: &Shared, mut offset: u64) -> Result<bool, DatafileError> {
        while offset < self.end_of_file {
            let bytes = self.view(shared, offset, WINDOW_BYTES)?;
            if bytes.iter().any(|&byte| byte != 0) {
                return Ok(false);
            }
            offset += bytes.len() as u64;
        }
        Ok(true)
    }

    /// The next offset at which a frame header of this file verifies; the end of the file if there is none.
    fn next_header(&mut self, shared: &Shared, from: u64) -> Result<u64, DatafileError> {
        let salt = shared.header.salt;
        let mut offset = from;
        while offset + FRAME_HEADER_BYTES <= self.end_of_file {
            let bytes = self.view(shared, offset, WINDOW_BYTES)?;
            let mut at = 0;
            while at + FRAME_HEADER <= bytes.len() {
                let here = offset + at as u64;
                if has_magic(&bytes[at..])
                    && FrameHeader::decode(&bytes[at..], salt, here).is_some()
                {
                    return Ok(here);
                }
                at += ALIGNMENT_STEP;
            }
            offset += at as u64;
        }
        Ok(self.end_of_file)
    }
}

struct Bad {
    offset: u64,
    end: u64,
    header: Option<FrameHeader>,
    prefix: Option<Bytes>,
}

/// Scan the file from an offset (of a frame; everything before was verified earlier). Frames are shown in order; frames that will be
/// cut are not shown.
pub(super) fn scan(
    shared: &Shared,
    tail: Tail,
    from: u64,
    visit: &mut dyn FnMut(FrameView<'_>),
) -> Result<(ScanReport, Mend), DatafileError> {
    let end_of_file = shared
        .file
        .length()
        .map_err(|source| shared.io("measure", source))?;
    let mut window = Window::new(end_of_file);
    let mut report = ScanReport::default();
    let mut bad: Vec<Bad> = Vec::new();
    // Frames behind the first bad bytes: whether they stay is known only at the end.
    let mut undecided: Vec<(u64, FrameHeader)> = Vec::new();
    let mut offset = from.max(FILE_HEADER_BYTES);
    loop {
        match window.step(shared, offset)? {
            Step::End => break,
            Step::Frame { header, end } => {
                report.ends_marked = header.kind == KIND_MARK;
                if bad.is_empty() {
                    show(
                        &mut report,
                        visit,
                        &header,
                        offset,
                        window.payload(&header, offset),
                    );
                } else {
                    undecided.push((offset, header));
                }
                offset = end;
            }
            Step::Bad {
                end,
                header,
                prefix,
            } => {
                report.ends_marked = false;
                bad.push(Bad {
                    offset,
                    end,
                    header,
                    prefix,
                });
                offset = end;
            }
        }
    }
    let zeros_from = offset;
    let (length, mut mend) = judge(&mut report, bad, &undecided, tail, zeros_from);
    for (offset, header) in undecided {
        if offset < length {
            window.view(
                shared,
                offset,
                usize::try_from(header.frame_bytes()).unwrap_or(0),
            )?;
            show(
                &mut report,
                visit,
                &header,
                offset,
                window.payload(&header, offset),
            );
        }
    }
    report.length = length;
    mend.nothing_new = from > FILE_HEADER_BYTES && length == from && mend.truncate_to.is_none();
    Ok((report, mend))
}

fn show(
    report: &mut ScanReport,
    visit: &mut dyn FnMut(FrameView<'_>),
    header: &FrameHeader,
    offset: u64,
    payload: &[u8],
) {
    if matches!(header.kind, KIND_VOID | KIND_MARK) {
        return;
    }
    report.frames += 1;
    visit(FrameView {
        offset,
        kind: header.kind,
        prefix_bytes: usize::from(header.prefix_bytes),
        payload,
    });
}

/// Tell damage from torn bytes; returns the length that remains and what to mend.
fn judge(
    report: &mut ScanReport,
    bad: Vec<Bad>,
    later: &[(u64, FrameHeader)],
    tail: Tail,
    end: u64,
) -> (u64, Mend) {
    let mut mend = Mend::default();
    let mut length = end;
    // The last valid frame, and the furthest durable offset any of them proves.
    let last_valid = later.last().map_or(0, |(offset, _)| *offset);
    let proven = later.iter().map(|(_, h)| h.durable).max().unwrap_or(0);
    for region in bad {
        let bytes = region.end - region.offset;
        let torn = region.offset >= proven;
        let in_the_middle = region.offset < last_valid;
        if region.offset >= length {
            continue;
        }
        if torn && (!in_the_middle || tail == Tail::Cut) {
            report.torn_bytes_cut += end - region.offset;
            length = region.offset;
            mend.truncate_to = Some(length);
        } else if torn && bytes >= FRAME_HEADER_BYTES {
            report.torn_bytes_cut += bytes;
            mend.voids.push((region.offset, region.end));
        } else {
            report.damaged.push(Damage {
                offset: region.offset,
                bytes,
                kind: region.header.map(|header| header.kind),
                payload_bytes: region.header.map(|header| header.payload_bytes),
                prefix: region.prefix,
            });
        }
    }
    (length, mend)
}
