//! The engine beside the disk it runs on, in one run:
//! `cargo run --release -p qsfs-zdb --example engine -- [speed|small|large|compact|start|start-seq] [DIR] [N]`.
//!
//! `small`: SET of 4 KiB one after the other (N, default 4000) beside the rate of fdatasync. `large`: SET of 1 MiB at several depths beside
//! the disk's sequential write rate, in turns of N MiB (default 64). `speed`: SET and GET, many under way (N large values, default 256). `compact`: what a SET waits
//! for with and without compaction (N rounds, default 20). `start`, `start-seq`: memory of N keys (default 10,000,000) and the time to
//! open them again.
#![expect(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a measuring tool"
)]

use bytes::Bytes;
use futures::stream::{StreamExt, iter};
use qsfs_zdb::engine::{Engine, EngineOptions, Mode, Namespace, NamespaceOptions};
use std::fs::File;
use std::future::Future;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SMALL: usize = 4096;
const LARGE: usize = 1 << 20;

fn value(bytes: usize, seed: usize) -> Bytes {
    let mut value = vec![0xa5; bytes];
    let seed = seed.to_le_bytes();
    let told = seed.len().min(bytes);
    value[..told].copy_from_slice(&seed[..told]);
    Bytes::from(value)
}

fn line(what: &str, count: usize, bytes: usize, took: Duration) -> f64 {
    let rate = count as f64 / took.as_secs_f64();
    let megabytes = rate * bytes as f64 / 1e6;
    println!("{what:<44} {rate:>10.0} /s {megabytes:>8.0} MB/s");
    rate
}

async fn measure<F: Future<Output = ()> + Send + 'static>(
    what: &str,
    count: usize,
    bytes: usize,
    depth: usize,
    operation: impl Fn(usize) -> F,
) -> f64 {
    let began = Instant::now();
    // Each a task of its own, as connections are.
    let tasks = (0..count).map(|number| tokio::spawn(operation(number)));
    iter(tasks)
        .buffer_unordered(depth)
        .for_each(|done| async move { done.unwrap() })
        .await;
    line(what, count, bytes, began.elapsed())
}

/// Appends of 4 KiB, each with its fdatasync: per second.
fn disk_syncs(dir: &Path) -> f64 {
    let file = File::create(dir.join("syncs")).unwrap();
    let block = value(SMALL, 1);
    let (began, count) = (Instant::now(), 4000);
    for number in 0..count {
        file.write_all_at(&block, number as u64 * SMALL as u64)
            .unwrap();
        file.sync_data().unwrap();
    }
    line(
        "disk: append 4 KiB + fdatasync",
        count,
        SMALL,
        began.elapsed(),
    )
}

/// Appends of 1 MiB and one fdatasync at the end, as fast as the disk takes a stream: per second.
fn disk_stream(dir: &Path, name: &str, blocks: &[Bytes]) -> f64 {
    // It stays, as the engine's files do: what a removed file frees would make the next write faster.
    let file = File::create(dir.join(name)).unwrap();
    let began = Instant::now();
    for (number, block) in blocks.iter().enumerate() {
        file.write_all_at(block, number as u64 * LARGE as u64)
            .unwrap();
    }
    file.sync_data().unwrap();
    blocks.len() as f64 / began.elapsed().as_secs_f64()
}

