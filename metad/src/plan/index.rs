//! What is wrong with which record, kept up from what apply touched, so that no heartbeat ever walks all records.
//!
//! A change of a backend assesses the records on that backend; a change of a record assesses that record. Both in small steps
//! ([`Index::advance`]): there may be millions, and neither applies nor agents wait for them.

use super::assess::{Assessment, assess};
use super::facts::RecordName;
use crate::placing::SiteMap;
use crate::state::kv::{Kv, KvError};
use crate::state::record_set::{RUN, RecordSet};
use crate::state::{State, Touched};
use qsfs_proto::api::{Backend, ClusterSettings, Volume};
use qsfs_proto::status::LossBudget;
use qsfs_zstor::id::{BackendId, DatafileId, VolumeId};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Bound;

/// Records assessed at once.
pub const PAGE: usize = 256;

/// Backends that changed and hold so great a part of all shards (one in so many records) make a round over all records.
const ROUND_SHARE: u64 = 4;

/// Reasons kept of records that are set aside.
const REASONS_MAX: usize = 1_024;

/// Sums of a volume's assessments.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VolumeHealth {
    /// Records whose rules do not hold now.
    pub below_policy: u64,
    /// Records with fewer than `k` readable shards.
    pub unreadable: u64,
    /// Records by what they survive.
    locations: BTreeMap<u32, u64>,
    nodes: BTreeMap<u32, u64>,
    backends: BTreeMap<u32, u64>,
}

impl VolumeHealth {
    /// What any record of the volume survives; `None` without records.
    pub fn budget(&self) -> Option<LossBudget> {
        let least = |counts: &BTreeMap<u32, u64>| counts.keys().next().copied();
        Some(LossBudget {
            locations: least(&self.locations)?,
            nodes: least(&self.nodes)?,
            backends: least(&self.backends)?,
        })
    }

    fn count(&mut self, one: &Assessment, add: bool) {
        let step = |sum: &mut u64, yes: bool| match (yes, add) {
            (true, true) => *sum += 1,
            (true, false) => *sum -= 1,
            _ => {}
        };
        step(&mut self.below_policy, one.below_policy);
        step(&mut self.unreadable, one.unreadable);
        let budget = one.budget;
        for (counts, value) in [
            (&mut self.locations, budget.locations),
            (&mut self.nodes, budget.nodes),
            (&mut self.backends, budget.backends),
        ] {
            let sum = counts.entry(value).or_default();
            step(sum, true);
            if *sum == 0 {
                counts.remove(&value);
            }
        }
    }
}

/// The assessments of all records. There are few different ones, so a record holds the number of its own: some three bytes each.
#[derive(Debug, Default)]
struct Assessments {
    kinds: Vec<Assessment>,
    numbers: HashMap<Assessment, u32>,
    runs: BTreeMap<(VolumeId, u64), Run>,
}

/// Neighbours, as in a [`RecordSet`].
#[derive(Debug, Default)]
struct Run {
    /// Which of them there are.
    there: u64,
    /// Theirs, in order.
    kinds: Vec<u32>,
}

impl Assessments {
    fn number(&mut self, one: Assessment) -> u32 {
        let next = u32::try_from(self.kinds.len()).expect("a few thousand are possible");
        let number = *self.numbers.entry(one).or_insert(next);
        if number == next {
            self.kinds.push(one);
        }
        number
    }

    fn get(&self, (volume, datafile): RecordName) -> Option<Assessment> {
        let run = self.runs.get(&(volume, datafile.0 / RUN))?;
        let bit = 1u64 << (datafile.0 % RUN);
        let at = (run.there & (bit - 1)).count_ones() as usize;
        (run.there & bit != 0).then(|| self.kinds[run.kinds[at] as usize])
    }

    /// Sets or removes one; answers what was there.
    fn set(
        &mut self,
        (volume, datafile): RecordName,
        new: Option<Assessment>,
    ) -> Option<Assessment> {
        let number = new.map(|new| self.number(new));
        let key = (volume, datafile.0 / RUN);
        if number.is_none() && !self.runs.contains_key(&key) {
            return None;
        }
        let run = self.runs.entry(key).or_default();
        let bit = 1u64 << (datafile.0 % RUN);
        let at = (run.there & (bit - 1)).count_ones() as usize;
        let old = (run.there & bit != 0).then(|| run.kinds[at]);
        match (old, number) {
            (None, Some(number)) => run.kinds.insert(at, number),
            (Some(_), Some(number)) => run.kinds[at] = number,
            (Some(_), None) => drop(run.kinds.remove(at)),
            (None, None) => {}
        }
        match number {
            Some(_) => run.there |= bit,
            None => run.there &= !bit,
        }
        if run.there == 0 {
            self.runs.remove(&key);
        }
        old.map(|old| self.kinds[old as usize])
    }

