//! Reads of sealed data datafiles: a bounded number of open descriptors, every page verified.

use super::layout::StateDir;
use super::pages::{self, PAGE_BYTES};
use parking_lot::Mutex;
use qsfs_zdb::media::{Media, MediaFile, OpenMode};
use qsfs_zstor::id::DatafileId;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Descriptors (and checksum tables, 64 KiB for 64 MiB) held open at most.
pub const HANDLES_MAX: usize = 128;
/// Reads up to this size go through one aligned buffer; longer ones straight into the caller's.
const SCRATCH_BYTES_MAX: usize = 128 << 10;

/// Why local bytes cannot be given out.
#[derive(Debug, thiserror::Error)]
pub enum LocalReadError {
    /// They do not verify.
    #[error("{path} is damaged at byte {offset}: {what}", path = path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What does not verify.
        what: String,
    },
    /// The disk refused.
    #[error("read {path}: {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A sealed file, open, with its checksums.
#[derive(Debug)]
pub struct Handle {
    path: PathBuf,
    file: Box<dyn MediaFile>,
    bytes: u64,
    sums: Vec<u32>,
}

impl Handle {
    /// Opens a data datafile and the side file with its checksums.
    pub fn open(media: &Arc<dyn Media>, path: &Path, side: &Path) -> Result<Self, LocalReadError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| LocalReadError::Io { path, source }
        };
        let damaged = |path: &Path, what: String| LocalReadError::Damaged {
            path: path.to_owned(),
            offset: 0,
            what,
        };
        let raw = match media.open(side, OpenMode::Read) {
            Ok(file) => {
                let length =
                    usize::try_from(file.length().map_err(io(side))?).unwrap_or(usize::MAX);
                let mut raw = vec![0; length];
                file.read_exact_at(&mut raw, 0).map_err(io(side))?;
                raw
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged(side, "the page checksums are missing".to_owned()));
            }
            Err(error) => return Err(io(side)(error)),
        };
        let (bytes, sums) =
            pages::decode(&raw).map_err(|error| damaged(side, error.to_string()))?;
        let file = media.open(path, OpenMode::Read).map_err(io(path))?;
        let length = file.length().map_err(io(path))?;
        if length < bytes {
            return Err(damaged(
                path,
                format!("it holds {length} bytes, {bytes} were sealed"),
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            bytes,
            sums,
        })
    }

    /// Bytes of contents.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads and verifies.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), LocalReadError> {
        let sums = |pages: std::ops::Range<usize>| self.sums.get(pages).map(<[u32]>::to_vec);
        read_verified(
            &self.path,
            self.file.as_ref(),
            self.bytes,
            &sums,
            offset,
            buf,
        )
    }
}

/// Reads `buf` at `offset` of a file of `bytes` bytes; every page touched is verified against `sums` (which gives the
/// checksums of a range of pages).
pub fn read_verified(
    path: &Path,
    file: &dyn MediaFile,
    bytes: u64,
    sums: &dyn Fn(std::ops::Range<usize>) -> Option<Vec<u32>>,
    offset: u64,
    buf: &mut [u8],
) -> Result<(), LocalReadError> {
    let page = PAGE_BYTES as u64;
    let end = offset
        .checked_add(buf.len() as u64)
        .filter(|end| *end <= bytes);
    let Some(end) = end else {
        let what = format!(
            "{} bytes are wanted there, the file ends at {bytes}",
            buf.len()
        );
        return Err(LocalReadError::Damaged {
            path: path.to_owned(),
            offset,
            what,
        });
    };
    let (from, to) = (
        offset / page * page,
        end.div_ceil(page).saturating_mul(page).min(bytes),
    );
    let index = |at: u64| usize::try_from(at / page).unwrap_or(usize::MAX);
    let sums = sums(index(from)..index(to.div_ceil(page) * page)).unwrap_or_default();
    if sums.len() as u64 != (to - from).div_ceil(page) {
        let what = "its page checksums are incomplete".to_owned();
        return Err(LocalReadError::Damaged {
            path: path.to_owned(),
            offset,
            what,
        });
    }
    let read = |target: &mut [u8], at: u64, sums: &[u32]| -> Result<(), LocalReadError> {
        file.read_exact_at(target, at)
            .map_err(|source| match source.kind() {
                io::ErrorKind::UnexpectedEof => LocalReadError::Damaged {
                    path: path.to_owned(),
                    offset: at,
                    what: format!("its end is missing, {bytes} bytes were written"),
                },
                _ => LocalReadError::Io {
                    path: path.to_owned(),
                    source,
                },
            })?;
        pages::first_bad_page(target, sums).map_or(Ok(()), |bad| {
            let what = "a page does not match its checksum".to_owned();
            Err(LocalReadError::Damaged {
                path: path.to_owned(),
                offset: at + bad as u64,
                what,
            })
        })
    };
    let length = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    let skip = length(offset - from);
    if (from, to) == (offset, end) {
        return read(buf, from, &sums);
    }
    if length(to - from) <= SCRATCH_BYTES_MAX {
        let mut scratch = vec![0; length(to - from)];
        read(&mut scratch, from, &sums)?;
        buf.copy_from_slice(&scratch[skip..skip + buf.len()]);
        return Ok(());
    }
    // First page, whole pages, last page.
    let mut edge = [0; PAGE_BYTES];
    let head = if skip == 0 { 0 } else { PAGE_BYTES - skip };
    if head > 0 {
        read(&mut edge, from, &sums[..1])?;
        buf[..head].copy_from_slice(&edge[skip..]);
    }
    let first = usize::from(head > 0);
    let middle = (buf.len() - head) / PAGE_BYTES * PAGE_BYTES;
    let whole = middle / PAGE_BYTES;
    let at = from + (first * PAGE_BYTES) as u64;
    read(
        &mut buf[head..head + middle],
        at,
        &sums[first..first + whole],
    )?;
    let rest = buf.len() - head - middle;
    if rest > 0 {
        let at = at + middle as u64;
        let last = length(to - at);
        read(&mut edge[..last], at, &sums[first + whole..])?;
        buf[head + middle..].copy_from_slice(&edge[..rest]);
    }
    Ok(())
}

