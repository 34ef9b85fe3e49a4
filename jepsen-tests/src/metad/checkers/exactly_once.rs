//! Is a request that is repeated, by whoever repeats it, answered and done once?
//!
//! Seen in three ways: all answers to one named request agree; an epoch is one acquisition, so the epochs of a volume are as many as
//! the acquisitions that were granted, plus at most those whose end is unknown; a record's version is likewise one swap.

use super::{Call, Summary, Violation, by_key, pair, requests};
use crate::metad::final_state::{FinalState, FinalVolume};
use crate::metad::history::{Event, Failure, Kind, Operation, Reason};
use std::collections::HashMap;

const NAME: &str = "exactly once";

/// Checks answers, epochs and versions.
pub fn check(events: &[Event], end: &FinalState) -> Result<Summary, Violation> {
    let repeated = check_answers(&pair(events)?)?;
    let (mut epochs, mut versions) = (0, 0);
    for (key, calls) in by_key(requests(events)?) {
        let Some(volume) = end.volumes.get(key) else {
            continue;
        };
        let deletions = calls.iter().filter(|call| {
            call.may_have_effect() && matches!(call.operation(), Operation::DeleteVolume)
        });
        // A volume made again begins to count again.
        if deletions.count() > 0 {
            continue;
        }
        epochs += check_epochs(key, &calls, volume)?;
        versions += check_versions(key, &calls, volume)?;
    }
    let text =
        format!("{repeated} repeated requests, {epochs} epochs, {versions} swaps were done once");
    Ok(Summary::new(NAME, text))
}

/// Requests that were asked again and answered again: how much there is to judge.
pub fn repeated(events: &[Event]) -> Result<usize, Violation> {
    check_answers(&pair(events)?)
}

