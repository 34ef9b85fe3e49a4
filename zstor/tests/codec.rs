//! The codec against a naive model: a datafile is a byte string; whatever may be lost is lost; every range reads back equal.
#![expect(clippy::unwrap_used, reason = "tests")]

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::subsequence;
use qsfs_zstor::codec::{
    ChunkOpener, ChunkSealer, CoderError, EncodedPiece, Layout, ObjectError, ObjectHeader,
    ObjectIds, PieceRef, ReadPlan, RebuildError, ShardHashes, ShardRebuilder, Stripe, StripeCoder,
    StripeEncoder, record_from_pieces,
};
use qsfs_zstor::id::{BackendId, DatafileId, Epoch, Salt, Stream, VolumeId};
use qsfs_zstor::key::VolumeKey;
use qsfs_zstor::piece::{PIECE_HEADER_BYTES, verify_piece};
use qsfs_zstor::policy::Geometry;
use qsfs_zstor::record::EncodingRecord;
use std::collections::BTreeMap;
use std::convert::Infallible;

fn ids() -> ObjectIds {
    ObjectIds {
        volume: VolumeId::from_bytes([0x11; 16]),
        stream: Stream::Data,
        datafile: DatafileId(42),
        epoch: Epoch(3),
        salt: Salt::from_bytes([0x22; 16]),
    }
}

fn key() -> VolumeKey {
    VolumeKey::from_bytes([0x33; 32])
}

#[derive(Debug)]
struct Stored {
    record: EncodingRecord,
    pieces: BTreeMap<PieceRef, Bytes>,
}

/// Header room first, then the chunks; the header is filled in last.
fn object_of(plain: &[u8], chunk_bytes: u32) -> (ObjectHeader, Vec<u8>) {
    let sealer = ChunkSealer::new(&key(), &ids(), chunk_bytes);
    let chunks = ObjectHeader::chunks_of(plain.len() as u64, chunk_bytes).unwrap();
    let mut object = vec![0; ObjectHeader::encoded_len(chunks)];
    let mut entries = Vec::new();
    for (number, chunk) in (0..).zip(plain.chunks(chunk_bytes as usize)) {
        entries.push(sealer.seal(number, chunk, &mut object).unwrap());
    }
    let header = ObjectHeader::new(ids(), chunk_bytes, plain.len() as u64, entries).unwrap();
    let encoded = header.encode(&key());
    object[..encoded.len()].copy_from_slice(&encoded);
    assert_eq!(header.object_bytes(), object.len() as u64);
    (header, object)
}

fn encode(object: &[u8], stripe: Stripe) -> Vec<EncodedPiece> {
    let encoder = StripeEncoder::new(stripe);
    let row = |row| {
        let read = |offset: u64, buffer: &mut [u8]| {
            let start = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&object[start..start + buffer.len()]);
            Ok::<(), Infallible>(())
        };
        encoder.encode_row(row, read).unwrap()
    };
    (0..encoder.rows()).flat_map(row).collect()
}

fn store(plain: &[u8], geometry: Geometry, chunk_bytes: u32, piece_bytes: u32) -> Stored {
    let (header, object) = object_of(plain, chunk_bytes);
    let stripe = Stripe::of_object(&header, geometry, piece_bytes).unwrap();
    let mut hashes = ShardHashes::new(&stripe);
    let mut pieces = BTreeMap::new();
    for piece in encode(&object, stripe) {
        hashes.add(&piece.header);
        let place = PieceRef {
            shard: piece.header.shard() as usize,
            piece: piece.header.piece(),
        };
        pieces.insert(place, piece.value);
    }
    let backends: Vec<BackendId> = (1..=geometry.total() as u64).map(BackendId).collect();
    let record = stripe.record(&hashes.all().unwrap(), &backends).unwrap();
    assert_eq!(Stripe::of(&record), Ok(stripe));
    Stored { record, pieces }
}