/// Values that are there before the clock runs: making a megabyte costs as much as copying it.
fn values(count: usize, bytes: usize) -> Vec<Bytes> {
    (0..count).map(|number| value(bytes, number)).collect()
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// SETs of these values under new keys, so many under way: per second.
async fn set_all(namespace: &Arc<Namespace>, name: &str, values: &[Bytes], depth: usize) -> f64 {
    let began = Instant::now();
    // Each a task of its own, as connections are.
    let tasks = values.iter().enumerate().map(|(number, value)| {
        let (namespace, value) = (Arc::clone(namespace), value.clone());
        let key = format!("{name}-{number}");
        tokio::spawn(async move {
            namespace.set(key.as_bytes(), value).await.unwrap().unwrap();
        })
    });
    iter(tasks)
        .buffer_unordered(depth)
        .for_each(|done| async move { done.unwrap() })
        .await;
    values.len() as f64 / began.elapsed().as_secs_f64()
}

async fn sets(
    namespace: &Arc<Namespace>,
    name: &'static str,
    count: usize,
    bytes: usize,
    depth: usize,
) -> f64 {
    measure(
        &format!("engine: SET {} KiB, depth {depth}", bytes / 1024),
        count,
        bytes,
        depth,
        |number| {
            let namespace = Arc::clone(namespace);
            async move {
                let key = format!("{name}-{number}");
                let stored = namespace.set(key.as_bytes(), value(bytes, number)).await;
                stored.unwrap().unwrap();
            }
        },
    )
    .await
}

async fn gets(
    namespace: &Arc<Namespace>,
    name: &'static str,
    count: usize,
    keys: usize,
    bytes: usize,
    depth: usize,
) -> f64 {
    measure(
        &format!("engine: GET {} KiB, depth {depth}", bytes / 1024),
        count,
        bytes,
        depth,
        |number| {
            let namespace = Arc::clone(namespace);
            async move {
                let key = format!("{name}-{}", number % keys);
                namespace.get(key.as_bytes()).await.unwrap().unwrap();
            }
        },
    )
    .await
}

async fn speed(dir: &Path, megabytes: usize) {
    let engine = Engine::open(EngineOptions::default()).unwrap();
    let namespace = engine
        .add_namespace(NamespaceOptions::new("speed", dir.join("speed")))
        .unwrap();
    sets(&namespace, "many", 200_000, SMALL, 64).await;
    gets(&namespace, "many", 400_000, 200_000, SMALL, 64).await;
    set_all(&namespace, "large", &values(megabytes, LARGE), 16).await;
    gets(&namespace, "large", megabytes * 8, megabytes, LARGE, 16).await;
    engine.close();
}

async fn small(dir: &Path, count: usize) {
    let engine = Engine::open(EngineOptions::default()).unwrap();
    let namespace = engine
        .add_namespace(NamespaceOptions::new("small", dir.join("small")))
        .unwrap();
    for name in ["one", "two", "three"] {
        let syncs = disk_syncs(dir);
        let one = sets(&namespace, name, count, SMALL, 1).await;
        println!("SET 4 KiB depth 1 / fdatasync rate: {:.2}", one / syncs);
    }
    engine.close();
}

/// What is on a disk's mind changes within seconds, so disk and engine take turns in small portions.
async fn large(dir: &Path, megabytes: usize) {
    const ROUNDS: usize = 9;
    const DEPTHS: [usize; 4] = [1, 4, 16, 64];
    let engine = Engine::open(EngineOptions::default()).unwrap();
    let namespace = engine
        .add_namespace(NamespaceOptions::new("large", dir.join("large")))
        .unwrap();
    let values = values(megabytes, LARGE);
    let (mut disk, mut rates) = (Vec::new(), vec![Vec::new(); DEPTHS.len()]);
    let mut ratios = rates.clone();
    for round in 0..ROUNDS {
        for (at, depth) in DEPTHS.into_iter().enumerate() {
            let before = disk_stream(dir, &format!("before-{round}-{depth}"), &values);
            let name = format!("{round}-{depth}");
            let rate = set_all(&namespace, &name, &values, depth).await;
            let after = disk_stream(dir, &format!("after-{round}-{depth}"), &values);
            disk.extend([before, after]);
            rates[at].push(rate);
            ratios[at].push(rate / f64::midpoint(before, after));
        }
    }
    println!(
        "medians of {ROUNDS} rounds of {megabytes} MiB; the disk alone (1 MiB appends, one fdatasync): {:.0} MB/s",
        median(disk) * LARGE as f64 / 1e6
    );
    for ((depth, rates), ratios) in DEPTHS.into_iter().zip(rates).zip(ratios) {
        println!(
            "SET 1 MiB, depth {depth:>2}: {:>5.0} MB/s, {:.2} of the disk right before and after ({})",
            median(rates) * LARGE as f64 / 1e6,
            median(ratios.clone()),
            ratios
                .iter()
                .map(|ratio| format!("{ratio:.2}"))
                .collect::<Vec<_>>()
                .join(" ")
        );
    }
    engine.close();
}

/// Latencies of SETs, one after the other, for a while.
async fn latencies(namespace: &Arc<Namespace>, from: usize, count: usize) -> Vec<Duration> {
    let mut taken = Vec::with_capacity(count);
    for number in from..from + count {
        let key = format!("k-{}", number % 20_000);
        let began = Instant::now();
        namespace
            .set(key.as_bytes(), value(SMALL, number))
            .await
            .unwrap();
        taken.push(began.elapsed());
    }
    taken
}

fn percentiles(what: &str, mut taken: Vec<Duration>) {
    taken.sort();
    let at = |part: usize| taken[taken.len() * part / 1000 - 1];
    println!(
        "{what}: {} SETs, p50 {:?}, p99 {:?}, p99.9 {:?}",
        taken.len(),
        at(500),
        at(990),
        at(999)
    );
}

async fn compact(dir: &Path, rounds: usize) {
    for compaction in [false, true, false, true] {
        let options = EngineOptions {
            compaction,
            datafile_bytes: 16 << 20,
            ..EngineOptions::default()
        };
        let engine = Engine::open(options).unwrap();
        let path = dir.join("compact");
        let namespace = engine
            .add_namespace(NamespaceOptions::new("compact", &path))
            .unwrap();
        // Warm: keys that live, among keys that die.
        iter(0..40_000)
            .map(|number| {
                let namespace = Arc::clone(&namespace);
                async move {
                    let key = format!("k-{}", number % 20_000);
                    namespace
                        .set(key.as_bytes(), value(SMALL, number + 1))
                        .await
                        .unwrap();
                }
            })
            .buffer_unordered(256)
            .count()
            .await;
        let mut taken = Vec::new();
        for round in 0..rounds {
            taken.extend(latencies(&namespace, 100_000 + round * 1000, 1000).await);
        }
        let name = if compaction {
            "with compaction"
        } else {
            "without"
        };
        percentiles(name, taken);
        println!(
            "  {} MiB of datafiles at the end",
            namespace.usage().unwrap().datafile_bytes >> 20
        );
        engine.close();
        drop(namespace);
        std::fs::remove_dir_all(path).unwrap();
    }
}

fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<usize>()
        .unwrap()
        * 4096
}

