//! One table per command about values and keys.

use super::wire::{Raw, fields, plain};
use bytes::Bytes;
use qsfs_zdb::client::{ClientConfig, ZdbClient};

const LONG: &str = "{k*511}";

/// What the original's suite asks of CHECK GET DEL SELECT AUTH NSINFO: an error or nil.
#[test]
fn the_basic_suite_of_the_original() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("SET deleted yep", "\"deleted\""),
        ("DEL deleted", "+OK"),
        ("SET hello world", "\"hello\""),
    ]);
    for command in ["CHECK", "GET", "DEL", "SELECT", "AUTH", "NSINFO"] {
        for arguments in [
            " non-existing",
            " deleted",
            " hello world",
            "",
            &format!(" {LONG}"),
            " \"\"",
        ] {
            let answer = raw.say(&format!("{command}{arguments}"));
            assert!(
                answer == "nil" || answer.starts_with('-'),
                "{command}{arguments}: {answer}"
            );
        }
    }
    assert_eq!(raw.say("GET hello"), "\"world\"");
}

#[test]
fn ping_time_and_names() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("PING", "+PONG"),
        ("ping", "+PONG"),
        ("PiNg", "+PONG"),
        ("PING extra arguments", "+PONG"),
        ("PIN", "-Command not supported"),
        ("P", "-Command not supported"),
        ("S", "-Command not supported"),
        ("G", "-Command not supported"),
        ("\"\"", "-Command not supported"),
        ("BIPBIPBIP", "-Command not supported"),
        ("*", "-This is not a valid command"),
    ]);
    let time = raw.say("TIME");
    let parts: Vec<u64> = time
        .trim_matches(['[', ']'])
        .split(' ')
        .map(|part| part.trim_matches('"').parse().unwrap())
        .collect();
    assert!(parts.len() == 2 && parts[0] > 1_700_000_000 && parts[1] < 1_000_000);
}

#[test]
fn set() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("SET", "-Unexpected arguments"),
        ("SET a", "-Unexpected arguments"),
        ("SET a b 1 2", "-Unexpected arguments"),
        ("SET \"\" x", "-Invalid argument, key needed"),
        ("SET {k*256} x", "-Key too large"),
        ("SET a 1", "\"a\""),
        ("SET a 1", "nil"),
        ("SETX a 1", "nil"),
        ("SET a 2", "\"a\""),
        ("SETX b 3", "\"b\""),
        ("SET c \"\"", "\"c\""),
        ("SET c \"\"", "nil"),
        ("GET c", "\"\""),
        ("SET {00ff0d0a} {0d0a00}", "\"\\x00\\xff\\r\\n\""),
        ("GET {00ff0d0a}", "\"\\r\\n\\x00\""),
        ("SET d 4 123", "\"d\""),
        ("KEYTIME d", ":123"),
        // The original takes what is no number as 0.
        ("SET d 5 now", "-Invalid timestamp"),
        ("SET d 5 12x", "-Invalid timestamp"),
        ("SET d 5 -1", "-Invalid timestamp"),
        ("SET d 5 \"\"", "-Invalid timestamp"),
        ("SET d 5 99999999999", "-Invalid timestamp"),
        ("GET d", "\"4\""),
    ]);
    assert_eq!(raw.say("SET {k*255} x").len(), 257);
    // An update after a deletion of the same value is an update.
    raw.table(&[("DEL a", "+OK"), ("SET a 2", "\"a\""), ("GET a", "\"2\"")]);
}

#[test]
fn get_and_mget() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("SET a 1", "\"a\""),
        ("SET b 2", "\"b\""),
        ("GET", "-Unexpected arguments"),
        ("GET a b", "-Unexpected arguments"),
        ("GET \"\"", "-Invalid argument"),
        ("GET {k*256}", "-Invalid key"),
        ("GET {k*255}", "nil"),
        ("GET nope", "nil"),
        ("GET a", "\"1\""),
        ("MGET", "-Invalid arguments"),
        ("MGET a", "[\"1\"]"),
        ("MGET a nope b a", "[\"1\" nil \"2\" \"1\"]"),
        ("MGET a {k*256}", "-Invalid key"),
        ("MGET a \"\" b", "[\"1\" nil \"2\"]"),
    ]);
    let mut all: Vec<&[u8]> = vec![b"MGET"];
    all.resize(1024, b"a");
    let answer = raw.ask(&all);
    assert_eq!(answer.matches("\"1\"").count(), 1023);
}

