//! The shards a rebuild reads from: which is asked for the next row, and what is learned of them.
//!
//! Invariants: what a row returns are verified payloads of exactly the pieces asked for; a survivor that answered
//! wrong or not at all is replaced by another one for that row and asked last from then on.

use crate::store::{PieceStore, StoreError, Stores};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use qsfs_proto::api::ShardReport;
use qsfs_zstor::codec::{ShardHashes, Stripe};
use qsfs_zstor::id::BackendId;
use qsfs_zstor::piece::{PIECE_HEADER_BYTES, PieceHeader, verify_piece};
use qsfs_zstor::record::{EncodingRecord, ShardState};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Why a piece is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PieceProblem {
    /// The backend does not have it.
    #[error("missing")]
    Missing,
    /// It does not verify.
    #[error("corrupt ({0})")]
    Corrupt(String),
    /// The backend cannot be asked.
    #[error("unavailable ({0})")]
    Unavailable(String),
}

impl PieceProblem {
    /// What metad is to be told; `None` when nothing is known of the piece.
    pub(crate) fn finding(&self) -> Option<ShardState> {
        match self {
            Self::Missing => Some(ShardState::Missing),
            Self::Corrupt(_) => Some(ShardState::Corrupt),
            Self::Unavailable(_) => None,
        }
    }
}

/// Checks that a stored value is the wanted piece, whole and unharmed.
pub(crate) fn check_value(
    got: Result<Option<Bytes>, StoreError>,
    stripe: &Stripe,
    shard: u32,
    piece: u32,
) -> Result<(PieceHeader, Bytes), PieceProblem> {
    let value = match got {
        Ok(Some(value)) => value,
        Ok(None) => return Err(PieceProblem::Missing),
        Err(StoreError::Corrupt(why)) => return Err(PieceProblem::Corrupt(why)),
        Err(error) => return Err(PieceProblem::Unavailable(error.to_string())),
    };
    let corrupt = |error: qsfs_zstor::piece::PieceError| PieceProblem::Corrupt(error.to_string());
    let (header, _) = verify_piece(&value).map_err(corrupt)?;
    header.expect(stripe, shard, piece).map_err(corrupt)?;
    Ok((header, value.slice(PIECE_HEADER_BYTES..)))
}

struct Source {
    shard: u32,
    backend: BackendId,
    rank: u8,
    store: Arc<dyn PieceStore>,
}

#[derive(Default)]
struct Learned {
    /// Failed rows by shard; those with many are asked last.
    failures: BTreeMap<u32, u32>,
    findings: BTreeMap<u32, ShardState>,
    excluded: Vec<u32>,
}

/// The survivors of one stripe.
pub(crate) struct Survivors {
    stripe: Stripe,
    record: EncodingRecord,
    wanted: u32,
    sources: Vec<Source>,
    learned: Mutex<Learned>,
    seen: Mutex<ShardHashes>,
}

/// Payloads of one row, by shard.
pub(crate) type Row = Vec<(usize, Bytes)>;

impl Survivors {
    /// All shards of the record that may be read, the wanted one's old copy included when `own_copy`.
    pub(crate) fn new(
        record: &EncodingRecord,
        stripe: Stripe,
        wanted: u32,
        stores: &Stores,
    ) -> Self {
        let mut sources = Vec::new();
        for (index, shard) in (0u32..).zip(&record.shards) {
            // A shard that was reported may still have good pieces: it is asked, but last.
            let doubt = if shard.state == ShardState::Stored {
                0
            } else {
                4
            };
            if let Some((rank, store)) = stores.source(shard.backend) {
                sources.push(Source {
                    shard: index,
                    backend: shard.backend,
                    rank: rank + doubt,
                    store,
                });
            }
        }
        Self {
            stripe,
            record: record.clone(),
            wanted,
            sources,
            learned: Mutex::new(Learned::default()),
            seen: Mutex::new(ShardHashes::new(&stripe)),
        }
    }

    /// The wanted shard's own piece, if its old copy still has it unharmed.
    pub(crate) async fn fetch_own(&self, row: u32) -> Option<Row> {
        let source = self
            .sources
            .iter()
            .find(|source| source.shard == self.wanted)?;
        if self.learned.lock().excluded.contains(&self.wanted) {
            return None;
        }
        match self.fetch(source, row).await {
            Ok(payload) => Some(vec![(source.shard as usize, payload)]),
            Err(PieceProblem::Unavailable(_)) => {
                // It would cost a deadline for every row.
                self.exclude(self.wanted);
                None
            }
            Err(_) => None,
        }
    }

