//! How much a 0-db that is running takes: `cargo run --release -p qsfs-zdb --example load -- ADDRESS set|get [BYTES [DEPTH [CONNECTIONS [SECONDS]]]]`,
//! and how fast a disk syncs: `... load -- DIR fsync [BYTES [DEPTH]]` (writes of BYTES, one fdatasync for DEPTH of them).
//!
//! `... load -- DIR serve` serves DIR at 127.0.0.1:9911 until it is killed, where `qsfs zdb serve` is not built.
//!
//! Lean, because client and server share the machine: answers have a known length, so they are counted and not parsed. GET wants what SET
//! with the same numbers left there.
#![expect(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a measuring tool"
)]

use qsfs_zdb::engine::{Engine, EngineOptions};
use qsfs_zdb::server::ServerConfig;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Keys per connection; they are set and asked for again and again.
const KEYS: usize = 20_000;
/// Bytes that all values may take, so that a large size does not fill the disk.
const VALUES_BYTES_MAX: usize = 1 << 30;

#[derive(Clone, Copy)]
struct Load {
    set: bool,
    bytes: usize,
    depth: usize,
    seconds: u64,
    keys: usize,
}

fn push_request(
    request: &mut Vec<u8>,
    load: Load,
    connection: usize,
    number: usize,
    value: &mut [u8],
) {
    let key = format!("{connection:04}-{:09}", number % load.keys);
    let command = if load.set {
        "*3\r\n$3\r\nSET"
    } else {
        "*2\r\n$3\r\nGET"
    };
    write!(request, "{command}\r\n${}\r\n{key}\r\n", key.len()).unwrap();
    if load.set {
        // Distinct, so that nothing is unchanged.
        value[..8].copy_from_slice(&number.to_le_bytes());
        write!(request, "${}\r\n", value.len()).unwrap();
        request.extend_from_slice(value);
        request.extend_from_slice(b"\r\n");
    }
}

/// Keeps `depth` requests under way for so long; how many were answered.
fn run(address: &str, load: Load, connection: usize) -> usize {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    let answer_bytes = if load.set {
        "$14\r\n".len() + 14 + 2
    } else {
        format!("${}\r\n", load.bytes).len() + load.bytes + 2
    };
    let mut value = vec![b'v'; load.bytes];
    let mut buffer = vec![0; (answer_bytes * load.depth).min(1 << 20)];
    let mut request = Vec::new();
    let (mut sent, mut received) = (0, 0_usize);
    let deadline = Instant::now() + Duration::from_secs(load.seconds);
    loop {
        let answered = received / answer_bytes;
        let ending = Instant::now() >= deadline;
        if ending && answered == sent {
            return answered;
        }
        request.clear();
        while !ending && sent < answered + load.depth {
            push_request(&mut request, load, connection, sent, &mut value);
            sent += 1;
            // A part at a time, so that neither side waits for the other's buffers.
            if request.len() > 1 << 20 {
                break;
            }
        }
        stream.write_all(&request).unwrap();
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "the server closed the connection");
        if received == 0 {
            assert_eq!(
                buffer[0],
                b'$',
                "{}",
                buffer[..count.min(80)].escape_ascii()
            );
        }
        received += count;
    }
}

fn measure_syncs(dir: &Path, bytes: usize, depth: usize) {
    let path = dir.join("load-fsync");
    let mut file = File::create(&path).unwrap();
    let block = vec![b'v'; bytes * depth];
    let (began, mut syncs) = (Instant::now(), 0_u32);
    while began.elapsed() < Duration::from_secs(3) {
        file.write_all(&block).unwrap();
        file.sync_data().unwrap();
        syncs += 1;
    }
    let rate = f64::from(syncs) / began.elapsed().as_secs_f64();
    std::fs::remove_file(path).unwrap();
    println!(
        "fdatasync after {depth} x {bytes} B: {rate:.0}/s, {:.0} writes/s",
        rate * depth as f64
    );
}

fn serve(dir: &Path) {
    let engine = Engine::open(EngineOptions {
        root: Some(dir.to_owned()),
        ..EngineOptions::default()
    });
    let engine = Arc::new(engine.unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:9911")
            .await
            .unwrap();
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
        panic!("say where and what: ADDRESS set|get, or DIR fsync|serve");
    };
    let (bytes, depth) = (number(2, 4096), number(3, 64));
    if what == "fsync" {
        return measure_syncs(Path::new(place), bytes, depth);
    }
    if what == "serve" {
        return serve(Path::new(place));
    }
    let load = Load {
        set: what == "set",
        bytes: bytes.max(8),
        depth,
        seconds: number(5, 5) as u64,
        keys: KEYS.min(VALUES_BYTES_MAX / bytes.max(8)).max(1),
    };
    let connections = number(4, 1);
    let began = Instant::now();
    let answered: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..connections)
            .map(|connection| scope.spawn(move || run(place, load, connection)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{what} {bytes} B, depth {depth}, {connections} connections: {:.0}/s, {:.2} GB/s",
        answered as f64 / seconds,
        (answered * bytes) as f64 / seconds / 1e9
    );
}
