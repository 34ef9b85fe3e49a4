//! What waits to be committed, and the answers that are waited for.

use super::EngineError;
use super::commit::{Done, Operation};
use bytes::Bytes;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Operations and bytes of one commit. Few bytes, so that of large values some reach the disk while others are appended: one sync serves
/// many commits all the same.
const BATCH_OPERATIONS_MAX: usize = 4096;
const BATCH_BYTES_MAX: usize = 1 << 20;

/// So many commits in a row without company make a client one that is alone.
const ALONE_COMMITS: u32 = 8;

/// How long the queue is looked at before waiting to be woken.
const LOOK_OUT: Duration = Duration::from_micros(40);

type Outcome = Result<Done, EngineError>;

struct Waiting {
    operation: Operation,
    answer: oneshot::Sender<Outcome>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Waiting>,
    closed: bool,
    /// Somebody carries operations out: the commit thread, or a client's.
    taken: bool,
    /// The commit thread waits for the turn.
    wanted: bool,
    /// The commit thread sleeps until something comes, for good.
    asleep: bool,
    /// A client's thread committed something that the commit thread does not know of.
    unattended: bool,
    /// When the turn was last given back.
    last: Option<Instant>,
}

/// Operations in the order in which they came.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    wake: Condvar,
    /// Commits of one operation in a row behind which nobody waited.
    alone: AtomicU32,
}

/// Operations to commit together, and who waits for each.
pub(super) struct Batch {
    pub(super) operations: Vec<Operation>,
    answers: Vec<oneshot::Sender<Outcome>>,
}

impl Batch {
    pub(super) fn answer(self, outcomes: Vec<Outcome>) {
        // Whoever waits no longer has given up; the outcome stands all the same.
        for (answer, outcome) in self.answers.into_iter().zip(outcomes) {
            let _ = answer.send(outcome);
        }
    }
}

/// The right to carry out operations; given back when it is dropped.
pub(super) struct Turn<'a> {
    queue: &'a Queue,
    /// It is a client's.
    of_client: bool,
    /// Nobody else had anything to commit meanwhile, as far as is known.
    alone: bool,
}

impl Turn<'_> {
    /// Others have something under way.
    pub(super) fn has_company(&mut self) {
        self.alone = false;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.state.lock();
        state.taken = false;
        state.last = Some(Instant::now());
        state.unattended |= self.of_client;
        let alone = &self.queue.alone;
        let so_far = alone.load(Ordering::Relaxed);
        let company = !self.alone || !state.waiting.is_empty();
        let now = if company { 0 } else { so_far.saturating_add(1) };
        alone.store(now, Ordering::Relaxed);
        let asleep = std::mem::take(&mut state.asleep);
        let wakes = std::mem::take(&mut state.wanted) || asleep || !state.waiting.is_empty();
        drop(state);
        if wakes {
            self.queue.wake.notify_one();
        }
    }
}

/// Why waiting for operations ended.
pub(super) enum Next<'a> {
    Batch(Batch, Turn<'a>),
    /// Nothing came until then.
    TimedOut,
    /// Nothing came, but something was committed elsewhere.
    Elsewhere,
    Closed,
}

impl Queue {
    pub(super) fn submit(&self, operation: Operation) -> Result<Answer, EngineError> {
        let (answer, waits) = oneshot::channel();
        let mut state = self.state.lock();
        if state.closed {
            return Err(EngineError::Closed);
        }
        state.waiting.push_back(Waiting { operation, answer });
        drop(state);
        self.wake.notify_one();
        Ok(Answer(Known::Later(waits)))
    }

    /// Does nobody wait to be committed?
    pub(super) fn is_empty(&self) -> bool {
        self.state.lock().waiting.is_empty()
    }

