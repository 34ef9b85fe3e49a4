//! The lease: the exclusive right to write the volume.
//!
//! Acquired at mount (a new epoch), renewed at a third of its lifetime together with a report for `status`. A writer that cannot
//! reach metad goes on locally: nobody can take over without a majority either. One that learns of a higher epoch stops
//! writing.

use crate::cluster::Cluster;
use crate::error::MountError;
use qsfs_proto::api::{Applied, ClientReport, MetadError, Mutation};
use qsfs_zstor::id::{ClientId, Epoch, VolumeId};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Deadline of acquiring.
pub const ACQUIRE_DEADLINE: Duration = Duration::from_secs(30);
/// Deadline of releasing: a mount must not hang at its end.
pub const RELEASE_DEADLINE: Duration = Duration::from_secs(5);
/// Deadline of a report out of turn.
const TELL_DEADLINE: Duration = Duration::from_secs(2);
/// Shortest time between renewals.
const RENEW_MIN: Duration = Duration::from_millis(200);

/// A lease held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Volume.
    pub volume: VolumeId,
    /// Epoch.
    pub epoch: Epoch,
    /// Lifetime without renewal.
    pub ttl: Duration,
}

/// `host:pid` for people.
pub fn holder() -> String {
    let host = nix::sys::utsname::uname()
        .ok()
        .and_then(|names| names.nodename().to_str().map(str::to_owned));
    format!(
        "{}:{}",
        host.unwrap_or_else(|| "unknown".to_owned()),
        std::process::id()
    )
}

/// Acquires it, or says who holds it.
pub async fn acquire(
    cluster: &dyn Cluster,
    volume: VolumeId,
    client: ClientId,
    takeover: bool,
) -> Result<Lease, MountError> {
    let settings = cluster
        .settings()
        .await
        .map_err(MountError::metad("read the cluster's settings"))?;
    let mutation = Mutation::AcquireLease {
        volume,
        client,
        holder: holder(),
        takeover,
    };
    let applied = cluster
        .mutate(mutation, ACQUIRE_DEADLINE)
        .await
        .map_err(MountError::metad("acquire the volume's lease"))?;
    let Applied::Epoch(epoch) = applied else {
        let reason = MetadError::Invalid(format!("the answer to a lease request is {applied:?}"));
        return Err(MountError::Metad {
            step: "acquire the volume's lease",
            reason,
        });
    };
    Ok(Lease {
        volume,
        epoch,
        ttl: Duration::from_millis(settings.lease_ttl_ms),
    })
}

/// Renews until cancelled or fenced. `report` is asked each time; `fenced` is called once.
pub async fn keep(
    cluster: Arc<dyn Cluster>,
    lease: Lease,
    report: impl Fn() -> ClientReport + Send,
    fenced: impl FnOnce(Epoch) + Send,
    cancelled: CancellationToken,
) {
    let period = (lease.ttl / 3).max(RENEW_MIN);
    let mut silent = false;
    loop {
        let mutation = Mutation::RenewLease {
            volume: lease.volume,
            epoch: lease.epoch,
            report: report(),
        };
        let renewed = tokio::select! {
            () = cancelled.cancelled() => return,
            renewed = cluster.mutate(mutation, period) => renewed,
        };
        match renewed {
            Ok(_) if silent => {
                silent = false;
                tracing::info!("metad answers again: the lease is renewed");
            }
            Ok(_) => {}
            Err(MetadError::Fenced { current }) => return fenced(current),
            Err(error) if !silent => {
                silent = true;
                tracing::warn!(%error, "the lease cannot be renewed now; writing goes on locally");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = cancelled.cancelled() => return,
            () = tokio::time::sleep(period) => {}
        }
    }
}

/// Tells metad the newest report now, so that `status` right after a sync says what the sync achieved.
pub async fn tell(cluster: &dyn Cluster, lease: Lease, report: ClientReport) {
    let (volume, epoch) = (lease.volume, lease.epoch);
    let mutation = Mutation::RenewLease {
        volume,
        epoch,
        report,
    };
    if let Err(error) = cluster.mutate(mutation, TELL_DEADLINE).await {
        tracing::debug!(%error, "the report is told with the next renewal");
    }
}

/// Gives it back; not being able to is only worth a word, it ends by itself.
pub async fn release(cluster: &dyn Cluster, lease: Lease) {
    let mutation = Mutation::ReleaseLease {
        volume: lease.volume,
        epoch: lease.epoch,
    };
    if let Err(error) = cluster.mutate(mutation, RELEASE_DEADLINE).await {
        tracing::warn!(%error, "the lease could not be given back; it ends in {} s", lease.ttl.as_secs());
    }
}
