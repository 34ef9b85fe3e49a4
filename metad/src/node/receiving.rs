//! Snapshots from the leader: taken in, read whole, made into a state aside, and only then given to Raft.
//!
//! ```text
//! chunk, chunk, ... last chunk --> file, synced --> verified while a state is made of it (aside) --> named --> Raft: one swap
//!                        ^                             | damaged, or no room                |
//!                        +--- asked anew, later <------+          an end from here on: made again at the start (`Machine::catch_up`)
//! ```
//!
//! openraft takes what does not install for a broken disk and stops the node. So it only gets what has proved whole: a snapshot that was
//! harmed on the way here (the sender's disk, this one's) is refused with a word to the leader, which reads its own again, and is
//! sent anew after a pause that grows. A large one takes minutes to be read, while the leader repeats its last chunk: whoever asks
//! again is told how the first try ends. Raft itself goes on meanwhile; only the swap is done in its order.

use crate::ground;
use crate::machine::snapshot::{Meta, SnapshotFile};
use crate::machine::{Machine, MachineError};
use crate::raft::{Raft, TypeConfig, Vote};
use openraft::SnapshotId;
use openraft::error::{Fatal, InstallSnapshotError, RaftError, SnapshotMismatch};
use openraft::raft::{InstallSnapshotRequest, InstallSnapshotResponse};
use openraft::{Snapshot, SnapshotSegmentId};
use qsfs_zstor::id::MetadId;
use std::io::SeekFrom;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncSeekExt, AsyncWriteExt};
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep};

/// Pause before a snapshot is taken again after one was refused; it doubles up to the second.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Longest wait of a chunk that comes during a pause.
const WAIT: Duration = Duration::from_secs(8);

/// Openraft's answer to a chunk.
pub type Answer = Result<InstallSnapshotResponse<u64>, RaftError<u64, InstallSnapshotError>>;

/// How the taking in of a whole snapshot ended: with what Raft said, or with an error for people.
type Ended = Result<Result<Vote, Fatal<u64>>, String>;

/// Takes snapshots in, one at a time. Clones share it.
#[derive(Clone)]
pub struct Receiving {
    raft: Raft,
    machine: Machine,
    streams: Arc<Mutex<Streams>>,
}

#[derive(Default)]
struct Streams {
    /// What is coming in.
    coming: Option<Coming>,
    /// What came last, and how it ends.
    whole: Option<(SnapshotId, watch::Receiver<Option<Ended>>)>,
    /// Nothing is taken before that.
    paused: Option<Instant>,
    /// The pause after the next refusal.
    pause: Duration,
}

struct Coming {
    id: SnapshotId,
    file: SnapshotFile,
}

impl Receiving {
    /// For this Raft, whose state this is.
    pub fn new(raft: Raft, machine: Machine) -> Self {
        let streams = Streams {
            pause: PAUSE.0,
            ..Streams::default()
        };
        Self {
            raft,
            machine,
            streams: Arc::new(Mutex::new(streams)),
        }
    }

    /// Takes one chunk.
    ///
    /// # Errors
    /// What is to be told to the sender, which sends it again later.
    pub async fn take(
        &self,
        from: MetadId,
        chunk: InstallSnapshotRequest<TypeConfig>,
    ) -> Result<Answer, String> {
        let asked = self.raft.with_raft_state(|state| *state.vote_ref());
        let vote = match asked.await {
            Ok(vote) => vote,
            Err(fatal) => return Ok(Err(RaftError::Fatal(fatal))),
        };
        let taken = InstallSnapshotResponse { vote };
        if chunk.vote < vote {
            return Ok(Ok(taken));
        }
        let mut streams = self.streams.lock().await;
        if let Some((id, end)) = &streams.whole {
            let (same, end) = (*id == chunk.meta.snapshot_id, end.clone());
            let refused = matches!(&*end.borrow(), Some(Err(_)));
            if same && !(refused && chunk.offset == 0) {
                drop(streams);
                return if chunk.done {
                    ending(end).await
                } else {
                    Ok(Ok(taken))
                };
            }
            if end.borrow().is_none() {
                // Two states are not made at once.
                drop(streams);
                drop(ending(end).await);
                return Err("another snapshot is being taken in; send this one again".into());
            }
            streams.whole = None;
        }
        if let Some(until) = streams.paused {
            let wait = until.saturating_duration_since(Instant::now());
            if wait > Duration::ZERO {
                drop(streams);
                sleep(wait.min(WAIT)).await;
                return Err("a snapshot was refused a moment ago; send it again later".into());
            }
            streams.paused = None;
        }
        let done = chunk.done;
        let (meta, vote) = (chunk.meta.clone(), chunk.vote);
        match self.write(&mut streams, chunk).await {
            Ok(None) if !done => Ok(Ok(taken)),
            Ok(Some(mismatch)) => Ok(Err(RaftError::APIError(mismatch))),
            Ok(None) => {
                let end = self.finish(&mut streams, from, vote, meta);
                drop(streams);
                ending(end).await
            }
            Err(error) => {
                streams.coming = None;
                let text = streams.refuse(from, &error);
                Err(text)
            }
        }
    }

