//! The protocol as clients see it: every command's answers and exact errors, pipelines, and bytes that are no requests.
#![expect(clippy::unwrap_used, reason = "tests")]

use bytes::Bytes;
use proptest::prelude::{ProptestConfig, any, prop, proptest};
use qsfs_zdb::client::Password;
use qsfs_zdb::engine::{Engine, EngineOptions};
use qsfs_zdb::server::{Admin, ServerConfig, serve};
use sha1::{Digest, Sha1};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// A server on a loopback port, with its runtime; stops when dropped.
struct Running {
    runtime: tokio::runtime::Runtime,
    address: SocketAddr,
    stop: CancellationToken,
    engine: Arc<Engine>,
    _dir: TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        self.engine.close();
    }
}

fn start(config: ServerConfig) -> Running {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::open(EngineOptions {
        root: Some(dir.path().to_owned()),
        ..EngineOptions::default()
    });
    let engine = Arc::new(engine.unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let stop = CancellationToken::new();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(serve(listener, Arc::clone(&engine), config, stop.clone()));
    Running {
        runtime,
        address,
        stop,
        engine,
        _dir: dir,
    }
}

struct Raw {
    stream: BufReader<TcpStream>,
}

impl Raw {
    fn connect(running: &Running) -> Self {
        let stream = TcpStream::connect(running.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    fn send(&mut self, arguments: &[&[u8]]) {
        let mut bytes = format!("*{}\r\n", arguments.len()).into_bytes();
        for argument in arguments {
            bytes.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
            bytes.extend_from_slice(argument);
            bytes.extend_from_slice(b"\r\n");
        }
        self.stream.get_mut().write_all(&bytes).unwrap();
    }

    /// The next answer, readable: `+OK`, `:1`, `nil`, `"bulk"`, `[a b]`, `-error`.
    fn answer(&mut self) -> String {
        let mut line = String::new();
        if self.stream.read_line(&mut line).unwrap() == 0 {
            return "closed".to_owned();
        }
        let line = line.trim_end();
        let (kind, rest) = line.split_at(1);
        match kind {
            "$" if rest == "-1" => "nil".to_owned(),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().unwrap() + 2];
                self.stream.read_exact(&mut bytes).unwrap();
                bytes.truncate(bytes.len() - 2);
                format!("\"{}\"", bytes.escape_ascii())
            }
            "*" => {
                let count: usize = rest.parse().unwrap();
                let items: Vec<String> = (0..count).map(|_| self.answer()).collect();
                format!("[{}]", items.join(" "))
            }
            _ => line.to_owned(),
        }
    }

    fn ask(&mut self, arguments: &[&[u8]]) -> String {
        self.send(arguments);
        self.answer()
    }

    /// Words split at spaces; `""` is an empty argument.
    fn say(&mut self, line: &str) -> String {
        let words: Vec<&[u8]> = line
            .split(' ')
            .map(|word| if word == "\"\"" { "" } else { word }.as_bytes())
            .collect();
        self.ask(&words)
    }

    fn table(&mut self, rows: &[(&str, &str)]) {
        for (line, wanted) in rows {
            assert_eq!(&self.say(line), wanted, "{line}");
        }
    }
}

#[test]
fn values_and_keys() {
    let running = start(ServerConfig::default());
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("PING", "+PONG"),
        ("ping", "+PONG"),
        ("NOPE", "-Command not supported"),
        ("*", "-This is not a valid command"),
        ("STOP", "-Unauthorized"),
        ("SCAN", "-No more data"),
        ("SET a 1", "\"a\""),
        ("SET a 1", "nil"),
        ("SET a 2", "\"a\""),
        ("SETX b 3", "\"b\""),
        ("SET c \"\"", "\"c\""),
        ("GET a", "\"2\""),
        ("GET c", "\"\""),
        ("GET nope", "nil"),
        ("GET", "-Unexpected arguments"),
        ("GET a b", "-Unexpected arguments"),
        ("GET \"\"", "-Invalid argument"),
        ("MGET a nope b", "[\"2\" nil \"3\"]"),
        ("MGET", "-Invalid arguments"),
        ("SET", "-Unexpected arguments"),
        ("SET \"\" x", "-Invalid argument, key needed"),
        ("SET d 4 123", "\"d\""),
        ("SET d 5 now", "-Invalid timestamp"),
        ("KEYTIME d", ":123"),
        ("EXISTS a", ":1"),
        ("EXISTS nope", ":0"),
        ("CHECK a", ":1"),
        ("CHECK nope", "nil"),
        ("LENGTH a", ":1"),
        ("LENGTH nope", "nil"),
        ("KEYTIME nope", "nil"),
        ("DBSIZE", ":4"),
        ("KSCAN a", "[\"0\" [\"a\"]]"),
        ("KSCAN zz", "-No keys match"),
        ("KEYCUR nope", "-Key not found"),
        ("SCAN 123", "-Invalid key format"),
        ("DEL a", "+OK"),
        ("DEL a", "-Key not found"),
        ("DEL", "-Unexpected arguments"),
        ("GET a", "nil"),
        ("DBSIZE", ":3"),
        ("AUTH x", "-Authentication disabled"),
        ("WAIT", "-Invalid arguments"),
        ("WAIT NOPE", "-Unknown command to watch"),
        ("WAIT SET 1", "-Invalid timeout"),
        ("WAIT SET 100", "-Timeout"),
        ("FLUSH", "-Flushing public namespace denied"),
    ]);
    let long = [b'k'; 256];
    assert_eq!(raw.ask(&[b"SET", &long, b"x"]), "-Key too large");
    assert_eq!(raw.ask(&[b"GET", &long]), "-Invalid key");
    assert_eq!(raw.ask(&[b"SET", &long[1..], b"x"]).len(), 257);
    assert!(raw.say("TIME").starts_with("[\""));
    assert!(raw.say("INFO").contains("sequential_key_size: 8"));
}

