//! What one record survives now, and what it needs.

use crate::placing::{self, SiteMap};
use qsfs_proto::api::{Backend, Intent, Verdict};
use qsfs_proto::status::LossBudget;
use qsfs_zstor::policy::Policy;
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};

/// What is true of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShardHealth {
    /// Stored on a backend that answers.
    Live,
    /// Live, but its backend is being drained.
    Leaving,
    /// Its backend does not answer, and may come back.
    Absent,
    /// Reported missing or corrupt.
    Bad,
    /// Its backend is lost or retired.
    Gone,
}

impl ShardHealth {
    /// It can be read now.
    pub fn readable(self) -> bool {
        matches!(self, Self::Live | Self::Leaving)
    }

    /// It must be made again elsewhere (or in place, if only rotten).
    pub fn needs_rebuild(self) -> bool {
        matches!(self, Self::Leaving | Self::Bad | Self::Gone)
    }
}

/// The health of a shard, given its backend.
pub fn shard_health(shard: &Shard, backend: Option<&Backend>) -> ShardHealth {
    let Some(backend) = backend else {
        return ShardHealth::Gone;
    };
    if backend.intent == Intent::Retire || backend.verdict == Verdict::Lost {
        return ShardHealth::Gone;
    }
    if shard.state != ShardState::Stored {
        return ShardHealth::Bad;
    }
    match (backend.verdict, backend.intent) {
        (Verdict::Down, _) => ShardHealth::Absent,
        (_, Intent::Drain) => ShardHealth::Leaving,
        _ => ShardHealth::Live,
    }
}

/// A record in a few bytes, for an index of all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Assessment {
    /// What may still be lost.
    pub budget: LossBudget,
    /// Readable shards beyond `k`; negative: unreadable.
    pub spare: i8,
    /// Its survival rules do not hold with what is readable now.
    pub below_policy: bool,
    /// Fewer than `k` shards are readable.
    pub unreadable: bool,
    /// Shards to make again.
    pub to_rebuild: u8,
    /// Of them, reported missing or corrupt.
    pub bad: u8,
    /// The rules would not hold even if every shard were well where it is: moves may help.
    pub misplaced: bool,
}

impl Assessment {
    /// Re-silver has something to do, or to try.
    pub fn needs_work(&self) -> bool {
        self.to_rebuild > 0 || self.misplaced
    }
}

/// Assesses a record.
pub fn assess(record: &EncodingRecord, policy: &Policy, sites: &SiteMap) -> Assessment {
    let health: Vec<_> = record
        .shards
        .iter()
        .map(|shard| shard_health(shard, sites.backend(shard.backend)))
        .collect();
    let count = |test: fn(ShardHealth) -> bool| health.iter().filter(|h| test(**h)).count();
    let small = |count: usize| i8::try_from(count).expect("at most 64 shards");
    let readable = count(ShardHealth::readable);
    let now = placing::survival(record, sites, |index| health[index].readable());
    let later = placing::survival(record, sites, |_| true);
    Assessment {
        budget: placing::budget(now),
        spare: small(readable) - small(record.geometry.data()),
        below_policy: !placing::holds(policy, now),
        unreadable: readable < record.geometry.data(),
        to_rebuild: small(count(ShardHealth::needs_rebuild)).unsigned_abs(),
        bad: small(count(|h| h == ShardHealth::Bad)).unsigned_abs(),
        misplaced: !placing::holds(policy, later),
    }
}
