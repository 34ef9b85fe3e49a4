//! Rows packed into blocks: what the store below keeps as one value.
//!
//! ```text
//! | crc32 | row | row | ...                     crc32 u32, of everything behind it
//! row: | shared | rest | value | rest ... | value ... |     the first three: lengths in bytes, varints (7 bits a byte, low first)
//! ```
//!
//! Rows ascend by key. `shared` is how many bytes of its key a row has in common with the row before it (0 for the first), `rest`
//! the number of those that follow here. Keys of one table differ in their last bytes, so most rows spend few bytes on them.

use crate::state::kv::{KvError, Pair, RowKey};

/// Bytes a block is cut at. sled puts up to 17 values into one page, and pages above 128 KiB into files it does not sync.
pub const BLOCK_BYTES: usize = 6 << 10;

/// Rows a block is cut at: a look-up walks half of them.
pub const BLOCK_ROWS: usize = 256;

fn damaged(reason: &str) -> KvError {
    KvError::Damaged(format!("a block of rows {reason}"))
}

fn varint_bytes(number: usize) -> usize {
    let bits = usize::BITS - number.leading_zeros();
    bits.div_ceil(7).max(1) as usize
}

fn put_varint(out: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        out.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

fn take_varint(rest: &mut &[u8]) -> Result<usize, KvError> {
    let (mut number, mut shift) = (0, 0);
    loop {
        let (byte, behind) = rest.split_first().ok_or_else(|| damaged("ends early"))?;
        *rest = behind;
        number |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
        shift += 7;
        if shift > 28 {
            return Err(damaged("holds an impossible length"));
        }
    }
}

fn take<'a>(rest: &mut &'a [u8], bytes: usize) -> Result<&'a [u8], KvError> {
    let split = rest.split_at_checked(bytes);
    let (taken, behind) = split.ok_or_else(|| damaged("ends early"))?;
    *rest = behind;
    Ok(taken)
}

