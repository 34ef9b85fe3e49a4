//! Reading a range of an object: which pieces to fetch, what to fetch instead when some do not answer, and the bytes.
//!
//! ```text
//! needed() -> fetch -> supply(piece) | fail(piece) | fail_shard(shard) -> needed() ... empty -> assemble()
//! ```
//!
//! Pure: the caller fetches, waits and verifies; the plan only says what. When all is well only the pieces of data shards that
//! hold the range are asked for; for a row with a failed piece, as many others as reconstruction needs.

use crate::codec::coder::StripeCoder;
use crate::codec::layout::{Layout, PieceSlice};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// A piece by its place in the stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PieceRef {
    /// Shard.
    pub shard: usize,
    /// Piece of the shard, which is the row.
    pub piece: u32,
}

/// More pieces of a row failed than the stripe has parity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("row {row} has {usable} usable shards, {needed} are needed; failed: {failed:?}")]
pub struct TooFewShards {
    /// Row.
    pub row: u32,
    /// Shards not failed.
    pub usable: usize,
    /// `k`.
    pub needed: usize,
    /// Shards that failed in this row.
    pub failed: Vec<usize>,
}

/// The read of one object range.
pub struct ReadPlan {
    layout: Layout,
    range: Range<u64>,
    slices: Vec<PieceSlice>,
    /// Shards in the order in which they are asked when one must be replaced.
    order: Vec<usize>,
    got: BTreeMap<PieceRef, Bytes>,
    failed: BTreeSet<PieceRef>,
    failed_shards: BTreeSet<usize>,
}

impl ReadPlan {
    /// For a range of the object; what lies past its end is left out.
    pub fn new(layout: &Layout, range: Range<u64>) -> Self {
        let end = range.end.min(layout.object_bytes());
        let range = range.start.min(end)..end;
        Self {
            layout: *layout,
            slices: layout.locate(range.clone()),
            range,
            order: (0..layout.geometry().total()).collect(),
            got: BTreeMap::new(),
            failed: BTreeSet::new(),
            failed_shards: BTreeSet::new(),
        }
    }

    /// Which shards to prefer as replacements: the lowest cost first (a near location, a quick backend), then the lowest
    /// index. Shards of which a piece of the row is there or asked for anyway always come first.
    pub fn prefer(&mut self, cost: impl Fn(usize) -> u64) {
        self.order.sort_by_key(|shard| (cost(*shard), *shard));
    }

    /// The pieces to fetch now: empty when [`ReadPlan::assemble`] can go on.
    pub fn needed(&self) -> Result<Vec<PieceRef>, TooFewShards> {
        let mut needed = Vec::new();
        for (row, direct) in self.rows() {
            let missing = |shard: &usize| {
                !self.got.contains_key(&PieceRef {
                    shard: *shard,
                    piece: row,
                })
            };
            if direct.iter().all(|shard| !self.is_failed(*shard, row)) {
                needed.extend(
                    direct
                        .iter()
                        .filter(|shard| missing(shard))
                        .map(|shard| PieceRef {
                            shard: *shard,
                            piece: row,
                        }),
                );
                continue;
            }
            let sources = self.sources(row, &direct)?;
            needed.extend(
                sources
                    .iter()
                    .filter(|shard| missing(shard))
                    .map(|shard| PieceRef {
                        shard: *shard,
                        piece: row,
                    }),
            );
        }
        Ok(needed)
    }

    /// A verified payload. One that has not the piece's length counts as failed.
    pub fn supply(&mut self, piece: PieceRef, payload: Bytes) {
        if payload.len() == self.layout.piece_len(piece.piece) {
            self.got.insert(piece, payload);
        } else {
            self.failed.insert(piece);
        }
    }

    /// This piece cannot be had: missing, damaged, or too late.
    pub fn fail(&mut self, piece: PieceRef) {
        if !self.got.contains_key(&piece) {
            self.failed.insert(piece);
        }
    }

    /// No (further) piece of this shard can be had: its backend is down.
    pub fn fail_shard(&mut self, shard: usize) {
        self.failed_shards.insert(shard);
    }

