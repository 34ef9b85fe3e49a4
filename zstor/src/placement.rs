//! Which backend gets which shard, and what a stripe survives. One function decides; commit, repair and audit check with the
//! same function.
//!
//! A policy asks two things of a stripe: any `L` locations may be lost, any `N` nodes may be lost. Besides, every shard should have
//! a backend of its own. When they cannot all be met, they are given up in this order: survival of locations (one by one), survival
//! of nodes (one by one), one backend per shard (two per backend, then three, ...). Never given up: any one backend may be lost.
//! Shards that share a backend because one was lost do not make a stripe below policy as long as it survives what the policy asks.
//!
//! Invariants: pure and deterministic, whatever the order of the candidates; full policy whenever a full-policy placement exists; shards
//! are spread evenly over locations, then nodes, then backends, then by free space.
//!
//! - [`survival`], [`holds`]: what a stripe survives, and whether that is enough
//! - [`choose`]: a placement for a new stripe, or for the shards of one that are gone
//! - [`moves`]: the fewest shards to move so that a stripe returns to its policy
//! - [`best_survival`]: the most that a geometry can survive on these backends
//! - [`room_per_shard`]: how much more fits on these backends
//! - [`strictly_meets`], [`smallest_geometry`]: the policy of a new volume, nothing given up

mod choose;
mod moves;
mod room;
mod solve;
mod tree;

use crate::id::{BackendId, LocationName, NodeName};
use crate::policy::{Geometry, Policy};
use std::collections::BTreeMap;

pub use choose::{best_survival, choose};
pub use moves::{Moves, moves};
pub use room::room_per_shard;
pub use solve::{CHOSEN_SHARDS_MAX, Survive, smallest_geometry, strictly_meets};

/// Where a backend is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// Which backend.
    pub backend: BackendId,
    /// Its location.
    pub location: LocationName,
    /// Its node; names of nodes count within their location.
    pub node: NodeName,
}

/// A backend that may take shards, or that already holds some of the stripe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Which backend.
    pub backend: BackendId,
    /// Its location.
    pub location: LocationName,
    /// Its node.
    pub node: NodeName,
    /// Bytes it can still take. One with less than a shard is never chosen, but shards it holds may stay.
    pub free_bytes: u64,
}

impl Candidate {
    /// Where it is.
    pub fn site(&self) -> Site {
        Site {
            backend: self.backend,
            location: self.location.clone(),
            node: self.node.clone(),
        }
    }
}

/// What may still be lost of a readable stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Survival {
    /// Any so many locations.
    pub locations: u32,
    /// Any so many nodes.
    pub nodes: u32,
    /// Any so many backends.
    pub backends: u32,
}

/// Backends for all `k + m` shards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// In shard order; kept shards where they were.
    pub backends: Vec<BackendId>,
    /// False: below policy, to be re-silvered later.
    pub full_policy: bool,
    /// When below policy: what is missing, for people; else empty.
    pub missing: String,
}

/// No placement survives even the loss of one backend, or a kept shard is on no candidate. The text says what is missing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{missing}")]
pub struct Unplaceable {
    /// For people.
    pub missing: String,
}

/// What a stripe survives with its shards at `sites` (`None`: that shard is gone). `None` when fewer than `k` are left.
pub fn survival(geometry: Geometry, sites: &[Option<Site>]) -> Option<Survival> {
    let alive: Vec<&Site> = sites.iter().flatten().collect();
    let spare = alive.len().checked_sub(geometry.data())?;
    let mut locations = BTreeMap::<&LocationName, usize>::new();
    let mut nodes = BTreeMap::<(&LocationName, &NodeName), usize>::new();
    let mut backends = BTreeMap::<BackendId, usize>::new();
    for site in &alive {
        *locations.entry(&site.location).or_default() += 1;
        *nodes.entry((&site.location, &site.node)).or_default() += 1;
        *backends.entry(site.backend).or_default() += 1;
    }
    Some(Survival {
        locations: losable(locations.into_values(), spare),
        nodes: losable(nodes.into_values(), spare),
        backends: losable(backends.into_values(), spare),
    })
}

/// Do the survival rules of a policy hold, whatever the stripe's geometry?
pub const fn holds(policy: &Policy, survival: &Survival) -> bool {
    survival.locations >= policy.survive_locations && survival.nodes >= policy.survive_nodes
}

/// How many domains may be lost when `spare` shards may: the fullest go first.
fn losable(counts: impl Iterator<Item = usize>, spare: usize) -> u32 {
    let mut counts: Vec<usize> = counts.collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    let mut lost = 0;
    let fits = counts.iter().take_while(|count| {
        lost += **count;
        lost <= spare
    });
    u32::try_from(fits.count()).expect("at most SHARDS_MAX domains hold shards")
}

#[cfg(test)]
mod tests;
