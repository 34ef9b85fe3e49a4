#![expect(clippy::unwrap_used, reason = "tests")]
//! What is counted, and how seldom.

use super::{Count, Counting, REUSED, walk};
use crate::ground::{Ground, Job, Work, WorkLost};
use crate::machine::Machine;
use crate::plan::index::PAGE;
use crate::raft::{LogEntry, LogId};
use crate::state::command::{Command, Entry};
use crate::state::records::COMMIT_RECORDS_MAX;
use crate::state::tests::{VOLUME, client, genesis, policy, record};
use futures::future::BoxFuture;
use openraft::{CommittedLeaderId, EntryPayload};
use qsfs_proto::api::{BackendAddress, Mutation, ShardReport, Verdict, VolumeSettings};
use qsfs_zstor::id::{AgentId, BackendId, DatafileId, Epoch, KeyId, Stream};
use qsfs_zstor::record::ShardState;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

const DEADLINE: Duration = Duration::from_secs(60);
/// More than a walk takes in one step.
const RECORDS: u64 = PAGE as u64 * 2 + 10;

/// Two locations of two backends, a volume at 2+2 that survives a location, and its records on all four.
fn filled() -> Vec<Command> {
    let mut commands = vec![genesis()];
    for (location, agent) in [("loc1", 1), ("loc2", 2)] {
        commands.push(Command::Mutation(Mutation::RegisterAgent {
            location: location.parse().unwrap(),
            node: "n1".parse().unwrap(),
        }));
        for namespace in ["a", "b"] {
            commands.push(Command::Mutation(Mutation::RegisterBackend {
                agent: AgentId(agent),
                address: BackendAddress {
                    endpoint: format!("{location}:9900"),
                    namespace: namespace.into(),
                    password: None,
                    tls: true,
                },
                capacity_bytes: 1 << 40,
            }));
        }
    }
    commands.push(Command::Mutation(Mutation::CreateVolume {
        id: VOLUME,
        name: "dev".parse().unwrap(),
        policy: policy(),
        key_id: KeyId::from_bytes([3; 16]),
        settings: VolumeSettings::default(),
    }));
    commands.push(Command::Mutation(Mutation::AcquireLease {
        volume: VOLUME,
        client: client(1),
        holder: "host:1".into(),
        takeover: false,
    }));
    let all: Vec<u64> = (1..=RECORDS).collect();
    for some in all.chunks(COMMIT_RECORDS_MAX) {
        let records = some
            .iter()
            .map(|datafile| record(*datafile, Stream::Data, &[1, 2, 3, 4]));
        commands.push(Command::Mutation(Mutation::CommitDatafiles {
            volume: VOLUME,
            epoch: Epoch(1),
            records: records.collect(),
            head: None,
        }));
    }
    commands
}

fn apply(machine: &Machine, commands: Vec<Command>) {
    let applied = machine.raft_row().applied.map_or(0, |id| id.index);
    let entries = (applied + 1..).zip(commands).map(|(index, command)| {
        let entry = Entry::internal(1_000 + index, command);
        LogEntry {
            log_id: LogId::new(CommittedLeaderId::new(1, 1), index),
            payload: EntryPayload::Normal(entry.into()),
        }
    });
    let (responses, _) = machine.apply(entries.collect()).unwrap();
    for response in responses {
        assert!(matches!(response.0, Some(Ok(_))), "{response:?}");
    }
}

fn lost(backend: u64) -> Command {
    Command::SetVerdicts(vec![(BackendId(backend), Verdict::Lost)])
}

#[test]
fn a_walk_finds_what_is_below_policy_pending_and_bad() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::open(dir.path()).unwrap();
    let empty = walk(&machine).unwrap();
    assert_eq!((empty.pending_shards, empty.bad_shards), (0, 0));
    assert!(empty.health.is_empty());

    apply(&machine, filled());
    let well = walk(&machine).unwrap();
    assert_eq!((well.pending_shards, well.bad_shards), (0, 0));
    let health = &well.health[&VOLUME];
    assert_eq!((health.below_policy, health.unreadable), (0, 0));
    assert_eq!(health.budget().unwrap().locations, 1);

    let reported = |datafile| ShardReport {
        volume: VOLUME,
        datafile: DatafileId(datafile),
        shard: 3,
        backend: BackendId(4),
        state: ShardState::Corrupt,
        by_scrub: false,
    };
    // The first and the last: every step of the walk counts.
    let reports = vec![reported(1), reported(RECORDS)];
    apply(
        &machine,
        vec![
            lost(1),
            Command::Mutation(Mutation::ReportShards { reports }),
        ],
    );
    let unwell = walk(&machine).unwrap();
    assert_eq!(
        (unwell.pending_shards, unwell.bad_shards),
        (RECORDS + 2, 2),
        "one shard of each on the lost backend, and what was reported"
    );
    let health = &unwell.health[&VOLUME];
    assert_eq!((health.below_policy, health.unreadable), (RECORDS, 0));
    assert_eq!(health.budget().unwrap().locations, 0);

    apply(&machine, vec![lost(2), lost(3)]);
    let gone = walk(&machine).unwrap();
    assert_eq!(gone.health[&VOLUME].unreadable, RECORDS);
}

