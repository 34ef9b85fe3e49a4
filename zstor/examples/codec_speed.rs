//! How fast the codec is on this machine: `cargo run --release -p qsfs-zstor --example codec_speed [MIB] [THREADS]`.
//!
//! Prints MB of plaintext per second of processor time (so other load on the machine matters little; a core's throughput), and for the
//! whole push also by wall clock, for a datafile of MIB mebibytes (64): seal (compress, encrypt), encode (parity, hashes,
//! headers), both together, fetch (assemble, verify, decrypt, decompress) when all is well and with shards gone, rebuild.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark program"
)]

use bytes::Bytes;
use qsfs_zstor::codec::{
    CHUNK_BYTES, ChunkOpener, ChunkSealer, ObjectHeader, ObjectIds, PIECE_BYTES, PieceRef,
    ReadPlan, ShardHashes, ShardRebuilder, Stripe, StripeEncoder,
};
use qsfs_zstor::id::{BackendId, DatafileId, Epoch, Salt, Stream, VolumeId};
use qsfs_zstor::key::VolumeKey;
use qsfs_zstor::piece::{PIECE_HEADER_BYTES, verify_piece};
use qsfs_zstor::policy::Geometry;
use qsfs_zstor::record::EncodingRecord;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .map(|text| text.parse::<usize>().unwrap());
    let mib = arguments.next().unwrap_or(64);
    let threads = arguments
        .next()
        .unwrap_or_else(|| std::thread::available_parallelism().unwrap().get());
    println!(
        "{mib} MiB of plaintext, {threads} threads, MB of plaintext per CPU-second; wall: push by wall clock"
    );
    println!(
        "{:<14} {:>6} {:>6} {:>7} {:>7} {:>6} {:>6} {:>6} {:>9} {:>8}",
        "input", "k+m", "ratio", "seal", "encode", "push", "wall", "fetch", "2 missing", "rebuild"
    );
    for (name, plain) in [
        ("random", random(mib)),
        ("text", text(mib)),
        ("half and half", mixed(mib)),
    ] {
        for geometry in ["4+2", "4+4", "10+5"] {
            measure(name, &plain, geometry.parse().unwrap(), threads);
        }
    }
    if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
        println!(
            "{}",
            status
                .lines()
                .find(|line| line.starts_with("VmHWM"))
                .unwrap_or_default()
        );
    }
}

/// User and system time of this process, all threads; the kernel counts in hundredths of a second.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .skip(11)
        .take(2);
    let ticks: u64 = fields.map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

fn random(mib: usize) -> Vec<u8> {
    let mut bytes = vec![0; mib << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// Words of a skewed distribution: compresses about as source code does.
fn text(mib: usize) -> Vec<u8> {
    let words: Vec<String> = (0..6000_u32)
        .map(|word| format!("{:x} ", word.wrapping_mul(2_654_435_761) >> (word % 19)))
        .collect();
    let mut out = Vec::with_capacity(mib << 20);
    let mut state = 1_u64;
    while out.len() < mib << 20 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let pick = usize::try_from((state >> 33) % 6000).unwrap();
        out.extend_from_slice(words[pick * pick / 6000].as_bytes());
    }
    out.truncate(mib << 20);
    out
}

fn mixed(mib: usize) -> Vec<u8> {
    let (random, text) = (random(mib), text(mib));
    random
        .chunks(1 << 17)
        .zip(text.chunks(1 << 17))
        .enumerate()
        .flat_map(|(at, (a, b))| if at % 2 == 0 { a } else { b })
        .copied()
        .collect()
}

/// Runs `work` for every number below `count`, on so many threads; results in order.
fn parallel<T: Send>(threads: usize, count: u32, work: impl Fn(u32) -> T + Sync) -> Vec<T> {
    let next = AtomicU32::new(0);
    let done = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    let result = work(number);
                    done.lock().unwrap().insert(number, result);
                }
            });
        }
    });
    done.into_inner().unwrap().into_values().collect()
}

