//! Makes entries: a cluster's first ones, then commits of records.

use anyhow::{Result, bail};
use openraft::{CommittedLeaderId, EntryPayload};
use qsfs_metad::machine::Machine;
use qsfs_metad::raft::{LogEntry, LogId};
use qsfs_metad::state::command::{Command, Entry, Reply, Request};
use qsfs_metad::state::records::COMMIT_RECORDS_MAX;
use qsfs_proto::api::{Applied, BackendAddress, Mutation, VolumeSettings};
use qsfs_zstor::id::{
    AgentId, BackendId, ClientId, DatafileId, Epoch, KeyId, Salt, ShardHash, Stream, VolumeId,
};
use qsfs_zstor::policy::{Geometry, Policy};
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};
use std::time::{SystemTime, UNIX_EPOCH};

/// The volume of all records.
pub(crate) const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);
/// Backends, at two locations; a record is on four of them.
const BACKENDS: usize = 12;
/// Callers that take turns.
const SESSIONS: u64 = 64;

/// Where the next entry goes, and what it holds.
pub(crate) struct Loader {
    index: u64,
    term: u64,
    datafile: u64,
    sequence: u64,
    epoch: Epoch,
    backends: Vec<BackendId>,
    /// Hashes and salts do not compress: neither do the real ones.
    random: u64,
}

impl Loader {
    /// Agents, backends, a volume and its lease, behind what is applied.
    pub(crate) fn new(machine: &Machine) -> Result<Self> {
        let applied = machine.raft_row().applied;
        let mut loader = Self {
            index: applied.map_or(0, |id| id.index),
            term: applied.map_or(1, |id| id.leader_id.term),
            datafile: 0,
            sequence: 0,
            epoch: Epoch(0),
            backends: Vec::new(),
            random: 0x2545_f491_4f6c_dd1d,
        };
        for location in ["loc1", "loc2"] {
            let register = Mutation::RegisterAgent {
                location: location.parse()?,
                node: "n1".parse()?,
            };
            let Applied::Agent(agent) = loader.run(machine, register)? else {
                bail!("an agent was not answered with its id");
            };
            for number in 0..BACKENDS / 2 {
                let register = backend(agent, location, number);
                match loader.run(machine, register)? {
                    Applied::Backend(backend) => loader.backends.push(backend),
                    other => bail!("a backend was answered {other:?}"),
                }
            }
        }
        let create = Mutation::CreateVolume {
            id: VOLUME,
            name: "scale".parse()?,
            policy: Policy {
                geometry: Geometry::new(2, 2)?,
                survive_locations: 1,
                survive_nodes: 1,
            },
            key_id: KeyId::from_bytes([3; 16]),
            settings: VolumeSettings::default(),
        };
        loader.run(machine, create)?;
        let lease = Mutation::AcquireLease {
            volume: VOLUME,
            client: ClientId::from_bytes([1; 16]),
            holder: "scale:1".into(),
            takeover: false,
        };
        match loader.run(machine, lease)? {
            Applied::Epoch(epoch) => loader.epoch = epoch,
            other => bail!("a lease was answered {other:?}"),
        }
        Ok(loader)
    }

    /// Records so far.
    pub(crate) fn records(&self) -> u64 {
        self.datafile
    }

    fn run(&mut self, machine: &Machine, mutation: Mutation) -> Result<Applied> {
        let entry = self.entry(Entry::internal(now_ms(), Command::Mutation(mutation)));
        let (mut responses, _) = machine.apply(vec![entry])?;
        match responses.pop().and_then(|response| response.0) {
            Some(Ok(Reply::Applied(applied))) => Ok(applied),
            other => bail!("answered {other:?}"),
        }
    }

    fn entry(&mut self, entry: Entry) -> LogEntry {
        self.index += 1;
        LogEntry {
            log_id: LogId::new(CommittedLeaderId::new(self.term, 1), self.index),
            payload: EntryPayload::Normal(entry.into()),
        }
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        for part in bytes.chunks_mut(8) {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            part.copy_from_slice(&self.random.to_le_bytes()[..part.len()]);
        }
        bytes
    }

    fn record(&mut self) -> EncodingRecord {
        self.datafile += 1;
        let half = self.backends.len() / 2;
        let turn = usize::try_from(self.datafile).unwrap_or(0);
        // Two at each location.
        let mut shards = Vec::with_capacity(4);
        for number in 0..4 {
            shards.push(Shard {
                backend: self.backends[number / 2 * half + (turn + number % 2) % half],
                hash: ShardHash::from_bytes(self.bytes()),
                state: ShardState::Stored,
            });
        }
        EncodingRecord {
            volume: VOLUME,
            datafile: DatafileId(self.datafile),
            stream: Stream::Data,
            epoch: self.epoch,
            salt: Salt::from_bytes(self.bytes()),
            geometry: Geometry::new(2, 2).expect("two and two is a geometry"),
            chunk_bytes: 1 << 20,
            plain_bytes: 64 << 20,
            object_bytes: 64 << 20,
            shard_bytes: 32 << 20,
            piece_bytes: 1 << 20,
            shards,
            version: 0,
        }
    }

    fn commit(&mut self, records: usize) -> Command {
        let records = (0..records).map(|_| self.record()).collect();
        Command::Mutation(Mutation::CommitDatafiles {
            volume: VOLUME,
            epoch: self.epoch,
            records,
            head: None,
        })
    }

    /// An entry with as many records as fit.
    pub(crate) fn bulk(&mut self) -> LogEntry {
        let command = self.commit(COMMIT_RECORDS_MAX);
        self.entry(Entry::internal(now_ms(), command))
    }

    /// An entry with so many commits of one record, of callers in turn.
    pub(crate) fn commits(&mut self, group: u64) -> LogEntry {
        let mut entries: Vec<_> = (0..group).map(|_| self.single()).collect();
        let entry = match entries.len() {
            1 => entries.remove(0),
            _ => Entry::internal(now_ms(), Command::Group(entries)),
        };
        self.entry(entry)
    }

    fn single(&mut self) -> Entry {
        let (sequence, session) = (self.sequence / SESSIONS, self.sequence % SESSIONS);
        self.sequence += 1;
        Entry {
            time_ms: now_ms(),
            request: Some(Request {
                client: ClientId::from_bytes([1; 16]),
                session,
                sequence,
                oldest_pending: sequence,
            }),
            command: self.commit(1),
        }
    }
}

fn backend(agent: AgentId, location: &str, number: usize) -> Mutation {
    Mutation::RegisterBackend {
        agent,
        address: BackendAddress {
            endpoint: format!("{location}:9900"),
            namespace: format!("b{number}"),
            password: None,
            tls: true,
        },
        capacity_bytes: 1 << 60,
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(0))
}
