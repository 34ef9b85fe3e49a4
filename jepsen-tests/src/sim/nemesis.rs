//! Carries out a plan, between two steps of the simulation.

use super::broken::Variant;
use super::plan::{Fault, Plan, Resting, Who};
use super::world::{HostRequest, NodeSlot, Weather, World};
use qsfs_zdb::media::{Fault as DiskFault, Media, SimMedia};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use turmoil::Sim;

/// What is asked of the operator, who runs on a host of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// One more node.
    Grow,
    /// Another one in place of this one.
    Replace(usize),
}

/// The plan and how far it got.
pub struct Nemesis {
    world: Arc<World>,
    plan: Plan,
    next: usize,
    random: StdRng,
    cast: [usize; 3],
    orders: tokio::sync::mpsc::UnboundedSender<Order>,
    /// Who `Any` was, so that the same one is started again.
    lots: BTreeMap<u64, usize>,
}

impl Nemesis {
    /// Before its first step.
    pub fn new(
        world: &Arc<World>,
        plan: Plan,
        orders: tokio::sync::mpsc::UnboundedSender<Order>,
    ) -> Self {
        Self {
            world: Arc::clone(world),
            plan,
            next: 0,
            random: StdRng::seed_from_u64(world.seed ^ 0x4e4e),
            cast: [0, 1, 2],
            orders,
            lots: BTreeMap::new(),
        }
    }

    /// Everything was done.
    pub fn is_over(&self, now_ms: u64) -> bool {
        self.next == self.plan.steps.len() && now_ms >= self.plan.end_ms
    }

    /// Does what is due, `now_ms` after the faults began.
    pub fn act(&mut self, sim: &mut Sim<'_>, now_ms: u64) {
        while let Some((at_ms, fault)) = self.plan.steps.get(self.next).copied()
            && at_ms <= now_ms
        {
            self.next += 1;
            self.carry_out(sim, fault);
        }
    }

    fn members(&self) -> Vec<usize> {
        let nodes = self.world.nodes.lock();
        (0..nodes.len())
            .filter(|at| nodes[*at].id.is_some())
            .collect()
    }

    fn make_up_cast(&mut self) {
        let members = self.members();
        let leader = self.world.leader().unwrap_or(self.cast[0]);
        let mut others: Vec<_> = members.into_iter().filter(|at| *at != leader).collect();
        let before = self.cast[0];
        if let Some(at) = others.iter().position(|other| *other == before) {
            others.swap(0, at);
        } else if others.len() > 1 && self.random.random_bool(0.5) {
            others.swap(0, 1);
        }
        self.cast = [
            leader,
            others.first().copied().unwrap_or(leader),
            others.get(1).copied().unwrap_or(leader),
        ];
    }

    fn resolve(&mut self, who: Who) -> usize {
        match who {
            Who::Leader => self.cast[0],
            Who::First => self.cast[1],
            Who::Second => self.cast[2],
            Who::Any(lot) => {
                let members = self.members();
                let drawn = *members.choose(&mut self.random).unwrap_or(&0);
                *self.lots.entry(lot).or_insert(drawn)
            }
        }
    }

    fn name(&self, node: usize) -> String {
        self.world.nodes.lock()[node].name.clone()
    }

