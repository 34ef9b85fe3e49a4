//! The loop of attempts under every call of the client: which node next, when to pause, what the end means.

use super::Timing;
use super::open::Open;
use crate::api::MetadError;
use crate::channel::{connect_over, describe, versioned};
use crate::dial::Dial;
use crate::server::{CallError, MESSAGE_BYTES_MAX};
use crate::wire::pb::HelloRequest;
use crate::wire::pb::metad_client::MetadClient as Stub;
use crate::wire::{Wire, error_of};
use qsfs_zstor::id::ClusterId;
use rand::Rng;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::{Code, Request, Status};

/// Most nodes a client remembers: those it was given and those it learned.
const NODES_MAX: usize = 32;

/// May a request that got no answer have been carried out?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Asking again is harmless, no answer is no harm.
    Read,
    /// No answer is "unknown".
    Mutation,
}

/// Connections and what is known of the cluster, shared by all clones.
pub(super) struct Nodes {
    dial: Arc<dyn Dial>,
    cluster: ClusterId,
    pub(super) timing: Timing,
    state: Mutex<State>,
}

struct State {
    /// Given and learned, in that order.
    known: Vec<String>,
    /// Where the last call succeeded, or where a hint points.
    leader: Option<String>,
    /// By address, with the generation it was dialled under ([`Dial::generation`]).
    open: HashMap<String, (u64, Open)>,
}

/// How one attempt ended without an answer.
pub(super) enum Failed {
    /// Refused. `decided`: by the cluster, to this very request; else by a node on its own, which says nothing of earlier attempts.
    Final { error: MetadError, decided: bool },
    /// Another node leads.
    Redirected(Option<String>),
    /// Try again. `sent`: the request may have been carried out.
    Lost { reason: String, sent: bool },
}

/// What the attempts so far say about the end.
#[derive(Default)]
struct Trail {
    /// Why it is not certain that the mutation was not applied.
    uncertain: Option<String>,
    /// A node of the cluster answered, but could not do it.
    no_leader: Option<String>,
    /// Newest failure to reach one.
    unreachable: Option<String>,
}

/// Whose turn it is within one call.
#[derive(Default)]
struct Turn {
    tries: usize,
    cursor: usize,
}

impl Trail {
    /// The end after a refusal: what one node refuses now may have been carried out when it was asked before.
    fn refused(self, kind: Kind, error: MetadError, decided: bool) -> MetadError {
        match (kind, self.uncertain) {
            (Kind::Mutation, Some(reason)) if !decided => {
                MetadError::Unknown(format!("{reason}; asked again, it was refused: {error}"))
            }
            _ => error,
        }
    }

    fn verdict(self, kind: Kind) -> MetadError {
        match (kind, self.uncertain, self.no_leader, self.unreachable) {
            (Kind::Mutation, Some(reason), _, _) => MetadError::Unknown(reason),
            (_, _, Some(reason), _) => MetadError::NoQuorum(reason),
            (_, Some(reason), None, _) | (_, None, None, Some(reason)) => {
                MetadError::Unreachable(reason)
            }
            (_, None, None, None) => {
                MetadError::Unreachable("the deadline ended before an attempt".into())
            }
        }
    }
}

impl Nodes {
    pub(super) fn new(
        endpoints: Vec<String>,
        dial: Arc<dyn Dial>,
        cluster: ClusterId,
        timing: Timing,
    ) -> Self {
        let state = State {
            known: endpoints,
            leader: None,
            open: HashMap::new(),
        };
        Self {
            dial,
            cluster,
            timing,
            state: Mutex::new(state),
        }
    }

