//! A geometry for what must be survivable, when a volume is created: strict, nothing is given up.

use super::{Candidate, best_survival, choose};
use crate::policy::{Geometry, Policy};

/// Widest stripe that is chosen unasked: more shards save little and cost a request each.
pub const CHOSEN_SHARDS_MAX: usize = 20;

/// What must be survivable at once, each alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Survive {
    /// Any so many locations.
    pub locations: u32,
    /// Any so many nodes.
    pub nodes: u32,
}

/// The policy of this geometry that survives what is asked, if these backends can meet it in full, each shard on a backend of its
/// own. The error says what is missing.
pub fn strictly_meets(
    geometry: Geometry,
    survive: Survive,
    candidates: &[Candidate],
) -> Result<Policy, String> {
    best_survival(geometry, candidates)?;
    let policy = Policy {
        geometry,
        survive_locations: survive.locations,
        survive_nodes: survive.nodes,
    };
    match choose(&policy, geometry, 0, candidates, &[]) {
        Ok(placement) if placement.full_policy => Ok(policy),
        Ok(placement) => Err(placement.missing),
        Err(unplaceable) => Err(unplaceable.missing),
    }
}

/// The policy that stores the fewest bytes and survives what is asked; of equals the one with most shards, up to
/// [`CHOSEN_SHARDS_MAX`]. The error says what is missing for the easiest one.
pub fn smallest_geometry(survive: Survive, candidates: &[Candidate]) -> Result<Policy, String> {
    let widest = candidates.len().min(CHOSEN_SHARDS_MAX);
    let mut geometries: Vec<(usize, usize)> = (2..=widest)
        .flat_map(|total| (1..total).map(move |data| (data, total - data)))
        .collect();
    // Least parity per data first: a/b < c/d as a·d < c·b, so that no rounding decides.
    geometries
        .sort_by(|&(k1, m1), &(k2, m2)| (m1 * k2).cmp(&(m2 * k1)).then((k2 + m2).cmp(&(k1 + m1))));
    let mut missing = format!(
        "no geometry fits {} backends: join at least two",
        candidates.len()
    );
    for (data, parity) in geometries {
        let (Ok(data), Ok(parity)) = (u32::try_from(data), u32::try_from(parity)) else {
            continue;
        };
        let Ok(geometry) = Geometry::new(data, parity) else {
            continue;
        };
        match strictly_meets(geometry, survive, candidates) {
            Ok(policy) => return Ok(policy),
            Err(text) => missing = text,
        }
    }
    Err(missing)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::id::BackendId;

    /// `layout[l][n]` backends on node `n` of location `l`.
    fn candidates(layout: &[&[u32]]) -> Vec<Candidate> {
        let mut all = Vec::new();
        for (location, nodes) in layout.iter().enumerate() {
            for (node, backends) in nodes.iter().enumerate() {
                for _ in 0..*backends {
                    all.push(Candidate {
                        backend: BackendId(all.len() as u64 + 1),
                        location: format!("loc{location}").parse().unwrap(),
                        node: format!("n{node}").parse().unwrap(),
                        free_bytes: 1 << 30,
                    });
                }
            }
        }
        all
    }

    fn survive(locations: u32, nodes: u32) -> Survive {
        Survive { locations, nodes }
    }

    #[test]
    fn two_locations_of_four_need_twice_the_bytes() {
        let policy = smallest_geometry(survive(1, 1), &candidates(&[&[2, 2], &[2, 2]])).unwrap();
        assert_eq!(policy.geometry.to_string(), "4+4");
    }

    #[test]
    fn three_locations_need_half_as_much_again() {
        let all = candidates(&[&[1, 1], &[1, 1], &[1, 1]]);
        let policy = smallest_geometry(survive(1, 1), &all).unwrap();
        assert_eq!(policy.geometry.to_string(), "4+2");
    }

    #[test]
    fn one_location_cannot_survive_its_own_loss() {
        let missing = smallest_geometry(survive(1, 0), &candidates(&[&[2, 2]])).unwrap_err();
        assert!(missing.contains("location"), "{missing}");
        assert!(smallest_geometry(survive(0, 0), &[]).is_err());
    }

    #[test]
    fn a_geometry_with_more_shards_than_backends_is_refused() {
        let all = candidates(&[&[2, 2], &[2, 1]]);
        let geometry = Geometry::new(4, 4).unwrap();
        assert!(strictly_meets(geometry, survive(0, 0), &all).is_err());
        let policy = strictly_meets(Geometry::new(3, 3).unwrap(), survive(0, 1), &all).unwrap();
        assert_eq!(policy.survive_nodes, 1);
    }
}
