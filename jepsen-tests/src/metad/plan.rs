//! Which fault when: a pure function of the seed, the kinds and the time there is.

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A family of faults, as a person chooses them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Packets between nodes are lost.
    Partition,
    /// kill -9, and a new start.
    Kill,
    /// SIGSTOP, and SIGCONT.
    Stop,
    /// The disk of a node is full for a while.
    Disk,
    /// Nodes join, leave and are replaced.
    Members,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 5] = [
        Self::Partition,
        Self::Kill,
        Self::Stop,
        Self::Disk,
        Self::Members,
    ];

    fn faults(self) -> Vec<Fault> {
        let whom = [Whom::Leader, Whom::Follower];
        let each = |fault: fn(Whom) -> Fault| whom.into_iter().map(fault);
        match self {
            Self::Partition => each(Fault::Alone)
                .chain(each(Fault::Deaf))
                .chain(each(Fault::Mute))
                .chain([Fault::Bridge, Fault::Unreached(Whom::Leader)])
                .collect(),
            Self::Kill => each(Fault::Kill).chain([Fault::KillAll]).collect(),
            Self::Stop => each(Fault::Stop).collect(),
            Self::Disk => each(Fault::FullDisk).collect(),
            Self::Members => vec![Fault::FiveVoters, Fault::Replace],
        }
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kind| kind.to_string() == text);
        found.ok_or_else(|| format!("{text:?} is none of partition, kill, stop, disk, members"))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Partition => "partition",
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Disk => "disk",
            Self::Members => "members",
        })
    }
}

/// Whom it hits; who leads is seen when it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whom {
    /// The leader of that moment.
    Leader,
    /// One that does not lead.
    Follower,
}

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Cut off from the other nodes, in both directions; clients still reach it.
    Alone(Whom),
    /// Does not hear the other nodes.
    Deaf(Whom),
    /// Is not heard by the other nodes.
    Mute(Whom),
    /// Two nodes do not hear each other; both hear the rest. Each has a majority around it.
    Bridge,
    /// Half of the clients do not reach it.
    Unreached(Whom),
    /// kill -9.
    Kill(Whom),
    /// kill -9 of all at once.
    KillAll,
    /// SIGSTOP.
    Stop(Whom),
    /// Not a byte is left on its disk.
    FullDisk(Whom),
    /// Two more nodes join until there are five voters; at the end they leave.
    FiveVoters,
    /// A node dies with its disk, is removed, and joins again as a new one.
    Replace,
}

impl Fault {
    /// It changes the packets that go through, and nothing else.
    pub fn is_cut(self) -> bool {
        matches!(
            self,
            Self::Alone(_) | Self::Deaf(_) | Self::Mute(_) | Self::Bridge | Self::Unreached(_)
        )
    }

    fn is_membership(self) -> bool {
        matches!(self, Self::FiveVoters | Self::Replace)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Faults that begin together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// One, or two of different kinds.
    pub faults: Vec<Fault>,
    /// How long.
    pub lasts: Duration,
    /// Quiet time after it.
    pub pause: Duration,
}

/// Shortest and longest fault, in milliseconds: below and well above the time in which a leader is replaced.
const LASTS_MS: std::ops::Range<u64> = 800..4_500;
/// Quiet time.
const PAUSE_MS: std::ops::Range<u64> = 1_000..3_000;
/// Rough time that a change of members takes besides.
const MEMBERS: Duration = Duration::from_secs(12);
/// One step in so many has two faults.
const COMBINED: f64 = 0.3;

/// All faults of the kinds: first one of each kind, then the second ones, so that a short run has some of all.
fn deck(rng: &mut StdRng, kinds: &[Kind]) -> Vec<Fault> {
    let mut by_kind: Vec<Vec<Fault>> = kinds.iter().map(|kind| kind.faults()).collect();
    for faults in &mut by_kind {
        faults.shuffle(rng);
    }
    let mut deck = Vec::new();
    while by_kind.iter().any(|faults| !faults.is_empty()) {
        by_kind.shuffle(rng);
        deck.extend(by_kind.iter_mut().filter_map(Vec::pop));
    }
    // Dealt from the end.
    deck.reverse();
    deck
}

/// Steps that fill `total`. Every fault of the kinds comes before any comes again.
pub fn plan(seed: u64, kinds: &[Kind], total: Duration) -> Vec<Step> {
    let mut rng = StdRng::seed_from_u64(seed);
    let all: Vec<Fault> = kinds.iter().flat_map(|kind| kind.faults()).collect();
    let mut deck: Vec<Fault> = Vec::new();
    let mut steps = Vec::new();
    let mut used = Duration::ZERO;
    while used < total && !all.is_empty() {
        if deck.is_empty() {
            deck = self::deck(&mut rng, kinds);
        }
        let Some(fault) = deck.pop() else { break };
        let mut faults = vec![fault];
        if rng.random_bool(COMBINED) && !fault.is_membership() {
            // A cut and something else: two cuts would be one, two of the others might leave no majority for long.
            let others: Vec<_> = all
                .iter()
                .filter(|other| other.is_cut() != fault.is_cut() && !other.is_membership())
                .collect();
            faults.extend(others.choose(&mut rng).copied().copied());
        }
        let lasts = Duration::from_millis(rng.random_range(LASTS_MS));
        let pause = Duration::from_millis(rng.random_range(PAUSE_MS));
        used += lasts + pause;
        if fault.is_membership() {
            used += MEMBERS;
        }
        steps.push(Step {
            faults,
            lasts,
            pause,
        });
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_is_the_same_plan_and_every_fault_comes() {
        let long = Duration::from_secs(300);
        let steps = plan(7, &Kind::ALL, long);
        assert_eq!(steps, plan(7, &Kind::ALL, long));
        assert_ne!(steps, plan(8, &Kind::ALL, long));
        for fault in Kind::ALL.iter().flat_map(|kind| kind.faults()) {
            assert!(steps.iter().any(|step| step.faults[0] == fault), "{fault}");
        }
        assert!(steps.iter().any(|step| step.faults.len() == 2));
    }

    #[test]
    fn a_short_run_has_some_of_all_kinds() {
        for seed in 0..20 {
            let steps = plan(seed, &Kind::ALL, Duration::from_secs(60));
            for kind in Kind::ALL {
                let faults = kind.faults();
                assert!(
                    steps
                        .iter()
                        .take(5)
                        .any(|step| faults.contains(&step.faults[0]))
                );
            }
        }
    }

    #[test]
    fn only_what_was_chosen_comes() {
        for step in plan(1, &[Kind::Stop], Duration::from_secs(30)) {
            assert!(matches!(step.faults[..], [Fault::Stop(_)]), "{step:?}");
        }
        assert_eq!(plan(1, &[], Duration::from_secs(30)), []);
    }

    #[test]
    fn kinds_are_read_as_they_are_written() {
        for kind in Kind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("fire".parse::<Kind>().is_err());
    }
}
