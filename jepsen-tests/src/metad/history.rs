//! Histories: who asked what when, and what came back. One JSON object a line, which any other checker can read.
//!
//! ```text
//! {"process":3,"type":"invoke","f":"acquire_lease","value":{"client":3,"takeover":true,"epoch":null},"key":"v1","time":1200}
//! {"process":3,"type":"ok","f":"acquire_lease","value":{"client":3,"takeover":true,"epoch":7},"key":"v1","time":5200}
//! ```
//!
//! As in Jepsen's histories: a process does one thing at a time; `ok` took effect, `fail` certainly did not (`error` says why),
//! `unknown` may have or may still (Jepsen's `info`): its process never does anything again. A completion repeats what was
//! asked, with what was answered filled in. `key` is the volume: keys are independent of each other. `time` is in
//! nanoseconds since the beginning; the order of lines is the order in which things were seen to begin and end.

use qsfs_proto::api::MetadError;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How far a call got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It was asked.
    Invoke,
    /// It took effect.
    Ok,
    /// It had no effect and will have none.
    Fail,
    /// It may have had an effect, or have one later.
    Unknown,
}

/// A datafile in a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Datafile {
    /// Id within the volume.
    pub id: u64,
    /// Which encoding of it: the number that its salt begins with, unique in the history.
    pub attempt: u64,
    /// Of the stream `meta`.
    pub meta: bool,
}

/// A head as read or written.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct HeadSeen {
    /// Newest meta datafile.
    pub datafile: u64,
    /// First that recovery reads.
    pub recover_from: u64,
}

/// A volume as a read saw it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct VolumeSeen {
    /// Epoch of the newest writer.
    pub epoch: u64,
    /// There is a lease, live or expired, that was not released.
    pub held: bool,
    /// Head.
    pub head: HeadSeen,
    /// Quota in bytes: the register of the workload.
    pub quota_bytes: u64,
}

/// A record as a listing saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RecordSeen {
    /// Datafile.
    pub datafile: u64,
    /// Which encoding.
    pub attempt: u64,
    /// Version of the record.
    pub version: u64,
}

/// What is asked of a volume; what is an `Option` is filled in by the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "f", content = "value", rename_all = "snake_case")]
pub enum Operation {
    /// Make the volume.
    CreateVolume {
        /// Its quota.
        quota_bytes: u64,
    },
    /// Remove it.
    DeleteVolume,
    /// Write the register.
    SetQuota {
        /// New value.
        bytes: u64,
    },
    /// Become the writer.
    AcquireLease {
        /// Who.
        client: u64,
        /// Also from a living holder.
        takeover: bool,
        /// Epoch granted.
        epoch: Option<u64>,
    },
    /// Stay the writer.
    RenewLease {
        /// Epoch held.
        epoch: u64,
    },
    /// Stop being the writer.
    ReleaseLease {
        /// Epoch held.
        epoch: u64,
    },
    /// Add records, and perhaps move the head.
    CommitDatafiles {
        /// Epoch held.
        epoch: u64,
        /// Records.
        datafiles: Vec<Datafile>,
        /// New head.
        head: Option<HeadSeen>,
    },
    /// Remove records.
    ReleaseDatafiles {
        /// Epoch held.
        epoch: u64,
        /// Which.
        datafiles: Vec<u64>,
    },
    /// Compare-and-swap of one shard's backend.
    SwapShard {
        /// Datafile.
        datafile: u64,
        /// Shard.
        shard: u32,
        /// From this backend.
        from: u64,
        /// To this one.
        to: u64,
        /// If the record has this version.
        version: u64,
        /// Version after it.
        swapped: Option<u64>,
    },
    /// Say that a shard is damaged, if it is still there: that is a new version of the record.
    ReportShard {
        /// Datafile.
        datafile: u64,
        /// Shard.
        shard: u32,
        /// Where it was.
        backend: u64,
    },
    /// Read the volume as any node knows it, which says how old that is at most.
    StaleRead {
        /// What was seen.
        seen: Option<VolumeSeen>,
        /// Age in ms, at most; nothing where the node cannot say.
        age_ms: Option<u64>,
    },
    /// Read the volume.
    ReadVolume {
        /// What was seen.
        seen: Option<VolumeSeen>,
    },
    /// Read all its records, in one page.
    ListRecords {
        /// What was seen, by datafile.
        seen: Option<Vec<RecordSeen>>,
    },
}

impl Operation {
    /// Does it change nothing?
    pub fn is_read(&self) -> bool {
        matches!(
            self,
            Self::ReadVolume { .. } | Self::ListRecords { .. } | Self::StaleRead { .. }
        )
    }

