//! What to move so that a stripe returns to its policy.

use super::choose::{asked, keep_or_none, missing, not_a_candidate, tree_with, unplaceable};
use super::tree::{Rules, Thresholds, Tree};
use super::{Candidate, Unplaceable};
use crate::id::BackendId;
use crate::policy::{Geometry, Policy};

/// What re-silver has to do for one stripe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moves {
    /// Shard and the backend it should go to; shards that are gone, and those that stand in the way of a rule. In shard order.
    pub moves: Vec<(u32, BackendId)>,
    /// After them the stripe is at full policy.
    pub full_policy: bool,
    /// What would still be missing, for people; else empty.
    pub missing: String,
}

/// The moves that bring a stripe to its policy, or as near as the candidates allow; as few as can be. No moves: it is there.
///
/// `current` has one entry per shard: where it is (must be among the candidates), or `None` when it is gone or has to leave.
/// `shard_bytes` as in [`super::choose`].
pub fn moves(
    policy: &Policy,
    geometry: Geometry,
    shard_bytes: u64,
    current: &[Option<BackendId>],
    candidates: &[Candidate],
) -> Result<Moves, Unplaceable> {
    let current = keep_or_none(geometry, current)?;
    let tree = tree_with(geometry, shard_bytes, candidates, &current);
    let places: Vec<Option<usize>> = current
        .iter()
        .map(|backend| {
            backend
                .map(|id| tree.find(id).ok_or_else(|| not_a_candidate(id)))
                .transpose()
        })
        .collect::<Result<_, _>>()?;
    let (locations, nodes) = asked(policy);
    let rules = tree
        .strictest(locations, nodes, geometry.total())
        .ok_or_else(|| unplaceable(geometry, shard_bytes, candidates, &tree, &current))?;
    let kept = most_kept(&tree, &rules, &places);
    Ok(Moves {
        moves: place_rest(tree.clone(), &rules, &places, &kept),
        full_policy: missing(policy, geometry, &rules, "").is_empty(),
        missing: missing(
            policy,
            geometry,
            &rules,
            &tree.describe(candidates, shard_bytes),
        ),
    })
}

/// Which shards stay: the largest set found, over all thresholds. Greedy, so not proven to be the largest, but no smaller one was ever
/// found in comparison with brute force.
fn most_kept(tree: &Tree, rules: &Rules, places: &[Option<usize>]) -> Vec<bool> {
    let mut best: Vec<bool> = Vec::new();
    let mut best_count = 0;
    for choice in tree.thresholds(rules) {
        if let Some(kept) = kept_under(tree.clone(), rules.per_backend, &choice, places) {
            let count = kept.iter().filter(|stays| **stays).count();
            if best.is_empty() || count > best_count {
                (best, best_count) = (kept, count);
            }
        }
    }
    best
}

/// Keeps shard after shard, where the fewest are first, as long as the rest can still be placed.
fn kept_under(
    mut tree: Tree,
    per_backend: usize,
    choice: &Thresholds,
    places: &[Option<usize>],
) -> Option<Vec<bool>> {
    let only = std::slice::from_ref(choice);
    let mut left = places.len();
    if !tree.completable(per_backend, only, left) {
        return None;
    }
    let mut kept = vec![false; places.len()];
    let mut open: Vec<(usize, usize)> = places
        .iter()
        .enumerate()
        .filter_map(|(shard, place)| Some((shard, (*place)?)))
        .collect();
    while let Some(next) = open
        .iter()
        .enumerate()
        .min_by_key(|(_, (shard, place))| (tree.load(*place), *shard))
        .map(|(at, _)| at)
    {
        let (shard, place) = open.swap_remove(next);
        tree.keep(place);
        if tree.completable(per_backend, only, left - 1) {
            kept[shard] = true;
            left -= 1;
        } else {
            tree.unkeep(place);
        }
    }
    Some(kept)
}

/// New places for all that do not stay.
fn place_rest(
    mut tree: Tree,
    rules: &Rules,
    places: &[Option<usize>],
    kept: &[bool],
) -> Vec<(u32, BackendId)> {
    for (place, _) in places.iter().zip(kept).filter(|(_, stays)| **stays) {
        tree.keep(place.expect("only shards that are somewhere stay"));
    }
    let thresholds = tree.thresholds(rules);
    let mut moving: Vec<usize> = (0..places.len()).filter(|shard| !kept[*shard]).collect();
    let targets: Vec<usize> = (0..moving.len())
        .map(|placed| tree.add_best(rules.per_backend, &thresholds, moving.len() - placed))
        .collect();
    let mut moves = Vec::new();
    for target in targets {
        // A shard whose own backend is among the targets stays there.
        match moving
            .iter()
            .position(|shard| places[*shard] == Some(target))
        {
            Some(at) => drop(moving.remove(at)),
            None => moves.push(target),
        }
    }
    let named = |(shard, target): (usize, usize)| {
        (
            u32::try_from(shard).expect("below SHARDS_MAX"),
            tree.backends[target].id,
        )
    };
    moving.into_iter().zip(moves).map(named).collect()
}
