//! One table per command about namespaces, and every property.

use super::wire::{Raw, field, fields, plain, start};
use qsfs_zdb::engine::Mode;
use qsfs_zdb::server::{RunningMode, ServerConfig};

const FROZEN: &str = "-Namespace is temporarily frozen (read-write disabled)";
const LOCKED: &str = "-Namespace is temporarily locked (read-only)";

#[test]
fn nsnew_nsdel_nslist() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("NSNEW", "-Unexpected arguments"),
        ("NSNEW a b", "-Unexpected arguments"),
        ("NSNEW \"\"", "-Invalid argument"),
        ("NSNEW default", "-This name is not allowed"),
        ("NSNEW a/b", "-This name is not allowed"),
        ("NSNEW ../../hello", "-This name is not allowed"),
        ("NSNEW .", "-This name is not allowed"),
        ("NSNEW ..", "-This name is not allowed"),
        ("NSNEW {fffe}", "-This name is not allowed"),
        ("NSNEW {x*129}", "-Namespace too long"),
        ("NSNEW {x*128}", "+OK"),
        ("NSDEL {x*128}", "+OK"),
        ("NSNEW one", "+OK"),
        ("NSNEW one", "-This namespace is not available"),
        ("NSNEW zwei-äöü", "+OK"),
        ("NSDEL", "-Unexpected arguments"),
        ("NSDEL one two", "-Unexpected arguments"),
        ("NSDEL \"\"", "-Invalid argument"),
        ("NSDEL {x*200}", "-Namespace too long"),
        ("NSDEL default", "-Cannot remove default namespace"),
        ("NSDEL nope", "-This namespace doesn't exists"),
        ("NSDEL {fffe}", "-This namespace doesn't exists"),
        ("NSDEL zwei-äöü", "+OK"),
        ("SELECT one", "+OK"),
        (
            "NSDEL one",
            "-Cannot remove namespace you're currently using.",
        ),
    ]);
    assert_eq!(raw.ask(&[b"NSNEW", b"with spaces"]), "+OK");
    assert_eq!(raw.say("NSLIST"), "[\"default\" \"one\" \"with spaces\"]");
    let mut other = Raw::connect(&running);
    assert_eq!(other.say("NSDEL one"), "+OK");
    assert_eq!(
        raw.say("GET k"),
        "-Your active namespace is not available anymore (probably removed)."
    );
    assert_eq!(raw.answer(), "closed");
}

/// A namespace is made, filled, deleted and made again: the second one is empty.
#[test]
fn a_namespace_made_again_is_empty() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("NSNEW again", "+OK"),
        ("SELECT again", "+OK"),
        ("SET mykey helloworld", "\"mykey\""),
        ("SELECT default", "+OK"),
        ("NSDEL again", "+OK"),
        ("NSNEW again", "+OK"),
        ("SELECT again", "+OK"),
        ("GET mykey", "nil"),
        ("DBSIZE", ":0"),
    ]);
}

/// In the original every namespace takes a whole datafile of the disk from the beginning.
#[test]
fn an_empty_namespace_takes_little_of_the_disk() {
    use std::os::unix::fs::MetadataExt;
    const BYTES_MAX: u64 = 1 << 20;
    let running = plain();
    let mut raw = Raw::connect(&running);
    assert_eq!(raw.say("NSNEW empty"), "+OK");
    let files = std::fs::read_dir(running.dir.path().join("empty")).unwrap();
    let bytes: u64 = files
        .map(|file| file.unwrap().metadata().unwrap().blocks() * 512)
        .sum();
    assert!(bytes > 0 && bytes <= BYTES_MAX, "{bytes} bytes");
}

