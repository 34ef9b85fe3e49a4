//! Does the head never go back, and does everything that recovery reads from it have a record?

use super::{Call, Summary, Violation, by_key, requests};
use crate::metad::final_state::{FinalState, FinalVolume};
use crate::metad::history::{Event, HeadSeen, Operation};
use qsfs_zstor::id::Stream;
use std::collections::BTreeSet;

const NAME: &str = "head";

/// Checks every volume.
pub fn check(events: &[Event], end: &FinalState) -> Result<Summary, Violation> {
    let mut shown = 0;
    for (key, calls) in by_key(requests(events)?) {
        let deleted = calls.iter().any(|call| {
            call.may_have_effect() && matches!(call.operation(), Operation::DeleteVolume)
        });
        if deleted {
            continue;
        }
        shown += never_back(key, &calls)?;
        if let Some(volume) = end.volumes.get(key) {
            not_behind(key, &calls, volume)?;
            reachable(key, &calls, volume)?;
        }
    }
    let text = format!("{shown} sights of heads, none behind an earlier one");
    Ok(Summary::new(NAME, text))
}

/// The least that the head is once a call ended.
fn at_least(call: &Call<'_>) -> Option<HeadSeen> {
    if !call.is_ok() {
        return None;
    }
    match call.operation() {
        Operation::CommitDatafiles { head, .. } => *head,
        Operation::ReadVolume { seen } => seen.as_ref().map(|seen| seen.head),
        _ => None,
    }
}

fn behind(head: HeadSeen, earlier: HeadSeen) -> bool {
    head.datafile < earlier.datafile || head.recover_from < earlier.recover_from
}

/// Reads, and the heads of commits, against everything that was over before they were asked.
fn never_back(key: &str, calls: &[Call<'_>]) -> Result<usize, Violation> {
    let mut sights: Vec<(usize, HeadSeen, &Call<'_>)> = calls
        .iter()
        .filter_map(|call| Some((call.ended?, at_least(call)?, call)))
        .collect();
    sights.sort_by_key(|(ended, ..)| *ended);
    for (_, head, call) in &sights {
        let over = sights.iter().take_while(|(ended, ..)| *ended < call.asked);
        let ahead = over.map(|(_, head, call)| (head, call));
        if let Some((_, earlier)) = ahead.clone().find(|(earlier, _)| behind(*head, **earlier)) {
            let what = format!("the head of volume {key} went back");
            return Err(Violation::of(NAME, what, &[earlier, call]));
        }
    }
    Ok(sights.len())
}

fn not_behind(key: &str, calls: &[Call<'_>], volume: &FinalVolume) -> Result<(), Violation> {
    let ahead = calls
        .iter()
        .find(|call| at_least(call).is_some_and(|head| behind(volume.seen.head, head)));
    match ahead {
        Some(call) => {
            let what = format!(
                "the head of volume {key} is behind at the end: {:?}",
                volume.seen.head
            );
            Err(Violation::of(NAME, what, &[call]))
        }
        None => Ok(()),
    }
}

/// The head, where recovery begins, and every acknowledged meta datafile in between.
fn reachable(key: &str, calls: &[Call<'_>], volume: &FinalVolume) -> Result<(), Violation> {
    let head = volume.seen.head;
    if head == HeadSeen::default() {
        return Ok(());
    }
    let there: BTreeSet<u64> = volume
        .records
        .iter()
        .filter(|record| record.stream == Stream::Meta)
        .map(|record| record.datafile.0)
        .collect();
    for id in [head.recover_from, head.datafile] {
        if !there.contains(&id) {
            let what = format!("meta datafile {id} of the head of volume {key} has no record");
            return Err(Violation::new(NAME, what, Vec::new()));
        }
    }
    for call in calls.iter().filter(|call| call.is_ok()) {
        let Operation::CommitDatafiles { datafiles, .. } = call.operation() else {
            continue;
        };
        // What recovery needs is never released, whoever asks for it.
        let missing = datafiles.iter().find(|datafile| {
            datafile.meta
                && (head.recover_from..=head.datafile).contains(&datafile.id)
                && !there.contains(&datafile.id)
        });
        if let Some(missing) = missing {
            let what = format!(
                "meta datafile {} of volume {key}, which recovery reads, has no record",
                missing.id
            );
            return Err(Violation::of(NAME, what, &[call]));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{History, commit, end, read, record, seen};
    use super::*;

    #[test]
    fn a_head_that_grows_is_fine() {
        let mut history = History::with_writer();
        history.done(0, commit(1, 1, 10));
        history.ask(0, "v", commit(1, 2, 11));
        history.done(1, read(1, 2, 0));
        history.ok(0, commit(1, 2, 11));
        let there = end(seen(1, 2, 0), vec![record(1, 10), record(2, 11)]);
        assert!(check(history.events(), &there).is_ok());
    }

    #[test]
    fn a_read_behind_a_commit_or_another_read_is_caught() {
        let mut history = History::with_writer();
        history.done(0, commit(1, 1, 10));
        history.done(1, read(1, 0, 0));
        let found = check(history.events(), &FinalState::default());
        assert!(found.expect_err("caught").what.contains("went back"));
        let mut history = History::with_writer();
        history.ask(0, "v", commit(1, 1, 10));
        history.done(1, read(1, 1, 0));
        history.done(2, read(1, 0, 0));
        assert!(check(history.events(), &FinalState::default()).is_err());
    }

    #[test]
    fn a_head_that_is_behind_at_the_end_is_caught() {
        let mut history = History::with_writer();
        history.done(0, commit(1, 1, 10));
        history.done(0, commit(1, 2, 11));
        let records = vec![record(1, 10), record(2, 11)];
        let found = check(history.events(), &end(seen(1, 1, 0), records));
        assert!(found.expect_err("caught").what.contains("behind"));
    }

    #[test]
    fn a_head_without_its_records_is_caught() {
        let mut history = History::with_writer();
        for id in 1..=3 {
            history.done(0, commit(1, id, 10 + id));
        }
        for missing in 1..=3 {
            let ids = (1..=3).filter(|id| *id != missing);
            let records = ids.map(|id| record(id, 10 + id)).collect();
            let found = check(history.events(), &end(seen(1, 3, 0), records));
            assert!(found.expect_err("caught").what.contains("no record"));
        }
    }
}
