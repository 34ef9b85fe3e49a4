//! Is there one order of all operations of a volume, each taking effect at once somewhere between its call and its answer, that
//! explains every answer?
//!
//! The search is that of Wing and Gong with Lowe's memory of configurations seen (as in Porcupine and Knossos), a volume at a time:
//! linearizability is local, so volumes are independent. What failed is no part of the order, except refusals that tell something of
//! the state (fenced by epoch 7): they are reads of it. What is unknown may take effect at any moment after its call, or never.
//!
//! The model is a volume written down again as simply as can be; it knows no time, so a lease that ended by itself is only seen by
//! [`super::fencing`].

use super::{Call, Summary, Violation, by_key, requests};
use crate::metad::history::{
    Event, Failure, HeadSeen, Kind, Operation, Reason, RecordSeen, VolumeSeen,
};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

const NAME: &str = "linearizable";

/// How long to search.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Steps tried for one volume. When they are used up, that is a violation too: nothing was shown.
    pub steps_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            steps_max: 5_000_000,
        }
    }
}

/// A volume, or its absence.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Model {
    exists: bool,
    epoch: u64,
    held: bool,
    head: HeadSeen,
    quota_bytes: u64,
    records: BTreeMap<u64, Record>,
}

/// What is known of a record.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Record {
    attempt: u64,
    version: u64,
    /// Where shards are that have moved.
    moved: BTreeMap<u32, u64>,
    /// Shards that were reported.
    bad: BTreeSet<u32>,
}

impl Record {
    /// `None`: not from this version.
    fn swap(&mut self, from: u64, shard: u32, to: u64) -> Option<()> {
        if self.version != from {
            return None;
        }
        self.version += 1;
        self.moved.insert(shard, to);
        self.bad.remove(&shard);
        Some(())
    }

    /// Of a shard that is still there and was well. One that nobody has moved is where whoever reports it saw it.
    fn report(&mut self, shard: u32, backend: u64) {
        let there = self.moved.get(&shard).is_none_or(|at| *at == backend);
        if there && self.bad.insert(shard) {
            self.version += 1;
        }
    }
}

impl Model {
    fn writes(&self, epoch: u64) -> bool {
        self.exists && self.epoch == epoch && self.held
    }

    fn seen(&self) -> VolumeSeen {
        VolumeSeen {
            epoch: self.epoch,
            held: self.held,
            head: self.head,
            quota_bytes: self.quota_bytes,
        }
    }

    fn listed(&self) -> Vec<RecordSeen> {
        let records = self.records.iter();
        let seen = records.map(|(datafile, record)| RecordSeen {
            datafile: *datafile,
            attempt: record.attempt,
            version: record.version,
        });
        seen.collect()
    }

    /// The volume after an operation that succeeded with the answer it holds (or, where there is none, any); `None`: it could
    /// not have.
    fn after(&self, operation: &Operation) -> Option<Self> {
        let mut next = self.clone();
        match operation {
            Operation::CreateVolume { quota_bytes } if !self.exists => {
                next = Self {
                    exists: true,
                    quota_bytes: *quota_bytes,
                    ..Self::default()
                };
            }
            // The same one again, which is nothing new.
            Operation::CreateVolume { .. } => {}
            _ if !self.exists => return None,
            Operation::DeleteVolume => next = Self::default(),
            Operation::SetQuota { bytes } => next.quota_bytes = *bytes,
            Operation::AcquireLease { epoch, .. } => {
                next.epoch += 1;
                next.held = true;
                if epoch.is_some_and(|granted| granted != next.epoch) {
                    return None;
                }
            }
            Operation::ReleaseLease { epoch } => {
                next.held = false;
                if *epoch != self.epoch {
                    return None;
                }
            }
            Operation::RenewLease { epoch }
            | Operation::CommitDatafiles { epoch, .. }
            | Operation::ReleaseDatafiles { epoch, .. }
                if !self.writes(*epoch) =>
            {
                return None;
            }
            Operation::RenewLease { .. } => {}
            Operation::CommitDatafiles {
                datafiles, head, ..
            } => {
                for datafile in datafiles {
                    let row = next.records.entry(datafile.id);
                    let new = || Record {
                        attempt: datafile.attempt,
                        ..Record::default()
                    };
                    if row.or_insert_with(new).attempt != datafile.attempt {
                        return None;
                    }
                }
                next.head = head.unwrap_or(self.head);
                if next.head.datafile < self.head.datafile
                    || next.head.recover_from < self.head.recover_from
                {
                    return None;
                }
            }
            Operation::ReleaseDatafiles { datafiles, .. } => {
                next.records.retain(|id, _| !datafiles.contains(id));
            }
            Operation::SwapShard {
                datafile,
                version,
                swapped,
                shard,
                to,
                ..
            } => {
                let record = next.records.get_mut(datafile)?;
                record.swap(*version, *shard, *to)?;
                if swapped.is_some_and(|told| told != record.version) {
                    return None;
                }
            }
            Operation::ReportShard {
                datafile,
                shard,
                backend,
            } => {
                if let Some(record) = next.records.get_mut(datafile) {
                    record.report(*shard, *backend);
                }
            }
            // How old it may be is `staleness`' to judge.
            Operation::StaleRead { .. } => {}
            Operation::ReadVolume { seen } => {
                if seen.as_ref().is_some_and(|seen| *seen != self.seen()) {
                    return None;
                }
            }
            Operation::ListRecords { seen } => {
                if seen.as_ref().is_some_and(|seen| *seen != self.listed()) {
                    return None;
                }
            }
        }
        Some(next)
    }

