//! Shard counts on the tree location / node / backend, and whether a partial placement can still be completed.
//!
//! "Any `L` of these domains may be lost" means: the `L` largest counts sum to at most `m`. That sum is the minimum over integers `t`
//! of `L * t + sum of max(0, count - t)`, so the rule holds exactly if some `t` leaves a budget `m - L * t` that pays for every
//! shard above `t`. With `t` fixed for locations and for nodes, a further shard in a domain costs one unit of a budget or nothing,
//! and the first shards of a domain are the cheap ones; so taking the cheapest shards first is optimal, and completing a
//! placement is arithmetic on four sums.

use super::Candidate;
use crate::id::{BackendId, LocationName, NodeName};
use crate::policy::Geometry;
use std::collections::BTreeMap;

/// What is asked of a placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rules {
    /// Any so many locations may be lost.
    pub(super) locations: usize,
    /// Any so many nodes may be lost.
    pub(super) nodes: usize,
    /// Most shards on one backend.
    pub(super) per_backend: usize,
}

/// One choice of `t` for locations and nodes, with the budgets that follow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Thresholds {
    location_free: usize,
    location_budget: usize,
    node_free: usize,
    node_budget: usize,
}

#[derive(Debug, Clone)]
pub(super) struct Backend {
    pub(super) id: BackendId,
    pub(super) free_bytes: u64,
    /// Shards on it.
    pub(super) count: usize,
    /// Most shards it can hold.
    pub(super) max: usize,
    /// Index of its node and location.
    node: usize,
    location: usize,
}

/// The tree, flat. Backends are sorted by location, node, id.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    pub(super) parity: usize,
    pub(super) total: usize,
    shard_bytes: u64,
    pub(super) backends: Vec<Backend>,
    /// Location of each node.
    node_location: Vec<usize>,
    locations: usize,
}

impl Tree {
    /// Empty counts; every candidate with room for its free bytes plus the shards in `held`, which it has already.
    pub(super) fn new(
        geometry: Geometry,
        shard_bytes: u64,
        candidates: &[Candidate],
        held: impl Fn(BackendId) -> usize,
    ) -> Self {
        let total = geometry.total();
        let mut sorted: BTreeMap<(&LocationName, &NodeName, BackendId), u64> = BTreeMap::new();
        for candidate in candidates {
            sorted.insert(
                (&candidate.location, &candidate.node, candidate.backend),
                candidate.free_bytes,
            );
        }
        let mut tree = Self {
            parity: geometry.parity(),
            total,
            shard_bytes,
            backends: Vec::with_capacity(sorted.len()),
            node_location: Vec::new(),
            locations: 0,
        };
        let mut last: Option<(&LocationName, &NodeName)> = None;
        for ((location, node, id), free_bytes) in sorted {
            if last.is_none_or(|(known, _)| known != location) {
                tree.locations += 1;
            }
            if last != Some((location, node)) {
                tree.node_location.push(tree.locations - 1);
            }
            last = Some((location, node));
            let slots = free_bytes.checked_div(shard_bytes).unwrap_or(u64::MAX);
            let slots = usize::try_from(slots).map_or(total, |slots| slots.min(total));
            tree.backends.push(Backend {
                id,
                free_bytes,
                count: 0,
                max: (slots + held(id)).min(total),
                node: tree.node_location.len() - 1,
                location: tree.locations - 1,
            });
        }
        tree
    }

    /// Index of a backend.
    pub(super) fn find(&self, id: BackendId) -> Option<usize> {
        self.backends.iter().position(|backend| backend.id == id)
    }

    /// All choices of thresholds under which these rules may hold.
    pub(super) fn thresholds(&self, rules: &Rules) -> Vec<Thresholds> {
        let free = |losable: usize| match losable {
            0 => vec![(self.total, 0)],
            _ => (0..=self.parity / losable)
                .map(|t| (t, self.parity - losable * t))
                .collect(),
        };
        let mut all = Vec::new();
        for (location_free, location_budget) in free(rules.locations) {
            for (node_free, node_budget) in free(rules.nodes) {
                all.push(Thresholds {
                    location_free,
                    location_budget,
                    node_free,
                    node_budget,
                });
            }
        }
        all
    }

    /// Can `left` more shards be placed so that the rules hold, for one of these thresholds?
    pub(super) fn completable(&self, per_backend: usize, all: &[Thresholds], left: usize) -> bool {
        if self
            .backends
            .iter()
            .any(|backend| backend.count > per_backend)
        {
            return false;
        }
        let mut nodes = vec![(0, 0); self.node_location.len()];
        let mut locations = vec![(0, 0); self.locations];
        for backend in &self.backends {
            let room = per_backend.min(backend.max).saturating_sub(backend.count);
            for (count, more) in [&mut nodes[backend.node], &mut locations[backend.location]] {
                *count += backend.count;
                *more += room;
            }
        }
        all.iter()
            .any(|choice| self.completable_with(choice, &nodes, &locations, left))
    }

