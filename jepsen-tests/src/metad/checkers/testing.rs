//! Histories written by hand, for the tests of the checkers.

use crate::metad::final_state::{FinalState, FinalVolume, salt_of};
use crate::metad::history::{
    Datafile, Event, Failure, HeadSeen, Kind, Operation, Reason, VolumeSeen,
};
use qsfs_zstor::id::{BackendId, DatafileId, Epoch, ShardHash, Stream, VolumeId};
use qsfs_zstor::policy::{Geometry, Policy};
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};
use std::collections::HashMap;

/// A history under construction; every event comes a millisecond after the last.
pub(crate) struct History {
    events: Vec<Event>,
    open: HashMap<u64, Event>,
}

impl History {
    pub(crate) fn new() -> Self {
        Self {
            events: Vec::new(),
            open: HashMap::new(),
        }
    }

    pub(crate) fn events(&self) -> &[Event] {
        &self.events
    }

    fn push(&mut self, mut event: Event) {
        event.time = (self.events.len() as u64 + 1) * 1_000_000;
        self.events.push(event);
    }

    pub(crate) fn ask(&mut self, process: u64, key: &str, operation: Operation) {
        let event = Event {
            process,
            kind: Kind::Invoke,
            operation,
            key: key.into(),
            time: 0,
            error: None,
            request: None,
        };
        self.open.insert(process, event.clone());
        self.push(event);
    }

    pub(crate) fn ask_as(&mut self, process: u64, key: &str, operation: Operation, name: &str) {
        self.ask(process, key, operation);
        let name = Some(name.to_owned());
        let last = self.events.last_mut().expect("just asked");
        last.request = name.clone();
        self.open.get_mut(&process).expect("just asked").request = name;
    }

    fn end(&mut self, process: u64, kind: Kind, operation: Option<Operation>) -> &mut Event {
        let asked = self.open.remove(&process).expect("it asked");
        let operation = operation.unwrap_or(asked.operation);
        self.push(Event {
            kind,
            operation,
            ..asked
        });
        self.events.last_mut().expect("just pushed")
    }

    pub(crate) fn ok(&mut self, process: u64, operation: Operation) {
        self.end(process, Kind::Ok, Some(operation));
    }

    pub(crate) fn unknown(&mut self, process: u64) {
        self.end(process, Kind::Unknown, None);
    }

    pub(crate) fn fail(&mut self, process: u64, reason: Reason, current: Option<u64>) {
        let failure = Failure {
            reason,
            current,
            text: "refused".into(),
        };
        self.end(process, Kind::Fail, None).error = Some(failure);
    }

    /// Asked and answered with nothing in between.
    pub(crate) fn done(&mut self, process: u64, operation: Operation) {
        self.ask(process, "v", asked(&operation));
        self.ok(process, operation);
    }

    /// A volume, and its first writer with epoch 1.
    pub(crate) fn with_writer() -> Self {
        let mut history = Self::new();
        history.done(0, Operation::CreateVolume { quota_bytes: 0 });
        history.done(0, acquired(0, 1));
        history
    }
}

/// An operation without its answer.
fn asked(operation: &Operation) -> Operation {
    let mut asked = operation.clone();
    match &mut asked {
        Operation::AcquireLease { epoch, .. } => *epoch = None,
        Operation::SwapShard { swapped, .. } => *swapped = None,
        Operation::ReadVolume { seen } => *seen = None,
        Operation::StaleRead { seen, age_ms } => (*seen, *age_ms) = (None, None),
        Operation::ListRecords { seen } => *seen = None,
        _ => {}
    }
    asked
}

pub(crate) fn acquire(client: u64) -> Operation {
    Operation::AcquireLease {
        client,
        takeover: true,
        epoch: None,
    }
}

pub(crate) fn acquired(client: u64, epoch: u64) -> Operation {
    Operation::AcquireLease {
        client,
        takeover: true,
        epoch: Some(epoch),
    }
}

pub(crate) fn commit(epoch: u64, id: u64, attempt: u64) -> Operation {
    Operation::CommitDatafiles {
        epoch,
        datafiles: vec![Datafile {
            id,
            attempt,
            meta: true,
        }],
        head: Some(HeadSeen {
            datafile: id,
            recover_from: 1,
        }),
    }
}

pub(crate) fn release(epoch: u64, id: u64) -> Operation {
    Operation::ReleaseDatafiles {
        epoch,
        datafiles: vec![id],
    }
}

pub(crate) fn quota(bytes: u64) -> Operation {
    Operation::SetQuota { bytes }
}

pub(crate) fn seen(epoch: u64, head: u64, quota_bytes: u64) -> VolumeSeen {
    VolumeSeen {
        epoch,
        held: epoch > 0,
        head: HeadSeen {
            datafile: head,
            recover_from: head.min(1),
        },
        quota_bytes,
    }
}

pub(crate) fn read(epoch: u64, head: u64, quota_bytes: u64) -> Operation {
    Operation::ReadVolume {
        seen: Some(seen(epoch, head, quota_bytes)),
    }
}

/// A record of two data and two parity shards on backends 1 to 4.
pub(crate) fn record(id: u64, attempt: u64) -> EncodingRecord {
    let shards = (1..=4).map(|backend| Shard {
        backend: BackendId(backend),
        hash: ShardHash::from_bytes([1; 32]),
        state: ShardState::Stored,
    });
    EncodingRecord {
        volume: VolumeId::from_bytes([9; 16]),
        datafile: DatafileId(id),
        stream: Stream::Meta,
        epoch: Epoch(1),
        salt: salt_of(attempt),
        geometry: Geometry::new(2, 2).expect("in range"),
        chunk_bytes: 1 << 20,
        plain_bytes: 100,
        object_bytes: 200,
        shard_bytes: 100,
        piece_bytes: 1 << 20,
        shards: shards.collect(),
        version: 0,
    }
}

/// The volume `v` at the end.
pub(crate) fn end(seen: VolumeSeen, records: Vec<EncodingRecord>) -> FinalState {
    let policy = Policy {
        geometry: Geometry::new(2, 2).expect("in range"),
        survive_locations: 1,
        survive_nodes: 1,
    };
    let volume = FinalVolume {
        policy,
        seen,
        records,
        below_policy: None,
    };
    FinalState {
        volumes: [("v".to_owned(), volume)].into(),
        ..FinalState::default()
    }
}