    /// The epoch it claims to hold, if it is something that only a writer may do.
    pub fn claimed_epoch(&self) -> Option<u64> {
        match self {
            Self::RenewLease { epoch }
            | Self::ReleaseLease { epoch }
            | Self::CommitDatafiles { epoch, .. }
            | Self::ReleaseDatafiles { epoch, .. } => Some(*epoch),
            _ => None,
        }
    }
}

/// Why something certainly had no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Another epoch writes, or nobody.
    Fenced,
    /// Another client's lease lives.
    Held,
    /// There is no such volume.
    NoSuchVolume,
    /// The record has another version.
    VersionConflict,
    /// Refused for another reason.
    Refused,
    /// Never carried out: no quorum, nobody reached.
    NotDone,
}

/// A failure as the client was told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Which kind.
    pub reason: Reason,
    /// Epoch (or version) of the volume (or record) that the refusal names.
    pub current: Option<u64>,
    /// For people.
    pub text: String,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Who; does one thing at a time.
    pub process: u64,
    /// How far.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// `f` and `value`.
    #[serde(flatten)]
    pub operation: Operation,
    /// Volume.
    pub key: String,
    /// Nanoseconds since the beginning.
    pub time: u64,
    /// Of a failure, or why it is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    /// Names the request when it is repeated on purpose: events with the same name are one request, done at most once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
}

/// What an error says of the effect: `Fail` or `Unknown`, and why.
pub fn failure_of(error: &MetadError) -> (Kind, Failure) {
    let (kind, reason, current) = match error {
        MetadError::Fenced { current } => (Kind::Fail, Reason::Fenced, Some(current.0)),
        MetadError::Held { epoch, .. } => (Kind::Fail, Reason::Held, Some(epoch.0)),
        MetadError::NoSuchVolume(_) => (Kind::Fail, Reason::NoSuchVolume, None),
        MetadError::VersionConflict { current } => {
            (Kind::Fail, Reason::VersionConflict, Some(*current))
        }
        MetadError::NoQuorum(_) | MetadError::Unreachable(_) | MetadError::Busy(_) => {
            (Kind::Fail, Reason::NotDone, None)
        }
        MetadError::Unknown(_) => (Kind::Unknown, Reason::NotDone, None),
        MetadError::PolicyUnmet(_)
        | MetadError::NotFound(_)
        | MetadError::Exists(_)
        | MetadError::Denied(_)
        | MetadError::Token(_)
        | MetadError::TooOld { .. }
        | MetadError::Invalid(_) => (Kind::Fail, Reason::Refused, None),
    };
    let text = error.to_string();
    let failure = Failure {
        reason,
        current,
        text,
    };
    (kind, failure)
}

/// Nanoseconds since the beginning of the history: real time, or that of a simulation.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Collects events in the order in which they happen. Clones share one history.
#[derive(Clone)]
pub struct Recorder {
    clock: Clock,
    shared: Arc<Mutex<Recorded>>,
}

#[derive(Default)]
struct Recorded {
    events: Vec<Event>,
    processes: u64,
    file: Option<Box<dyn Write + Send>>,
    /// The first error of the file; kept for [`Recorder::finish`].
    failed: Option<io::Error>,
}

impl Recorded {
    fn push(&mut self, event: Event) {
        if let Some(file) = &mut self.file
            && self.failed.is_none()
            && let Err(error) = write_line(file, &event)
        {
            self.failed = Some(error);
        }
        self.events.push(event);
    }
}

impl Recorder {
    /// In memory.
    pub fn new(clock: Clock) -> Self {
        Self {
            clock,
            shared: Arc::default(),
        }
    }

    /// In memory, and as lines to `file` as they come.
    pub fn to_file(clock: Clock, file: impl Write + Send + 'static) -> Self {
        let recorder = Self::new(clock);
        recorder.lock().file = Some(Box::new(file));
        recorder
    }

    /// Another process.
    pub fn process(&self) -> Process {
        let mut recorded = self.lock();
        let id = recorded.processes;
        recorded.processes += 1;
        Process {
            recorder: self.clone(),
            id,
        }
    }

    /// All events so far.
    pub fn events(&self) -> Vec<Event> {
        self.lock().events.clone()
    }

