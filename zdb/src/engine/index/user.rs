//! The entries of a namespace in user mode, in memory: a record and the key side by side in slabs (one slab per key length), and hash
//! tables of 5-byte references to them. Besides the key an entry costs 32 bytes of record, 9 to 12 of scan order and 7 to 14 of hash
//! table.

use super::order::Order;
use super::record::{Entry, RECORD_BYTES};
use hashbrown::HashTable;
use std::hash::{BuildHasher, RandomState};

/// Hash tables; each grows by itself, so that growing never stops the namespace for long.
const TABLES: usize = 256;
/// Records of one allocation.
const CHUNK_RECORDS: u32 = 256;

/// Key length, then the number within its slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(pub(super) [u8; 5]);

impl Slot {
    fn of(key_bytes: u8, number: u32) -> Self {
        let [a, b, c, d] = number.to_le_bytes();
        Self([key_bytes, a, b, c, d])
    }

    fn key_bytes(self) -> usize {
        usize::from(self.0[0])
    }

    fn number(self) -> u32 {
        u32::from_le_bytes([self.0[1], self.0[2], self.0[3], self.0[4]])
    }
}

/// Records with keys of one length.
#[derive(Debug, Default)]
struct Slab {
    chunks: Vec<Box<[u8]>>,
    /// Records handed out so far.
    used: u32,
    /// The first of the free records, each of which names the next.
    free: Option<u32>,
}

impl Slab {
    fn place(number: u32, key_bytes: usize) -> (usize, std::ops::Range<usize>) {
        let stride = RECORD_BYTES + key_bytes;
        let at = (number % CHUNK_RECORDS) as usize * stride;
        ((number / CHUNK_RECORDS) as usize, at..at + stride)
    }

    fn record(&self, number: u32, key_bytes: usize) -> &[u8] {
        let (chunk, range) = Self::place(number, key_bytes);
        &self.chunks[chunk][range]
    }

    fn record_mut(&mut self, number: u32, key_bytes: usize) -> &mut [u8] {
        let (chunk, range) = Self::place(number, key_bytes);
        &mut self.chunks[chunk][range]
    }

    fn take(&mut self, key_bytes: usize) -> u32 {
        if let Some(number) = self.free {
            let record = self.record(number, key_bytes);
            let next = u32::from_le_bytes([record[0], record[1], record[2], record[3]]);
            self.free = (next != u32::MAX).then_some(next);
            return number;
        }
        let number = self.used;
        assert!(
            number < u32::MAX,
            "four thousand million keys of one length"
        );
        if number.is_multiple_of(CHUNK_RECORDS) {
            let bytes = CHUNK_RECORDS as usize * (RECORD_BYTES + key_bytes);
            self.chunks.push(vec![0; bytes].into_boxed_slice());
        }
        self.used += 1;
        number
    }

    fn give_back(&mut self, number: u32, key_bytes: usize) {
        let next = self.free.unwrap_or(u32::MAX);
        let record = self.record_mut(number, key_bytes);
        record.fill(0);
        record[..4].copy_from_slice(&next.to_le_bytes());
        self.free = Some(number);
    }
}

fn hash_of(slabs: &[Slab], hasher: &RandomState, slot: Slot) -> u64 {
    let record = slabs[slot.key_bytes()].record(slot.number(), slot.key_bytes());
    hasher.hash_one(&record[RECORD_BYTES..])
}

#[derive(Debug)]
pub(super) struct UserTable {
    tables: Vec<HashTable<Slot>>,
    slabs: Vec<Slab>,
    hasher: RandomState,
    order: Order,
}

impl UserTable {
    pub(super) fn new() -> Self {
        Self {
            tables: (0..TABLES).map(|_| HashTable::new()).collect(),
            slabs: (0..=super::super::KEY_BYTES_MAX)
                .map(|_| Slab::default())
                .collect(),
            hasher: RandomState::new(),
            order: Order::default(),
        }
    }

    fn record(&self, slot: Slot) -> (&[u8], &[u8]) {
        let slab = &self.slabs[slot.key_bytes()];
        slab.record(slot.number(), slot.key_bytes())
            .split_at(RECORD_BYTES)
    }

    fn table_of(hash: u64) -> usize {
        // The tables themselves use the lowest and the highest 7 bits.
        (hash >> 40) as usize % TABLES
    }

