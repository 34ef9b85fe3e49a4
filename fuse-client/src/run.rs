//! `run`: a volume mounted until it is unmounted or the token is cancelled.
//!
//! ```text
//! lock state directory -> kit, volume, certificate fit? -> session (lease, recovery) -> FUSE -> control socket -> ready
//! shutdown or umount   -> push what is at risk -> unmount -> push the rest -> lease back
//! ```

mod requests;

use crate::backends::ZdbConnector;
use crate::certificate::{self, KitCopy};
use crate::cluster::Cluster;
use crate::control::{Progress, server};
use crate::error::MountError;
use crate::fuse::{self, MountHandle};
use crate::kit::{KitError, RecoveryKit};
use crate::session::{Session, SessionParts};
use crate::state::{ClientFile, lock};
use crate::store::layout::StateDir;
use qsfs_proto::api::Volume;
use qsfs_proto::client::MetadClient;
use qsfs_proto::context::Context;
use qsfs_proto::identity::LiveIdentity;
use qsfs_proto::renewal::{ClusterFile, Home, Renewal};
use qsfs_zdb::media::DiskMedia;
use qsfs_zstor::id::{ClientId, Epoch, VolumeName};
use requests::Requests;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Time to push at the end unless the options say otherwise.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(120);
/// Time for the kernel to let go after an unmount.
const UNMOUNT_WAIT: Duration = Duration::from_secs(20);

/// Told how far the push at the end is.
pub type OnProgress = Arc<dyn Fn(Progress) + Send + Sync>;

/// What to mount, where, as whom.
#[derive(Clone)]
pub struct MountOptions {
    /// Volume.
    pub volume: VolumeName,
    /// An empty directory.
    pub mountpoint: PathBuf,
    /// Local store, namespace and control socket of this mount.
    pub state_dir: PathBuf,
    /// Cluster and identity; `None`: those in the kit.
    pub context: Option<Context>,
    /// File that `context` is of: a renewed certificate is kept there. `None`: in the state directory's copy of the kit.
    pub cluster_file: Option<PathBuf>,
    /// Recovery kit; needed once per state directory.
    pub kit: Option<PathBuf>,
    /// Take the volume from a living writer.
    pub takeover: bool,
    /// A follower.
    pub read_only: bool,
    /// Most bytes of local datafiles; `None`: the default.
    pub cache_limit_bytes: Option<u64>,
    /// Longest push at the end.
    pub shutdown_timeout: Duration,
    /// Told how far it is.
    pub on_progress: Option<OnProgress>,
}

impl std::fmt::Debug for MountOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MountOptions")
            .field("volume", &self.volume)
            .field("mountpoint", &self.mountpoint)
            .field("state_dir", &self.state_dir)
            .finish_non_exhaustive()
    }
}

impl MountOptions {
    /// Defaults for everything but the three names.
    pub fn new(
        volume: VolumeName,
        mountpoint: impl Into<PathBuf>,
        state_dir: impl Into<PathBuf>,
    ) -> Self {
        Self {
            volume,
            mountpoint: mountpoint.into(),
            state_dir: state_dir.into(),
            context: None,
            cluster_file: None,
            kit: None,
            takeover: false,
            read_only: false,
            cache_limit_bytes: None,
            shutdown_timeout: SHUTDOWN_TIMEOUT,
            on_progress: None,
        }
    }
}

/// A mount that is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Where.
    pub mountpoint: PathBuf,
    /// Control socket.
    pub control_socket: PathBuf,
    /// Epoch held.
    pub epoch: Epoch,
    /// Files of an outrun writer that were kept aside by the recovery.
    pub set_aside: Vec<PathBuf>,
}

