//! What waits to be committed, and the answers that are waited for.

use super::EngineError;
use super::commit::{Done, Operation};
use bytes::Bytes;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Operations and bytes of one commit.
const BATCH_OPERATIONS_MAX: usize = 4096;
const BATCH_BYTES_MAX: usize = 4 << 20;

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
}

/// Operations in the order in which they came.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    wake: Condvar,
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

/// Why waiting for operations ended.
pub(super) enum Next {
    Batch(Batch),
    /// Nothing came until then.
    TimedOut,
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
        Ok(Answer(waits))
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

    /// The next batch; waits until then (`None`: until there is one).
    pub(super) fn next(&self, until: Option<Instant>) -> Next {
        let mut state = self.state.lock();
        if state.waiting.is_empty() && !state.closed {
            MutexGuard::unlocked(&mut state, || self.look_out());
        }
        while state.waiting.is_empty() {
            if state.closed {
                return Next::Closed;
            }
            match until {
                None => self.wake.wait(&mut state),
                Some(until) => {
                    if self.wake.wait_until(&mut state, until).timed_out()
                        && state.waiting.is_empty()
                    {
                        return Next::TimedOut;
                    }
                }
            }
        }
        Next::Batch(take_batch(&mut state))
    }
}

impl Queue {
    /// Whoever was just answered often asks again at once: being there then is quicker than being woken. Everybody else goes first.
    fn look_out(&self) {
        let began = Instant::now();
        while began.elapsed() < LOOK_OUT {
            std::thread::yield_now();
            let state = self.state.lock();
            if !state.waiting.is_empty() || state.closed {
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

/// The answer to something in the queue.
pub(crate) struct Answer(oneshot::Receiver<Outcome>);

impl Answer {
    /// Wait for a SET: the key, or `None` if the value was the same already.
    pub(crate) async fn stored(&mut self) -> Result<Option<Bytes>, EngineError> {
        match (&mut self.0).await {
            Ok(outcome) => outcome.map(Done::key),
            Err(_) => Err(EngineError::Closed),
        }
    }

    /// Wait for a DEL.
    pub(crate) async fn deleted(&mut self) -> Result<(), EngineError> {
        self.stored().await.map(|_| ())
    }

    /// As [`Answer::stored`], if it is known already.
    pub(crate) fn try_stored(&mut self) -> Option<Result<Option<Bytes>, EngineError>> {
        match self.0.try_recv() {
            Ok(outcome) => Some(outcome.map(Done::key)),
            Err(oneshot::error::TryRecvError::Empty) => None,
            Err(oneshot::error::TryRecvError::Closed) => Some(Err(EngineError::Closed)),
        }
    }
}
