//! Whole sessions: without an admin password, with one, in sequential mode; what one connection sees of another.

use super::wire::{Raw, plain, proof, start};
use qsfs_zdb::client::Password;
use qsfs_zdb::engine::Mode;
use qsfs_zdb::server::{Admin, RunningMode, ServerConfig};
use std::time::Duration;

const NO_NONCE: &str = "-No CHALLENGE requested, secure authentication not available";
const SOME_PROOF: &str = "AUTH SECURE {0*40}";

fn with_admin() -> ServerConfig {
    ServerConfig {
        admin: Admin::Password(Password::new("boss")),
        ..ServerConfig::default()
    }
}

/// A nonce, asked for.
fn challenge(raw: &mut Raw) -> String {
    let answer = raw.say("AUTH SECURE CHALLENGE");
    let nonce = answer.strip_prefix('+').unwrap().to_owned();
    assert!(nonce.len() == 16 && nonce.chars().all(|digit| digit.is_ascii_hexdigit()));
    nonce
}

#[test]
fn without_an_admin_password_everyone_is_admin() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let disabled = "-Authentication disabled";
    raw.table(&[
        ("AUTH", "-Unexpected arguments"),
        ("AUTH a b c", "-Unexpected arguments"),
        ("AUTH x", disabled),
        ("AUTH \"\"", disabled),
        ("AUTH {x*129}", disabled),
        (SOME_PROOF, disabled),
        ("AUTH OTHER x", "-Only SECURE extra method supported"),
        ("AUTH SECURE \"\"", "-Invalid argument"),
        ("NSNEW mine", "+OK"),
        ("NSSET mine password secret", "+OK"),
        ("NSSET mine public 0", "+OK"),
        // An admin does not get around a namespace's password.
        ("SELECT mine", "-Namespace protected and private"),
        ("SELECT mine secret", "+OK"),
        ("SET k v 12", "\"k\""),
        ("KEYTIME k", ":12"),
        ("SELECT default", "+OK"),
        ("NSDEL mine", "+OK"),
    ]);
    // A nonce is for SELECT too, so it is given without an admin password.
    challenge(&mut raw);
}

#[test]
fn with_an_admin_password_only_who_knows_it_is_admin() {
    let running = start(with_admin());
    let mut raw = Raw::connect(&running);
    let denied = "-Permission denied";
    let for_admins = [
        "NSNEW x",
        "NSNEW",
        "NSDEL x",
        "NSSET x worm 1",
        "SET k v 1",
        "DEL k 1",
        "NSJUMP",
        "RELOAD x",
        "INDEX DIRTY",
        "DATA RAW 1 28",
        "HOOKS",
        "MIRROR",
        "MASTER",
    ];
    for command in for_admins {
        assert_eq!(raw.say(command), denied, "{command}");
    }
    raw.table(&[
        ("SET k v", "\"k\""),
        ("GET k", "\"v\""),
        ("NSLIST", "[\"default\"]"),
        ("AUTH", "-Unexpected arguments"),
        ("AUTH a b c", "-Unexpected arguments"),
        ("AUTH \"\"", "-Invalid argument"),
        ("AUTH {x*129}", "-Password too long"),
        ("AUTH wrong", "-Access denied"),
        ("AUTH bos", "-Access denied"),
        ("AUTH bossy", "-Access denied"),
        ("AUTH OTHER b", "-Only SECURE extra method supported"),
        ("NSNEW x", denied),
        ("AUTH boss", "+OK"),
        ("NSNEW x", "+OK"),
        ("SET k w 1", "\"k\""),
    ]);
    assert!(raw.say("NSINFO x").contains("data_path: "));
    let mut stranger = Raw::connect(&running);
    assert_eq!(stranger.say("NSDEL x"), denied);
    assert!(!stranger.say("NSINFO x").contains("data_path: "));
    assert!(stranger.say("INFO").contains("commands_unauthorized: "));
}

