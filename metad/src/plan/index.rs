//! What is wrong with which record, kept up from what apply touched, so that no heartbeat ever walks all records.
//!
//! A change of a backend assesses the records on that backend; a change of a record assesses that record.

use super::assess::{Assessment, assess};
use super::facts::RecordName;
use crate::placing::SiteMap;
use crate::state::kv::{Kv, KvError};
use crate::state::{State, Touched};
use qsfs_proto::api::{Backend, ClusterSettings, Volume};
use qsfs_proto::status::LossBudget;
use qsfs_zstor::id::{BackendId, DatafileId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// Records read at once.
const PAGE: usize = 1_024;

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

/// The index.
#[derive(Debug, Default)]
pub struct Index {
    sites: SiteMap,
    settings: ClusterSettings,
    volumes: BTreeMap<VolumeId, Volume>,
    assessments: BTreeMap<RecordName, Assessment>,
    health: BTreeMap<VolumeId, VolumeHealth>,
    /// Records to look at, fewest spare shards first.
    work: BTreeSet<(i8, RecordName)>,
    /// Records that need work that cannot be done with the backends there are; looked at again when those change.
    stuck: BTreeMap<RecordName, String>,
    pending_shards: u64,
    bad_shards: u64,
}

impl Index {
    /// Builds the index from all records: what a new leader does first.
    pub fn build<K: Kv>(state: &State<K>) -> Result<Self, KvError> {
        let mut index = Self {
            settings: state.settings()?,
            sites: SiteMap::new(state.backends()?),
            ..Self::default()
        };
        index.reload_volumes(state)?;
        let ids: Vec<_> = index.volumes.keys().copied().collect();
        for volume in ids {
            let mut after = DatafileId(0);
            loop {
                let page = state.records_after(volume, after, PAGE)?;
                for record in &page {
                    let policy = index.volumes[&volume].policy;
                    let one = assess(record, &policy, &index.sites);
                    index.set((volume, record.datafile), Some(one));
                }
                match page.last() {
                    Some(last) if page.len() == PAGE => after = last.datafile,
                    _ => break,
                }
            }
        }
        Ok(index)
    }

    /// Follows what apply touched.
    pub fn follow<K: Kv>(&mut self, state: &State<K>, touched: &Touched) -> Result<(), KvError> {
        if touched.settings {
            self.settings = state.settings()?;
        }
        if touched.volumes {
            self.reload_volumes(state)?;
        }
        if !touched.backends.is_empty() {
            self.sites = SiteMap::new(state.backends()?);
            for backend in &touched.backends {
                self.assess_backend(state, *backend)?;
            }
            self.retry_stuck();
        }
        for (volume, datafile) in &touched.records {
            self.assess_record(state, (*volume, *datafile))?;
        }
        Ok(())
    }

    fn reload_volumes<K: Kv>(&mut self, state: &State<K>) -> Result<(), KvError> {
        let volumes: BTreeMap<_, _> = state.volumes()?.into_iter().map(|v| (v.id, v)).collect();
        let gone: Vec<_> = self
            .volumes
            .keys()
            .filter(|id| !volumes.contains_key(id))
            .copied()
            .collect();
        for volume in gone {
            let all = (volume, DatafileId(0))..=(volume, DatafileId(u64::MAX));
            let names: Vec<_> = self.assessments.range(all).map(|(name, _)| *name).collect();
            for name in names {
                self.set(name, None);
            }
            self.health.remove(&volume);
        }
        self.volumes = volumes;
        Ok(())
    }

    fn assess_backend<K: Kv>(
        &mut self,
        state: &State<K>,
        backend: BackendId,
    ) -> Result<(), KvError> {
        let mut after = None;
        loop {
            let page = state.shards_on(backend, after, PAGE)?;
            let mut last = None;
            for (volume, datafile, _) in &page {
                if last != Some((*volume, *datafile)) {
                    self.assess_record(state, (*volume, *datafile))?;
                    last = Some((*volume, *datafile));
                }
            }
            if page.len() < PAGE {
                return Ok(());
            }
            after = page.last().copied();
        }
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
        if let Some(old) = self.assessments.remove(&name) {
            self.work.remove(&(old.spare, name));
            self.stuck.remove(&name);
            self.pending_shards -= u64::from(old.to_rebuild);
            self.bad_shards -= u64::from(old.bad);
            if let Some(health) = self.health.get_mut(&name.0) {
                health.count(&old, false);
            }
        }
        if let Some(new) = new {
            self.assessments.insert(name, new);
            self.pending_shards += u64::from(new.to_rebuild);
            self.bad_shards += u64::from(new.bad);
            self.health.entry(name.0).or_default().count(&new, true);
            if new.needs_work() {
                self.work.insert((new.spare, name));
            }
        }
    }

    /// Sets a record aside until backends change.
    pub(super) fn set_stuck(&mut self, name: RecordName, reason: String) {
        if let Some(one) = self.assessments.get(&name) {
            self.work.remove(&(one.spare, name));
            self.stuck.insert(name, reason);
        }
    }

    /// Backends changed, or have room again: what was set aside is looked at again.
    pub fn retry_stuck(&mut self) {
        for (name, _) in std::mem::take(&mut self.stuck) {
            if let Some(one) = self.assessments.get(&name) {
                self.work.insert((one.spare, name));
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
        self.work.iter().take(max).map(|(_, name)| *name).collect()
    }

    /// Why a record is set aside; the first of them, and how many.
    pub fn stuck(&self) -> Option<(&String, usize)> {
        let first = self.stuck.values().next()?;
        Some((first, self.stuck.len()))
    }

    /// Shards to make again, and of them those reported missing or corrupt.
    pub fn pending_shards(&self) -> (u64, u64) {
        (self.pending_shards, self.bad_shards)
    }

    /// Records that could be moved to a better place now.
    pub fn pending_records(&self) -> usize {
        self.work.len()
    }

    #[cfg(test)]
    pub(super) fn assessments(&self) -> &BTreeMap<RecordName, Assessment> {
        &self.assessments
    }
}
