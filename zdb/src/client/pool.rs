//! The connections to one namespace: deadlines, the byte budget, and what to do with a connection that failed.

use super::connection::{Connection, refusal, server_text};
use super::{ClientConfig, ClientError};
use redis::Value;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};

/// The budget is counted in units of this many bytes.
const BUDGET_UNIT: usize = 1024;

/// What an operation moves.
#[derive(Debug, Clone, Copy)]
pub(super) enum Use {
    /// Values of about so many bytes, on a data connection.
    Data(usize),
    /// Small questions, on a connection of their own so that no value delays them.
    Control,
}

/// May the command be sent again on a new connection when the old one broke before its answer?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// Doing it twice is doing it once.
    Once,
    /// The outcome would be ambiguous.
    Never,
}

#[derive(Debug)]
pub(super) struct Pool {
    config: ClientConfig,
    /// The first is for control, the others for data.
    slots: Vec<Slot>,
    budget: Semaphore,
    budget_units: usize,
    generations: AtomicU64,
}

#[derive(Debug, Default)]
struct Slot {
    state: Mutex<SlotState>,
    busy: AtomicUsize,
}

#[derive(Debug, Default)]
struct SlotState {
    connection: Option<Connection>,
    failure: Option<(Instant, ClientError)>,
}

/// Counts an operation on its slot while it lives.
struct Busy<'a>(&'a AtomicUsize);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Failure {
    /// The server answered with an error.
    Refused(String),
    /// The connection broke before the answer.
    Broken(String),
    /// No answer in time.
    Late,
}

impl Pool {
    pub(super) fn new(config: ClientConfig) -> Self {
        let budget_units = (config.inflight_bytes / BUDGET_UNIT).max(1);
        Self {
            slots: (0..=config.connections.max(1))
                .map(|_| Slot::default())
                .collect(),
            budget: Semaphore::new(budget_units),
            budget_units,
            generations: AtomicU64::new(0),
            config,
        }
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.config.endpoint
    }

    pub(super) fn namespace(&self) -> &str {
        &self.config.namespace
    }

    /// Ask one question and wait for its answer. Error answers come back as errors.
    pub(super) async fn ask(
        &self,
        command: &redis::Cmd,
        purpose: Use,
        repeat: Repeat,
    ) -> Result<Value, ClientError> {
        let _admitted = self.admit(purpose).await?;
        let slot = self.slot(purpose);
        slot.busy.fetch_add(1, Ordering::Relaxed);
        let _busy = Busy(&slot.busy);
        let mut broken = None;
        loop {
            let first = broken.is_none();
            let (mut redis, generation) = match (self.connected(slot).await, broken) {
                (Ok(connection), _) => connection,
                // The first attempt may have been carried out: the outcome is unknown, not "nothing happened".
                (Err(_), Some(reason)) => return Err(self.error(Failure::Broken(reason))),
                (Err(error), None) => return Err(error),
            };
            let answer = tokio::time::timeout(
                self.config.request_timeout,
                redis.send_packed_command(command),
            )
            .await;
            let failure = match answer {
                Ok(Ok(Value::ServerError(error))) => {
                    Failure::Refused(server_text(error.code(), error.details()))
                }
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => match refusal(&error) {
                    Some(text) => Failure::Refused(text),
                    None => Failure::Broken(error.to_string()),
                },
                Err(_) => Failure::Late,
            };
            if !matches!(failure, Failure::Refused(_)) {
                // Its next answers would belong to other questions.
                slot.discard(generation).await;
            }
            match failure {
                Failure::Broken(reason) if first && repeat == Repeat::Once => {
                    broken = Some(reason);
                }
                failure => return Err(self.error(failure)),
            }
        }
    }

    /// Room in the budget. Those that hold it give it back at their own deadlines, so that waiting twice as long means overload.
    async fn admit(&self, purpose: Use) -> Result<Option<SemaphorePermit<'_>>, ClientError> {
        let Use::Data(bytes) = purpose else {
            return Ok(None);
        };
        // One that is larger than the whole budget goes alone.
        let units = bytes.div_ceil(BUDGET_UNIT).clamp(1, self.budget_units);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let patience = self.config.request_timeout * 2;
        let room = tokio::time::timeout(patience, self.budget.acquire_many(units)).await;
        let busy = || ClientError::Unreachable {
            endpoint: self.config.endpoint.clone(),
            reason: format!("no room for {bytes} more bytes under way within {patience:?}"),
        };
        match room {
            Ok(Ok(permit)) => Ok(Some(permit)),
            Ok(Err(_)) | Err(_) => Err(busy()),
        }
    }

    fn slot(&self, purpose: Use) -> &Slot {
        let (control, data) = self.slots.split_at(1);
        match purpose {
            Use::Control => &control[0],
            Use::Data(_) => data
                .iter()
                .min_by_key(|slot| slot.busy.load(Ordering::Relaxed))
                .unwrap_or(&control[0]),
        }
    }

    async fn connected(
        &self,
        slot: &Slot,
    ) -> Result<(redis::aio::MultiplexedConnection, u64), ClientError> {
        let asked = Instant::now();
        let mut state = slot.state.lock().await;
        if state.connection.as_ref().is_some_and(Connection::is_closed) {
            state.connection = None;
        }
        if state.connection.is_none() {
            // Those that waited while a connection attempt failed share its failure instead of trying one after the other.
            if let Some((when, error)) = &state.failure
                && *when >= asked
            {
                return Err(error.clone());
            }
            let generation = self.generations.fetch_add(1, Ordering::Relaxed);
            match Connection::open(&self.config, generation).await {
                Ok(connection) => {
                    state.failure = None;
                    state.connection = Some(connection);
                }
                Err(error) => {
                    state.failure = Some((Instant::now(), error.clone()));
                    return Err(error);
                }
            }
        }
        match &state.connection {
            Some(connection) => Ok((connection.redis.clone(), connection.generation)),
            None => Err(self.error(Failure::Broken("no connection".to_owned()))),
        }
    }

    fn error(&self, failure: Failure) -> ClientError {
        let endpoint = self.config.endpoint.clone();
        match failure {
            Failure::Broken(reason) => ClientError::Timeout { endpoint, reason },
            Failure::Late => ClientError::Timeout {
                endpoint,
                reason: format!("no answer within {:?}", self.config.request_timeout),
            },
            Failure::Refused(text) if text.starts_with("No space left") => {
                ClientError::Full { endpoint }
            }
            Failure::Refused(text) if is_read_only(&text) => {
                ClientError::ReadOnly { endpoint, text }
            }
            Failure::Refused(text) => ClientError::Refused { endpoint, text },
        }
    }
}

impl Slot {
    async fn discard(&self, generation: u64) {
        let mut state = self.state.lock().await;
        if state
            .connection
            .as_ref()
            .is_some_and(|connection| connection.generation == generation)
        {
            state.connection = None;
        }
    }
}

fn is_read_only(text: &str) -> bool {
    [
        "Namespace is in read-only mode",
        "Namespace is temporarily locked",
        "Namespace is temporarily frozen",
        "Namespace is protected by worm mode",
        "Cannot delete a key when namespace is in worm mode",
    ]
    .iter()
    .any(|known| text.starts_with(known))
}
