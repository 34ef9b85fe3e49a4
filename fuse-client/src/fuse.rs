//! The FUSE adapter: the kernel's requests become calls of the filesystem core, and nothing more.
//!
//! ```text
//! kernel -- 4 worker threads --> Adapter -- inline -------> FileSystem
//!                                   |------ sync thread --> fsync (group commit of all that wait)
//!                                   '------ tokio --------> reads that need the network, writes that may wait
//! ```
//!
//! No worker ever waits for the network or for a disk to sync. The writer of a volume is alone, so the kernel may
//! keep names, attributes and pages for as long as it likes; a follower gives them a second.

mod adapter;
mod convert;
mod mountpoint;
mod opened;
mod syncer;
#[cfg(test)]
mod tests;

pub use mountpoint::{MountPoint, check_mount_point, is_mount_point};

use crate::filesystem::{Caller, FileSystem};
use crate::namespace::Time;
use adapter::Adapter;
use fuser::{BackgroundSession, Config, INodeNo, MountOption, Notifier, Session, SessionACL};
use nix::mount::MntFlags;
use opened::OpenedInodes;
use parking_lot::Mutex;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// Threads that answer the kernel.
const WORKER_THREADS: usize = 4;
/// The kernel's read-ahead per open file, once mounted.
const READ_AHEAD_KIB: u32 = 4096;
/// How long the kernel of an exclusive writer keeps names and attributes.
const WRITER_TTL: Duration = Duration::from_secs(24 * 3600);
/// The same for a follower, whose files change under it.
const FOLLOWER_TTL: Duration = Duration::from_secs(1);

/// What to mount where.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// An empty directory, see [`check_mount_point`].
    pub mount_point: PathBuf,
    /// Name of the volume, shown as `qsfs:NAME` in the mount table.
    pub volume: String,
}

/// Why it cannot be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mount point is of no use.
    #[error("cannot mount at {path}: {reason}")]
    MountPoint {
        /// Where.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// `/dev/fuse` or the helper is missing.
    #[error("cannot mount at {path}: {missing} is missing; {advice}")]
    Missing {
        /// Where.
        path: PathBuf,
        /// What is missing.
        missing: &'static str,
        /// What brings it.
        advice: &'static str,
    },
    /// The kernel or the helper refused.
    #[error("{step} {path}: {source}")]
    Io {
        /// Verb phrase.
        step: &'static str,
        /// Where.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// Files or working directories of some process are on it.
    #[error(
        "{0} is in use: close what is open there (`fuser -vm {0}` or `lsof {0}` names it) or unmount lazily"
    )]
    Busy(PathBuf),
}

/// A mounted filesystem. Dropping the last handle without unmounting unmounts too.
#[derive(Debug)]
pub struct MountHandle {
    mount_point: PathBuf,
    session: Mutex<Option<BackgroundSession>>,
    notifier: Notifier,
    opened: Arc<OpenedInodes>,
    filesystem: Arc<FileSystem>,
    ended: watch::Receiver<bool>,
}

/// The time and owner that the process itself acts with.
pub fn own_caller() -> Caller {
    Caller {
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
        now: convert::now(),
    }
}

/// The present, as operations carry it.
pub fn now() -> Time {
    convert::now()
}

/// Mounts. Returns when the mount is there and answers.
pub fn mount(
    options: &MountOptions,
    filesystem: Arc<FileSystem>,
    runtime: Handle,
) -> Result<MountHandle, MountError> {
    let mount_point = check_mount_point(&options.mount_point)?.path;
    let (ended_sender, ended) = watch::channel(false);
    let opened = Arc::new(OpenedInodes::default());
    let read_only = filesystem.is_read_only();
    let ttl = if read_only { FOLLOWER_TTL } else { WRITER_TTL };
    let io = |step: &'static str| {
        let path = mount_point.clone();
        move |source: std::io::Error| MountError::Io { step, path, source }
    };
    let adapter = Adapter::new(
        Arc::clone(&filesystem),
        runtime,
        ttl,
        Arc::clone(&opened),
        ended_sender,
    )
    .map_err(io("start the sync thread for"))?;
    let notify_slot = adapter.notifier_slot();
    let session = Session::new(adapter, &mount_point, &config(options, read_only))
        .map_err(|source| explain(&mount_point, source))?;
    let notifier = session.notifier();
    // Set once, before the first request is answered.
    let _ = notify_slot.set(notifier.clone());
    let session = session.spawn().map_err(io("start the workers for"))?;
    raise_read_ahead(&mount_point);
    Ok(MountHandle {
        mount_point,
        session: Mutex::new(Some(session)),
        notifier,
        opened,
        filesystem,
        ended,
    })
}