    /// What is in the queue is still answered.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.wake.notify_all();
    }

    /// When operations were last carried out.
    pub(super) fn last_commit(&self) -> Option<Instant> {
        self.state.lock().last
    }

    /// Has one client been the only one for a while?
    pub(super) fn has_one(&self) -> bool {
        self.alone.load(Ordering::Relaxed) >= ALONE_COMMITS
    }

    /// The turn, for a client that has been the only one for a while, so that handing over to the commit thread gains nothing.
    pub(super) fn turn_of_one(&self) -> Option<Turn<'_>> {
        let mut state = self.state.lock();
        if !self.has_one() || !state.waiting.is_empty() || state.taken || state.closed {
            return None;
        }
        state.taken = true;
        Some(Turn {
            queue: self,
            of_client: true,
            alone: true,
        })
    }

    /// The next batch, with the turn to carry it out; waits until then (`None`: until there is one). For the commit thread alone.
    pub(super) fn next(&self, until: Option<Instant>) -> Next<'_> {
        let mut state = self.state.lock();
        if state.waiting.is_empty() && !state.closed && !state.taken {
            MutexGuard::unlocked(&mut state, || self.look_out());
        }
        loop {
            if state.taken {
                state.wanted = true;
                self.wake.wait(&mut state);
                continue;
            }
            if !state.waiting.is_empty() {
                break;
            }
            if state.closed {
                return Next::Closed;
            }
            match until {
                Some(until) => {
                    let ended = self.wake.wait_until(&mut state, until);
                    if ended.timed_out() && state.waiting.is_empty() {
                        return Next::TimedOut;
                    }
                }
                None if std::mem::take(&mut state.unattended) => return Next::Elsewhere,
                None => {
                    state.asleep = true;
                    self.wake.wait(&mut state);
                    state.asleep = false;
                }
            }
        }
        state.taken = true;
        let batch = take_batch(&mut state);
        let turn = Turn {
            queue: self,
            of_client: false,
            alone: batch.operations.len() == 1,
        };
        Next::Batch(batch, turn)
    }
}

impl Queue {
    /// Whoever was just answered often asks again at once: being there then is quicker than being woken. Everybody else goes first.
    fn look_out(&self) {
        let began = Instant::now();
        while began.elapsed() < LOOK_OUT {
            std::thread::yield_now();
            let state = self.state.lock();
            if !state.waiting.is_empty() || state.closed || state.taken {
                return;
            }
        }
    }
}

fn take_batch(state: &mut MutexGuard<'_, State>) -> Batch {
    let mut batch = Batch {
        operations: Vec::new(),
        answers: Vec::new(),
    };
    let mut bytes = 0;
    while let Some(next) = state.waiting.front() {
        bytes += next.operation.bytes();
        let full = batch.operations.len() >= BATCH_OPERATIONS_MAX || bytes > BATCH_BYTES_MAX;
        if full && !batch.operations.is_empty() {
            break;
        }
        if let Some(next) = state.waiting.pop_front() {
            batch.operations.push(next.operation);
            batch.answers.push(next.answer);
        }
    }
    batch
}

/// The answer to an operation.
pub(crate) struct Answer(Known);

enum Known {
    Already(Option<Outcome>),
    Later(oneshot::Receiver<Outcome>),
}

impl Answer {
    pub(super) fn known(outcome: Outcome) -> Self {
        Self(Known::Already(Some(outcome)))
    }

    /// Was it known when the operation was handed over?
    pub(crate) fn is_known(&self) -> bool {
        matches!(self.0, Known::Already(_))
    }

    /// Wait for a SET: the key, or `None` if the value was the same already. To be asked once.
    pub(crate) async fn stored(&mut self) -> Result<Option<Bytes>, EngineError> {
        let outcome = match &mut self.0 {
            Known::Already(outcome) => outcome.take(),
            Known::Later(waits) => waits.await.ok(),
        };
        outcome.unwrap_or(Err(EngineError::Closed)).map(Done::key)
    }

    /// Wait for a DEL.
    pub(crate) async fn deleted(&mut self) -> Result<(), EngineError> {
        self.stored().await.map(|_| ())
    }

    /// As [`Answer::stored`], if it is known already.
    pub(crate) fn try_stored(&mut self) -> Option<Result<Option<Bytes>, EngineError>> {
        let outcome = match &mut self.0 {
            Known::Already(outcome) => outcome.take(),
            Known::Later(waits) => match waits.try_recv() {
                Ok(outcome) => Some(outcome),
                Err(oneshot::error::TryRecvError::Empty) => return None,
                Err(oneshot::error::TryRecvError::Closed) => None,
            },
        };
        Some(outcome.unwrap_or(Err(EngineError::Closed)).map(Done::key))
    }
}
