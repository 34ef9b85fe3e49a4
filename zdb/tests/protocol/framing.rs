//! Bytes on the wire: what is understood, what is refused, and what is bounded.

use super::wire::{Raw, Running, framed, plain, start};
use proptest::prelude::{ProptestConfig, any, prop, proptest};
use qsfs_zdb::engine::{Engine, EngineOptions, NamespaceOptions};
use qsfs_zdb::server::{Admin, ServerConfig, serve};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

#[test]
fn bytes_that_are_no_request_get_one_error_and_the_server_goes_on() {
    let running = plain();
    for (bytes, wanted, closed) in [
        (&b"PING\r\n"[..], "-Malformed request, array expected", true),
        (b"+OK\r\n", "-Malformed request, array expected", true),
        // The original keeps answering these for ever, whatever is sent next.
        (b"*0\r\n", "-Missing arguments", false),
        (b"*1025\r\n", "-Too many arguments", true),
        (b"*-1\r\n", "-Internal memory error", true),
        (b"*1\r\n*1\r\n$1\r\nX\r\n", "-Malformed query string", true),
        (b"*1\r\n:5\r\n", "-Malformed query string", true),
        // The original says nothing and hangs.
        (
            b"*2\r\n$3\r\nGET\r\n$-1\r\n",
            "-Malformed query string",
            true,
        ),
        (b"*1\r\n$8388609\r\n", "-Payload too big", true),
        (b"*1\r\n$x\r\n", "-Malformed query string", true),
        (
            b"*11111111111111111111111111111111111111",
            "-Malformed query string",
            true,
        ),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            "-Malformed request, array expected",
            true,
        ),
        (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            "-Malformed request, array expected",
            true,
        ),
    ] {
        let mut raw = Raw::connect(&running);
        raw.bytes(bytes);
        assert_eq!(raw.answer(), wanted, "{}", bytes.escape_ascii());
        if closed {
            assert_eq!(raw.answer(), "closed");
        } else {
            assert_eq!(raw.say("PING"), "+PONG");
        }
    }
    assert_eq!(Raw::connect(&running).say("PING"), "+PONG");
}

/// Closing a socket with unread bytes resets it, and the error is lost on the way: a client that sends its whole request first must see
/// the error all the same.
#[test]
fn a_client_that_sends_on_sees_the_error() {
    let running = plain();
    let mut many: Vec<&[u8]> = vec![b"MGET"];
    many.resize(1500, b"key");
    let mut raw = Raw::connect(&running);
    raw.bytes(&framed(&many));
    assert_eq!(raw.answer(), "-Too many arguments");
    assert_eq!(raw.answer(), "closed");

    let large = vec![b'v'; (8 << 20) + 1];
    let both = vec![b'v'; 5 << 20];
    for too_big in [
        framed(&[b"SET", b"k", &large]),
        framed(&[b"SET", &both, &both]),
    ] {
        let mut raw = Raw::connect(&running);
        raw.bytes(&too_big);
        assert_eq!(raw.answer(), "-Payload too big");
        assert_eq!(raw.answer(), "closed");
    }
}

/// What was asked before the bytes that are no request is answered first.
#[test]
fn requests_before_garbage_are_answered() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let mut bytes = framed(&[b"SET", b"k", b"v"]);
    bytes.extend(framed(&[b"GET", b"k"]));
    bytes.extend(b"*0\r\n");
    bytes.extend(framed(&[b"PING"]));
    bytes.extend(b"garbage");
    raw.bytes(&bytes);
    for wanted in [
        "\"k\"",
        "\"v\"",
        "-Missing arguments",
        "+PONG",
        "-Malformed request, array expected",
        "closed",
    ] {
        assert_eq!(raw.answer(), wanted);
    }
}

#[test]
fn limits_themselves_are_allowed() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let mut arguments: Vec<&[u8]> = vec![b"PING"];
    arguments.resize(1024, b"x");
    assert_eq!(raw.ask(&arguments), "+PONG");
    let large = vec![b'v'; 8 << 20];
    assert_eq!(raw.ask(&[b"SET", b"k", &large]), "\"k\"");
    assert_eq!(raw.say("LENGTH k"), ":8388608");
}

/// The original's own tests of its 8192-byte buffer.
#[test]
fn headers_and_payloads_straddle_byte_8192() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let value = vec![b'K'; 8164];
    assert_eq!(raw.ask(&[b"SET", b"XXX", &value]), "\"XXX\"");
    for bytes in [8178, 8175] {
        let command = vec![b'W'; bytes];
        assert_eq!(
            raw.ask(&[&command, b"XXXX"]),
            "-Command not supported",
            "{bytes}"
        );
    }
    // And every other cut around it.
    for bytes in 8130..8200 {
        let value = vec![b'K'; bytes];
        let mut request = framed(&[b"SET", b"cut", &value]);
        let rest = request.split_off(8192.min(request.len()));
        raw.bytes(&request);
        raw.bytes(&rest);
        assert_eq!(raw.answer(), "\"cut\"", "{bytes}");
    }
}

#[test]
fn slow_bytes_and_odd_line_ends_are_understood() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    for byte in b"*1\n$4\nPING\r\n" {
        raw.bytes(&[*byte]);
        // The client's pace is what is tested: 1 byte in 10 ms, as the original's suite sends it.
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(raw.answer(), "+PONG");
    // Two bytes follow a payload, whatever they are.
    raw.bytes(b"*1\r\n$4\r\nPINGxy");
    assert_eq!(raw.answer(), "+PONG");
}

