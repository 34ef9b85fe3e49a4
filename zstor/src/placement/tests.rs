//! Placement against brute force: every way to place a stripe on every small cluster.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use std::collections::BTreeSet;

fn geometry(data: u32, parity: u32) -> Geometry {
    Geometry::new(data, parity).unwrap()
}

fn policy(geometry: Geometry, survive_locations: u32, survive_nodes: u32) -> Policy {
    Policy {
        geometry,
        survive_locations,
        survive_nodes,
    }
}

/// `shape[location][node]` backends, all with the same free bytes.
fn cluster(shape: &[&[usize]], free_bytes: u64) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    for (location, nodes) in shape.iter().enumerate() {
        for (node, backends) in nodes.iter().enumerate() {
            for _ in 0..*backends {
                candidates.push(Candidate {
                    backend: BackendId(candidates.len() as u64 + 1),
                    location: format!("loc{location}").parse().unwrap(),
                    // The same names at every location: they must not be taken for one node.
                    node: format!("n{node}").parse().unwrap(),
                    free_bytes,
                });
            }
        }
    }
    candidates
}

fn sites(candidates: &[Candidate], backends: &[Option<BackendId>]) -> Vec<Option<Site>> {
    let site = |id: BackendId| {
        candidates
            .iter()
            .find(|other| other.backend == id)
            .unwrap()
            .site()
    };
    backends.iter().map(|backend| backend.map(site)).collect()
}

fn all(backends: &[BackendId]) -> Vec<Option<BackendId>> {
    backends.iter().copied().map(Some).collect()
}

/// The largest `n` such that losing any `n` of the domains leaves `k` shards; by trying every subset.
fn brute_losable(k: usize, shard_domains: &[Option<String>]) -> u32 {
    let domains: Vec<&String> = shard_domains
        .iter()
        .flatten()
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let mut losable = domains.len();
    for subset in 0_u32..1 << domains.len() {
        let lost = |domain: &String| {
            domains
                .iter()
                .position(|other| *other == domain)
                .is_some_and(|at| subset >> at & 1 == 1)
        };
        let left = shard_domains
            .iter()
            .flatten()
            .filter(|domain| !lost(domain))
            .count();
        if left < k {
            losable = losable.min(subset.count_ones() as usize - 1);
        }
    }
    u32::try_from(losable).unwrap()
}

fn brute_survival(geometry: Geometry, sites: &[Option<Site>]) -> Option<Survival> {
    let k = geometry.data();
    if sites.iter().flatten().count() < k {
        return None;
    }
    let by = |name: &dyn Fn(&Site) -> String| {
        brute_losable(
            k,
            &sites
                .iter()
                .map(|site| site.as_ref().map(name))
                .collect::<Vec<_>>(),
        )
    };
    Some(Survival {
        locations: by(&|site| site.location.to_string()),
        nodes: by(&|site| format!("{}/{}", site.location, site.node)),
        backends: by(&|site| site.backend.to_string()),
    })
}

/// How good a placement is: fewest shards on one backend, then nodes, then locations, no better than asked. Higher is better.
type Rank = (std::cmp::Reverse<usize>, u32, u32);

fn rank(
    policy: &Policy,
    geometry: Geometry,
    candidates: &[Candidate],
    counts: &[usize],
) -> Option<Rank> {
    let mut backends = Vec::new();
    for (candidate, count) in candidates.iter().zip(counts) {
        backends.extend(std::iter::repeat_n(Some(candidate.backend), *count));
    }
    let survival = survival(geometry, &sites(candidates, &backends)).unwrap();
    (survival.backends >= 1).then(|| {
        (
            std::cmp::Reverse(*counts.iter().max().unwrap()),
            survival.nodes.min(policy.survive_nodes),
            survival.locations.min(policy.survive_locations),
        )
    })
}

/// All ways to put `left` shards on backends with so much room.
fn for_each_count(
    room: &[usize],
    left: usize,
    counts: &mut Vec<usize>,
    visit: &mut dyn FnMut(&[usize]),
) {
    let Some(most) = room.get(counts.len()) else {
        if left == 0 {
            visit(counts);
        }
        return;
    };
    for count in 0..=left.min(*most) {
        counts.push(count);
        for_each_count(room, left - count, counts, visit);
        counts.pop();
    }
}