    /// Flushes the file; the events.
    pub fn finish(&self) -> io::Result<Vec<Event>> {
        let mut recorded = self.lock();
        if let Some(error) = recorded.failed.take() {
            return Err(error);
        }
        if let Some(file) = &mut recorded.file {
            file.flush()?;
        }
        Ok(recorded.events.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Recorded> {
        // No step under the lock can leave it half done.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who asks. After an answer that is unknown it goes on as another process, as histories want it.
pub struct Process {
    recorder: Recorder,
    id: u64,
}

impl Process {
    /// Its number now.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Notes that something is asked. The call must be ended by [`Call::end`]; one that is dropped stays open, which means unknown.
    pub fn invoke(&mut self, key: &str, operation: Operation) -> Call<'_> {
        self.invoke_as(key, operation, None)
    }

    /// The same, for a request that has a name because it may be repeated.
    pub fn invoke_as(
        &mut self,
        key: &str,
        operation: Operation,
        request: Option<String>,
    ) -> Call<'_> {
        let event = Event {
            process: self.id,
            kind: Kind::Invoke,
            operation,
            key: key.to_owned(),
            time: (self.recorder.clock)(),
            error: None,
            request,
        };
        self.recorder.lock().push(event.clone());
        Call {
            process: self,
            event,
            ended: false,
        }
    }
}

/// Something that was asked and not answered yet.
pub struct Call<'a> {
    process: &'a mut Process,
    event: Event,
    ended: bool,
}

impl Call<'_> {
    /// Notes the end: what was asked with the answer filled in, or why not.
    pub fn end(mut self, result: Result<Operation, &MetadError>) -> Kind {
        let (kind, operation, error) = match result {
            Ok(operation) => (Kind::Ok, operation, None),
            Err(error) => {
                let (kind, failure) = failure_of(error);
                // What reads do not learn is no matter: they have no effect that could be unknown.
                let read = self.event.operation.is_read();
                let kind = if read { Kind::Fail } else { kind };
                (kind, self.event.operation.clone(), Some(failure))
            }
        };
        let event = Event {
            kind,
            operation,
            error,
            time: (self.process.recorder.clock)(),
            ..self.event.clone()
        };
        self.process.recorder.lock().push(event);
        self.ended = true;
        if kind == Kind::Unknown {
            self.process.id = self.process.recorder.process().id;
        }
        kind
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.process.id = self.process.recorder.process().id;
        }
    }
}

/// Writes one line.
pub fn write_line(file: &mut impl Write, event: &Event) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    file.write_all(&line)
}

/// Reads a file of lines.
pub fn read_lines(file: impl BufRead) -> io::Result<Vec<Event>> {
    let mut events = Vec::new();
    for (number, line) in (1..).zip(file.lines()) {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let event = serde_json::from_str(&line).map_err(|error| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("line {number}: {error}"),
            )
        })?;
        events.push(event);
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn clock() -> Clock {
        let now = AtomicU64::new(0);
        Arc::new(move || now.fetch_add(10, Ordering::Relaxed))
    }

    #[test]
    fn lines_read_back_as_they_were_written_and_look_as_documented() {
        let recorder = Recorder::new(clock());
        let mut process = recorder.process();
        let ask = |epoch| Operation::AcquireLease {
            client: 3,
            takeover: true,
            epoch,
        };
        process.invoke("v1", ask(None)).end(Ok(ask(Some(7))));
        let fenced = MetadError::Fenced {
            current: qsfs_zstor::id::Epoch(8),
        };
        let commit = Operation::CommitDatafiles {
            epoch: 7,
            datafiles: vec![Datafile {
                id: 1,
                attempt: 2,
                meta: true,
            }],
            head: Some(HeadSeen::default()),
        };
        process.invoke("v1", commit).end(Err(&fenced));
        process
            .invoke("v2", Operation::DeleteVolume)
            .end(Ok(Operation::DeleteVolume));
        let events = recorder.finish().unwrap();
        let mut file = Vec::new();
        for event in &events {
            write_line(&mut file, event).unwrap();
        }
        assert_eq!(read_lines(file.as_slice()).unwrap(), events);
        let text = String::from_utf8(file).unwrap();
        assert_eq!(
            text.lines().next().unwrap(),
            r#"{"process":0,"type":"invoke","f":"acquire_lease","value":{"client":3,"takeover":true,"epoch":null},"key":"v1","time":0}"#
        );
    }

    #[test]
    fn what_is_unknown_ends_its_process() {
        let recorder = Recorder::new(clock());
        let mut process = recorder.process();
        let unknown = MetadError::Unknown("lost".into());
        let kind = process
            .invoke("v", Operation::RenewLease { epoch: 1 })
            .end(Err(&unknown));
        assert_eq!((kind, process.id()), (Kind::Unknown, 1));
        drop(process.invoke("v", Operation::RenewLease { epoch: 1 }));
        assert_eq!(process.id(), 2);
        // A read without an answer has no effect that anybody could see later.
        let kind = process
            .invoke("v", Operation::ReadVolume { seen: None })
            .end(Err(&unknown));
        assert_eq!((kind, process.id()), (Kind::Fail, 2));
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        let error = read_lines("\n{\"process\":1}\n".as_bytes()).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
