//! Do all committed records satisfy the placement rules, or count as below policy? Asked of the function that placed them.

use super::{Summary, Violation};
use crate::metad::final_state::{FinalState, FinalVolume};
use qsfs_zstor::placement::{self, Survival};
use qsfs_zstor::record::{EncodingRecord, ShardState};

const NAME: &str = "placement";

/// Checks every record of the end.
pub fn check(end: &FinalState) -> Result<Summary, Violation> {
    let (mut records, mut below) = (0, 0);
    for (key, volume) in &end.volumes {
        records += volume.records.len();
        let found = below_policy(key, volume, end)?;
        below += found;
        match volume.below_policy {
            Some(counted) if counted != found => {
                let what = format!(
                    "{found} datafiles of volume {key} are below policy, metad counts {counted}"
                );
                return Err(Violation::new(NAME, what, Vec::new()));
            }
            _ => {}
        }
    }
    let text = format!("{records} records satisfy the rules, {below} of them below policy");
    Ok(Summary::new(NAME, text))
}

/// Does metad count what the records show, wherever it was asked? It counts right behind what it applies.
pub fn is_counted(end: &FinalState) -> Result<bool, Violation> {
    for (key, volume) in &end.volumes {
        let found = below_policy(key, volume, end)?;
        if volume.below_policy.is_some_and(|counted| counted != found) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn below_policy(key: &str, volume: &FinalVolume, end: &FinalState) -> Result<u64, Violation> {
    let mut below = 0;
    for record in &volume.records {
        let name = format!("datafile {} of volume {key}", record.datafile);
        if record.shards.len() != record.geometry.total() {
            let what = format!(
                "{name} has {} shards, not {}",
                record.shards.len(),
                record.geometry.total()
            );
            return Err(Violation::new(NAME, what, Vec::new()));
        }
        if let Some(unknown) = record
            .shards
            .iter()
            .find(|shard| end.site(shard.backend).is_none())
        {
            let what = format!(
                "{name} has a shard on backend {}, which is not there",
                unknown.backend
            );
            return Err(Violation::new(NAME, what, Vec::new()));
        }
        match survival(record, end, |_| true) {
            Some(as_placed) if as_placed.backends >= 1 => {}
            _ => {
                let what = format!("{name} does not survive the loss of one backend");
                return Err(Violation::new(NAME, what, Vec::new()));
            }
        }
        let stored = survival(record, end, |state| state == ShardState::Stored);
        let holds = stored.is_some_and(|stored| placement::holds(&volume.policy, &stored));
        below += u64::from(!holds);
    }
    Ok(below)
}

fn survival(
    record: &EncodingRecord,
    end: &FinalState,
    counts: impl Fn(ShardState) -> bool,
) -> Option<Survival> {
    let shards = record.shards.iter();
    let sites: Vec<_> = shards
        .map(|shard| end.site(shard.backend).filter(|_| counts(shard.state)))
        .collect();
    placement::survival(record.geometry, &sites)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{end, record, seen};
    use super::*;
    use crate::metad::final_state::BackendSite;
    use qsfs_zstor::id::BackendId;

    /// Two backends at each of two locations.
    fn with_sites(mut end: FinalState) -> FinalState {
        for (backend, location) in [(1, "a"), (2, "a"), (3, "b"), (4, "b")] {
            end.backends.push(BackendSite {
                backend: BackendId(backend),
                location: location.parse().expect("a name"),
                node: "n1".parse().expect("a name"),
            });
        }
        end
    }

    fn placed(backends: [u64; 4], counted: Option<u64>) -> Result<Summary, Violation> {
        let mut record = record(1, 10);
        for (shard, backend) in record.shards.iter_mut().zip(backends) {
            shard.backend = BackendId(backend);
        }
        let mut end = with_sites(end(seen(1, 1, 0), vec![record]));
        let volume = end.volumes.get_mut("v").expect("it is there");
        volume.below_policy = counted;
        check(&end)
    }

    #[test]
    fn what_holds_and_what_counts_as_below_policy_is_fine() {
        assert!(placed([1, 2, 3, 4], Some(0)).is_ok());
        assert!(placed([1, 2, 2, 3], Some(1)).is_ok());
    }

    #[test]
    fn what_would_not_survive_a_backend_is_caught() {
        let violation = placed([1, 1, 1, 3], None).expect_err("caught");
        assert!(violation.what.contains("one backend"), "{violation}");
    }

    #[test]
    fn a_shard_on_no_backend_is_caught() {
        let violation = placed([1, 2, 3, 9], None).expect_err("caught");
        assert!(violation.what.contains("not there"), "{violation}");
    }

    #[test]
    fn what_is_below_policy_and_not_counted_is_caught() {
        let violation = placed([1, 2, 2, 3], Some(0)).expect_err("caught");
        assert!(violation.what.contains("metad counts 0"), "{violation}");
        assert!(placed([1, 2, 3, 4], Some(1)).is_err());
    }
}