#[test]
fn mget_of_more_than_a_connection_may_hold_comes_in_pieces() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let value = vec![b'v'; 8 << 20];
    raw.ask(&[b"SET", b"large", &value]);
    let keys: Vec<&[u8]> = std::iter::once(&b"MGET"[..])
        .chain([&b"large"[..]; 5])
        .collect();
    raw.send(&keys);
    let answer = raw.answer();
    assert_eq!(answer.len(), 5 * ((8 << 20) + 2) + 4 + 2);
}

#[test]
fn del_exists_check_length_keytime() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[("SET a 123 77", "\"a\""), ("SET b 4", "\"b\"")]);
    for command in ["DEL", "EXISTS", "CHECK", "LENGTH", "KEYTIME", "KEYCUR"] {
        for (arguments, wanted) in [
            ("", "-Unexpected arguments"),
            (" \"\"", "-Invalid argument"),
            (" {k*256}", "-Invalid key"),
        ] {
            assert_eq!(
                raw.say(&format!("{command}{arguments}")),
                wanted,
                "{command}{arguments}"
            );
        }
    }
    for command in ["EXISTS", "CHECK", "LENGTH", "KEYTIME", "KEYCUR"] {
        assert_eq!(
            raw.say(&format!("{command} a b")),
            "-Unexpected arguments",
            "{command}"
        );
    }
    raw.table(&[
        ("EXISTS a", ":1"),
        ("EXISTS nope", ":0"),
        ("CHECK a", ":1"),
        ("CHECK nope", "nil"),
        ("LENGTH a", ":3"),
        ("LENGTH nope", "nil"),
        ("KEYTIME a", ":77"),
        ("KEYTIME nope", "nil"),
        ("DEL a 1 2", "-Unexpected arguments"),
        ("DEL a now", "-Invalid timestamp"),
        ("EXISTS a", ":1"),
        ("DEL nope", "-Key not found"),
        ("DEL a", "+OK"),
        ("DEL a", "-Key not found"),
        ("DEL b 99", "+OK"),
        ("EXISTS a", ":0"),
        ("CHECK a", "nil"),
        ("LENGTH a", "nil"),
        ("KEYTIME a", "nil"),
        ("KEYCUR a", "-Key not found"),
        ("DBSIZE", ":0"),
    ]);
}

/// GET and CHECK of rotten data, which the original hands out.
#[test]
fn corrupt_data_is_an_error_and_never_an_answer() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let value = vec![b'v'; 1 << 20];
    raw.ask(&[b"SET", b"rotten", &value]);
    raw.ask(&[b"SET", b"sound", b"x"]);
    let datafile = std::fs::read_dir(running.dir.path().join("default"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|end| end == "zdb"))
        .unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(datafile)
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"rot", 100_000).unwrap();
    raw.table(&[
        ("GET rotten", "-Internal Error"),
        ("CHECK rotten", ":0"),
        ("MGET sound rotten sound", "[\"x\" -Internal Error \"x\"]"),
        ("CHECK sound", ":1"),
        ("SET rotten new", "\"rotten\""),
        ("GET rotten", "\"new\""),
    ]);
    assert_eq!(
        super::wire::field(&raw.say("NSINFO default"), "stats_data_faults"),
        "0"
    );
}