    /// `nodes` and `locations`: shards there, and room for more.
    fn completable_with(
        &self,
        choice: &Thresholds,
        nodes: &[(usize, usize)],
        locations: &[(usize, usize)],
        left: usize,
    ) -> bool {
        let mut node_spent = 0;
        // Shards that fit into each location without costing a node's budget.
        let mut node_free = vec![0; self.locations];
        for (index, (count, room)) in nodes.iter().enumerate() {
            node_spent += count.saturating_sub(choice.node_free);
            node_free[self.node_location[index]] +=
                choice.node_free.saturating_sub(*count).min(*room);
        }
        let mut location_spent = 0;
        // Shards that cost nothing, a location's budget only, a node's budget only, both.
        let (mut nothing, mut location_only, mut node_only, mut both) = (0, 0, 0, 0);
        for ((count, room), node_free) in locations.iter().zip(node_free) {
            location_spent += count.saturating_sub(choice.location_free);
            let location_free = choice.location_free.saturating_sub(*count).min(*room);
            nothing += location_free.min(node_free);
            location_only += node_free.saturating_sub(location_free);
            node_only += location_free.saturating_sub(node_free);
            both += room - location_free.max(node_free);
        }
        let (Some(location_left), Some(node_left)) = (
            choice.location_budget.checked_sub(location_spent),
            choice.node_budget.checked_sub(node_spent),
        ) else {
            return false;
        };
        let location_only = location_only.min(location_left);
        let node_only = node_only.min(node_left);
        let both = both
            .min(location_left - location_only)
            .min(node_left - node_only);
        nothing + location_only + node_only + both >= left
    }

    /// Adds a shard where it fits best (fewest shards at its location, node, backend; then most free bytes; then lowest id)
    /// such that `left - 1` more can still follow. Panics when there is no such place: ask [`Tree::completable`] first.
    pub(super) fn add_best(
        &mut self,
        per_backend: usize,
        all: &[Thresholds],
        left: usize,
    ) -> usize {
        let mut nodes = vec![0_usize; self.node_location.len()];
        let mut locations = vec![0_usize; self.locations];
        for backend in &self.backends {
            nodes[backend.node] += backend.count;
            locations[backend.location] += backend.count;
        }
        let mut order: Vec<usize> = (0..self.backends.len())
            .filter(|index| {
                let backend = &self.backends[*index];
                backend.count < per_backend.min(backend.max)
            })
            .collect();
        order.sort_by_key(|index| {
            let backend = &self.backends[*index];
            let free = std::cmp::Reverse(backend.free_bytes);
            (
                locations[backend.location],
                nodes[backend.node],
                backend.count,
                free,
                backend.id,
            )
        });
        let mut tried = vec![false; self.node_location.len()];
        for index in order {
            // Backends of one node differ in nothing that completability depends on.
            if std::mem::replace(&mut tried[self.backends[index].node], true) {
                continue;
            }
            self.backends[index].count += 1;
            if self.completable(per_backend, all, left - 1) {
                let backend = &mut self.backends[index];
                backend.free_bytes = backend.free_bytes.saturating_sub(self.shard_bytes);
                return index;
            }
            self.backends[index].count -= 1;
        }
        unreachable!("completable said that {left} shards can be placed")
    }

    /// Adds a kept shard without using up free bytes.
    pub(super) fn keep(&mut self, index: usize) {
        self.backends[index].count += 1;
    }

    /// Takes it back.
    pub(super) fn unkeep(&mut self, index: usize) {
        self.backends[index].count -= 1;
    }

    /// `(shards at the location, at the node, on the backend)`.
    pub(super) fn load(&self, index: usize) -> (usize, usize, usize) {
        let of = &self.backends[index];
        let sum = |same: &dyn Fn(&Backend) -> bool| {
            self.backends
                .iter()
                .filter(|other| same(other))
                .map(|other| other.count)
                .sum()
        };
        (
            sum(&|other| other.location == of.location),
            sum(&|other| other.node == of.node),
            of.count,
        )
    }

    /// The strictest rules, no stricter than asked, under which `left` more shards can be placed.
    pub(super) fn strictest(&self, locations: usize, nodes: usize, left: usize) -> Option<Rules> {
        // Losing a domain more than there are parity shards is never survivable when all have shards.
        let (locations, nodes) = (locations.min(self.parity), nodes.min(self.parity));
        for per_backend in 1..=self.parity {
            for nodes in (0..=nodes).rev() {
                for locations in (0..=locations).rev() {
                    let rules = Rules {
                        locations,
                        nodes,
                        per_backend,
                    };
                    if self.completable(per_backend, &self.thresholds(&rules), left) {
                        return Some(rules);
                    }
                }
            }
        }
        None
    }

    /// Counts of what can take shards, for people.
    pub(super) fn describe(&self, candidates: &[Candidate], shard_bytes: u64) -> String {
        let mut lines = BTreeMap::<&LocationName, (BTreeMap<&NodeName, ()>, usize, usize)>::new();
        for candidate in candidates {
            let (nodes, usable, full) = lines.entry(&candidate.location).or_default();
            if candidate.free_bytes >= shard_bytes {
                nodes.insert(&candidate.node, ());
                *usable += 1;
            } else {
                *full += 1;
            }
        }
        if lines.is_empty() {
            return "no backend is usable".into();
        }
        let line = |(location, (nodes, usable, full)): (_, (BTreeMap<_, ()>, usize, usize))| {
            let full = if full == 0 {
                String::new()
            } else {
                format!(", {full} full")
            };
            format!(
                "{location}: {} on {}{full}",
                plural(usable, "backend"),
                plural(nodes.len(), "node")
            )
        };
        format!(
            "usable are {}",
            lines.into_iter().map(line).collect::<Vec<_>>().join("; ")
        )
    }
}

/// `1 node`, `2 nodes`.
pub(super) fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}
