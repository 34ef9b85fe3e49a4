//! A node and the end of its disk: it does not start without room, and one that stops for want of room says so and waits.
//!
//! ```text
//! a write fails: no space --> Raft has stopped (nothing was acknowledged) --> waits, tells its peers --> there is room
//!     a start without room --> waits ----------------------------------------------------------^          |
//! the process begins anew (`qsfs metad serve` starts itself again in its place) <---------------------------+
//! ```
//!
//! Nothing goes on in the process that met the end of its disk: which of its files took what, only reading them again can tell. Waiting
//! is no more than keeping a person from having to start it again.

use super::{Core, NodeError};
use nix::errno::Errno;
use nix::sys::statvfs::statvfs;
use qsfs_zstor::id::MetadId;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Free bytes without which a node is not started. Opening log and state writes; what fails in the middle of that looks like damage.
const START_BYTES: u64 = 1 << 20;

/// Free bytes at which a node that stopped for want of them begins anew: two segments of the log, so that it does not stop again at once.
const RESUME_BYTES: u64 = 32 << 20;

/// Least time between the end of a disk and the next beginning.
const PAUSE: Duration = Duration::from_secs(5);

/// Between two looks at the disk, and between two words of it.
const LOOK: Duration = Duration::from_secs(1);
const SAY_EVERY: u32 = 60;

/// Free and all bytes of the disk under a directory.
fn space(dir: &Path) -> Result<(u64, u64), NodeError> {
    let found = statvfs(dir).map_err(|errno| NodeError::Io {
        step: "ask for the free space of",
        path: dir.to_owned(),
        source: errno.into(),
    })?;
    let bytes = |blocks: u64| blocks * found.fragment_size();
    Ok((bytes(found.blocks_available()), bytes(found.blocks())))
}

/// Waits until there is room to start.
pub(super) async fn to_start(dir: &Path, shutdown: &CancellationToken) -> Result<(), NodeError> {
    wait(dir, START_BYTES, shutdown, |_, _| {}).await
}

/// Waits until there is room to begin anew, and lets every peer know meanwhile, so that the status says what is the matter.
pub(super) async fn to_begin_anew(
    dir: &Path,
    core: &Core,
    shutdown: &CancellationToken,
) -> Result<(), NodeError> {
    let peers: Vec<(u64, String)> = {
        let metrics = core.raft.metrics();
        let metrics = metrics.borrow();
        let nodes = metrics.membership_config.nodes();
        let others = nodes.filter(|(id, _)| **id != metrics.id);
        others.map(|(id, node)| (*id, node.addr.clone())).collect()
    };
    let network = core.network.clone();
    wait(dir, RESUME_BYTES, shutdown, move |free, all| {
        network.change_own_facts(|facts| {
            facts.disk_free_bytes = free;
            facts.disk_bytes = all;
        });
        for (id, address) in peers.clone() {
            let network = network.clone();
            // Whoever does not lead says so, and has heard it all the same.
            tokio::spawn(async move {
                let told = network.read_index(MetadId(id), &address, LOOK).await;
                tracing::debug!(id, ?told, "a peer was told that the disk is full");
            });
        }
    })
    .await
}

/// Waits until there is room to begin anew, at least for a while: not every want of room can be seen (a quota, no inodes left).
pub(super) async fn to_resume(dir: &Path, shutdown: &CancellationToken) -> Result<(), NodeError> {
    tokio::select! {
        () = tokio::time::sleep(PAUSE) => {}
        () = shutdown.cancelled() => {}
    }
    wait(dir, RESUME_BYTES, shutdown, |_, _| {}).await
}

async fn wait(
    dir: &Path,
    wanted: u64,
    shutdown: &CancellationToken,
    tell: impl Fn(u64, u64),
) -> Result<(), NodeError> {
    for look in 0u32.. {
        let (free, all) = space(dir)?;
        if free >= wanted {
            if look > 0 {
                tracing::info!(dir = %dir.display(), free, "there is room again; this metad begins anew");
            }
            return Ok(());
        }
        if look % SAY_EVERY == 0 {
            tracing::error!(
                "the disk of {} is full ({free} bytes are free, {wanted} are wanted): this metad takes no part; make room on it, and it \
                 goes on by itself",
                dir.display()
            );
        }
        tell(free, all);
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = shutdown.cancelled() => break,
        }
    }
    Err(NodeError::Full {
        path: dir.to_owned(),
        reason: format!("less than {wanted} bytes are free"),
    })
}

/// Is it the end of a disk?
pub(super) fn is_full(error: &NodeError) -> bool {
    matches!(error, NodeError::Full { .. })
}

/// The error, as [`NodeError::Full`] if it came of that. By its text: openraft hands on nothing else of what its storage said.
pub(super) fn name(error: NodeError, dir: &Path) -> NodeError {
    let text = error.to_string();
    let full = |errno: Errno| text.contains(&io::Error::from(errno).to_string());
    if matches!(error, NodeError::Full { .. }) || !(full(Errno::ENOSPC) || full(Errno::EDQUOT)) {
        return error;
    }
    NodeError::Full {
        path: dir.to_owned(),
        reason: text,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::log::LogError;
    use std::path::PathBuf;

    #[test]
    fn an_end_for_want_of_room_says_where_and_what_to_do() {
        let dir = PathBuf::from("/data");
        let vote = "when Write Vote: write /data/log/vote: No space left on device (os error 28)";
        let errors = [
            NodeError::Raft(vote.into()),
            NodeError::Log(LogError::Io {
                step: "list",
                path: dir.clone(),
                source: io::Error::from(Errno::EDQUOT),
            }),
        ];
        for error in errors {
            let named = name(error, &dir);
            assert!(matches!(named, NodeError::Full { .. }), "{named}");
            let text = name(named, &dir).to_string();
            assert!(text.starts_with("the disk of /data is full ("), "{text}");
            assert!(text.contains("make room"), "{text}");
            assert_eq!(text.matches("is full").count(), 1, "{text}");
        }
        let other = NodeError::Raft("write /data/log/vote: Input/output error (os error 5)".into());
        assert!(matches!(name(other, &dir), NodeError::Raft(_)));
    }

    #[tokio::test]
    async fn a_start_waits_for_room_until_it_is_told_to_end() {
        let dir = tempfile::tempdir().unwrap();
        let shutdown = CancellationToken::new();
        to_start(dir.path(), &shutdown).await.unwrap();
        let gone = to_start(&dir.path().join("gone"), &shutdown).await;
        assert!(matches!(gone, Err(NodeError::Io { .. })), "{gone:?}");
        let said = std::cell::Cell::new(0);
        let more_than_there_is = wait(dir.path(), u64::MAX, &shutdown, |free, all| {
            assert!(free <= all);
            said.set(said.get() + 1);
            if said.get() == 2 {
                shutdown.cancel();
            }
        });
        let ended = more_than_there_is.await.unwrap_err();
        assert!(is_full(&ended), "{ended}");
        assert_eq!(said.get(), 2);
    }
}
