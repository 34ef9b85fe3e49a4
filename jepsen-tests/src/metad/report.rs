//! What a run came to, short enough to be read.

use super::checkers::{Summary, Violation};
use super::history::{Event, Kind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// One step of the plan as it happened; nanoseconds since the beginning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultSeen {
    /// Which, on whom.
    pub what: String,
    /// Inflicted.
    pub began_ns: u64,
    /// Taken away.
    pub ended_ns: u64,
    /// First write after that.
    pub healed_ns: u64,
}

/// The whole.
#[derive(Debug)]
pub struct Report {
    seed: u64,
    /// How many operations ended how, by name.
    counts: BTreeMap<String, [u64; 3]>,
    faults: Vec<FaultSeen>,
    /// Longest time between two acknowledged writes, and when it began.
    gap_ns: (u64, u64),
    checked: Vec<Result<Summary, Violation>>,
    trouble: Vec<String>,
}

impl Report {
    /// Puts it together.
    pub fn new(
        seed: u64,
        events: &[Event],
        faults: Vec<FaultSeen>,
        checked: Vec<Result<Summary, Violation>>,
        trouble: Vec<String>,
    ) -> Self {
        let mut counts: BTreeMap<String, [u64; 3]> = BTreeMap::new();
        for event in events {
            let at = match event.kind {
                Kind::Invoke => continue,
                Kind::Ok => 0,
                Kind::Fail => 1,
                Kind::Unknown => 2,
            };
            let name = serde_json::to_value(&event.operation)
                .ok()
                .and_then(|value| value.get("f")?.as_str().map(str::to_owned))
                .unwrap_or_default();
            counts.entry(name).or_default()[at] += 1;
        }
        let gap_ns = longest_gap(events, 0, u64::MAX);
        Self {
            seed,
            counts,
            faults,
            gap_ns,
            checked,
            trouble,
        }
    }

    /// Nothing was violated, and something was done: a run without writes shows nothing.
    pub fn is_well(&self) -> bool {
        let writes = self.counts.get("set_quota").map_or(0, |ended| ended[0]);
        self.trouble.is_empty() && writes > 0 && self.checked.iter().all(Result::is_ok)
    }
}

/// Longest time without an acknowledged write between two moments, and when it began.
fn longest_gap(events: &[Event], from: u64, until: u64) -> (u64, u64) {
    let written = events
        .iter()
        .filter(|event| event.kind == Kind::Ok && !event.operation.is_read())
        .map(|event| event.time)
        .filter(|time| (from..until).contains(time));
    let mut last: Option<u64> = None;
    let mut longest = (0, 0);
    for time in written {
        if let Some(last) = last {
            longest = longest.max((time.saturating_sub(last), last));
        }
        last = Some(time);
    }
    longest
}

fn seconds(ns: u64) -> String {
    format!("{:.1} s", Duration::from_nanos(ns).as_secs_f64())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}", self.seed)?;
        writeln!(
            f,
            "{:<20} {:>8} {:>8} {:>8}",
            "operation", "ok", "fail", "unknown"
        )?;
        let mut sum = [0; 3];
        for (name, ended) in &self.counts {
            let [ok, fail, unknown] = ended;
            writeln!(f, "{name:<20} {ok:>8} {fail:>8} {unknown:>8}")?;
            for (sum, ended) in sum.iter_mut().zip(ended) {
                *sum += ended;
            }
        }
        let [ok, fail, unknown] = sum;
        writeln!(f, "{:<20} {ok:>8} {fail:>8} {unknown:>8}", "all")?;
        let (gap, at) = self.gap_ns;
        writeln!(
            f,
            "longest time without a write: {}, from {}",
            seconds(gap),
            seconds(at)
        )?;
        writeln!(f, "{} faults:", self.faults.len())?;
        for fault in &self.faults {
            writeln!(
                f,
                "  {:>7} to {:>7}, first write {:>7} after it: {}",
                seconds(fault.began_ns),
                seconds(fault.ended_ns),
                seconds(fault.healed_ns.saturating_sub(fault.ended_ns)),
                fault.what
            )?;
        }
        for checked in &self.checked {
            match checked {
                Ok(summary) => writeln!(f, "holds: {summary}")?,
                Err(violation) => writeln!(f, "VIOLATED: {violation}")?,
            }
        }
        for trouble in &self.trouble {
            writeln!(f, "WRONG: {trouble}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::checkers::testing::{History, quota, read};
    use super::*;

    #[test]
    fn only_acknowledged_writes_end_a_gap() {
        let mut history = History::with_writer();
        history.done(1, quota(1));
        for _ in 0..5 {
            history.done(1, read(1, 0, 1));
        }
        history.ask(1, "v", quota(2));
        history.unknown(1);
        history.done(2, quota(3));
        let (gap, _) = longest_gap(history.events(), 0, u64::MAX);
        assert_eq!(gap, 14_000_000);
    }

    #[test]
    fn a_run_that_did_nothing_is_not_well() {
        let report = Report::new(1, &[], Vec::new(), Vec::new(), Vec::new());
        assert!(!report.is_well());
        let mut history = History::with_writer();
        history.done(1, quota(1));
        let report = |trouble: &[&str]| {
            let trouble = trouble.iter().map(|text| (*text).to_owned()).collect();
            Report::new(1, history.events(), Vec::new(), Vec::new(), trouble)
        };
        assert!(report(&[]).is_well());
        assert!(!report(&["m1 ended"]).is_well());
    }
}