#[test]
fn payloads_of_all_sizes_round_trip() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    for bytes in [
        512,
        1 << 10,
        4 << 10,
        8164,
        8178,
        64 << 10,
        512 << 10,
        1 << 20,
        2 << 20,
        4 << 20,
        8 << 20,
    ] {
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
    let running = plain();
    let mut raw = Raw::connect(&running);
    assert_eq!(raw.say("SCAN"), "-No more data");
    assert_eq!(raw.say("RSCAN"), "-No more data");
    for number in 0..2500 {
        let key = format!("k{number}");
        raw.send(&[b"SET", key.as_bytes(), b"value"]);
    }
    for _ in 0..2500 {
        raw.answer();
    }
    raw.table(&[
        ("SET k0 again", "\"k0\""),
        ("DEL k7", "+OK"),
        ("SCAN 123", "-Invalid key format"),
        ("SCAN 0", "-Invalid key format"),
        ("SCAN \"\"", "-Invalid key format"),
        ("RSCAN {k*17}", "-Invalid key format"),
    ]);
    let keys = running.runtime.block_on(async {
        let config = ClientConfig::new(running.address.to_string(), "default");
        let client = ZdbClient::new(config);
        let mut cursor: Option<Bytes> = None;
        let mut keys = Vec::new();
        while let Some(page) = client.scan(cursor.as_deref()).await.unwrap() {
            assert_eq!(page.cursor.len(), 17);
            keys.extend(page.entries.into_iter().map(|entry| entry.key));
            cursor = Some(page.cursor);
        }
        keys
    });
    assert_eq!(keys.len(), 2499);
    assert_eq!((&keys[0][..], &keys[2498][..]), (&b"k1"[..], &b"k0"[..]));
    assert!(raw.say("RSCAN").contains("[[\"k0\" :5 :"));
    // A cursor from KEYCUR is the key's own place: SCAN goes on behind it, RSCAN before it.
    let cursor = unescaped(&raw.say("KEYCUR k2498"));
    assert!(raw.ask(&[b"SCAN", &cursor]).contains("[[\"k2499\" :5 :"));
    assert!(raw.ask(&[b"SCANX", &cursor]).contains("[[\"k2499\" :5 :"));
    assert!(raw.ask(&[b"RSCAN", &cursor]).contains("[[\"k2497\" :5 :"));
    let last = unescaped(&raw.say("KEYCUR k0"));
    assert_eq!(raw.ask(&[b"SCAN", &last]), "-No more data");
}

/// The bytes of a bulk answer.
fn unescaped(answer: &str) -> Vec<u8> {
    let text = answer
        .trim_start_matches('"')
        .strip_suffix('"')
        .unwrap()
        .as_bytes();
    let mut bytes = Vec::new();
    let mut at = 0;
    while at < text.len() {
        if text[at] != b'\\' {
            bytes.push(text[at]);
            at += 1;
            continue;
        }
        let (byte, length) = match text[at + 1] {
            b'x' => {
                let hex = std::str::from_utf8(&text[at + 2..at + 4]).unwrap();
                (u8::from_str_radix(hex, 16).unwrap(), 4)
            }
            b'n' => (b'\n', 2),
            b'r' => (b'\r', 2),
            b't' => (b'\t', 2),
            other => (other, 2),
        };
        bytes.push(byte);
        at += length;
    }
    bytes
}

#[test]
fn kscan_finds_all_keys_with_a_prefix() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    for number in 0..3000 {
        raw.send(&[b"SET", format!("many-{number}").as_bytes(), b"v"]);
    }
    for _ in 0..3000 {
        raw.answer();
    }
    raw.table(&[
        ("SET one v", "\"one\""),
        ("KSCAN one", "[\"0\" [\"one\"]]"),
        ("KSCAN zz", "-No keys match"),
        ("KSCAN", "-Unexpected arguments"),
        ("KSCAN \"\"", "-Invalid argument"),
    ]);
    assert_eq!(raw.say("KSCAN many-").matches("many-").count(), 3000);
}

#[test]
fn info_has_the_fields_of_the_original_in_order() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[("SET a 1", "\"a\""), ("NOPE", "-Command not supported")]);
    let info = raw.say("INFO");
    let wanted = "server_name server_revision engine_revision instance_id boot_time uptime clients_lifetime sequential_key_size \
        commands_executed commands_failed commands_unauthorized index_disk_read_failed index_disk_write_failed \
        data_disk_read_failed data_disk_write_failed index_disk_read_bytes index_disk_read_mb index_disk_write_bytes \
        index_disk_write_mb data_disk_read_bytes data_disk_read_mb data_disk_write_bytes data_disk_write_mb network_rx_bytes \
        network_rx_mb network_tx_bytes network_tx_mb";
    assert_eq!(fields(&info).join(" "), wanted);
    for (name, value) in [
        ("sequential_key_size", "8"),
        ("commands_executed", "2"),
        ("commands_failed", "1"),
        ("clients_lifetime", "1"),
        ("data_disk_write_bytes", "1"),
    ] {
        assert_eq!(super::wire::field(&info, name), value, "{name}");
    }
    for section in ["# server", "# clients", "# internals", "# stats"] {
        assert!(info.contains(section));
    }
}

#[test]
fn what_this_server_does_not_do_says_so() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("STOP", "-Unauthorized"),
        ("MIRROR", "-Mirroring is not supported"),
        ("MASTER", "-Mirroring is not supported"),
        ("HOOKS", "[]"),
    ]);
}