    fn carry_out(&mut self, sim: &mut Sim<'_>, fault: Fault) {
        let node = match fault {
            Fault::Kill(who)
            | Fault::LosePower(who)
            | Fault::Start(who)
            | Fault::Isolate(who)
            | Fault::SlowDisk(who, _)
            | Fault::HangDisk(who)
            | Fault::FillDisk(who)
            | Fault::FailSync(who)
            | Fault::Rot(who)
            | Fault::RotAtRest(who, _)
            | Fault::WipeKeepingId(who)
            | Fault::JumpClock(who, _)
            | Fault::Cut(who, _)
            | Fault::CutOneway(who, _) => Some(self.resolve(who)),
            _ => None,
        };
        let name = node.map_or(String::new(), |node| self.name(node));
        self.world.note("!", format_args!("{fault} {name}"));
        let at = node.unwrap_or(0);
        match fault {
            Fault::Cast => self.make_up_cast(),
            Fault::Cut(_, other) | Fault::CutOneway(_, other) => {
                let other = self.resolve(other);
                let other = self.name(other);
                if name != other && matches!(fault, Fault::Cut(..)) {
                    sim.partition(name.as_str(), other.as_str());
                } else if name != other {
                    sim.partition_oneway(name.as_str(), other.as_str());
                }
            }
            Fault::Isolate(_) => self.for_pairs(|a, b| {
                if a == name {
                    sim.partition(a, b);
                }
            }),
            Fault::HealNetwork => self.for_pairs(|a, b| sim.repair(a, b)),
            Fault::Kill(_) => self.stop(sim, at, false),
            Fault::LosePower(_) => self.stop(sim, at, true),
            Fault::LosePowerEverywhere => {
                for at in self.members() {
                    self.stop(sim, at, true);
                }
            }
            Fault::Start(_) => self.start(sim, at),
            Fault::StartAll => {
                for at in self.members() {
                    self.start(sim, at);
                }
            }
            Fault::WipeKeepingId(_) => {
                self.stop(sim, at, true);
                self.world.wipe(at);
            }
            Fault::JumpClock(_, by_ms) => {
                let nodes = self.world.nodes.lock();
                nodes[at].skew_ms.fetch_add(by_ms, Ordering::Relaxed);
            }
            Fault::Weather(percent) => {
                let chance = f64::from(percent) / 100.0;
                self.world.set_weather(Weather {
                    lost: chance / 2.0,
                    again: chance,
                });
            }
            // Nobody listens any more once the run is over.
            Fault::Grow => _ = self.orders.send(Order::Grow),
            Fault::Replace => {
                let leader = self.world.leader();
                let others = self.members().into_iter().filter(|at| Some(*at) != leader);
                let others: Vec<_> = others.collect();
                if let Some(at) = others.choose(&mut self.random) {
                    _ = self.orders.send(Order::Replace(*at));
                }
            }
            _ => self.harm_disk(at, fault),
        }
    }

    fn harm_disk(&mut self, at: usize, fault: Fault) {
        let mut nodes = self.world.nodes.lock();
        let slot = &mut nodes[at];
        match fault {
            Fault::SlowDisk(_, ms) => slot.speed.slow(Duration::from_millis(ms)),
            Fault::HangDisk(_) => slot.speed.hang(),
            Fault::FillDisk(_) => slot.media.inject(DiskFault::Capacity(1)),
            Fault::FailSync(_) => slot.media.inject(DiskFault::FailSync(0)),
            Fault::HealDisks => {
                for slot in nodes.iter_mut() {
                    slot.speed.heal();
                    slot.media.inject(DiskFault::Healthy);
                }
            }
            Fault::Rot(_) | Fault::RotAtRest(..) => {
                let broken = self.world.broken.is_some();
                // A second damaged node before the first one is back would be more than a majority has to bear.
                let changing = self.world.changing.load(Ordering::Relaxed);
                if !broken && (changing || nodes.iter().any(|slot| slot.harmed)) {
                    return;
                }
                let unseen = super::broken::rot_is_unseen(&self.world);
                match fault {
                    Fault::RotAtRest(_, resting) => {
                        let unseen = unseen
                            && (resting == Resting::Snapshot
                                || self.world.broken == Some(Variant::StateRotUnseen));
                        flip_at_rest(&mut nodes[at], resting, unseen, &mut self.random);
                    }
                    _ => flip(&mut nodes[at], &mut self.random),
                }
            }
            _ => {}
        }
    }

    fn for_pairs(&self, mut act: impl FnMut(&str, &str)) {
        let nodes = self.world.nodes.lock();
        let names: Vec<String> = nodes.iter().map(|slot| slot.name.clone()).collect();
        drop(nodes);
        for a in &names {
            for b in names.iter().filter(|b| *b != a) {
                act(a, b);
            }
        }
    }

    fn stop(&mut self, sim: &mut Sim<'_>, at: usize, power: bool) {
        let name = self.name(at);
        if sim.is_host_running(name.as_str()) {
            sim.crash(name.as_str());
        }
        if power {
            self.world.lose_power(at, self.random.random());
        }
        let mut nodes = self.world.nodes.lock();
        let slot = &mut nodes[at];
        (slot.doors, slot.failure, slot.down) = (None, None, true);
    }