/// Mounts; returns after the unmount. `ready` is told when the mount answers. Must run in a multi-thread runtime.
pub async fn run(
    options: MountOptions,
    ready: oneshot::Sender<Mounted>,
    shutdown: CancellationToken,
) -> Result<(), MountError> {
    let mountpoint = fuse::check_mount_point(&options.mountpoint)?.path;
    // The state directory is made absolute: commands that ask for the socket run elsewhere.
    let state_dir =
        std::path::absolute(&options.state_dir).map_err(|error| MountError::StateFile {
            step: "find",
            path: options.state_dir.clone(),
            reason: error.to_string(),
        })?;
    let dir = StateDir::new(state_dir);
    let locking = dir.clone();
    let held = tokio::task::spawn_blocking(move || lock(&locking)).await;
    let _held = held.map_err(|error| MountError::Task(error.to_string()))??;
    let (parts, renewal) = prepare(&options, &dir).await?;
    let session = tokio::select! {
        session = Session::begin(parts) => Arc::new(session?),
        () = shutdown.cancelled() => return Ok(()),
    };
    let mounted = mount(&options, mountpoint, &session).await;
    let handle = match mounted {
        Ok(handle) => handle,
        Err(error) => {
            let _ = session
                .end(Instant::now() + Duration::from_secs(1), &|_| {})
                .await;
            return Err(error);
        }
    };
    let stop = shutdown.child_token();
    let renewing = CancellationToken::new();
    let _renewed_to_the_end = renewing.clone().drop_guard();
    tokio::spawn(renewal.run(|_| {}, renewing));
    let served = serve_control(&dir, &session, &handle, &stop);
    if let Err(error) = served {
        finish(&options, &session, &handle, true).await?;
        return Err(error);
    }
    let _ = ready.send(Mounted {
        mountpoint: handle.mount_point().to_owned(),
        control_socket: dir.control_socket(),
        epoch: session.epoch(),
        set_aside: session.recovery.set_aside.clone(),
    });
    let unmount = tokio::select! {
        () = stop.cancelled() => true,
        () = handle.ended() => false,
    };
    let outcome = finish(&options, &session, &handle, unmount).await;
    stop.cancel();
    let _ = std::fs::remove_file(dir.control_socket());
    outcome
}

/// Kit, context, volume and state directory, checked against each other.
async fn prepare(
    options: &MountOptions,
    dir: &StateDir,
) -> Result<(SessionParts, Renewal), MountError> {
    let kit = newest_kit(load_kit(options, dir)?, dir);
    let context = options.context.clone().unwrap_or_else(|| kit.context());
    let context = if kit.identity.supersedes(context.identity()) {
        context.with_identity(kit.identity.clone())
    } else {
        context
    };
    certificate::check(context.identity())?;
    let identity = LiveIdentity::from(context.identity());
    if context.cluster() != kit.cluster {
        return Err(MountError::Foreign {
            path: options.kit.clone().unwrap_or_else(|| dir.kit()),
            what: "cluster",
            found: kit.cluster.to_string(),
            wanted: context.cluster().to_string(),
        });
    }
    let known = ClientFile::load(dir)?;
    let client = match &known {
        Some(file) => file.client(&dir.client_file())?,
        None => ClientId::random(&mut rand::rng()),
    };
    let metad = MetadClient::new(context.endpoints().to_vec(), &identity, client)
        .map_err(MountError::metad("connect to metad"))?;
    let signer = Arc::new(metad.clone());
    let cluster: Arc<dyn Cluster> = Arc::new(metad);
    let volume = cluster
        .volume(&options.volume)
        .await
        .map_err(MountError::metad("look up the volume"))?;
    let client_file = match known {
        Some(file) => file,
        None => ClientFile::new(client, context.cluster(), volume.id, &volume.name),
    };
    client_file.check(dir, context.cluster(), volume.id)?;
    check_kit(&kit, &volume)?;
    client_file.save(dir)?;
    if options.kit.is_some() {
        kit.save(&dir.kit())?;
    }
    let tls = qsfs_proto::tls::client_config(&identity)
        .map_err(|error| MountError::Identity(error.to_string()))?;
    let home: Arc<dyn Home> = match &options.cluster_file {
        Some(file) => Arc::new(ClusterFile(file.clone())),
        None => Arc::new(KitCopy(dir.kit())),
    };
    let renewal = Renewal::new(identity, home, signer, certificate::ADVICE);
    let parts = SessionParts {
        cluster,
        connector: Arc::new(ZdbConnector { tls }),
        volume,
        key: kit.key,
        dir: dir.clone(),
        media: Arc::new(DiskMedia),
        client,
        client_file,
        takeover: options.takeover,
        read_only: options.read_only,
        cache_limit_bytes: options.cache_limit_bytes,
        founder: fuse::own_caller(),
    };
    Ok((parts, renewal))
}

