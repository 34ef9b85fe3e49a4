//! A node and the end of its disk: it does not start without room, and when it stops for want of room it says so.

use super::NodeError;
use nix::errno::Errno;
use nix::sys::statvfs::statvfs;
use std::io;
use std::path::Path;

/// Free bytes without which a node is not started. Opening log and state writes; what fails in the middle of that looks like damage.
const START_BYTES: u64 = 1 << 20;

/// Is there room to start?
pub(super) fn check(dir: &Path) -> Result<(), NodeError> {
    let found = statvfs(dir).map_err(|errno| NodeError::Io {
        step: "ask for the free space of",
        path: dir.to_owned(),
        source: errno.into(),
    })?;
    let free = found.blocks_available() * found.fragment_size();
    if free >= START_BYTES {
        return Ok(());
    }
    Err(NodeError::Full {
        path: dir.to_owned(),
        reason: format!("{free} bytes are free, and a start wants {START_BYTES}"),
    })
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

    #[test]
    fn a_start_asks_for_room_first() {
        let dir = tempfile::tempdir().unwrap();
        check(dir.path()).unwrap();
        let gone = check(&dir.path().join("gone"));
        assert!(matches!(gone, Err(NodeError::Io { .. })), "{gone:?}");
    }
}
