//! How rows are keyed and encoded: one table byte, then fixed-width big-endian parts, so that byte order is the order of
//! the nouns. Values are one format byte and postcard.

use super::State;
use super::kv::{Kv, KvError, RowKey, prefix_end};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::RefCell;

/// Format byte in front of every value.
pub const ROW_VERSION: u8 = 1;

/// Rows read at once while walking a table.
pub const PAGE_ROWS: usize = 512;

/// The first byte of every key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Table {
    /// `agent id -> Agent`.
    Agent = b'a',
    /// `location 0 node -> agent id`.
    AgentName = b'A',
    /// `backend id -> Backend`.
    Backend = b'b',
    /// `backend id -> BackendLoad`.
    BackendLoad = b'B',
    /// Singletons: settings, cluster, counters, log time, rot.
    Single = b'c',
    /// `volume id -> ()`: deleted volumes whose records are not all tombstones yet.
    Doomed = b'D',
    /// `client, session, sequence -> Outcome`.
    Answer = b'e',
    /// `client, session -> Session`.
    Session = b'E',
    /// `backend, volume, datafile, shard -> ()`.
    RecordByBackend = b'i',
    /// `metad id -> MemberRow`.
    Member = b'm',
    /// `volume name -> volume id`.
    VolumeName = b'n',
    /// `volume, datafile -> EncodingRecord`.
    Record = b'r',
    /// `token hash -> Token`.
    Token = b't',
    /// `volume, datafile, salt -> Tombstone`.
    Tombstone = b'd',
    /// `backend, due, volume, datafile, salt, shard -> ()`.
    TombstoneDue = b'u',
    /// `volume id -> Volume`.
    Volume = b'v',
    /// `volume id -> VolumeTotals`.
    VolumeTotals = b'V',
}

/// A key under construction.
#[derive(Debug, Clone)]
pub struct Key(RowKey);

impl Key {
    /// Starts with the table byte.
    pub fn of(table: Table) -> Self {
        Self(RowKey::from_slice(&[table as u8]))
    }

    /// Appends bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Appends a number, big-endian.
    #[must_use]
    pub fn number(mut self, number: u64) -> Self {
        self.0.extend_from_slice(&number.to_be_bytes());
        self
    }

    /// Appends a shard index (`< SHARDS_MAX`, so a byte suffices).
    #[must_use]
    pub fn shard(mut self, shard: u32) -> Self {
        self.0
            .push(u8::try_from(shard).expect("shard indexes are below 64"));
        self
    }

    /// The finished key.
    pub fn done(self) -> RowKey {
        self.0
    }
}

/// Encodes a value.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    thread_local! {
        /// Rows are put together here, so that the one that is kept has just the bytes it needs.
        static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.clear();
        scratch.push(ROW_VERSION);
        let encoded = postcard::to_io(value, &mut *scratch);
        encoded.expect("plain data types always encode");
        scratch.as_slice().to_vec()
    })
}

/// Decodes a value that was stored under `key`.
pub fn decode<T: DeserializeOwned>(key: &[u8], value: &[u8]) -> Result<T, KvError> {
    let bad = |reason: String| KvError::Row {
        key: key.iter().map(|byte| format!("{byte:02x}")).collect(),
        reason,
    };
    match value.split_first() {
        Some((&ROW_VERSION, body)) => {
            postcard::from_bytes(body).map_err(|error| bad(error.to_string()))
        }
        Some((version, _)) => Err(bad(format!("format {version} is not known here"))),
        None => Err(bad("empty value".into())),
    }
}

/// Is the row of a noun that may be watched ([`qsfs_proto::watch`])?
pub fn is_watched(key: &[u8]) -> bool {
    const NOUNS: [u8; 3] = [
        Table::Backend as u8,
        Table::Record as u8,
        Table::Volume as u8,
    ];
    key.first().is_some_and(|table| NOUNS.contains(table)) || super::settings::is_settings(key)
}

/// The big-endian number at `offset` of a key.
pub fn number_at(key: &[u8], offset: usize) -> Result<u64, KvError> {
    array_at::<8>(key, offset).map(u64::from_be_bytes)
}

/// The fixed bytes at `offset` of a key.
pub fn array_at<const N: usize>(key: &[u8], offset: usize) -> Result<[u8; N], KvError> {
    key.get(offset..offset + N)
        .and_then(|part| part.try_into().ok())
        .ok_or_else(|| KvError::Row {
            key: key.iter().map(|byte| format!("{byte:02x}")).collect(),
            reason: "key is too short".into(),
        })
}

impl<K: Kv> State<K> {
    /// A decoded row.
    pub(crate) fn row<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, KvError> {
        let mut row = None;
        self.look(key, &mut |value| row = Some(decode(key, value)))?;
        row.transpose()
    }

    /// Writes a row.
    pub(crate) fn put_row<T: Serialize>(&mut self, key: RowKey, value: &T) {
        self.put(key, encode(value));
    }

    /// All rows of a table whose key begins with `prefix`.
    pub(crate) fn rows<T: DeserializeOwned>(&self, prefix: &[u8]) -> Result<Vec<T>, KvError> {
        let until = prefix_end(prefix);
        let mut rows = Vec::new();
        let mut from = RowKey::from_slice(prefix);
        loop {
            let page = self.range(&from, &until, PAGE_ROWS)?;
            for (key, value) in &page {
                rows.push(decode(key, value)?);
            }
            match page.last() {
                Some((last, _)) if page.len() == PAGE_ROWS => from = super::kv::after(last),
                _ => return Ok(rows),
            }
        }
    }
}
