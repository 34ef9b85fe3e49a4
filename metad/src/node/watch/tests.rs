#![expect(clippy::unwrap_used, reason = "tests")]
//! Watchers over a real state machine, without a network.

use super::*;
use crate::node::freshness::Fresh;
use crate::raft::{LogEntry, LogId};
use crate::state::command::{Command, Entry};
use crate::state::tests::genesis;
use openraft::{CommittedLeaderId, EntryPayload};
use qsfs_proto::api::{BackendAddress, ClusterSettings, Mutation};
use qsfs_zstor::id::AgentId;

fn entry(index: u64, command: Command) -> LogEntry {
    LogEntry {
        log_id: LogId::new(CommittedLeaderId::new(1, 1), index),
        payload: EntryPayload::Normal(Entry::internal(1_000 + index, command).into()),
    }
}

fn agent() -> Command {
    Command::Mutation(Mutation::RegisterAgent {
        location: "loc1".parse().unwrap(),
        node: "n1".parse().unwrap(),
    })
}

fn backend(number: u64) -> Command {
    Command::Mutation(Mutation::RegisterBackend {
        agent: AgentId(1),
        address: BackendAddress {
            endpoint: "h:1".into(),
            namespace: format!("b{number}"),
            password: None,
            tls: true,
        },
        capacity_bytes: number,
    })
}

fn settings(rebuilds_max: u32) -> Command {
    Command::Mutation(Mutation::SetSettings(ClusterSettings {
        rebuilds_max,
        ..ClusterSettings::default()
    }))
}

struct Fixture {
    watchers: Arc<Watchers>,
    machine: Machine,
    next: u64,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

const LIMITS: Limits = Limits {
    watchers_max: 3,
    per_caller_max: 2,
    stall: Duration::from_millis(300),
    progress: Duration::from_millis(50),
    stale_max: Duration::from_secs(3_600),
};

fn fixture(limits: Limits) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::open(dir.path()).unwrap();
    machine
        .apply(vec![entry(1, genesis()), entry(2, agent())])
        .unwrap();
    let (fresh, stop) = (Fresh::default(), CancellationToken::new());
    fresh.up_to_date_at(Instant::now());
    let watchers = Watchers::new(machine.clone(), fresh, limits, stop.clone());
    Fixture {
        watchers: Arc::new(watchers),
        machine,
        next: 3,
        stop,
        _dir: dir,
    }
}

impl Fixture {
    fn apply(&mut self, commands: Vec<Command>) -> u64 {
        let first = self.next;
        let entries: Vec<_> = (first..).zip(commands).map(|(i, c)| entry(i, c)).collect();
        self.next += entries.len() as u64;
        self.machine.apply(entries).unwrap();
        self.next - 1
    }

    fn open(&self, after: Option<u64>) -> Watch {
        let request = WatchRequest::everything(after);
        self.watchers.open("admin root", request).unwrap()
    }

    fn watching(&self) -> usize {
        self.watchers.counts.lock().values().sum()
    }
}

/// The next event that is no progress.
async fn next(watch: &mut Watch) -> WatchEvent {
    loop {
        match watch.events.recv().await.unwrap() {
            WatchEvent::Progress(_) => {}
            event => return event,
        }
    }
}

#[tokio::test]
async fn one_batch_of_many_entries_is_told_entry_by_entry() {
    let mut at = fixture(LIMITS);
    let mut watch = at.open(None);
    assert_eq!(next(&mut watch).await, WatchEvent::Began(2));
    at.apply(vec![
        backend(1),
        agent(),
        Command::Group(vec![
            Entry::internal(0, backend(2)),
            Entry::internal(0, settings(3)),
            Entry::internal(0, settings(4)),
        ]),
    ]);
    let WatchEvent::Changes { index: 3, changes } = next(&mut watch).await else {
        panic!("the first backend");
    };
    assert!(matches!(&changes[..], [Change::Backend(b)] if b.capacity_bytes == 1));
    // Entry 4 changed nothing that is watched; 5 is a group, told as one, each noun as it was left.
    let WatchEvent::Changes { index: 5, changes } = next(&mut watch).await else {
        panic!("the group");
    };
    let [Change::Backend(two), Change::Settings(left)] = &changes[..] else {
        panic!("{changes:?}");
    };
    assert_eq!((two.capacity_bytes, left.rebuilds_max), (2, 4));
    // The same for whoever comes later, also in the middle.
    let mut late = at.open(Some(3));
    assert_eq!(next(&mut late).await, WatchEvent::Began(3));
    assert_eq!(
        next(&mut late).await,
        WatchEvent::Changes { index: 5, changes }
    );
}