    /// Removes all of a volume; answers what was there, with how often.
    fn remove_volume(&mut self, volume: VolumeId) -> BTreeMap<u32, u64> {
        let mut gone = self.runs.split_off(&(volume, 0));
        let mut behind = gone.split_off(&(volume, u64::MAX));
        self.runs.append(&mut behind);
        let mut counts = BTreeMap::new();
        for number in gone.into_values().flat_map(|run| run.kinds) {
            *counts.entry(number).or_default() += 1;
        }
        counts
    }
}

/// A shard in the order of a backend.
type PlacedShard = (VolumeId, DatafileId, u32);

/// A round over all records. A change on the way does not begin it anew: it goes on to where it was when the change came.
#[derive(Debug, Default, Clone, Copy)]
struct Round {
    /// What was looked at last.
    at: Option<RecordName>,
    /// The round began here: behind the end it begins again and goes on to this one.
    until: Option<RecordName>,
    /// It came to the end and began again.
    again: bool,
}

impl Round {
    fn at_the_end(self) -> Option<Self> {
        let again = self.until.is_some() && !self.again;
        again.then_some(Self {
            at: None,
            again: true,
            ..self
        })
    }
}

/// The index.
#[derive(Debug, Default)]
pub struct Index {
    sites: SiteMap,
    settings: ClusterSettings,
    volumes: BTreeMap<VolumeId, Volume>,
    assessments: Assessments,
    health: BTreeMap<VolumeId, VolumeHealth>,
    /// Records to look at, by spare shards.
    work: BTreeMap<i8, RecordSet>,
    /// Records that need work that cannot be done with the backends there are; looked at again when those change.
    stuck: RecordSet,
    /// Why, for the first of them.
    reasons: BTreeMap<RecordName, String>,
    pending_shards: u64,
    bad_shards: u64,
    /// Records to assess again.
    changed: RecordSet,
    /// Backends whose records are to be assessed again, from behind a shard on.
    rescans: VecDeque<(BackendId, Option<PlacedShard>)>,
    /// All records are to be assessed.
    round: Option<Round>,
}

impl Index {
    /// An index that knows no record yet; [`Self::advance`] goes through all of them.
    pub fn begin<K: Kv>(state: &State<K>) -> Result<Self, KvError> {
        let mut index = Self {
            settings: state.settings()?,
            sites: SiteMap::new(state.backends()?),
            round: Some(Round::default()),
            ..Self::default()
        };
        index.reload_volumes(state)?;
        Ok(index)
    }

    /// Builds the index from all records at once.
    pub fn build<K: Kv>(state: &State<K>) -> Result<Self, KvError> {
        let mut index = Self::begin(state)?;
        while index.advance(state)? {}
        Ok(index)
    }

    /// Follows what apply touched, to the end.
    pub fn follow<K: Kv>(&mut self, state: &State<K>, touched: &Touched) -> Result<(), KvError> {
        self.note(state, touched)?;
        while self.advance(state)? {}
        Ok(())
    }

    /// Takes note of what apply touched: at once what is small, for [`Self::advance`] what concerns records.
    pub fn note<K: Kv>(&mut self, state: &State<K>, touched: &Touched) -> Result<(), KvError> {
        if touched.settings {
            self.settings = state.settings()?;
        }
        if touched.volumes {
            self.reload_volumes(state)?;
        }
        if !touched.backends.is_empty() {
            self.sites = SiteMap::new(state.backends()?);
            self.rescan(state, &touched.backends)?;
            self.retry_stuck();
        }
        self.changed.extend(touched.records.clone());
        Ok(())
    }

