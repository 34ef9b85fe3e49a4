//! The one place where metad asks `zstor::placement`: at commit, at creation, for rebuilds and moves.

use qsfs_proto::api::{Backend, Intent, PlacementAnswer, Verdict};
use qsfs_proto::status::LossBudget;
use qsfs_zstor::id::BackendId;
use qsfs_zstor::piece::PIECE_HEADER_BYTES;
use qsfs_zstor::placement::{self, Candidate, Site, Survival, Survive};
use qsfs_zstor::policy::Policy;
use qsfs_zstor::record::EncodingRecord;
use std::collections::BTreeMap;

/// Backends by id.
#[derive(Debug, Clone, Default)]
pub struct SiteMap {
    backends: BTreeMap<BackendId, Backend>,
}

impl SiteMap {
    /// From the replicated backends.
    pub fn new(backends: Vec<Backend>) -> Self {
        let backends = backends.into_iter().map(|b| (b.id, b)).collect();
        Self { backends }
    }

    /// One backend.
    pub fn backend(&self, id: BackendId) -> Option<&Backend> {
        self.backends.get(&id)
    }

    /// All, by id.
    pub fn backends(&self) -> impl Iterator<Item = &Backend> {
        self.backends.values()
    }

    fn site(&self, id: BackendId) -> Option<Site> {
        self.backends.get(&id).map(site)
    }
}

fn site(backend: &Backend) -> Site {
    Site {
        backend: backend.id,
        location: backend.location.clone(),
        node: backend.node.clone(),
    }
}

/// A backend as a candidate with so many free bytes.
pub fn candidate(backend: &Backend, free_bytes: u64) -> Candidate {
    Candidate {
        backend: backend.id,
        location: backend.location.clone(),
        node: backend.node.clone(),
        free_bytes,
    }
}

/// What a record survives if only these of its shards count; `None`: it is unreadable.
pub fn survival(
    record: &EncodingRecord,
    sites: &SiteMap,
    counts: impl Fn(usize) -> bool,
) -> Option<Survival> {
    let places: Vec<_> = (0..)
        .zip(&record.shards)
        .map(|(index, shard)| counts(index).then(|| sites.site(shard.backend)).flatten())
        .collect();
    placement::survival(record.geometry, &places)
}

/// As status shows it.
pub fn budget(survival: Option<Survival>) -> LossBudget {
    survival.map_or(LossBudget::default(), |survival| LossBudget {
        locations: survival.locations,
        nodes: survival.nodes,
        backends: survival.backends,
    })
}

/// The policy's survival rules hold.
pub fn holds(policy: &Policy, survival: Option<Survival>) -> bool {
    survival.is_some_and(|survival| placement::holds(policy, &survival))
}

/// How many shards a record has on each of its backends, by id.
pub fn per_backend(record: &EncodingRecord) -> Vec<(BackendId, u64)> {
    let mut counts: Vec<_> = record.shards.iter().map(|s| (s.backend, 1)).collect();
    counts.sort_unstable();
    counts.dedup_by(|next, first| {
        let same = next.0 == first.0;
        first.1 += u64::from(same);
        same
    });
    counts
}

/// Losing any one backend leaves at least `k` shards: without it nothing is committed or swapped.
pub fn survives_one_backend(record: &EncodingRecord) -> bool {
    let most = per_backend(record).iter().map(|(_, shards)| *shards).max();
    most.unwrap_or(0) <= record.geometry.parity() as u64
}

/// May a volume with this policy be created on the backends that joined? The error says what is missing.
pub fn check_creation(policy: &Policy, backends: &[Backend]) -> Result<(), String> {
    let candidates: Vec<_> = backends
        .iter()
        .filter(|b| b.intent == Intent::Serve && b.verdict != Verdict::Lost)
        .map(|backend| candidate(backend, u64::MAX))
        .collect();
    let survive = Survive {
        locations: policy.survive_locations,
        nodes: policy.survive_nodes,
    };
    placement::strictly_meets(policy.geometry, survive, &candidates).map(drop)
}

/// Where the shards of a new stripe go, on backends that are up or may soon be again.
pub fn place_new(
    policy: &Policy,
    shard_bytes: u64,
    candidates: &[Candidate],
) -> Result<PlacementAnswer, String> {
    placement::choose(policy, policy.geometry, shard_bytes, candidates, &[])
        .map(|placement| PlacementAnswer {
            backends: placement.backends,
            full_policy: placement.full_policy,
            missing: placement.missing,
        })
        .map_err(|unplaceable| unplaceable.missing)
}

/// Bytes a shard takes on its backend: pieces with their headers.
pub fn stored_shard_bytes(record: &EncodingRecord) -> u64 {
    let pieces = record
        .shard_bytes
        .div_ceil(u64::from(record.piece_bytes.max(1)));
    record.shard_bytes + pieces * PIECE_HEADER_BYTES as u64
}