    /// The bytes of the range. Panics when [`ReadPlan::needed`] is not empty.
    pub fn assemble(&self) -> Vec<u8> {
        let bytes =
            usize::try_from(self.range.end - self.range.start).expect("a range that was asked for");
        let mut out = vec![0; bytes];
        for (row, direct) in self.rows() {
            let lost: Vec<usize> = direct
                .iter()
                .copied()
                .filter(|shard| self.payload(*shard, row).is_none())
                .collect();
            let window = self.window(row, &lost);
            let made = self.reconstruct(row, &lost, window.clone());
            for slice in self.slices.iter().filter(|slice| slice.piece == row) {
                let at = usize::try_from(slice.offset).expect("within the range");
                let to = &mut out[at..at + slice.range.len()];
                match lost.iter().position(|shard| *shard == slice.shard) {
                    None => {
                        let payload = self.payload(slice.shard, row).expect("not lost");
                        to.copy_from_slice(&payload[slice.range.clone()]);
                    }
                    Some(index) => {
                        let start = slice.range.start - window.start;
                        to.copy_from_slice(&made[index][start..start + slice.range.len()]);
                    }
                }
            }
        }
        out
    }

    fn payload(&self, shard: usize, row: u32) -> Option<&Bytes> {
        self.got.get(&PieceRef { shard, piece: row })
    }

    fn is_failed(&self, shard: usize, row: u32) -> bool {
        let piece = PieceRef { shard, piece: row };
        !self.got.contains_key(&piece)
            && (self.failed.contains(&piece) || self.failed_shards.contains(&shard))
    }

    /// Rows of the range, and the data shards of each that hold a part of it.
    fn rows(&self) -> BTreeMap<u32, BTreeSet<usize>> {
        let mut rows = BTreeMap::<u32, BTreeSet<usize>>::new();
        for slice in &self.slices {
            rows.entry(slice.piece).or_default().insert(slice.shard);
        }
        rows
    }

    /// `k` shards to reconstruct a row from: those there, then those that are asked for anyway, then by preference.
    fn sources(&self, row: u32, direct: &BTreeSet<usize>) -> Result<Vec<usize>, TooFewShards> {
        let needed = self.layout.geometry().data();
        let mut usable: Vec<usize> = self
            .order
            .iter()
            .copied()
            .filter(|shard| !self.is_failed(*shard, row))
            .collect();
        if usable.len() < needed {
            let failed =
                (0..self.layout.geometry().total()).filter(|shard| self.is_failed(*shard, row));
            return Err(TooFewShards {
                row,
                usable: usable.len(),
                needed,
                failed: failed.collect(),
            });
        }
        usable.sort_by_key(|shard| (self.payload(*shard, row).is_none(), !direct.contains(shard)));
        // Direct pieces that have not failed are needed in any case, beyond k if so many others came first.
        let extra: Vec<usize> = usable[needed..]
            .iter()
            .copied()
            .filter(|shard| direct.contains(shard))
            .collect();
        usable.truncate(needed);
        usable.extend(extra);
        Ok(usable)
    }

    /// The bytes of the row's pieces that must be reconstructed: all slices of lost shards.
    fn window(&self, row: u32, lost: &[usize]) -> Range<usize> {
        let slices = self
            .slices
            .iter()
            .filter(|slice| slice.piece == row && lost.contains(&slice.shard));
        let (mut start, mut end) = (usize::MAX, 0);
        for slice in slices {
            start = start.min(slice.range.start);
            end = end.max(slice.range.end);
        }
        start..end
    }

    fn reconstruct(&self, row: u32, lost: &[usize], window: Range<usize>) -> Vec<Vec<u8>> {
        if lost.is_empty() {
            return Vec::new();
        }
        let total = 0..self.layout.geometry().total();
        let present: Vec<(usize, &[u8])> = total
            .filter_map(|shard| Some((shard, &self.payload(shard, row)?[window.clone()])))
            .collect();
        StripeCoder::new(self.layout.geometry())
            .reconstruct(&present, lost)
            .expect("needed() was empty: k payloads of one length are there")
    }
}