fn measure(name: &str, plain: &[u8], geometry: Geometry, threads: usize) {
    let rate = |start: Duration| plain.len() as f64 / 1e6 / (cpu_time() - start).as_secs_f64();
    let key = VolumeKey::from_bytes([7; 32]);
    let ids = ObjectIds {
        volume: VolumeId::from_bytes([1; 16]),
        stream: Stream::Data,
        datafile: DatafileId(1),
        epoch: Epoch(1),
        salt: Salt::from_bytes([2; 16]),
    };
    let wall = Instant::now();
    let begin = cpu_time();
    let (header, object) = seal(&key, &ids, plain, threads);
    let seal_rate = rate(begin);
    let stripe = Stripe::of_object(&header, geometry, PIECE_BYTES).unwrap();
    let encoder = StripeEncoder::new(stripe);
    let encode_start = cpu_time();
    let rows = parallel(threads, encoder.rows(), |row| {
        let read = |offset: u64, buffer: &mut [u8]| {
            let start = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&object[start..start + buffer.len()]);
            Ok::<(), Infallible>(())
        };
        encoder.encode_row(row, read).unwrap()
    });
    let (encode_rate, push_rate) = (rate(encode_start), rate(begin));
    let wall_rate = plain.len() as f64 / 1e6 / wall.elapsed().as_secs_f64();
    let mut hashes = ShardHashes::new(&stripe);
    let mut pieces = BTreeMap::new();
    for piece in rows.into_iter().flatten() {
        hashes.add(&piece.header);
        pieces.insert(
            PieceRef {
                shard: piece.header.shard() as usize,
                piece: piece.header.piece(),
            },
            piece.value,
        );
    }
    let record = stripe
        .record(
            &hashes.all().unwrap(),
            &vec![BackendId(1); geometry.total()],
        )
        .unwrap();
    let fetch_rate = |missing: usize| {
        let start = cpu_time();
        fetch(&key, &header, &stripe, &pieces, missing, plain, threads);
        rate(start)
    };
    let (fetch_all, fetch_missing) = (fetch_rate(0), fetch_rate(2.min(geometry.parity())));
    let start = cpu_time();
    rebuild(&record, &pieces);
    let rebuild_rate = rate(start) / geometry.data() as f64;
    let ratio = object.len() as f64 / plain.len() as f64;
    println!(
        "{name:<14} {:>6} {ratio:>6.2} {seal_rate:>7.0} {encode_rate:>7.0} {push_rate:>6.0} {wall_rate:>6.0} {fetch_all:>6.0} {fetch_missing:>9.0} {rebuild_rate:>8.0}",
        geometry.to_string()
    );
}

fn seal(key: &VolumeKey, ids: &ObjectIds, plain: &[u8], threads: usize) -> (ObjectHeader, Vec<u8>) {
    let sealer = ChunkSealer::new(key, ids, CHUNK_BYTES);
    let chunks: Vec<&[u8]> = plain.chunks(CHUNK_BYTES as usize).collect();
    let count = u32::try_from(chunks.len()).unwrap();
    let sealed = parallel(threads, count, |number| {
        let mut out = Vec::new();
        let entry = sealer
            .seal(number, chunks[number as usize], &mut out)
            .unwrap();
        (entry, out)
    });
    let entries = sealed.iter().map(|(entry, _)| *entry).collect();
    let header = ObjectHeader::new(*ids, CHUNK_BYTES, plain.len() as u64, entries).unwrap();
    let mut object = Vec::with_capacity(usize::try_from(header.object_bytes()).unwrap());
    object.extend(header.encode(key));
    for (_, bytes) in &sealed {
        object.extend_from_slice(bytes);
    }
    (header, object)
}

fn fetch(
    key: &VolumeKey,
    header: &ObjectHeader,
    stripe: &Stripe,
    pieces: &BTreeMap<PieceRef, Bytes>,
    missing: usize,
    plain: &[u8],
    threads: usize,
) {
    let opener = ChunkOpener::new(key, stripe.ids());
    // Eight chunks at a time, as read-ahead asks for them.
    let windows = header.chunks().div_ceil(8);
    let equal = parallel(threads, windows, |window| {
        let chunks = window * 8..((window + 1) * 8).min(header.chunks());
        let range = header.object_range(chunks.clone());
        let mut plan = ReadPlan::new(stripe.layout(), range.clone());
        (0..missing).for_each(|shard| plan.fail_shard(shard));
        loop {
            let needed = plan.needed().unwrap();
            if needed.is_empty() {
                break;
            }
            for place in needed {
                verify_piece(&pieces[&place]).unwrap();
                plan.supply(place, pieces[&place].slice(PIECE_HEADER_BYTES..));
            }
        }
        let object = plan.assemble();
        chunks.clone().all(|chunk| {
            let at = header.object_range(chunk..chunk + 1);
            let at = usize::try_from(at.start - range.start).unwrap()
                ..usize::try_from(at.end - range.start).unwrap();
            let opened = opener
                .open(
                    chunk,
                    header.entry(chunk),
                    header.plain_bytes_of(chunk),
                    object[at].to_vec(),
                )
                .unwrap();
            let start = chunk as usize * CHUNK_BYTES as usize;
            opened == plain[start..start + opened.len()]
        })
    });
    assert!(
        equal.into_iter().all(|equal| equal),
        "what was read is what was written"
    );
}

/// Shard 0 from the last `k`, on one thread: as an agent does it.
fn rebuild(record: &EncodingRecord, pieces: &BTreeMap<PieceRef, Bytes>) {
    let mut rebuilder = ShardRebuilder::new(record, 0).unwrap();
    for row in 0..rebuilder.rows() {
        let sources = record.geometry.parity()..record.geometry.total();
        let present: Vec<(usize, &[u8])> = sources
            .map(|shard| {
                (
                    shard,
                    verify_piece(&pieces[&PieceRef { shard, piece: row }])
                        .unwrap()
                        .1,
                )
            })
            .collect();
        rebuilder.rebuild_row(row, &present).unwrap();
    }
    rebuilder.verify().unwrap();
}
