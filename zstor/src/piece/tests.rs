#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::codec::ObjectHeader;
use crate::id::Stream;
use proptest::collection::vec;
use proptest::prelude::*;

fn stripe() -> Stripe {
    let ids = ObjectIds {
        volume: VolumeId::from_bytes([1; 16]),
        stream: Stream::Meta,
        datafile: DatafileId(2),
        epoch: Epoch(3),
        salt: Salt::from_bytes([4; 16]),
    };
    let object_bytes = ObjectHeader::encoded_len(3) as u64 + 3 * 16 + 2500;
    let layout = Layout::new(Geometry::new(2, 2).unwrap(), object_bytes, 1000).unwrap();
    Stripe::new(ids, 1000, 2500, layout).unwrap()
}

fn value() -> Vec<u8> {
    encode_piece(&stripe(), 3, 0, &[0xa5; 1000])
}

#[test]
fn a_piece_round_trips_and_knows_its_place() {
    let value = value();
    let (header, payload) = verify_piece(&value).unwrap();
    assert_eq!(payload, [0xa5; 1000]);
    assert_eq!(
        (header.shard(), header.piece(), header.stripe()),
        (3, 0, &stripe())
    );
    assert_eq!(header.expect(&stripe(), 3, 0), Ok(()));
    for (shard, piece) in [(2, 0), (3, 1)] {
        assert!(matches!(
            header.expect(&stripe(), shard, piece),
            Err(PieceError::Misplaced { .. })
        ));
    }
    assert_eq!(
        PieceHeader::decode(&value[..PIECE_HEADER_BYTES]),
        Ok(header)
    );
}

#[test]
fn every_flipped_bit_and_every_cut_is_noticed() {
    let sound = value();
    for bit in 0..sound.len() * 8 {
        let mut value = sound.clone();
        value[bit / 8] ^= 1 << (bit % 8);
        assert!(verify_piece(&value).is_err(), "bit {bit}");
    }
    for length in 0..sound.len() {
        assert!(verify_piece(&sound[..length]).is_err(), "{length} bytes");
    }
    assert!(verify_piece(&[sound, vec![0]].concat()).is_err());
}

#[test]
fn a_later_version_is_named() {
    let mut value = value();
    value[8] = 2;
    let crc = crc32fast::hash(&value[..CRC_AT]);
    value[CRC_AT..PIECE_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(verify_piece(&value), Err(PieceError::Version(2)));
}

#[test]
fn piece_keys_round_trip_and_foreign_keys_are_none() {
    let key = stripe().piece_key(3, 0x0102_0304);
    assert_eq!(PieceKey::from_bytes(&key.to_bytes()), Some(key));
    assert!(stripe().piece_key(0, 9).to_bytes() < stripe().piece_key(0, 10).to_bytes());
    assert_eq!(PieceKey::from_bytes(b"q1"), None);
    assert_eq!(PieceKey::from_bytes(&[0; PieceKey::BYTES]), None);
}

proptest! {
    /// With a right checksum over wrong fields: whatever is accepted is valid, encodes to the same bytes, and nothing panics.
    #[test]
    fn what_decodes_encodes_to_the_same_bytes(changes in vec((8_usize..CRC_AT, any::<u8>()), 0..4)) {
        let mut value = value();
        for (at, byte) in changes {
            value[at] = byte;
        }
        let crc = crc32fast::hash(&value[..CRC_AT]);
        value[CRC_AT..PIECE_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
        if let Ok(header) = PieceHeader::decode(&value) {
            let mut head = [0; PIECE_HEADER_BYTES];
            header.encode_into(&mut head);
            prop_assert_eq!(&head[..], &value[..PIECE_HEADER_BYTES]);
            prop_assert!(header.payload_bytes() <= PIECE_BYTES_MAX);
        }
        let _ = verify_piece(&value);
    }

    #[test]
    fn random_bytes_are_no_piece(bytes in vec(any::<u8>(), 0..400)) {
        prop_assert!(verify_piece(&bytes).is_err());
        let _ = PieceKey::from_bytes(&bytes);
    }
}
