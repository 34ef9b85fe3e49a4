//! `qsfs zdb serve` as its users meet it: the real binary, bare sockets and redis clients; kills and mistakes.

#![expect(clippy::unwrap_used, reason = "tests")]

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use qsfs_jepsen_tests::{Daemons, process, wait_for};
use qsfs_zdb::client::{ClientConfig, ClientTls, Password, ZdbClient};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const READY: &str = "ready on ";
const PATIENCE: Duration = Duration::from_secs(60);

fn daemons() -> Daemons {
    Daemons::new(Path::new(env!("CARGO_BIN_EXE_qsfs")))
}

/// Starts a server on a free port, with more arguments; its address.
fn serve(daemons: &mut Daemons, name: &str, more: &[&str]) -> String {
    let data = daemons.path("data");
    let mut arguments = vec!["zdb", "serve", "--data", &data, "--listen", "127.0.0.1:0"];
    arguments.extend(more);
    let said = daemons.start_and_hear(name, &arguments, READY);
    said.last().unwrap().strip_prefix(READY).unwrap().to_owned()
}

fn framed(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

/// Sends requests and reads exactly the bytes of the answers.
fn exchange(stream: &mut (impl Read + Write), requests: &[&[&[u8]]], answers: &str) {
    for request in requests {
        stream.write_all(&framed(request)).unwrap();
    }
    let mut got = vec![0; answers.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(
        got.escape_ascii().to_string(),
        answers.as_bytes().escape_ascii().to_string()
    );
}

fn tcp(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn kill(daemons: &mut Daemons, name: &str) {
    process::signal(daemons.pid(name), nix::sys::signal::Signal::SIGKILL);
    assert_eq!(daemons.wait_end(name), None);
}

#[test]
fn serves_on_tcp_and_unix_and_ends_in_order() {
    let mut daemons = daemons();
    let socket = daemons.path("socket");
    let address = serve(
        &mut daemons,
        "zdb",
        &["--listen", &format!("unix:{socket}")],
    );
    exchange(
        &mut tcp(&address),
        &[&[b"PING"], &[b"SET", b"k", b"v"], &[b"GET", b"k"]],
        "+PONG\r\n$1\r\nk\r\n$1\r\nv\r\n",
    );
    wait_for("the unix socket", || UnixStream::connect(&socket).map(drop));
    let mut unix = UnixStream::connect(&socket).unwrap();
    exchange(&mut unix, &[&[b"GET", b"k"]], "$1\r\nv\r\n");
    // It is one server: who waits at one place sees what happens at the other.
    unix.write_all(&framed(&[b"WAIT", b"SET", b"60000"]))
        .unwrap();
    let waiting = std::thread::spawn(move || {
        let mut seen = [0; 6];
        unix.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"+SET\r\n");
        unix
    });
    let mut setting = tcp(&address);
    while !waiting.is_finished() {
        exchange(&mut setting, &[&[b"SETX", b"k", b"v"]], "$-1\r\n");
        exchange(&mut setting, &[&[b"SET", b"k", b"v"]], "$-1\r\n");
    }
    let mut unix = waiting.join().unwrap();
    // An idle connection does not hold up the end.
    assert_eq!(daemons.stop("zdb"), Some(0));
    assert!(!Path::new(&socket).exists());
    let mut rest = Vec::new();
    unix.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

/// A client library that knows nothing of 0-db.
#[test]
fn a_redis_library_works_unchanged() {
    let mut daemons = daemons();
    let address = serve(&mut daemons, "zdb", &[]);
    let client = redis::Client::open(format!("redis://{address}/")).unwrap();
    let mut connection = client.get_connection().unwrap();
    let value: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
    let key: String = redis::cmd("SET")
        .arg("key")
        .arg(&value)
        .query(&mut connection)
        .unwrap();
    assert_eq!(key, "key");
    let got: Vec<u8> = redis::cmd("GET").arg("key").query(&mut connection).unwrap();
    assert!(got == value);
    let many: Vec<Option<Vec<u8>>> = redis::cmd("MGET")
        .arg("key")
        .arg("nope")
        .query(&mut connection)
        .unwrap();
    assert!(many[0].as_ref() == Some(&value) && many[1].is_none());
    let names: Vec<String> = redis::cmd("NSLIST").query(&mut connection).unwrap();
    assert_eq!(names, ["default"]);
    let (set, got): (String, String) = redis::pipe()
        .cmd("SET")
        .arg("a")
        .arg("1")
        .cmd("GET")
        .arg("a")
        .query(&mut connection)
        .unwrap();
    assert_eq!((set.as_str(), got.as_str()), ("a", "1"));
}

/// Everything acknowledged before SIGKILL is there afterwards, and the socket that was left behind is no obstacle.
#[test]
fn what_was_acknowledged_survives_a_kill() {
    let mut daemons = daemons();
    let socket = format!("unix:{}", daemons.path("socket"));
    let mut kept = 0_u32;
    for round in 0..3 {
        let name = format!("zdb-{round}");
        let address = serve(&mut daemons, &name, &["--listen", &socket]);
        let mut stream = tcp(&address);
        for number in 0..kept {
            let (key, value) = (format!("k{number}"), format!("value {number}"));
            let answer = format!("${}\r\n{value}\r\n", value.len());
            exchange(&mut stream, &[&[b"GET", key.as_bytes()]], &answer);
        }
        for _ in 0..50 {
            let (key, value) = (format!("k{kept}"), format!("value {kept}"));
            let answer = format!("${}\r\n{key}\r\n", key.len());
            exchange(
                &mut stream,
                &[&[b"SET", key.as_bytes(), value.as_bytes()]],
                &answer,
            );
            kept += 1;
        }
        // More that nobody waits for.
        for number in 0..100 {
            let request = framed(&[b"SET", format!("late {number}").as_bytes(), b"x"]);
            stream.write_all(&request).unwrap();
        }
        kill(&mut daemons, &name);
    }
}

/// What a client knows of one key: what was answered last, and what was asked for behind it and not answered.
#[derive(Clone, Default)]
struct Known {
    certain: Option<Vec<u8>>,
    possible: Vec<Option<Vec<u8>>>,
}

const KEYS_OF_A_CLIENT: usize = 12;

fn key_of(client: usize, number: usize) -> String {
    format!("client {client} key {number}")
}

/// Pipelines of eight SETs and DELs of its own keys, values from a few bytes to a megabyte, until the server is gone.
fn ask_until_killed(
    address: &str,
    client: usize,
    round: usize,
    known: &mut [Known],
    answered: &AtomicUsize,
) {
    let mut stream = tcp(address);
    for turn in 0.. {
        let mut requests = Vec::new();
        let mut asked = Vec::new();
        for at in 0..8 {
            let mixed = (turn * 8 + at) * 7919 + client * 104_729 + round * 31;
            let number = mixed % KEYS_OF_A_CLIENT;
            let key = key_of(client, number);
            if mixed.is_multiple_of(5) {
                requests.extend(framed(&[b"DEL", key.as_bytes()]));
                asked.push((number, None));
            } else {
                let bytes = [30, 5000, 70_000, 1 << 20][mixed / 5 % 4];
                let mut value = vec![u8::try_from(usize::from(b'a') + mixed % 23).unwrap(); bytes];
                value[..16].copy_from_slice(format!("{round:04}{turn:08}{at:04}").as_bytes());
                requests.extend(framed(&[b"SET", key.as_bytes(), &value]));
                asked.push((number, Some(value)));
            }
        }
        for (number, wanted) in &asked {
            known[*number].possible.push(wanted.clone());
        }
        // The answers are short, so all requests can go first.
        if stream.write_all(&requests).is_err() {
            return;
        }
        for (number, wanted) in asked {
            let Some(answer) = line(&mut stream) else {
                return;
            };
            let done = match &wanted {
                Some(_) => answer == format!("${}", key_of(client, number).len()),
                None => answer == "+OK" || answer == "-Key not found",
            };
            assert!(done, "{answer}");
            if wanted.is_some() && line(&mut stream).is_none() {
                return;
            }
            // In order: what was asked for before is answered already.
            let known = &mut known[number];
            known.possible.remove(0);
            known.certain = wanted;
            answered.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A line of an answer; none: the server is gone.
fn line(stream: &mut TcpStream) -> Option<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\r\n") {
        stream.read_exact(&mut byte).ok()?;
        line.push(byte[0]);
    }
    line.truncate(line.len() - 2);
    String::from_utf8(line).ok()
}

fn value_of(stream: &mut TcpStream, key: &str) -> Option<Vec<u8>> {
    stream
        .write_all(&framed(&[b"GET", key.as_bytes()]))
        .unwrap();
    let header = line(stream).unwrap();
    let bytes: i64 = header.strip_prefix('$').expect(&header).parse().unwrap();
    let mut value = vec![0; usize::try_from(bytes).ok()? + 2];
    stream.read_exact(&mut value).unwrap();
    value.truncate(value.len() - 2);
    Some(value)
}

fn newest_datafile(data: &Path) -> u32 {
    let names = fs::read_dir(data).unwrap().flatten();
    let numbers = names.filter_map(|name| {
        let name = name.file_name().into_string().ok()?;
        u32::from_str_radix(name.strip_suffix(".zdb")?, 16).ok()
    });
    numbers.max().unwrap()
}

/// Many connections, mixed sizes, SET and DEL, batches appended while others are synced, compaction all the time; SIGKILL in the middle of
/// it. What was answered is there, what was not is there whole or not at all.
#[test]
fn kills_under_load_lose_nothing_that_was_answered() {
    const CLIENTS: usize = 6;
    const ROUNDS: usize = 4;
    let mut daemons = daemons();
    let mut known = vec![vec![Known::default(); KEYS_OF_A_CLIENT]; CLIENTS];
    for round in 0..=ROUNDS {
        let name = format!("zdb-{round}");
        let address = serve(
            &mut daemons,
            &name,
            &["--datasize", "16MiB", "--history", "0"],
        );
        let mut stream = tcp(&address);
        for (client, known) in known.iter_mut().enumerate() {
            for (number, known) in known.iter_mut().enumerate() {
                let key = key_of(client, number);
                let now = value_of(&mut stream, &key);
                assert!(
                    now == known.certain || known.possible.contains(&now),
                    "round {round}, {key}: {:?} bytes",
                    now.map(|now| now.len())
                );
                *known = Known {
                    certain: now,
                    possible: Vec::new(),
                };
            }
        }
        if round == ROUNDS {
            break;
        }
        let pid = daemons.pid(&name);
        let address = &address;
        let data = Path::new(&daemons.path("data")).join("namespaces/default");
        let first = newest_datafile(&data);
        let answered = &AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for (client, known) in known.iter_mut().enumerate() {
                scope.spawn(move || ask_until_killed(address, client, round, known, answered));
            }
            // Once much was overwritten and compacted.
            wait_for("datafiles to be completed", || {
                let more = newest_datafile(&data) - first;
                let answered = answered.load(Ordering::Relaxed);
                if more >= 8 && answered > 200 {
                    Ok(())
                } else {
                    Err(format!("{more} datafiles, {answered} answers"))
                }
            });
            process::signal(pid, nix::sys::signal::Signal::SIGKILL);
        });
        assert_eq!(daemons.wait_end(&name), None);
    }
}

#[test]
fn an_admin_password_protects_and_stop_is_allowed_on_request() {
    let mut daemons = daemons();
    let file = daemons.path("admin");
    fs::write(&file, "boss\n").unwrap();
    let address = serve(
        &mut daemons,
        "zdb",
        &[
            "--admin-file",
            &file,
            "--protect",
            "--allow-stop",
            "--mode",
            "seq",
            "--maxsize",
            "1KiB",
            "--datasize",
            "1MiB",
        ],
    );
    exchange(
        &mut tcp(&address),
        &[
            &[b"NSNEW", b"x"],
            &[b"SET", b"", b"v"],
            &[b"SELECT", b"default", b"boss"],
            &[b"SET", b"", &[b'v'; 1024]],
            &[b"SET", b"", b"v"],
            &[b"STOP"],
            &[b"AUTH", b"boss"],
            &[b"NSSET", b"default", b"mode", b"user"],
            &[b"STOP"],
        ],
        "-Permission denied\r\n-Namespace is in read-only mode\r\n+OK\r\n$8\r\n\0\0\0\0\0\0\0\0\r\n\
         -No space left on this namespace\r\n-Permission denied\r\n+OK\r\n\
         -This server instance is configured to use a single runtime mode\r\n+Stopping\r\n",
    );
    assert_eq!(daemons.wait_end("zdb"), Some(0));
    // What is in sequential mode cannot be served in the other.
    let data = daemons.path("data");
    let serve = ["zdb", "serve", "--data", &data, "--mode", "user"];
    daemons
        .binary()
        .run(serve)
        .fails_naming(&["default", "sequential", "mixed"]);
}

#[test]
fn tls_is_served_and_plain_text_is_not() {
    let mut daemons = daemons();
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["zdb.example".to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let (cert_file, key_file) = (daemons.path("cert.pem"), daemons.path("key.pem"));
    fs::write(&cert_file, certificate.pem()).unwrap();
    fs::write(&key_file, key.serialize_pem()).unwrap();
    let address = serve(
        &mut daemons,
        "zdb",
        &["--tls-cert", &cert_file, "--tls-key", &key_file],
    );
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let config = ClientConfig {
        tls: Some(ClientTls {
            config: Arc::new(tls),
            server_name: "zdb.example".to_owned(),
        }),
        // There is none: it is not looked at.
        password: Some(Password::new("none")),
        ..ClientConfig::new(address.clone(), "default")
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = ZdbClient::new(config);
        client.set(b"k", "v".into()).await.unwrap();
        assert_eq!(client.get(b"k").await.unwrap().unwrap(), "v");
        let plain = ZdbClient::new(ClientConfig::new(address, "default"));
        assert!(plain.ping().await.is_err());
    });
}

#[test]
fn mistakes_are_named() {
    let mut daemons = daemons();
    let address = serve(&mut daemons, "zdb", &[]);
    let data = daemons.path("data");
    let run = |arguments: &[&str]| {
        daemons
            .binary()
            .run([&["zdb", "serve"], arguments].concat())
    };
    run(&["--data", &data, "--listen", "127.0.0.1:0"]).fails_naming(&["in use", &data]);
    let other = daemons.path("other");
    run(&["--data", &other, "--listen", &address]).fails_naming(&[
        "listening on",
        &address,
        "in use",
    ]);
    let photos = daemons.path("photos");
    fs::create_dir(&photos).unwrap();
    fs::write(Path::new(&photos).join("holiday.jpg"), "x").unwrap();
    run(&["--data", &photos]).fails_naming(&[&photos, "holiday.jpg", "empty directory"]);
    let empty = daemons.path("empty");
    fs::write(&empty, "\n").unwrap();
    run(&["--data", &other, "--admin-file", &empty]).fails_naming(&[&empty, "password"]);
    run(&["--data", &other, "--admin-file", "/nowhere"]).fails_naming(&["/nowhere"]);
    run(&["--data", &empty]).fails_naming(&[&empty]);
    for (arguments, word) in [
        (&["--protect"][..], "--admin-file"),
        (&["--tls-cert", "c.pem"], "--tls-key"),
        (&["--datasize", "1KiB"], "512KiB"),
        (&["--maxsize", "many"], "size"),
        (&["--listen", "9900"], "unix:path"),
        (&["--mode", "sequential"], "seq"),
    ] {
        let arguments = [&["--data", &other][..], arguments].concat();
        run(&arguments).code_is(2).fails_naming(&[word]);
    }
    run(&["--data", &other, "--tls-cert", &empty, "--tls-key", &empty])
        .fails_naming(&[&empty, "certificate"]);
    let help = run(&["--help"]).ok().stdout;
    for option in [
        "--data",
        "--listen",
        "--admin-file",
        "--mode",
        "--allow-stop",
    ] {
        assert!(help.contains(option), "{help}");
    }
}

/// Resident memory of a process, KiB.
fn resident_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let number = line.unwrap().split_whitespace().nth(1).unwrap();
    number.parse().unwrap()
}

/// 1,024 connections that each sent a part of a request: of a header, of a small value, of a large one. They cost at most 64 MiB, and
/// others are served.
#[test]
fn a_thousand_slow_connections_cost_little_memory() {
    const CONNECTIONS: usize = 1024;
    const COST_KIB_MAX: u64 = 64 << 10;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let mut daemons = daemons();
    let address = serve(&mut daemons, "zdb", &["--connections", "1100"]);
    let pid = daemons.pid("zdb");
    let mut other = tcp(&address);
    exchange(&mut other, &[&[b"PING"]], "+PONG\r\n");
    let before = resident_kib(pid);

    let part = vec![b'v'; 1 << 20];
    let argument = [&b"$8000\r\n"[..], &part[..8000], b"\r\n"].concat();
    let many = argument.repeat(120);
    let mut slow = Vec::new();
    for number in 0..CONNECTIONS {
        let mut stream = tcp(&address);
        let (begun, more): (&[u8], usize) = match number % 4 {
            0 => (b"*3\r\n$3\r\nSET\r\n$2", 0),
            // Small enough to need no room of its own.
            1 => (b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$16000\r\n", 15_900),
            2 => (b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$8388608\r\n", part.len()),
            // Many arguments, each of them small.
            _ => (b"*1000\r\n", many.len()),
        };
        stream.write_all(begun).unwrap();
        // The server does not take all of it; what it took already is what counts.
        stream.set_nonblocking(true).unwrap();
        let bytes = if number % 4 == 3 { &many } else { &part };
        let _ = stream.write(&bytes[..more]);
        slow.push(stream);
    }
    // Until the server has taken all it is going to take.
    let mut last = 0;
    let mut same = 0;
    let after = wait_for("memory to settle", || {
        let now = resident_kib(pid);
        same = if now == last { same + 1 } else { 0 };
        last = now;
        if same >= 5 {
            Ok(now)
        } else {
            Err(format!("{now} KiB"))
        }
    });
    let cost = after.saturating_sub(before);
    eprintln!("{CONNECTIONS} slow connections: {before} KiB before, {after} KiB after, {cost} KiB");
    assert!(cost <= COST_KIB_MAX, "{cost} KiB");
    exchange(
        &mut other,
        &[&[b"SET", b"key", &part[..4096]], &[b"LENGTH", b"key"]],
        "$3\r\nkey\r\n:4096\r\n",
    );
    drop(slow);
}
