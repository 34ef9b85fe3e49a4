//! Between the kernel's types and the filesystem's.

use crate::errno::errno;
use crate::filesystem::{Caller, FsError, TimeChange};
use crate::namespace::{Attributes, Ino, Time};
use fuser::{Errno, FileAttr, FileType, INodeNo, Request, TimeOrNow};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Preferred size of reads and writes: what stdio allocates as its buffer.
const BLOCK_BYTES: u32 = 64 << 10;

pub(super) fn now() -> Time {
    time_of(SystemTime::now())
}

/// Seconds rounded down and nanoseconds.
fn time_of(time: SystemTime) -> Time {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Time {
            seconds: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            nanos: after.subsec_nanos(),
        },
        Err(before) => {
            let before = before.duration();
            let seconds = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
            match before.subsec_nanos() {
                0 => Time {
                    seconds: -seconds,
                    nanos: 0,
                },
                nanos => Time {
                    seconds: -seconds - 1,
                    nanos: 1_000_000_000 - nanos,
                },
            }
        }
    }
}

/// fuser 0.18 decodes (-2 s, 800,000,000 ns), which is -1.2 s, as 2.8 s before 1970: it subtracts the nanoseconds
/// that POSIX adds. This takes the two numbers back out as they were.
fn requested_time(time: SystemTime) -> Time {
    match time.duration_since(UNIX_EPOCH) {
        Ok(_) => time_of(time),
        Err(before) => {
            let before = before.duration();
            Time {
                seconds: -i64::try_from(before.as_secs()).unwrap_or(i64::MAX),
                nanos: before.subsec_nanos(),
            }
        }
    }
}

pub(super) fn time_change(time: TimeOrNow) -> TimeChange {
    match time {
        TimeOrNow::Now => TimeChange::Now,
        TimeOrNow::SpecificTime(time) => TimeChange::At(requested_time(time)),
    }
}

fn system_time(time: Time) -> SystemTime {
    let whole = Duration::from_secs(time.seconds.unsigned_abs());
    let start = if time.seconds < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    start
        .and_then(|start| start.checked_add(Duration::from_nanos(u64::from(time.nanos))))
        .unwrap_or(UNIX_EPOCH)
}

pub(super) fn caller(request: &Request) -> Caller {
    Caller {
        uid: request.uid(),
        gid: request.gid(),
        now: now(),
    }
}

pub(super) fn ino(ino: INodeNo) -> Ino {
    Ino(ino.0)
}

pub(super) fn file_type(kind: u32) -> FileType {
    match kind {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFSOCK => FileType::Socket,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}

pub(super) fn file_attr(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.ino.0),
        size: attributes.size,
        blocks: attributes.allocated.div_ceil(512),
        atime: system_time(attributes.atime),
        mtime: system_time(attributes.mtime),
        ctime: system_time(attributes.ctime),
        crtime: system_time(attributes.btime),
        kind: file_type(attributes.kind()),
        perm: u16::try_from(attributes.mode & 0o7777).expect("twelve bits fit"),
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// Attributes with inode number 0 tell the kernel to remember that there is no such name.
pub(super) fn nothing() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

/// The errno for the kernel. What the user cannot see from it (EIO and the like) is logged here.
pub(super) fn answer(step: &'static str, error: &FsError) -> Errno {
    let errno = errno(error);
    match errno {
        nix::errno::Errno::EIO | nix::errno::Errno::ENOSPC => {
            tracing::warn!(step, %error, "request failed");
        }
        _ => tracing::trace!(step, %error, "request refused"),
    }
    Errno::from_i32(errno as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_keep_their_nanoseconds() {
        let time = Time {
            seconds: -2,
            nanos: 800_000_000,
        };
        assert_eq!(time_of(system_time(time)), time);
        // As fuser 0.18 hands it over.
        let handed = UNIX_EPOCH - Duration::new(2, 800_000_000);
        assert_eq!(requested_time(handed), time);
    }
}
