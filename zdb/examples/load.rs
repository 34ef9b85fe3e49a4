//! How much a 0-db that is running takes: `cargo run --release -p qsfs-zdb --example load -- ADDRESS set|get [BYTES [DEPTH [CONNECTIONS [SECONDS]]]]`,
//! and how fast a disk syncs: `... load -- DIR fsync [BYTES [DEPTH]]` (writes of BYTES, one fdatasync for DEPTH of them).
//!
//! `... load -- ADDRESS all DIR [SECONDS]`: all of it in one run, in turns with what the disk of DIR does alone, with the ratios; `large` instead
//! of `all`: SETs of 1 MiB alone. `... load --
//! ADDRESS compact [ROUNDS]`: what a SET waits for while there is nothing to compact and while there is (serve with `--datasize 16MiB`).
//!
//! `... load -- DIR serve [ADDRESS [MIB]]` serves DIR, at 127.0.0.1:9911 with datafiles of 256 MiB, until it is killed, where `qsfs zdb serve` is not built.
//!
//! Lean, because client and server share the machine: answers have a known length, so they are counted and not parsed. What GET asks for is set
//! before the clock runs.
#![expect(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a measuring tool"
)]

use qsfs_zdb::engine::{Engine, EngineOptions};
use qsfs_zdb::server::ServerConfig;
use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Keys in all; they are set and asked for again and again.
const KEYS: usize = 20_000;
/// Bytes that all values may take, so that a large size does not fill the disk.
const VALUES_BYTES_MAX: usize = 256 << 20;
/// Requests are joined in a buffer up to so many bytes; larger values are sent from where they are.
const JOINED_BYTES_MAX: usize = 64 << 10;

#[derive(Clone, Copy)]
struct Load {
    set: bool,
    bytes: usize,
    depth: usize,
    /// The number of the first key.
    first: usize,
    keys: usize,
}

/// A request up to its value's bytes, which are made distinct, so that nothing is unchanged.
fn push_head(
    request: &mut Vec<u8>,
    load: Load,
    connection: usize,
    number: usize,
    value: &mut [u8],
) {
    let key = format!("{connection:04}-{:09}", load.first + number % load.keys);
    let command = if load.set {
        "*3\r\n$3\r\nSET"
    } else {
        "*2\r\n$3\r\nGET"
    };
    write!(request, "{command}\r\n${}\r\n{key}\r\n", key.len()).unwrap();
    if load.set {
        value[..8].copy_from_slice(&number.to_le_bytes());
        write!(request, "${}\r\n", value.len()).unwrap();
    }
}

/// All of them, in one write where the socket has room.
fn write_all_parts(stream: &mut TcpStream, parts: [&[u8]; 3]) {
    let mut slices = parts.map(IoSlice::new);
    let mut rest = &mut slices[..];
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        let written = stream.write_vectored(rest).unwrap();
        assert!(written > 0, "the server closed the connection");
        IoSlice::advance_slices(&mut rest, written);
    }
}

/// A connection with `depth` requests under way.
struct Client {
    stream: TcpStream,
    connection: usize,
    load: Load,
}

impl Client {
    fn connect(address: &str, load: Load, connection: usize) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            connection,
            load,
        }
    }

    /// Sends requests while `more` says so of their count, and waits for all answers; how many.
    fn run(&mut self, set: bool, more: impl Fn(usize) -> bool) -> usize {
        let load = Load { set, ..self.load };
        let answer_bytes = if set {
            "$14\r\n".len() + 14 + 2
        } else {
            format!("${}\r\n", load.bytes).len() + load.bytes + 2
        };
        let mut value = vec![b'v'; load.bytes];
        // Distinct from what an earlier run left under these keys.
        value[8..16].copy_from_slice(&rand::random::<[u8; 8]>());
        let mut buffer = vec![0; (answer_bytes * load.depth).min(1 << 20)];
        let mut request = Vec::new();
        let (mut sent, mut received) = (0, 0_usize);
        loop {
            let answered = received / answer_bytes;
            if answered == sent && !more(sent) {
                return answered;
            }
            // All that may be under way, before an answer is waited for. Neither side waits for the other's buffers: either the
            // requests are short, or the answers are.
            while sent < answered + load.depth && more(sent) {
                push_head(&mut request, load, self.connection, sent, &mut value);
                sent += 1;
                if set && load.bytes > JOINED_BYTES_MAX {
                    write_all_parts(&mut self.stream, [&request, &value, b"\r\n"]);
                    request.clear();
                } else if set {
                    request.extend_from_slice(&value);
                    request.extend_from_slice(b"\r\n");
                }
                if request.len() > JOINED_BYTES_MAX {
                    self.stream.write_all(&request).unwrap();
                    request.clear();
                }
            }
            self.stream.write_all(&request).unwrap();
            request.clear();
            let count = self.stream.read(&mut buffer).unwrap();
            assert!(count > 0, "the server closed the connection");
            if received == 0 {
                let shown = buffer[..count.min(80)].escape_ascii();
                assert!(buffer[0] == b'$' && buffer[1] != b'-', "{shown}");
            }
            received += count;
        }
    }
}

