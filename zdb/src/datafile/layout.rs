//! Where frames go in a datafile, and in which writes.
//!
//! ```text
//! | ... frame | void | header, prefix, first bytes of the value | whole pages of the value | last bytes, padding | frame ...
//!               through the page cache                            past it                    through it
//! ```
//!
//! What goes through the page cache is copied, costs a page of it for every 4 KiB, and is written out from there later: four times the CPU
//! of what the disk takes from where it lies (245 and 59 us a MiB, ext4 on a virtual disk), and it drives out what others read. The
//! kernel takes bytes from where they lie only if they lie as they will in the file: at the same place within a page. A void frame in
//! front moves a value there; frames begin at multiples of 8, so memory and file have to agree within those.

use super::frame::{ALIGNMENT, FRAME_HEADER, FRAME_HEADER_BYTES, FrameHeader, KIND_VOID, padding};
use super::{DatafileError, FrameParts};
use crate::media::{MediaFile, PAGE_BYTES};
use std::io;
use std::ops::Range;

/// Smaller values go through the page cache: one write and one sync for many of them.
const LARGE_BYTES: usize = 256 << 10;

/// [`PAGE_BYTES`], of offsets.
const PAGE: u64 = PAGE_BYTES as u64;

/// The longest void frame that moves a value.
static ZEROS: [u8; PAGE_BYTES + FRAME_HEADER] = [0; PAGE_BYTES + FRAME_HEADER];

/// The way past the page cache of a file that is written.
#[derive(Debug, Default)]
pub(super) enum Direct {
    /// Nobody asked for it yet.
    #[default]
    Unknown,
    /// There is none.
    Missing,
    Open(Box<dyn MediaFile>),
}

impl Direct {
    /// Is there one? It is opened when a value is to go there for the first time.
    pub(super) fn is_there(&mut self, file: &dyn MediaFile) -> bool {
        if matches!(self, Self::Unknown) {
            *self = file.past_cache().map_or(Self::Missing, Self::Open);
            if matches!(self, Self::Missing) {
                tracing::debug!(
                    "large values go through the page cache: this filesystem has no way past it"
                );
            }
        }
        matches!(self, Self::Open(_))
    }

    fn write(&mut self, file: &dyn MediaFile, pages: &[u8], at: u64) -> io::Result<()> {
        if let Self::Open(direct) = self {
            match direct.write_all_at(pages, at) {
                // The filesystem wants more than whole pages.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    tracing::debug!(%error, "large values go through the page cache: this filesystem does not take them past it");
                    *self = Self::Missing;
                }
                written => return written,
            }
        }
        file.write_all_at(pages, at)
    }
}

/// Is there a value in a frame that is worth to go past the page cache?
pub(super) fn is_large(frame: &FrameParts<'_>) -> bool {
    frame.parts.len() == 1 && frame.parts[0].len() >= LARGE_BYTES
}

/// A frame with its place.
pub(super) struct Placed<'a> {
    /// The header of a void frame in front of it, and that one's payload.
    void: Option<([u8; FRAME_HEADER], &'static [u8])>,
    /// Where the frame itself begins.
    pub(super) offset: u64,
    header: [u8; FRAME_HEADER],
    frame: &'a FrameParts<'a>,
    /// What of its only part goes past the page cache.
    direct: Option<Range<usize>>,
}

/// Frames to be written together.
pub(super) struct Layout<'a> {
    salt: u32,
    /// The file is durable up to here.
    durable: u64,
    /// May values be moved to where they can go past the page cache?
    past_cache: bool,
    begin: u64,
    pub(super) end: u64,
    pub(super) placed: Vec<Placed<'a>>,
}

impl<'a> Layout<'a> {
    pub(super) fn new(begin: u64, salt: u32, durable: u64, past_cache: bool) -> Self {
        Self {
            salt,
            durable,
            past_cache,
            begin,
            end: begin,
            placed: Vec::new(),
        }
    }