fn in_common(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Bytes a row takes behind a row with the key `before`.
fn row_bytes(before: &[u8], key: &[u8], value: &[u8]) -> usize {
    let shared = in_common(before, key);
    let rest = key.len() - shared;
    varint_bytes(shared) + varint_bytes(rest) + varint_bytes(value.len()) + rest + value.len()
}

/// Rows in key order as blocks, each with the key of its first row: as few as the limits allow, of about the same size.
pub fn encode(rows: &[Pair]) -> Vec<Pair> {
    let mut before: &[u8] = &[];
    let mut total = 0;
    for (key, value) in rows {
        total += row_bytes(before, key, value);
        before = key;
    }
    let parts = total
        .div_ceil(BLOCK_BYTES)
        .max(rows.len().div_ceil(BLOCK_ROWS))
        .max(1);
    let (bytes_max, rows_max) = (total.div_ceil(parts), rows.len().div_ceil(parts));
    let by_rows = rows.len().div_ceil(BLOCK_ROWS) == parts;
    let mut blocks: Vec<Pair> = Vec::with_capacity(parts + 1);
    let mut in_last = 0;
    let mut before: &[u8] = &[];
    for (key, value) in rows {
        let full = blocks.last().is_none_or(|(_, block)| {
            let bytes = block.len() + row_bytes(before, key, value);
            in_last >= BLOCK_ROWS
                || (by_rows && in_last >= rows_max)
                || bytes > 4 + BLOCK_BYTES.min(bytes_max + bytes_max / 16)
        });
        if full {
            blocks.push((key.clone(), vec![0; 4]));
            in_last = 0;
            before = &[];
        }
        let (_, block) = blocks.last_mut().expect("one was just pushed");
        let shared = in_common(before, key);
        put_varint(block, shared);
        put_varint(block, key.len() - shared);
        put_varint(block, value.len());
        block.extend_from_slice(&key[shared..]);
        block.extend_from_slice(value);
        in_last += 1;
        before = key;
    }
    for (_, block) in &mut blocks {
        let crc = crc32fast::hash(&block[4..]);
        block[..4].copy_from_slice(&crc.to_le_bytes());
    }
    blocks
}

/// The rows of a block as bytes, which are those that were written.
fn verified(block: &[u8]) -> Result<&[u8], KvError> {
    let mut rest = block;
    let crc = take(&mut rest, 4)?;
    if crc != crc32fast::hash(rest).to_le_bytes() {
        return Err(damaged("does not verify"));
    }
    Ok(rest)
}

/// A block is as it was written. For whoever reads single rows of it.
pub fn verify(block: &[u8]) -> Result<(), KvError> {
    verified(block).map(drop)
}

/// All rows of a block, verified.
pub fn decode(block: &[u8]) -> Result<Vec<Pair>, KvError> {
    let mut rest = verified(block)?;
    let mut rows: Vec<Pair> = Vec::new();
    while !rest.is_empty() {
        let shared = take_varint(&mut rest)?;
        let (key_rest, value) = (take_varint(&mut rest)?, take_varint(&mut rest)?);
        let before: &[u8] = rows.last().map_or(&[], |(key, _)| key);
        let head = before.get(..shared);
        let mut key = RowKey::with_capacity(shared + key_rest);
        key.extend_from_slice(head.ok_or_else(|| damaged("shares more than there is"))?);
        key.extend_from_slice(take(&mut rest, key_rest)?);
        if !rows.is_empty() && key.as_slice() <= before {
            return Err(damaged("is not in order"));
        }
        rows.push((key, take(&mut rest, value)?.to_vec()));
    }
    Ok(rows)
}

/// Verifies a block without taking it apart: its first key is `first`, and its last one below `below`.
pub fn check(block: &[u8], first: &[u8], below: Option<&[u8]>) -> Result<(), KvError> {
    let mut rest = verified(block)?;
    let mut key = RowKey::new();
    let mut rows = 0;
    while !rest.is_empty() {
        let shared = take_varint(&mut rest)?;
        let (key_rest, value) = (take_varint(&mut rest)?, take_varint(&mut rest)?);
        let tail = take(&mut rest, key_rest)?;
        take(&mut rest, value)?;
        if shared > key.len() || (rows > 0 && tail <= &key[shared..]) {
            return Err(damaged("is not in order"));
        }
        key.truncate(shared);
        key.extend_from_slice(tail);
        if rows == 0 && *key != *first {
            return Err(damaged("does not begin with its key"));
        }
        rows += 1;
    }
    if rows == 0 || below.is_some_and(|below| key.as_slice() >= below) {
        return Err(damaged("holds rows of another"));
    }
    Ok(())
}

/// The rows of a block that are not below `from`, at most `max`; not verified as a whole.
pub fn rows_from(block: &[u8], from: &[u8], max: usize) -> Result<Vec<Pair>, KvError> {
    let mut rest = block;
    take(&mut rest, 4)?;
    let mut key = RowKey::new();
    let mut rows = Vec::new();
    while !rest.is_empty() && rows.len() < max {
        let shared = take_varint(&mut rest)?;
        let (key_rest, value) = (take_varint(&mut rest)?, take_varint(&mut rest)?);
        if shared > key.len() {
            return Err(damaged("shares more than there is"));
        }
        key.truncate(shared);
        key.extend_from_slice(take(&mut rest, key_rest)?);
        let value = take(&mut rest, value)?;
        if key.as_slice() >= from {
            rows.push((key.clone(), value.to_vec()));
        }
    }
    Ok(rows)
}

/// The value of a key. Keys are not put together for it: what a row shares with its predecessor says how the two compare.
pub fn find<'a>(block: &'a [u8], key: &[u8]) -> Result<Option<&'a [u8]>, KvError> {
    let mut rest = block;
    take(&mut rest, 4)?;
    // All rows so far are below `key`, and the last of them has so many bytes in common with it.
    let mut matched = 0;
    while !rest.is_empty() {
        let shared = take_varint(&mut rest)?;
        let (key_rest, value) = (take_varint(&mut rest)?, take_varint(&mut rest)?);
        let tail = take(&mut rest, key_rest)?;
        let value = take(&mut rest, value)?;
        if shared > matched {
            continue;
        }
        if shared < matched {
            return Ok(None);
        }
        let wanted = &key[matched..];
        match tail.cmp(wanted) {
            std::cmp::Ordering::Equal => return Ok(Some(value)),
            std::cmp::Ordering::Less => matched += in_common(tail, wanted),
            std::cmp::Ordering::Greater => return Ok(None),
        }
    }
    Ok(None)
}