#[test]
fn large_values_round_trip() {
    let running = start(ServerConfig::default());
    let mut raw = Raw::connect(&running);
    for bytes in [512, 1 << 10, 8164, 8178, 65_536, 1 << 20, 8 << 20] {
        let value: Vec<u8> = (0..bytes)
            .map(|at| b'a' + u8::try_from(at % 23).unwrap())
            .collect();
        assert_eq!(raw.ask(&[b"SET", b"large", &value]), "\"large\"");
        let wanted = format!("\"{}\"", String::from_utf8(value).unwrap());
        assert!(raw.ask(&[b"GET", b"large"]) == wanted, "{bytes} bytes");
    }
}

#[test]
fn scans_go_through_all_keys_in_order_of_writing() {
    let running = start(ServerConfig::default());
    let mut raw = Raw::connect(&running);
    for number in 0..2500 {
        let key = format!("k{number}");
        raw.send(&[b"SET", key.as_bytes(), b"value"]);
    }
    for _ in 0..2500 {
        raw.answer();
    }
    raw.say("SET k0 again");
    let client = running.runtime.block_on(async {
        let config = qsfs_zdb::client::ClientConfig::new(running.address.to_string(), "default");
        let client = qsfs_zdb::client::ZdbClient::new(config);
        let mut cursor: Option<Bytes> = None;
        let mut keys = Vec::new();
        while let Some(page) = client.scan(cursor.as_deref()).await.unwrap() {
            keys.extend(page.entries.into_iter().map(|entry| entry.key));
            cursor = Some(page.cursor);
        }
        keys
    });
    assert_eq!(client.len(), 2500);
    assert_eq!(
        (&client[0][..], &client[2499][..]),
        (&b"k1"[..], &b"k0"[..])
    );
    assert!(raw.say("RSCAN").contains("[[\"k0\" :5 :"));
}

#[test]
fn sequential_mode() {
    let running = start(ServerConfig::default());
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("NSNEW seq", "+OK"),
        ("NSSET seq mode seq", "+OK"),
        ("SELECT seq", "+OK"),
        ("SET \"\" zero", r#""\x00\x00\x00\x00\x00\x00\x00\x00""#),
        ("SET \"\" one", r#""\x01\x00\x00\x00\x00\x00\x00\x00""#),
        ("SET unknown one", "-Invalid key, only update authorized"),
        (
            "NSSET seq mode user",
            "-Cannot change mode of used namespace",
        ),
    ]);
    assert_eq!(raw.ask(&[b"SET", &[0; 8], b"zero"]), "nil");
    assert_eq!(raw.ask(&[b"GET", &[0; 8]]), "\"zero\"");
    assert_eq!(raw.ask(&[b"DEL", &[0; 8]]), "+OK");
    assert_eq!(
        raw.ask(&[b"SET", &[0; 8], b"zero"]),
        "-Invalid key, only update authorized"
    );
    assert!(raw.say("NSINFO seq").contains("mode: sequential"));
}