#[test]
fn select() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("NSNEW open", "+OK"),
        ("NSNEW closed", "+OK"),
        ("NSSET closed password secret", "+OK"),
        ("SELECT", "-Invalid argument"),
        ("SELECT \"\"", "-Invalid argument"),
        ("SELECT {x*129}", "-Namespace too long"),
        ("SELECT nope", "-Namespace not found"),
        ("SELECT {fffe}", "-Namespace not found"),
        // Without a password what follows is not looked at.
        ("SELECT open any thing at all", "+OK"),
        ("SET k v", "\"k\""),
        // Public: readable without the password.
        ("SELECT closed", "+OK"),
        ("SET k v", "-Namespace is in read-only mode"),
        ("DEL k", "-Namespace is in read-only mode"),
        ("GET k", "nil"),
        ("SELECT closed secret", "+OK"),
        ("SET k v", "\"k\""),
        ("NSSET closed public 0", "+OK"),
        ("SELECT closed", "-Namespace protected and private"),
        ("SELECT closed blabla", "-Access denied"),
        ("SELECT closed secre", "-Access denied"),
        ("SELECT closed secretsecret", "-Access denied"),
        ("SELECT closed \"\"", "-Access denied"),
        ("SELECT closed {x*256}", "-Password too long"),
        ("SELECT closed {x*255}", "-Access denied"),
        (
            "SELECT closed OTHER x",
            "-Only SECURE extra method supported",
        ),
        (
            "SELECT closed SECURE x",
            "-No CHALLENGE requested, secure authentication not available",
        ),
        ("SELECT closed SECURE x y", "-Too many arguments"),
        // A SELECT that failed leaves everything as it was.
        ("GET k", "\"v\""),
        ("SET k w", "\"k\""),
        ("NSSET closed password *", "+OK"),
        ("SELECT closed", "+OK"),
        ("SET k x", "\"k\""),
    ]);
}

#[test]
fn nsset_arguments() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("NSNEW one", "+OK"),
        ("NSSET", "-Unexpected arguments"),
        ("NSSET one", "-Unexpected arguments"),
        ("NSSET one worm", "-Unexpected arguments"),
        ("NSSET one worm 1 2", "-Unexpected arguments"),
        ("NSSET \"\" worm 1", "-Invalid argument"),
        ("NSSET one \"\" 1", "-Invalid argument"),
        ("NSSET one worm \"\"", "-Invalid argument"),
        ("NSSET one password {fffe}", "-Invalid argument"),
        ("NSSET {x*129} worm 1", "-Namespace too long"),
        ("NSSET one worm {1*64}", "-Argument too long"),
        ("NSSET one {x*300} 1", "-Argument too long"),
        ("NSSET one maxsize {4*63}", "+OK"),
        ("NSSET nope worm 1", "-Namespace not found"),
        ("NSSET one blabla 1", "-Invalid property"),
        ("NSSET one Worm 1", "-Invalid property"),
        ("NSSET default worm 1", "-Cannot update default namespace"),
        ("NSSET default public 0", "-Cannot update default namespace"),
        (
            "NSSET default maxsize 42",
            "-Cannot update default namespace",
        ),
        (
            "NSSET default password x",
            "-Cannot update default namespace",
        ),
        ("NSSET default blabla x", "-Cannot update default namespace"),
        ("NSSET default lock 1", "+OK"),
        ("SET a b", LOCKED),
        ("NSSET default lock 0", "+OK"),
        ("NSSET default freeze 1", "+OK"),
        ("GET a", FROZEN),
        ("NSSET default freeze 0", "+OK"),
        ("SET a b", "\"a\""),
    ]);
}

#[test]
fn maxsize_counts_live_payload() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let full = "-No space left on this namespace";
    raw.table(&[
        ("NSNEW small", "+OK"),
        ("NSSET small maxsize 16", "+OK"),
        ("SELECT small", "+OK"),
        ("SET key1 0123456789", "\"key1\""),
        ("SET key2 abcde", "\"key2\""),
        ("SET key3 +", "\"key3\""),
        ("SET key4 X", full),
        ("SET key3 -", "\"key3\""),
        ("SET key1 12345", "\"key1\""),
        ("SET key5 67890X", full),
        ("SET key5 67890", "\"key5\""),
        ("DEL key2", "+OK"),
        ("SET key6 vwxyz", "\"key6\""),
        ("SET key7 v", full),
        // As atoll: what is no number is 0, which is unlimited.
        ("NSSET small maxsize abc", "+OK"),
        ("SET key7 v", "\"key7\""),
        ("NSSET small maxsize 1M", "+OK"),
        ("SET key8 v", full),
    ]);
    assert_eq!(field(&raw.say("NSINFO small"), "data_limits_bytes"), "1");
}