/// A nonce that was used stays usable in the original, so that who listens can log in.
#[test]
fn a_nonce_is_used_once() {
    let running = start(with_admin());
    let mut raw = Raw::connect(&running);
    raw.table(&[(SOME_PROOF, NO_NONCE)]);
    let nonce = challenge(&mut raw);
    assert_eq!(raw.say("AUTH SECURE short"), "-Invalid hash length");
    let auth = format!("AUTH secure {}", proof(&nonce, "boss"));
    raw.table(&[
        (&auth, "+OK"),
        (&auth, NO_NONCE),
        ("NSNEW x", "+OK"),
        ("NSSET x password secret", "+OK"),
        ("NSSET x public 0", "+OK"),
    ]);
    // A wrong proof uses it up as well, and a new one replaces it.
    let old = challenge(&mut raw);
    let nonce = challenge(&mut raw);
    assert_ne!(old, nonce);
    raw.table(&[
        (
            &format!("SELECT x SECURE {}", proof(&old, "secret")),
            "-Access denied",
        ),
        (
            &format!("SELECT x SECURE {}", proof(&nonce, "secret")),
            NO_NONCE,
        ),
    ]);
    let nonce = challenge(&mut raw);
    assert_eq!(raw.say("SELECT x SECURE short"), "-Invalid hash length");
    let select = format!("SELECT x SECURE {}", proof(&nonce, "secret"));
    raw.table(&[
        (&select, "+OK"),
        ("SET k v", "\"k\""),
        (&select, NO_NONCE),
        // It failed: the namespace is the one that was selected.
        ("GET k", "\"v\""),
    ]);
    // Nonces belong to their connection.
    let nonce = challenge(&mut raw);
    let mut other = Raw::connect(&running);
    assert_eq!(
        other.say(&format!("AUTH SECURE {}", proof(&nonce, "boss"))),
        NO_NONCE
    );
}

#[test]
fn a_protected_server_is_read_only_without_the_admin_password() {
    let running = start(ServerConfig {
        protect: true,
        ..with_admin()
    });
    let mut raw = Raw::connect(&running);
    let read_only = "-Namespace is in read-only mode";
    raw.table(&[
        ("SET k v", read_only),
        ("GET k", "nil"),
        ("SELECT default", "+OK"),
        ("SET k v", read_only),
        ("SELECT default wrong", "-Access denied"),
        ("SELECT default boss", "+OK"),
        ("SET k v", "\"k\""),
        ("SELECT default", "+OK"),
        ("DEL k", read_only),
        ("GET k", "\"v\""),
    ]);
    assert!(raw.say("NSINFO default").contains("password: yes"));
    assert_eq!(Raw::connect(&running).say("SET k w"), read_only);
}

#[test]
fn sequential_mode_gives_the_keys() {
    let running = start(ServerConfig {
        mode: RunningMode::Only(Mode::Sequential),
        ..ServerConfig::default()
    });
    let mut raw = Raw::connect(&running);
    let zero = r#""\x00\x00\x00\x00\x00\x00\x00\x00""#;
    let one = r#""\x01\x00\x00\x00\x00\x00\x00\x00""#;
    let three = r#""\x03\x00\x00\x00\x00\x00\x00\x00""#;
    let update_only = "-Invalid key, only update authorized";
    raw.table(&[
        ("SET \"\" world", zero),
        ("SET \"\" one", one),
        // An update takes a slot of the index as well.
        ("SET {0000000000000000} worldnew", zero),
        ("SET {0000000000000000} worldnew", "nil"),
        ("SET \"\" three", three),
        ("GET {0000000000000000}", "\"worldnew\""),
        ("GET {0300000000000000}", "\"three\""),
        ("SET {0200000000000000} x", update_only),
        ("SET {0900000000000000} x", update_only),
        ("SET short x", update_only),
        ("SET {00000000} x", update_only),
        ("GET {00000000}", "nil"),
        ("EXISTS {0100000000000000}", ":1"),
        ("LENGTH {0100000000000000}", ":3"),
        ("CHECK {0100000000000000}", ":1"),
        ("DEL {0000000000000000}", "+OK"),
        ("DEL {0000000000000000}", "-Key not found"),
        ("SET {0000000000000000} x", update_only),
        (
            "KSCAN a",
            "-Index running mode doesn't support this feature",
        ),
        ("DBSIZE", ":2"),
    ]);
    // In the order of ids, also after an update.
    raw.table(&[("SET {0100000000000000} again", one)]);
    let scan = raw.say("SCAN");
    let place = |id: &str| scan.find(&format!("[{id} :")).unwrap();
    assert!(place(one) < place(three), "{scan}");
    assert!(
        raw.say("NSINFO default")
            .contains("next_internal_id: 0x500000000000000")
    );
}

