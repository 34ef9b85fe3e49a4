//! Proposals and log entries in encoded form, which is the same in the log and in Raft's messages.
//!
//! Whoever meets a proposal first, as the leader that proposes it or as a follower that receives it, has it decoded and encoded;
//! from there on both forms are shared: the log writes the encoded one, replication sends it, apply reads the decoded one.

use super::{LogEntry, LogId, TypeConfig, Vote};
use crate::state::command::Entry;
use bytes::Bytes;
use openraft::EntryPayload;
use openraft::raft::AppendEntriesRequest;
use postcard::ser_flavors::Flavor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::ops::Deref;
use std::sync::Arc;

/// Place of `EntryPayload::Normal` among the variants.
const NORMAL: u8 = 1;

/// Most proposals are no larger.
const USUAL_BYTES: usize = 512;

/// A proposal, decoded and encoded. Clones share both.
#[derive(Clone)]
pub struct Proposed {
    entry: Arc<Entry>,
    encoded: Bytes,
}

impl Deref for Proposed {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl Proposed {
    /// Encodes a proposal that takes about so many bytes.
    pub fn new(entry: Entry, bytes: usize) -> Self {
        let encoded = add(&entry, Vec::with_capacity(bytes));
        Self {
            entry: Arc::new(entry),
            encoded: encoded.into(),
        }
    }
}

impl From<Entry> for Proposed {
    fn from(entry: Entry) -> Self {
        Self::new(entry, USUAL_BYTES)
    }
}

impl std::fmt::Debug for Proposed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.entry.fmt(f)
    }
}

impl PartialEq for Proposed {
    fn eq(&self, other: &Self) -> bool {
        self.encoded == other.encoded
    }
}

impl Eq for Proposed {}

impl Serialize for Proposed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.entry.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Proposed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Entry::deserialize(deserializer).map(Self::from)
    }
}

/// What postcard writes, at the end of a vector; `postcard::to_extend` would do it byte by byte.
struct Tail(Vec<u8>);

impl Flavor for Tail {
    type Output = Vec<u8>;

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<Vec<u8>> {
        Ok(self.0)
    }
}

fn add<T: Serialize>(value: &T, out: Vec<u8>) -> Vec<u8> {
    postcard::serialize_with_flavor(value, Tail(out)).expect("plain data types always encode")
}

/// Appends an entry to `out`, byte for byte as postcard would.
pub fn encode_entry(entry: &LogEntry, mut out: Vec<u8>) -> Vec<u8> {
    out.reserve(encoded_bytes(entry));
    match &entry.payload {
        EntryPayload::Normal(proposed) => {
            let mut out = add(&entry.log_id, out);
            out.push(NORMAL);
            out.extend_from_slice(&proposed.encoded);
            out
        }
        EntryPayload::Blank | EntryPayload::Membership(_) => add(entry, out),
    }
}

/// About as many bytes as an entry has encoded; never much less.
fn encoded_bytes(entry: &LogEntry) -> usize {
    const OTHERS: usize = 512;
    match &entry.payload {
        EntryPayload::Normal(proposed) => proposed.encoded.len() + 32,
        EntryPayload::Blank | EntryPayload::Membership(_) => OTHERS,
    }
}

/// Reads forward through encoded bytes that values may go on sharing.
struct Reader<'a> {
    bytes: &'a Bytes,
    at: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    fn take<T: Deserialize<'a>>(&mut self) -> Result<T, postcard::Error> {
        let rest = self.rest();
        let (value, after) = postcard::take_from_bytes(rest)?;
        self.at += rest.len() - after.len();
        Ok(value)
    }

    fn entry(&mut self) -> Result<LogEntry, postcard::Error> {
        let from = self.at;
        let log_id: LogId = self.take()?;
        if self.rest().first() != Some(&NORMAL) {
            self.at = from;
            return self.take();
        }
        self.at += 1;
        let from = self.at;
        let entry = Arc::new(self.take()?);
        let encoded = self.bytes.slice(from..self.at);
        Ok(LogEntry {
            log_id,
            payload: EntryPayload::Normal(Proposed { entry, encoded }),
        })
    }
}

/// Reads one entry, which shares these bytes from then on. What follows it is not looked at.
///
/// # Errors
/// When it is no entry, or one with a command that is not known here.
pub fn decode_entry(bytes: &Bytes) -> Result<LogEntry, postcard::Error> {
    Reader { bytes, at: 0 }.entry()
}