    /// Could this have been refused so?
    fn refuses(&self, operation: &Operation, failure: &Failure) -> bool {
        match (failure.reason, failure.current) {
            (Reason::Fenced, Some(current)) => {
                let fenced = match operation {
                    Operation::ReleaseLease { epoch } => *epoch != self.epoch,
                    _ => operation
                        .claimed_epoch()
                        .is_some_and(|epoch| !self.writes(epoch)),
                };
                self.exists && self.epoch == current && fenced
            }
            (Reason::Held, Some(epoch)) => self.writes(epoch),
            (Reason::NoSuchVolume, _) => !self.exists,
            (Reason::VersionConflict, Some(current)) => match operation {
                Operation::SwapShard { datafile, .. } => {
                    let record = self.records.get(datafile);
                    record.is_some_and(|record| record.version == current)
                }
                _ => false,
            },
            _ => true,
        }
    }
}

/// Does the end of a call say nothing, so that the search need not place it?
fn says_nothing(call: &Call<'_>) -> bool {
    if matches!(call.invoke.operation, Operation::StaleRead { .. }) {
        return true;
    }
    match call.kind() {
        Kind::Ok | Kind::Invoke => false,
        Kind::Fail => call
            .failure()
            .is_none_or(|failure| matches!(failure.reason, Reason::NotDone | Reason::Refused)),
        // A renewal changes nothing that the model knows.
        Kind::Unknown => {
            let operation = &call.invoke.operation;
            operation.is_read() || matches!(operation, Operation::RenewLease { .. })
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Entry {
    /// A call may take effect from here.
    Asked(usize),
    /// It must have by here.
    Ended,
}

/// Beginnings and ends that are still to be placed, as a doubly linked list: 0 is the front, the last one the back.
struct Pending {
    entries: Vec<Entry>,
    next: Vec<usize>,
    previous: Vec<usize>,
    /// Where each call begins and ends in the list.
    places: Vec<(usize, Option<usize>)>,
}

impl Pending {
    fn new(calls: &[Call<'_>]) -> Self {
        let mut order: Vec<(usize, Entry, usize)> = Vec::new();
        for (number, call) in calls.iter().enumerate() {
            order.push((call.asked, Entry::Asked(number), number));
            if let (Some(ended), true) = (call.ended, call.kind() != Kind::Unknown) {
                order.push((ended, Entry::Ended, number));
            }
        }
        order.sort_by_key(|(at, ..)| *at);
        let mut places = vec![(0, None); calls.len()];
        let mut entries = vec![Entry::Ended];
        for (_, entry, number) in order {
            match entry {
                Entry::Asked(_) => places[number].0 = entries.len(),
                Entry::Ended => places[number].1 = Some(entries.len()),
            }
            entries.push(entry);
        }
        entries.push(Entry::Ended);
        let length = entries.len();
        Self {
            entries,
            next: (1..=length).collect(),
            previous: (0..length).map(|at| at.saturating_sub(1)).collect(),
            places,
        }
    }

    fn back(&self) -> usize {
        self.entries.len() - 1
    }

    fn unlink(&mut self, at: usize) {
        let (previous, next) = (self.previous[at], self.next[at]);
        self.next[previous] = next;
        self.previous[next] = previous;
    }

    fn relink(&mut self, at: usize) {
        let (previous, next) = (self.previous[at], self.next[at]);
        self.next[previous] = at;
        self.previous[next] = at;
    }

    fn take(&mut self, call: usize) {
        let (asked, ended) = self.places[call];
        self.unlink(asked);
        if let Some(ended) = ended {
            self.unlink(ended);
        }
    }

    /// In the reverse order of [`Self::take`].
    fn put_back(&mut self, call: usize) {
        let (asked, ended) = self.places[call];
        if let Some(ended) = ended {
            self.relink(ended);
        }
        self.relink(asked);
    }

    /// The call whose end is at `at`.
    fn ended(&self, at: usize) -> Option<usize> {
        self.places.iter().position(|(_, ended)| *ended == Some(at))
    }
}

/// States seen, by number, so that a configuration is small.
#[derive(Default)]
struct States {
    numbers: HashMap<Model, usize>,
    states: Vec<Model>,
}

impl States {
    fn number(&mut self, model: Model) -> usize {
        if let Some(number) = self.numbers.get(&model) {
            return *number;
        }
        let number = self.states.len();
        self.numbers.insert(model.clone(), number);
        self.states.push(model);
        number
    }
}

/// Why no order was found.
struct Stuck {
    /// Steps were used up.
    gave_up: bool,
    /// Most calls that were placed in one order.
    placed: usize,
    /// The call that could not be placed then.
    at: Option<usize>,
    /// The volume as it was then.
    model: Model,
}

/// Steps taken, or how far it got.
fn search(calls: &[Call<'_>], limits: &Limits) -> Result<u64, Box<Stuck>> {
    let mut pending = Pending::new(calls);
    let mut to_place = pending.places.iter().filter(|p| p.1.is_some()).count();
    let mut states = States::default();
    let mut state = states.number(Model::default());
    let mut taken = vec![0u64; calls.len().div_ceil(64)];
    let mut seen: HashSet<(Vec<u64>, usize)> = HashSet::new();
    let mut order: Vec<(usize, usize)> = Vec::new();
    let mut steps = 0;
    let mut best = Box::new(Stuck {
        gave_up: false,
        placed: 0,
        at: None,
        model: Model::default(),
    });
    let mut at = pending.next[0];
    while to_place > 0 {
        if let Entry::Asked(number) = pending.entries[at] {
            steps += 1;
            if steps > limits.steps_max {
                best.gave_up = true;
                return Err(best);
            }
            if let Some(next) = placed(&states.states[state], &calls[number]) {
                let next = states.number(next);
                taken[number / 64] ^= 1 << (number % 64);
                if seen.insert((taken.clone(), next)) {
                    order.push((number, state));
                    state = next;
                    pending.take(number);
                    to_place -= usize::from(pending.places[number].1.is_some());
                    at = pending.next[0];
                    continue;
                }
                taken[number / 64] ^= 1 << (number % 64);
            }
            at = pending.next[at];
            continue;
        }
        debug_assert!(at < pending.back(), "something is still to be placed");
        if best.at.is_none() || order.len() > best.placed {
            best.placed = order.len();
            best.at = pending.ended(at);
            best.model = states.states[state].clone();
        }
        let Some((number, before)) = order.pop() else {
            return Err(best);
        };
        state = before;
        taken[number / 64] ^= 1 << (number % 64);
        pending.put_back(number);
        to_place += usize::from(pending.places[number].1.is_some());
        at = pending.next[pending.places[number].0];
    }
    Ok(steps)
}

/// The volume after a call that is put next in the order, if that may be.
fn placed(model: &Model, call: &Call<'_>) -> Option<Model> {
    match call.failure() {
        Some(failure) => model
            .refuses(&call.invoke.operation, failure)
            .then(|| model.clone()),
        None => model.after(call.operation()),
    }
}

/// Checks every volume.
pub fn check(events: &[Event], limits: &Limits) -> Result<Summary, Violation> {
    let (mut volumes, mut placed, mut steps) = (0, 0, 0);
    for (key, mut calls) in by_key(requests(events)?) {
        calls.retain(|call| !says_nothing(call));
        steps += search(&calls, limits).map_err(|stuck| violation(key, &calls, &stuck))?;
        volumes += 1;
        placed += calls.len();
    }
    let text = format!("{placed} operations on {volumes} volumes have an order ({steps} steps)");
    Ok(Summary::new(NAME, text))
}

fn violation(key: &str, calls: &[Call<'_>], stuck: &Stuck) -> Violation {
    let what = if stuck.gave_up {
        "undecided: the search was given up"
    } else {
        "no order explains the answers"
    };
    let what = format!(
        "{what} on volume {key}: {} of {} operations can be ordered, the first one below not after them; the volume then: {:?}",
        stuck.placed,
        calls.len(),
        stuck.model
    );
    // It, and what was under way at the same time.
    let Some(at) = stuck.at else {
        return Violation::of(NAME, what, &[]);
    };
    let first = &calls[at];
    let others = calls
        .iter()
        .enumerate()
        .filter(|(number, other)| *number != at && !other.before(first) && !first.before(other));
    let mut shown = vec![first];
    shown.extend(others.map(|(_, call)| call));
    Violation::of(NAME, what, &shown)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{History, acquire, acquired, commit, quota, read, release, seen};
    use super::*;

    fn checked(history: &History) -> Result<Summary, Violation> {
        check(history.events(), &Limits::default())
    }

    fn caught(history: &History) {
        let violation = checked(history).expect_err("it must be caught");
        assert!(violation.what.contains("no order"), "{violation}");
        assert!(!violation.events.is_empty());
    }

    #[test]
    fn one_thing_after_another_is_fine() {
        let mut history = History::with_writer();
        history.done(0, quota(5));
        history.done(1, read(1, 0, 5));
        history.done(0, commit(1, 1, 10));
        history.done(1, read(1, 1, 5));
        history.done(0, release(1, 1));
        history.done(2, acquired(2, 2));
        history.ask(0, "v", commit(1, 2, 11));
        history.fail(0, Reason::Fenced, Some(2));
        assert_eq!(checked(&history).map(|summary| summary.checker), Ok(NAME));
    }

    #[test]
    fn reads_at_the_same_time_as_a_write_may_see_either() {
        for first in [0, 7] {
            let mut history = History::with_writer();
            history.ask(0, "v", quota(7));
            history.done(1, read(1, 0, first));
            history.ok(0, quota(7));
            history.done(1, read(1, 0, 7));
            assert!(checked(&history).is_ok());
        }
    }

    #[test]
    fn a_stale_read_is_caught() {
        let mut history = History::with_writer();
        history.done(0, quota(7));
        history.done(1, read(1, 0, 0));
        caught(&history);
    }

    #[test]
    fn a_read_that_goes_back_while_a_write_is_under_way_is_caught() {
        let mut history = History::with_writer();
        history.ask(0, "v", quota(7));
        history.done(1, read(1, 0, 7));
        history.done(2, read(1, 0, 0));
        history.ok(0, quota(7));
        caught(&history);
    }

    #[test]
    fn the_unknown_may_take_effect_late_or_never() {
        let mut history = History::with_writer();
        history.ask(1, "v", quota(7));
        history.unknown(1);
        history.done(2, read(1, 0, 0));
        assert!(checked(&history).is_ok());
        history.done(2, read(1, 0, 7));
        assert!(checked(&history).is_ok());
        // But not twice.
        history.done(0, quota(8));
        history.done(2, read(1, 0, 7));
        caught(&history);
    }

    #[test]
    fn a_lost_write_is_caught() {
        let mut history = History::with_writer();
        history.done(0, commit(1, 1, 10));
        let list = |seen| Operation::ListRecords { seen };
        history.ask(1, "v", list(None));
        history.ok(1, list(Some(vec![])));
        caught(&history);
    }

    #[test]
    fn an_epoch_granted_twice_is_caught() {
        let mut history = History::with_writer();
        history.ask(1, "v", acquire(1));
        history.ask(2, "v", acquire(2));
        history.ok(1, acquired(1, 2));
        history.ok(2, acquired(2, 2));
        caught(&history);
    }

    #[test]
    fn a_request_applied_twice_is_caught() {
        let mut history = History::with_writer();
        history.done(1, acquired(1, 2));
        history.done(2, acquired(2, 4));
        caught(&history);
    }

    #[test]
    fn a_refusal_that_cannot_have_been_is_caught() {
        let mut history = History::with_writer();
        history.ask(0, "v", commit(1, 1, 10));
        history.fail(0, Reason::Fenced, Some(2));
        caught(&history);
    }

    #[test]
    fn a_swap_of_a_version_that_is_gone_is_caught() {
        let swap = |swapped| Operation::SwapShard {
            datafile: 1,
            shard: 0,
            from: 1,
            to: 2,
            version: 0,
            swapped,
        };
        let mut history = History::with_writer();
        history.done(0, commit(1, 1, 10));
        history.done(1, swap(Some(1)));
        assert!(checked(&history).is_ok());
        history.done(2, swap(Some(1)));
        caught(&history);
    }

    #[test]
    fn a_search_that_was_given_up_is_no_success() {
        let mut history = History::with_writer();
        for process in 1..30 {
            history.ask(process, "v", acquire(process));
        }
        for process in 1..30 {
            history.ok(process, acquired(process, 31 - process));
        }
        assert!(checked(&history).is_ok());
        let violation = check(history.events(), &Limits { steps_max: 10 });
        let violation = violation.expect_err("ten steps are not enough");
        assert!(violation.what.contains("undecided"), "{violation}");
    }

    #[test]
    fn volumes_are_independent() {
        let mut history = History::new();
        let read = || Operation::ReadVolume {
            seen: Some(seen(0, 0, 4)),
        };
        for key in ["a", "b"] {
            history.ask(0, key, Operation::CreateVolume { quota_bytes: 4 });
            history.ok(0, Operation::CreateVolume { quota_bytes: 4 });
            history.ask(0, key, Operation::ReadVolume { seen: None });
            history.ok(0, read());
        }
        let summary = checked(&history).expect("both are fine");
        assert!(summary.text.contains("2 volumes"), "{summary}");
    }

    #[test]
    fn the_search_agrees_with_trying_all_orders() {
        use rand::{Rng, SeedableRng};
        // Small random histories, right and wrong ones, against all permutations.
        let mut rng = rand::rngs::StdRng::seed_from_u64(7);
        let (mut fine, mut wrong) = (0, 0);
        for _ in 0..400 {
            let mut history = History::new();
            history.done(9, Operation::CreateVolume { quota_bytes: 0 });
            let mut open: Vec<(u64, Operation)> = Vec::new();
            for process in 0..5 {
                let operation = match rng.random_range(0..3) {
                    0 => Operation::SetQuota {
                        bytes: rng.random_range(1..3),
                    },
                    1 => acquire(process),
                    _ => Operation::ReadVolume { seen: None },
                };
                history.ask(process, "v", operation.clone());
                open.push((process, operation));
                if rng.random_bool(0.6) {
                    let (process, operation) = open.remove(rng.random_range(0..open.len()));
                    answer(&mut history, &mut rng, process, operation);
                }
            }
            for (process, operation) in open {
                answer(&mut history, &mut rng, process, operation);
            }
            let calls = requests(history.events()).expect("well formed");
            let possible = any_order(&Model::default(), &calls, &mut vec![false; calls.len()]);
            assert_eq!(
                checked(&history).is_ok(),
                possible,
                "{:?}",
                history.events()
            );
            *(if possible { &mut fine } else { &mut wrong }) += 1;
        }
        assert!(fine > 20 && wrong > 20, "{fine} fine, {wrong} wrong");
    }

    fn answer(
        history: &mut History,
        rng: &mut rand::rngs::StdRng,
        process: u64,
        operation: Operation,
    ) {
        use rand::Rng;
        let operation = match operation {
            Operation::AcquireLease { client, .. } => acquired(client, rng.random_range(1..3)),
            Operation::ReadVolume { .. } => read(rng.random_range(0..3), 0, rng.random_range(0..3)),
            other => other,
        };
        if rng.random_bool(0.2) && !operation.is_read() {
            history.unknown(process);
        } else {
            history.ok(process, operation);
        }
    }

    fn any_order(model: &Model, calls: &[Call<'_>], done: &mut Vec<bool>) -> bool {
        let left: Vec<usize> = (0..calls.len()).filter(|n| !done[*n]).collect();
        if left.iter().all(|n| calls[*n].kind() == Kind::Unknown) {
            return true;
        }
        for number in &left {
            if left
                .iter()
                .any(|other| calls[*other].before(&calls[*number]))
            {
                continue;
            }
            if let Some(next) = model.after(calls[*number].operation()) {
                done[*number] = true;
                let found = any_order(&next, calls, done);
                done[*number] = false;
                if found {
                    return true;
                }
            }
        }
        false
    }
}
