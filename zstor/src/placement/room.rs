//! How much a set of backends can still take when every shard of a stripe wants a backend of its own.

/// Bytes per shard that stripes of `shards` shards can still get from backends with these free bytes, one backend per shard: the
/// greatest `T` for which the backends, each giving at most `T`, give `shards * T` together. With fewer backends than shards some
/// must share, and only the sum counts.
pub fn room_per_shard(free_bytes: &[u64], shards: usize) -> u64 {
    assert!(shards > 0, "a stripe has shards");
    let mut free = free_bytes.to_vec();
    free.sort_unstable_by(|a, b| b.cmp(a));
    let mut rest: u128 = free.iter().map(|bytes| u128::from(*bytes)).sum();
    // The largest ones may have more than they can use: then they give T each, and the others must give the rest.
    let mut room = u128::MAX;
    for capped in 0..shards.min(free.len()) {
        room = room.min(rest / (shards - capped) as u128);
        if free.len() < shards {
            break;
        }
        rest -= u128::from(free[capped]);
    }
    if free.is_empty() {
        return 0;
    }
    u64::try_from(room).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fits(free: &[u64], shards: usize, room: u64) -> bool {
        let given: u64 = free.iter().map(|bytes| (*bytes).min(room)).sum();
        given >= room * shards as u64
    }

    proptest! {
        #[test]
        fn it_is_the_greatest_that_fits(free in proptest::collection::vec(0_u64..200, 0..12), shards in 1_usize..9) {
            let room = room_per_shard(&free, shards);
            if free.len() < shards {
                prop_assert_eq!(room, free.iter().sum::<u64>() / shards as u64);
            } else {
                let naive = (0..=200).rev().find(|room| fits(&free, shards, *room));
                prop_assert_eq!(Some(room), naive);
            }
        }
    }

    #[test]
    fn one_small_backend_of_just_enough_limits_all() {
        assert_eq!(room_per_shard(&[100, 100, 7], 3), 7);
        assert_eq!(room_per_shard(&[100, 100, 7, 50], 3), 57);
        assert_eq!(room_per_shard(&[], 3), 0);
    }
}
