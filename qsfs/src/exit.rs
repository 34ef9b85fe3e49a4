//! Exit codes: what a script may decide by. The only place where they are chosen.

use anyhow::Error;
use qsfs_proto::api::MetadError;

/// All is well.
pub(crate) const OK: u8 = 0;
/// Something failed.
pub(crate) const ERROR: u8 = 1;
/// Findings remain.
pub(crate) const FINDINGS: u8 = 3;
/// No such volume.
pub(crate) const NO_SUCH_VOLUME: u8 = 10;
/// Another writer holds the volume, or took over.
pub(crate) const FENCED_OR_HELD: u8 = 11;
/// The kit or key is not the volume's.
pub(crate) const WRONG_KEY: u8 = 12;
/// No majority of metad answers.
pub(crate) const NO_QUORUM: u8 = 13;
/// The joined backends cannot meet the policy.
pub(crate) const POLICY_UNMET: u8 = 15;

/// A failure whose exit code is known where it happens.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(crate) struct Failure {
    code: u8,
    text: String,
}

impl Failure {
    /// One with this code.
    pub(crate) fn new(code: u8, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }
}

/// The exit code of an error: that of the first cause that has one.
pub(crate) fn code_of(error: &Error) -> u8 {
    error
        .chain()
        .find_map(|cause| {
            cause
                .downcast_ref::<Failure>()
                .map(|failure| failure.code)
                .or_else(|| cause.downcast_ref::<MetadError>().map(of_metad))
                .filter(|code| *code != ERROR)
        })
        .unwrap_or(ERROR)
}

/// The exit code of what metad says.
pub(crate) fn of_metad(error: &MetadError) -> u8 {
    match error {
        MetadError::NoSuchVolume(_) => NO_SUCH_VOLUME,
        MetadError::Held { .. } | MetadError::Fenced { .. } => FENCED_OR_HELD,
        MetadError::NoQuorum(_) | MetadError::Unreachable(_) => NO_QUORUM,
        MetadError::PolicyUnmet(_) => POLICY_UNMET,
        MetadError::VersionConflict { .. }
        | MetadError::NotFound(_)
        | MetadError::Exists(_)
        | MetadError::Denied(_)
        | MetadError::Token(_)
        | MetadError::Invalid(_)
        | MetadError::TooOld { .. }
        | MetadError::Busy(_)
        | MetadError::Unknown(_) => ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn a_cause_deep_in_the_chain_decides() {
        let error = Err::<(), _>(MetadError::NoSuchVolume("x".into()))
            .context("mounting")
            .context("again");
        assert_eq!(error.map_err(|error| code_of(&error)), Err(NO_SUCH_VOLUME));
    }

    #[test]
    fn everything_else_is_one() {
        assert_eq!(code_of(&anyhow::anyhow!("what")), ERROR);
        assert_eq!(code_of(&Failure::new(14, "shards").into()), 14);
    }
}
