//! One file per property; each is a pure function from what was seen to a summary or a violation that names the events.
//!
//! | checker | holds when |
//! | --- | --- |
//! | [`linearizable`] | what each volume's clients saw is explained by one order of whole operations, each between its call and its answer |
//! | [`exactly_once`] | a repeated request has one answer and one effect |
//! | [`fencing`] | nothing succeeds under an old epoch; one holder per epoch; epochs grow; a living lease is not given away |
//! | [`no_lost_commit`] | every acknowledged commit is there at the end, and nothing that failed or was never asked |
//! | [`head`] | the head never goes back, and all that it leads to has a record |
//! | [`deterministic`] | nodes that applied the same entries hold the same rows |
//! | [`staleness`] | what a node answers by itself is not older than it promises |
//! | [`placement`] | committed records satisfy the placement rules, or count as below policy |

pub mod deterministic;
pub mod exactly_once;
pub mod fencing;
pub mod head;
pub mod linearizable;
pub mod no_lost_commit;
pub mod placement;
pub mod staleness;

#[cfg(test)]
pub(crate) mod testing;

use super::final_state::FinalState;
use super::history::{Event, Failure, Kind, Operation};
use std::collections::{BTreeMap, HashMap};
use std::fmt;

/// What a checker looked at, when all was well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Which checker.
    pub checker: &'static str,
    /// For people.
    pub text: String,
}

impl Summary {
    pub(crate) fn new(checker: &'static str, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { checker, text }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.checker, self.text)
    }
}

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Violation {
    /// Which checker.
    pub checker: &'static str,
    /// For people.
    pub what: String,
    /// The events that show it.
    pub events: Vec<Event>,
}

impl Violation {
    pub(crate) fn new(checker: &'static str, what: impl Into<String>, events: Vec<Event>) -> Self {
        let what = what.into();
        Self {
            checker,
            what,
            events,
        }
    }

    /// Shown by these calls.
    pub(crate) fn of(checker: &'static str, what: impl Into<String>, calls: &[&Call<'_>]) -> Self {
        let events = calls.iter().flat_map(|call| call.events()).collect();
        Self::new(checker, what, events)
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.checker, self.what)?;
        for event in &self.events {
            let line = serde_json::to_string(event).map_err(|_| fmt::Error)?;
            write!(f, "\n  {line}")?;
        }
        Ok(())
    }
}

/// A call with its end, if it had one.
#[derive(Debug, Clone)]
pub struct Call<'a> {
    /// Position of its beginning in the history.
    pub asked: usize,
    /// Position of its end.
    pub ended: Option<usize>,
    /// Its beginning.
    pub invoke: &'a Event,
    /// Its end.
    pub end: Option<&'a Event>,
}

impl<'a> Call<'a> {
    /// How it ended; without an end it is unknown.
    pub fn kind(&self) -> Kind {
        self.end.map_or(Kind::Unknown, |end| end.kind)
    }

    /// It took effect.
    pub fn is_ok(&self) -> bool {
        self.kind() == Kind::Ok
    }

    /// It may have taken effect.
    pub fn may_have_effect(&self) -> bool {
        self.kind() != Kind::Fail
    }

    /// What was asked, with the answer if there is one.
    pub fn operation(&self) -> &'a Operation {
        match self.end {
            Some(end) if end.kind == Kind::Ok => &end.operation,
            _ => &self.invoke.operation,
        }
    }

    /// Why it failed, if it did.
    pub fn failure(&self) -> Option<&'a Failure> {
        let end = self.end.filter(|end| end.kind == Kind::Fail)?;
        end.error.as_ref()
    }

    /// Was this over, with all its effects, when `other` was asked?
    pub fn before(&self, other: &Self) -> bool {
        self.kind() != Kind::Unknown && self.ended.is_some_and(|ended| ended < other.asked)
    }

    /// Both events, for a violation.
    pub fn events(&self) -> Vec<Event> {
        let both = [Some(self.invoke), self.end];
        both.into_iter().flatten().cloned().collect()
    }
}

