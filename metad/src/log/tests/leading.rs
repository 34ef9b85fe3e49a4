//! When an append is reported, and what is there after a crash.

use super::hanging::HangingMedia;
use super::{entry, id};
use crate::ground::Ground;
use crate::log::segments::SEGMENT_BYTES;
use crate::log::storage::LogStore;
use crate::raft::{LogId, Vote};
use openraft::storage::{RaftLogStorage, RaftLogStorageExt};
use openraft::{BasicNode, EntryPayload, Membership, RaftLogId};
use proptest::prelude::*;
use qsfs_zdb::media::{Media, SimMedia};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

const OWN: u64 = 1;

fn dir() -> &'static Path {
    Path::new("/log")
}

fn open(media: Arc<dyn Media>, segment_bytes: u64) -> LogStore {
    let mut ground = Ground {
        media,
        ..Ground::real()
    };
    ground.sizes.segment_bytes = segment_bytes;
    LogStore::open(&ground, dir()).unwrap().of_node(OWN)
}

/// A log on a disk that can hang.
fn hanging() -> (HangingMedia, LogStore) {
    let media = HangingMedia::over(Arc::new(SimMedia::new()));
    let log = open(Arc::new(media.clone()), SEGMENT_BYTES);
    (media, log)
}

fn stored_vote(media: &HangingMedia) -> Option<Vote> {
    crate::durable::load(media, &dir().join("vote")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaders_append_is_reported_when_written_and_durable_when_synced() {
    let (media, mut log) = hanging();
    log.save_vote(&Vote::new_committed(1, OWN)).await.unwrap();
    media.hang();
    log.blocking_append([entry(1, 0), entry(1, 1)])
        .await
        .unwrap();
    media.until_one_hangs();
    assert_eq!(log.bounds().1, Some(id(1, 1)), "readable for replication");
    assert_eq!(log.watermark().end(), 0, "and not durable");
    media.recover();
    log.watermark().wait(2).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_leader_does_not_append_as_itself_is_reported_when_durable() {
    let members = Membership::<u64, BasicNode>::new(vec![[OWN].into()], BTreeMap::new());
    let mut change = entry(2, 0);
    change.payload = EntryPayload::Membership(members);
    let cases = [
        (Vote::new_committed(2, 2), entry(2, 0), "a follower"),
        (Vote::new(2, OWN), entry(2, 0), "a candidate"),
        (Vote::new_committed(2, OWN), entry(1, 0), "another term"),
        (Vote::new_committed(2, OWN), change, "a membership"),
    ];
    for (vote, appended, case) in cases {
        let (media, log) = hanging();
        log.clone().save_vote(&vote).await.unwrap();
        media.hang();
        let mut writer = log.clone();
        let append = tokio::spawn(async move { writer.blocking_append([appended]).await });
        media.until_one_hangs();
        assert!(!append.is_finished(), "{case}");
        assert_eq!(log.watermark().end(), 0, "{case}");
        media.recover();
        append.await.unwrap().unwrap();
        assert_eq!(log.watermark().end(), 1, "{case}");
    }
}

/// A leader on a disk that hangs, with a tail of two entries.
async fn with_tail() -> (HangingMedia, LogStore) {
    let (media, mut log) = hanging();
    log.save_vote(&Vote::new_committed(1, OWN)).await.unwrap();
    media.hang();
    log.blocking_append([entry(1, 0), entry(1, 1)])
        .await
        .unwrap();
    media.until_one_hangs();
    (media, log)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_votes_only_when_its_tail_is_durable() {
    let (media, log) = with_tail().await;
    let mut voter = log.clone();
    let vote = tokio::spawn(async move { voter.save_vote(&Vote::new(2, 2)).await });
    tokio::task::yield_now().await;
    assert!(!vote.is_finished());
    assert_eq!(stored_vote(&media), Some(Vote::new_committed(1, OWN)));
    media.recover();
    vote.await.unwrap().unwrap();
    assert_eq!(stored_vote(&media), Some(Vote::new(2, 2)));
    assert_eq!(log.watermark().end(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_is_cut_only_when_no_sync_of_it_is_under_way() {
    let (media, log) = with_tail().await;
    let mut follower = log.clone();
    let truncate = tokio::spawn(async move { follower.truncate(id(1, 1)).await });
    tokio::task::yield_now().await;
    assert!(!truncate.is_finished());
    assert_eq!(log.bounds().1, Some(id(1, 1)));
    media.recover();
    truncate.await.unwrap().unwrap();
    assert_eq!(log.bounds().1, Some(id(1, 0)));
    assert_eq!(log.watermark().end(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_is_told_to_everyone_and_never_becomes_durable() {
    let (media, mut log) = hanging();
    log.save_vote(&Vote::new_committed(1, OWN)).await.unwrap();
    media.hang();
    log.blocking_append([entry(1, 0)]).await.unwrap();
    media.until_one_hangs();
    media.fail();
    assert!(log.watermark().wait(1).await.is_err());
    assert!(log.watermark().failure().await.contains("the disk is gone"));
    media.recover();
    assert!(log.blocking_append([entry(1, 1)]).await.is_err());
    assert!(log.save_vote(&Vote::new(2, 2)).await.is_err());
    assert_eq!(log.watermark().end(), 0);
}

/// A leader that lost its tail would give the ids of what a follower holds to other entries.
#[tokio::test]
async fn a_node_that_led_does_not_lead_on_after_a_restart() {
    let media = SimMedia::new();
    let mut log = open(Arc::new(media.clone()), SEGMENT_BYTES);
    log.save_vote(&Vote::new_committed(4, OWN)).await.unwrap();
    drop(log);
    let mut log = open(Arc::new(media.restart(1)), SEGMENT_BYTES);
    assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new(4, OWN)));
    log.save_vote(&Vote::new_committed(5, 2)).await.unwrap();
    assert_eq!(
        log.read_vote().await.unwrap(),
        Some(Vote::new_committed(5, 2)),
        "whom it follows it remembers"
    );
}

#[derive(Debug, Clone)]
enum Op {
    Lead(u64),
    Follow(u64),
    Truncate(u64),
    Wait,
    PowerCut(u64),
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1u64..6).prop_map(Op::Lead),
        2 => (1u64..6).prop_map(Op::Follow),
        1 => (0u64..6).prop_map(Op::Truncate),
        1 => Just(Op::Wait),
        2 => any::<u64>().prop_map(Op::PowerCut),
    ]
}

fn ids(log: &LogStore) -> Vec<LogId> {
    let entries = log.entries(0).unwrap();
    entries.iter().map(|entry| *entry.get_log_id()).collect()
}

async fn crashes(ops: Vec<Op>) -> Result<(), TestCaseError> {
    let mut media = SimMedia::new();
    let mut log = open(Arc::new(media.clone()), 600);
    let (mut written, mut term) = (Vec::<LogId>::new(), 0);
    for op in ops {
        let next = written.len() as u64;
        match op {
            Op::Lead(count) | Op::Follow(count) => {
                term += 1;
                let leads = matches!(op, Op::Lead(_));
                let vote = Vote::new_committed(term, if leads { OWN } else { 2 });
                log.save_vote(&vote).await.unwrap();
                prop_assert_eq!(
                    log.watermark().end(),
                    next,
                    "a vote is cast on a durable log"
                );
                // One by one, so that the syncs of some overtake the writes of others.
                for index in next..next + count {
                    log.blocking_append([entry(term, index)]).await.unwrap();
                    written.push(id(term, index));
                }
                prop_assert!(leads || log.watermark().end() == next + count);
            }
            Op::Truncate(back) => {
                let keep = written.len().saturating_sub(usize::try_from(back).unwrap());
                if let Some(first) = written.get(keep) {
                    log.truncate(*first).await.unwrap();
                    written.truncate(keep);
                    prop_assert!(log.watermark().end() <= keep as u64);
                }
            }
            Op::Wait => log.watermark().wait(next).await.unwrap(),
            Op::PowerCut(seed) => {
                let durable = usize::try_from(log.watermark().end()).unwrap();
                media = media.restart(seed);
                log = open(Arc::new(media.clone()), 600);
                let found = ids(&log);
                prop_assert!(found.len() >= durable, "{} of {durable}", found.len());
                // A truncation that was lost brings back what it cut; what is durable stands.
                prop_assert_eq!(&found[..durable], &written[..durable]);
                prop_assert_eq!(log.watermark().end(), found.len() as u64);
                written = found;
            }
        }
        prop_assert!(log.watermark().end() <= written.len() as u64);
        prop_assert_eq!(&ids(&log), &written);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_the_watermark_covers_survives_a_power_cut(ops in prop::collection::vec(ops(), 1..30)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(crashes(ops))?;
    }
}
