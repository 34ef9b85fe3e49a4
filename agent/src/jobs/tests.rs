#![expect(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::fixture::record;
use proptest::prelude::*;

fn rebuild(datafile: u64, shard: u32, to: u64, data: u32) -> Job {
    Job::Rebuild(RebuildJob {
        record: record(datafile, data),
        shard,
        to: BackendId(to),
    })
}

fn delete(datafile: u64, shard: u32, backend: u64) -> Job {
    Job::Delete {
        backend: BackendId(backend),
        record: record(datafile, 4),
        shard,
    }
}

fn started(actions: &[Action]) -> Vec<(Ticket, Job)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Start { ticket, job, .. } => Some((*ticket, job.clone())),
            _ => None,
        })
        .collect()
}

#[test]
fn a_repeated_order_is_not_started_twice() {
    let mut queue = JobQueue::new(Limits::default());
    assert_eq!(
        started(&queue.step(Event::Ordered(rebuild(1, 0, 9, 4)))).len(),
        1
    );
    assert_eq!(queue.step(Event::Ordered(rebuild(1, 0, 9, 4))), vec![]);
    assert_eq!(queue.len(), (0, 1));
}

#[test]
fn a_deletion_cancels_the_rebuild_to_the_same_place_and_waits_for_its_end() {
    let mut queue = JobQueue::new(Limits::default());
    let (ticket, _) = started(&queue.step(Event::Ordered(rebuild(1, 0, 9, 4))))[0].clone();
    assert_eq!(
        queue.step(Event::Ordered(delete(1, 0, 9))),
        vec![Action::Cancel { ticket }]
    );
    let actions = queue.step(Event::Ended {
        ticket,
        outcome: Outcome::Cancelled,
    });
    assert_eq!(started(&actions)[0].1, delete(1, 0, 9));
}

#[test]
fn a_rebuild_that_is_too_large_for_the_limit_runs_alone() {
    let limits = Limits {
        bytes_max: 1,
        ..Limits::default()
    };
    let mut queue = JobQueue::new(limits);
    let first = started(&queue.step(Event::Ordered(rebuild(1, 0, 9, 16))));
    assert_eq!(first.len(), 1);
    assert_eq!(
        started(&queue.step(Event::Ordered(rebuild(2, 0, 9, 16)))).len(),
        0
    );
    let outcome = Outcome::Failed {
        error: "disk full".into(),
    };
    let actions = queue.step(Event::Ended {
        ticket: first[0].0,
        outcome,
    });
    assert!(
        matches!(&actions[0], Action::Answer(AgentReport::RebuildDone { error: Some(error), .. }) if error == "disk full")
    );
    assert_eq!(started(&actions).len(), 1);
}

#[test]
fn a_lost_session_empties_what_waits_and_lets_what_runs_go_on() {
    let limits = Limits {
        rebuilds_max: 1,
        ..Limits::default()
    };
    let mut queue = JobQueue::new(limits);
    queue.step(Event::Ordered(rebuild(1, 0, 9, 4)));
    queue.step(Event::Ordered(rebuild(2, 0, 9, 4)));
    assert_eq!(queue.len(), (1, 1));
    queue.step(Event::SessionLost);
    assert_eq!(queue.len(), (0, 1));
}

#[derive(Debug, Clone)]
enum Do {
    Order(Job),
    End(usize, bool),
    Lose,
}

fn any_do() -> impl Strategy<Value = Do> {
    prop_oneof![
        4 => (1..5u64, 0..3u32, 8..10u64, prop_oneof![Just(2u32), Just(4), Just(16)])
            .prop_map(|(datafile, shard, to, data)| Do::Order(rebuild(datafile, shard, to, data))),
        2 => (1..5u64, 0..3u32, 8..10u64)
            .prop_map(|(datafile, shard, to)| Do::Order(delete(datafile, shard, to))),
        4 => (any::<usize>(), any::<bool>()).prop_map(|(which, good)| Do::End(which, good)),
        1 => Just(Do::Lose),
    ]
}

