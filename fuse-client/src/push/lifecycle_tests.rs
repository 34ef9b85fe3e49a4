//! The queue against a world that fails at random: what was committed, in which order, and that all of it ends.

use super::*;
use proptest::prelude::*;

fn data(id: u64) -> Sealed {
    Sealed {
        id: DatafileId(id),
        stream: Stream::Data,
        checkpoint: false,
        barrier: DatafileId(0),
        dead: Vec::new(),
    }
}

fn meta(id: u64, barrier: u64, checkpoint: bool) -> Sealed {
    Sealed {
        stream: Stream::Meta,
        checkpoint,
        barrier: DatafileId(barrier),
        ..data(id)
    }
}

/// What metad would hold.
#[derive(Default)]
struct World {
    committed: Vec<DatafileId>,
    head: Head,
    transferring: BTreeSet<DatafileId>,
    files: BTreeMap<DatafileId, Sealed>,
}

impl World {
    fn commit(&mut self, batch: &[DatafileId], head: Option<Head>) {
        for id in batch {
            let file = &self.files[id];
            if file.stream == Stream::Meta {
                for (other, named) in &self.files {
                    if named.stream == Stream::Data && *other <= file.barrier {
                        assert!(
                            self.committed.contains(other),
                            "meta {id} before data {other}"
                        );
                    }
                }
                let head = head.expect("a meta commit moves the head");
                assert!(head.datafile > self.head.datafile, "the head goes forward");
                assert!(head.recover_from >= self.head.recover_from);
                self.head = head;
            }
            assert!(!self.committed.contains(id), "{id} committed twice");
            self.committed.push(*id);
        }
    }
}

fn drive(files: Vec<Sealed>, faults: &[u8]) {
    let mut world = World::default();
    let mut core = Lifecycle::new(Head::default(), 2);
    let mut events: Vec<Event> = files.iter().cloned().map(Event::Sealed).rev().collect();
    world.files = files.into_iter().map(|file| (file.id, file)).collect();
    let mut faults = faults.iter().copied().chain(std::iter::repeat(255));
    let mut now = 0;
    let mut marked = BTreeSet::new();
    for _ in 0..10_000 {
        let Some(event) = events.pop() else { break };
        for action in core.step(now, event) {
            let fault = faults.next().unwrap_or(255);
            match action {
                Action::Transfer(id) => {
                    assert!(
                        world.transferring.insert(id),
                        "{id} is being transferred already"
                    );
                    assert!(world.transferring.len() <= 2, "bounded");
                    world.transferring.remove(&id);
                    if fault < 80 {
                        events.push(Event::TransferFailed(id));
                    } else {
                        events.insert(0, Event::Stored(id));
                        events.push(Event::Encoded(id));
                    }
                }
                Action::Commit { batch, head } => match fault {
                    0..20 => events.push(Event::CommitFailed(batch)),
                    20..40 => events.push(Event::CommitRefused(batch)),
                    40..80 => events.push(Event::CommitUnknown(batch)),
                    80..120 => {
                        world.commit(&batch, head);
                        events.push(Event::CommitUnknown(batch));
                    }
                    _ => {
                        world.commit(&batch, head);
                        events.insert(0, Event::Committed(batch));
                    }
                },
                Action::Ask(batch) if fault < 60 => events.push(Event::AskFailed(batch)),
                Action::Ask(batch) => {
                    let present = batch
                        .iter()
                        .copied()
                        .filter(|id| world.committed.contains(id))
                        .collect();
                    events.push(Event::Answered { batch, present });
                }
                Action::Committed(ids) => {
                    for id in ids {
                        assert!(world.committed.contains(&id) && marked.insert(id));
                    }
                }
                Action::Release { meta_before, .. } => {
                    assert_eq!(meta_before, world.head.recover_from)
                }
                Action::WakeAt(at) => {
                    if events.is_empty() {
                        now = at;
                        events.push(Event::Tick);
                    }
                }
            }
        }
    }
    assert_eq!(core.waiting(), 0, "everything ends committed");
    assert_eq!(world.committed.len(), world.files.len());
    assert_eq!(core.head(), world.head);
    assert_eq!(marked.len(), world.files.len());
}

proptest! {
    #[test]
    fn whatever_fails_all_is_committed_once_in_order(
        kinds in proptest::collection::vec(0_u8..4, 1..24),
        faults in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let files = kinds.iter().zip(1_u64..).map(|(kind, id)| match kind {
            0 => meta(id, id, false),
            1 => meta(id, id, true),
            _ => data(id),
        }).collect();
        drive(files, &faults);
    }
}

#[test]
fn a_fenced_writer_starts_nothing() {
    let mut core = Lifecycle::new(Head::default(), 2);
    assert_eq!(core.step(0, Event::Fenced), []);
    assert_eq!(core.step(0, Event::Sealed(data(1))), []);
    assert_eq!(core.step(1_000_000, Event::Tick), []);
}

#[test]
fn a_lost_answer_is_asked_for_and_never_committed_blindly_again() {
    let mut core = Lifecycle::new(Head::default(), 2);
    core.step(0, Event::Sealed(data(1)));
    let one = vec![DatafileId(1)];
    assert_eq!(
        core.step(0, Event::Stored(DatafileId(1))),
        [Action::Commit {
            batch: one.clone(),
            head: None
        }]
    );
    assert_eq!(
        core.step(0, Event::CommitUnknown(one.clone())),
        [Action::WakeAt(BACKOFF_FIRST_MS)]
    );
    assert_eq!(
        core.step(BACKOFF_FIRST_MS, Event::Tick),
        [Action::Ask(one.clone())]
    );
    let present = one.iter().copied().collect();
    assert_eq!(
        core.step(
            BACKOFF_FIRST_MS,
            Event::Answered {
                batch: one.clone(),
                present
            }
        ),
        [Action::Committed(one)]
    );
}

#[test]
fn waits_double_and_end_at_the_longest() {
    assert_eq!(backoff_ms(0), BACKOFF_FIRST_MS);
    assert_eq!(backoff_ms(1), 2 * BACKOFF_FIRST_MS);
    assert_eq!(backoff_ms(40), BACKOFF_MAX_MS);
}