    /// One more, behind the others. `rest_crc`: CRC-32 of its parts, if that is known.
    pub(super) fn push(
        &mut self,
        frame: &'a FrameParts<'a>,
        rest_crc: Option<u32>,
    ) -> Result<(), DatafileError> {
        let gap = if self.past_cache {
            gap_before(frame, self.end)
        } else {
            None
        };
        let void = match gap {
            Some(bytes @ 1..) => Some(self.void(bytes)?),
            _ => None,
        };
        let offset = self.end;
        let header = FrameHeader::of(frame, rest_crc, self.durable)?;
        self.end += header.frame_bytes();
        self.placed.push(Placed {
            void,
            offset,
            header: header.encode(self.salt, offset),
            frame,
            direct: gap.map(|_| whole_pages(frame.parts[0])),
        });
        Ok(())
    }

    /// A void frame of so many bytes, at the end.
    fn void(&mut self, bytes: usize) -> Result<([u8; FRAME_HEADER], &'static [u8]), DatafileError> {
        let payload = &ZEROS[..bytes - FRAME_HEADER];
        let frame = FrameParts {
            kind: KIND_VOID,
            prefix: &[],
            parts: &[payload],
        };
        let header = FrameHeader::of(&frame, None, self.durable)?.encode(self.salt, self.end);
        self.end += bytes as u64;
        Ok((header, payload))
    }

    /// Writes all of it, values through `direct` where they were moved for that. After an error any part of it may be there.
    pub(super) fn write(&self, file: &dyn MediaFile, direct: &mut Direct) -> io::Result<()> {
        let mut slices: Vec<&[u8]> = Vec::with_capacity(self.placed.len() * 4);
        let mut at = self.begin;
        for placed in &self.placed {
            if let Some((header, payload)) = &placed.void {
                slices.extend([&header[..], payload]);
            }
            slices.extend([&placed.header[..], placed.frame.prefix]);
            match &placed.direct {
                None => slices.extend_from_slice(placed.frame.parts),
                Some(pages) => {
                    let value = placed.frame.parts[0];
                    slices.push(&value[..pages.start]);
                    at += write_together(file, &mut slices, at)?;
                    direct.write(file, &value[pages.clone()], at)?;
                    at += pages.len() as u64;
                    slices.push(&value[pages.end..]);
                }
            }
            let parts = placed.frame.parts.iter().map(|part| part.len());
            let bytes = placed.frame.prefix.len() + parts.sum::<usize>();
            slices.push(padding(bytes as u64));
        }
        write_together(file, &mut slices, at)?;
        Ok(())
    }
}

/// Writes slices, which are empty then; how many bytes that were.
fn write_together(file: &dyn MediaFile, slices: &mut Vec<&[u8]>, at: u64) -> io::Result<u64> {
    let bytes: usize = slices.iter().map(|slice| slice.len()).sum();
    if bytes > 0 {
        file.write_vectored_at(slices, at)?;
    }
    slices.clear();
    Ok(bytes as u64)
}

/// Bytes of a void frame before one at this offset, so that its value lies in the file as it does in memory; `None` if it is too small to be
/// worth it, or cannot.
fn gap_before(frame: &FrameParts<'_>, offset: u64) -> Option<usize> {
    if !is_large(frame) {
        return None;
    }
    let value = frame.parts[0];
    let begins = offset + FRAME_HEADER_BYTES + frame.prefix.len() as u64;
    let forward = (value.as_ptr().addr() as u64).wrapping_sub(begins) % PAGE;
    let gap = match forward {
        1..FRAME_HEADER_BYTES => forward + PAGE,
        _ => forward,
    };
    (gap % ALIGNMENT == 0).then(|| usize::try_from(gap).unwrap_or(0))
}

/// The pages that lie wholly in a value.
fn whole_pages(value: &[u8]) -> Range<usize> {
    let before = value.as_ptr().addr().wrapping_neg() % PAGE_BYTES;
    let pages = value.len().saturating_sub(before) / PAGE_BYTES * PAGE_BYTES;
    before..before + pages
}

#[cfg(test)]
mod tests;
