//! A whole cluster on one thread, in virtual time, from a seed: real openraft, real log and state machine, real gRPC, on simulated
//! disks, clocks and network.
//!
//! ```text
//!              plan (from the seed) ──▶ Nemesis ──▶ hosts, network, disks, clocks
//!   c1 c2 c3 ── MetadClient ── gRPC over turmoil ──▶ m1 .. m5: UnreliableService ▶ metad ▶ Segments ▶ SimMedia
//!      │                                               └─ Watch: outcome of every entry, compared between nodes
//!      └──▶ history ──▶ checkers (`crate::metad::checkers`)          op: admits, replaces, looks at the end
//! ```
//!
//! The same seed gives the same trace, line by line, in a process of its own: the program `qsfs-sim` answers for what Rust and tokio
//! draw from the operating system. What is not simulated is said in `docs/testing.md`.

pub mod broken;
pub mod disk;
pub mod host;
pub mod nemesis;
pub mod net;
pub mod operator;
pub mod plan;
pub mod service;
pub mod trace;
pub mod watch;
pub mod workload;
pub mod world;

use crate::metad::checkers::{Terms, check_all};
use broken::Variant;
use nemesis::Nemesis;
use operator::Operator;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use turmoil::Sim;
use world::World;

/// Hosts that may be metads; three are at the beginning.
const HOSTS: usize = 5;
/// Nodes at the beginning.
const NODES: usize = 3;
/// One step of the simulation.
const TICK: Duration = Duration::from_millis(1);
/// A run that takes longer is stuck.
const RUN_MAX: Duration = Duration::from_secs(150);

/// Panics of any thread since the program began.
pub static PANICS: AtomicUsize = AtomicUsize::new(0);

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The seed.
    pub seed: u64,
    /// Virtual time during which faults happen, in ms.
    pub span_ms: u64,
    /// Kinds of faults, of [`plan::KINDS`].
    pub kinds: Vec<&'static str>,
    /// A broken variant instead of the real thing.
    pub broken: Option<Variant>,
    /// Rounds of the plan of a broken variant.
    pub rounds: u64,
    /// Print the trace as it comes.
    pub echo: bool,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Report {
    /// Lines of the trace, and their hash.
    pub trace: (u64, String),
    /// Virtual time that passed.
    pub virtual_time: Duration,
    /// Events of the history.
    pub events: usize,
    /// What checkers looked at.
    pub summaries: Vec<String>,
    /// What must not be.
    pub violations: Vec<String>,
}

/// Runs one seed. `tick` is told the virtual time after every step.
pub fn run(options: &Options, mut tick: impl FnMut(Duration)) -> Report {
    let world = World::new(options.seed, HOSTS, options.broken, options.echo);
    let plan = match options.broken {
        Some(variant) => plan::directed(variant, options.seed, options.rounds),
        None => plan::random(options.seed, options.span_ms, &options.kinds),
    };
    for (at_ms, fault) in &plan.steps {
        world.note("plan", format_args!("{at_ms:>6} ms {fault}"));
    }
    let mut sim = turmoil::Builder::new()
        .rng_seed(options.seed)
        .tick_duration(TICK)
        .simulation_duration(RUN_MAX)
        .min_message_latency(Duration::from_micros(200))
        .max_message_latency(Duration::from_millis(1 + options.seed % 8))
        .tcp_capacity(4_096)
        .enable_random_order()
        .build();
    world.nodes.lock()[0].id = Some(qsfs_zstor::id::MetadId(1));
    for at in 0..HOSTS {
        let name = format!("m{}", at + 1);
        let world = Arc::clone(&world);
        sim.host(name.as_str(), move || host::run(Arc::clone(&world), at));
    }
    let (orders, waiting) = tokio::sync::mpsc::unbounded_channel();
    sim.client("op", Operator::new(&world, waiting).run(NODES));
    let numbers = Arc::default();
    for number in 1..=workload::CLIENTS {
        let (world, numbers) = (Arc::clone(&world), Arc::clone(&numbers));
        world.busy.fetch_add(1, Ordering::Relaxed);
        let number = u8::try_from(number).expect("there are few");
        let reads_only = usize::from(number) == workload::CLIENTS;
        sim.client(format!("c{number}"), async move {
            while !world.ready.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            workload::Worker::new(&world, &numbers, number, reads_only)
                .run()
                .await;
            world.busy.fetch_sub(1, Ordering::Relaxed);
            Ok(())
        });
    }
    drive(
        &mut sim,
        &world,
        Nemesis::new(&world, plan, orders),
        &mut tick,
    );
    let virtual_time = sim.elapsed();
    judge(&world, virtual_time)
}

fn drive(
    sim: &mut Sim<'_>,
    world: &Arc<World>,
    mut nemesis: Nemesis,
    tick: &mut impl FnMut(Duration),
) {
    let mut began = None;
    loop {
        match sim.step() {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                world.violation(format!("recovery: the run is stuck: {error}"));
                return;
            }
        }
        let now = sim.elapsed();
        world.set_now(now);
        tick(now);
        nemesis.serve(sim);
        if !world.ready.load(Ordering::Relaxed) || world.calm.load(Ordering::Relaxed) {
            continue;
        }
        let began = *began.get_or_insert(now);
        let now_ms = u64::try_from((now - began).as_millis()).unwrap_or(u64::MAX);
        nemesis.act(sim, now_ms);
        if nemesis.is_over(now_ms) {
            nemesis.heal(sim);
            world.working.store(false, Ordering::Relaxed);
            world.calm.store(true, Ordering::Relaxed);
        }
    }
}

fn judge(world: &World, virtual_time: Duration) -> Report {
    let panics = PANICS.load(Ordering::Relaxed);
    if panics > 0 {
        world.violation(format!("recovery: {panics} tasks panicked"));
    }
    let events = world.recorder.events();
    let mut summaries = Vec::new();
    if let Some(end) = world.end.lock().take() {
        // Whatever the clocks did: leaders wait by steady ones.
        let lease_ttl_ns = Some(host::LEASE_TTL_MS * 1_000_000);
        for result in check_all(&events, &end, Terms { lease_ttl_ns }) {
            match result {
                Ok(summary) => summaries.push(summary.to_string()),
                Err(violation) => world.violation(violation.to_string()),
            }
        }
    }
    Report {
        trace: world.digest(),
        virtual_time,
        events: events.len(),
        summaries,
        violations: world.violations(),
    }
}