#[test]
fn worm_lock_and_freeze() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let worm = "-Namespace is protected by worm mode";
    raw.table(&[
        ("NSNEW one", "+OK"),
        ("SELECT one", "+OK"),
        ("SET k value", "\"k\""),
        ("NSSET one worm 1", "+OK"),
        ("SET k other", worm),
        ("SET k value", worm),
        ("SET new value", "\"new\""),
        (
            "DEL k",
            "-Cannot delete a key when namespace is in worm mode",
        ),
        ("GET k", "\"value\""),
        ("NSSET one worm 0", "+OK"),
        ("NSSET one lock 1", "+OK"),
        ("SET m x", LOCKED),
        ("DEL k", LOCKED),
        ("GET k", "\"value\""),
        ("NSSET one lock 0", "+OK"),
        ("NSSET one freeze 1", "+OK"),
        ("SET m x", FROZEN),
        ("DEL k", FROZEN),
        ("GET k", FROZEN),
        ("MGET k", FROZEN),
        ("EXISTS k", FROZEN),
        ("CHECK k", FROZEN),
        ("LENGTH k", FROZEN),
        ("KEYTIME k", FROZEN),
        ("SCAN", FROZEN),
        ("RSCAN", FROZEN),
        ("KSCAN k", FROZEN),
        ("KEYCUR k", FROZEN),
        ("DBSIZE", ":2"),
        ("SELECT one", "+OK"),
        ("NSSET one freeze 0", "+OK"),
        ("DEL k", "+OK"),
    ]);
}

#[test]
fn mode_can_change_until_something_was_written() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let used = "-Cannot change mode of used namespace";
    raw.table(&[
        ("NSNEW one", "+OK"),
        (
            "NSSET one mode other",
            "-Invalid property value (expected: user, seq)",
        ),
        ("NSSET one mode seq", "+OK"),
        ("NSSET one mode user", "+OK"),
        ("NSSET one mode seq", "+OK"),
        ("SELECT one", "+OK"),
        ("SET \"\" v", r#""\x00\x00\x00\x00\x00\x00\x00\x00""#),
        ("DEL {0000000000000000}", "+OK"),
        ("NSSET one mode user", used),
        ("NSSET one mode seq", used),
        ("NSSET one mode other", used),
    ]);
}

#[test]
fn a_server_of_one_mode_keeps_it() {
    let running = start(ServerConfig {
        mode: RunningMode::Only(Mode::Sequential),
        ..ServerConfig::default()
    });
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("NSNEW one", "+OK"),
        (
            "NSSET one mode user",
            "-This server instance is configured to use a single runtime mode",
        ),
        ("SELECT one", "+OK"),
    ]);
    for namespace in ["default", "one"] {
        let info = raw.say(&format!("NSINFO {namespace}"));
        assert_eq!(field(&info, "mode"), "sequential");
    }
}

#[test]
fn nsinfo_has_the_fields_of_the_original_in_order() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("NSINFO", "-Unexpected arguments"),
        ("NSINFO a b", "-Unexpected arguments"),
        ("NSINFO \"\"", "-Invalid argument"),
        ("NSINFO {x*129}", "-Namespace too long"),
        ("NSINFO nope", "-Namespace not found"),
        ("NSNEW one", "+OK"),
        ("NSSET one maxsize 4096", "+OK"),
        ("NSSET one password p", "+OK"),
        ("SELECT one p", "+OK"),
        ("SET a 1234", "\"a\""),
        ("SET b 12", "\"b\""),
    ]);
    let info = raw.say("NSINFO one");
    let wanted = "name entries public worm locked password data_size_bytes data_size_mb data_limits_bytes index_size_bytes \
        index_size_kb next_internal_id mode stats_index_io_errors stats_index_io_error_last stats_index_faults \
        stats_data_io_errors stats_data_io_error_last stats_data_faults space_available index_disk_freespace_bytes \
        index_disk_freespace_mb data_disk_freespace_bytes data_disk_freespace_mb data_path data_active index_path index_active data_current_id \
        data_current_offset";
    assert_eq!(fields(&info).join(" "), wanted);
    for (name, value) in [
        ("name", "one"),
        ("entries", "2"),
        ("public", "yes"),
        ("worm", "no"),
        ("locked", "no"),
        ("password", "yes"),
        ("data_size_bytes", "6"),
        ("data_size_mb", "0.00"),
        ("data_limits_bytes", "4096"),
        ("next_internal_id", "0x200000000000000"),
        ("mode", "userkey"),
        ("space_available", "4090"),
    ] {
        assert_eq!(field(&info, name), value, "{name}");
    }
    let unlimited = raw.say("NSINFO default");
    assert!(!fields(&unlimited).contains(&"space_available".to_owned()));
}