/// Syncs a second of appends of so many bytes.
fn syncs(dir: &Path, bytes: usize, time: Duration) -> f64 {
    let path = dir.join("load-fsync");
    let mut file = File::create(&path).unwrap();
    let block = vec![b'v'; bytes];
    let (began, mut syncs) = (Instant::now(), 0_u32);
    while began.elapsed() < time {
        file.write_all(&block).unwrap();
        file.sync_data().unwrap();
        syncs += 1;
    }
    let rate = f64::from(syncs) / began.elapsed().as_secs_f64();
    std::fs::remove_file(path).unwrap();
    rate
}

fn measure_syncs(dir: &Path, bytes: usize, depth: usize) {
    let rate = syncs(dir, bytes * depth, Duration::from_secs(3));
    println!(
        "fdatasync after {depth} x {bytes} B: {rate:.0}/s, {:.0} writes/s",
        rate * depth as f64
    );
}

/// Megabytes a second of large values, appended one after the other with one fdatasync for so many. The file takes the place of the one
/// before, and so the memory and the blocks that it gives back: where a virtual machine has none of its own yet, both come slowly.
fn stream(dir: &Path, for_each: usize) -> f64 {
    let mut file = File::create(dir.join("load-stream")).unwrap();
    let block = vec![b'v'; LARGE];
    let began = Instant::now();
    for number in 1..=TURN {
        file.write_all(&block).unwrap();
        if number % for_each == 0 {
            file.sync_data().unwrap();
        }
    }
    megabytes(TURN as f64 / began.elapsed().as_secs_f64())
}

/// Requests a second: `more` says whether a connection goes on after so many requests, since when.
fn rate(
    address: &str,
    load: Load,
    connections: usize,
    more: impl Fn(usize, Instant) -> bool + Sync,
) -> f64 {
    let mut clients: Vec<Client> = (0..connections)
        .map(|connection| Client::connect(address, load, connection))
        .collect();
    if !load.set {
        std::thread::scope(|scope| {
            for client in &mut clients {
                scope.spawn(|| client.run(true, |sent| sent < load.keys));
            }
        });
    }
    let began = Instant::now();
    let more = &more;
    let answered: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter_mut()
            .map(|client| scope.spawn(move || client.run(load.set, |sent| more(sent, began))))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    answered as f64 / began.elapsed().as_secs_f64()
}

