//! A client that is the only one, and is answered by a thread that looks for what it asks next.

use super::wire::{Raw, framed, plain};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Far more than make a client one that is alone, and than are found by looking before the runtime has a turn.
const SETS: u64 = 400;

#[test]
fn whatever_it_asks_is_answered_in_order() {
    let running = plain();
    let mut raw = Raw::connect(&running);
    for number in 0..SETS {
        let key = format!("k{number}");
        let value = format!("{number}").repeat(1 + 20 * usize::try_from(number % 11).unwrap());
        let request = framed(&[b"SET", key.as_bytes(), value.as_bytes()]);
        let shown = (format!("\"{key}\""), format!("\"{value}\""));
        match number % 7 {
            // In two parts.
            3 => {
                let (first, rest) = request.split_at(request.len() / 2);
                raw.bytes(first);
                raw.bytes(rest);
                assert_eq!(raw.answer(), shown.0);
            }
            // More behind it.
            5 => {
                let more = [request, framed(&[b"GET", key.as_bytes()])].concat();
                raw.bytes(&more);
                assert_eq!(raw.answer(), shown.0);
                assert_eq!(raw.answer(), shown.1);
            }
            _ => {
                raw.bytes(&request);
                assert_eq!(raw.answer(), shown.0);
            }
        }
        if number % 50 == 49 {
            assert_eq!(raw.say(&format!("GET {key}")), shown.1);
            assert_eq!(raw.say("DBSIZE"), format!(":{}", number + 1));
        }
    }
    raw.bytes(b"what is this\r\n");
    assert_eq!(raw.answer(), "-Malformed request, array expected");
    assert_eq!(raw.answer(), "closed");
    let mut other = Raw::connect(&running);
    assert_eq!(other.say("DBSIZE"), format!(":{SETS}"));
}

/// It asks without end: the server must end all the same, and others must be served meanwhile.
#[test]
fn the_server_ends_and_others_are_served_although_it_asks_on_and_on() {
    let mut running = plain();
    let mut raw = Raw::connect(&running);
    let mut other = Raw::connect(&running);
    let answered = AtomicU64::new(0);
    let serving = running.serving.take().unwrap();
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            for number in 0_u64.. {
                let key = format!("k{}", number % 100);
                raw.bytes(&framed(&[b"SET", key.as_bytes(), &number.to_le_bytes()]));
                match raw.answer().as_str() {
                    "closed" | "reset" => return number,
                    answer => assert_eq!(answer, format!("\"{key}\"")),
                }
                answered.store(number + 1, Ordering::Release);
            }
            0
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        while answered.load(Ordering::Acquire) < SETS {
            assert!(Instant::now() < deadline && !asking.is_finished());
            assert_eq!(other.say("PING"), "+PONG");
        }
        running.stop.cancel();
        let ended = running
            .runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(20), serving).await });
        ended.unwrap().unwrap().unwrap();
        assert!(asking.join().unwrap() >= SETS);
    });
}
