//! Is every acknowledged commit there at the end, and nothing that failed, was never asked, or was released?

use super::{Call, Summary, Violation, by_key, requests};
use crate::metad::final_state::{FinalState, FinalVolume, attempt_of};
use crate::metad::history::{Event, Operation};
use std::collections::BTreeMap;

const NAME: &str = "no lost commit";

/// Checks the records and registers of every volume.
pub fn check(events: &[Event], end: &FinalState) -> Result<Summary, Violation> {
    let (mut kept, mut volumes) = (0, 0);
    let keys = by_key(requests(events)?);
    for (key, calls) in &keys {
        let made = calls.iter().find(|call| {
            call.is_ok() && matches!(call.operation(), Operation::CreateVolume { .. })
        });
        let deleted = calls.iter().any(|call| {
            call.may_have_effect() && matches!(call.operation(), Operation::DeleteVolume)
        });
        match end.volumes.get(*key) {
            // What is left of a volume that was deleted, or made again, is for others to say.
            _ if deleted => {}
            Some(volume) => {
                kept += acknowledged(key, calls, volume)?;
                nothing_else(key, calls, volume)?;
                register(key, calls, volume)?;
                volumes += 1;
            }
            None => {
                if let Some(made) = made {
                    let what = format!("volume {key} is gone");
                    return Err(Violation::of(NAME, what, &[made]));
                }
            }
        }
    }
    if let Some(key) = end
        .volumes
        .keys()
        .find(|key| !keys.contains_key(key.as_str()))
    {
        let what = format!("volume {key} was never made");
        return Err(Violation::new(NAME, what, Vec::new()));
    }
    let text =
        format!("{kept} acknowledged datafiles of {volumes} volumes are there, and no others");
    Ok(Summary::new(NAME, text))
}

fn names(call: &Call<'_>, id: u64) -> bool {
    match call.operation() {
        Operation::ReleaseDatafiles { datafiles, .. } => datafiles.contains(&id),
        _ => false,
    }
}