#[test]
fn many_connections_are_served_and_too_many_are_refused() {
    let running = start(ServerConfig {
        connections_max: 128,
        ..ServerConfig::default()
    });
    let mut connections: Vec<Raw> = (0..128).map(|_| Raw::connect(&running)).collect();
    for raw in &mut connections {
        assert_eq!(raw.say("PING"), "+PONG");
    }
    let mut refused = Raw::connect(&running);
    assert_eq!(refused.answer(), "-Too many connections");
    assert_eq!(refused.answer(), "closed");
    // A place that is given back is taken again.
    drop(connections.pop());
    let mut answer = String::new();
    while answer != "+PONG" {
        let mut raw = Raw::connect(&running);
        if raw.stream.get_mut().write_all(&framed(&[b"PING"])).is_ok() {
            answer = raw.answer();
        }
    }
}

/// Half of a large value each, from more connections than fit in memory: who sends on is served all the same.
#[test]
fn large_requests_that_do_not_come_do_not_keep_others_waiting() {
    let running = start(ServerConfig {
        arriving_bytes: 16 << 20,
        inflight_bytes: 16 << 20,
        ..ServerConfig::default()
    });
    let mut slow: Vec<Raw> = (0..4).map(|_| Raw::connect(&running)).collect();
    let half = vec![b'v'; 512 << 10];
    for raw in &mut slow {
        raw.bytes(b"*3\r\n$3\r\nSET\r\n$1\r\ns\r\n$8388608\r\n");
        // The server need not take all of it.
        let _ = raw
            .stream
            .get_ref()
            .set_write_timeout(Some(Duration::from_millis(200)));
        let _ = raw.stream.get_mut().write_all(&half);
    }
    let mut raw = Raw::connect(&running);
    let value = vec![b'x'; 8 << 20];
    assert_eq!(raw.ask(&[b"SET", b"k", &value]), "\"k\"");
    assert_eq!(raw.say("LENGTH k"), ":8388608");
}

/// A client that asks for much and takes nothing holds memory that others wait for: it is let go.
#[test]
fn answers_that_are_not_taken_do_not_keep_others_waiting() {
    let running = start(ServerConfig {
        inflight_bytes: 16 << 20,
        ..ServerConfig::default()
    });
    let mut raw = Raw::connect(&running);
    let value = vec![b'x'; 8 << 20];
    assert_eq!(raw.ask(&[b"SET", b"k", &value]), "\"k\"");
    let greedy: Vec<Raw> = (0..3)
        .map(|_| {
            let mut greedy = Raw::connect(&running);
            for _ in 0..8 {
                greedy.send(&[b"GET", b"k"]);
            }
            greedy
        })
        .collect();
    for _ in 0..4 {
        assert_eq!(raw.say("GET k").len(), (8 << 20) + 2);
    }
    drop(greedy);
}

/// As an agent serves: no default namespace, no admin. Strangers may say little and not for long.
#[test]
fn strangers_are_bounded_in_bytes_and_time() {
    let running = plain();
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(Engine::open(EngineOptions::default()).unwrap());
    engine
        .add_namespace(NamespaceOptions::new("ns", dir.path().join("ns")))
        .unwrap();
    let listener = running
        .runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = listener.local_addr().unwrap();
    let config = ServerConfig {
        admin: Admin::Nobody,
        handshake_timeout: Duration::from_millis(500),
        ..ServerConfig::default()
    };
    let stop = CancellationToken::new();
    running
        .runtime
        .spawn(serve(listener, Arc::clone(&engine), config, stop.clone()));
    let connect = || Raw {
        stream: std::io::BufReader::new(TcpStream::connect(address).unwrap()),
    };
    let mut raw = connect();
    raw.table(&[
        ("GET k", "-Namespace not found"),
        ("SET k v", "-Namespace not found"),
        ("NSNEW x", "-Permission denied"),
        ("AUTH x", "-Authentication disabled"),
        ("STOP", "-Unauthorized"),
    ]);
    raw.bytes(b"*2\r\n$3\r\nGET\r\n$5000\r\n");
    assert_eq!(raw.answer(), "-Payload too big");
    assert_eq!(raw.answer(), "closed");
    // Nothing said in time: closed. Let in: not any more.
    let mut silent = connect();
    let mut let_in = connect();
    assert_eq!(let_in.say("SELECT ns"), "+OK");
    let mut rest = Vec::new();
    silent.stream.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    assert_eq!(let_in.say("SET k v"), "\"k\"");
    stop.cancel();
    engine.close();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn hostile_bytes_neither_hang_nor_stop_the_server(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..6), framed in any::<bool>(),
    ) {
        static RUNNING: std::sync::OnceLock<Running> = std::sync::OnceLock::new();
        let running = RUNNING.get_or_init(plain);
        let mut raw = Raw::connect(running);
        for chunk in &chunks {
            if framed {
                // Well framed, but nonsense: names and arguments are arbitrary.
                raw.send(&[chunk, b"x", chunk]);
            } else if raw.stream.get_mut().write_all(chunk).is_err() {
                break;
            }
        }
        let _ = raw.stream.get_mut().shutdown(Shutdown::Write);
        // The connection ends by itself: whatever is answered, it does not hang.
        let mut rest = Vec::new();
        let _ = raw.stream.read_to_end(&mut rest);
        assert_eq!(Raw::connect(running).say("PING"), "+PONG");
    }
}
