//! A namespace as row batches (a checkpoint), and back.
//!
//! A batch is `version (1) | (key length u16 LE, value length u32 LE, key, value)*`, about 256 KiB. The meta row is
//! part of it, so that a loaded namespace knows its applied sequence; while loading it is written last, so that an
//! interrupted load is noticed when the namespace is opened.

use super::rows::{self, META_KEY, Meta};
use super::table::{Layer, Table, TableError};
use super::{Namespace, NamespaceError};
use fjall::Slice;

/// Version byte of a batch.
const BATCH_VERSION: u8 = 1;
/// A batch is closed at this size.
const BATCH_BYTES: usize = 256 << 10;
/// Longest batch accepted: one row of the largest size may follow a nearly full batch.
pub const BATCH_BYTES_MAX: usize = 4 << 20;

/// A consistent dump, taken while writes go on.
pub struct Snapshot {
    sequence: u64,
    rows: fjall::Iter,
    ended: bool,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot")
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

impl Snapshot {
    pub(super) fn new(sequence: u64, table: &Table) -> Self {
        Self {
            sequence,
            rows: table.snapshot(),
            ended: false,
        }
    }

    /// The last operation it contains; the journal goes on with the next.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }
}

impl Iterator for Snapshot {
    type Item = Result<Vec<u8>, NamespaceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let mut batch = vec![BATCH_VERSION];
        while batch.len() < BATCH_BYTES {
            let Some(row) = self.rows.next() else {
                self.ended = true;
                break;
            };
            match row.into_inner() {
                Ok((key, value)) => push(&mut batch, &key, &value),
                Err(source) => {
                    self.ended = true;
                    return Some(Err(TableError::Storage {
                        step: "read the snapshot",
                        source,
                    }
                    .into()));
                }
            }
        }
        (batch.len() > 1).then_some(Ok(batch))
    }
}

fn push(batch: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let key_bytes = u16::try_from(key.len()).expect("keys are an id and a name of 255 bytes");
    let value_bytes = u32::try_from(value.len()).expect("values are at most 64 KiB");
    batch.extend_from_slice(&key_bytes.to_le_bytes());
    batch.extend_from_slice(&value_bytes.to_le_bytes());
    batch.extend_from_slice(key);
    batch.extend_from_slice(value);
}

fn split(batch: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (key_bytes, rest) = batch.split_first_chunk::<2>()?;
    let (value_bytes, rest) = rest.split_first_chunk::<4>()?;
    let (key, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes(*key_bytes)))?;
    let value_bytes = usize::try_from(u32::from_le_bytes(*value_bytes)).ok()?;
    let (value, rest) = rest.split_at_checked(value_bytes)?;
    Some((key, value, rest))
}

/// Fills a namespace from a checkpoint. Dropped before [`Loader::finish`], it leaves a namespace that refuses to open.
#[derive(Debug)]
pub struct Loader<'a> {
    namespace: &'a Namespace,
    meta: Option<Slice>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(namespace: &'a Namespace) -> Self {
        Self {
            namespace,
            meta: None,
        }
    }

    /// Adds one batch. Batches come in the order of the snapshot.
    pub fn rows(&mut self, batch: &[u8]) -> Result<(), NamespaceError> {
        let mut rest = match batch.split_first() {
            Some((&BATCH_VERSION, rest)) if batch.len() <= BATCH_BYTES_MAX => rest,
            Some((&version, _)) => return Err(NamespaceError::Batch { version }),
            None => return Err(NamespaceError::Batch { version: 0 }),
        };
        let mut layer = Layer::new();
        while !rest.is_empty() {
            let (key, value, after) =
                split(rest).ok_or(NamespaceError::Checkpoint("a batch is cut short"))?;
            if key == META_KEY {
                self.meta = Some(value.into());
            } else {
                layer.insert(key.to_vec(), Some(value.into()));
            }
            rest = after;
        }
        self.namespace.table.check()?;
        self.namespace.table.commit(layer);
        Ok(())
    }

    /// All rows are there. Answers the applied sequence, which must be the one the checkpoint was announced with.
    pub fn finish(self) -> Result<u64, NamespaceError> {
        let meta = self
            .meta
            .ok_or(NamespaceError::Checkpoint("it has no meta row"))?;
        self.namespace.table.flush()?;
        let decoded: Meta = rows::decode(META_KEY, &meta).map_err(TableError::from)?;
        self.namespace
            .table
            .commit(Layer::from([(META_KEY.to_vec(), Some(meta))]));
        self.namespace.table.flush()?;
        self.namespace.table.persist()?;
        self.namespace.adopt(decoded);
        Ok(decoded.applied_sequence)
    }
}