/// Pairs beginnings with ends. A process that does two things at once, or ends what it did not begin, is a violation: the
/// history is then no evidence of anything.
pub fn pair(events: &[Event]) -> Result<Vec<Call<'_>>, Violation> {
    let mut calls: Vec<Call<'_>> = Vec::new();
    let mut open: HashMap<u64, usize> = HashMap::new();
    let malformed =
        |what: &str, event: &Event| Err(Violation::new("history", what, vec![event.clone()]));
    for (at, event) in events.iter().enumerate() {
        if event.kind == Kind::Invoke {
            if open.insert(event.process, calls.len()).is_some() {
                return malformed(
                    "a process began something before its last call had ended",
                    event,
                );
            }
            calls.push(Call {
                asked: at,
                ended: None,
                invoke: event,
                end: None,
            });
            continue;
        }
        // A process whose call is unknown never comes back: its entry in `open` stays.
        let number = match event.kind {
            Kind::Unknown => open.get(&event.process).copied(),
            _ => open.remove(&event.process),
        };
        let call = number.map(|number| &mut calls[number]);
        match call {
            Some(call) if call.end.is_none() && call.invoke.key == event.key => {
                call.ended = Some(at);
                call.end = Some(event);
            }
            _ => return malformed("an end without a beginning", event),
        }
    }
    Ok(calls)
}

/// The same, with all tries of one named request as one call: from the first beginning to the first certain end.
pub fn requests(events: &[Event]) -> Result<Vec<Call<'_>>, Violation> {
    let mut merged: Vec<Call<'_>> = Vec::new();
    let mut named: HashMap<&str, usize> = HashMap::new();
    for call in pair(events)? {
        let known = call.invoke.request.as_deref();
        let known = known.and_then(|name| match named.get(name) {
            Some(number) => Some(*number),
            None => {
                named.insert(name, merged.len());
                None
            }
        });
        let Some(number) = known else {
            merged.push(call);
            continue;
        };
        let first = &mut merged[number];
        // One try that was refused unheard says nothing of the others.
        let worth = |call: &Call<'_>| match call.kind() {
            Kind::Ok => 2,
            Kind::Unknown => 1,
            _ => 0,
        };
        let sooner = call.ended < first.ended && worth(&call) == worth(first);
        if worth(&call) > worth(first) || (sooner && call.ended.is_some()) {
            (first.ended, first.end) = (call.ended, call.end);
        }
    }
    Ok(merged)
}

/// Calls by key, in the order in which they were asked.
pub fn by_key<'a>(calls: Vec<Call<'a>>) -> BTreeMap<&'a str, Vec<Call<'a>>> {
    let mut keys: BTreeMap<&str, Vec<Call<'_>>> = BTreeMap::new();
    for call in calls {
        keys.entry(call.invoke.key.as_str()).or_default().push(call);
    }
    keys
}

/// What a run may be judged by besides its history.
#[derive(Debug, Clone, Copy, Default)]
pub struct Terms {
    /// Life of a lease, where all clocks of the run agree: then a living one must not be given away.
    pub lease_ttl_ns: Option<u64>,
}

/// All checkers; every one is asked, whatever the others find.
pub fn check_all(
    events: &[Event],
    end: &FinalState,
    terms: Terms,
) -> Vec<Result<Summary, Violation>> {
    vec![
        linearizable::check(events, &linearizable::Limits::default()),
        exactly_once::check(events, end),
        fencing::check(events, terms.lease_ttl_ns),
        no_lost_commit::check(events, end),
        head::check(events, end),
        deterministic::check(&end.nodes),
        placement::check(end),
        staleness::check(events),
    ]
}

#[cfg(test)]
mod tests {
    use super::testing::History;
    use super::*;

    #[test]
    fn a_process_that_does_two_things_at_once_is_no_history() {
        let mut history = History::new();
        history.ask(1, "v", Operation::DeleteVolume);
        history.ask(1, "v", Operation::DeleteVolume);
        let violation = pair(history.events()).expect_err("two at once");
        assert!(violation.what.contains("before its last call"));
    }

    #[test]
    fn a_process_never_comes_back_from_the_unknown() {
        let mut history = History::new();
        history.ask(1, "v", Operation::DeleteVolume);
        history.unknown(1);
        assert_eq!(pair(history.events()).map(|calls| calls.len()), Ok(1));
        history.ask(1, "v", Operation::DeleteVolume);
        assert!(pair(history.events()).is_err());
    }

    #[test]
    fn tries_of_one_request_are_one_call() {
        let mut history = History::new();
        history.ask_as(1, "v", Operation::DeleteVolume, "r1");
        history.unknown(1);
        history.ask_as(2, "v", Operation::DeleteVolume, "r1");
        history.ok(2, Operation::DeleteVolume);
        let calls = requests(history.events()).expect("well formed");
        assert_eq!(calls.len(), 1);
        assert_eq!((calls[0].asked, calls[0].ended), (0, Some(3)));
        assert!(calls[0].is_ok());
    }
}
