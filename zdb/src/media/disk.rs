//! The operating system's filesystem.

use super::{Identity, Media, MediaFile, MediaLock, OpenMode, Space};
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Parts of one `pwritev`; Linux allows 1024.
const VECTORED_PARTS_MAX: usize = 1024;

/// The operating system's filesystem.
#[derive(Debug, Clone, Copy, Default)]
pub struct DiskMedia;

#[derive(Debug)]
struct DiskFile(File);

#[derive(Debug)]
struct DiskLock {
    _file: File,
}

impl MediaLock for DiskLock {}

impl Media for DiskMedia {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn MediaFile>> {
        let mut options = OpenOptions::new();
        options.read(true).mode(0o600);
        match mode {
            OpenMode::Read => {}
            OpenMode::ReadWrite => {
                options.write(true);
            }
            OpenMode::CreateNew => {
                options.write(true).create_new(true);
            }
        }
        Ok(Box::new(DiskFile(options.open(path)?)))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let missing = path.ancestors().take_while(|dir| !dir.exists()).count();
        fs::create_dir_all(path)?;
        for parent in path.ancestors().skip(1).take(missing) {
            // `a` made in the working directory has the parent ``.
            let named = !parent.as_os_str().is_empty();
            self.sync_dir(if named { parent } else { Path::new(".") })?;
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            // A name that is not UTF-8 cannot be one of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn identity(&self, path: &Path) -> io::Result<Identity> {
        let metadata = fs::metadata(path)?;
        Ok(Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        let stat = nix::sys::statvfs::statvfs(path)?;
        let unit = stat.fragment_size();
        Ok(Space {
            total_bytes: stat.blocks().saturating_mul(unit),
            free_bytes: stat.blocks_available().saturating_mul(unit),
        })
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn MediaLock>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Box::new(DiskLock { _file: file })),
            Err(fs::TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

impl MediaFile for DiskFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn read_cached_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        let mut slices = [io::IoSliceMut::new(buffer)];
        let flags = rustix::io::ReadWriteFlags::NOWAIT;
        match rustix::io::preadv2(&self.0, &mut slices, offset, flags) {
            Ok(bytes) => Ok(Some(bytes)),
            // Not in memory, or a filesystem that cannot tell.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::OPNOTSUPP) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn past_cache(&self) -> Option<Box<dyn MediaFile>> {
        // By its descriptor: what has its name by now may be another file.
        let same = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_DIRECT);
        let opened = options.open(same).ok()?;
        Some(Box::new(DiskFile(opened)))
    }

    fn write_vectored_at(&self, parts: &[&[u8]], mut offset: u64) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> = parts
            .iter()
            .filter(|part| !part.is_empty())
            .map(|part| IoSlice::new(part))
            .collect();
        let mut rest = &mut slices[..];
        while !rest.is_empty() {
            let batch = rest.len().min(VECTORED_PARTS_MAX);
            let signed =
                i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            match nix::sys::uio::pwritev(&self.0, &rest[..batch], signed) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    offset += written as u64;
                    IoSlice::advance_slices(&mut rest, written);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn write_out(&self, offset: u64, length: u64) -> io::Result<()> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let offset = i64::try_from(offset).map_err(invalid)?;
        let length = i64::try_from(length).map_err(invalid)?;
        let flags = libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        #[expect(
            unsafe_code,
            reason = "sync_file_range has no safe form; it takes numbers and touches no memory of ours"
        )]
        // SAFETY: the descriptor is open as long as `self`.
        let done = unsafe { libc::sync_file_range(self.0.as_raw_fd(), offset, length, flags) };
        let error = io::Error::last_os_error();
        match (done, error.raw_os_error()) {
            // A filesystem that cannot do that does it at the next sync.
            (0, _) | (_, Some(libc::ENOSYS | libc::EOPNOTSUPP | libc::ESPIPE)) => Ok(()),
            _ => Err(error),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        nix::fcntl::fallocate(
            &self.0,
            nix::fcntl::FallocateFlags::empty(),
            i64::try_from(offset).map_err(invalid)?,
            i64::try_from(length).map_err(invalid)?,
        )?;
        Ok(())
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}
