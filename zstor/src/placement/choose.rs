//! Placements for new stripes and for shards that are gone.

use super::tree::{Rules, Tree, plural};
use super::{Candidate, Placement, Unplaceable};
use crate::id::BackendId;
use crate::policy::{Geometry, Policy};

/// Chooses backends for the `k + m` shards of a stripe.
///
/// `shard_bytes` is what one shard takes on a backend (`Layout::stored_shard_bytes`). `keep` is empty for a new stripe; else it
/// has one entry per shard: `Some` stays where it is (its backend must be among the candidates, however full), `None`
/// is to be placed.
pub fn choose(
    policy: &Policy,
    geometry: Geometry,
    shard_bytes: u64,
    candidates: &[Candidate],
    keep: &[Option<BackendId>],
) -> Result<Placement, Unplaceable> {
    let keep = keep_or_none(geometry, keep)?;
    let mut tree = tree_with(geometry, shard_bytes, candidates, &keep);
    for backend in keep.iter().flatten() {
        let index = tree
            .find(*backend)
            .ok_or_else(|| not_a_candidate(*backend))?;
        tree.keep(index);
    }
    let left = keep.iter().filter(|backend| backend.is_none()).count();
    let (locations, nodes) = asked(policy);
    let rules = tree
        .strictest(locations, nodes, left)
        .ok_or_else(|| unplaceable(geometry, shard_bytes, candidates, &tree, &keep))?;
    let thresholds = tree.thresholds(&rules);
    let mut backends = Vec::with_capacity(keep.len());
    let mut unplaced = left;
    for kept in &keep {
        backends.push(match kept {
            Some(backend) => *backend,
            None => {
                let index = tree.add_best(rules.per_backend, &thresholds, unplaced);
                unplaced -= 1;
                tree.backends[index].id
            }
        });
    }
    let missing = missing(
        policy,
        geometry,
        &rules,
        &tree.describe(candidates, shard_bytes),
    );
    Ok(Placement {
        backends,
        full_policy: missing.is_empty(),
        missing,
    })
}

/// The most that stripes of this geometry can survive on these backends, each shard on a backend of its own: as many locations as
/// possible, then as many nodes as possible. What a volume gets that asks for nothing. The error says what is missing.
pub fn best_survival(geometry: Geometry, candidates: &[Candidate]) -> Result<Policy, String> {
    let tree = tree_with(geometry, 0, candidates, &[]);
    let possible = |locations: usize, nodes: usize| {
        let rules = Rules {
            locations,
            nodes,
            per_backend: 1,
        };
        tree.completable(1, &tree.thresholds(&rules), geometry.total())
    };
    if !possible(0, 0) {
        return Err(format!(
            "{geometry} needs {} backends, one per shard, and {} joined; join more or choose a smaller geometry",
            geometry.total(),
            match tree.backends.len() {
                1 => "1 is".to_owned(),
                count => format!("{count} are"),
            },
        ));
    }
    let most = |possible: &dyn Fn(usize) -> bool| {
        (0..=geometry.parity())
            .rev()
            .find(|count| possible(*count))
            .unwrap_or(0)
    };
    let locations = most(&|locations| possible(locations, 0));
    let nodes = most(&|nodes| possible(locations, nodes));
    let narrow = |count: usize| u32::try_from(count).expect("at most SHARDS_MAX");
    Ok(Policy {
        geometry,
        survive_locations: narrow(locations),
        survive_nodes: narrow(nodes),
    })
}

/// Rules of the policy as counts.
pub(super) fn asked(policy: &Policy) -> (usize, usize) {
    (
        policy.survive_locations as usize,
        policy.survive_nodes as usize,
    )
}

/// One entry per shard.
pub(super) fn keep_or_none(
    geometry: Geometry,
    keep: &[Option<BackendId>],
) -> Result<Vec<Option<BackendId>>, Unplaceable> {
    match keep.len() {
        0 => Ok(vec![None; geometry.total()]),
        count if count == geometry.total() => Ok(keep.to_vec()),
        count => Err(Unplaceable {
            missing: format!(
                "{count} shards are named, a {geometry} stripe has {}",
                geometry.total()
            ),
        }),
    }
}

/// Empty counts, with room for what is kept.
pub(super) fn tree_with(
    geometry: Geometry,
    shard_bytes: u64,
    candidates: &[Candidate],
    keep: &[Option<BackendId>],
) -> Tree {
    Tree::new(geometry, shard_bytes, candidates, |id| {
        keep.iter().filter(|kept| **kept == Some(id)).count()
    })
}

pub(super) fn not_a_candidate(backend: BackendId) -> Unplaceable {
    Unplaceable {
        missing: format!("a shard stays on backend {backend}, which is not among the candidates"),
    }
}

pub(super) fn unplaceable(
    geometry: Geometry,
    shard_bytes: u64,
    candidates: &[Candidate],
    tree: &Tree,
    keep: &[Option<BackendId>],
) -> Unplaceable {
    let kept = keep.iter().flatten().count();
    let kept = if kept == 0 {
        String::new()
    } else {
        format!(" ({kept} of them stay where they are)")
    };
    let least = geometry.total().div_ceil(geometry.parity());
    Unplaceable {
        missing: format!(
            "the {} shards of a {geometry} stripe{kept} cannot be placed so that any one backend may be lost: at least {} with room for up to \
             {} of {shard_bytes} bytes each are needed; {}",
            geometry.total(),
            plural(least, "backend"),
            plural(geometry.parity(), "shard"),
            tree.describe(candidates, shard_bytes),
        ),
    }
}

/// Empty when the rules are all that the policy asks.
pub(super) fn missing(policy: &Policy, geometry: Geometry, rules: &Rules, usable: &str) -> String {
    let mut given_up = Vec::new();
    let (locations, nodes) = asked(policy);
    let mut rule = |asked: usize, got: usize, noun: &str| {
        if got < asked {
            let got = if got == 0 {
                "none".to_owned()
            } else {
                format!("only {got}")
            };
            given_up.push(format!(
                "should survive the loss of any {} but survives {got}",
                plural(asked, noun)
            ));
        }
    };
    rule(locations, rules.locations, "location");
    rule(nodes, rules.nodes, "node");
    if given_up.is_empty() {
        return String::new();
    }
    format!("a {geometry} stripe {}; {usable}", given_up.join("; "))
}
