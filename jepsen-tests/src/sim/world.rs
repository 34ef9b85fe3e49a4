//! What a simulated run knows of itself: its nodes with their disks, what is wrong with the network, the history and the trace.

use super::broken::{LyingMedia, Variant};
use super::disk::{DiskSpeed, SimStores, SimWork};
use super::trace::Trace;
use super::watch::Watch;
use crate::metad::final_state::FinalState;
use crate::metad::history::{Clock, Recorder};
use parking_lot::Mutex;
use qsfs_metad::ground::{Ground, Program, Sizes, WallClock};
use qsfs_metad::log::segments::Amount;
use qsfs_metad::machine::Machine;
use qsfs_metad::node::consensus::Consensus;
use qsfs_proto::ca::CertificateAuthority;
use qsfs_proto::identity::PeerIdentity;
use qsfs_zdb::media::{Media, SimMedia};
use qsfs_zstor::id::{ClusterId, MetadId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// The cluster of every run.
pub const CLUSTER: ClusterId = ClusterId::from_bytes([0xc5; 16]);
/// Virtual time begins here, ms since the epoch.
const EPOCH_MS: u64 = 1_700_000_000_000;
/// Sizes that make a run of seconds see many segments and snapshots.
const SIZES: Sizes = Sizes {
    segment_bytes: 32 << 10,
    snapshot_cost_min: 160 << 10,
    snapshot_cost_max: 1 << 20,
    kept: Amount {
        entries: 20,
        bytes: 64 << 10,
    },
    applied_at_once: Amount {
        entries: 40,
        bytes: 16 << 10,
    },
};

/// What becomes of one message.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fate {
    /// It does not arrive.
    pub lost: bool,
    /// Its answer does not arrive.
    pub answer_lost: bool,
    /// It arrives once more, so much later.
    pub again_after: Option<Duration>,
}

/// How bad the network is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    /// Chance of a message, or its answer, to be lost.
    pub lost: f64,
    /// Chance of a message to come again later.
    pub again: f64,
}

/// Hosts are stopped and started between two steps only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostRequest {
    /// Stop it and give it an empty disk.
    StopAndWipe(usize),
    /// Start it.
    Start(usize),
}

/// The doors of a running node.
#[derive(Clone)]
pub struct Doors {
    /// Proposals.
    pub consensus: Consensus,
    /// State.
    pub machine: Machine,
}

/// Why a node does not run.
#[derive(Debug, Clone)]
pub struct NodeFailure {
    /// It says its data is damaged.
    pub damaged: bool,
    /// Its words.
    pub text: String,
}

/// One node, whether it runs or not.
pub struct NodeSlot {
    /// Host name.
    pub name: String,
    /// Raft id, once admitted.
    pub id: Option<MetadId>,
    /// It has a peer, so its vote must not be missing.
    pub took_part: bool,
    /// Its disk.
    pub media: SimMedia,
    /// What lies about syncs, in some broken variants.
    pub lying: Option<Arc<LyingMedia>>,
    /// Its rows.
    pub stores: Arc<SimStores>,
    /// How fast its disk is.
    pub speed: Arc<DiskSpeed>,
    /// Its clock is off by so much.
    pub skew_ms: Arc<AtomicI64>,
    /// Set while it runs.
    pub doors: Option<Doors>,
    /// Set when it stopped by itself.
    pub failure: Option<NodeFailure>,
    /// The nemesis keeps it down.
    pub down: bool,
    /// Its disk was harmed in a way that it may not survive.
    pub harmed: bool,
    /// A broken variant: the next entry is skipped.
    pub skip_next: bool,
    /// Times it was started.
    pub starts: u64,
}

/// Everything about a run. Shared by all hosts, on one thread.
pub struct World {
    /// The seed.
    pub seed: u64,
    /// Which broken variant runs, if any.
    pub broken: Option<Variant>,
    /// Virtual time since the beginning.
    now_ns: AtomicU64,
    trace: Mutex<Trace>,
    /// The history.
    pub recorder: Recorder,
    /// All nodes.
    pub nodes: Mutex<Vec<NodeSlot>>,
    weather: Mutex<(Weather, StdRng)>,
    /// What must not be, found while it ran.
    violations: Mutex<Vec<String>>,
    /// Hash of the outcome of every entry, and who said so first.
    outcomes: Mutex<BTreeMap<u64, (String, usize)>>,
    /// Clients go on.
    pub working: AtomicBool,
    /// What the operator asks of the harness.
    pub requests: Mutex<Vec<HostRequest>>,
    /// The cluster is complete and the workload may begin.
    pub ready: AtomicBool,
    /// A node is being replaced or added: until the cluster is whole again no other disk rots.
    pub changing: AtomicBool,
    /// Clients that have not ended yet.
    pub busy: AtomicUsize,
    /// No fault comes any more and all were healed.
    pub calm: AtomicBool,
    /// What was there at the end.
    pub end: Mutex<Option<FinalState>>,
    /// Signs nothing that matters; nodes want one.
    pub authority: (String, qsfs_proto::api::Secret),
}

