//! Is a stale read as fresh as it promises?
//!
//! A node that answers by itself says how old at most that is. So whatever had ended before the question, less that age, must be in it.
//! Seen in two ways: epochs only grow, so the epoch read is at least every one that was granted before then; and the quota read is
//! not one that another had certainly replaced before then (every value is written once).
//!
//! The age is measured by the node, the times by the client; both by clocks of one machine, or of one simulation, that do not jump.

use super::{Call, Summary, Violation, by_key, requests};
use crate::metad::history::{Event, Operation, VolumeSeen};

const NAME: &str = "staleness";

/// A call that ended well, with the times of its beginning and its end.
fn times<'a>(call: &Call<'a>) -> Option<(&'a Operation, u64, u64)> {
    let end = call.end.filter(|_| call.is_ok())?;
    Some((call.operation(), call.invoke.time, end.time))
}

/// Checks every stale read with a promise.
pub fn check(events: &[Event]) -> Result<Summary, Violation> {
    let (mut judged, mut oldest_ms) = (0u64, 0);
    for (key, calls) in by_key(requests(events)?) {
        for read in &calls {
            let Some((Operation::StaleRead { seen, age_ms }, asked, _)) = times(read) else {
                continue;
            };
            let (Some(seen), Some(age_ms)) = (seen, age_ms) else {
                continue;
            };
            judged += 1;
            oldest_ms = oldest_ms.max(*age_ms);
            let from = asked.saturating_sub(age_ms.saturating_mul(1_000_000));
            if let Some(newer) = newer_epoch(&calls, seen, from) {
                let what = format!(
                    "volume {key} was read at epoch {} with an age of at most {age_ms} ms, after a later epoch had been granted",
                    seen.epoch
                );
                return Err(Violation::of(NAME, what, &[newer, read]));
            }
            if let Some(newer) = newer_quota(&calls, seen, from) {
                let what = format!(
                    "volume {key} was read with quota {} and an age of at most {age_ms} ms, after that had been replaced",
                    seen.quota_bytes
                );
                return Err(Violation::of(NAME, what, &[newer, read]));
            }
        }
    }
    let text = format!("{judged} stale reads, promised to be at most {oldest_ms} ms old, were");
    Ok(Summary::new(NAME, text))
}

/// An acquisition before `from` that the read does not know.
fn newer_epoch<'a, 'b>(
    calls: &'b [Call<'a>],
    seen: &VolumeSeen,
    from: u64,
) -> Option<&'b Call<'a>> {
    calls.iter().find(|call| match times(call) {
        Some((
            Operation::AcquireLease {
                epoch: Some(epoch), ..
            },
            _,
            ended,
        )) => *epoch > seen.epoch && ended < from,
        _ => false,
    })
}

/// A value written before `from`, and certainly after the one that was read.
fn newer_quota<'a, 'b>(
    calls: &'b [Call<'a>],
    seen: &VolumeSeen,
    from: u64,
) -> Option<&'b Call<'a>> {
    let written = |call: &&Call<'_>| match times(call) {
        Some((Operation::SetQuota { bytes }, ..)) => *bytes == seen.quota_bytes,
        Some((Operation::CreateVolume { quota_bytes }, ..)) => *quota_bytes == seen.quota_bytes,
        _ => false,
    };
    let (_, _, before) = times(calls.iter().find(written)?)?;
    calls.iter().find(|call| match times(call) {
        Some((Operation::SetQuota { bytes }, asked, ended)) => {
            *bytes != seen.quota_bytes && asked > before && ended < from
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{History, acquired};
    use super::*;

    fn stale(epoch: u64, quota_bytes: u64, age_ms: Option<u64>) -> Operation {
        let seen = Some(VolumeSeen {
            epoch,
            quota_bytes,
            ..VolumeSeen::default()
        });
        Operation::StaleRead { seen, age_ms }
    }

    /// A volume, epoch 1, quota 5, epoch 2, quota 7, and then the read. Every event is a millisecond after the one before.
    fn after(read: Operation) -> Result<Summary, Violation> {
        let mut history = History::with_writer();
        history.done(0, Operation::SetQuota { bytes: 5 });
        history.done(1, acquired(1, 2));
        history.done(0, Operation::SetQuota { bytes: 7 });
        history.done(2, read);
        check(history.events())
    }

    #[test]
    fn what_is_as_fresh_as_promised_is_fine() {
        for read in [
            stale(2, 7, Some(0)),
            // The second write had ended one millisecond before it was asked.
            stale(2, 5, Some(2)),
            stale(1, 5, Some(4)),
            stale(0, 0, Some(1_000)),
            // No promise, nothing to judge.
            stale(0, 0, None),
        ] {
            assert!(after(read.clone()).is_ok(), "{read:?}");
        }
    }

    #[test]
    fn a_read_older_than_it_promises_is_caught() {
        let epoch = after(stale(1, 5, Some(2))).expect_err("an old epoch");
        assert!(epoch.what.contains("a later epoch"), "{epoch}");
        let quota = after(stale(2, 5, Some(0))).expect_err("an old quota");
        assert!(quota.what.contains("had been replaced"), "{quota}");
        let first = after(stale(2, 0, Some(0))).expect_err("the quota of the beginning");
        assert!(first.what.contains("had been replaced"), "{first}");
    }
}