    /// Pieces of any `k` other shards.
    pub(crate) async fn fetch_row(&self, row: u32) -> Result<Row, String> {
        let needed = self.stripe.layout().geometry().data();
        let mut candidates = self.order().into_iter();
        let mut asked = FuturesUnordered::new();
        let mut good: Row = Vec::with_capacity(needed);
        let mut problems = Vec::new();
        loop {
            while good.len() + asked.len() < needed {
                let Some(source) = candidates.next() else {
                    // Those under way are waited for, so that the message counts right.
                    while let Some((source, got)) = asked.next().await {
                        self.take(source, got, &mut good, &mut problems);
                    }
                    return Err(self.too_few(row, good.len(), &problems));
                };
                asked.push(async move { (source, self.fetch(source, row).await) });
            }
            match asked.next().await {
                Some((source, got)) => self.take(source, got, &mut good, &mut problems),
                None => return Ok(good),
            }
        }
    }

    fn take(
        &self,
        source: &Source,
        got: Result<Bytes, PieceProblem>,
        good: &mut Row,
        problems: &mut Vec<String>,
    ) {
        match got {
            Ok(payload) => good.push((source.shard as usize, payload)),
            Err(problem) => {
                self.learn(source.shard, &problem);
                problems.push(format!(
                    "shard {} on backend {}: {problem}",
                    source.shard, source.backend
                ));
            }
        }
    }

    fn too_few(&self, row: u32, good: usize, problems: &[String]) -> String {
        let needed = self.stripe.layout().geometry().data();
        let known = self
            .sources
            .iter()
            .filter(|source| source.shard != self.wanted)
            .count();
        format!(
            "row {row}: {good} good shards of {needed} needed; {known} survivors have a reachable place{}{}",
            if problems.is_empty() { "" } else { "; " },
            problems.join("; ")
        )
    }

    async fn fetch(&self, source: &Source, row: u32) -> Result<Bytes, PieceProblem> {
        let key = self.stripe.piece_key(source.shard, row).to_bytes();
        let got = source.store.get(&key).await;
        let (header, payload) = check_value(got, &self.stripe, source.shard, row)?;
        self.seen.lock().add(&header);
        Ok(payload)
    }

    fn order(&self) -> Vec<&Source> {
        let learned = self.learned.lock();
        let mut order: Vec<&Source> = self
            .sources
            .iter()
            .filter(|source| {
                source.shard != self.wanted && !learned.excluded.contains(&source.shard)
            })
            .collect();
        order.sort_by_key(|source| {
            let failures = learned.failures.get(&source.shard).copied().unwrap_or(0);
            (failures, source.rank, source.shard)
        });
        order
    }

    fn learn(&self, shard: u32, problem: &PieceProblem) {
        let mut learned = self.learned.lock();
        *learned.failures.entry(shard).or_default() += 1;
        if let Some(finding) = problem.finding() {
            learned.findings.entry(shard).or_insert(finding);
        }
    }

    /// Does not use a shard again; false when it was not used anyway.
    pub(crate) fn exclude(&self, shard: u32) -> bool {
        let mut learned = self.learned.lock();
        let used = self.sources.iter().any(|source| source.shard == shard)
            && !learned.excluded.contains(&shard);
        learned.excluded.push(shard);
        used
    }

    /// After a rebuild whose hash is wrong: the shards whose pieces are sound each, but together not what was committed.
    /// They are excluded and reported; true when there are any.
    pub(crate) fn find_liars(&self) -> bool {
        let seen = self.seen.lock();
        let mut learned = self.learned.lock();
        let before = learned.excluded.len();
        for (index, shard) in (0u32..).zip(&self.record.shards) {
            let lies = seen
                .shard(index as usize)
                .is_some_and(|hash| hash != shard.hash);
            if lies && !learned.excluded.contains(&index) {
                learned.excluded.push(index);
                learned.findings.insert(index, ShardState::Corrupt);
            }
        }
        learned.excluded.len() > before
    }

    /// What metad does not know yet: survivors that turned out bad.
    pub(crate) fn reports(&self) -> Vec<ShardReport> {
        let learned = self.learned.lock();
        let news = learned.findings.iter().filter(|(shard, _)| {
            **shard != self.wanted
                && self.record.shards[**shard as usize].state == ShardState::Stored
        });
        news.map(|(shard, state)| ShardReport {
            volume: self.record.volume,
            datafile: self.record.datafile,
            shard: *shard,
            backend: self.record.shards[*shard as usize].backend,
            state: *state,
            by_scrub: false,
        })
        .collect()
    }
}