/// The keys next to one, below and above.
pub type Around = (Option<RowKey>, Option<RowKey>);

/// The keys around one that a block does not hold; `None` where the block ends.
pub fn around(block: &[u8], key: &[u8]) -> Result<Around, KvError> {
    let mut rest = block;
    take(&mut rest, 4)?;
    // The last key that is lower, and the one at work: they change places.
    let (mut lower, mut at) = (RowKey::new(), RowKey::new());
    let mut any_lower = false;
    while !rest.is_empty() {
        let shared = take_varint(&mut rest)?;
        let (key_rest, value) = (take_varint(&mut rest)?, take_varint(&mut rest)?);
        let head = lower.get(..shared);
        at.clear();
        at.extend_from_slice(head.ok_or_else(|| damaged("shares more than there is"))?);
        at.extend_from_slice(take(&mut rest, key_rest)?);
        take(&mut rest, value)?;
        if at.as_slice() > key {
            return Ok((any_lower.then_some(lower), Some(at)));
        }
        std::mem::swap(&mut lower, &mut at);
        any_lower = true;
    }
    Ok((any_lower.then_some(lower), None))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn rows() -> impl Strategy<Value = BTreeMap<RowKey, Vec<u8>>> {
        let key = prop::collection::vec(0u8..3, 0..7).prop_map(RowKey::from_vec);
        let value = prop_oneof![
            9 => prop::collection::vec(any::<u8>(), 0..20),
            1 => prop::collection::vec(any::<u8>(), 0..9_000),
        ];
        prop::collection::btree_map(key, value, 1..700)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn blocks_hold_what_was_put_in_and_find_it(rows in rows(), asked in prop::collection::vec(prop::collection::vec(0u8..4, 0..7).prop_map(RowKey::from_vec), 50)) {
            let pairs: Vec<Pair> = rows.clone().into_iter().collect();
            let blocks = encode(&pairs);
            let mut read = Vec::new();
            for (first, block) in &blocks {
                verify(block).unwrap();
                let held = decode(block).unwrap();
                prop_assert_eq!(&held[0].0, first);
                prop_assert!(held.len() <= BLOCK_ROWS);
                prop_assert!(held.len() == 1 || block.len() <= BLOCK_BYTES + 4);
                for key in &asked {
                    let here = held.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_slice());
                    prop_assert_eq!(find(block, key).unwrap(), here);
                    if here.is_none() {
                        let lower = held.iter().map(|(k, _)| k).rfind(|k| *k < key);
                        let higher = held.iter().map(|(k, _)| k).find(|k| *k > key);
                        prop_assert_eq!(around(block, key).unwrap(), (lower.cloned(), higher.cloned()));
                    }
                    let above: Vec<Pair> = held.iter().filter(|(k, _)| k >= key).take(5).cloned().collect();
                    prop_assert_eq!(rows_from(block, key, 5).unwrap(), above);
                }
                read.extend(held);
            }
            prop_assert_eq!(read, pairs);
        }

        #[test]
        fn a_flipped_bit_is_found(rows in rows(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let pairs: Vec<Pair> = rows.into_iter().collect();
            let mut block = encode(&pairs).swap_remove(0).1;
            let at = at.index(block.len());
            block[at] ^= 1 << bit;
            prop_assert!(decode(&block).is_err());
            prop_assert!(verify(&block).is_err());
        }
    }

    #[test]
    fn full_blocks_are_few() {
        let pair = |n: u32| (RowKey::from_slice(&n.to_be_bytes()), vec![7; 100]);
        let pairs: Vec<Pair> = (0..6_000).map(pair).collect();
        let bytes: usize = encode(&pairs).iter().map(|(_, block)| block.len()).sum();
        let least = bytes.div_ceil(BLOCK_BYTES);
        let blocks = encode(&pairs).len();
        assert!(blocks <= least + least / 8, "{blocks} for {least}");
    }
}