fn counts_of(candidates: &[Candidate], backends: &[BackendId]) -> Vec<usize> {
    let on = |candidate: &Candidate| {
        backends
            .iter()
            .filter(|id| **id == candidate.backend)
            .count()
    };
    candidates.iter().map(on).collect()
}

fn shapes() -> Vec<&'static [&'static [usize]]> {
    vec![
        &[&[1, 1], &[1, 1]],
        &[&[2], &[2]],
        &[&[2, 1], &[1]],
        &[&[3], &[1, 1, 1]],
        &[&[1, 1, 1, 1, 1, 1]],
        &[&[3, 3]],
        &[&[2], &[1], &[1]],
        &[&[1, 1], &[1, 1], &[1]],
        &[&[4], &[1], &[1]],
        &[&[1], &[1], &[1], &[1], &[1]],
        &[&[1]],
        &[&[5]],
        &[&[2], &[1]],
    ]
}

/// Every geometry up to 4+3, every policy up to 2 locations and 3 nodes, on every shape, with backends of plenty, tight and mixed room.
#[test]
fn choose_is_as_strict_as_brute_force_on_every_small_cluster() {
    for shape in shapes() {
        for room in [9, 1, 2, 0] {
            let mut candidates = cluster(shape, 0);
            for (index, candidate) in candidates.iter_mut().enumerate() {
                // Room 0 stands for a mix of 0, 1, 2 and 3 shards.
                candidate.free_bytes = if room == 0 {
                    (index as u64 * 7 + 3) % 4
                } else {
                    room
                } * 100
                    + 50;
            }
            for data in 1..=4 {
                for parity in 1..=3 {
                    check_against_brute_force(&candidates, geometry(data, parity));
                }
            }
        }
    }
}

fn check_against_brute_force(candidates: &[Candidate], geometry: Geometry) {
    let room: Vec<usize> = candidates
        .iter()
        .map(|one| usize::try_from(one.free_bytes / 100).unwrap())
        .collect();
    let mut ways = Vec::new();
    for_each_count(&room, geometry.total(), &mut Vec::new(), &mut |counts| {
        ways.push(counts.to_vec())
    });
    for locations in 0..=2 {
        for nodes in 0..=3 {
            let policy = policy(geometry, locations, nodes);
            let best = ways
                .iter()
                .filter_map(|counts| rank(&policy, geometry, candidates, counts))
                .max();
            let what = format!("{geometry} L{locations} N{nodes} on {candidates:?}");
            match choose(&policy, geometry, 100, candidates, &[]) {
                Err(unplaceable) => {
                    assert_eq!(best, None, "{what}");
                    assert!(unplaceable.missing.contains("needed"), "{unplaceable}");
                }
                Ok(placement) => {
                    let counts = counts_of(candidates, &placement.backends);
                    assert!(
                        counts.iter().zip(&room).all(|(count, room)| count <= room),
                        "{what}"
                    );
                    assert_eq!(rank(&policy, geometry, candidates, &counts), best, "{what}");
                    let survival =
                        survival(geometry, &sites(candidates, &all(&placement.backends))).unwrap();
                    assert_eq!(placement.full_policy, holds(&policy, &survival), "{what}");
                    assert_eq!(
                        placement.missing.is_empty(),
                        placement.full_policy,
                        "{what}"
                    );
                }
            }
        }
    }
}

fn any_cluster() -> impl Strategy<Value = Vec<Candidate>> {
    let node = 1_usize..4;
    let location = vec(node, 1..4);
    (vec(location, 1..4), vec(0_u64..5, 1..8)).prop_map(|(shape, free)| {
        let shape: Vec<&[usize]> = shape.iter().map(Vec::as_slice).collect();
        let mut candidates = cluster(&shape, 0);
        candidates.truncate(7);
        for (candidate, free) in candidates.iter_mut().zip(free.iter().cycle()) {
            candidate.free_bytes = free * 100;
        }
        candidates
    })
}

fn any_policy() -> impl Strategy<Value = Policy> {
    (1_u32..5, 1_u32..5, 0_u32..3, 0_u32..4).prop_map(|(data, parity, locations, nodes)| {
        policy(geometry(data, parity), locations, nodes)
    })
}

