//! How much of what a leader calls committed a follower takes at once.

use super::{amount, entry, id};
use crate::ground::Ground;
use crate::log::segments::Amount;
use crate::log::storage::LogStore;
use crate::raft::{LogId, Vote};
use openraft::raft::AppendEntriesRequest;
use openraft::storage::RaftLogStorageExt;
use proptest::prelude::*;
use qsfs_zdb::media::SimMedia;
use std::path::Path;
use std::sync::Arc;

/// A leader's log; this one's is as long as it says and agrees with it up to some entry.
#[derive(Debug, Clone)]
struct Case {
    leaders: Vec<LogId>,
    agrees: usize,
    length: usize,
    applied: u64,
    before: usize,
    committed: usize,
    most: Amount,
}

fn cases() -> impl Strategy<Value = Case> {
    let terms = prop::collection::vec(prop::bool::weighted(0.1), 1..60);
    let parts = (
        0.0..1.0f64,
        0..8usize,
        0.0..1.0f64,
        0.0..1.0f64,
        0.0..1.0f64,
    );
    (terms, parts, 1..12u64, 1..400u64).prop_map(|(raises, parts, entries, bytes)| {
        let mut term = 5;
        let ids = raises.iter().enumerate().map(|(index, raise)| {
            term += u64::from(*raise);
            id(term, index as u64)
        });
        let leaders: Vec<_> = ids.collect();
        let count = leaders.len();
        let upto = |share: f64, most: usize| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a share"
            )]
            #[expect(clippy::cast_precision_loss, reason = "a few")]
            let part = (share * most as f64) as usize;
            part
        };
        let (agrees, more, applied, before, committed) = parts;
        let agrees = upto(agrees, count) + 1;
        let committed = upto(committed, count);
        Case {
            agrees,
            length: agrees + more,
            applied: upto(applied, agrees.min(committed + 1)) as u64,
            before: upto(before, count),
            committed,
            most: Amount { entries, bytes },
            leaders,
        }
    })
}

/// Of an old term where it does not agree.
async fn held(case: &Case) -> LogStore {
    let ground = Ground {
        media: Arc::new(SimMedia::new()),
        ..Ground::real()
    };
    let mut log = LogStore::open(&ground, Path::new("/log")).unwrap();
    let agreed = case.leaders[..case.agrees].iter();
    let agreed = agreed.map(|id| entry(id.leader_id.term, id.index));
    let other = (case.agrees..case.length).map(|index| entry(1, index as u64));
    log.blocking_append(agreed.chain(other)).await.unwrap();
    log
}

async fn takes(case: Case) -> Result<(), TestCaseError> {
    let log = held(&case).await;
    let (before, said) = (case.leaders[case.before], case.leaders[case.committed]);
    let mut request = AppendEntriesRequest {
        vote: Vote::new_committed(9, 2),
        prev_log_id: Some(before),
        entries: Vec::new(),
        leader_commit: Some(said),
    };
    log.hold_commit(&mut request, case.applied, case.most);
    let taken = request.leader_commit.unwrap();
    prop_assert_eq!(case.leaders[usize::try_from(taken.index).unwrap()], taken);
    prop_assert!(taken <= said);

    let range = |upto: u64| {
        let ids = case.leaders.iter();
        let ids = ids.filter(|id| id.index > case.applied && id.index <= upto);
        amount(&ids.copied().collect::<Vec<_>>())
    };
    let known = said.index.min(before.index);
    if case.before >= case.agrees || range(known).within(case.most) {
        prop_assert_eq!(
            taken,
            said,
            "there is no need to, or it might be of an old term"
        );
        return Ok(());
    }
    prop_assert!(taken.index > case.applied, "it goes on");
    let one = taken.index == case.applied + 1;
    prop_assert!(one || range(taken.index).within(case.most), "not too much");
    prop_assert!(!range(taken.index + 1).within(case.most), "not too little");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_applied_at_once_is_bounded_and_the_leaders(case in cases()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(takes(case))?;
    }
}
