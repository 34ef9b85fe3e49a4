//! Does nothing succeed under an old epoch, and does every epoch have one holder?
//!
//! - what a writer does succeeds only while no higher epoch was granted or seen, and its own was not released, before it was asked
//! - an epoch is granted to one acquisition; of two acquisitions one after the other, the later one has the higher epoch
//! - where the clocks of a run agree: a lease that was renewed less than its life ago is not given to another client who did not ask
//!   for a takeover

use super::{Call, Summary, Violation, by_key, requests};
use crate::metad::history::{Event, Operation};

const NAME: &str = "fencing";

/// What it takes to see an epoch.
fn shown_epoch(call: &Call<'_>) -> Option<u64> {
    if !call.is_ok() {
        return call
            .failure()
            .filter(|failure| failure.reason == crate::metad::history::Reason::Fenced)
            .and_then(|failure| failure.current);
    }
    match call.operation() {
        Operation::AcquireLease { epoch, .. } => *epoch,
        Operation::ReadVolume { seen } => seen.as_ref().map(|seen| seen.epoch),
        other => other.claimed_epoch(),
    }
}

/// Checks every volume. `lease_ttl_ns` is the life of a lease, where all clocks of the run agree.
pub fn check(events: &[Event], lease_ttl_ns: Option<u64>) -> Result<Summary, Violation> {
    let (mut writes, mut grants) = (0, 0);
    for (key, calls) in by_key(requests(events)?) {
        let remade = calls
            .iter()
            .filter(|call| matches!(call.operation(), Operation::CreateVolume { .. }))
            .count();
        let deleted = calls.iter().any(|call| {
            call.may_have_effect() && matches!(call.operation(), Operation::DeleteVolume)
        });
        // A volume that is made again begins again with epoch 1.
        if deleted && remade > 1 {
            continue;
        }
        writes += old_epochs(key, &calls)?;
        grants += holders(key, &calls)?;
        if let Some(ttl_ns) = lease_ttl_ns {
            living_leases(key, &calls, ttl_ns)?;
        }
    }
    let text = format!("{writes} operations of writers under {grants} epochs");
    Ok(Summary::new(NAME, text))
}

fn old_epochs(key: &str, calls: &[Call<'_>]) -> Result<usize, Violation> {
    let mut checked = 0;
    for call in calls.iter().filter(|call| call.is_ok()) {
        let Some(epoch) = call.operation().claimed_epoch() else {
            continue;
        };
        checked += 1;
        let newer = calls.iter().find(|other| {
            other.before(call) && shown_epoch(other).is_some_and(|shown| shown > epoch)
        });
        if let Some(newer) = newer {
            let what =
                format!("something succeeded on volume {key} under epoch {epoch}, which was over");
            return Err(Violation::of(NAME, what, &[newer, call]));
        }
        // To release it once more is no harm.
        if matches!(call.operation(), Operation::ReleaseLease { .. }) {
            continue;
        }
        let released = calls.iter().find(|other| {
            let release = Operation::ReleaseLease { epoch };
            other.is_ok() && other.before(call) && *other.operation() == release
        });
        if let Some(released) = released {
            let what = format!(
                "something succeeded on volume {key} under epoch {epoch}, which was released"
            );
            return Err(Violation::of(NAME, what, &[released, call]));
        }
    }
    Ok(checked)
}

fn grants<'a, 'b>(calls: &'b [Call<'a>]) -> Vec<(u64, &'b Call<'a>)> {
    let granted = calls.iter().filter(|call| call.is_ok());
    granted
        .filter_map(|call| match call.operation() {
            Operation::AcquireLease { epoch, .. } => epoch.map(|epoch| (epoch, call)),
            _ => None,
        })
        .collect()
}

