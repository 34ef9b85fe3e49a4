//! What is there when all faults are over and everybody answers: the end that a history must lead to.

use super::history::{HeadSeen, RecordSeen, VolumeSeen};
use qsfs_proto::api::Volume;
use qsfs_zstor::id::{BackendId, LocationName, NodeName, Salt};
use qsfs_zstor::placement::Site;
use qsfs_zstor::policy::Policy;
use qsfs_zstor::record::EncodingRecord;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One volume at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinalVolume {
    /// Its policy.
    pub policy: Policy,
    /// As a read sees it.
    pub seen: VolumeSeen,
    /// All its records, by datafile.
    pub records: Vec<EncodingRecord>,
    /// Datafiles that metad counts as below policy, where it was asked.
    pub below_policy: Option<u64>,
}

/// Where a backend is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendSite {
    /// Which.
    pub backend: BackendId,
    /// Location.
    pub location: LocationName,
    /// Node.
    pub node: NodeName,
}

/// What one node holds after having applied so much of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeHash {
    /// Its name.
    pub node: String,
    /// Index of the last applied entry.
    pub applied: u64,
    /// Hash of all rows.
    pub hash: String,
}

/// The whole end.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FinalState {
    /// By the key of the history.
    pub volumes: BTreeMap<String, FinalVolume>,
    /// All backends.
    pub backends: Vec<BackendSite>,
    /// State hashes, from any number of moments.
    pub nodes: Vec<NodeHash>,
}

impl FinalState {
    /// Where a backend is, as placement wants it.
    pub fn site(&self, id: BackendId) -> Option<Site> {
        let found = self.backends.iter().find(|at| at.backend == id)?;
        Some(Site {
            backend: found.backend,
            location: found.location.clone(),
            node: found.node.clone(),
        })
    }
}

/// A volume as a read of the history sees it.
pub fn volume_seen(volume: &Volume) -> VolumeSeen {
    VolumeSeen {
        epoch: volume.epoch.0,
        held: volume.lease.is_some(),
        head: HeadSeen {
            datafile: volume.head.datafile.0,
            recover_from: volume.head.recover_from.0,
        },
        quota_bytes: volume.settings.quota_bytes,
    }
}

/// A record as a listing of the history sees it.
pub fn record_seen(record: &EncodingRecord) -> RecordSeen {
    RecordSeen {
        datafile: record.datafile.0,
        attempt: attempt_of(&record.salt),
        version: record.version,
    }
}

/// The salt of an encoding attempt of the workload.
pub fn salt_of(attempt: u64) -> Salt {
    let mut bytes = [0; Salt::LEN];
    bytes[..8].copy_from_slice(&attempt.to_be_bytes());
    Salt::from_bytes(bytes)
}

/// The attempt a salt of the workload stands for.
pub fn attempt_of(salt: &Salt) -> u64 {
    let (first, _) = salt.as_bytes().split_at(8);
    first
        .iter()
        .fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn salts_name_their_attempt() {
        for attempt in [0, 1, 77, u64::MAX] {
            assert_eq!(attempt_of(&salt_of(attempt)), attempt);
        }
    }
}