#[test]
fn a_pipeline_is_answered_in_order_and_reads_its_own_writes() {
    let running = plain();
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
fn wait_arguments() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("WAIT", "-Invalid arguments"),
        ("WAIT SET 100 x", "-Invalid arguments"),
        ("WAIT nonexisting", "-Unknown command to watch"),
        ("WAIT SE", "-Unknown command to watch"),
        ("WAIT SET 99", "-Invalid timeout"),
        ("WAIT SET 1800001", "-Invalid timeout"),
        ("WAIT SET soon", "-Invalid timeout"),
        ("WAIT set 100", "-Timeout"),
        ("WAIT * 100", "-Timeout"),
        ("PING", "+PONG"),
    ]);
}

#[test]
fn wait_sees_what_another_client_does() {
    let running = plain();
    let mut other = Raw::connect(&running);
    for (watched, command, wanted) in [
        ("SET", "SET k {n}", "+SET"),
        ("*", "GET k", "+GET"),
        // Also what fails.
        ("DEL", "DEL nope", "+DEL"),
        ("ping", "PING", "+PING"),
    ] {
        let mut waiter = Raw::connect(&running);
        waiter.say("PING");
        waiter.send(&[b"WAIT", watched.as_bytes(), b"20000"]);
        let done = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| waiter.answer());
            // WAIT may begin after a command: go on until it has seen one.
            let mut number = 0;
            while !waiting.is_finished() {
                number += 1;
                other.say(&command.replace("{n}", &number.to_string()));
            }
            waiting.join().unwrap()
        });
        assert_eq!(done, wanted);
    }
}

#[test]
fn wait_does_not_see_other_namespaces_or_itself() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let mut other = Raw::connect(&running);
    assert_eq!(raw.say("NSNEW elsewhere"), "+OK");
    assert_eq!(other.say("SELECT elsewhere"), "+OK");
    raw.send(&[b"WAIT", b"SET", b"400"]);
    let answer = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| raw.answer());
        let mut number = 0;
        while !waiting.is_finished() {
            number += 1;
            other.say(&format!("SET k {number}"));
        }
        waiting.join().unwrap()
    });
    assert_eq!(answer, "-Timeout");
}

#[test]
fn stop_ends_a_server_that_allows_it_for_admins() {
    let mut running = start(ServerConfig {
        allow_stop: true,
        ..with_admin()
    });
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("STOP", "-Permission denied"),
        ("AUTH boss", "+OK"),
        ("STOP", "+Stopping"),
    ]);
    assert_eq!(raw.answer(), "closed");
    let serving = running.serving.take().unwrap();
    let ended = running
        .runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(20), serving).await });
    ended.unwrap().unwrap().unwrap();
}

/// What was asked before the end is answered; a connection that asks nothing does not hold it up.
#[test]
fn a_server_that_ends_answers_what_it_was_asked() {
    let mut running = plain();
    let idle = Raw::connect(&running);
    let mut raw = Raw::connect(&running);
    let value = vec![b'v'; 1 << 20];
    for number in 0..20 {
        raw.send(&[b"SET", format!("k{number}").as_bytes(), &value]);
    }
    // The first answer shows that the others are on their way.
    assert_eq!(raw.answer(), "\"k0\"");
    running.stop.cancel();
    let mut answered = 1;
    loop {
        match raw.answer().as_str() {
            "closed" | "reset" => break,
            answer => assert_eq!(answer, format!("\"k{answered}\"")),
        }
        answered += 1;
    }
    let serving = running.serving.take().unwrap();
    running.runtime.block_on(serving).unwrap().unwrap();
    drop(idle);
    let namespace = running.engine.namespace("default").unwrap();
    assert!(namespace.usage().unwrap().keys >= answered);
}
