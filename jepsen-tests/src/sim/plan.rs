//! What goes wrong and when: drawn from the seed before the run begins, and printed in the trace.

use super::broken::Variant;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::fmt;

/// Who: told by role, as it is at that moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Who led when the cast was last made up.
    Leader,
    /// A voter that did not; who led before, if that was somebody else.
    First,
    /// Another.
    Second,
    /// Somebody, by lot.
    Any(u64),
}

/// What rots while a node does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resting {
    /// Its vote.
    Vote,
    /// Its newest snapshot.
    Snapshot,
    /// Its rows.
    State,
}

/// One thing that goes wrong, or right again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Decides who is the leader, the first and the second from now on.
    Cast,
    /// No message between these two, in neither direction.
    Cut(Who, Who),
    /// No message from the one to the other.
    CutOneway(Who, Who),
    /// Cut off from all other nodes, not from clients.
    Isolate(Who),
    /// All messages pass again.
    HealNetwork,
    /// The process is gone; its disk is as it left it.
    Kill(Who),
    /// The machine is without power: what was not synced may be gone.
    LosePower(Who),
    /// All machines at once.
    LosePowerEverywhere,
    /// Started again.
    Start(Who),
    /// All that do not run are started.
    StartAll,
    /// The disk takes so many milliseconds for everything.
    SlowDisk(Who, u64),
    /// The disk answers nothing.
    HangDisk(Who),
    /// The disk takes nothing more.
    FillDisk(Who),
    /// The next sync fails.
    FailSync(Who),
    /// Disks are well again.
    HealDisks,
    /// Bits of what is stored flip; shown when it is read again.
    Rot(Who),
    /// The same in what a node reads when it starts. It does not run meanwhile.
    RotAtRest(Who, Resting),
    /// The disk is empty, and the node starts as if it were itself: what one of the broken variants does.
    WipeKeepingId(Who),
    /// The clock jumps by so many milliseconds.
    JumpClock(Who, i64),
    /// Messages get lost and come twice, in per cent.
    Weather(u8),
    /// One more node joins.
    Grow,
    /// A node that does not lead leaves for good, and its host joins anew.
    Replace,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Kinds of faults, as chosen on the command line.
pub const KINDS: [&str; 8] = [
    "partition",
    "crash",
    "power",
    "disk",
    "rot",
    "clock",
    "loss",
    "member",
];

/// Faults by the millisecond at which they happen, in order.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// All of them.
    pub steps: Vec<(u64, Fault)>,
    /// When they are over.
    pub end_ms: u64,
}

struct Draft {
    random: StdRng,
    now_ms: u64,
    steps: Vec<(u64, Fault)>,
}

impl Draft {
    fn add(&mut self, after_ms: u64, fault: Fault) {
        self.steps.push((self.now_ms + after_ms, fault));
    }

    /// A span with jitter.
    fn about(&mut self, ms: u64) -> u64 {
        self.random.random_range(ms / 2..=ms * 3 / 2)
    }

    fn who(&mut self) -> Who {
        let lot = self.random.random();
        *[Who::Leader, Who::First, Who::Second, Who::Any(lot)]
            .choose(&mut self.random)
            .unwrap_or(&Who::Leader)
    }

    fn done(mut self) -> Plan {
        self.steps.sort_by_key(|(at_ms, _)| *at_ms);
        Plan {
            end_ms: self.now_ms,
            steps: self.steps,
        }
    }
}

/// The plan of a seed: one trouble of a random kind after the other, some of them on top of each other.
pub fn random(seed: u64, span_ms: u64, kinds: &[&str]) -> Plan {
    let mut draft = Draft {
        random: StdRng::seed_from_u64(seed ^ 0xfa17),
        now_ms: 0,
        steps: Vec::new(),
    };
    while draft.now_ms < span_ms && !kinds.is_empty() {
        draft.add(0, Fault::Cast);
        let kind = *kinds.choose(&mut draft.random).unwrap_or(&"crash");
        trouble(&mut draft, kind);
        let overlap = draft.random.random_bool(0.25);
        draft.now_ms += if overlap { 200 } else { draft.about(2_500) };
    }
    draft.now_ms = draft.now_ms.max(span_ms) + 500;
    draft.done()
}

fn trouble(draft: &mut Draft, kind: &str) {
    let span = draft.about(2_000);
    let (who, other) = (draft.who(), draft.who());
    match kind {
        "partition" => {
            match draft.random.random_range(0..4) {
                0 => draft.add(0, Fault::Isolate(who)),
                1 => draft.add(0, Fault::CutOneway(who, other)),
                // A bridge: one node sees both others, which do not see each other.
                2 => draft.add(0, Fault::Cut(Who::Leader, Who::First)),
                _ => draft.add(0, Fault::Isolate(Who::Leader)),
            }
            draft.add(span, Fault::HealNetwork);
        }
        "crash" => {
            draft.add(0, Fault::Kill(who));
            draft.add(span, Fault::Start(who));
        }
        "power" => {
            if draft.random.random_bool(0.3) {
                draft.add(0, Fault::LosePowerEverywhere);
                draft.add(300, Fault::StartAll);
            } else {
                draft.add(0, Fault::LosePower(who));
                draft.add(span / 2, Fault::Start(who));
            }
        }
        "disk" => {
            match draft.random.random_range(0..4) {
                0 => draft.add(0, Fault::SlowDisk(who, 40)),
                1 => draft.add(0, Fault::HangDisk(who)),
                2 => draft.add(0, Fault::FillDisk(who)),
                _ => draft.add(0, Fault::FailSync(who)),
            }
            draft.add(span, Fault::HealDisks);
            draft.add(span + 200, Fault::StartAll);
        }
        "rot" => {
            let resting = [Resting::Vote, Resting::Snapshot, Resting::State];
            let (killed, rotten) = match draft.random.random_range(0..6) {
                0..3 => (50, Fault::Rot(who)),
                at => (0, Fault::RotAtRest(who, resting[at - 3])),
            };
            draft.add(killed, Fault::Kill(who));
            draft.add(if killed == 0 { 50 } else { 0 }, rotten);
            draft.add(250, Fault::Start(who));
        }
        "clock" => {
            let jump = draft.random.random_range(-3_000..3_000);
            draft.add(0, Fault::JumpClock(who, jump));
        }
        "loss" => {
            let percent = draft.random.random_range(1..12);
            draft.add(0, Fault::Weather(percent));
            draft.add(span, Fault::Weather(0));
        }
        _ => {
            let grow = draft.random.random_bool(0.5);
            draft.add(0, if grow { Fault::Grow } else { Fault::Replace });
        }
    }
}