fn config(options: &MountOptions, read_only: bool) -> Config {
    let root = nix::unistd::geteuid().is_root();
    let mut mount_options = vec![
        MountOption::FSName(format!("qsfs:{}", options.volume)),
        // fuser hands `Subtype` only to the helper; the kernel understands the text as well.
        MountOption::CUSTOM("subtype=qsfs".into()),
        MountOption::DefaultPermissions,
        MountOption::NoAtime,
    ];
    if root {
        mount_options.extend([MountOption::Suid, MountOption::Dev]);
    }
    if read_only {
        mount_options.push(MountOption::RO);
    }
    let mut config = Config::default();
    config.mount_options = mount_options;
    config.acl = if root {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(WORKER_THREADS);
    config.clone_fd = true;
    config
}

/// Names what is missing on this machine, if that is the cause.
fn explain(mount_point: &Path, source: std::io::Error) -> MountError {
    let path = mount_point.to_path_buf();
    if !Path::new("/dev/fuse").exists() {
        return MountError::Missing {
            path,
            missing: "/dev/fuse",
            advice: "load the kernel module with `modprobe fuse`, or give the container the device /dev/fuse and CAP_SYS_ADMIN",
        };
    }
    let helper = [
        "/usr/bin/fusermount3",
        "/bin/fusermount3",
        "/usr/local/bin/fusermount3",
    ];
    let root = nix::unistd::geteuid().is_root();
    if !root && !helper.iter().any(|path| Path::new(path).exists()) {
        return MountError::Missing {
            path,
            missing: "fusermount3",
            advice: "only root mounts without it: install the package `fuse3`",
        };
    }
    MountError::Io {
        step: "mount at",
        path,
        source,
    }
}

/// Large requests make sequential reads fast; the kernel starts every mount at 128 KiB.
fn raise_read_ahead(mount_point: &Path) {
    let raise = || -> std::io::Result<()> {
        let device = std::fs::metadata(mount_point)?.dev();
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        std::fs::write(
            format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"),
            READ_AHEAD_KIB.to_string(),
        )
    };
    if let Err(error) = raise() {
        tracing::info!(%error, "read-ahead stays at the kernel's default: sequential reads are slower");
    }
}

impl MountHandle {
    /// Where it is mounted.
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    /// Unmounts. Fails with [`MountError::Busy`] while something is open there, unless `lazy`: then it vanishes
    /// from the tree at once and ends with the last open file.
    pub fn unmount(&self, lazy: bool) -> Result<(), MountError> {
        if *self.ended.borrow() {
            return Ok(());
        }
        let flags = if lazy {
            MntFlags::MNT_DETACH
        } else {
            MntFlags::empty()
        };
        match nix::mount::umount2(&self.mount_point, flags) {
            Ok(()) => Ok(()),
            // Gone already: somebody else unmounted it.
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
            Err(nix::errno::Errno::EBUSY) => Err(MountError::Busy(self.mount_point.clone())),
            Err(nix::errno::Errno::EPERM) => {
                mountpoint::unmount_with_helper(&self.mount_point, lazy)
            }
            Err(errno) => Err(MountError::Io {
                step: "unmount",
                path: self.mount_point.clone(),
                source: errno.into(),
            }),
        }
    }

    /// Completes when the mount has ended, whoever unmounted it, and no request is being answered any more.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // The sender lives in the session; if it is gone, so is the session.
        let _ = ended.wait_for(|&ended| ended).await;
    }

    /// Waits for the workers after the end; unmounts first if nobody did.
    pub fn join(&self) -> Result<(), MountError> {
        let Some(session) = self.session.lock().take() else {
            return Ok(());
        };
        session.join().map_err(|source| MountError::Io {
            step: "end the workers of",
            path: self.mount_point.clone(),
            source,
        })
    }

    /// Makes the kernel forget the pages of all files of this mount, so that what is read next is read from the
    /// filesystem. Answers the number of files. May wait for reads under way; not for a worker thread.
    pub fn drop_kernel_pages(&self) -> Result<usize, MountError> {
        let mut dropped = 0;
        let mut failed = None;
        let mut drop_pages = |ino: u64| match self.notifier.inval_inode(INodeNo(ino), 0, 0) {
            Ok(()) => dropped += 1,
            Err(error) => failed = Some(error),
        };
        match self.opened.all() {
            Some(inodes) => inodes.into_iter().for_each(&mut drop_pages),
            None => {
                let mut inodes = Vec::new();
                self.filesystem
                    .namespace()
                    .all_inodes(&mut |ino| inodes.push(ino.0))
                    .map_err(|error| MountError::Io {
                        step: "list the files of",
                        path: self.mount_point.clone(),
                        source: std::io::Error::other(error),
                    })?;
                inodes.into_iter().for_each(&mut drop_pages);
            }
        }
        match failed {
            Some(source) => Err(MountError::Io {
                step: "drop the kernel's pages of",
                path: self.mount_point.clone(),
                source,
            }),
            None => Ok(dropped),
        }
    }
}
