//! Golden files hold the formats still: what was ever written stays readable, and what is written now is what was written then.
//!
//! A change of these bytes takes a new version (`docs/format.md`). To add files of a new version, or after adding a case:
//! `QSFS_WRITE_GOLDEN=1 cargo test -p qsfs-zstor --test golden`, which never overwrites an existing file.
#![expect(clippy::unwrap_used, reason = "tests")]

use qsfs_zstor::codec::{
    ChunkEntry, ChunkOpener, ObjectHeader, ObjectIds, ShardHashes, Stripe, StripeEncoder,
};
use qsfs_zstor::id::{BackendId, DatafileId, Epoch, Salt, Stream, VolumeId};
use qsfs_zstor::key::VolumeKey;
use qsfs_zstor::piece::{PIECE_HEADER_BYTES, PieceKey, verify_piece};
use qsfs_zstor::policy::Geometry;
use std::convert::Infallible;
use std::path::PathBuf;

fn golden(name: &str, bytes: &[u8]) -> Vec<u8> {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "golden", name]
        .iter()
        .collect();
    if !path.exists() && std::env::var_os("QSFS_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, bytes).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn key() -> VolumeKey {
    VolumeKey::from_bytes(std::array::from_fn(|at| u8::try_from(at).unwrap()))
}

fn ids() -> ObjectIds {
    ObjectIds {
        volume: VolumeId::from_bytes(*b"volume-volume-vo"),
        stream: Stream::Meta,
        datafile: DatafileId(0x0102_0304_0506_0708),
        epoch: Epoch(0x1112_1314_1516_1718),
        salt: Salt::from_bytes(*b"saltsaltsaltsalt"),
    }
}

const CHUNK_BYTES: u32 = 256;

/// The first chunk compresses, the second does not, the third is short.
fn plaintext() -> Vec<u8> {
    let noise = blake3::Hasher::new().update(b"golden").finalize_xof();
    let mut random = vec![0; 256];
    let mut reader = noise;
    reader.fill(&mut random);
    [vec![b'a'; 256], random, b"the end".to_vec()].concat()
}

/// A header of fixed entries: independent of what zstd makes of the plaintext.
#[test]
fn the_object_header_of_version_1_stays_as_it_is() {
    let entry = |cipher_bytes, compressed| ChunkEntry {
        cipher_bytes,
        compressed,
    };
    let entries = vec![entry(40, true), entry(272, false), entry(23, false)];
    let header = ObjectHeader::new(ids(), CHUNK_BYTES, 519, entries).unwrap();
    let written = header.encode(&key());
    let file = golden("object-header-v1.bin", &written);
    assert_eq!(file, written);
    assert_eq!(
        ObjectHeader::decode(&key(), &ids(), CHUNK_BYTES, 519, &file),
        Ok(header)
    );
}

/// An object as it was once written, zstd frame included: it must open for ever, though a later zstd may write other frames.
#[test]
fn an_object_of_version_1_opens() {
    let file = golden("object-v1.bin", &seal());
    let header = ObjectHeader::decode(&key(), &ids(), CHUNK_BYTES, 519, &file).unwrap();
    let opener = ChunkOpener::new(&key(), &ids());
    let mut plain = Vec::new();
    for chunk in 0..header.chunks() {
        let range = header.object_range(chunk..chunk + 1);
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        let cipher = file[range].to_vec();
        plain.extend(
            opener
                .open(
                    chunk,
                    header.entry(chunk),
                    header.plain_bytes_of(chunk),
                    cipher,
                )
                .unwrap(),
        );
    }
    assert_eq!(plain, plaintext());
    assert_eq!(file.len() as u64, header.object_bytes());
}

fn seal() -> Vec<u8> {
    let sealer = qsfs_zstor::codec::ChunkSealer::new(&key(), &ids(), CHUNK_BYTES);
    let mut object = vec![0; ObjectHeader::encoded_len(3)];
    let plain = plaintext();
    let chunks = (0..).zip(plain.chunks(CHUNK_BYTES as usize));
    let entries = chunks
        .map(|(number, chunk)| sealer.seal(number, chunk, &mut object).unwrap())
        .collect();
    let header = ObjectHeader::new(ids(), CHUNK_BYTES, plain.len() as u64, entries)
        .unwrap()
        .encode(&key());
    object[..header.len()].copy_from_slice(&header);
    object
}

/// All pieces of the golden object at 2+2, one after the other, each after its 0-db key.
#[test]
fn pieces_of_version_1_stay_as_they_are() {
    let object = golden("object-v1.bin", &seal());
    let header = ObjectHeader::decode(&key(), &ids(), CHUNK_BYTES, 519, &object).unwrap();
    let stripe = Stripe::of_object(&header, Geometry::new(2, 2).unwrap(), 128).unwrap();
    let encoder = StripeEncoder::new(stripe);
    let read = |offset: u64, buffer: &mut [u8]| {
        let start = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&object[start..start + buffer.len()]);
        Ok::<(), Infallible>(())
    };
    let mut hashes = ShardHashes::new(&stripe);
    let mut written = Vec::new();
    for row in 0..encoder.rows() {
        for piece in encoder.encode_row(row, read).unwrap() {
            hashes.add(&piece.header);
            written.extend_from_slice(&piece.header.key().to_bytes());
            written.extend_from_slice(&piece.value);
        }
    }
    let shard_hashes = hashes.all().unwrap();
    written.extend(shard_hashes.iter().flat_map(|hash| *hash.as_bytes()));
    let file = golden("pieces-v1.bin", &written);
    assert_eq!(file, written);
    let key = PieceKey::from_bytes(&file[..PieceKey::BYTES]).unwrap();
    let value = &file[PieceKey::BYTES..PieceKey::BYTES + PIECE_HEADER_BYTES + 128];
    let (first, _) = verify_piece(value).unwrap();
    assert_eq!((first.key(), first.stripe()), (key, &stripe));
    assert!(stripe.record(&shard_hashes, &[BackendId(1); 4]).is_ok());
}