    async fn write(
        &self,
        streams: &mut Streams,
        chunk: InstallSnapshotRequest<TypeConfig>,
    ) -> Result<Option<InstallSnapshotError>, MachineError> {
        let id = chunk.meta.snapshot_id;
        if chunk.offset == 0 {
            streams.coming = None;
            let machine = self.machine.clone();
            let work = Arc::clone(&machine.ground().work);
            let made = ground::blocking(&work, move || machine.receive()).await;
            let file = made.map_err(|lost| self.failed("create", lost))??;
            let id = id.clone();
            streams.coming = Some(Coming { id, file });
        }
        let coming = streams.coming.as_mut().filter(|coming| coming.id == id);
        let Some(coming) = coming else {
            let segment = |offset| SnapshotSegmentId {
                id: id.clone(),
                offset,
            };
            let (expect, got) = (segment(0), segment(chunk.offset));
            let mismatch = SnapshotMismatch { expect, got };
            return Ok(Some(InstallSnapshotError::SnapshotMismatch(mismatch)));
        };
        let file = &mut coming.file;
        let written = async {
            file.seek(SeekFrom::Start(chunk.offset)).await?;
            file.write_all(&chunk.data).await
        };
        written.await.map_err(|error| self.failed("write", error))?;
        Ok(None)
    }

    fn failed(
        &self,
        step: &'static str,
        error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> MachineError {
        let path = self.machine.dir().join("snapshot");
        MachineError::io(step, &path)(std::io::Error::other(error))
    }

    /// Goes on by itself, whoever stops waiting.
    fn finish(
        &self,
        streams: &mut Streams,
        from: MetadId,
        vote: Vote,
        meta: Meta,
    ) -> watch::Receiver<Option<Ended>> {
        let (tell, end) = watch::channel(None);
        let Some(Coming { id, file }) = streams.coming.take() else {
            tell.send_replace(Some(Err("nothing was received".into())));
            return end;
        };
        streams.whole = Some((id, end.clone()));
        let receiving = self.clone();
        tokio::spawn(async move {
            let prepared = receiving.prepare(file, &meta).await;
            let ended = match prepared {
                Ok(file) => {
                    let snapshot = Box::new(file);
                    let snapshot = Snapshot { meta, snapshot };
                    let installed = receiving.raft.install_full_snapshot(vote, snapshot).await;
                    receiving.streams.lock().await.pause = PAUSE.0;
                    Ok(installed.map(|installed| installed.vote))
                }
                Err(error) => Err(receiving.streams.lock().await.refuse(from, &error)),
            };
            receiving.tidy().await;
            tell.send_replace(Some(ended));
        });
        end
    }

    async fn prepare(&self, file: SnapshotFile, meta: &Meta) -> Result<SnapshotFile, MachineError> {
        let path = file.finish().await?;
        let (machine, meta) = (self.machine.clone(), meta.clone());
        let work = Arc::clone(&machine.ground().work);
        let made = ground::blocking(&work, move || {
            let state = machine.prepare(&path, &meta)?;
            // Its name first: openraft may cut the log before the state is swapped, and an end in between must find what closes the gap.
            let path = machine.accept(&path, &meta)?;
            SnapshotFile::prepared(machine.ground(), &path, state)
        });
        made.await.map_err(|lost| self.failed("read", lost))?
    }

    async fn tidy(&self) {
        let machine = self.machine.clone();
        let work = Arc::clone(&machine.ground().work);
        let tidied = ground::blocking(&work, move || machine.tidy()).await;
        if let Ok(Err(error)) = tidied {
            tracing::warn!(%error, "what is left of a received snapshot is not removed");
        }
    }
}

impl Streams {
    /// Says so, and takes nothing for a while. Answers with what the sender is told.
    fn refuse(&mut self, from: MetadId, error: &MachineError) -> String {
        let pause = self.pause;
        self.paused = Some(Instant::now() + pause);
        self.pause = (pause * 2).min(PAUSE.1);
        tracing::error!(
            %error, %from, ?pause,
            "a snapshot from a peer is refused; nothing is changed, and it is asked for anew after a pause"
        );
        format!("the snapshot is refused ({error}); read it again and send it anew")
    }
}

/// Until it has ended, or the caller's deadline has come.
async fn ending(mut end: watch::Receiver<Option<Ended>>) -> Result<Answer, String> {
    let stopping = || String::from("the node is stopping");
    let ended = end
        .wait_for(Option::is_some)
        .await
        .map_err(|_| stopping())?;
    Ok(match ended.clone().unwrap_or_else(|| Err(stopping()))? {
        Ok(vote) => Ok(InstallSnapshotResponse { vote }),
        Err(fatal) => Err(RaftError::Fatal(fatal)),
    })
}
