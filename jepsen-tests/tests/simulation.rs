#![expect(clippy::unwrap_used, reason = "tests")]
//! Seeds of the simulation: fixed ones, fresh ones, and the broken variants that the checkers must catch. Every seed runs in a process of
//! its own; a failing one is printed with the command that replays it.

use qsfs_jepsen_tests::sim::broken::Variant;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Seeds of every run, the ones that once found something among them.
const FIXED: [u64; 22] = [
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
    12,
    21,
    37,
    107,
    115,
    134,
    148,
    160,
    795_591_327_035,
    795_613_337_051,
    795_634_743_069,
];
/// Fresh seeds are begun for so long, unless `QSFS_SIM_SECONDS` says otherwise.
const FRESH: Duration = Duration::from_secs(20);
/// A broken variant must be caught by one of so many seeds.
const SEEDS_FOR_VARIANT: u64 = 8;
/// Processes at once.
const PROCESSES: usize = 2;

struct Ended {
    clean: bool,
    output: String,
}

fn sim(arguments: &[&str]) -> Ended {
    let output = Command::new(env!("CARGO_BIN_EXE_qsfs-sim"))
        .args(arguments)
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    Ended {
        clean: output.status.success(),
        output: String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr),
    }
}

/// Hands out what `next` gives to a few threads until it gives nothing more.
fn in_parallel<T: Send>(next: impl FnMut() -> Option<T> + Send, work: impl Fn(T) + Sync) {
    let next = Mutex::new(next);
    std::thread::scope(|scope| {
        for _ in 0..PROCESSES {
            scope.spawn(|| {
                loop {
                    let item = (next.lock().unwrap())();
                    match item {
                        Some(item) => work(item),
                        None => return,
                    }
                }
            });
        }
    });
}

fn run_seeds(next: impl FnMut() -> Option<u64> + Send) -> usize {
    let (failed, ran) = (Mutex::new(Vec::new()), Mutex::new(0));
    in_parallel(next, |seed| {
        let ended = sim(&[&seed.to_string()]);
        *ran.lock().unwrap() += 1;
        if !ended.clean {
            println!("{}\nreplay it with: just sim {seed}", ended.output);
            failed.lock().unwrap().push(seed);
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(
        failed.is_empty(),
        "failing seeds: {failed:?}; replay one with: just sim {}",
        failed[0]
    );
    ran.into_inner().unwrap()
}

#[test]
fn fixed_seeds_hold_what_metad_promises() {
    let mut seeds = FIXED.into_iter();
    run_seeds(move || seeds.next());
}

#[test]
fn fresh_seeds_hold_what_metad_promises() {
    let told = std::env::var("QSFS_SIM_SECONDS").ok();
    let span = told.map_or(FRESH, |text| Duration::from_secs(text.parse().unwrap()));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut seed = now.as_secs() % 1_000_000_000 * 1_000;
    let began = Instant::now();
    let ran = run_seeds(move || {
        seed += 1;
        (began.elapsed() < span).then_some(seed)
    });
    println!("{ran} fresh seeds");
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let mut traces = Vec::new();
    for seed in ["11", "21"] {
        let trace = || {
            let ended = sim(&[seed]);
            let words: Vec<_> = ended.output.split_whitespace().map(str::to_owned).collect();
            let at = words.iter().position(|word| word == "trace").unwrap();
            (words[at + 1].clone(), words[at + 2].clone())
        };
        let first = trace();
        assert_eq!(first, trace(), "seed {seed}");
        traces.push(first);
    }
    assert_ne!(traces[0], traces[1], "another seed is another run");
}

#[test]
fn every_broken_variant_is_caught() {
    let missed = Mutex::new(Vec::new());
    let mut variants = Variant::ALL.iter();
    in_parallel(
        move || variants.next(),
        |variant| {
            for seed in 1..=SEEDS_FOR_VARIANT {
                let ended = sim(&[&seed.to_string(), "--broken", variant.name()]);
                let caught = ended
                    .output
                    .lines()
                    .find(|line| line.starts_with("VIOLATION"));
                if let Some(line) = caught {
                    let short: String = line.chars().take(150).collect();
                    println!("{}: seed {seed}: {short}", variant.name());
                    return;
                }
            }
            missed.lock().unwrap().push(variant.name());
        },
    );
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "no checker noticed: {missed:?}");
}