impl Stored {
    /// What a client does for an object range; `None` when too few shards are left.
    fn object_range(&self, range: std::ops::Range<u64>) -> Option<Vec<u8>> {
        let stripe = Stripe::of(&self.record).unwrap();
        let mut plan = ReadPlan::new(stripe.layout(), range);
        loop {
            let needed = plan.needed().ok()?;
            if needed.is_empty() {
                return Some(plan.assemble());
            }
            for place in needed {
                let shard = u32::try_from(place.shard).unwrap();
                let sound = self.pieces.get(&place).and_then(|value| {
                    let (header, _) = verify_piece(value).ok()?;
                    header.expect(&stripe, shard, place.piece).ok()?;
                    Some(value.slice(PIECE_HEADER_BYTES..))
                });
                match sound {
                    Some(payload) => plan.supply(place, payload),
                    None => plan.fail(place),
                }
            }
        }
    }

    fn read(&self, key: &VolumeKey, plain: std::ops::Range<usize>) -> Option<Vec<u8>> {
        let record = &self.record;
        let stripe = Stripe::of(record).unwrap();
        let bytes = self.object_range(0..stripe.object_header_bytes() as u64)?;
        let (chunk_bytes, plain_bytes) = (record.chunk_bytes, record.plain_bytes);
        let header =
            ObjectHeader::decode(key, stripe.ids(), chunk_bytes, plain_bytes, &bytes).ok()?;
        let opener = ChunkOpener::new(key, stripe.ids());
        let chunks = header.chunks_covering(plain.start as u64..plain.end as u64);
        if chunks.is_empty() {
            return Some(Vec::new());
        }
        let mut out = Vec::new();
        for chunk in chunks.clone() {
            let cipher = self.object_range(header.object_range(chunk..chunk + 1))?;
            let bytes = header.plain_bytes_of(chunk);
            out.extend(
                opener
                    .open(chunk, header.entry(chunk), bytes, cipher)
                    .ok()?,
            );
        }
        let skip = plain.start - chunks.start as usize * chunk_bytes as usize;
        let end = plain.end.min(usize::try_from(plain_bytes).unwrap());
        Some(out[skip..skip + end.saturating_sub(plain.start)].to_vec())
    }

    fn lose(&mut self, shard: usize) {
        self.pieces.retain(|place, _| place.shard != shard);
    }

    fn rows(&self) -> u32 {
        Layout::of(&self.record).unwrap().pieces_per_shard()
    }
}

/// Half runs, half noise: some chunks compress and some do not.
fn plaintext() -> impl Strategy<Value = Vec<u8>> {
    let run = (any::<u8>(), 1_usize..3_000).prop_map(|(byte, count)| vec![byte; count]);
    let noise = vec(any::<u8>(), 1..1_500);
    vec(prop_oneof![run, noise], 1..12).prop_map(|parts| parts.concat())
}

fn geometry() -> impl Strategy<Value = Geometry> {
    (1_u32..7, 1_u32..5).prop_map(|(data, parity)| Geometry::new(data, parity).unwrap())
}