/// With the certificate that an earlier mount may have renewed in the state directory's copy of the kit.
fn newest_kit(kit: RecoveryKit, dir: &StateDir) -> RecoveryKit {
    match RecoveryKit::load(&dir.kit()) {
        Ok(kept) if kept.identity.supersedes(&kit.identity) => RecoveryKit {
            identity: kept.identity,
            ..kit
        },
        _ => kit,
    }
}

fn load_kit(options: &MountOptions, dir: &StateDir) -> Result<RecoveryKit, MountError> {
    let path = options.kit.clone().unwrap_or_else(|| dir.kit());
    match RecoveryKit::load(&path) {
        Err(KitError::Io { reason, .. })
            if options.kit.is_none() && reason.kind() == std::io::ErrorKind::NotFound =>
        {
            Err(MountError::NoKey {
                volume: options.volume.to_string(),
                state_dir: dir.root().to_owned(),
            })
        }
        loaded => Ok(loaded?),
    }
}

fn check_kit(kit: &RecoveryKit, volume: &Volume) -> Result<(), MountError> {
    kit.verify(volume).map_err(|error| MountError::WrongKey {
        volume: volume.name.to_string(),
        reason: error.to_string(),
    })
}

async fn mount(
    options: &MountOptions,
    mountpoint: PathBuf,
    session: &Arc<Session>,
) -> Result<Arc<MountHandle>, MountError> {
    let fuse_options = fuse::MountOptions {
        mount_point: mountpoint,
        volume: options.volume.to_string(),
    };
    let filesystem = Arc::clone(&session.filesystem);
    let runtime = tokio::runtime::Handle::current();
    let mount = move || fuse::mount(&fuse_options, filesystem, runtime);
    let mounted = tokio::task::spawn_blocking(mount)
        .await
        .map_err(|error| MountError::Task(error.to_string()))?;
    Ok(Arc::new(mounted?))
}

fn serve_control(
    dir: &StateDir,
    session: &Arc<Session>,
    handle: &Arc<MountHandle>,
    stop: &CancellationToken,
) -> Result<(), MountError> {
    let path = dir.control_socket();
    let bind = |path: &Path| server::bind(path);
    let listener = bind(&path).map_err(|error| MountError::StateFile {
        step: "bind the control socket",
        path,
        reason: error.to_string(),
    })?;
    let requests = Requests {
        session: Arc::clone(session),
        handle: Arc::clone(handle),
        stop: stop.clone(),
    };
    tokio::spawn(server::serve(listener, Arc::new(requests), stop.clone()));
    Ok(())
}

/// Pushes, unmounts, pushes the rest, ends the session.
async fn finish(
    options: &MountOptions,
    session: &Arc<Session>,
    handle: &Arc<MountHandle>,
    unmount: bool,
) -> Result<(), MountError> {
    let deadline = Instant::now() + options.shutdown_timeout;
    let on_progress = options.on_progress.clone();
    let progress = move |step: Progress| {
        if let Some(tell) = &on_progress {
            tell(step);
        }
    };
    if unmount {
        // The bulk while it is still mounted: should this take long, files stay readable meanwhile.
        if let Err(error) = session.sync(deadline, true, &progress).await {
            tracing::warn!(%error, "not everything could be pushed before the unmount");
        }
        unmount_now(handle).await?;
    }
    if tokio::time::timeout(UNMOUNT_WAIT, handle.ended())
        .await
        .is_err()
    {
        tracing::warn!(mountpoint = %handle.mount_point().display(), "files are still open: the kernel has not let go of the mount");
    }
    let deadline = deadline.max(Instant::now() + Duration::from_secs(1));
    session.end(deadline, &progress).await
}

async fn unmount_now(handle: &Arc<MountHandle>) -> Result<(), MountError> {
    let handle = Arc::clone(handle);
    let unmount = move || match handle.unmount(false) {
        Err(fuse::MountError::Busy(path)) => {
            tracing::warn!(path = %path.display(), "the mount is in use: it vanishes from the tree now and ends with the last open file");
            handle.unmount(true)
        }
        outcome => outcome,
    };
    let done = tokio::task::spawn_blocking(unmount)
        .await
        .map_err(|error| MountError::Task(error.to_string()))?;
    Ok(done?)
}
