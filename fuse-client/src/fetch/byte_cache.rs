//! A cache of byte strings, bounded by their bytes, least recently used out first.

use bytes::Bytes;
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// See the module.
#[derive(Debug)]
pub struct ByteCache<K> {
    limit_bytes: usize,
    bytes: usize,
    tick: u64,
    entries: HashMap<K, (u64, Bytes)>,
    order: BTreeMap<u64, K>,
}

impl<K: Clone + Eq + Hash> ByteCache<K> {
    /// Holds at most `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Self {
        Self {
            limit_bytes,
            bytes: 0,
            tick: 0,
            entries: HashMap::new(),
            order: BTreeMap::new(),
        }
    }

    /// The value, now the most recently used.
    pub fn get(&mut self, key: &K) -> Option<Bytes> {
        let (used, value) = self.entries.get_mut(key)?;
        self.order.remove(used);
        self.tick += 1;
        *used = self.tick;
        self.order.insert(self.tick, key.clone());
        Some(value.clone())
    }

    /// Puts a value in. One that is larger than the limit is not kept.
    pub fn put(&mut self, key: K, value: Bytes) {
        self.remove(&key);
        if value.len() > self.limit_bytes {
            return;
        }
        self.tick += 1;
        self.bytes += value.len();
        self.order.insert(self.tick, key.clone());
        self.entries.insert(key, (self.tick, value));
        while self.bytes > self.limit_bytes {
            let Some((_, oldest)) = self.order.pop_first() else {
                return;
            };
            if let Some((_, value)) = self.entries.remove(&oldest) {
                self.bytes -= value.len();
            }
        }
    }

    /// Takes a value out.
    pub fn remove(&mut self, key: &K) {
        if let Some((used, value)) = self.entries.remove(key) {
            self.order.remove(&used);
            self.bytes -= value.len();
        }
    }

    /// Is it there? Does not count as use.
    pub fn contains(&self, key: &K) -> bool {
        self.entries.contains_key(key)
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.order.clear();
        self.bytes = 0;
    }

    /// Bytes held.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_like_a_list_in_order_of_use(
            limit in 0_usize..60,
            operations in proptest::collection::vec((0_u8..8, proptest::option::of(0_usize..30)), 0..100),
        ) {
            let mut cache = ByteCache::new(limit);
            // Naive: most recent last.
            let mut model: Vec<(u8, usize)> = Vec::new();
            for (key, put) in operations {
                let known = model.iter().position(|(other, _)| *other == key).map(|at| model.remove(at));
                if let Some(bytes) = put {
                    cache.put(key, Bytes::from(vec![key; bytes]));
                    if bytes <= limit {
                        model.push((key, bytes));
                    }
                    while model.iter().map(|(_, bytes)| bytes).sum::<usize>() > limit {
                        model.remove(0);
                    }
                } else {
                    prop_assert_eq!(cache.get(&key).map(|value| value.len()), known.map(|(_, bytes)| bytes));
                    model.extend(known);
                }
                prop_assert_eq!(cache.bytes(), model.iter().map(|(_, bytes)| bytes).sum::<usize>());
            }
        }
    }
}