fn check_answers(calls: &[Call<'_>]) -> Result<usize, Violation> {
    let mut first: HashMap<&str, &Call<'_>> = HashMap::new();
    let mut repeated = 0;
    for call in calls {
        let Some(name) = call.invoke.request.as_deref() else {
            continue;
        };
        let decided = |failure: &Failure| failure.reason != Reason::NotDone;
        if let (Some(known), true) = (first.get(name), call.failure().is_some_and(decided))
            && known.before(call)
        {
            let what = format!("request {name} took effect, and was refused when it was repeated");
            return Err(Violation::of(NAME, what, &[known, call]));
        }
        if !call.is_ok() {
            continue;
        }
        match first.get(name) {
            Some(known) if known.operation() != call.operation() => {
                let what = format!("request {name} was answered in two ways");
                return Err(Violation::of(NAME, what, &[known, call]));
            }
            Some(_) => repeated += 1,
            None => {
                first.insert(name, call);
            }
        }
    }
    Ok(repeated)
}

fn check_epochs(key: &str, calls: &[Call<'_>], volume: &FinalVolume) -> Result<u64, Violation> {
    let mut granted: HashMap<u64, &Call<'_>> = HashMap::new();
    let mut open = 0;
    for call in calls {
        match (call.operation(), call.kind()) {
            (
                Operation::AcquireLease {
                    epoch: Some(epoch), ..
                },
                Kind::Ok,
            ) => {
                if let Some(other) = granted.insert(*epoch, call) {
                    let what =
                        format!("two acquisitions of volume {key} were granted epoch {epoch}");
                    return Err(Violation::of(NAME, what, &[other, call]));
                }
            }
            (Operation::AcquireLease { .. }, Kind::Unknown) => open += 1,
            _ => {}
        }
    }
    let last = volume.seen.epoch;
    if let Some(call) = granted.iter().find(|(epoch, _)| **epoch > last) {
        let what =
            format!("volume {key} is at epoch {last} at the end, below one that was granted");
        return Err(Violation::of(NAME, what, &[call.1]));
    }
    let unexplained = last - granted.len() as u64;
    if unexplained > open {
        let what = format!(
            "volume {key} went through {last} epochs; {} acquisitions were granted and {open} are unknown: some were done twice",
            granted.len()
        );
        let shown: Vec<_> = granted.values().copied().collect();
        return Err(Violation::of(NAME, what, &shown));
    }
    Ok(last)
}

fn check_versions(key: &str, calls: &[Call<'_>], volume: &FinalVolume) -> Result<u64, Violation> {
    let mut swaps = 0;
    for record in &volume.records {
        let id = record.datafile.0;
        let of_record = |call: &&Call<'_>| match call.operation() {
            Operation::SwapShard { datafile, .. } => *datafile == id,
            _ => false,
        };
        // What was released and committed again begins at version 0.
        let released = calls.iter().any(|call| match call.operation() {
            Operation::ReleaseDatafiles { datafiles, .. } => {
                call.may_have_effect() && datafiles.contains(&id)
            }
            _ => false,
        });
        if released {
            continue;
        }
        let tried: Vec<_> = calls.iter().filter(of_record).collect();
        let done = tried.iter().filter(|call| call.is_ok()).count() as u64;
        // A report may be a version too, if the shard was there and well.
        let reported = calls.iter().filter(|call| match call.operation() {
            Operation::ReportShard { datafile, .. } => *datafile == id && call.may_have_effect(),
            _ => false,
        });
        let most = tried.iter().filter(|call| call.may_have_effect()).count() as u64
            + reported.count() as u64;
        if !(done..=most).contains(&record.version) {
            let what = format!(
                "datafile {id} of volume {key} has version {} after {done} to {most} swaps",
                record.version
            );
            return Err(Violation::of(NAME, what, &tried));
        }
        swaps += record.version;
    }
    Ok(swaps)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{History, acquire, acquired, end, record, seen};
    use super::*;

    #[test]
    fn unknown_acquisitions_explain_missing_epochs() {
        let mut history = History::with_writer();
        history.ask(1, "v", acquire(1));
        history.unknown(1);
        history.done(2, acquired(2, 3));
        assert!(check(history.events(), &end(seen(3, 0, 0), vec![])).is_ok());
    }

    #[test]
    fn an_acquisition_done_twice_is_caught() {
        let mut history = History::with_writer();
        history.done(2, acquired(2, 3));
        let found = check(history.events(), &end(seen(3, 0, 0), vec![]));
        assert!(found.expect_err("caught").what.contains("done twice"));
    }

    #[test]
    fn an_epoch_granted_and_then_forgotten_is_caught() {
        let mut history = History::with_writer();
        history.done(2, acquired(2, 2));
        let found = check(history.events(), &end(seen(1, 0, 0), vec![]));
        assert!(found.expect_err("caught").what.contains("below one"));
    }

    #[test]
    fn two_answers_to_one_request_are_caught() {
        let mut history = History::with_writer();
        for (process, epoch) in [(1, 2), (2, 3)] {
            history.ask_as(process, "v", acquire(1), "c1/7");
            history.ok(process, acquired(1, epoch));
        }
        let found = check(history.events(), &end(seen(3, 0, 0), vec![]));
        assert!(found.expect_err("caught").what.contains("two ways"));
    }

    #[test]
    fn a_repeated_request_that_is_refused_after_it_was_done_is_caught() {
        let mut history = History::with_writer();
        history.ask_as(1, "v", acquire(1), "c1/7");
        history.ok(1, acquired(1, 2));
        for (reason, fine) in [(Reason::NotDone, true), (Reason::Held, false)] {
            history.ask_as(1, "v", acquire(1), "c1/7");
            history.fail(1, reason, None);
            let found = check(history.events(), &end(seen(2, 0, 0), vec![]));
            assert_eq!(found.is_ok(), fine, "{reason:?}: {found:?}");
        }
    }

    #[test]
    fn one_answer_to_a_repeated_request_is_one_epoch() {
        let mut history = History::with_writer();
        for process in [1, 2] {
            history.ask_as(process, "v", acquire(1), "c1/7");
            history.ok(process, acquired(1, 2));
        }
        let found = check(history.events(), &end(seen(2, 0, 0), vec![]));
        let text = found.expect("fine").text;
        assert!(text.contains("1 repeated"), "{text}");
    }

    #[test]
    fn a_swap_done_twice_is_caught() {
        let swap = Operation::SwapShard {
            datafile: 1,
            shard: 0,
            from: 1,
            to: 2,
            version: 0,
            swapped: Some(1),
        };
        let mut history = History::with_writer();
        history.done(1, swap);
        let mut twice = record(1, 10);
        for (version, fine) in [(1, true), (2, false), (0, false)] {
            twice.version = version;
            let found = check(history.events(), &end(seen(1, 0, 0), vec![twice.clone()]));
            assert_eq!(found.is_ok(), fine, "{version}: {found:?}");
        }
    }
}