fn holders(key: &str, calls: &[Call<'_>]) -> Result<usize, Violation> {
    let grants = grants(calls);
    for (number, (epoch, call)) in grants.iter().enumerate() {
        for (other_epoch, other) in &grants[number + 1..] {
            if epoch == other_epoch {
                let what = format!("epoch {epoch} of volume {key} has two holders");
                return Err(Violation::of(NAME, what, &[call, other]));
            }
            let wrong = (call.before(other) && epoch > other_epoch)
                || (other.before(call) && other_epoch > epoch);
            if wrong {
                let what = format!("epochs of volume {key} went back");
                return Err(Violation::of(NAME, what, &[call, other]));
            }
        }
    }
    Ok(grants.len())
}

/// The lease that was taken must have ended by its time, by its holder, or by a takeover.
fn living_leases(key: &str, calls: &[Call<'_>], ttl_ns: u64) -> Result<(), Violation> {
    for (epoch, taken) in grants(calls) {
        let (client, end) = match (taken.operation(), taken.end) {
            (
                Operation::AcquireLease {
                    client,
                    takeover: false,
                    ..
                },
                Some(end),
            ) => (*client, end),
            _ => continue,
        };
        let given_up = calls.iter().any(|call| {
            let release = Operation::ReleaseLease { epoch: epoch - 1 };
            call.may_have_effect() && *call.operation() == release
        });
        if given_up {
            continue;
        }
        let alive = calls.iter().find(|call| {
            let kept = call.is_ok()
                && match call.operation() {
                    Operation::RenewLease { epoch: held } => *held == epoch - 1,
                    Operation::AcquireLease {
                        client: holder,
                        epoch: Some(held),
                        ..
                    } => *held == epoch - 1 && *holder != client,
                    _ => false,
                };
            kept && call.before(taken) && end.time.saturating_sub(call.invoke.time) < ttl_ns
        });
        let other_holder = grants(calls).iter().any(|(held, call)| {
            *held == epoch - 1
                && !matches!(call.operation(), Operation::AcquireLease { client: c, .. } if *c == client)
        });
        if let Some(alive) = alive.filter(|_| other_holder) {
            let what = format!(
                "the living lease of epoch {} of volume {key} was given away",
                epoch - 1
            );
            return Err(Violation::of(NAME, what, &[alive, taken]));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{History, acquire, acquired, commit, read, release};
    use super::*;

    fn caught(history: &History, word: &str) {
        let violation = check(history.events(), None).expect_err("it must be caught");
        assert!(violation.what.contains(word), "{violation}");
        assert!(violation.events.len() >= 2);
    }

    #[test]
    fn a_takeover_and_what_was_under_way_is_fine() {
        let mut history = History::with_writer();
        history.ask(0, "v", commit(1, 1, 10));
        history.done(1, acquired(1, 2));
        history.ok(0, commit(1, 1, 10));
        history.done(1, commit(2, 2, 11));
        assert!(check(history.events(), None).is_ok());
    }

    #[test]
    fn a_commit_under_an_old_epoch_is_caught() {
        for late in [
            commit(1, 1, 10),
            release(1, 1),
            Operation::RenewLease { epoch: 1 },
        ] {
            let mut history = History::with_writer();
            history.done(1, acquired(1, 2));
            history.done(0, late);
            caught(&history, "which was over");
        }
    }

    #[test]
    fn a_commit_after_a_read_saw_a_higher_epoch_is_caught() {
        let mut history = History::with_writer();
        history.ask(1, "v", acquire(1));
        history.done(2, read(2, 0, 0));
        history.done(0, commit(1, 1, 10));
        history.ok(1, acquired(1, 2));
        caught(&history, "which was over");
    }

    #[test]
    fn a_commit_after_the_lease_was_released_is_caught() {
        let mut history = History::with_writer();
        history.done(0, Operation::ReleaseLease { epoch: 1 });
        history.done(0, Operation::ReleaseLease { epoch: 1 });
        assert!(check(history.events(), None).is_ok());
        history.done(0, commit(1, 1, 10));
        caught(&history, "was released");
    }

    #[test]
    fn two_holders_and_epochs_that_go_back_are_caught() {
        let mut history = History::with_writer();
        history.ask(1, "v", acquire(1));
        history.ask(2, "v", acquire(2));
        history.ok(1, acquired(1, 2));
        history.ok(2, acquired(2, 2));
        caught(&history, "two holders");
        let mut history = History::new();
        history.done(1, acquired(1, 3));
        history.done(2, acquired(2, 2));
        caught(&history, "went back");
    }

    #[test]
    fn a_living_lease_given_away_is_caught() {
        let polite = |client, epoch| Operation::AcquireLease {
            client,
            takeover: false,
            epoch,
        };
        let mut history = History::with_writer();
        history.done(0, Operation::RenewLease { epoch: 1 });
        history.ask(1, "v", polite(1, None));
        history.ok(1, polite(1, Some(2)));
        // From the call of the renewal to the end of the acquisition pass three milliseconds.
        let found = check(history.events(), Some(4_000_000));
        assert!(found.expect_err("caught").what.contains("living lease"));
        assert!(check(history.events(), Some(2_000_000)).is_ok());
        assert!(check(history.events(), None).is_ok());
    }
}