/// Appends a request to `out`, byte for byte as postcard would.
pub fn encode_append(request: &AppendEntriesRequest<TypeConfig>, mut out: Vec<u8>) -> Vec<u8> {
    const HEAD: usize = 128;
    let entries = request.entries.iter().map(encoded_bytes);
    out.reserve(entries.sum::<usize>() + HEAD);
    let out = add(&(&request.vote, &request.prev_log_id), out);
    let mut out = add(&request.entries.len(), out);
    for entry in &request.entries {
        out = encode_entry(entry, out);
    }
    add(&request.leader_commit, out)
}

/// Reads a request, whose entries share these bytes from then on.
///
/// # Errors
/// When it is no such request.
pub fn decode_append(bytes: &Bytes) -> Result<AppendEntriesRequest<TypeConfig>, postcard::Error> {
    let mut reader = Reader { bytes, at: 0 };
    let vote: Vote = reader.take()?;
    let prev_log_id = reader.take()?;
    let count: usize = reader.take()?;
    // Each takes some bytes: no number that is only claimed is reserved for.
    let mut entries = Vec::with_capacity(count.min(reader.rest().len() / 4));
    for _ in 0..count {
        entries.push(reader.entry()?);
    }
    Ok(AppendEntriesRequest {
        vote,
        prev_log_id,
        entries,
        leader_commit: reader.take()?,
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::state::command::Command;
    use openraft::{BasicNode, CommittedLeaderId, Membership};
    use qsfs_proto::api::Verdict;
    use qsfs_zstor::id::BackendId;
    use std::collections::{BTreeMap, BTreeSet};

    fn entries() -> Vec<LogEntry> {
        let verdicts = |count: u64| {
            let all = (0..count).map(|id| (BackendId(id << 20), Verdict::Down));
            Entry::internal(count, Command::SetVerdicts(all.collect()))
        };
        let group = Command::Group(vec![verdicts(0), verdicts(1), verdicts(40)]);
        let nodes: BTreeMap<u64, BasicNode> =
            [(1, BasicNode::new("a:1")), (2, BasicNode::new("b:2"))].into();
        let membership = Membership::new(vec![BTreeSet::from([1])], nodes);
        let payloads = [
            EntryPayload::Blank,
            EntryPayload::Normal(verdicts(300).into()),
            EntryPayload::Membership(membership),
            EntryPayload::Normal(Entry::internal(9, group).into()),
        ];
        let ids = (200..).map(|index| LogId::new(CommittedLeaderId::new(7, 3), index));
        let entries = ids.zip(payloads);
        entries
            .map(|(log_id, payload)| LogEntry { log_id, payload })
            .collect()
    }

    fn request(entries: Vec<LogEntry>) -> AppendEntriesRequest<TypeConfig> {
        AppendEntriesRequest {
            vote: Vote::new_committed(7, 3),
            prev_log_id: Some(LogId::new(CommittedLeaderId::new(7, 3), 199)),
            entries,
            leader_commit: None,
        }
    }

    #[test]
    fn entries_are_encoded_as_postcard_encodes_them_and_read_back() {
        for entry in entries() {
            let plain = postcard::to_stdvec(&entry).unwrap();
            let quick = encode_entry(&entry, Vec::new());
            assert_eq!(quick, plain);
            assert_eq!(decode_entry(&quick.into()).unwrap(), entry);
            assert_eq!(postcard::from_bytes::<LogEntry>(&plain).unwrap(), entry);
        }
    }

    #[test]
    fn requests_are_encoded_as_postcard_encodes_them_and_read_back() {
        for request in [request(entries()), request(Vec::new())] {
            let plain = postcard::to_stdvec(&request).unwrap();
            let quick = Bytes::from(encode_append(&request, Vec::new()));
            assert_eq!(quick, plain);
            let read = decode_append(&quick).unwrap();
            assert_eq!(read.entries, request.entries);
            // What it shares with the message is what it would encode itself.
            assert_eq!(encode_append(&read, Vec::new()), plain);
        }
    }

    #[test]
    fn what_is_cut_short_or_claims_too_much_is_refused() {
        let whole = Bytes::from(encode_append(&request(entries()), Vec::new()));
        for length in 0..whole.len() {
            assert!(decode_append(&whole.slice(..length)).is_err(), "{length}");
        }
        let head = add(&(&Vote::new_committed(7, 3), &None::<LogId>), Vec::new());
        let greedy = add(&usize::MAX, head);
        assert!(decode_append(&greedy.into()).is_err());
    }
}
