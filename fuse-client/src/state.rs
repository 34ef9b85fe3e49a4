//! Whose state directory it is, and that only one mount uses it.

use crate::error::MountError;
use crate::store::layout::StateDir;
use nix::fcntl::{Flock, FlockArg};
use qsfs_zstor::id::{ClientId, ClusterId, Epoch, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// A killed mount may need a moment to vanish: its lock is waited for so long.
const LOCK_WAIT: Duration = Duration::from_secs(3);
/// Time between looks at the lock. There is no event for it that has a deadline.
const LOCK_LOOK: Duration = Duration::from_millis(50);

/// `client.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientFile {
    /// Identity of this state directory; holder of leases.
    client: String,
    /// Cluster.
    cluster: String,
    /// Volume.
    volume_id: String,
    /// Its name when the file was written, for people.
    volume: String,
    /// Newest epoch under which the local state was complete. Records of a later epoch are another writer's.
    epoch: u64,
}

impl ClientFile {
    /// For a fresh state directory.
    pub fn new(
        client: ClientId,
        cluster: ClusterId,
        volume_id: VolumeId,
        volume: &VolumeName,
    ) -> Self {
        Self {
            client: client.to_string(),
            cluster: cluster.to_string(),
            volume_id: volume_id.to_string(),
            volume: volume.to_string(),
            epoch: 0,
        }
    }

    /// Holder of leases.
    pub fn client(&self, path: &Path) -> Result<ClientId, MountError> {
        self.client
            .parse()
            .map_err(|error: qsfs_zstor::id::IdError| malformed(path, &error.to_string()))
    }

    /// Newest epoch under which the local state was complete.
    pub const fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }

    /// Notes an epoch.
    pub const fn set_epoch(&mut self, epoch: Epoch) {
        self.epoch = epoch.0;
    }

    /// Refuses another cluster's or volume's state.
    pub fn check(
        &self,
        dir: &StateDir,
        cluster: ClusterId,
        volume: VolumeId,
    ) -> Result<(), MountError> {
        let wanted = [
            ("cluster", &self.cluster, cluster.to_string()),
            ("volume", &self.volume_id, volume.to_string()),
        ];
        for (what, found, wanted) in wanted {
            if *found != wanted {
                let path = dir.root().to_owned();
                return Err(MountError::Foreign {
                    path,
                    what,
                    found: found.clone(),
                    wanted,
                });
            }
        }
        Ok(())
    }

    /// Reads it; `None` when there is none.
    pub fn load(dir: &StateDir) -> Result<Option<Self>, MountError> {
        let path = dir.client_file();
        match std::fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text)
                .map(Some)
                .map_err(|error| malformed(&path, error.message())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io("read", &path, &error)),
        }
    }

    /// Writes it, durably, as a whole.
    pub fn save(&self, dir: &StateDir) -> Result<(), MountError> {
        let path = dir.client_file();
        let fresh = path.with_extension("toml.new");
        let text =
            toml::to_string_pretty(self).map_err(|error| malformed(&path, &error.to_string()))?;
        let write = || {
            let mut file = File::create(&fresh)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&fresh, &path)?;
            File::open(dir.root())?.sync_all()
        };
        write().map_err(|error| io("write", &path, &error))
    }
}

fn malformed(path: &Path, reason: &str) -> MountError {
    MountError::StateFile {
        step: "understand",
        path: path.to_owned(),
        reason: format!("{reason}; move the state directory away and mount with the recovery kit"),
    }
}

fn io(step: &'static str, path: &Path, error: &std::io::Error) -> MountError {
    MountError::StateFile {
        step,
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

/// Held while a mount uses the directory.
#[derive(Debug)]
pub struct StateLock {
    _lock: Flock<File>,
}

/// Makes the directory if needed (0700) and locks it. Blocking.
pub fn lock(dir: &StateDir) -> Result<StateLock, MountError> {
    let root = dir.root();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .map_err(|error| io("create", root, &error))?;
    let path = dir.lock();
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let file = file.map_err(|error| io("open", &path, &error))?;
    let deadline = Instant::now() + LOCK_WAIT;
    let mut file = file;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(StateLock { _lock: lock }),
            Err((same, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                file = same;
                std::thread::sleep(LOCK_LOOK);
            }
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                return Err(MountError::StateDirBusy(root.to_owned()));
            }
            Err((_, errno)) => return Err(io("lock", &path, &errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_second_mount_and_a_foreign_volume_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        let dir = StateDir::new(temp.path().join("state"));
        let held = lock(&dir).unwrap();
        assert!(matches!(lock(&dir), Err(MountError::StateDirBusy(_))));
        drop(held);
        drop(lock(&dir).unwrap());
        assert_eq!(ClientFile::load(&dir).unwrap(), None);
        let (cluster, volume) = (
            ClusterId::from_bytes([1; 16]),
            VolumeId::from_bytes([2; 16]),
        );
        let mut file = ClientFile::new(
            ClientId::from_bytes([3; 16]),
            cluster,
            volume,
            &"v".parse().unwrap(),
        );
        file.set_epoch(Epoch(7));
        file.save(&dir).unwrap();
        let loaded = ClientFile::load(&dir).unwrap().unwrap();
        assert_eq!(
            (loaded.epoch(), loaded.client(&dir.client_file()).unwrap()),
            (Epoch(7), ClientId::from_bytes([3; 16]))
        );
        loaded.check(&dir, cluster, volume).unwrap();
        assert!(
            loaded
                .check(&dir, cluster, VolumeId::from_bytes([9; 16]))
                .is_err()
        );
    }
}
