//! `qsfs sync`: seal, push, and wait until all of it is committed and the policy holds.

use super::Session;
use crate::control::{Progress, Synced};
use crate::lease;
use crate::push::policy::{below_policy, can_meet_policy};
use crate::push::{Pusher, SettleError, seal_now};
use qsfs_proto::api::MetadError;
use std::time::{Duration, Instant};

/// Time between signs of life of a long wait.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);
/// Time between looks at what is re-silvered.
const POLICY_LOOK_EVERY: Duration = Duration::from_millis(500);

/// Why a sync did not do all that was asked.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// A follower has nothing to push.
    #[error("this mount is read-only: there is nothing to push")]
    ReadOnly,
    /// The local store.
    #[error("seal what is open: {0}")]
    Seal(String),
    /// Not in time, or fenced.
    #[error(transparent)]
    Settle(#[from] SettleError),
    /// All is committed, some of it below policy.
    #[error(
        "everything is committed, but {datafiles} datafiles are below policy ({missing}); they are re-silvered as soon as \
         it can be; with --allow-degraded that is success"
    )]
    BelowPolicy {
        /// How many.
        datafiles: usize,
        /// What is missing.
        missing: String,
    },
    /// metad could not say whether the policy holds.
    #[error("everything is committed; whether at full policy is unknown: {0}")]
    Policy(MetadError),
}

impl Session {
    /// Pushes everything written before the call and waits until it is committed.
    pub async fn sync(
        &self,
        deadline: Instant,
        allow_degraded: bool,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Synced, SyncError> {
        let pusher = self.pusher.as_ref().ok_or(SyncError::ReadOnly)?;
        let total_bytes = self.local().at_risk().bytes;
        if let Some(epoch) = self.local().fenced() {
            return Err(SettleError::Fenced(epoch).into());
        }
        let target = seal_now(self.local(), deadline)
            .await
            .map_err(SyncError::Seal)?;
        pusher.hurry().await?;
        loop {
            let until = deadline.min(Instant::now() + PROGRESS_EVERY);
            let settled = pusher.settled(target, until).await;
            let status = pusher.status();
            let waiting = status.waiting.range(..=target).count() as u64;
            progress(Progress {
                done_bytes: total_bytes.saturating_sub(self.local().at_risk().bytes),
                total_bytes,
                datafiles_waiting: waiting,
                blocked: status.blocked.unwrap_or_default(),
            });
            match settled {
                Ok(()) => break,
                Err(SettleError::Deadline { .. }) if Instant::now() < deadline => {}
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(lease) = self.lease {
            let report = self.observer.client_report();
            lease::tell(self.context.cluster.as_ref(), lease, report).await;
        }
        let waits = |datafiles: usize| {
            progress(Progress {
                done_bytes: total_bytes,
                total_bytes,
                datafiles_waiting: 0,
                blocked: format!(
                    "{datafiles} datafiles are below policy until they are re-silvered"
                ),
            });
        };
        self.until_policy_holds(pusher, deadline, allow_degraded, &waits)
            .await
    }

    /// All is committed; what is below policy is waited for as long as re-silver can mend it now.
    async fn until_policy_holds(
        &self,
        pusher: &Pusher,
        deadline: Instant,
        allow_degraded: bool,
        waits: &(dyn Fn(usize) + Send + Sync),
    ) -> Result<Synced, SyncError> {
        loop {
            let status = pusher.status();
            let below = below_policy(&self.context, &status.below_policy).await;
            let below = match below {
                Err(error) if !allow_degraded => return Err(SyncError::Policy(error)),
                below => below.unwrap_or_else(|_| (*status.below_policy).clone()),
            };
            let missing = if below.is_empty() {
                String::new()
            } else {
                status.missing
            };
            if below.is_empty() || allow_degraded {
                return Ok(Synced {
                    head: status.head.datafile.0,
                    below_policy: below.len() as u64,
                    missing,
                });
            }
            let in_time = Instant::now() + POLICY_LOOK_EVERY < deadline;
            if !in_time || !can_meet_policy(&self.context) {
                return Err(SyncError::BelowPolicy {
                    datafiles: below.len(),
                    missing,
                });
            }
            waits(below.len());
            tokio::time::sleep(POLICY_LOOK_EVERY).await;
        }
    }
}