fn load_of(set: bool, bytes: usize, depth: usize, connections: usize) -> Load {
    let bytes = bytes.max(16);
    let keys = KEYS.min(VALUES_BYTES_MAX / bytes);
    Load {
        set,
        bytes,
        depth,
        first: 0,
        keys: keys.div_ceil(connections),
    }
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

const SMALL: usize = 4096;
const LARGE: usize = 1 << 20;
/// Large values of one turn: a disk changes its mind within seconds, and a connection takes some to get going.
const TURN: usize = 192;
/// Large values that one fdatasync is for, where the disk alone is measured.
const STREAMED: usize = 48;
const ROUNDS: usize = 7;
/// Where the keys of large values begin, anew in every run: what is measured is writing, not that and compacting what was overwritten.
const FRESH_KEYS: std::ops::Range<usize> = 10_000_000..900_000_000;

fn megabytes(large: f64) -> f64 {
    large * LARGE as f64 / 1e6
}

/// SETs of large values, in turns with the disk.
fn all_large(address: &str, dir: &Path) {
    let (mut disk, mut synced, mut turns) = (
        Vec::new(),
        Vec::new(),
        [1, 4, 16].map(|depth| (depth, Vec::new(), Vec::new())),
    );
    let mut first = rand::random_range(FRESH_KEYS);
    // The first is to warm up.
    stream(dir, STREAMED);
    for _ in 0..ROUNDS {
        for (depth, sets, ratios) in &mut turns {
            let before = stream(dir, STREAMED);
            let load = Load {
                first,
                keys: usize::MAX,
                ..load_of(true, LARGE, *depth, 1)
            };
            let set = rate(address, load, 1, |sent, _| sent < TURN);
            first += TURN;
            let after = stream(dir, STREAMED);
            disk.extend([before, after]);
            sets.push(megabytes(set));
            ratios.push(megabytes(set) / f64::midpoint(before, after));
        }
        synced.push(stream(dir, 1));
    }
    std::fs::remove_file(dir.join("load-stream")).unwrap();
    println!(
        "the disk alone: {:.0} MB/s of 1 MiB appends, one fdatasync for {STREAMED}; {:.0} MB/s with one for each",
        median(disk),
        median(synced)
    );
    for (depth, sets, ratios) in turns {
        println!(
            "SET 1 MiB, {depth} under way: {:.0} MB/s, {:.2} of the disk",
            median(sets),
            median(ratios)
        );
    }
}

fn all(address: &str, dir: &Path, seconds: f64) {
    let time = Duration::from_secs_f64(seconds);
    let timed = |_: usize, began: Instant| began.elapsed() < time;
    let (mut disk, mut sets, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let before = syncs(dir, SMALL, time);
        let set = rate(address, load_of(true, SMALL, 1, 1), 1, timed);
        let after = syncs(dir, SMALL, time);
        disk.extend([before, after]);
        sets.push(set);
        ratios.push(set / f64::midpoint(before, after));
    }
    println!(
        "the disk alone: {:.0} fdatasyncs of 4 KiB a second",
        median(disk)
    );
    println!(
        "SET 4 KiB, one under way: {:.0}/s, {:.2} of the disk",
        median(sets),
        median(ratios)
    );
    for (set, depth, connections) in [(true, 64, 1), (true, 1, 64), (false, 64, 1), (false, 1, 64)]
    {
        let load = load_of(set, SMALL, depth, connections);
        let rates = (0..3).map(|_| rate(address, load, connections, timed));
        let what = if set { "SET" } else { "GET" };
        println!(
            "{what} 4 KiB, {connections} connections, {depth} under way each: {:.0}/s",
            median(rates.collect())
        );
    }
    all_large(address, dir);
    let gets = (0..3).map(|_| rate(address, load_of(false, LARGE, 16, 1), 1, timed));
    println!(
        "GET 1 MiB, 16 under way: {:.0} MB/s",
        megabytes(median(gets.collect()))
    );
}

/// Latencies of SETs of 4 KiB, one after the other.
fn latencies(address: &str, keys: std::ops::Range<usize>, keys_in_all: usize) -> Vec<Duration> {
    let load = Load {
        set: true,
        bytes: SMALL,
        depth: 1,
        first: 0,
        keys: keys_in_all,
    };
    let mut client = Client::connect(address, load, 0);
    let mut value = vec![b'v'; SMALL];
    value[8..16].copy_from_slice(&rand::random::<[u8; 8]>());
    let (mut request, mut answer) = (Vec::new(), [0; 21]);
    keys.map(|number| {
        request.clear();
        push_head(&mut request, load, 0, number, &mut value);
        request.extend_from_slice(&value);
        request.extend_from_slice(b"\r\n");
        let began = Instant::now();
        client.stream.write_all(&request).unwrap();
        client.stream.read_exact(&mut answer).unwrap();
        began.elapsed()
    })
    .collect()
}

fn compact(address: &str, rounds: usize) {
    let p99 = |mut taken: Vec<Duration>| {
        taken.sort();
        taken[taken.len() * 99 / 100].as_secs_f64() * 1e6
    };
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // New keys: nothing becomes garbage.
        let first = 1_000_000 + round * 5000;
        without.push(p99(latencies(address, first..first + 5000, usize::MAX)));
        // The same keys again and again: most of what is written soon is.
        let load = Load {
            keys: 10_000,
            ..load_of(true, SMALL, 64, 1)
        };
        rate(address, load, 1, |sent, _| sent < 40_000);
        with.push(p99(latencies(address, 0..5000, 10_000)));
    }
    let ratios = without
        .iter()
        .zip(&with)
        .map(|(without, with)| with / without);
    println!(
        "SET 4 KiB, one under way, p99: {:.0} us without anything to compact, {:.0} us while compacting; {:.2} times (medians of {rounds} rounds)",
        median(without.clone()),
        median(with.clone()),
        median(ratios.collect())
    );
}

fn serve(dir: &Path, address: &str, datafile_mib: u64) {
    let engine = Engine::open(EngineOptions {
        root: Some(dir.to_owned()),
        datafile_bytes: datafile_mib << 20,
        ..EngineOptions::default()
    });
    let engine = Arc::new(engine.unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let config = ServerConfig::default();
        let served =
            qsfs_zdb::server::serve(listener, engine, config, CancellationToken::new()).await;
        served.unwrap();
    });
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| {
        arguments
            .get(at)
            .map_or(default, |text| text.parse().unwrap())
    };
    let (Some(place), Some(what)) = (arguments.first(), arguments.get(1)) else {
        panic!("say where and what: ADDRESS set|get|all|large|compact, or DIR fsync|serve");
    };
    if what == "serve" {
        let address = arguments.get(2).map_or("127.0.0.1:9911", String::as_str);
        return serve(Path::new(place), address, number(3, 256) as u64);
    }
    if matches!(what.as_str(), "all" | "large") {
        let dir = arguments
            .get(2)
            .expect("say which directory's disk is compared");
        if what == "all" {
            return all(place, Path::new(dir), number(3, 1) as f64);
        }
        return all_large(place, Path::new(dir));
    }
    if what == "compact" {
        return compact(place, number(2, 7));
    }
    let (bytes, depth) = (number(2, SMALL), number(3, 64));
    if what == "fsync" {
        return measure_syncs(Path::new(place), bytes, depth);
    }
    let connections = number(4, 1);
    let load = load_of(what == "set", bytes, depth, connections);
    let time = Duration::from_secs(number(5, 5) as u64);
    let rate = rate(place, load, connections, |_, began| began.elapsed() < time);
    println!(
        "{what} {bytes} B, depth {depth}, {connections} connections: {rate:.0}/s, {:.2} GB/s",
        rate * bytes as f64 / 1e9
    );
}