/// Fewest shards that have to move from `current` for the best rank that can be had at all.
fn brute_moves(
    policy: &Policy,
    candidates: &[Candidate],
    current: &[Option<BackendId>],
) -> Option<(Rank, usize)> {
    let geometry = policy.geometry;
    let held = counts_of(
        candidates,
        &current.iter().flatten().copied().collect::<Vec<_>>(),
    );
    let room: Vec<usize> = candidates
        .iter()
        .zip(&held)
        .map(|(one, held)| usize::try_from(one.free_bytes / 100).unwrap() + held)
        .collect();
    let mut best: Option<(Rank, std::cmp::Reverse<usize>)> = None;
    for_each_count(&room, geometry.total(), &mut Vec::new(), &mut |counts| {
        if let Some(rank) = rank(policy, geometry, candidates, counts) {
            let stay: usize = counts
                .iter()
                .zip(&held)
                .map(|(count, held)| count.min(held))
                .sum();
            best = best.max(Some((rank, std::cmp::Reverse(geometry.total() - stay))));
        }
    });
    best.map(|(rank, moved)| (rank, moved.0))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn survival_is_what_brute_force_finds(candidates in any_cluster(), policy in any_policy(), picks in vec(any::<Option<Index>>(), 8)) {
        let backends: Vec<Option<BackendId>> = picks.iter().take(policy.geometry.total())
            .map(|pick| pick.map(|pick| pick.get(&candidates).backend)).collect();
        let sites = sites(&candidates, &backends);
        prop_assert_eq!(survival(policy.geometry, &sites), brute_survival(policy.geometry, &sites));
    }

    #[test]
    fn kept_shards_stay_and_the_rest_is_as_strict_as_brute_force(candidates in any_cluster(), policy in any_policy(), picks in vec(any::<Option<Index>>(), 8)) {
        let geometry = policy.geometry;
        let keep: Vec<Option<BackendId>> = (0..geometry.total())
            .map(|shard| picks[shard].map(|pick| pick.get(&candidates).backend)).collect();
        let held = counts_of(&candidates, &keep.iter().flatten().copied().collect::<Vec<_>>());
        let left = keep.iter().filter(|kept| kept.is_none()).count();
        let room: Vec<usize> = candidates.iter().map(|one| usize::try_from(one.free_bytes / 100).unwrap()).collect();
        let mut best = None;
        for_each_count(&room, left, &mut Vec::new(), &mut |more| {
            let counts: Vec<usize> = more.iter().zip(&held).map(|(more, held)| more + held).collect();
            best = best.max(rank(&policy, geometry, &candidates, &counts));
        });
        match choose(&policy, geometry, 100, &candidates, &keep) {
            Err(_) => prop_assert_eq!(best, None),
            Ok(placement) => {
                let stays = keep.iter().zip(&placement.backends).all(|(kept, got)| kept.is_none_or(|kept| kept == *got));
                prop_assert!(stays);
                let counts = counts_of(&candidates, &placement.backends);
                prop_assert!((0..counts.len()).all(|at| counts[at] <= held[at] + room[at]));
                prop_assert_eq!(rank(&policy, geometry, &candidates, &counts), best);
            }
        }
    }

    #[test]
    fn moves_are_the_fewest_that_reach_the_best_placement(candidates in any_cluster(), policy in any_policy(), picks in vec(any::<Option<Index>>(), 8)) {
        let current: Vec<Option<BackendId>> = (0..policy.geometry.total())
            .map(|shard| picks[shard].map(|pick| pick.get(&candidates).backend)).collect();
        let best = brute_moves(&policy, &candidates, &current);
        match moves(&policy, policy.geometry, 100, &current, &candidates) {
            Err(_) => prop_assert_eq!(best, None),
            Ok(found) => {
                let mut after = current.clone();
                for (shard, to) in &found.moves {
                    prop_assert_ne!(after[*shard as usize], Some(*to));
                    after[*shard as usize] = Some(*to);
                }
                let after: Vec<BackendId> = after.into_iter().map(Option::unwrap).collect();
                let counts = counts_of(&candidates, &after);
                let rank = rank(&policy, policy.geometry, &candidates, &counts).unwrap();
                prop_assert_eq!(best, Some((rank, found.moves.len())));
                let survival = survival(policy.geometry, &sites(&candidates, &all(&after))).unwrap();
                prop_assert_eq!(found.full_policy, holds(&policy, &survival));
                // The same cluster with what was moved on its disks.
                let held = counts_of(&candidates, &current.iter().flatten().copied().collect::<Vec<_>>());
                let mut later = candidates.clone();
                for ((candidate, held), count) in later.iter_mut().zip(held).zip(counts) {
                    candidate.free_bytes = candidate.free_bytes + 100 * held as u64 - 100 * count as u64;
                }
                let again = moves(&policy, policy.geometry, 100, &all(&after), &later).unwrap();
                prop_assert_eq!(again.moves, vec![]);
            }
        }
    }

    #[test]
    fn the_order_of_candidates_does_not_matter(candidates in any_cluster(), policy in any_policy(), turn in any::<Index>()) {
        let mut turned = candidates.clone();
        turned.rotate_left(turn.index(candidates.len()));
        turned.reverse();
        let choose = |candidates: &[Candidate]| choose(&policy, policy.geometry, 100, candidates, &[]);
        prop_assert_eq!(choose(&candidates), choose(&turned));
    }

    #[test]
    fn best_survival_can_be_had_and_no_more(candidates in any_cluster(), geometry in any_policy().prop_map(|policy| policy.geometry)) {
        match best_survival(geometry, &candidates) {
            Err(_) => prop_assert!(candidates.len() < geometry.total()),
            Ok(best) => {
                let full = |locations, nodes| {
                    let policy = policy(geometry, locations, nodes);
                    choose(&policy, geometry, 0, &candidates, &[]).unwrap().full_policy
                };
                prop_assert!(full(best.survive_locations, best.survive_nodes));
                prop_assert!(!full(best.survive_locations + 1, 0));
                prop_assert!(!full(best.survive_locations, best.survive_nodes + 1));
            }
        }
    }
}

