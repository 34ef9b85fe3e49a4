//! The one place where an error becomes an errno.

use crate::filesystem::FsError;
use crate::namespace::ApplyError;
use crate::ports::StoreError;
use nix::errno::Errno;

/// The errno that a system call fails with.
pub fn errno(error: &FsError) -> Errno {
    match error {
        FsError::NotFound => Errno::ENOENT,
        FsError::NotDirectory => Errno::ENOTDIR,
        FsError::IsDirectory => Errno::EISDIR,
        FsError::NameTooLong => Errno::ENAMETOOLONG,
        FsError::Invalid(_) | FsError::NotRegular => Errno::EINVAL,
        FsError::TooBig => Errno::EFBIG,
        FsError::NoDataThere => Errno::ENXIO,
        FsError::NoXattr => Errno::ENODATA,
        FsError::NotSupported(_) => Errno::EOPNOTSUPP,
        FsError::NotPermitted(_) => Errno::EPERM,
        FsError::ReadOnly(_) => Errno::EROFS,
        FsError::Apply(error) => apply(error),
        FsError::Store(error) => store(error),
        FsError::Namespace(_) => Errno::EIO,
    }
}

fn apply(error: &ApplyError) -> Errno {
    match error {
        ApplyError::NotFound => Errno::ENOENT,
        ApplyError::Exists => Errno::EEXIST,
        ApplyError::NotDirectory => Errno::ENOTDIR,
        ApplyError::IsDirectory => Errno::EISDIR,
        ApplyError::NotEmpty => Errno::ENOTEMPTY,
        ApplyError::TooManyLinks => Errno::EMLINK,
        ApplyError::Loop | ApplyError::NotRegular => Errno::EINVAL,
        ApplyError::TooBig => Errno::EFBIG,
        ApplyError::LinkToDirectory => Errno::EPERM,
        ApplyError::NoXattr => Errno::ENODATA,
        ApplyError::TooManyXattrs => Errno::ENOSPC,
        ApplyError::Inconsistent(_) | ApplyError::Table(_) => Errno::EIO,
    }
}

fn store(error: &StoreError) -> Errno {
    match error {
        StoreError::NoSpace(_) => Errno::ENOSPC,
        StoreError::Fenced(_) | StoreError::ReadOnly => Errno::EROFS,
        StoreError::Unavailable { .. } | StoreError::Damaged { .. } | StoreError::Io { .. } => {
            Errno::EIO
        }
    }
}