    fn find(&self, hash: u64, key: &[u8]) -> Option<Slot> {
        self.tables[Self::table_of(hash)]
            .find(hash, |&slot| {
                slot.key_bytes() == key.len() && self.record(slot).1 == key
            })
            .copied()
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<Entry> {
        let slot = self.find(self.hasher.hash_one(key), key)?;
        Entry::decode(self.record(slot).0)
    }

    /// The entry of a key; where there is none this one is put, with one search for both.
    pub(super) fn get_or_put(&mut self, key: &[u8], entry: &Entry) -> Option<Entry> {
        let hash = self.hasher.hash_one(key);
        let slot = match self.find(hash, key) {
            Some(slot) => match Entry::decode(self.record(slot).0) {
                Some(old) => return Some(old),
                None => slot,
            },
            None => self.insert(hash, key),
        };
        self.write(slot, entry);
        None
    }

    /// Put or replace a key's entry.
    pub(super) fn put(&mut self, key: &[u8], entry: &Entry) {
        let hash = self.hasher.hash_one(key);
        let slot = match self.find(hash, key) {
            Some(slot) => {
                if let Some(old) = Entry::decode(self.record(slot).0)
                    && !old.deleted
                {
                    self.order.remove(old.version);
                }
                slot
            }
            None => self.insert(hash, key),
        };
        self.write(slot, entry);
    }

    fn write(&mut self, slot: Slot, entry: &Entry) {
        let slab = &mut self.slabs[slot.key_bytes()];
        slab.record_mut(slot.number(), slot.key_bytes())[..RECORD_BYTES]
            .copy_from_slice(&entry.encode());
        if !entry.deleted {
            self.order.insert(entry.version, slot);
        }
    }

    fn insert(&mut self, hash: u64, key: &[u8]) -> Slot {
        let key_bytes = u8::try_from(key.len()).expect("keys are checked to be at most 255 bytes");
        let slab = &mut self.slabs[key.len()];
        let number = slab.take(key.len());
        slab.record_mut(number, key.len())[RECORD_BYTES..].copy_from_slice(key);
        let slot = Slot::of(key_bytes, number);
        let (slabs, hasher) = (&self.slabs, &self.hasher);
        self.tables[Self::table_of(hash)]
            .insert_unique(hash, slot, |slot| hash_of(slabs, hasher, *slot));
        slot
    }

    /// Make room for so many more keys at once: growing step by step would look at every key again and again.
    pub(super) fn reserve(&mut self, keys: usize) {
        let (slabs, hasher) = (&self.slabs, &self.hasher);
        for table in &mut self.tables {
            // None is quite as full as the average.
            let keys = keys / TABLES + keys / TABLES / 16;
            table.reserve(keys, |slot| hash_of(slabs, hasher, *slot));
        }
    }

    /// Give back room that was not needed.
    pub(super) fn shrink(&mut self) {
        let (slabs, hasher) = (&self.slabs, &self.hasher);
        for table in &mut self.tables {
            if table.capacity() / 2 > table.len() {
                table.shrink_to_fit(|slot| hash_of(slabs, hasher, *slot));
            }
        }
    }

    pub(super) fn remove(&mut self, key: &[u8]) {
        let hash = self.hasher.hash_one(key);
        let Some(slot) = self.find(hash, key) else {
            return;
        };
        if let Some(old) = Entry::decode(self.record(slot).0)
            && !old.deleted
        {
            self.order.remove(old.version);
        }
        let table = &mut self.tables[Self::table_of(hash)];
        if let Ok(found) = table.find_entry(hash, |&other| other == slot) {
            found.remove();
        }
        self.slabs[key.len()].give_back(slot.number(), key.len());
    }

    /// Bytes allocated, keys included.
    #[cfg(test)]
    pub(super) fn memory_bytes(&self) -> usize {
        let chunk = |(key_bytes, slab): (usize, &Slab)| {
            let chunk_bytes = CHUNK_RECORDS as usize * (RECORD_BYTES + key_bytes);
            slab.chunks.len() * chunk_bytes + slab.chunks.capacity() * size_of::<Box<[u8]>>()
        };
        let slabs: usize = self.slabs.iter().enumerate().map(chunk).sum();
        let tables: usize = self.tables.iter().map(HashTable::allocation_size).sum();
        slabs + tables + self.order.memory_bytes()
    }

    fn show(&self, (version, slot): (u64, Slot)) -> Option<(u64, &[u8], Entry)> {
        let (record, key) = self.record(slot);
        Some((version, key, Entry::decode(record)?))
    }

    pub(super) fn after(
        &self,
        position: Option<u64>,
    ) -> impl Iterator<Item = (u64, &[u8], Entry)> + '_ {
        self.order
            .after(position)
            .filter_map(|found| self.show(found))
    }

    pub(super) fn before(
        &self,
        position: Option<u64>,
    ) -> impl Iterator<Item = (u64, &[u8], Entry)> + '_ {
        self.order
            .before(position)
            .filter_map(|found| self.show(found))
    }
}
