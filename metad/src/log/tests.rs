#![expect(clippy::unwrap_used, reason = "tests")]
//! The log against a model, across restarts and crashes.

mod cluster;
mod following;
mod hanging;
mod leading;

use super::LogError;
use super::segments::{Amount, Segments};
use crate::ground::Program;
use crate::raft::{LogEntry, LogId};
use crate::state::command::{Command, Entry};
use openraft::{CommittedLeaderId, EntryPayload, RaftLogId};
use proptest::prelude::*;
use qsfs_zdb::media::{DiskMedia, Media};
use std::path::Path;
use std::sync::Arc;

const SEGMENT_BYTES: u64 = 1_000;

fn id(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(term, 1), index)
}

fn proposal(time_ms: u64) -> Entry {
    Entry::internal(time_ms, Command::SetVerdicts(vec![]))
}

fn entry(term: u64, index: u64) -> LogEntry {
    LogEntry {
        log_id: id(term, index),
        payload: EntryPayload::Normal(proposal(term).into()),
    }
}

fn open(media: &Arc<dyn Media>, dir: &Path) -> Segments {
    Segments::open(Arc::clone(media), dir, SEGMENT_BYTES, Program::default()).unwrap()
}

#[derive(Debug, Clone)]
enum Op {
    Append(u64),
    Truncate(u64),
    Purge(u64),
    Reopen,
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1u64..12).prop_map(Op::Append),
        1 => (0u64..10).prop_map(Op::Truncate),
        1 => (0u64..10).prop_map(Op::Purge),
        1 => Just(Op::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_log_agrees_with_a_list(ops in prop::collection::vec(ops(), 1..40)) {
        let dir = tempfile::tempdir().unwrap();
        let media: Arc<dyn Media> = Arc::new(DiskMedia);
        let mut log = open(&media, dir.path());
        let (mut model, mut purged, mut term) = (Vec::<LogId>::new(), None::<LogId>, 1);
        for op in ops {
            let next = model.last().or(purged.as_ref()).map_or(0, |id| id.index + 1);
            match op {
                Op::Append(count) => {
                    let ids: Vec<_> = (next..next + count).map(|index| id(term, index)).collect();
                    let entries = ids.iter().map(|id| entry(id.leader_id.term, id.index));
                    log.append(entries.collect()).unwrap().sync().unwrap();
                    model.extend(ids);
                }
                Op::Truncate(back) => {
                    let keep = model.len().saturating_sub(usize::try_from(back).unwrap());
                    if let Some(first) = model.get(keep) {
                        log.truncate(first.index).unwrap();
                        model.truncate(keep);
                        term += 1;
                    }
                }
                Op::Purge(front) => {
                    let count = usize::try_from(front).unwrap().min(model.len());
                    if count > 0 {
                        let upto = model[count - 1];
                        log.purge(upto).unwrap();
                        purged = Some(upto);
                        model.drain(..count);
                    }
                }
                Op::Reopen => {
                    drop(log);
                    log = open(&media, dir.path());
                }
            }
            let ids: Vec<_> = log.read(0, u64::MAX, u64::MAX).unwrap().iter().map(|e| *e.get_log_id()).collect();
            prop_assert_eq!(&ids, &model);
            prop_assert_eq!(log.bounds(), (purged, model.last().copied().or(purged)));
            if let Some(last) = model.last() {
                let from = &model[model.len() / 2];
                prop_assert_eq!(log.amount(Some(from.index), last.index), amount(&model[model.len() / 2 + 1..]));
                prop_assert_eq!(log.amount(purged.map(|id| id.index), last.index).bytes, amount(&model).bytes);
                let kept = Amount { entries: 3, bytes: 100 };
                let gone = (0..model.len()).rev().find(|at| {
                    let there = amount(&model[*at..]);
                    there.entries > kept.entries || there.bytes > kept.bytes
                });
                prop_assert_eq!(log.purgeable(last.index, kept), gone.map(|at| model[at].index));
            }
        }
    }
}