struct SimClock {
    world: Arc<World>,
    skew_ms: Arc<AtomicI64>,
}

impl fmt::Debug for SimClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimClock")
    }
}

impl WallClock for SimClock {
    fn now_ms(&self) -> u64 {
        let true_ms = EPOCH_MS + self.world.now_ns() / 1_000_000;
        true_ms.saturating_add_signed(self.skew_ms.load(Ordering::Relaxed))
    }
}

impl World {
    /// With so many hosts, none of them admitted yet.
    pub fn new(seed: u64, hosts: usize, broken: Option<Variant>, echo: bool) -> Arc<Self> {
        let authority = CertificateAuthority::create(CLUSTER).expect("keys can be made");
        let authority = (
            authority.ca_pem().to_owned(),
            qsfs_proto::api::Secret(authority.key_pem().0.clone()),
        );
        Arc::new_cyclic(|weak: &std::sync::Weak<Self>| {
            let weak = weak.clone();
            let clock: Clock = Arc::new(move || weak.upgrade().map_or(0, |world| world.now_ns()));
            let slots = (0..hosts).map(|at| NodeSlot::new(at, seed, broken));
            Self {
                seed,
                broken,
                now_ns: AtomicU64::new(0),
                trace: Mutex::new(Trace::new(echo)),
                recorder: Recorder::new(clock),
                nodes: Mutex::new(slots.collect()),
                weather: Mutex::new((Weather::default(), StdRng::seed_from_u64(seed ^ 0x77))),
                violations: Mutex::default(),
                outcomes: Mutex::default(),
                working: AtomicBool::new(true),
                requests: Mutex::default(),
                ready: AtomicBool::new(false),
                changing: AtomicBool::new(false),
                busy: AtomicUsize::new(0),
                calm: AtomicBool::new(false),
                end: Mutex::default(),
                authority,
            }
        })
    }

    /// Virtual time since the beginning.
    pub fn now_ns(&self) -> u64 {
        self.now_ns.load(Ordering::Relaxed)
    }

    /// Time goes on.
    pub fn set_now(&self, now: Duration) {
        let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        self.now_ns.store(now_ns, Ordering::Relaxed);
    }

    /// A line of the trace.
    pub fn note(&self, who: &str, what: fmt::Arguments<'_>) {
        self.trace.lock().line(self.now_ns(), who, what);
    }

    /// Lines and hash of the trace.
    pub fn digest(&self) -> (u64, String) {
        self.trace.lock().digest()
    }

    /// Something that must not be.
    pub fn violation(&self, text: String) {
        self.note("!", format_args!("{text}"));
        self.violations.lock().push(text);
    }

    /// All that was found so far.
    pub fn violations(&self) -> Vec<String> {
        self.violations.lock().clone()
    }

    /// The network from now on.
    pub fn set_weather(&self, weather: Weather) {
        self.weather.lock().0 = weather;
    }

    /// Draws what becomes of a message.
    pub fn draw_fate(&self) -> Fate {
        let mut state = self.weather.lock();
        let (weather, random) = &mut *state;
        if weather.lost == 0.0 && weather.again == 0.0 {
            return Fate::default();
        }
        Fate {
            lost: random.random_bool(weather.lost),
            answer_lost: random.random_bool(weather.lost),
            again_after: random
                .random_bool(weather.again)
                .then(|| Duration::from_millis(random.random_range(0..3_000))),
        }
    }

    /// What a node stands on now.
    pub fn ground(self: &Arc<Self>, node: usize) -> Ground {
        let nodes = self.nodes.lock();
        let slot = &nodes[node];
        let media: Arc<dyn Media> = match &slot.lying {
            Some(lying) => Arc::clone(lying) as Arc<dyn Media>,
            None => Arc::new(slot.media.clone()),
        };
        Ground {
            media,
            stores: slot.stores.clone(),
            work: Arc::new(SimWork(Arc::clone(&slot.speed))),
            clock: Arc::new(SimClock {
                world: Arc::clone(self),
                skew_ms: Arc::clone(&slot.skew_ms),
            }),
            applier: Arc::new(Watch {
                world: Arc::clone(self),
                node,
            }),
            sizes: SIZES,
            program: Program::default(),
        }
    }

