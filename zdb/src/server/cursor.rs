//! Cursors of SCAN: opaque to clients, 17 bytes as in 0-db.

use bytes::{Bytes, BytesMut};

const CURSOR_BYTES: usize = 17;
/// As a cursor of 0-db begins with the length of an id.
const MARK: u8 = 8;

/// A position in scan order, and what shows that it is one of ours.
pub(super) fn encode(position: u64) -> Bytes {
    let mut bytes = BytesMut::with_capacity(CURSOR_BYTES);
    bytes.extend_from_slice(&[MARK]);
    bytes.extend_from_slice(&position.to_le_bytes());
    bytes.extend_from_slice(&blake3::hash(&position.to_le_bytes()).as_bytes()[..8]);
    bytes.freeze()
}

/// `None` for what [`encode`] does not make.
pub(super) fn decode(cursor: &[u8]) -> Option<u64> {
    let position = u64::from_le_bytes(cursor.get(1..9)?.try_into().ok()?);
    (encode(position)[..] == *cursor).then_some(position)
}

#[cfg(test)]
mod tests {
    use super::{decode, encode};
    use proptest::prelude::{any, prop, proptest};

    proptest! {
        #[test]
        fn a_cursor_is_the_position_it_was_made_of(position in any::<u64>()) {
            assert_eq!(encode(position).len(), 17);
            assert_eq!(decode(&encode(position)), Some(position));
        }

        #[test]
        fn other_bytes_are_no_cursor(bytes in prop::collection::vec(any::<u8>(), 0..40), at in 0..17_usize, flip in 1..=255_u8) {
            assert_eq!(decode(&bytes), None);
            let mut changed = encode(7).to_vec();
            changed[at] ^= flip;
            assert_eq!(decode(&changed), None);
        }
    }
}
