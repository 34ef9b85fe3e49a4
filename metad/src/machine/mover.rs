//! Moves rows from memory into blocks. Every block that changes is written once, under a new page; nothing that is in use is ever
//! written over.
//!
//! ```text
//! f            format, u32
//! p + id       a block of rows, or a segment of the directory
//! r + part     the root: written last, in one batch; with it the move has happened
//! ```
//!
//! Until the root is written, the new pages mean nothing; behind it, the old ones. So the pages may go to the store in small
//! batches, for which no reader waits long, and a crash anywhere leaves the state as it was before the move or after it.

use super::block::{self, BLOCK_BYTES};
use super::directory::{Directory, Entry, Position};
use crate::ground::Store;
use crate::state::kv::{self, Batch, KvError, Pair, RowKey};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Format of what is below: the one that is written, and the newest that is known.
pub(super) const FORMAT: u32 = 2;

/// Bytes written to the store in one batch: readers of the store wait for one.
const WRITE_BYTES: usize = 256 << 10;

/// Pages read at once.
const SCAN_PAGES: usize = 256;

/// Pages removed in one batch.
const REMOVE_PAGES: usize = 512;

/// Name of the format's page.
pub(super) const FORMAT_PAGE: &[u8] = b"f";

/// First byte of the names of root parts.
pub(super) const ROOT: u8 = b'r';

/// First byte of the names of pages.
pub(super) const PAGE: u8 = b'p';

pub(super) fn page_name(id: u64) -> RowKey {
    let mut name = RowKey::from_slice(&[PAGE]);
    name.extend_from_slice(&id.to_be_bytes());
    name
}

fn root_name(part: u32) -> RowKey {
    let mut name = RowKey::from_slice(&[ROOT]);
    name.extend_from_slice(&part.to_be_bytes());
    name
}

/// A page that must be there.
pub(super) fn page(store: &dyn Store, id: u64) -> Result<Vec<u8>, KvError> {
    let page = store.get(&page_name(id)).map_err(KvError::of_read)?;
    page.ok_or_else(|| KvError::Damaged(format!("page {id} is missing")))
}

/// Shows all pages whose name begins with `prefix`, in the order of their names, until `visit` answers false.
pub(super) fn scan(
    store: &dyn Store,
    prefix: &[u8],
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<bool, KvError>,
) -> Result<(), KvError> {
    let until = kv::prefix_end(prefix);
    let mut from = RowKey::from_slice(prefix);
    loop {
        let pages = store.range(&from, &until, SCAN_PAGES)?;
        for (name, page) in &pages {
            if !visit(name, page)? {
                return Ok(());
            }
        }
        match pages.last() {
            Some((last, _)) if pages.len() == SCAN_PAGES => from = kv::after(last),
            _ => return Ok(()),
        }
    }
}

/// One change of a row.
type Change<'a> = (&'a [u8], Option<&'a [u8]>);

/// Who moves.
#[derive(Debug, Default)]
pub(super) struct Mover {
    /// Of the next page.
    pub(super) next_id: u64,
    /// Root parts there are.
    pub(super) root_parts: u32,
    /// Pages no directory names any more; copies under way may.
    pub(super) freed: Vec<u64>,
}

/// One move under way.
struct Move<'a> {
    store: &'a dyn Store,
    next_id: &'a mut u64,
    pending: Batch,
    pending_bytes: usize,
    edits: Vec<(RowKey, Option<u64>)>,
    freed: Vec<u64>,
}

impl Move<'_> {
    fn new_id(&mut self) -> u64 {
        let id = *self.next_id;
        *self.next_id += 1;
        id
    }

    fn write(&mut self, id: u64, page: Vec<u8>) -> Result<(), KvError> {
        self.pending_bytes += page.len();
        self.pending.insert(page_name(id), Some(page));
        if self.pending_bytes >= WRITE_BYTES {
            self.write_pending()?;
        }
        Ok(())
    }

    fn write_pending(&mut self) -> Result<(), KvError> {
        self.pending_bytes = 0;
        if self.pending.is_empty() {
            return Ok(());
        }
        self.store.write(&std::mem::take(&mut self.pending))
    }

    /// Puts rows in the place of blocks.
    fn replace(&mut self, old: &[&Entry], rows: &[Pair]) -> Result<(), KvError> {
        let mut edits: BTreeMap<RowKey, Option<u64>> = BTreeMap::new();
        for entry in old {
            edits.insert(RowKey::from_slice(&entry.first), None);
            self.freed.push(entry.id);
        }
        for (first, block) in block::encode(rows) {
            let id = self.new_id();
            self.write(id, block)?;
            edits.insert(first, Some(id));
        }
        self.edits.extend(edits);
        Ok(())
    }
}

