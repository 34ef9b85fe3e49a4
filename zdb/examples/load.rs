//! How much a 0-db that is running takes: `cargo run --release -p qsfs-zdb --example load -- ADDRESS set|get [BYTES [DEPTH [CONNECTIONS [SECONDS]]]]`,
//! and how fast a disk syncs: `... load -- DIR fsync [BYTES [DEPTH]]` (writes of BYTES, one fdatasync for DEPTH of them).
//!
//! `... load -- DIR serve` serves DIR at 127.0.0.1:9911 until it is killed, where `qsfs zdb serve` is not built.
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
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Keys in all; they are set and asked for again and again.
const KEYS: usize = 20_000;
/// Bytes that all values may take, so that a large size does not fill the disk.
const VALUES_BYTES_MAX: usize = 256 << 20;

#[derive(Clone, Copy)]
struct Load {
    set: bool,
    bytes: usize,
    depth: usize,
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
            let go_on = more(sent);
            if !go_on && answered == sent {
                return answered;
            }
            request.clear();
            while go_on && sent < answered + load.depth {
                push_request(&mut request, load, self.connection, sent, &mut value);
                sent += 1;
                // A part at a time, so that neither side waits for the other's buffers.
                if request.len() > 1 << 20 {
                    break;
                }
            }
            self.stream.write_all(&request).unwrap();
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
    let connections = number(4, 1);
    let keys = KEYS.min(VALUES_BYTES_MAX / bytes.max(16));
    let load = Load {
        set: what == "set",
        bytes: bytes.max(16),
        depth,
        keys: keys.div_ceil(connections),
    };
    let seconds = number(5, 5) as u64;
    let mut clients: Vec<Client> = (0..connections)
        .map(|connection| Client::connect(place, load, connection))
        .collect();
    if !load.set {
        std::thread::scope(|scope| {
            for client in &mut clients {
                scope.spawn(|| client.run(true, |sent| sent < load.keys));
            }
        });
    }
    let began = Instant::now();
    let deadline = began + Duration::from_secs(seconds);
    let answered: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter_mut()
            .map(|client| scope.spawn(move || client.run(load.set, |_| Instant::now() < deadline)))
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
