//! What every metad tells the leader of itself, every second, together with its question of how far everything is committed
//! ([`super::freshness`]). As JSON, in which a program ignores what it does not know and leaves out what it cannot say.

use crate::backup::BackupState;
use crate::ground::Program;
use serde::{Deserialize, Serialize};

/// Highest level of commands that this program can apply. Raised together with a new command or a new meaning of an old one; the
/// leader proposes such only when every member has reached its level ([`cluster_level`]).
/// 2: the life of certificates is a setting.
pub const FEATURE_LEVEL: u32 = 2;

/// One node, by itself. Times in ms since the epoch; 0 is unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeFacts {
    /// Version of its program.
    pub program: String,
    /// Its [`FEATURE_LEVEL`].
    pub feature_level: u32,
    /// When it was started.
    pub started_ms: u64,
    /// Its backups of the metadata.
    pub backup: BackupState,
    /// Bytes that its data directory's disk has left.
    pub disk_free_bytes: u64,
    /// Bytes of that disk.
    pub disk_bytes: u64,
    /// When its certificate ends.
    pub certificate_expires_ms: u64,
    /// For how long that was made; 0: it does not say.
    pub certificate_life_ms: u64,
}

impl NodeFacts {
    /// Of a program.
    pub fn of(program: Program, started_ms: u64) -> Self {
        Self {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            feature_level: program.level,
            started_ms,
            ..Self::default()
        }
    }
}

/// The level that all members have reached. One that says nothing of itself (an older program, or not heard yet) has the first.
pub fn cluster_level(members: impl IntoIterator<Item = Option<u32>>) -> u32 {
    let levels = members.into_iter().map(|level| level.unwrap_or(1).max(1));
    levels.min().unwrap_or(1)
}

/// May a command of a level be proposed? If not, why, for people.
pub fn check_level(command: u32, cluster: u32) -> Result<(), String> {
    if command <= cluster {
        return Ok(());
    }
    Err(format!(
        "this needs feature level {command}, the metad nodes have reached {cluster} together: upgrade all of them first, one at a time"
    ))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn the_oldest_member_decides_and_a_silent_one_counts_as_oldest() {
        assert_eq!(cluster_level([Some(3), Some(2), Some(3)]), 2);
        assert_eq!(cluster_level([Some(3), None, Some(3)]), 1);
        assert_eq!(cluster_level([]), 1);
        assert_eq!(check_level(2, 2), Ok(()));
        assert!(
            check_level(3, 2)
                .unwrap_err()
                .contains("upgrade all of them first")
        );
    }

    #[test]
    fn older_and_newer_programs_are_understood() {
        let newer =
            r#"{"program":"9.0.0","feature_level":7,"mood":"good","backup":{"newest_ms":5}}"#;
        let facts: NodeFacts = serde_json::from_str(newer).unwrap();
        assert_eq!((facts.feature_level, facts.backup.newest_ms), (7, 5));
        assert_eq!(
            serde_json::from_str::<NodeFacts>("{}").unwrap(),
            NodeFacts::default()
        );
    }
}
