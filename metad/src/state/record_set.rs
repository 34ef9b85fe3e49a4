//! Sets of records as bits: the 64 neighbours of one volume take one word, so that a set of all of them stays small.

use qsfs_zstor::id::{DatafileId, VolumeId};
use std::collections::BTreeMap;

/// A record.
pub type RecordName = (VolumeId, DatafileId);

/// Datafiles in one word.
pub const RUN: u64 = 64;

/// The set. It is walked in the order of volumes and datafiles.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecordSet {
    runs: BTreeMap<(VolumeId, u64), u64>,
    len: usize,
}

fn place((volume, datafile): RecordName) -> ((VolumeId, u64), u64) {
    ((volume, datafile.0 / RUN), 1 << (datafile.0 % RUN))
}

impl RecordSet {
    /// Adds a record; false if it was there.
    pub fn insert(&mut self, name: RecordName) -> bool {
        let (run, bit) = place(name);
        let word = self.runs.entry(run).or_default();
        let new = *word & bit == 0;
        *word |= bit;
        self.len += usize::from(new);
        new
    }

    /// Takes a record out; false if it was not there.
    pub fn remove(&mut self, name: RecordName) -> bool {
        let (run, bit) = place(name);
        let Some(word) = self.runs.get_mut(&run) else {
            return false;
        };
        let there = *word & bit != 0;
        *word &= !bit;
        if *word == 0 {
            self.runs.remove(&run);
        }
        self.len -= usize::from(there);
        there
    }

    /// It is there.
    pub fn contains(&self, name: RecordName) -> bool {
        let (run, bit) = place(name);
        self.runs.get(&run).is_some_and(|word| word & bit != 0)
    }

    /// Adds all of another set.
    pub fn extend(&mut self, other: Self) {
        if self.runs.is_empty() {
            *self = other;
            return;
        }
        for (run, bits) in other.runs {
            let word = self.runs.entry(run).or_default();
            self.len += (bits & !*word).count_ones() as usize;
            *word |= bits;
        }
    }

    /// Takes out all of a volume.
    pub fn remove_volume(&mut self, volume: VolumeId) {
        let mut gone = self.runs.split_off(&(volume, 0));
        // The last run of datafile numbers is below this.
        let mut behind = gone.split_off(&(volume, u64::MAX));
        let bits = gone.values().map(|word| word.count_ones() as usize);
        self.len -= bits.sum::<usize>();
        self.runs.append(&mut behind);
    }

    /// Takes the first `max` out.
    pub fn take_first(&mut self, max: usize) -> Vec<RecordName> {
        let first: Vec<_> = self.iter().take(max).collect();
        for name in &first {
            self.remove(*name);
        }
        first
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = RecordName> {
        self.runs.iter().flat_map(|((volume, run), word)| {
            let bits = (0..RUN).filter(move |bit| word >> bit & 1 == 1);
            bits.map(move |bit| (*volume, DatafileId(run * RUN + bit)))
        })
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.len
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn name() -> impl Strategy<Value = RecordName> {
        (0u8..2, 0u64..200).prop_map(|(v, d)| (VolumeId::from_bytes([v; 16]), DatafileId(d)))
    }

    proptest! {
        #[test]
        fn it_is_a_set(
            ops in prop::collection::vec((any::<bool>(), name()), 0..300),
            more in prop::collection::vec(name(), 0..50),
            max in 0usize..40,
        ) {
            let (mut set, mut model) = (RecordSet::default(), BTreeSet::new());
            for (insert, name) in ops {
                if insert {
                    prop_assert_eq!(set.insert(name), model.insert(name));
                } else {
                    prop_assert_eq!(set.remove(name), model.remove(&name));
                }
            }
            let mut other = RecordSet::default();
            for name in more {
                other.insert(name);
                model.insert(name);
            }
            set.extend(other);
            prop_assert_eq!(set.len(), model.len());
            prop_assert!(set.iter().eq(model.iter().copied()));
            for name in set.take_first(max) {
                prop_assert_eq!(model.pop_first(), Some(name));
                prop_assert!(!set.contains(name));
            }
            let gone = VolumeId::from_bytes([0; 16]);
            set.remove_volume(gone);
            model.retain(|(volume, _)| *volume != gone);
            prop_assert!(set.iter().eq(model.iter().copied()));
            prop_assert_eq!(set.len(), model.len());
        }
    }
}