/// The development cluster: two locations of two nodes of two backends, 4+4.
#[test]
fn four_plus_four_on_two_locations_survives_a_location() {
    let candidates = cluster(&[&[2, 2], &[2, 2]], 1 << 40);
    let best = best_survival(geometry(4, 4), &candidates).unwrap();
    assert_eq!(best, policy(geometry(4, 4), 1, 2));
    let placement = choose(&best, best.geometry, 1 << 24, &candidates, &[]).unwrap();
    assert!(placement.full_policy);
    assert!(
        counts_of(&candidates, &placement.backends)
            .iter()
            .all(|count| *count == 1)
    );
    let survival = survival(
        best.geometry,
        &sites(&candidates, &all(&placement.backends)),
    )
    .unwrap();
    assert_eq!(
        survival,
        Survival {
            locations: 1,
            nodes: 2,
            backends: 4,
        }
    );
}

/// One disk of eight is gone for good: two shards share a backend, and that is all the policy asks.
#[test]
fn eight_shards_on_seven_backends_are_at_policy() {
    let everything = cluster(&[&[2, 2], &[2, 2]], 1 << 40);
    let policy = policy(geometry(4, 4), 1, 2);
    let mut current = all(&choose(&policy, policy.geometry, 1 << 24, &everything, &[])
        .unwrap()
        .backends);
    let (gone, left) = everything.split_first().unwrap();
    for shard in current.iter_mut().filter(|at| **at == Some(gone.backend)) {
        *shard = None;
    }
    let found = moves(&policy, policy.geometry, 1 << 24, &current, left).unwrap();
    assert_eq!(found.moves.len(), 1);
    assert!(found.full_policy && found.missing.is_empty());
}

#[test]
fn with_a_location_down_all_shards_are_stored_two_per_backend_and_moved_back_later() {
    let everything = cluster(&[&[2, 2], &[2, 2]], 1 << 40);
    let policy = policy(geometry(4, 4), 1, 2);
    let up = &everything[4..];
    let placement = choose(&policy, policy.geometry, 1 << 24, up, &[]).unwrap();
    assert!(!placement.full_policy);
    assert!(
        placement.missing.contains("1 location"),
        "{}",
        placement.missing
    );
    assert!(
        counts_of(up, &placement.backends)
            .iter()
            .all(|count| *count == 2)
    );
    let back = moves(
        &policy,
        policy.geometry,
        1 << 24,
        &all(&placement.backends),
        &everything,
    )
    .unwrap();
    assert!(back.full_policy && back.missing.is_empty());
    assert_eq!(back.moves.len(), 4);
    let to: BTreeSet<BackendId> = back.moves.iter().map(|(_, to)| *to).collect();
    assert_eq!(to, everything[..4].iter().map(|one| one.backend).collect());
}