#[tokio::test]
async fn progress_goes_on_when_nothing_changes_that_is_asked_for() {
    let mut at = fixture(LIMITS);
    let request = WatchRequest {
        settings: true,
        ..WatchRequest::default()
    };
    let mut watch = at.watchers.open("a", request).unwrap();
    assert_eq!(watch.events.recv().await, Some(WatchEvent::Began(2)));
    let last = at.apply(vec![backend(1), backend(2)]);
    loop {
        match watch.events.recv().await.unwrap() {
            WatchEvent::Progress(index) if index == last => break,
            WatchEvent::Progress(index) => assert!(index < last),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_watcher_that_takes_nothing_is_cut_off_and_apply_goes_on() {
    let mut at = fixture(LIMITS);
    let mut slow = at.open(Some(2));
    // More than its queue holds.
    let last = at.apply((0..200).map(backend).collect());
    assert_eq!(*at.machine.applied_index().borrow(), last);
    let reason = (&mut slow.ended).await.unwrap();
    assert!(
        matches!(&reason, CallError::Refused(MetadError::Busy(text)) if text.contains("resume")),
        "{reason:?}"
    );
    let mut seen = Vec::new();
    while let Some(event) = slow.events.recv().await {
        seen.push(event.index());
    }
    assert_eq!(at.watching(), 0, "its place is free again");
    // It goes on where it was, and gets the rest.
    let mut resumed = at.open(seen.last().copied());
    while seen.last() != Some(&last) {
        if let WatchEvent::Changes { index, .. } = next(&mut resumed).await {
            seen.push(index);
        }
    }
    let wanted: Vec<u64> = std::iter::once(2).chain(3..=last).collect();
    assert_eq!(seen, wanted);
}

#[tokio::test]
async fn what_is_forgotten_is_too_old_and_says_from_where_to_go_on() {
    let mut at = fixture(LIMITS);
    at.machine.forget_history(50_000);
    at.apply((0..2_000).map(backend).collect());
    let request = WatchRequest::everything(Some(2));
    let refused = at.watchers.open("a", request).unwrap_err();
    let CallError::Refused(MetadError::TooOld { oldest }) = refused else {
        panic!("{refused:?}");
    };
    let mut watch = at.open(Some(oldest));
    assert_eq!(next(&mut watch).await, WatchEvent::Began(oldest));
    assert_eq!(next(&mut watch).await.index(), oldest + 1);
}

#[tokio::test]
async fn places_are_few_and_come_back() {
    let at = fixture(LIMITS);
    let open = |caller: &str| at.watchers.open(caller, WatchRequest::everything(None));
    let refused = |caller: &str| {
        let refused = open(caller).unwrap_err();
        assert!(
            matches!(refused, CallError::Refused(MetadError::Busy(_))),
            "{refused:?}"
        );
    };
    let held = [open("a").unwrap(), open("a").unwrap()];
    refused("a");
    let _other = open("b").unwrap();
    refused("c");
    drop(held);
    while at.watching() > 1 {
        tokio::task::yield_now().await;
    }
    open("a").unwrap();
}

#[tokio::test]
async fn a_node_that_is_not_up_to_date_sends_its_watchers_away() {
    let mut limits = LIMITS;
    limits.stale_max = Duration::from_millis(200);
    let at = fixture(limits);
    let mut watch = at.open(None);
    let reason = (&mut watch.ended).await.unwrap();
    assert!(
        matches!(&reason, CallError::Refused(MetadError::Unreachable(text)) if text.contains("another")),
        "{reason:?}"
    );
    let request = WatchRequest::everything(None);
    assert!(at.watchers.open("a", request).is_err());
}

#[tokio::test]
async fn watches_end_with_their_node() {
    let at = fixture(LIMITS);
    let mut watch = at.open(None);
    at.stop.cancel();
    while watch.events.recv().await.is_some() {}
    assert!(watch.ended.await.is_err(), "without a word");
}