#[test]
fn namespaces_and_their_properties() {
    let running = start(ServerConfig::default());
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("NSNEW default", "-This name is not allowed"),
        ("NSNEW a/b", "-This name is not allowed"),
        ("NSNEW ..", "-This name is not allowed"),
        ("NSNEW one", "+OK"),
        ("NSNEW one", "-This namespace is not available"),
        ("NSLIST", "[\"default\" \"one\"]"),
        ("NSDEL default", "-Cannot remove default namespace"),
        ("NSDEL two", "-This namespace doesn't exists"),
        ("SELECT two", "-Namespace not found"),
        ("SELECT", "-Invalid argument"),
        ("NSINFO two", "-Namespace not found"),
        ("NSSET two worm 1", "-Namespace not found"),
        ("NSSET one Worm 1", "-Invalid property"),
        ("NSSET default worm 1", "-Cannot update default namespace"),
        (
            "NSSET one mode other",
            "-Invalid property value (expected: user, seq)",
        ),
        ("SELECT one", "+OK"),
        (
            "NSDEL one",
            "-Cannot remove namespace you're currently using.",
        ),
        ("SET k value", "\"k\""),
        ("NSSET one worm 1", "+OK"),
        ("SET k value", "-Namespace is protected by worm mode"),
        (
            "DEL k",
            "-Cannot delete a key when namespace is in worm mode",
        ),
        ("NSSET one worm 0", "+OK"),
        ("NSSET one maxsize 8", "+OK"),
        ("SET l large", "-No space left on this namespace"),
        ("SET k val", "\"k\""),
        ("SET l large", "\"l\""),
        ("NSSET one lock 1", "+OK"),
        ("SET m x", "-Namespace is temporarily locked (read-only)"),
        ("GET k", "\"val\""),
        ("NSSET one lock 0", "+OK"),
        ("NSSET one freeze 1", "+OK"),
        (
            "GET k",
            "-Namespace is temporarily frozen (read-write disabled)",
        ),
        (
            "SCAN",
            "-Namespace is temporarily frozen (read-write disabled)",
        ),
        ("DBSIZE", ":2"),
        ("NSSET one freeze 0", "+OK"),
        ("NSSET one password secret", "+OK"),
        ("SELECT one", "+OK"),
        ("SET m x", "-Namespace is in read-only mode"),
        ("NSSET one public 0", "+OK"),
        ("SELECT one", "-Namespace protected and private"),
        ("SELECT one wrong", "-Access denied"),
        ("SELECT one secret", "+OK"),
        ("FLUSH", "+OK"),
        ("DBSIZE", ":0"),
    ]);
    let info = raw.say("NSINFO one");
    for field in [
        "name: one",
        "entries: 0",
        "public: no",
        "password: yes",
        "data_size_bytes: 0",
        "data_limits_bytes: 8",
        "index_size_bytes: ",
        "mode: userkey",
        "worm: no",
        "locked: no",
        "data_disk_freespace_bytes: ",
        "index_disk_freespace_bytes: ",
    ] {
        assert!(info.contains(field), "{field} in {info}");
    }
    let mut other = Raw::connect(&running);
    assert_eq!(other.say("NSDEL one"), "+OK");
    assert_eq!(
        raw.say("GET k"),
        "-Your active namespace is not available anymore (probably removed)."
    );
    assert_eq!(raw.answer(), "closed");
}

fn proof(nonce: &str, password: &str) -> String {
    let digest = Sha1::digest(format!("{nonce}:{password}").as_bytes());
    digest.iter().fold(String::new(), |mut text, byte| {
        text.push_str(&format!("{byte:02x}"));
        text
    })
}