/// The plan that gives a broken variant its chance, over and over.
pub fn directed(variant: Variant, seed: u64, rounds: u64) -> Plan {
    let mut draft = Draft {
        random: StdRng::seed_from_u64(seed ^ 0xb01d),
        now_ms: 300,
        steps: Vec::new(),
    };
    for _ in 0..rounds {
        draft.add(0, Fault::Cast);
        let took = round(&mut draft, variant);
        draft.add(took, Fault::HealNetwork);
        draft.add(took, Fault::HealDisks);
        draft.add(took, Fault::StartAll);
        draft.now_ms += took + 1_500;
    }
    draft.done()
}

/// One round; answers how long it takes.
fn round(draft: &mut Draft, variant: Variant) -> u64 {
    let jitter = draft.random.random_range(0..120);
    let (leader, first, second) = (Who::Leader, Who::First, Who::Second);
    match variant {
        Variant::VoteNotSynced => {
            // The voter forgets whom it elected, and the one before still believes that it leads.
            draft.add(0, Fault::Isolate(leader));
            let at = 1_200 + jitter;
            draft.add(at, Fault::Cast);
            draft.add(at, Fault::LosePower(second));
            draft.add(at, Fault::HealNetwork);
            draft.add(at, Fault::Isolate(leader));
            draft.add(at + 20, Fault::Start(second));
            at + 1_000
        }
        Variant::AppendAcknowledgedEarly => {
            draft.add(200 + jitter, Fault::LosePowerEverywhere);
            draft.add(500 + jitter, Fault::StartAll);
            600 + jitter
        }
        Variant::LeaderCountsItselfEarly => {
            draft.add(0, Fault::Isolate(second));
            draft.add(500 + jitter, Fault::LosePower(leader));
            draft.add(500 + jitter, Fault::Kill(first));
            draft.add(550 + jitter, Fault::HealNetwork);
            draft.add(600 + jitter, Fault::Start(leader));
            2_600 + jitter
        }
        Variant::StateRotUnseen | Variant::SnapshotRotUnseen => {
            draft.add(900, Fault::Kill(first));
            draft.add(920, Fault::RotAtRest(first, Resting::State));
            if variant == Variant::SnapshotRotUnseen {
                draft.add(920, Fault::RotAtRest(first, Resting::Snapshot));
            }
            draft.add(1_000 + jitter, Fault::Start(first));
            1_100 + jitter
        }
        Variant::StaleReadServed | Variant::AgeUntold => {
            draft.add(0, Fault::Isolate(leader));
            1_600 + jitter
        }
        Variant::OldTermAccepted => {
            draft.add(0, Fault::Isolate(leader));
            let at = 1_200 + jitter;
            draft.add(at, Fault::Cast);
            draft.add(at, Fault::HealNetwork);
            draft.add(at, Fault::Isolate(leader));
            at + 1_000
        }
        Variant::RotTakenForTornTail => {
            draft.add(0, Fault::Kill(second));
            for who in [leader, first] {
                draft.add(300, Fault::Rot(who));
                draft.add(320, Fault::LosePower(who));
                draft.add(500 + jitter, Fault::Start(who));
            }
            2_500
        }
        Variant::AppliedNotAtomic | Variant::SnapshotBeforeFlush => {
            draft.add(400 + jitter, Fault::LosePower(first));
            draft.add(700 + jitter, Fault::Start(first));
            900 + jitter
        }
        Variant::WipedNodeKeepsId => {
            draft.add(0, Fault::Isolate(second));
            draft.add(500 + jitter, Fault::WipeKeepingId(first));
            draft.add(500 + jitter, Fault::Kill(leader));
            draft.add(510 + jitter, Fault::HealNetwork);
            draft.add(520 + jitter, Fault::Start(first));
            2_600 + jitter
        }
        Variant::RetryAppliedTwice => {
            draft.add(0, Fault::Weather(15));
            draft.add(1_500, Fault::Weather(0));
            1_600
        }
        Variant::EpochUnchecked
        | Variant::HeadGoesBack
        | Variant::OwnClock
        | Variant::LeaseTakenEarly
        | Variant::SwapUnversioned
        | Variant::ReportForgotten
        | Variant::PlacementUnchecked => 1_500,
    }
}