/// The directory that HISTORY looks into: kept where it is asked for.
#[test]
fn history_goes_back_version_by_version() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let invalid_key = "-Invalid arguments (invalid key)";
    raw.table(&[
        ("NSNEW past", "+OK"),
        ("NSSET past history 3", "+OK"),
        ("SELECT past", "+OK"),
        ("HISTORY", "-Invalid arguments"),
        ("HISTORY a b c", "-Invalid arguments"),
        ("HISTORY nope", "-Key not found"),
        ("HISTORY {k*300}", "-Key not found"),
        ("SET k one 11", "\"k\""),
        ("HISTORY k", "[nil \"11\" \"one\"]"),
        ("SET k two 12", "\"k\""),
        ("SET k three 13", "\"k\""),
        ("SET other value", "\"other\""),
        ("HISTORY k short", "-Invalid arguments"),
        ("HISTORY k {0000000000000000}", "-No more history"),
        ("HISTORY k {ffffffffffffff00}", invalid_key),
        (
            "HISTORY k {0200000000000000}",
            r#"["\x01\x00\x00\x00\x00\x00\x00\x00" "12" "two"]"#,
        ),
        ("HISTORY k {0100000000000000}", "[nil \"11\" \"one\"]"),
        ("HISTORY other {0100000000000000}", invalid_key),
        (
            "HISTORY k",
            r#"["\x02\x00\x00\x00\x00\x00\x00\x00" "13" "three"]"#,
        ),
        ("SET k four 14", "\"k\""),
        ("SET k five 15", "\"k\""),
        // Three are kept, and the chain ends there.
        ("HISTORY k {0100000000000000}", invalid_key),
        ("HISTORY k {0200000000000000}", "[nil \"12\" \"two\"]"),
        // A deletion cuts the chain.
        ("DEL k", "+OK"),
        ("HISTORY k", "-Key not found"),
        ("SET k new 16", "\"k\""),
        ("HISTORY k", "[nil \"16\" \"new\"]"),
        ("NSSET past freeze 1", "+OK"),
        ("HISTORY k", FROZEN),
    ]);
}

#[test]
fn without_history_there_is_the_current_version() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("SET k one 11", "\"k\""),
        ("SET k two 12", "\"k\""),
        ("HISTORY k", "[nil \"12\" \"two\"]"),
    ]);
}

#[test]
fn nsjump_and_reload_keep_everything() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("NSNEW one", "+OK"),
        ("SELECT one", "+OK"),
        ("SET keypresent helloworld", "\"keypresent\""),
        ("INDEX DIRTY RESET", "+OK"),
        ("INDEX DIRTY", "[]"),
        ("NSJUMP", "+OK"),
        ("SET behind v", "\"behind\""),
        ("RELOAD", "-Unexpected arguments"),
        ("RELOAD one OOPS", "-Unexpected arguments"),
        ("RELOAD \"\"", "-Invalid argument"),
        ("RELOAD {X*200}", "-Namespace too long"),
        ("RELOAD nope", "-Namespace not found"),
        ("RELOAD one", "+OK"),
        ("GET keypresent", "\"helloworld\""),
        ("GET behind", "\"v\""),
        ("DBSIZE", ":2"),
    ]);
    let info = raw.say("NSINFO one");
    let active: u32 = field(&info, "data_current_id").parse().unwrap();
    assert_eq!(raw.say("NSJUMP"), "+OK");
    let info = raw.say("NSINFO one");
    assert_eq!(field(&info, "data_current_id"), (active + 1).to_string());
}

