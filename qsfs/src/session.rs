//! The way from a command to metad: the context file, and a client with an identity of its own.

use crate::units;
use anyhow::Context as _;
use qsfs_proto::api::{Member, Mutation, Volume};
use qsfs_proto::client::MetadClient;
use qsfs_proto::context::Context;
use qsfs_proto::renewal::{ClusterFile, Home, Situation, Step, plan, request};
use qsfs_zstor::id::{ClientId, VolumeName};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A command waits so long for a new certificate of its cluster file, and does without.
const RENEWAL_DEADLINE: Duration = Duration::from_secs(3);

/// An opened context.
pub(crate) struct Session {
    path: PathBuf,
    context: Context,
    client: MetadClient,
}

impl Session {
    /// Finds and opens the context (`--cluster`, `$QSFS_CLUSTER`, home, `/etc`).
    pub(crate) fn open(cluster: Option<&Path>) -> anyhow::Result<Self> {
        let path = Context::locate(cluster)?;
        let context = Context::load(&path)?;
        context
            .identity()
            .check_not_ended(units::now_ms(), crate::certificate::ADVICE)
            .with_context(|| format!("cluster file {}", path.display()))?;
        // Requests of one run need an identity to be applied exactly once; nothing outlives the run.
        let client = context.client(ClientId::random(&mut rand::rng()))?;
        Ok(Self {
            path,
            context,
            client,
        })
    }

    /// The context.
    pub(crate) fn context(&self) -> &Context {
        &self.context
    }

    /// The client.
    pub(crate) fn client(&self) -> &MetadClient {
        &self.client
    }

    /// The metad nodes. Their addresses are kept in the cluster file, so that it is good as long as any of them is.
    pub(crate) async fn members(&self) -> anyhow::Result<Vec<Member>> {
        let members = self.client.members().await?;
        let mut endpoints: Vec<String> = members
            .iter()
            .map(|member| member.address.clone())
            .collect();
        endpoints.sort_unstable();
        if endpoints != self.context.endpoints() {
            let kept = Context::update(&self.path, |context| context.with_endpoints(endpoints));
            // A file that only root may write is as good as before.
            if let Err(error) = kept {
                tracing::debug!(%error, "cannot keep the addresses of the metad nodes");
            }
        }
        Ok(members)
    }

    /// A mutation whose answer does not matter.
    pub(crate) async fn apply(&self, mutation: Mutation) -> anyhow::Result<()> {
        self.client.mutate(mutation).await?;
        Ok(())
    }

    /// A volume by name.
    pub(crate) async fn volume(&self, name: &VolumeName) -> anyhow::Result<Volume> {
        Ok(self.client.volume(name).await?)
    }

    /// Where this machine keeps kits and mounts.
    pub(crate) fn state_dir(&self) -> anyhow::Result<PathBuf> {
        state_dir(&self.context)
    }
}

/// Renews the certificate of the cluster file if it is time, as daemons do theirs. A command that cannot goes on: the present one is
/// still good, or the command itself says what is wrong.
pub(crate) async fn renew_if_due(cluster: Option<&Path>) {
    let Ok(path) = Context::locate(cluster) else {
        return;
    };
    let Ok(context) = Context::load(&path) else {
        return;
    };
    let identity = context.identity();
    let Ok(validity) = identity.validity() else {
        return;
    };
    let situation = Situation {
        validity,
        unkept: false,
        failures: 0,
        failed_ms: 0,
        spread: 1.0,
    };
    if plan(situation, units::now_ms()) != Step::Renew || validity.ends_ms <= units::now_ms() {
        return;
    }
    let Ok(client) = context.client(ClientId::random(&mut rand::rng())) else {
        return;
    };
    let renewed = tokio::time::timeout(RENEWAL_DEADLINE, request(&client, identity)).await;
    match renewed {
        Ok(Ok(renewed)) => {
            if let Err(error) = ClusterFile(path).keep(&renewed) {
                tracing::warn!(%error, "the certificate of the cluster file was renewed but cannot be kept");
            }
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "the certificate of the cluster file was not renewed")
        }
        Err(_) => tracing::debug!("the certificate of the cluster file was not renewed in time"),
    }
}

/// Where this machine keeps kits and mounts of a cluster: as its context says, else below the user's state directory.
pub(crate) fn state_dir(context: &Context) -> anyhow::Result<PathBuf> {
    if let Some(dir) = context.state_dir() {
        return Ok(dir.to_owned());
    }
    let base = std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .filter(|dir| dir.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")))
        .context("neither HOME nor XDG_STATE_HOME is set: give --state-dir")?;
    Ok(base.join("qsfs").join(context.cluster().to_string()))
}

/// Where the kit of a volume is kept on the machine that created it.
pub(crate) fn kit_path(state_dir: &Path, volume: &VolumeName) -> PathBuf {
    state_dir.join("kits").join(format!("{volume}.kit"))
}

/// Where a mount of a volume keeps its local store by default.
pub(crate) fn mount_state_dir(state_dir: &Path, volume: &VolumeName) -> PathBuf {
    state_dir.join("mounts").join(volume.as_str())
}
