//! A watch, seen from the client: one stream out of many connections.
//!
//! ```text
//! position -> round over the nodes -> stream -> whole indexes -> queue -> Watching::next
//!    ^------------ broken, silent, cut off, node stale -----'
//! ```
//!
//! Invariant: what is handed on is ascending and whole; parts of an index whose rest did not come are forgotten, and the next node is asked
//! for everything after the last whole one. Nobody is waited for longer than [`SILENCE_MAX`], which a living node breaks every
//! few seconds.

use super::Shared;
use super::attempt::{Failed, classify};
use super::open::Open;
use crate::api::MetadError;
use crate::watch::{Change, WatchEvent, WatchRequest};
use crate::wire::{Wire, pb};
use pb::watch_event::Kind;
use rand::Rng;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

/// Events that may wait for whoever watches. When it is full nothing is read from the node, which cuts the watch off after a while; it
/// then goes on where it was.
const WATCH_QUEUE_MAX: usize = 64;
/// A stream without a word for so long is dead: a node says something every few seconds.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Changes of one index accepted at most: more than the largest log entry can make.
const INDEX_CHANGES_MAX: usize = 1 << 20;
/// Rounds in which some nodes refuse and the others cannot be reached, before the refusal counts.
const REFUSED_ROUNDS_MAX: u32 = 3;

/// A running watch. Ends when dropped.
#[derive(Debug)]
pub struct Watching {
    events: mpsc::Receiver<Result<WatchEvent, MetadError>>,
    trouble: watch::Receiver<Option<String>>,
    task: JoinHandle<()>,
}

impl Watching {
    pub(super) fn start(shared: Arc<Shared>, request: WatchRequest) -> Self {
        let (sender, events) = mpsc::channel(WATCH_QUEUE_MAX);
        let (told, trouble) = watch::channel(None);
        let feeder = Feeder {
            shared,
            request,
            sender,
            trouble: told,
            begun: false,
        };
        Self {
            events,
            trouble,
            task: tokio::spawn(feeder.run()),
        }
    }

