//! The shell around the job queue: orders from the session in, runs started, answers out.

use crate::jobs::{Action, Event, Job, JobQueue, Limits, Outcome, Ticket};
use crate::rebuild::Rebuilder;
use crate::session::SessionEvent;
use qsfs_proto::api::{AgentOrder, AgentReport, ClusterSettings};
use qsfs_zstor::id::BackendId;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// See the module.
pub(crate) struct Director {
    pub(crate) rebuilder: Arc<Rebuilder>,
    pub(crate) events: mpsc::Receiver<SessionEvent>,
    pub(crate) reports: mpsc::Sender<AgentReport>,
    pub(crate) settings: watch::Sender<Option<ClusterSettings>>,
    /// Wakes the tours; one order waits at most, more of them mean the same.
    pub(crate) tours: BTreeMap<BackendId, mpsc::Sender<()>>,
    pub(crate) shutdown: CancellationToken,
}

impl Director {
    /// Runs until shutdown; what runs then is dropped, as by a crash.
    pub(crate) async fn run(mut self, limits: Limits) {
        let mut queue = JobQueue::new(limits);
        let mut running = JoinSet::new();
        let mut cancels = BTreeMap::new();
        loop {
            let event = tokio::select! {
                () = self.shutdown.cancelled() => return,
                event = self.events.recv() => match event {
                    Some(SessionEvent::Order(order)) => match self.order(order) {
                        Some(job) => Event::Ordered(job),
                        None => continue,
                    },
                    Some(SessionEvent::Lost) => Event::SessionLost,
                    None => return,
                },
                Some(ended) = running.join_next() => {
                    let (ticket, outcome): (Ticket, Outcome) = ended.expect("a run does not panic");
                    cancels.remove(&ticket);
                    Event::Ended { ticket, outcome }
                }
            };
            let mut actions: VecDeque<Action> = queue.step(event).into();
            while let Some(action) = actions.pop_front() {
                match action {
                    Action::Start {
                        ticket,
                        job,
                        window_rows,
                    } => {
                        let cancel = self.shutdown.child_token();
                        cancels.insert(ticket, cancel.clone());
                        let rebuilder = Arc::clone(&self.rebuilder);
                        running.spawn(async move {
                            (
                                ticket,
                                carry_out(&rebuilder, &job, window_rows, cancel).await,
                            )
                        });
                    }
                    Action::Cancel { ticket } => {
                        if let Some(cancel) = cancels.get(&ticket) {
                            cancel.cancel();
                        }
                    }
                    // A full channel means that no session stands; the next leader asks again.
                    Action::Answer(report) => drop(self.reports.try_send(report)),
                }
            }
        }
    }

    fn order(&self, order: AgentOrder) -> Option<Job> {
        match order {
            AgentOrder::Rebuild(job) => {
                tracing::debug!(volume = %job.record.volume, datafile = %job.record.datafile, shard = job.shard, backend = %job.to, "rebuild ordered");
                Some(Job::Rebuild(job))
            }
            AgentOrder::DeleteShard {
                backend,
                record,
                shard,
            } => Some(Job::Delete {
                backend,
                record,
                shard,
            }),
            AgentOrder::Scrub { backend } => {
                match self.tours.get(&backend) {
                    Some(tour) => drop(tour.try_send(())),
                    None => {
                        tracing::warn!(%backend, "scrub ordered of a backend that is not open here")
                    }
                }
                None
            }
            AgentOrder::Settings(settings) => {
                self.settings.send_replace(Some(settings));
                None
            }
            AgentOrder::Backends(backends) => {
                self.rebuilder.stores.update(backends);
                None
            }
        }
    }
}

async fn carry_out(
    rebuilder: &Rebuilder,
    job: &Job,
    window_rows: u32,
    cancel: CancellationToken,
) -> Outcome {
    match job {
        Job::Rebuild(job) => rebuilder.rebuild(job, window_rows, cancel).await,
        Job::Delete {
            backend,
            record,
            shard,
        } => {
            // A deletion is short and safe to finish; it is not cancelled.
            rebuilder.delete(*backend, record, *shard).await
        }
    }
}