impl Mover {
    /// Moves layers, oldest first, into the blocks of a directory. What the old directory names stays readable until
    /// [`Self::reclaim`].
    pub(super) fn move_over(
        &mut self,
        store: &dyn Store,
        directory: &Directory,
        layers: &[Arc<Batch>],
    ) -> Result<Directory, KvError> {
        let newest = newest_changes(layers);
        let mut changes: &[Change<'_>] = &newest;
        let mut moving = Move {
            store,
            next_id: &mut self.next_id,
            pending: Batch::new(),
            pending_bytes: 0,
            edits: Vec::new(),
            freed: Vec::new(),
        };
        while let Some((key, _)) = changes.first() {
            let at = directory.position(key);
            let (mut rows, altered) = changed_block(store, directory, at, &mut changes)?;
            let next = at.and_then(|at| directory.next(at));
            let mut old: Vec<_> = at.map(|at| directory.at(at)).into_iter().collect();
            match altered {
                Altered::Not => continue,
                Altered::Grew => {}
                // What is left joins the block behind it, so that many deletions do not leave many small blocks.
                Altered::Shrank if small(&rows) => {
                    if let Some(next) = next {
                        let (more, _) = changed_block(store, directory, Some(next), &mut changes)?;
                        rows.extend(more);
                        old.push(directory.at(next));
                    }
                }
                Altered::Shrank => {}
            }
            moving.replace(&old, &rows)?;
        }
        if moving.edits.is_empty() {
            return Ok(directory.clone());
        }
        let edits = std::mem::take(&mut moving.edits);
        let edited = directory.edited(&edits, || moving.new_id())?;
        for (id, page) in edited.written {
            moving.write(id, page)?;
        }
        moving.write_pending()?;
        let mut freed = moving.freed;
        freed.extend(edited.freed);
        store.write(&self.root(&edited.directory))?;
        self.freed.extend(freed);
        Ok(edited.directory)
    }

    fn root(&mut self, directory: &Directory) -> Batch {
        let parts = directory.root();
        let mut batch: Batch = (0..self.root_parts)
            .map(|part| (root_name(part), None))
            .collect();
        self.root_parts = 0;
        for part in parts {
            batch.insert(root_name(self.root_parts), Some(part));
            self.root_parts += 1;
        }
        batch
    }

    /// Removes the pages that were freed. The caller knows that nobody reads an older directory.
    pub(super) fn reclaim(&mut self, store: &dyn Store) -> Result<(), KvError> {
        for ids in std::mem::take(&mut self.freed).chunks(REMOVE_PAGES) {
            let gone = ids.iter().map(|id| (page_name(*id), None));
            store.write(&gone.collect())?;
        }
        Ok(())
    }
}

fn newest_changes(layers: &[Arc<Batch>]) -> Vec<Change<'_>> {
    fn changes(layer: &Arc<Batch>) -> impl Iterator<Item = Change<'_>> {
        layer.iter().map(|(k, v)| (k.as_slice(), v.as_deref()))
    }
    match layers {
        [only] => changes(only).collect(),
        _ => {
            let all: BTreeMap<_, _> = layers.iter().flat_map(changes).collect();
            all.into_iter().collect()
        }
    }
}

/// What changes did to a block.
enum Altered {
    Not,
    Grew,
    Shrank,
}

/// The rows of a block (of none: an empty one) with the changes that fall into it, which are taken off `changes`.
fn changed_block(
    store: &dyn Store,
    directory: &Directory,
    at: Option<Position>,
    changes: &mut &[Change<'_>],
) -> Result<(Vec<Pair>, Altered), KvError> {
    let until = at
        .and_then(|at| directory.next(at))
        .map(|next| &directory.at(next).first);
    let mine = until.map_or(changes.len(), |until| {
        changes.partition_point(|(key, _)| *key < &**until)
    });
    let (here, behind) = changes.split_at(mine);
    *changes = behind;
    let old = match at {
        Some(at) => block::decode(&page(store, directory.at(at).id)?)?,
        None => Vec::new(),
    };
    let before = old.len();
    let mut altered = false;
    let mut rows = Vec::with_capacity(before + here.len());
    let mut old = old.into_iter().peekable();
    for (key, value) in here {
        while let Some(row) = old.next_if(|(k, _)| k.as_slice() < *key) {
            rows.push(row);
        }
        let known = old.next_if(|(k, _)| k.as_slice() == *key);
        altered |= known.as_ref().map(|(_, v)| v.as_slice()) != *value;
        rows.extend(value.map(|value| (RowKey::from_slice(key), value.to_vec())));
    }
    rows.extend(old);
    let altered = match altered {
        false => Altered::Not,
        true if rows.len() < before => Altered::Shrank,
        true => Altered::Grew,
    };
    Ok((rows, altered))
}

/// Less than a quarter of a block.
fn small(rows: &[Pair]) -> bool {
    let bytes = rows.iter().map(|(key, value)| key.len() + value.len());
    bytes.sum::<usize>() < BLOCK_BYTES / 4
}