/// The naive model: the wishes of metad as a plain list, newest last, without limits or tickets.
#[derive(Default)]
struct Model {
    wishes: Vec<Job>,
    running: BTreeMap<Ticket, (Job, bool)>,
}

impl Model {
    fn order(&mut self, job: &Job) {
        if self
            .running
            .values()
            .any(|(running, cancelled)| !cancelled && running.same_order(job))
        {
            self.wishes.retain(|wish| wish.key() != job.key());
            return;
        }
        for (running, cancelled) in self.running.values_mut() {
            *cancelled |= conflicts(running, job);
        }
        if let Some(place) = self.wishes.iter().position(|wish| wish.same_order(job)) {
            self.wishes[place] = job.clone();
        } else {
            self.wishes.retain(|wish| !conflicts(wish, job));
            self.wishes.push(job.clone());
        }
    }
}

fn conflicts(old: &Job, new: &Job) -> bool {
    old.key() == new.key()
        && (old.is_rebuild() && new.is_rebuild() || old.backend() == new.backend())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn the_queue_does_what_a_plain_list_of_wishes_says(steps in prop::collection::vec(any_do(), 1..80)) {
        let limits = Limits { rebuilds_max: 2, deletions_max: 1, bytes_max: 60 << 20, job_bytes_max: 40 << 20 };
        let mut queue = JobQueue::new(limits);
        let mut model = Model::default();
        let mut steps = steps;
        // At the end everything that runs ends, so that nothing may be left behind.
        steps.extend((0..200).map(|_| Do::End(0, true)));
        for step in steps {
            let actions = match step {
                Do::Order(job) => {
                    model.order(&job);
                    queue.step(Event::Ordered(job))
                }
                Do::Lose => {
                    model.wishes.clear();
                    queue.step(Event::SessionLost)
                }
                Do::End(which, good) => {
                    let tickets: Vec<Ticket> = model.running.keys().copied().collect();
                    if tickets.is_empty() { continue }
                    let ticket = tickets[which % tickets.len()];
                    let (job, cancelled) = model.running.remove(&ticket).unwrap();
                    let outcome = match (&job, good, cancelled) {
                        (_, _, true) => Outcome::Cancelled,
                        (Job::Rebuild(_), true, _) => Outcome::Rebuilt { bytes: 1 },
                        (Job::Delete { .. }, true, _) => Outcome::Deleted,
                        _ => Outcome::Failed { error: "x".into() },
                    };
                    let answered = !cancelled && (good || job.is_rebuild());
                    let actions = queue.step(Event::Ended { ticket, outcome });
                    prop_assert_eq!(actions.iter().any(|action| matches!(action, Action::Answer(_))), answered);
                    actions
                }
            };
            for action in actions {
                match action {
                    Action::Start { ticket, job, window_rows } => {
                        prop_assert!(window_rows >= 1);
                        let place = model.wishes.iter().position(|wish| *wish == job);
                        prop_assert!(place.is_some(), "started what nobody wants: {job:?}");
                        let before = model.wishes.iter().take(place.unwrap()).filter(|wish| wish.key() == job.key()).count();
                        prop_assert_eq!(before, 0, "an older order about the shard waits");
                        model.wishes.remove(place.unwrap());
                        prop_assert!(model.running.values().all(|(running, _)| running.key() != job.key()));
                        model.running.insert(ticket, (job, false));
                    }
                    Action::Cancel { ticket } => prop_assert!(model.running[&ticket].1),
                    Action::Answer(_) => {}
                }
            }
            let rebuilds: Vec<&Job> = model.running.values().map(|(job, _)| job).filter(|job| job.is_rebuild()).collect();
            prop_assert!(rebuilds.len() <= 2);
            prop_assert!(model.running.len() - rebuilds.len() <= 1);
            let bytes: u64 = rebuilds.iter().map(|job| queue.window(job).1).sum();
            prop_assert!(bytes <= limits.bytes_max || rebuilds.len() == 1);
            prop_assert_eq!(queue.len(), (model.wishes.len(), model.running.len()));
            prop_assert!(model.wishes.is_empty() || !model.running.is_empty(), "idle although there is work");
        }
        prop_assert_eq!(queue.len(), (0, 0));
    }
}
