#![expect(clippy::unwrap_used, reason = "tests")]
//! `apply` against facts and against a naive model.

mod facts;
mod model;

use super::command::{Command, Entry, Genesis, MemberRow, Request};
use super::known::Known;
use super::kv::MemoryKv;
use super::{Outcome, State, apply};
use qsfs_proto::api::{Applied, BackendAddress, ClusterSettings, Mutation, VolumeSettings};
use qsfs_zstor::id::{
    AgentId, BackendId, ClientId, ClusterId, DatafileId, Epoch, KeyId, MetadId, Salt, ShardHash,
    Stream, VolumeId,
};
use qsfs_zstor::policy::{Geometry, Policy};
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};

/// A state machine in memory, with its own clock and client.
pub(crate) struct Twin {
    pub(crate) kv: MemoryKv,
    pub(crate) now_ms: u64,
    sequence: u64,
    /// Everything that was applied.
    log: Vec<Entry>,
}

pub(crate) const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);

pub(crate) fn client(number: u8) -> ClientId {
    ClientId::from_bytes([number; 16])
}

pub(crate) fn policy() -> Policy {
    Policy {
        geometry: Geometry::new(2, 2).unwrap(),
        survive_locations: 1,
        survive_nodes: 1,
    }
}

pub(crate) fn record(datafile: u64, stream: Stream, backends: &[u64]) -> EncodingRecord {
    let shards = backends.iter().map(|backend| Shard {
        backend: BackendId(*backend),
        hash: ShardHash::from_bytes([1; 32]),
        state: ShardState::Stored,
    });
    EncodingRecord {
        volume: VOLUME,
        datafile: DatafileId(datafile),
        stream,
        epoch: Epoch(1),
        salt: Salt::from_bytes([u8::try_from(datafile % 251).unwrap(); 16]),
        geometry: policy().geometry,
        chunk_bytes: 1 << 20,
        plain_bytes: 100,
        object_bytes: 200,
        shard_bytes: 100,
        piece_bytes: 1 << 20,
        shards: shards.collect(),
        version: 0,
    }
}

pub(crate) fn request(number: u8, sequence: u64) -> Request {
    Request {
        client: client(number),
        session: 1,
        sequence,
        oldest_pending: sequence.saturating_sub(3),
    }
}

/// What a cluster begins with.
pub(crate) fn genesis() -> Command {
    Command::Initialize(Genesis {
        cluster: ClusterId::from_bytes([1; 16]),
        ca_pem: "ca".into(),
        settings: ClusterSettings::default(),
        member: MemberRow {
            id: MetadId(1),
            name: "m1".parse().unwrap(),
            location: "loc1".parse().unwrap(),
            address: "a:1".into(),
            removed: false,
        },
        tokens: vec![],
    })
}

impl Twin {
    /// A cluster with one agent per location and two backends each, ids 1..=4, and a volume at 2+2.
    pub(crate) fn new() -> Self {
        let mut twin = Self {
            kv: MemoryKv::default(),
            now_ms: 1_000,
            sequence: 0,
            log: Vec::new(),
        };
        twin.internal(genesis()).unwrap();
        for location in ["loc1", "loc2"] {
            let agent = twin.register_agent(location, "n1");
            for namespace in ["a", "b"] {
                twin.register_backend(agent, namespace);
            }
        }
        let created = Mutation::CreateVolume {
            id: VOLUME,
            name: "dev".parse().unwrap(),
            policy: policy(),
            key_id: KeyId::from_bytes([3; 16]),
            settings: VolumeSettings::default(),
        };
        twin.mutate(created).unwrap();
        twin
    }

    pub(crate) fn register_agent(&mut self, location: &str, node: &str) -> AgentId {
        let mutation = Mutation::RegisterAgent {
            location: location.parse().unwrap(),
            node: node.parse().unwrap(),
        };
        match self.mutate(mutation).unwrap() {
            Applied::Agent(id) => id,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn register_backend(&mut self, agent: AgentId, namespace: &str) -> BackendId {
        let mutation = Mutation::RegisterBackend {
            agent,
            address: BackendAddress {
                endpoint: format!("host-{agent}:9900"),
                namespace: namespace.into(),
                password: None,
                tls: true,
            },
            capacity_bytes: 1 << 40,
        };
        match self.mutate(mutation).unwrap() {
            Applied::Backend(id) => id,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn apply(&mut self, entry: &Entry) -> Outcome {
        let mut state = State::new(&self.kv);
        let outcome = apply(&mut state, entry).unwrap();
        let (batch, _) = state.into_changes();
        self.kv.commit(batch);
        self.log.push(entry.clone());
        outcome
    }

    /// What the same entries lead to when a view sees so many of them, and hands on what it knows.
    pub(crate) fn replayed(&self, in_a_view: usize) -> MemoryKv {
        let mut kv = MemoryKv::default();
        let mut known = Known::default();
        for entries in self.log.chunks(in_a_view) {
            let mut state = State::noting(&kv, known);
            for entry in entries {
                drop(apply(&mut state, entry).unwrap());
            }
            known = state.take_known();
            let (batch, _) = state.into_changes();
            kv.commit(batch);
        }
        kv
    }

    pub(crate) fn internal(&mut self, command: Command) -> Outcome {
        self.apply(&Entry::internal(self.now_ms, command))
    }

    pub(crate) fn mutate(
        &mut self,
        mutation: Mutation,
    ) -> Result<Applied, qsfs_proto::api::MetadError> {
        self.sequence += 1;
        let entry = Entry {
            time_ms: self.now_ms,
            request: Some(request(99, self.sequence)),
            command: Command::Mutation(mutation),
        };
        self.apply(&entry).map(|reply| match reply {
            super::command::Reply::Applied(applied) => applied,
            other => panic!("{other:?}"),
        })
    }

    pub(crate) fn acquire(&mut self, number: u8, takeover: bool) -> Result<Epoch, ()> {
        let mutation = Mutation::AcquireLease {
            volume: VOLUME,
            client: client(number),
            holder: format!("host:{number}"),
            takeover,
        };
        match self.mutate(mutation) {
            Ok(Applied::Epoch(epoch)) => Ok(epoch),
            Ok(other) => panic!("{other:?}"),
            Err(_) => Err(()),
        }
    }

    pub(crate) fn state(&self) -> State<&MemoryKv> {
        State::new(&self.kv)
    }
}