    /// Assesses the next [`PAGE`] records, so that whoever waits for the state or this index waits shortly. False: all is assessed.
    pub fn advance<K: Kv>(&mut self, state: &State<K>) -> Result<bool, KvError> {
        if !self.changed.is_empty() {
            for name in self.changed.take_first(PAGE) {
                self.assess_record(state, name)?;
            }
        } else if let Some((backend, after)) = self.rescans.pop_front() {
            self.advance_backend(state, backend, after)?;
        } else if let Some(round) = self.round.take() {
            self.round = self.advance_round(state, round)?;
        }
        Ok(!self.is_whole())
    }

    /// Everything that is wrong is known.
    pub fn is_whole(&self) -> bool {
        self.changed.is_empty() && self.rescans.is_empty() && self.round.is_none()
    }

    /// Not all records were assessed yet since [`Self::begin`], or since backends changed that hold much.
    pub fn is_counting(&self) -> bool {
        self.round.is_some()
    }

    fn rescan<K: Kv>(
        &mut self,
        state: &State<K>,
        backends: &BTreeSet<BackendId>,
    ) -> Result<(), KvError> {
        let (mut shards, mut records) = (0, 0);
        for backend in backends {
            shards += state.backend_load(*backend)?.shards;
        }
        for volume in self.volumes.keys() {
            records += state.volume_totals(*volume)?.datafiles;
        }
        if shards >= records / ROUND_SHARE {
            // In the order of records all of them are read faster than a part of them in the order of backends.
            let at = self.round.and_then(|round| round.at);
            self.round = Some(Round {
                at,
                until: at,
                again: false,
            });
            self.rescans.clear();
            return Ok(());
        }
        for backend in backends {
            if !self.rescans.contains(&(*backend, None)) {
                self.rescans.push_back((*backend, None));
            }
        }
        Ok(())
    }

    fn reload_volumes<K: Kv>(&mut self, state: &State<K>) -> Result<(), KvError> {
        let volumes: BTreeMap<_, _> = state.volumes()?.into_iter().map(|v| (v.id, v)).collect();
        let known = std::mem::replace(&mut self.volumes, volumes);
        for volume in known.into_keys() {
            if self.volumes.contains_key(&volume) {
                continue;
            }
            for (number, count) in self.assessments.remove_volume(volume) {
                let one = self.assessments.kinds[number as usize];
                self.pending_shards -= u64::from(one.to_rebuild) * count;
                self.bad_shards -= u64::from(one.bad) * count;
            }
            for work in self.work.values_mut() {
                work.remove_volume(volume);
            }
            self.stuck.remove_volume(volume);
            self.reasons.retain(|name, _| name.0 != volume);
            self.health.remove(&volume);
        }
        Ok(())
    }

    fn advance_backend<K: Kv>(
        &mut self,
        state: &State<K>,
        backend: BackendId,
        after: Option<PlacedShard>,
    ) -> Result<(), KvError> {
        let page = state.shards_on(backend, after, PAGE)?;
        let mut last = None;
        for (volume, datafile, _) in &page {
            if last != Some((*volume, *datafile)) {
                self.assess_record(state, (*volume, *datafile))?;
                last = Some((*volume, *datafile));
            }
        }
        if page.len() == PAGE {
            self.rescans.push_front((backend, page.last().copied()));
        }
        Ok(())
    }

    fn advance_round<K: Kv>(
        &mut self,
        state: &State<K>,
        mut round: Round,
    ) -> Result<Option<Round>, KvError> {
        let from = round
            .at
            .map_or(Bound::Unbounded, |(volume, _)| Bound::Included(volume));
        let volume = self.volumes.range((from, Bound::Unbounded)).next();
        let Some((id, policy)) = volume.map(|(id, volume)| (*id, volume.policy)) else {
            return Ok(round.at_the_end());
        };
        let after = round.at.filter(|(volume, _)| *volume == id);
        let page = state.records_after(id, after.map_or(DatafileId(0), |at| at.1), PAGE)?;
        for record in &page {
            let one = assess(record, &policy, &self.sites);
            self.set((id, record.datafile), Some(one));
        }
        round.at = match page.last() {
            Some(last) if page.len() == PAGE => Some((id, last.datafile)),
            _ => {
                let behind = (Bound::Excluded(id), Bound::Unbounded);
                let Some((next, _)) = self.volumes.range(behind).next() else {
                    return Ok(round.at_the_end());
                };
                Some((*next, DatafileId(0)))
            }
        };
        let done = round.again && round.at >= round.until;
        Ok((!done).then_some(round))
    }