/// Open handles, least recently used out first.
#[derive(Debug)]
pub struct Handles {
    media: Arc<dyn Media>,
    open: Mutex<Open>,
}

/// A clock that counts uses, and every handle with the time of its last one.
type Open = (u64, HashMap<DatafileId, (u64, Arc<Handle>)>);

impl Handles {
    /// None open yet.
    pub fn new(media: Arc<dyn Media>) -> Self {
        Self {
            media,
            open: Mutex::default(),
        }
    }

    /// The handle of a file that lies at `path`.
    pub fn get(
        &self,
        dir: &StateDir,
        id: DatafileId,
        path: &Path,
    ) -> Result<Arc<Handle>, LocalReadError> {
        {
            let mut open = self.open.lock();
            open.0 += 1;
            let now = open.0;
            if let Some((used, handle)) = open.1.get_mut(&id) {
                *used = now;
                return Ok(Arc::clone(handle));
            }
        }
        let handle = Arc::new(Handle::open(&self.media, path, &dir.page_sums(id))?);
        let mut open = self.open.lock();
        let now = open.0;
        open.1.insert(id, (now, Arc::clone(&handle)));
        if open.1.len() > HANDLES_MAX {
            let oldest = open
                .1
                .iter()
                .min_by_key(|(_, (used, _))| *used)
                .map(|(id, _)| *id);
            oldest.and_then(|id| open.1.remove(&id));
        }
        Ok(handle)
    }

    /// Closes the handle of a file that goes away.
    pub fn forget(&self, id: DatafileId) {
        self.open.lock().1.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use qsfs_zdb::media::SimMedia;

    #[test]
    fn every_range_reads_equal_and_a_flipped_bit_is_found() {
        let sim = SimMedia::new();
        let media: Arc<dyn Media> = Arc::new(sim.clone());
        let dir = StateDir::new("/s");
        media.create_dir_all(&dir.datafiles()).unwrap();
        let path = dir.datafiles().join("file");
        let data: Vec<u8> = (0..300_000_u32)
            .map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1])
            .collect();
        let file = media.open(&path, OpenMode::CreateNew).unwrap();
        file.write_all_at(&data, 0).unwrap();
        let sums: Vec<u32> = data.chunks(PAGE_BYTES).map(crc32fast::hash).collect();
        let side = dir.page_sums(DatafileId(1));
        let raw = pages::encode(data.len() as u64, &sums);
        media
            .open(&side, OpenMode::CreateNew)
            .unwrap()
            .write_all_at(&raw, 0)
            .unwrap();
        let handle = Handle::open(&media, &path, &side).unwrap();
        for (from, to) in [
            (0, 300_000),
            (1, 300_000),
            (4096, 280_000),
            (4095, 4097),
            (5, 200_001),
            (299_999, 300_000),
            (7, 7),
        ] {
            let mut buf = vec![0; to - from];
            handle.read(from as u64, &mut buf).unwrap();
            assert!(buf == data[from..to], "{from}..{to}");
        }
        assert!(handle.read(299_999, &mut [0; 2]).is_err(), "past the end");
        sim.flip(&path, 150_000, 4);
        let damaged = |from: u64, bytes: usize| handle.read(from, &mut vec![0; bytes]).is_err();
        assert!(damaged(0, 300_000) && damaged(149_000, 2_000) && !damaged(0, 4_096));
    }
}