#[test]
fn a_single_backend_is_refused_and_the_text_says_what_is_missing() {
    let text = choose(
        &policy(geometry(4, 4), 1, 1),
        geometry(4, 4),
        100,
        &cluster(&[&[1]], 1 << 30),
        &[],
    )
    .unwrap_err()
    .to_string();
    assert!(
        text.contains("at least 2 backends") && text.contains("loc0: 1 backend on 1 node"),
        "{text}"
    );
    let text = choose(
        &policy(geometry(4, 4), 1, 1),
        geometry(4, 4),
        100,
        &cluster(&[&[1, 3]], 99),
        &[],
    )
    .unwrap_err()
    .to_string();
    assert!(text.contains("4 full"), "{text}");
    let text = best_survival(geometry(4, 4), &cluster(&[&[4], &[3]], 0)).unwrap_err();
    assert!(
        text.contains("needs 8 backends") && text.contains("7 are joined"),
        "{text}"
    );
}

#[test]
fn a_kept_shard_on_an_unknown_backend_is_refused() {
    let candidates = cluster(&[&[1, 1, 1]], 1000);
    let keep = [Some(BackendId(9)), None, None];
    let policy = policy(geometry(2, 1), 0, 0);
    assert!(choose(&policy, policy.geometry, 100, &candidates, &keep).is_err());
    assert!(moves(&policy, policy.geometry, 100, &keep, &candidates).is_err());
    assert!(choose(&policy, policy.geometry, 100, &candidates, &keep[..2]).is_err());
}

#[test]
fn shards_are_spread_evenly_and_data_shards_are_not_all_at_one_location() {
    let candidates = cluster(&[&[2, 2], &[4], &[1, 1, 1, 1]], 1 << 40);
    let policy = policy(geometry(4, 2), 1, 1);
    let placement = choose(&policy, policy.geometry, 1 << 24, &candidates, &[]).unwrap();
    let counts = counts_of(&candidates, &placement.backends);
    let at_location: Vec<usize> = counts.chunks(4).map(|counts| counts.iter().sum()).collect();
    assert_eq!(at_location, vec![2, 2, 2]);
    assert!(
        counts[0] + counts[1] == 1,
        "one on each of the two nodes of the first location"
    );
    let of_data: BTreeSet<_> = placement.backends[..3]
        .iter()
        .map(|backend| (backend.0 - 1) / 4)
        .collect();
    assert_eq!(of_data.len(), 3);
}

#[test]
fn more_free_space_is_taken_first_within_a_node() {
    let mut candidates = cluster(&[&[3], &[3]], 1000);
    candidates[1].free_bytes = 5000;
    candidates[5].free_bytes = 5000;
    let policy = policy(geometry(1, 1), 1, 1);
    let placement = choose(&policy, policy.geometry, 100, &candidates, &[]).unwrap();
    assert_eq!(placement.backends, vec![BackendId(2), BackendId(6)]);
}

/// Large clusters and geometries stay within what a leader can do for every push. No time is asserted; a blow-up would hang here.
#[test]
fn a_large_cluster_is_no_problem() {
    let nodes = [4; 10];
    let shape: Vec<&[usize]> = (0..10).map(|_| &nodes[..]).collect();
    let candidates = cluster(&shape, 1 << 40);
    let policy = policy(geometry(40, 24), 2, 6);
    let placement = choose(&policy, policy.geometry, 1 << 24, &candidates, &[]).unwrap();
    assert!(!placement.full_policy || placement.missing.is_empty());
    let mut current = all(&placement.backends);
    current[3] = None;
    current[50] = None;
    let moves = moves(&policy, policy.geometry, 1 << 24, &current, &candidates).unwrap();
    assert_eq!(moves.moves.len(), 2);
}