    fn assess_record<K: Kv>(&mut self, state: &State<K>, name: RecordName) -> Result<(), KvError> {
        let one = match (self.volumes.get(&name.0), state.record(name.0, name.1)?) {
            (Some(volume), Some(record)) => Some(assess(&record, &volume.policy, &self.sites)),
            _ => None,
        };
        self.set(name, one);
        Ok(())
    }

    fn set(&mut self, name: RecordName, new: Option<Assessment>) {
        if let Some(old) = self.assessments.set(name, new) {
            if old.needs_work() {
                self.work.entry(old.spare).or_default().remove(name);
                if self.stuck.remove(name) {
                    self.reasons.remove(&name);
                }
                if self.reasons.is_empty() && !self.stuck.is_empty() {
                    // Why the others are set aside is not known any more.
                    self.retry_stuck();
                }
            }
            self.pending_shards -= u64::from(old.to_rebuild);
            self.bad_shards -= u64::from(old.bad);
            if let Some(health) = self.health.get_mut(&name.0) {
                health.count(&old, false);
            }
        }
        if let Some(new) = new {
            self.pending_shards += u64::from(new.to_rebuild);
            self.bad_shards += u64::from(new.bad);
            self.health.entry(name.0).or_default().count(&new, true);
            if new.needs_work() {
                self.work.entry(new.spare).or_default().insert(name);
            }
        }
    }

    /// Sets a record aside until backends change.
    pub(super) fn set_stuck(&mut self, name: RecordName, reason: String) {
        let Some(one) = self.assessments.get(name) else {
            return;
        };
        self.work.entry(one.spare).or_default().remove(name);
        self.stuck.insert(name);
        self.reasons.insert(name, reason);
        if self.reasons.len() > REASONS_MAX {
            self.reasons.pop_last();
        }
    }

    /// Backends changed, or have room again: what was set aside is looked at again.
    pub fn retry_stuck(&mut self) {
        self.reasons.clear();
        for name in std::mem::take(&mut self.stuck).iter() {
            if let Some(one) = self.assessments.get(name) {
                self.work.entry(one.spare).or_default().insert(name);
            }
        }
    }

    /// All backends, by id.
    pub fn backends(&self) -> impl Iterator<Item = &Backend> {
        self.sites.backends()
    }

    /// Where backends are.
    pub fn sites(&self) -> &SiteMap {
        &self.sites
    }

    /// Settings.
    pub fn settings(&self) -> &ClusterSettings {
        &self.settings
    }

    /// A volume.
    pub fn volume(&self, id: VolumeId) -> Option<&Volume> {
        self.volumes.get(&id)
    }

    /// All volumes, by id.
    pub fn volumes(&self) -> impl Iterator<Item = &Volume> {
        self.volumes.values()
    }

    /// Health of a volume.
    pub fn health(&self, id: VolumeId) -> VolumeHealth {
        self.health.get(&id).cloned().unwrap_or_default()
    }

    /// Records to look at, fewest spare shards first.
    pub(super) fn work(&self, max: usize) -> Vec<RecordName> {
        let work = self.work.values().flat_map(RecordSet::iter);
        work.take(max).collect()
    }

    /// Why a record is set aside; the first of them that is known, and how many.
    pub fn stuck(&self) -> Option<(&String, usize)> {
        let first = self.reasons.values().next()?;
        Some((first, self.stuck.len()))
    }

    /// Shards to make again, and of them those reported missing or corrupt.
    pub fn pending_shards(&self) -> (u64, u64) {
        (self.pending_shards, self.bad_shards)
    }

    /// Records that could be moved to a better place now.
    pub fn pending_records(&self) -> usize {
        self.work.values().map(RecordSet::len).sum()
    }

    #[cfg(test)]
    pub(super) fn assessments(&self) -> BTreeMap<RecordName, Assessment> {
        let runs = self.assessments.runs.iter();
        let names = runs.flat_map(|((volume, run), held)| {
            let bits = (0..RUN).filter(|bit| held.there >> bit & 1 == 1);
            bits.map(move |bit| (*volume, DatafileId(run * RUN + bit)))
        });
        let pairs = names.map(|name| (name, self.assessments.get(name).expect("it is there")));
        pairs.collect()
    }
}