/// What becomes of a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Waits,
    Ends,
    IsLost,
}

/// Blocking work that waits until it is told what becomes of it.
#[derive(Debug)]
struct Held {
    begun: AtomicUsize,
    fate: watch::Sender<Fate>,
}

impl Held {
    fn new(fate: Fate) -> Arc<Self> {
        Arc::new(Self {
            begun: AtomicUsize::new(0),
            fate: watch::Sender::new(fate),
        })
    }

    fn begun(&self) -> usize {
        self.begun.load(Ordering::SeqCst)
    }
}

impl Work for Held {
    fn run(&self, job: Job) -> BoxFuture<'static, Result<(), WorkLost>> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        let mut told = self.fate.subscribe();
        Box::pin(async move {
            let fate = told.wait_for(|fate| *fate != Fate::Waits).await;
            match fate.map(|fate| *fate) {
                Ok(Fate::Ends) => {
                    job();
                    Ok(())
                }
                _ => Err(WorkLost),
            }
        })
    }

    fn has_threads(&self) -> bool {
        false
    }
}

fn machine_on(work: &Arc<Held>, dir: &tempfile::TempDir) -> Machine {
    let ground = Ground {
        work: Arc::clone(work) as Arc<dyn Work>,
        ..Ground::real()
    };
    let machine = Machine::open_on(&ground, dir.path()).unwrap();
    apply(&machine, filled());
    machine
}

async fn until_counted(counting: &Counting, machine: &Machine) -> Arc<Count> {
    let asked = async {
        loop {
            if let Some(count) = counting.ask(machine).await {
                return count;
            }
        }
    };
    timeout(DEADLINE, asked).await.unwrap()
}

#[tokio::test]
async fn all_who_ask_share_one_walk_and_none_waits_for_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let work = Held::new(Fate::Waits);
    let machine = machine_on(&work, &dir);
    let counting = Counting::default();
    let (one, other) = timeout(DEADLINE, async {
        tokio::join!(counting.ask(&machine), counting.ask(&machine))
    })
    .await
    .unwrap();
    assert!(one.is_none() && other.is_none(), "it still counts");
    assert!(counting.ask(&machine).await.is_none());
    assert_eq!(work.begun(), 1);
    apply(&machine, vec![lost(1)]);
    work.fate.send_replace(Fate::Ends);
    let count = until_counted(&counting, &machine).await;
    assert_eq!(count.pending_shards, RECORDS);
    assert_eq!(work.begun(), 1);
}

#[tokio::test]
async fn a_walk_that_is_lost_is_made_again_for_the_next_who_asks() {
    let dir = tempfile::tempdir().unwrap();
    let work = Held::new(Fate::IsLost);
    let machine = machine_on(&work, &dir);
    let counting = Counting::default();
    assert!(counting.ask(&machine).await.is_none());
    assert!(counting.ask(&machine).await.is_none());
    assert_eq!(work.begun(), 2);
    work.fate.send_replace(Fate::Ends);
    assert_eq!(until_counted(&counting, &machine).await.pending_shards, 0);
}

#[tokio::test]
async fn a_count_is_used_for_some_times_as_long_as_it_took() {
    let dir = tempfile::tempdir().unwrap();
    let work = Held::new(Fate::Ends);
    let machine = machine_on(&work, &dir);
    let counting = Counting::default();
    let old = Arc::new(Count {
        pending_shards: 77,
        ..Count::default()
    });
    let took = Duration::from_secs(3_600);
    counting.walks.lock().newest = Some((Instant::now(), took, Arc::clone(&old)));
    assert_eq!(counting.ask(&machine).await.unwrap().pending_shards, 77);
    assert_eq!(work.begun(), 0);

    let took = Duration::from_millis(1);
    let ended = Instant::now().checked_sub(took * REUSED).unwrap();
    counting.walks.lock().newest = Some((ended, took, Arc::clone(&old)));
    let asked = counting.ask(&machine).await.unwrap();
    assert_eq!(asked.pending_shards, 0, "counted anew");
    assert_eq!(work.begun(), 1);

    // Longer than anyone waits: the old count is better than none.
    work.fate.send_replace(Fate::Waits);
    counting.walks.lock().newest = Some((ended, took, old));
    let asked = timeout(DEADLINE, counting.ask(&machine)).await.unwrap();
    assert_eq!(asked.unwrap().pending_shards, 77);
    assert_eq!(work.begun(), 2);
}