    /// Tries until an answer, a refusal, or the deadline. `call` is given a connection and the attempt's deadline.
    pub(super) async fn run<T, F>(
        &self,
        kind: Kind,
        deadline: Instant,
        call: impl Fn(Open, Duration) -> F,
    ) -> Result<T, MetadError>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let mut trail = Trail::default();
        let mut pause = self.timing.backoff;
        let mut turn = Turn::default();
        let mut hinted = None;
        loop {
            let (address, round_over) = self.next(hinted.take(), &mut turn);
            if round_over {
                let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.5));
                if timeout_at(deadline, sleep(jittered)).await.is_err() {
                    return Err(trail.verdict(kind));
                }
                pause = (pause * 2).min(self.timing.backoff_max);
            }
            if Instant::now() >= deadline {
                return Err(trail.verdict(kind));
            }
            match self.attempt(&address, deadline, &call).await {
                Ok(answer) => {
                    self.lock().leader = Some(address);
                    return Ok(answer);
                }
                Err(Failed::Final { error, decided }) => {
                    return Err(trail.refused(kind, error, decided));
                }
                Err(Failed::Redirected(hint)) => {
                    let text = format!("{address} does not lead and knows ");
                    let known = hint.as_deref().unwrap_or("no leader").to_owned();
                    trail.no_leader = Some(text + &known);
                    self.learn(hint.as_deref());
                    hinted = hint.filter(|hint| *hint != address);
                }
                Err(Failed::Lost { reason, sent }) => {
                    let reason = format!("{address}: {reason}");
                    self.forget_leader(&address);
                    if sent {
                        trail.no_leader = Some(reason.clone());
                        trail.uncertain = Some(reason);
                    } else {
                        trail.unreachable = Some(reason);
                    }
                }
            }
        }
    }

    /// The hinted node, else at first the leader as known, else each in turn. True after a round of tries without a pause.
    fn next(&self, hinted: Option<String>, turn: &mut Turn) -> (String, bool) {
        let state = self.lock();
        let known = state.known.len().max(1);
        let round_over = turn.tries > 0 && turn.tries.is_multiple_of(known + 1);
        let first = if turn.tries == 0 {
            state.leader.clone()
        } else {
            None
        };
        turn.tries += 1;
        let address = hinted.or(first).unwrap_or_else(|| {
            // Hints do not use up a turn: a follower that hints at a dead leader for ever must not hide the others.
            let next = state.known.get(turn.cursor % known).cloned();
            turn.cursor += 1;
            next.unwrap_or_default()
        });
        (address, round_over)
    }

    /// One attempt with one node.
    pub(super) async fn attempt<T, F>(
        &self,
        address: &str,
        deadline: Instant,
        call: &impl Fn(Open, Duration) -> F,
    ) -> Result<T, Failed>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let open = self.open(address, deadline).await?;
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = left.min(self.timing.attempt);
        let ended = timeout(limit, call(open, limit)).await;
        let failed = match ended {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(status)) => classify(&status),
            Err(_) => Failed::Lost {
                reason: format!("no answer within {limit:?}"),
                sent: true,
            },
        };
        if matches!(failed, Failed::Lost { .. }) {
            // It may hang (a partition); the next attempt connects anew.
            self.lock().open.remove(address);
        }
        Err(failed)
    }

    /// An open connection, or a new one that has proven to be a node of our cluster: what fails here was certainly not sent.
    async fn open(&self, address: &str, deadline: Instant) -> Result<Open, Failed> {
        let generation = self.dial.generation();
        if let Some((dialled, open)) = self.lock().open.get(address)
            && *dialled == generation
        {
            return Ok(open.clone());
        }
        let lost = |reason: String| Failed::Lost {
            reason,
            sent: false,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = left.min(self.timing.connect);
        let greeted = timeout(limit, async {
            let channel = connect_over(address, self.dial.clone(), limit)
                .await
                .map_err(lost)?;
            let mut stub = Stub::new(versioned(channel))
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            let mut request = Request::new(HelloRequest {});
            request.set_timeout(limit);
            match stub.hello(request).await {
                Ok(hello) => Ok((stub, hello.into_inner())),
                Err(status) => match classify(&status) {
                    refused @ Failed::Final { .. } => Err(refused),
                    Failed::Redirected(_) => Err(lost("it does not greet".into())),
                    Failed::Lost { reason, .. } => Err(lost(reason)),
                },
            }
        });
        let (stub, hello) = greeted
            .await
            .map_err(|_| lost(format!("no greeting within {limit:?}")))??;
        if ClusterId::from_wire(hello.cluster) != Ok(self.cluster) {
            return Err(lost("it is a node of another cluster".into()));
        }
        let open = Open::new(stub);
        self.lock()
            .open
            .insert(address.to_owned(), (generation, open.clone()));
        Ok(open)
    }

    fn learn(&self, leader: Option<&str>) {
        let mut state = self.lock();
        state.leader = leader.map(str::to_owned);
        if let Some(leader) = leader
            && state.known.len() < NODES_MAX
            && !state.known.iter().any(|known| known == leader)
        {
            state.known.push(leader.to_owned());
        }
    }

    /// All nodes of the cluster, to be tried when those known before do not answer.
    pub(super) fn learn_members<'a>(&self, addresses: impl Iterator<Item = &'a str>) {
        let mut state = self.lock();
        for address in addresses {
            if state.known.len() < NODES_MAX && !state.known.iter().any(|known| known == address) {
                state.known.push(address.to_owned());
            }
        }
    }

    /// All nodes that are known, the leader first.
    pub(super) fn addresses(&self) -> Vec<String> {
        let state = self.lock();
        let leader = state.leader.iter();
        let others = state
            .known
            .iter()
            .filter(|known| state.leader.as_ref() != Some(known));
        leader.chain(others).cloned().collect()
    }

    /// A connection that fell silent is not used again.
    pub(super) fn drop_connection(&self, address: &str) {
        self.lock().open.remove(address);
    }

    fn forget_leader(&self, address: &str) {
        let mut state = self.lock();
        if state.leader.as_deref() == Some(address) {
            state.leader = None;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // No step under the lock can leave it half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn classify(status: &Status) -> Failed {
    let (error, decided) = match error_of(status) {
        Some(CallError::NotLeader { leader }) => return Failed::Redirected(leader),
        Some(CallError::Refused(error)) => (error, false),
        Some(CallError::Decided(error)) => (error, true),
        None => return classify_transport(status),
    };
    match error {
        // "Certainly not applied": but perhaps by an attempt before.
        MetadError::NoQuorum(_) => Failed::Redirected(None),
        MetadError::Unknown(reason) | MetadError::Unreachable(reason) => {
            Failed::Lost { reason, sent: true }
        }
        // Another node may have room.
        MetadError::Busy(reason) => Failed::Lost {
            reason,
            sent: false,
        },
        error => Failed::Final { error, decided },
    }
}

fn classify_transport(status: &Status) -> Failed {
    let reason = describe(status);
    let error = match status.code() {
        Code::OutOfRange | Code::ResourceExhausted | Code::InvalidArgument => {
            MetadError::Invalid(reason)
        }
        Code::PermissionDenied | Code::Unauthenticated => MetadError::Denied(reason),
        Code::Unimplemented => MetadError::Unreachable(format!(
            "metad does not know this request, it is of another version: {reason}"
        )),
        _ => return Failed::Lost { reason, sent: true },
    };
    Failed::Final {
        error,
        decided: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::status_of;
    use qsfs_zstor::id::Epoch;

    /// How a call ends that is refused so after an attempt whose answer was lost.
    fn end_after_loss(kind: Kind, status: &Status) -> MetadError {
        let trail = Trail {
            uncertain: Some("no answer".into()),
            ..Trail::default()
        };
        match classify(status) {
            Failed::Final { error, decided } => trail.refused(kind, error, decided),
            _ => panic!("{status:?} is no refusal"),
        }
    }

    #[test]
    fn what_one_node_refuses_says_nothing_of_the_attempt_before() {
        let denied = CallError::Refused(MetadError::Denied("another role".into()));
        for status in [
            Status::resource_exhausted("too large"),
            Status::out_of_range("too large"),
            Status::invalid_argument("what?"),
            Status::permission_denied("no"),
            Status::unauthenticated("who?"),
            Status::unimplemented("older"),
            status_of(&denied),
        ] {
            let ended = end_after_loss(Kind::Mutation, &status);
            assert!(matches!(ended, MetadError::Unknown(_)), "{ended:?}");
            let ended = end_after_loss(Kind::Read, &status);
            assert!(!matches!(ended, MetadError::Unknown(_)), "{ended:?}");
        }
    }

    #[test]
    fn what_the_cluster_decided_settles_it() {
        let fenced = MetadError::Fenced { current: Epoch(9) };
        let status = status_of(&CallError::Decided(fenced.clone()));
        assert_eq!(end_after_loss(Kind::Mutation, &status), fenced);
    }

    #[test]
    fn without_a_lost_attempt_a_refusal_is_what_it_says() {
        let status = Status::permission_denied("no");
        let Failed::Final { error, decided } = classify(&status) else {
            panic!("it is a refusal");
        };
        let ended = Trail::default().refused(Kind::Mutation, error, decided);
        assert!(matches!(ended, MetadError::Denied(_)), "{ended:?}");
    }
}