async fn start(dir: &Path, keys: usize, mode: Mode) {
    let engine = Engine::open(EngineOptions::default()).unwrap();
    let mut options = NamespaceOptions::new("start", dir.join("start"));
    options.settings.mode = mode;
    let namespace = engine.add_namespace(options.clone()).unwrap();
    let began = Instant::now();
    iter(0..keys)
        .map(|number| {
            let namespace = Arc::clone(&namespace);
            async move {
                let key = match mode {
                    Mode::User => number.to_be_bytes().repeat(2),
                    Mode::Sequential => Vec::new(),
                };
                namespace.set(&key, value(16, number)).await.unwrap();
            }
        })
        .buffer_unordered(4096)
        .count()
        .await;
    line("SET 16 bytes, depth 4096", keys, 16, began.elapsed());
    let began = Instant::now();
    engine.close();
    drop(namespace);
    println!("closed in {:?}", began.elapsed());
    drop(engine);
    let engine = Engine::open(EngineOptions::default()).unwrap();
    let before = resident_bytes();
    let began = Instant::now();
    let namespace = engine.add_namespace(options).unwrap();
    let took = began.elapsed();
    let held = resident_bytes().saturating_sub(before);
    let usage = namespace.usage().unwrap();
    println!(
        "{} keys opened in {took:?}; {} MiB more resident, {:.1} bytes a key (keys of {} bytes)",
        usage.keys,
        held >> 20,
        held as f64 / usage.keys as f64,
        match mode {
            Mode::User => 16,
            Mode::Sequential => 8,
        }
    );
    engine.close();
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_else(|| "speed".to_owned());
    let parent = arguments.next().map_or_else(std::env::temp_dir, Into::into);
    let number: Option<usize> = arguments.next().map(|text| text.parse().unwrap());
    let dir = tempfile::tempdir_in(parent).unwrap();
    match what.as_str() {
        "small" => small(dir.path(), number.unwrap_or(4000)).await,
        "large" => large(dir.path(), number.unwrap_or(64)).await,
        "speed" => speed(dir.path(), number.unwrap_or(256)).await,
        "compact" => compact(dir.path(), number.unwrap_or(20)).await,
        "start" => start(dir.path(), number.unwrap_or(10_000_000), Mode::User).await,
        "start-seq" => start(dir.path(), number.unwrap_or(10_000_000), Mode::Sequential).await,
        other => panic!("{other} is not one of speed, small, large, compact, start, start-seq"),
    }
}