    /// Why nothing has come since the newest event: what the nodes answered, or how they could not be reached or fell silent. It goes
    /// on trying.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone()
    }

    /// Every trouble as it comes: who asks now and then may miss one that is soon over.
    #[cfg(test)]
    pub(crate) fn troubles(&self) -> watch::Receiver<Option<String>> {
        self.trouble.clone()
    }

    /// The next event; an error is the last. Waits without a deadline, but while nodes can be reached something comes at least every few
    /// seconds. Nothing is lost when the wait is given up.
    pub async fn next(&mut self) -> Option<Result<WatchEvent, MetadError>> {
        self.events.recv().await
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Feeder {
    shared: Arc<Shared>,
    request: WatchRequest,
    sender: mpsc::Sender<Result<WatchEvent, MetadError>>,
    trouble: watch::Sender<Option<String>>,
    begun: bool,
}

/// Why a stream is not read any more.
enum Broken {
    /// Go on elsewhere.
    Resume(String),
    /// Nobody watches any more.
    Unwatched,
}

impl Feeder {
    async fn run(mut self) {
        let timing = self.shared.nodes.timing;
        let (mut pause, mut refused_rounds) = (timing.backoff, 0);
        // The node whose stream broke last is asked last.
        let mut last: Option<String> = None;
        loop {
            match self.round(last.as_deref()).await {
                Ok((address, stream)) => {
                    (pause, refused_rounds) = (timing.backoff, 0);
                    match self.read(stream).await {
                        Broken::Unwatched => return,
                        Broken::Resume(reason) => {
                            tracing::debug!(%address, reason, "a watch goes on elsewhere");
                            self.trouble
                                .send_replace(Some(format!("{address}: {reason}")));
                            self.shared.nodes.drop_connection(&address);
                            last = Some(address);
                        }
                    }
                }
                Err(NoStream {
                    refusal,
                    all,
                    reasons,
                }) => {
                    self.trouble.send_replace(Some(reasons.join("; ")));
                    refused_rounds += u32::from(refusal.is_some());
                    if let Some(refusal) = refusal
                        && (all || refused_rounds >= REFUSED_ROUNDS_MAX)
                    {
                        // Nobody watches any more: nobody to be told.
                        let _ = self.sender.send(Err(refusal)).await;
                        return;
                    }
                    tokio::select! {
                        () = sleep(pause.mul_f64(rand::rng().random_range(0.5..1.5))) => {}
                        () = self.sender.closed() => return,
                    }
                    pause = (pause * 2).min(timing.backoff_max);
                }
            }
        }
    }

    /// Asks every node that is known, once.
    async fn round(
        &self,
        last: Option<&str>,
    ) -> Result<(String, Streaming<pb::WatchEvent>), NoStream> {
        let nodes = &self.shared.nodes;
        let mut addresses = nodes.addresses();
        addresses.sort_by_key(|address| Some(address.as_str()) == last);
        let message: pb::WatchRequest = self.request.to_wire();
        let mut ended = NoStream {
            refusal: None,
            all: true,
            reasons: Vec::new(),
        };
        for address in addresses {
            let deadline = Instant::now() + nodes.timing.read;
            let call = |open: Open, _| {
                let mut stub = open.stub;
                let message = message.clone();
                async move { Ok(stub.watch(message).await?.into_inner()) }
            };
            match nodes.attempt(&address, deadline, &call).await {
                Ok(stream) => return Ok((address, stream)),
                Err(Failed::Final {
                    error: error @ (MetadError::TooOld { .. } | MetadError::Unreachable(_)),
                    ..
                }) => {
                    // Another node may remember more, or know what a watch is.
                    ended.reasons.push(format!("{address}: {error}"));
                    ended.refuse(error);
                }
                Err(Failed::Final { error, .. }) => {
                    return Err(NoStream {
                        reasons: vec![format!("{address}: {error}")],
                        refusal: Some(error),
                        all: true,
                    });
                }
                Err(Failed::Redirected(_)) => {
                    ended.all = false;
                    ended.reasons.push(format!("{address} knows no leader"));
                }
                Err(Failed::Lost { reason, .. }) => {
                    ended.all = false;
                    ended.reasons.push(format!("{address}: {reason}"));
                }
            }
        }
        Err(ended)
    }

    async fn read(&mut self, mut stream: Streaming<pb::WatchEvent>) -> Broken {
        let mut parts: Vec<Change> = Vec::new();
        let mut parts_index = 0;
        loop {
            let message = tokio::select! {
                message = timeout(SILENCE_MAX, stream.message()) => message,
                () = self.sender.closed() => return Broken::Unwatched,
            };
            let kind = match message {
                Err(_) => return Broken::Resume(format!("no word for {SILENCE_MAX:?}")),
                Ok(Ok(None)) => return Broken::Resume("the node ended it".into()),
                Ok(Ok(Some(event))) => event.kind,
                Ok(Err(status)) => {
                    // Whatever it says is said again, to the next request, if it stays so.
                    let reason = match classify(&status) {
                        Failed::Final { error, .. } => error.to_string(),
                        Failed::Lost { reason, .. } => reason,
                        Failed::Redirected(_) => "the node has no leader".into(),
                    };
                    return Broken::Resume(reason);
                }
            };
            let event = match kind {
                Some(Kind::Began(index)) => WatchEvent::Began(index),
                Some(Kind::Progress(index)) => WatchEvent::Progress(index),
                Some(Kind::Changes(changes)) => {
                    if changes.index != parts_index {
                        parts.clear();
                        parts_index = changes.index;
                    }
                    let Ok(more) = Vec::<Change>::from_wire(changes.changes) else {
                        return Broken::Resume("a change does not parse".into());
                    };
                    parts.extend(more);
                    if parts.len() > INDEX_CHANGES_MAX {
                        return Broken::Resume("an index with too many changes".into());
                    }
                    if changes.more {
                        continue;
                    }
                    WatchEvent::Changes {
                        index: parts_index,
                        changes: std::mem::take(&mut parts),
                    }
                }
                None => return Broken::Resume("an event does not parse".into()),
            };
            if self.is_new(&event) && !self.hand_on(event).await {
                return Broken::Unwatched;
            }
        }
    }

    fn is_new(&self, event: &WatchEvent) -> bool {
        match event {
            WatchEvent::Began(_) => !self.begun,
            WatchEvent::Changes { index, .. } => {
                self.request.after.is_none_or(|after| *index > after)
            }
            // Says as well that the watch is alive.
            WatchEvent::Progress(index) => self.request.after.is_none_or(|after| *index >= after),
        }
    }

    async fn hand_on(&mut self, event: WatchEvent) -> bool {
        self.begun = true;
        let index = event.index();
        if self.sender.send(Ok(event)).await.is_err() {
            return false;
        }
        self.request.after = Some(index);
        self.trouble.send_replace(None);
        true
    }
}

/// A round that led to no stream.
struct NoStream {
    /// What a node said that is not to be changed by asking it again.
    refusal: Option<MetadError>,
    /// Every node said so.
    all: bool,
    /// What each node said, or why it could not be asked.
    reasons: Vec<String>,
}

impl NoStream {
    fn refuse(&mut self, error: MetadError) {
        self.refusal = Some(match (self.refusal.take(), error) {
            (Some(MetadError::TooOld { oldest: a }), MetadError::TooOld { oldest: b }) => {
                MetadError::TooOld { oldest: a.min(b) }
            }
            (Some(old @ MetadError::TooOld { .. }), _) => old,
            (_, error) => error,
        });
    }
}