/// A stripe, the shards it loses (at most m), and a range.
fn scenario() -> impl Strategy<Value = (Stored, Vec<u8>, Vec<usize>, std::ops::Range<usize>)> {
    (plaintext(), geometry(), 1_u32..5_000, 1_u32..3_000).prop_flat_map(
        |(plain, geometry, chunk, piece)| {
            let shards: Vec<usize> = (0..geometry.total()).collect();
            let lost = subsequence(shards, 0..=geometry.parity());
            let length = plain.len();
            let range = (0..length, 0..=length)
                .prop_map(move |(start, bytes)| start..(start + bytes).min(length));
            (lost, range).prop_map(move |(lost, range)| {
                (
                    store(&plain, geometry, chunk, piece),
                    plain.clone(),
                    lost,
                    range,
                )
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_range_reads_back_with_any_m_shards_lost((mut stored, plain, lost, range) in scenario()) {
        for shard in lost {
            stored.lose(shard);
        }
        prop_assert_eq!(stored.read(&key(), range.clone()), Some(plain[range].to_vec()));
    }

    #[test]
    fn damaged_pieces_are_replaced_row_by_row((mut stored, plain, lost, range) in scenario(), at in any::<prop::sample::Index>()) {
        // In every row another set of m shards is bad: no shard need be whole.
        let total = stored.record.geometry.total();
        for row in 0..stored.rows() {
            for shard in &lost {
                let shard = (shard + row as usize) % total;
                let value = stored.pieces.get_mut(&PieceRef { shard, piece: row }).unwrap();
                let mut bytes = value.to_vec();
                let at = at.index(bytes.len());
                bytes[at] ^= 0x40;
                *value = Bytes::from(bytes);
            }
        }
        prop_assert_eq!(stored.read(&key(), range.clone()), Some(plain[range].to_vec()));
    }

    #[test]
    fn rebuilt_shards_are_the_same_bytes((stored, _, lost, _) in scenario()) {
        for shard in &lost {
            let mut rebuilder = ShardRebuilder::new(&stored.record, u32::try_from(*shard).unwrap()).unwrap();
            for row in 0..rebuilder.rows() {
                prop_assert!(matches!(rebuilder.verify(), Err(RebuildError::Incomplete(_))));
                let present: Vec<(usize, &[u8])> = stored.pieces.iter()
                    .filter(|(place, _)| place.piece == row && !lost.contains(&place.shard))
                    .map(|(place, value)| (place.shard, &value[PIECE_HEADER_BYTES..]))
                    .collect();
                let made = rebuilder.rebuild_row(row, &present).unwrap();
                prop_assert_eq!(&made.value, &stored.pieces[&PieceRef { shard: *shard, piece: row }]);
            }
            prop_assert_eq!(rebuilder.verify(), Ok(()));
        }
    }

    #[test]
    fn a_record_is_rebuilt_from_piece_headers_alone((stored, _, lost, _) in scenario()) {
        let on = |place: &PieceRef| stored.record.shards[place.shard].backend;
        let headers = |skip: &[usize]| stored.pieces.iter()
            .filter(|(place, _)| !skip.contains(&place.shard))
            .map(|(place, value)| (on(place), verify_piece(value).unwrap().0))
            .collect::<Vec<_>>();
        let all = record_from_pieces(headers(&[])).unwrap();
        prop_assert_eq!(all.record().unwrap(), stored.record.clone());
        let some = record_from_pieces(headers(&lost)).unwrap();
        prop_assert!(some.readable());
        prop_assert_eq!(some.record().is_ok(), lost.is_empty());
        for (shard, known) in some.shards.iter().enumerate() {
            prop_assert_eq!(known.is_none(), lost.contains(&shard));
        }
    }

    #[test]
    fn parity_is_that_of_the_library(geometry in geometry(), seed in vec(any::<u8>(), 1..200)) {
        let shard = |index: usize| -> Vec<u8> { seed.iter().map(|byte| byte.rotate_left(u32::try_from(index).unwrap())).collect() };
        let data: Vec<Vec<u8>> = (0..geometry.data()).map(shard).collect();
        let mut parity = vec![vec![0; seed.len()]; geometry.parity()];
        StripeCoder::new(geometry).parity(&data, &mut parity);
        let model = reed_solomon_erasure::galois_8::ReedSolomon::new(geometry.data(), geometry.parity()).unwrap();
        let all: Vec<Vec<u8>> = data.into_iter().chain(parity).collect();
        prop_assert!(model.verify(&all).unwrap());
    }

    #[test]
    fn a_mutated_object_never_opens_as_something_else((stored, plain, _, _) in scenario(), flips in vec((any::<prop::sample::Index>(), 1_u8..), 1..4)) {
        // Whoever holds the pieces can write sound pieces around any bytes; only the key's owner can make them open.
        let stripe = Stripe::of(&stored.record).unwrap();
        let mut object = stored.object_range(0..u64::MAX).unwrap();
        for (at, flip) in flips {
            let at = at.index(object.len());
            object[at] ^= flip;
        }
        let mut forged = Stored { record: stored.record.clone(), pieces: BTreeMap::new() };
        for piece in encode(&object, stripe) {
            let place = PieceRef { shard: piece.header.shard() as usize, piece: piece.header.piece() };
            forged.pieces.insert(place, piece.value);
        }
        let read = forged.read(&key(), 0..plain.len());
        prop_assert!(read.is_none() || read == Some(plain));
    }

    #[test]
    fn random_bytes_are_no_object_header(bytes in vec(any::<u8>(), 0..300), plain_bytes in any::<u64>(), chunk_bytes in any::<u32>()) {
        prop_assert!(ObjectHeader::decode(&key(), &ids(), chunk_bytes, plain_bytes, &bytes).is_err());
    }
}

#[test]
fn every_flipped_bit_of_a_header_and_a_chunk_is_noticed() {
    let (header, object) = object_of(&[b"abc".repeat(30), (0..=255).collect()].concat(), 300);
    let opener = ChunkOpener::new(&key(), &ids());
    let (plain_bytes, header_bytes) = (
        header.plain_bytes(),
        ObjectHeader::encoded_len(header.chunks()),
    );
    for bit in 0..object.len() * 8 {
        let mut object = object.clone();
        object[bit / 8] ^= 1 << (bit % 8);
        let decoded = ObjectHeader::decode(&key(), &ids(), 300, plain_bytes, &object);
        if bit / 8 < header_bytes {
            assert!(decoded.is_err(), "bit {bit}");
            continue;
        }
        let opened = (0..header.chunks()).all(|chunk| {
            let range = header.object_range(chunk..chunk + 1);
            let cipher = object
                [usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
                .to_vec();
            opener
                .open(
                    chunk,
                    header.entry(chunk),
                    header.plain_bytes_of(chunk),
                    cipher,
                )
                .is_ok()
        });
        assert!(decoded.is_ok() && !opened, "bit {bit}");
    }
}

#[test]
fn another_key_or_other_ids_open_nothing() {
    let plain = b"the same text in every chunk ".repeat(40);
    let stored = store(&plain, Geometry::new(2, 1).unwrap(), 512, 256);
    assert_eq!(stored.read(&VolumeKey::from_bytes([0x34; 32]), 0..10), None);
    for change in [
        |record: &mut EncodingRecord| record.volume = VolumeId::from_bytes([9; 16]),
        |record: &mut EncodingRecord| record.stream = Stream::Meta,
        |record: &mut EncodingRecord| record.datafile = DatafileId(43),
        |record: &mut EncodingRecord| record.epoch = Epoch(4),
        |record: &mut EncodingRecord| record.salt = Salt::from_bytes([9; 16]),
    ] {
        let mut record = stored.record.clone();
        change(&mut record);
        let stripe = Stripe::of(&record).unwrap();
        let bytes = stored
            .object_range(0..stripe.object_header_bytes() as u64)
            .unwrap();
        let decoded = ObjectHeader::decode(
            &key(),
            stripe.ids(),
            record.chunk_bytes,
            record.plain_bytes,
            &bytes,
        );
        assert_eq!(decoded, Err(ObjectError::Unauthentic));
    }
}

#[test]
fn chunks_cannot_change_places_or_lengths() {
    let plain = [7; 1000];
    let sealer = ChunkSealer::new(&key(), &ids(), 1000);
    let opener = ChunkOpener::new(&key(), &ids());
    let mut cipher = Vec::new();
    let entry = sealer.seal(5, &plain, &mut cipher).unwrap();
    assert!(entry.compressed);
    assert_eq!(
        opener.open(5, entry, 1000, cipher.clone()).as_deref(),
        Ok(&plain[..])
    );
    assert!(opener.open(4, entry, 1000, cipher.clone()).is_err());
    assert!(opener.open(5, entry, 999, cipher.clone()).is_err());
    assert!(opener.open(5, entry, usize::MAX, cipher.clone()).is_err());
    assert!(opener.open(5, entry, 0, cipher.clone()).is_err());
    cipher.pop();
    assert!(opener.open(5, entry, 1000, cipher).is_err());
    assert!(sealer.seal(0, &[0; 1001], &mut Vec::new()).is_err());
    assert!(sealer.seal(0, &[], &mut Vec::new()).is_err());
}

#[test]
fn two_attempts_share_no_ciphertext() {
    let plain = [0; 4096];
    let seal = |ids: &ObjectIds| {
        let mut out = Vec::new();
        ChunkSealer::new(&key(), ids, 4096)
            .seal(0, &plain, &mut out)
            .unwrap();
        out
    };
    let again = ObjectIds {
        salt: Salt::from_bytes([0x23; 16]),
        ..ids()
    };
    assert_ne!(seal(&ids()), seal(&again));
}

#[test]
fn threads_may_seal_at_once() {
    let sealer = ChunkSealer::new(&key(), &ids(), 8192);
    let plain = b"words ".repeat(1000);
    let one = |chunk| {
        let mut out = Vec::new();
        sealer.seal(chunk, &plain, &mut out).unwrap();
        out
    };
    let alone: Vec<_> = (0..8).map(one).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..8)
            .map(|chunk| scope.spawn(move || one(chunk)))
            .collect();
        handles
            .into_iter()
            .map(|handle| handle.join().unwrap())
            .collect()
    });
    assert_eq!(alone, together);
}

#[test]
fn an_empty_datafile_is_an_object_without_chunks() {
    let stored = store(&[], Geometry::new(4, 4).unwrap(), 1 << 20, 1 << 19);
    assert_eq!(stored.read(&key(), 0..0), Some(Vec::new()));
    assert_eq!(stored.rows(), 1);
}

#[test]
fn a_small_read_asks_for_one_piece_and_a_lost_one_costs_k() {
    let stored = store(&[5; 100_000], Geometry::new(4, 2).unwrap(), 4096, 512);
    let layout = Layout::of(&stored.record).unwrap();
    let mut plan = ReadPlan::new(&layout, 10..20);
    let direct = PieceRef { shard: 0, piece: 0 };
    assert_eq!(plan.needed(), Ok(vec![direct]));
    plan.fail(direct);
    plan.prefer(|shard| u64::from(shard < 3));
    let shards = |plan: &ReadPlan| {
        plan.needed()
            .map(|all| all.iter().map(|piece| piece.shard).collect::<Vec<_>>())
    };
    assert_eq!(shards(&plan), Ok(vec![3, 4, 5, 1]));
    plan.fail_shard(4);
    assert_eq!(shards(&plan), Ok(vec![3, 5, 1, 2]));
    plan.fail_shard(5);
    assert_eq!(plan.needed().unwrap_err().failed, vec![0, 4, 5]);
}

#[test]
fn a_wrong_survivor_is_found_before_the_swap() {
    let stored = store(&[1; 5000], Geometry::new(2, 2).unwrap(), 512, 1 << 20);
    let mut rebuilder = ShardRebuilder::new(&stored.record, 0).unwrap();
    let good = &stored.pieces[&PieceRef { shard: 1, piece: 0 }][PIECE_HEADER_BYTES..];
    let mut bad = stored.pieces[&PieceRef { shard: 2, piece: 0 }][PIECE_HEADER_BYTES..].to_vec();
    bad[3] ^= 1;
    rebuilder.rebuild_row(0, &[(1, good), (2, &bad)]).unwrap();
    assert_eq!(rebuilder.verify(), Err(RebuildError::HashMismatch(0)));
    let few = rebuilder.rebuild_row(0, &[(1, good), (1, good)]);
    assert!(matches!(
        few,
        Err(RebuildError::Coder(CoderError::TooFew { got: 1, want: 2 }))
    ));
    assert!(rebuilder.rebuild_row(0, &[(1, good), (9, good)]).is_err());
    assert!(
        rebuilder
            .rebuild_row(0, &[(1, good), (2, &good[1..])])
            .is_err()
    );
    assert!(ShardRebuilder::new(&stored.record, 4).is_err());
}

#[test]
fn records_with_impossible_sizes_are_refused() {
    let sound = store(&[1; 5000], Geometry::new(2, 2).unwrap(), 512, 1 << 20).record;
    for change in [
        |record: &mut EncodingRecord| record.object_bytes = 0,
        |record: &mut EncodingRecord| record.object_bytes = u64::MAX,
        |record: &mut EncodingRecord| record.shard_bytes += 64,
        |record: &mut EncodingRecord| record.piece_bytes = 0,
        |record: &mut EncodingRecord| record.piece_bytes = u32::MAX,
        |record: &mut EncodingRecord| record.chunk_bytes = 0,
        |record: &mut EncodingRecord| record.chunk_bytes = u32::MAX,
        |record: &mut EncodingRecord| record.plain_bytes = u64::MAX,
        |record: &mut EncodingRecord| record.plain_bytes = 0,
        |record: &mut EncodingRecord| record.shards.truncate(3),
    ] {
        let mut record = sound.clone();
        change(&mut record);
        assert!(Stripe::of(&record).is_err(), "{record:?}");
    }
}