#[test]
fn index_dirty() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("INDEX", "-Missing arguments"),
        ("INDEX \"\"", "-Invalid argument"),
        ("INDEX NOPE", "-Unknown INDEX subcommand"),
        ("INDEX {x*300}", "-Argument too long"),
        ("INDEX DIRTY NOPE", "-Unknown INDEX DIRTY subcommand"),
        ("INDEX DIRTY {x*300}", "-Argument too long"),
        ("INDEX dirty reset", "+OK"),
        ("INDEX DIRTY", "[]"),
        ("SET a b", "\"a\""),
    ]);
    let active = field(&raw.say("NSINFO default"), "data_current_id").to_owned();
    assert_eq!(raw.say("INDEX DIRTY"), format!("[:{active}]"));
}

/// Offsets are those that 0-db would have: 28 for the first entry, then 18 bytes, key and value each.
#[test]
fn data_raw_walks_through_a_datafile() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    raw.table(&[
        ("DATA", "-Missing arguments"),
        ("DATA NOPE 1 2", "-Unknown DATA subcommand"),
        ("DATA RAW 1", "-Unexpected arguments"),
        ("DATA RAW x 28", "-Invalid Request"),
        ("DATA RAW 1 x", "-Invalid Request"),
        ("SET a 123456789 7", "\"a\""),
        ("SET bb \"\" 8", "\"bb\""),
        ("DEL a 1234567890", "+OK"),
    ]);
    let file = field(&raw.say("NSINFO default"), "data_current_id").to_owned();
    let first = format!("DATA RAW {file} 28");
    let a = raw.say(&first);
    assert!(a.starts_with("[\"a\" :0 \"0x"), "{a}");
    assert!(a.ends_with("\" :0 :7 \"123456789\"]"), "{a}");
    let second = format!("DATA RAW {file} {}", 28 + 18 + 1 + 9);
    let bb = "[\"bb\" :28 \"0x00000000\" :0 :8 \"\"]";
    let third = format!("DATA RAW {file} {}", 28 + 18 + 1 + 9 + 18 + 2);
    assert_eq!(raw.say(&second), bb);
    assert_eq!(
        raw.say(&third),
        "[\"a\" :56 \"0x00000000\" :1 :1234567890 nil]"
    );
    raw.table(&[
        (&format!("DATA RAW {file} {}", 76 + 18 + 1), "-EOF"),
        // Not only in order.
        (&second, bb),
        (&format!("DATA RAW {file} 29"), "-Invalid Request"),
        (&format!("DATA RAW {file} 9999"), "-Invalid Request"),
        ("DATA RAW 999 28", "-EOF"),
    ]);
    assert_eq!(Raw::connect(&running).say(&second), bb);
}

#[test]
fn flush_really_empties() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    let denied = "-Flushing public namespace denied";
    raw.table(&[
        ("FLUSH", denied),
        ("NSNEW one", "+OK"),
        ("NSSET one password secret", "+OK"),
        ("SELECT one secret", "+OK"),
        ("FLUSH", denied),
        ("NSSET one public 0", "+OK"),
        ("SELECT one secret", "+OK"),
        ("SET a 1", "\"a\""),
        ("SET b 2", "\"b\""),
        ("NSSET one lock 1", "+OK"),
        ("FLUSH", LOCKED),
        ("NSSET one lock 0", "+OK"),
        ("NSSET one worm 1", "+OK"),
        (
            "FLUSH",
            "-Cannot delete a key when namespace is in worm mode",
        ),
        ("NSSET one worm 0", "+OK"),
        ("DBSIZE", ":2"),
        ("FLUSH", "+OK"),
        ("DBSIZE", ":0"),
        ("GET a", "nil"),
        ("SCAN", "-No more data"),
        ("SET a 1", "\"a\""),
    ]);
    assert_eq!(field(&raw.say("NSINFO one"), "data_size_bytes"), "1");
}
