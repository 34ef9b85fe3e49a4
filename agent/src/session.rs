//! The session with metad's leader: heartbeats out, orders in, again and again.
//!
//! Invariants: while metad is away nothing else stops; waits between attempts grow to a limit and are spread, so that
//! agents do not all come back at once; what could not be told is not kept, a new leader derives and asks again.

use crate::cluster::{Cluster, Session};
use crate::local::LocalBackend;
use futures::future::join_all;
use qsfs_proto::api::{AgentOrder, AgentReport, ClusterSettings};
use qsfs_zstor::id::AgentId;
use rand::Rng;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;

/// First wait after a lost session.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest wait.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A heartbeat more often than this helps nobody.
const HEARTBEAT_MIN: Duration = Duration::from_millis(50);
/// A report that the stream does not take for so long: the stream is dead.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// What the session tells the rest of the agent.
#[derive(Debug)]
pub(crate) enum SessionEvent {
    /// metad wants something.
    Order(AgentOrder),
    /// The leader is gone.
    Lost,
}

/// See the module.
pub(crate) struct SessionTask {
    pub(crate) agent: AgentId,
    pub(crate) cluster: Arc<dyn Cluster>,
    pub(crate) backends: Arc<Vec<LocalBackend>>,
    pub(crate) settings: watch::Receiver<Option<ClusterSettings>>,
    pub(crate) reports: mpsc::Receiver<AgentReport>,
    pub(crate) events: mpsc::Sender<SessionEvent>,
    /// Another certificate is in use: metad is shown it at once, with a session of its own, before the one before it ends.
    pub(crate) renewed: Arc<Notify>,
    pub(crate) shutdown: CancellationToken,
}

impl SessionTask {
    /// Runs until shutdown.
    pub(crate) async fn run(mut self) {
        let shutdown = self.shutdown.clone();
        tokio::select! {
            () = self.again_and_again() => {}
            () = shutdown.cancelled() => {}
        }
    }

    async fn again_and_again(&mut self) {
        let mut backoff = BACKOFF_MIN;
        loop {
            match self.cluster.session(self.agent).await {
                Ok(session) => {
                    tracing::info!(agent = %self.agent, "session with metad begins");
                    let ended = self.talk(session, &mut backoff).await;
                    tracing::info!(agent = %self.agent, reason = ended, "session with metad ended");
                    if self.events.send(SessionEvent::Lost).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::info!(agent = %self.agent, %error, "no session with metad yet")
                }
            }
            // What nobody can be told now is derived again by the next leader.
            while self.reports.try_recv().is_ok() {}
            let spread = rand::rng().random_range(0.5..1.5);
            tokio::time::sleep(backoff.mul_f64(spread)).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn talk(&mut self, mut session: Session, backoff: &mut Duration) -> String {
        let mut heartbeat_ms = self.heartbeat_ms();
        let mut ticks = ticks(heartbeat_ms);
        loop {
            let report = tokio::select! {
                _ = ticks.tick() => AgentReport::Heartbeat { facts: self.facts().await },
                report = self.reports.recv() => match report {
                    Some(report) => report,
                    None => return "the agent stops".to_owned(),
                },
                order = session.orders.recv() => {
                    match order {
                        Some(Ok(order)) => {
                            *backoff = BACKOFF_MIN;
                            if self.events.send(SessionEvent::Order(order)).await.is_err() {
                                return "the agent stops".to_owned();
                            }
                        }
                        Some(Err(error)) => return error.to_string(),
                        None => return "the leader closed it".to_owned(),
                    }
                    continue;
                }
                changed = self.settings.changed() => {
                    if changed.is_err() {
                        return "the agent stops".to_owned();
                    }
                    if heartbeat_ms != self.heartbeat_ms() {
                        heartbeat_ms = self.heartbeat_ms();
                        ticks = self::ticks(heartbeat_ms);
                    }
                    continue;
                }
                () = self.renewed.notified() => return "a new certificate is in use".to_owned(),
            };
            if session
                .reports
                .send_timeout(report, SEND_TIMEOUT)
                .await
                .is_err()
            {
                return "the stream takes no reports".to_owned();
            }
        }
    }

    fn heartbeat_ms(&mut self) -> u64 {
        let settings = self.settings.borrow_and_update();
        settings.as_ref().map_or_else(
            || ClusterSettings::default().heartbeat_ms,
            |settings| settings.heartbeat_ms,
        )
    }

    async fn facts(&self) -> Vec<qsfs_proto::api::BackendFacts> {
        let began = Instant::now();
        let mut all = join_all(self.backends.iter().map(LocalBackend::facts)).await;
        // The slowest holds up all of them.
        let age_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        for facts in &mut all {
            facts.age_ms = Some(age_ms);
        }
        all
    }
}

/// The first tick is at once: metad learns what is up as soon as the session stands.
fn ticks(heartbeat_ms: u64) -> tokio::time::Interval {
    let period = Duration::from_millis(heartbeat_ms).max(HEARTBEAT_MIN);
    let mut ticks = interval_at(Instant::now(), period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