fn acknowledged(key: &str, calls: &[Call<'_>], volume: &FinalVolume) -> Result<usize, Violation> {
    let there: BTreeMap<u64, u64> = volume
        .records
        .iter()
        .map(|record| (record.datafile.0, attempt_of(&record.salt)))
        .collect();
    let mut kept = 0;
    for call in calls.iter().filter(|call| call.is_ok()) {
        let Operation::CommitDatafiles { datafiles, .. } = call.operation() else {
            continue;
        };
        for datafile in datafiles {
            if there.get(&datafile.id) == Some(&datafile.attempt) {
                kept += 1;
                continue;
            }
            let may_be_released = calls.iter().any(|other| {
                other.may_have_effect() && names(other, datafile.id) && !other.before(call)
            });
            if !may_be_released {
                let what = format!(
                    "datafile {} of volume {key}, attempt {}, was acknowledged and is not there",
                    datafile.id, datafile.attempt
                );
                return Err(Violation::of(NAME, what, &[call]));
            }
        }
    }
    Ok(kept)
}

fn nothing_else(key: &str, calls: &[Call<'_>], volume: &FinalVolume) -> Result<(), Violation> {
    for record in &volume.records {
        let (id, attempt) = (record.datafile.0, attempt_of(&record.salt));
        let commits: Vec<_> = calls
            .iter()
            .filter(|call| match call.operation() {
                Operation::CommitDatafiles { datafiles, .. } => datafiles
                    .iter()
                    .any(|datafile| (datafile.id, datafile.attempt) == (id, attempt)),
                _ => false,
            })
            .collect();
        if !commits.iter().any(|call| call.may_have_effect()) {
            let what = format!(
                "datafile {id} of volume {key}, attempt {attempt}, is there, and no commit of it may have succeeded"
            );
            return Err(Violation::of(NAME, what, &commits));
        }
        let released = calls.iter().find(|release| {
            release.is_ok()
                && names(release, id)
                && commits
                    .iter()
                    .filter(|commit| commit.may_have_effect())
                    .all(|commit| commit.before(release))
        });
        if let Some(released) = released {
            let what = format!("datafile {id} of volume {key} was released and is there");
            return Err(Violation::of(NAME, what, &[released]));
        }
    }
    Ok(())
}

/// The quota at the end is one that nothing acknowledged came wholly after.
fn register(key: &str, calls: &[Call<'_>], volume: &FinalVolume) -> Result<(), Violation> {
    let writes: Vec<_> = calls
        .iter()
        .filter(|call| call.may_have_effect())
        .filter_map(|call| match call.operation() {
            Operation::SetQuota { bytes } => Some((*bytes, call)),
            Operation::CreateVolume { quota_bytes } => Some((*quota_bytes, call)),
            _ => None,
        })
        .collect();
    let last = |call: &Call<'_>| {
        !writes
            .iter()
            .any(|(_, other)| other.is_ok() && call.before(other))
    };
    let value = volume.seen.quota_bytes;
    let explained = writes
        .iter()
        .any(|(bytes, call)| *bytes == value && last(call));
    if explained || writes.is_empty() {
        return Ok(());
    }
    let what =
        format!("the quota of volume {key} is {value} at the end, which no last write explains");
    let shown: Vec<_> = writes
        .iter()
        .map(|(_, call)| *call)
        .filter(|call| last(call))
        .collect();
    Err(Violation::of(NAME, what, &shown))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{History, commit, end, quota, record, release, seen};
    use super::*;
    use crate::metad::history::Reason;

    fn caught(history: &History, end: &FinalState, word: &str) {
        let violation = check(history.events(), end).expect_err("it must be caught");
        assert!(violation.what.contains(word), "{violation}");
    }

    #[test]
    fn what_was_acknowledged_is_there() {
        let mut history = History::with_writer();
        history.done(0, commit(1, 1, 10));
        let there = end(seen(1, 1, 0), vec![record(1, 10)]);
        assert!(check(history.events(), &there).is_ok());
        caught(&history, &end(seen(1, 1, 0), vec![]), "not there");
        // Another encoding of it is not what was acknowledged.
        caught(
            &history,
            &end(seen(1, 1, 0), vec![record(1, 11)]),
            "not there",
        );
        caught(&history, &FinalState::default(), "is gone");
    }

    #[test]
    fn what_failed_is_not_there_and_the_unknown_may_be() {
        for known in [true, false] {
            let mut history = History::with_writer();
            history.ask(0, "v", commit(1, 1, 10));
            if known {
                history.fail(0, Reason::NotDone, None);
            } else {
                history.unknown(0);
            }
            let there = end(seen(1, 1, 0), vec![record(1, 10)]);
            let absent = end(seen(1, 0, 0), vec![]);
            assert!(check(history.events(), &absent).is_ok());
            assert_eq!(check(history.events(), &there).is_err(), known);
        }
        caught(
            &History::with_writer(),
            &end(seen(1, 1, 0), vec![record(7, 70)]),
            "no commit of it",
        );
    }

    #[test]
    fn what_was_released_stays_away() {
        let mut history = History::with_writer();
        history.done(0, commit(1, 1, 10));
        history.done(0, release(1, 1));
        assert!(check(history.events(), &end(seen(1, 1, 0), vec![])).is_ok());
        caught(
            &history,
            &end(seen(1, 1, 0), vec![record(1, 10)]),
            "released",
        );
        history.done(0, commit(1, 1, 11));
        let again = end(seen(1, 1, 0), vec![record(1, 11)]);
        assert!(check(history.events(), &again).is_ok());
        caught(&history, &end(seen(1, 1, 0), vec![]), "not there");
    }

    #[test]
    fn an_acknowledged_register_that_went_back_is_caught() {
        let mut history = History::with_writer();
        history.done(0, quota(5));
        history.done(0, quota(6));
        assert!(check(history.events(), &end(seen(1, 0, 6), vec![])).is_ok());
        caught(&history, &end(seen(1, 0, 5), vec![]), "no last write");
        history.ask(1, "v", quota(5));
        history.unknown(1);
        assert!(check(history.events(), &end(seen(1, 0, 5), vec![])).is_ok());
    }
}