    /// Every node must come to the same outcome of every entry.
    pub fn applied(&self, node: usize, index: u64, outcome: String) {
        let mut outcomes = self.outcomes.lock();
        match outcomes.get(&index) {
            Some((known, by)) if *known != outcome => {
                let text = format!(
                    "deterministic: entry {index} had outcome {known} on node {by} and {outcome} on node {node}"
                );
                drop(outcomes);
                self.violation(text);
            }
            Some(_) => {}
            None => {
                outcomes.insert(index, (outcome, node));
            }
        }
    }

    /// What a node's clock says.
    pub fn own_clock_ms(&self, node: usize) -> u64 {
        let skew = self.nodes.lock()[node].skew_ms.load(Ordering::Relaxed);
        let true_ms = EPOCH_MS + self.now_ns() / 1_000_000;
        // No two machines agree to the millisecond.
        true_ms.saturating_add_signed(skew) + node as u64
    }

    /// Is the first entry after a restart to be taken for applied, though it is not?
    pub fn skips_next(&self, node: usize) -> bool {
        std::mem::take(&mut self.nodes.lock()[node].skip_next)
    }

    /// Highest entry that was applied anywhere.
    pub fn applied_max(&self) -> u64 {
        let outcomes = self.outcomes.lock();
        outcomes.last_key_value().map_or(0, |(index, _)| *index)
    }

    /// Which node leads with the highest term, by its own word.
    pub fn leader(&self) -> Option<usize> {
        let nodes = self.nodes.lock();
        let leading = nodes.iter().enumerate().filter_map(|(at, slot)| {
            let doors = slot.doors.as_ref()?;
            let metrics = doors.consensus.raft().metrics();
            let metrics = metrics.borrow();
            (metrics.current_leader == Some(metrics.id)).then_some((metrics.current_term, at))
        });
        leading.max().map(|(_, at)| at)
    }

    /// A node by Raft id.
    pub fn identity_of(&self, id: MetadId) -> PeerIdentity {
        PeerIdentity::new(CLUSTER, qsfs_proto::api::Role::Metad, id.to_string())
            .expect("a number is a subject")
    }

    /// The machine loses power: what was not synced may be gone.
    pub fn lose_power(&self, node: usize, seed: u64) {
        let mut nodes = self.nodes.lock();
        let slot = &mut nodes[node];
        let mut random = StdRng::seed_from_u64(seed);
        slot.media = slot.media.restart(random.random());
        slot.stores = Arc::new(slot.stores.after_power_loss(&mut random));
        slot.skip_next = self.broken == Some(Variant::AppliedNotAtomic);
        let media = slot.media.clone();
        if let Some(lying) = &mut slot.lying {
            *lying = Arc::new(lying.after_power_loss(media));
        }
    }

    /// The node's disk is replaced by an empty one.
    pub fn wipe(&self, node: usize) {
        let mut nodes = self.nodes.lock();
        let fresh = NodeSlot::new(node, self.seed, self.broken);
        let slot = &mut nodes[node];
        (slot.media, slot.lying, slot.stores) = (fresh.media, fresh.lying, fresh.stores);
        (slot.took_part, slot.harmed, slot.failure) = (false, false, None);
    }
}

impl NodeSlot {
    fn new(at: usize, seed: u64, broken: Option<Variant>) -> Self {
        let media = SimMedia::new();
        let lying = LyingMedia::wanted(broken).then(|| {
            Arc::new(LyingMedia::new(
                media.clone(),
                broken.expect("it is wanted"),
            ))
        });
        Self {
            name: format!("m{}", at + 1),
            id: None,
            took_part: false,
            media,
            lying,
            stores: Arc::new(SimStores::new(broken == Some(Variant::SnapshotBeforeFlush))),
            speed: Arc::new(DiskSpeed::new(seed ^ (at as u64 + 1))),
            skew_ms: Arc::default(),
            doors: None,
            failure: None,
            down: false,
            harmed: false,
            skip_next: false,
            starts: 0,
        }
    }

    /// Where everything of it is.
    pub fn dir() -> PathBuf {
        Path::new("/metad").to_owned()
    }
}
