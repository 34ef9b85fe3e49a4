//! Whether a directory can be mounted on.

use super::MountError;
use nix::errno::Errno;
use nix::mount::MntFlags;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A directory that can be mounted on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Absolute, without symlinks.
    pub path: PathBuf,
    /// A dead mount of ours, left by a process that was killed, was detached from it.
    pub detached_dead_mount: bool,
}

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
struct MountLine {
    path: PathBuf,
    kind: String,
    source: String,
}

/// Something is mounted exactly at this directory, dead or alive.
pub fn is_mount_point(path: &Path) -> bool {
    resolve(path).is_ok_and(|absolute| mounted_at(&absolute).is_some())
}

/// Accepts an empty directory that nothing is mounted on. A dead mount of ours (its process was killed) is
/// detached first.
pub fn check_mount_point(path: &Path) -> Result<MountPoint, MountError> {
    let refuse = |reason: String| MountError::MountPoint {
        path: path.to_path_buf(),
        reason,
    };
    let absolute = resolve(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => refuse(format!(
            "there is no such directory; make it with `mkdir -p {}`",
            path.display()
        )),
        _ => refuse(error.to_string()),
    })?;
    let detached_dead_mount = detach_dead(&absolute)?;
    let metadata = std::fs::metadata(&absolute).map_err(|error| refuse(error.to_string()))?;
    if !metadata.is_dir() {
        return Err(refuse("it is not a directory".into()));
    }
    if let Some(line) = mounted_at(&absolute) {
        return Err(refuse(format!(
            "{} ({}) is mounted there already; unmount it with `qsfs umount {}` or choose another directory",
            line.source,
            line.kind,
            absolute.display()
        )));
    }
    let mut entries = std::fs::read_dir(&absolute).map_err(|error| refuse(error.to_string()))?;
    if entries.next().is_some() {
        return Err(refuse(
            "the directory is not empty; choose or make an empty one".into(),
        ));
    }
    Ok(MountPoint {
        path: absolute,
        detached_dead_mount,
    })
}

/// The absolute path, also if the last component is a dead mount.
fn resolve(path: &Path) -> std::io::Result<PathBuf> {
    match path.canonicalize() {
        Err(error) if error.raw_os_error() == Some(Errno::ENOTCONN as i32) => {
            let absolute = std::path::absolute(path)?;
            match (absolute.parent(), absolute.file_name()) {
                (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
                _ => Err(error),
            }
        }
        resolved => resolved,
    }
}

/// Asks with `statfs`, which the kernel never answers from memory: attributes it may know for a day.
pub(super) fn is_dead(path: &Path) -> bool {
    matches!(
        nix::sys::statfs::statfs(path),
        Err(Errno::ENOTCONN | Errno::ECONNABORTED)
    )
}

fn detach_dead(path: &Path) -> Result<bool, MountError> {
    if !is_dead(path) {
        return Ok(false);
    }
    let refuse = |reason: String| MountError::MountPoint {
        path: path.to_path_buf(),
        reason,
    };
    match mounted_at(path) {
        Some(line) if line.source.starts_with("qsfs:") => {
            tracing::warn!(
                path = %path.display(),
                source = line.source,
                "detaching a dead mount whose process was killed"
            );
        }
        Some(line) => {
            return Err(refuse(format!(
                "a dead mount of {} is there; detach it with `umount -l {}`",
                line.source,
                path.display()
            )));
        }
        None => return Err(refuse("a dead mount covers it".into())),
    }
    match nix::mount::umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) => Ok(true),
        Err(Errno::EPERM) => unmount_with_helper(path, true).map(|()| true),
        Err(errno) => Err(MountError::Io {
            step: "detach the dead mount at",
            path: path.to_path_buf(),
            source: errno.into(),
        }),
    }
}

/// Only root may unmount; others ask the helper that mounted.
pub(super) fn unmount_with_helper(path: &Path, lazy: bool) -> Result<(), MountError> {
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if lazy {
        command.arg("-z");
    }
    match command.arg("--").arg(path).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            if text.contains("busy") {
                return Err(MountError::Busy(path.to_path_buf()));
            }
            Err(MountError::Io {
                step: "unmount",
                path: path.to_path_buf(),
                source: std::io::Error::other(text.trim().to_owned()),
            })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(MountError::Missing {
            path: path.to_path_buf(),
            missing: "fusermount3",
            advice: "only root unmounts without it: install the package `fuse3`",
        }),
        Err(source) => Err(MountError::Io {
            step: "run fusermount3 for",
            path: path.to_path_buf(),
            source,
        }),
    }
}

/// The topmost mount at exactly this path.
fn mounted_at(path: &Path) -> Option<MountLine> {
    let table = std::fs::read("/proc/self/mountinfo").ok()?;
    parse(&table).into_iter().rfind(|line| line.path == path)
}

/// `id parent major:minor root MOUNT-POINT options [fields…] - TYPE SOURCE super-options`
fn parse(table: &[u8]) -> Vec<MountLine> {
    let lines = table.split(|&byte| byte == b'\n');
    lines
        .filter_map(|line| {
            let mut fields = line.split(|&byte| byte == b' ');
            let path = PathBuf::from(OsString::from_vec(unescape(fields.nth(4)?)));
            let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
            let text = |field: &[u8]| {
                std::ffi::OsStr::from_bytes(&unescape(field))
                    .to_string_lossy()
                    .into_owned()
            };
            Some(MountLine {
                path,
                kind: text(rest.next()?),
                source: text(rest.next()?),
            })
        })
        .collect()
}

/// Undoes the kernel's `\040` for a space and the like.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| byte == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(value) => {
                bytes.push(value);
                rest = &after[3..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn mount_lines_with_spaces_and_optional_fields_are_read() {
        let table = b"36 35 0:31 / /mnt/my\\040disk rw,noatime shared:1 master:2 - fuse.qsfs qsfs:dev rw,user_id=0\n";
        assert_eq!(
            parse(table),
            [MountLine {
                path: "/mnt/my disk".into(),
                kind: "fuse.qsfs".into(),
                source: "qsfs:dev".into(),
            }]
        );
    }

    #[test]
    fn what_cannot_be_mounted_on_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let reason = |path: &Path| check_mount_point(path).unwrap_err().to_string();
        assert!(reason(&dir.path().join("missing")).contains("mkdir -p"));
        let file = dir.path().join("file");
        std::fs::write(&file, b"").unwrap();
        assert!(reason(&file).contains("not a directory"));
        assert!(reason(dir.path()).contains("not empty"));
        assert!(reason(Path::new("/proc")).contains("mounted there already"));
        let good = dir.path().join("good");
        std::fs::create_dir(&good).unwrap();
        assert!(!check_mount_point(&good).unwrap().detached_dead_mount);
    }
}
