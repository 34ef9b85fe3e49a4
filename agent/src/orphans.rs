//! Which keys of a backend belong to no record and may go, as a pure core.
//!
//! Deleting what is needed is the one mistake that cannot be mended, so a key goes only when *all* of this holds: its
//! volume has a record of it elsewhere or a later one without it; it was written longer ago than the grace (pieces
//! that are being pushed belong to no record yet); and it was seen as an orphan, at an earlier tour, longer ago than
//! the grace (a released datafile keeps its pieces for a while). Keys of unknown volumes and of datafiles later than
//! every record are left alone: metad may have been restored from a backup that is older than they are.

use crate::jobs::ShardKey;
use qsfs_zstor::id::BackendId;
use qsfs_zstor::record::EncodingRecord;
use std::collections::{BTreeMap, BTreeSet};

/// Least time between the first sight of an orphan and its deletion.
pub const ORPHAN_GRACE_MS: u64 = 24 * 3_600_000;
/// Orphans remembered between tours; what is more waits for a later tour.
pub const ORPHANS_MAX: usize = 65_536;

/// What metad knows of a stored shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// A record places it on this backend.
    Here,
    /// The record of this datafile has another salt, or places the shard elsewhere.
    Elsewhere,
    /// No record of this datafile, but of a later one of the volume.
    Released,
    /// Nothing later is known: the volume may be unknown, the datafile about to be committed, metad behind.
    Unknown,
}

/// What is claimed of a shard, from the record of its datafile (if any).
pub fn claim(
    key: &ShardKey,
    backend: BackendId,
    record: Option<&EncodingRecord>,
    later_record: bool,
) -> Claim {
    match record {
        Some(record) => {
            let slot = record.shards.get(key.shard as usize);
            if record.salt == key.salt && slot.is_some_and(|slot| slot.backend == backend) {
                Claim::Here
            } else {
                Claim::Elsewhere
            }
        }
        None if later_record => Claim::Released,
        None => Claim::Unknown,
    }
}

/// Orphans seen so far: shard, and when it was first seen as one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Orphans {
    first_seen_ms: BTreeMap<ShardKey, u64>,
}

impl Orphans {
    /// From what was saved.
    pub fn new(entries: impl IntoIterator<Item = (ShardKey, u64)>) -> Self {
        Self {
            first_seen_ms: entries.into_iter().take(ORPHANS_MAX).collect(),
        }
    }

    /// What is to be saved.
    pub fn entries(&self) -> impl Iterator<Item = (&ShardKey, u64)> {
        self.first_seen_ms.iter().map(|(key, seen)| (key, *seen))
    }

    /// One shard found in this tour, with the newest time one of its keys was set. True: delete it now.
    pub fn judge(
        &mut self,
        key: ShardKey,
        set_ms: u64,
        claim: Claim,
        now_ms: u64,
        grace_ms: u64,
    ) -> bool {
        if matches!(claim, Claim::Here | Claim::Unknown) {
            self.first_seen_ms.remove(&key);
            return false;
        }
        let full = self.first_seen_ms.len() >= ORPHANS_MAX;
        let seen_ms = match self.first_seen_ms.get(&key) {
            Some(seen_ms) => *seen_ms,
            None if full => return false,
            None => *self.first_seen_ms.entry(key).or_insert(now_ms),
        };
        let old = |since_ms: u64| since_ms.saturating_add(grace_ms) <= now_ms;
        old(seen_ms) && old(set_ms)
    }

    /// Is the shard one that was seen as an orphan?
    pub fn contains(&self, key: &ShardKey) -> bool {
        self.first_seen_ms.contains_key(key)
    }

    /// After a complete tour: what was not met any more is gone.
    pub fn keep_met(&mut self, met: &BTreeSet<ShardKey>) {
        self.first_seen_ms.retain(|key, _| met.contains(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::record;
    use proptest::prelude::*;
    use qsfs_zstor::id::Salt;

    fn any_claim() -> impl Strategy<Value = Claim> {
        prop_oneof![
            Just(Claim::Here),
            Just(Claim::Elsewhere),
            Just(Claim::Released),
            Just(Claim::Unknown)
        ]
    }

    #[test]
    fn a_shard_is_claimed_only_by_its_salt_and_place() {
        let record = record(5, 4);
        let key = ShardKey::of(&record, 2);
        assert_eq!(claim(&key, BackendId(2), Some(&record), true), Claim::Here);
        assert_eq!(
            claim(&key, BackendId(3), Some(&record), true),
            Claim::Elsewhere
        );
        let other = ShardKey {
            salt: Salt::from_bytes([9; 16]),
            ..key
        };
        assert_eq!(
            claim(&other, BackendId(2), Some(&record), true),
            Claim::Elsewhere
        );
        assert_eq!(claim(&key, BackendId(2), None, true), Claim::Released);
        assert_eq!(claim(&key, BackendId(2), None, false), Claim::Unknown);
    }

    proptest! {
        /// Naive model: the last unbroken run of orphan sightings must span the grace.
        #[test]
        fn only_what_was_an_orphan_for_the_whole_grace_is_deleted(
            set_ms in 0..100u64,
            grace in 1..50u64,
            tours in prop::collection::vec((1..40u64, any_claim()), 1..20),
        ) {
            let key = ShardKey::of(&record(1, 4), 0);
            let mut orphans = Orphans::default();
            let (mut now, mut run_began) = (0u64, None::<u64>);
            for (pause, claim) in tours {
                now += pause;
                let orphan = matches!(claim, Claim::Elsewhere | Claim::Released);
                run_began = orphan.then(|| run_began.unwrap_or(now));
                let wanted = run_began.is_some_and(|began| began + grace <= now) && set_ms + grace <= now;
                // A restart between tours changes nothing.
                orphans = Orphans::new(orphans.entries().map(|(key, seen)| (*key, seen)).collect::<Vec<_>>());
                prop_assert_eq!(orphans.judge(key, set_ms, claim, now, grace), wanted);
            }
        }
    }
}