#[test]
fn secure_authentication_uses_a_nonce_once() {
    let config = ServerConfig {
        admin: Admin::Password(Password::new("boss")),
        ..ServerConfig::default()
    };
    let running = start(config);
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("NSNEW x", "-Permission denied"),
        ("AUTH wrong", "-Access denied"),
        ("AUTH a b c", "-Unexpected arguments"),
        ("AUTH OTHER b", "-Only SECURE extra method supported"),
        (
            "AUTH SECURE 0000000000000000000000000000000000000000",
            "-No CHALLENGE requested, secure authentication not available",
        ),
    ]);
    let nonce = raw.say("AUTH SECURE CHALLENGE")[1..].to_owned();
    assert_eq!(nonce.len(), 16);
    assert_eq!(raw.say("AUTH SECURE short"), "-Invalid hash length");
    let auth = format!("AUTH SECURE {}", proof(&nonce, "boss"));
    raw.table(&[
        (&auth, "+OK"),
        (
            &auth,
            "-No CHALLENGE requested, secure authentication not available",
        ),
        ("NSNEW x", "+OK"),
        ("NSSET x password secret", "+OK"),
        ("NSSET x public 0", "+OK"),
    ]);
    let nonce = raw.say("AUTH SECURE CHALLENGE")[1..].to_owned();
    let select = format!("SELECT x SECURE {}", proof(&nonce, "secret"));
    assert_eq!(raw.say(&select), "+OK");
    assert_eq!(
        raw.say(&select),
        "-No CHALLENGE requested, secure authentication not available"
    );
}

#[test]
fn a_pipeline_is_answered_in_order_and_reads_its_own_writes() {
    let running = start(ServerConfig::default());
    let mut raw = Raw::connect(&running);
    for number in 0..200 {
        let (key, value) = (format!("k{}", number % 7), format!("v{number}"));
        raw.send(&[b"SET", key.as_bytes(), value.as_bytes()]);
        raw.send(&[b"GET", key.as_bytes()]);
        raw.send(&[b"PING"]);
    }
    for number in 0..200 {
        assert_eq!(raw.answer(), format!("\"k{}\"", number % 7));
        assert_eq!(raw.answer(), format!("\"v{number}\""));
        assert_eq!(raw.answer(), "+PONG");
    }
}

#[test]
fn wait_sees_what_another_client_does() {
    let running = start(ServerConfig::default());
    let mut waiter = Raw::connect(&running);
    let mut other = Raw::connect(&running);
    waiter.send(&[b"WAIT", b"SET", b"10000"]);
    let done = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| waiter.answer());
        // WAIT may begin after a SET: go on until it has seen one.
        let mut number = 0;
        while !waiting.is_finished() {
            number += 1;
            other.say(&format!("SET k {number}"));
        }
        waiting.join().unwrap()
    });
    assert_eq!(done, "+SET");
}

#[test]
fn bytes_that_are_no_request_get_one_error_and_the_server_goes_on() {
    let running = start(ServerConfig::default());
    for (bytes, wanted, closed) in [
        (&b"PING\r\n"[..], "-Malformed request, array expected", true),
        (b"+OK\r\n", "-Malformed request, array expected", true),
        (b"*0\r\n", "-Missing arguments", false),
        (b"*1025\r\n", "-Too many arguments", true),
        (b"*-1\r\n", "-Internal memory error", true),
        (b"*1\r\n*1\r\n", "-Malformed query string", true),
        (b"*1\r\n:5\r\n", "-Malformed query string", true),
        (
            b"*2\r\n$3\r\nGET\r\n$-1\r\n",
            "-Malformed query string",
            true,
        ),
        (b"*1\r\n$8388609\r\n", "-Payload too big", true),
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
        raw.stream.get_mut().write_all(bytes).unwrap();
        assert_eq!(raw.answer(), wanted, "{}", bytes.escape_ascii());
        if closed {
            assert_eq!(raw.answer(), "closed");
        } else {
            assert_eq!(raw.say("PING"), "+PONG");
        }
    }
    assert_eq!(Raw::connect(&running).say("PING"), "+PONG");
}

#[test]
fn slow_bytes_and_odd_line_ends_are_understood() {
    let running = start(ServerConfig::default());
    let mut raw = Raw::connect(&running);
    for byte in b"*1\n$4\nPING\r\n" {
        raw.stream.get_mut().write_all(&[*byte]).unwrap();
        raw.stream.get_mut().flush().unwrap();
    }
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
    assert_eq!(Raw::connect(&running).answer(), "-Too many connections");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn hostile_bytes_neither_hang_nor_stop_the_server(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..6), framed in any::<bool>(),
    ) {
        static RUNNING: std::sync::OnceLock<Running> = std::sync::OnceLock::new();
        let running = RUNNING.get_or_init(|| start(ServerConfig::default()));
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