    /// Does what the operator asked for.
    pub fn serve(&mut self, sim: &mut Sim<'_>) {
        let requests = std::mem::take(&mut *self.world.requests.lock());
        for request in requests {
            match request {
                HostRequest::StopAndWipe(at) => {
                    self.stop(sim, at, false);
                    self.world.wipe(at);
                }
                HostRequest::Start(at) => {
                    self.world.nodes.lock()[at].down = true;
                    self.start(sim, at);
                }
            }
        }
    }

    /// Ends all trouble.
    pub fn heal(&mut self, sim: &mut Sim<'_>) {
        for fault in [
            Fault::HealNetwork,
            Fault::HealDisks,
            Fault::Weather(0),
            Fault::StartAll,
        ] {
            self.carry_out(sim, fault);
        }
    }

    /// Starts what is down, and what stopped by itself.
    fn start(&mut self, sim: &mut Sim<'_>, at: usize) {
        let (name, due) = {
            let mut nodes = self.world.nodes.lock();
            let slot = &mut nodes[at];
            // What is damaged is the operator's to replace.
            let failed = slot
                .failure
                .as_ref()
                .is_some_and(|failure| !failure.damaged);
            let due = slot.down || failed;
            slot.down = false;
            (slot.name.clone(), due)
        };
        if due {
            sim.bounce(name.as_str());
        }
    }
}

/// Flips bits somewhere in what a node must be able to read again.
fn flip(slot: &mut NodeSlot, random: &mut StdRng) {
    let dir = NodeSlot::dir().join("log");
    let names = slot.media.list(&dir).unwrap_or_default();
    let logs: Vec<_> = names.iter().filter(|name| name.ends_with(".log")).collect();
    // The last segment but sometimes an older one.
    let at = logs.len().saturating_sub(random.random_range(1..=2));
    let Some(name) = logs.get(at).or(logs.last()) else {
        return;
    };
    let path = dir.join(name);
    let contents = slot.media.contents(&path).unwrap_or_default();
    // Zeros are room that was reserved.
    let used = contents.iter().rposition(|byte| *byte != 0).unwrap_or(0);
    if used < 600 {
        return;
    }
    let offset = random.random_range(used / 2..used - 200);
    slot.media
        .flip(&path, offset as u64, 1 << random.random_range(0..8));
    slot.harmed = true;
}

/// Flips a bit in what a node that does not run reads when it starts. `unseen`: with a checksum to match.
fn flip_at_rest(slot: &mut NodeSlot, resting: Resting, unseen: bool, random: &mut StdRng) {
    if !slot.down {
        return;
    }
    let dir = NodeSlot::dir();
    let bit = 1 << random.random_range(0..8);
    let path = match resting {
        Resting::State => {
            slot.harmed |= slot.stores.flip(unseen, bit, random);
            return;
        }
        Resting::Vote => dir.join("log").join("vote"),
        Resting::Snapshot => {
            let names = slot.media.list(&dir.join("snapshot")).unwrap_or_default();
            let newest = names.iter().rfind(|name| name.ends_with(".snap"));
            newest.map_or(dir.clone(), |name| dir.join("snapshot").join(name))
        }
    };
    let contents = slot.media.contents(&path).unwrap_or_default();
    // Of a snapshot: rows, which are behind its head and before its hash.
    let (from, until) = match resting {
        Resting::Snapshot => (
            contents.len() / 2,
            contents.len().saturating_sub(HASH_BYTES),
        ),
        _ => (0, contents.len()),
    };
    if from >= until {
        return;
    }
    slot.media
        .flip(&path, random.random_range(from..until) as u64, bit);
    slot.harmed = true;
    if unseen {
        forge_hash(&slot.media, &path);
    }
}

/// Bytes of the hash at the end of a snapshot.
const HASH_BYTES: usize = 32;

fn forge_hash(media: &SimMedia, path: &Path) {
    let contents = media.contents(path).unwrap_or_default();
    let hashed = contents.len() - HASH_BYTES;
    let hash = blake3::hash(&contents[..hashed]);
    for (at, (new, old)) in hash.as_bytes().iter().zip(&contents[hashed..]).enumerate() {
        media.flip(path, (hashed + at) as u64, new ^ old);
    }
}
