//! How much a set of backends can still take.

use crate::policy::Geometry;

/// Bytes per shard that stripes of this geometry can still get from backends with these free bytes, when any one backend may be lost:
/// the greatest `T` for which the backends, each taking at most `m` shards of a stripe, have `(k + m) * T` together. With so few
/// backends that no stripe survives the loss of one, only the sum counts.
pub fn room_per_shard(free_bytes: &[u64], geometry: Geometry) -> u64 {
    let (shards, on_one) = (geometry.total(), geometry.parity());
    let mut free = free_bytes.to_vec();
    free.sort_unstable_by(|a, b| b.cmp(a));
    let mut rest: u128 = free.iter().map(|bytes| u128::from(*bytes)).sum();
    let mut room = rest / shards as u128;
    if shards <= on_one * free.len() {
        // The largest may have more than they can use: they take their most, and the others must have the rest.
        for (largest, bytes) in (1..).zip(&free) {
            rest -= u128::from(*bytes);
            let Some(left) = shards
                .checked_sub(on_one * largest)
                .filter(|left| *left > 0)
            else {
                break;
            };
            room = room.min(rest / left as u128);
        }
    }
    u64::try_from(room).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    fn fits(free: &[u64], geometry: Geometry, room: u64) -> bool {
        let most = room * geometry.parity() as u64;
        let given: u64 = free.iter().map(|bytes| (*bytes).min(most)).sum();
        given >= room * geometry.total() as u64
    }

    proptest! {
        #[test]
        fn it_is_the_greatest_that_fits(free in proptest::collection::vec(0_u64..200, 0..12), k in 1_u32..6, m in 1_u32..5) {
            let geometry = Geometry::new(k, m).unwrap();
            let room = room_per_shard(&free, geometry);
            if geometry.total() > geometry.parity() * free.len() {
                prop_assert_eq!(room, free.iter().sum::<u64>() / geometry.total() as u64);
            } else {
                let naive = (0..=2400).rev().find(|room| fits(&free, geometry, *room));
                prop_assert_eq!(Some(room), naive);
            }
        }
    }

    #[test]
    fn one_backend_cannot_take_more_of_a_stripe_than_may_be_lost() {
        let geometry = Geometry::new(2, 1).unwrap();
        assert_eq!(room_per_shard(&[100, 100, 7], geometry), 7);
        assert_eq!(room_per_shard(&[100, 100, 7, 50], geometry), 57);
        assert_eq!(room_per_shard(&[], geometry), 0);
        let doubled = Geometry::new(2, 2).unwrap();
        assert_eq!(room_per_shard(&[100, 100, 0, 0], doubled), 50);
    }
}
