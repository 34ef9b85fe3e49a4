//! Which block holds which rows: the first key of every block, in memory, in segments that copies share.
//!
//! ```text
//! root parts -> segments (a block of `first key -> segment id`) -> blocks (a block of `first key -> block id`)
//! ```
//!
//! A directory never changes: a changed one shares all segments that are equal with the one before it. So a copy of the state is
//! a matter of holding on to a directory, and a change reaches the store by writing new pages under new ids and then the root.

use super::block;
use crate::state::kv::{KvError, Pair, RowKey};
use std::sync::Arc;

/// A block.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its first key.
    pub first: Box<[u8]>,
    /// Its page.
    pub id: u64,
}

/// A run of blocks, itself kept in a page.
#[derive(Debug)]
pub struct Segment {
    /// Its page.
    pub id: u64,
    /// Never empty, in key order.
    pub entries: Vec<Entry>,
}

/// All blocks, in key order. The first one holds also what is below its first key.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    segments: Vec<Arc<Segment>>,
}

/// Where a block stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    segment: usize,
    entry: usize,
}

/// A changed directory, and what of it is to be written.
#[derive(Debug)]
pub struct Edited {
    /// The new directory.
    pub directory: Directory,
    /// Its new segments: page id and content.
    pub written: Vec<(u64, Vec<u8>)>,
    /// Pages of segments that are no more.
    pub freed: Vec<u64>,
}

fn number(value: &[u8]) -> Result<u64, KvError> {
    let bytes = value.try_into();
    let bytes = bytes.map_err(|_| KvError::Damaged("a page number is not one".into()))?;
    Ok(u64::from_le_bytes(bytes))
}

/// `first key -> page` pairs as a segment.
fn segment(id: u64, rows: Vec<Pair>) -> Result<Segment, KvError> {
    let entries = rows.into_iter().map(|(first, value)| {
        Ok(Entry {
            first: first.into_boxed_slice(),
            id: number(&value)?,
        })
    });
    Ok(Segment {
        id,
        entries: entries.collect::<Result<_, KvError>>()?,
    })
}

impl Directory {
    /// Reads a directory: from its root parts, in order, and a way to get its segments.
    pub fn load(
        parts: &[Vec<u8>],
        mut page: impl FnMut(u64) -> Result<Vec<u8>, KvError>,
    ) -> Result<Self, KvError> {
        let mut segments = Vec::new();
        for part in parts {
            for (_, value) in block::decode(part)? {
                let id = number(&value)?;
                segments.push(Arc::new(segment(id, block::decode(&page(id)?)?)?));
            }
        }
        let directory = Self { segments };
        let firsts = directory.entries().map(|entry| &entry.first);
        if !firsts.is_sorted_by(|a, b| a < b) {
            return Err(KvError::Damaged("its directory is not in order".into()));
        }
        Ok(directory)
    }

    /// The root, as parts.
    pub fn root(&self) -> Vec<Vec<u8>> {
        let pair = |segment: &Arc<Segment>| {
            let first = segment
                .entries
                .first()
                .map(|entry| RowKey::from_slice(&entry.first));
            Some((first?, segment.id.to_le_bytes().to_vec()))
        };
        let rows: Vec<Pair> = self.segments.iter().filter_map(pair).collect();
        if rows.is_empty() {
            return Vec::new();
        }
        block::encode(&rows).into_iter().map(|(_, p)| p).collect()
    }

    /// All blocks, in key order.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.segments.iter().flat_map(|segment| &segment.entries)
    }

    /// Pages of the segments.
    pub fn segment_ids(&self) -> impl Iterator<Item = u64> {
        self.segments.iter().map(|segment| segment.id)
    }

    /// Blocks.
    pub fn len(&self) -> usize {
        self.segments.iter().map(|s| s.entries.len()).sum()
    }

    /// No block at all.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The block that holds a key, if any does.
    pub fn position(&self, key: &[u8]) -> Option<Position> {
        let at = |segment: usize| self.segments[segment].entries.as_slice();
        let segment = self
            .segments
            .partition_point(|segment| *segment.entries[0].first <= *key)
            .saturating_sub(1);
        if self.segments.is_empty() {
            return None;
        }
        let entry = at(segment)
            .partition_point(|entry| *entry.first <= *key)
            .saturating_sub(1);
        Some(Position { segment, entry })
    }

    /// A block.
    pub fn at(&self, position: Position) -> &Entry {
        &self.segments[position.segment].entries[position.entry]
    }

    /// The one behind it.
    pub fn next(&self, position: Position) -> Option<Position> {
        let Position { segment, entry } = position;
        if entry + 1 < self.segments[segment].entries.len() {
            let entry = entry + 1;
            Some(Position { segment, entry })
        } else if segment + 1 < self.segments.len() {
            let segment = segment + 1;
            Some(Position { segment, entry: 0 })
        } else {
            None
        }
    }

    /// The directory with other blocks: per first key, in order, the block's new page, or none.
    pub fn edited(
        &self,
        edits: &[(RowKey, Option<u64>)],
        mut new_id: impl FnMut() -> u64,
    ) -> Result<Edited, KvError> {
        let mut edited = Edited {
            directory: Self::default(),
            written: Vec::new(),
            freed: Vec::new(),
        };
        let segments = &mut edited.directory.segments;
        let mut rest = edits;
        let count = self.segments.len().max(1);
        for index in 0..count {
            let old = self.segments.get(index);
            let until = self.segments.get(index + 1).map(|s| &s.entries[0].first);
            let mine = until.map_or(rest.len(), |until| {
                rest.partition_point(|(key, _)| key.as_slice() < &**until)
            });
            let (here, behind) = rest.split_at(mine);
            rest = behind;
            if here.is_empty() {
                segments.extend(old.cloned());
                continue;
            }
            let mut rows: std::collections::BTreeMap<RowKey, u64> = old
                .iter()
                .flat_map(|old| &old.entries)
                .map(|entry| (RowKey::from_slice(&entry.first), entry.id))
                .collect();
            for (key, id) in here {
                match id {
                    Some(id) => rows.insert(key.clone(), *id),
                    None => rows.remove(key),
                };
            }
            edited.freed.extend(old.map(|old| old.id));
            let rows: Vec<Pair> = rows
                .into_iter()
                .map(|(key, id)| (key, id.to_le_bytes().to_vec()))
                .collect();
            if rows.is_empty() {
                continue;
            }
            for (_, page) in block::encode(&rows) {
                let id = new_id();
                segments.push(Arc::new(segment(id, block::decode(&page)?)?));
                edited.written.push((id, page));
            }
        }
        Ok(edited)
    }
}