/// What these entries are, encoded.
fn amount(ids: &[LogId]) -> Amount {
    let encoded = ids.iter().map(|id| {
        let entry = entry(id.leader_id.term, id.index);
        postcard::to_extend(&entry, vec![0]).unwrap().len()
    });
    Amount {
        entries: u64::try_from(ids.len()).unwrap(),
        bytes: u64::try_from(encoded.sum::<usize>()).unwrap(),
    }
}

#[test]
fn purging_deletes_whole_segments_and_only_those_that_nothing_needs() {
    let dir = tempfile::tempdir().unwrap();
    let media: Arc<dyn Media> = Arc::new(DiskMedia);
    let mut log = open(&media, dir.path());
    for index in 0..200 {
        log.append(vec![entry(1, index)]).unwrap();
    }
    let before = log.count();
    assert!(before > 3);
    log.purge(id(1, 198)).unwrap();
    assert!(log.count() <= 2, "{}", log.count());
    drop(log);
    let log = open(&media, dir.path());
    assert_eq!(log.bounds(), (Some(id(1, 198)), Some(id(1, 199))));
}

#[test]
fn a_torn_tail_is_cut_but_damage_before_it_refuses_to_open() {
    let dir = tempfile::tempdir().unwrap();
    let media: Arc<dyn Media> = Arc::new(DiskMedia);
    let mut log =
        Segments::open(Arc::clone(&media), dir.path(), 1 << 20, Program::default()).unwrap();
    for index in 0..20 {
        log.append(vec![entry(1, index)]).unwrap().sync().unwrap();
    }
    drop(log);
    let path = dir.path().join(format!("{:016x}.log", 1));
    let whole = std::fs::read(&path).unwrap();

    // What is behind the last frame is reserved, zeros.
    let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
    std::fs::write(&path, &whole[..used - 3]).unwrap();
    let log = open(&media, dir.path());
    assert_eq!(log.bounds().1, Some(id(1, 18)));
    drop(log);

    let mut rotten = whole;
    rotten[400] ^= 1;
    std::fs::write(&path, rotten).unwrap();
    let error = Segments::open(media, dir.path(), SEGMENT_BYTES, Program::default()).unwrap_err();
    assert!(matches!(error, LogError::Damaged { .. }), "{error}");
}

#[test]
fn a_damaged_vote_is_an_error_not_a_missing_vote() {
    let dir = tempfile::tempdir().unwrap();
    let media: Arc<dyn Media> = Arc::new(DiskMedia);
    let log = open(&media, dir.path());
    let vote = crate::raft::Vote::new(3, 1);
    crate::durable::store(&*media, &log.vote_path(), &vote).unwrap();
    assert_eq!(log.load_vote().unwrap(), Some(vote));
    std::fs::write(log.vote_path(), b"short").unwrap();
    assert!(log.load_vote().is_err());
}

/// What a newer program wrote is told from damage: the node stops and says what to do, and gives nothing up.
#[test]
fn an_entry_of_a_newer_program_is_refused_with_what_to_do_and_is_no_damage() {
    let known = entry(1, 7);
    let mut body = postcard::to_extend(&known, vec![1]).unwrap();
    let path = Path::new("x.log");
    let decoded = super::segments::decode(path, 0, &body, Program::default()).unwrap();
    assert_eq!(decoded.log_id, known.log_id);
    // The command is what comes last: its variant, then an empty list.
    let variant = body.len() - 2;
    assert_eq!(body[variant], 2, "SetVerdicts");
    body[variant] = 99;
    let unknown = super::segments::decode(path, 0, &body, Program::default()).unwrap_err();
    body[0] = 2;
    let newer = super::segments::decode(path, 0, &body, Program::default()).unwrap_err();
    for error in [unknown, newer] {
        assert!(matches!(&error, LogError::Frame { .. }), "{error}");
        assert!(
            error.to_string().contains("start the newer program"),
            "{error}"
        );
        assert!(!crate::node::is_damage(&error.into()));
    }
}
