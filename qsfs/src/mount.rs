//! `qsfs mount`: a volume at a directory. In the background unless `--foreground`: then this binary is started again, and
//! we wait until it is mounted or has failed.

use crate::daemon::Started;
use crate::exit::Failure;
use crate::{session, signals};
use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use qsfs_agent::options::parse_size;
use qsfs_fuse_client::error::MountError;
use qsfs_fuse_client::fuse::check_mount_point;
use qsfs_fuse_client::kit::RecoveryKit;
use qsfs_fuse_client::run::{MountOptions, run as serve};
use qsfs_proto::api::MetadError;
use qsfs_proto::context::{Context, ContextError};
use qsfs_zstor::id::{ClientId, VolumeName};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tokio::sync::oneshot;

/// `qsfs mount`.
#[derive(Debug, Args)]
pub(crate) struct MountArguments {
    /// Volume
    volume: VolumeName,
    /// An empty directory
    dir: PathBuf,
    /// Recovery kit [default: the key in the state directory, or the kit of a volume created on this machine]
    #[arg(long, value_name = "FILE")]
    kit: Option<PathBuf>,
    /// Local store of this mount [default: below the state directory of the cluster file]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Become the writer although another client holds the volume
    #[arg(long)]
    takeover: bool,
    /// Mount option; may be repeated
    #[arg(short, value_name = "OPTION")]
    options: Vec<MountOption>,
    /// Local bytes above which committed datafiles are evicted
    #[arg(long, value_name = "SIZE", value_parser = size)]
    cache_limit: Option<u64>,
    /// Stay in the foreground
    #[arg(short, long)]
    foreground: bool,
    /// Tell the process that started us, on standard output, when it is mounted
    #[arg(long, hide = true)]
    report_start: bool,
}

/// What `-o` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MountOption {
    /// Read-only: follows the head
    Ro,
    /// Read and write (the default)
    Rw,
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

/// Runs it.
pub(crate) async fn run(arguments: MountArguments, cluster: Option<&Path>) -> anyhow::Result<()> {
    if arguments.foreground {
        let told = arguments.report_start;
        return match foreground(arguments, cluster).await {
            Err(error) if told => {
                Started::Failed {
                    code: crate::exit::code_of(&error),
                    error: format!("{error:#}"),
                }
                .tell();
                Err(error)
            }
            other => other,
        };
    }
    background(arguments, cluster).await
}

/// Options for the daemon's library: where the key, the context and the local store are.
fn options(arguments: &MountArguments, cluster: Option<&Path>) -> anyhow::Result<MountOptions> {
    let kit = arguments
        .kit
        .as_deref()
        .map(RecoveryKit::load)
        .transpose()?;
    let (context, cluster_file) = match (Context::locate(cluster), &kit) {
        (Ok(path), _) => (Context::load(&path)?, Some(std::path::absolute(path)?)),
        // A machine that has nothing but the kit: the kit knows the cluster.
        (Err(ContextError::NotFound(_)), Some(kit)) => (kit.context(), None),
        (Err(error), _) => return Err(error.into()),
    };
    let state_dir = match &arguments.state_dir {
        Some(dir) => std::path::absolute(dir)?,
        None => session::mount_state_dir(&session::state_dir(&context)?, &arguments.volume),
    };
    let kit = match &arguments.kit {
        Some(path) => Some(path.clone()),
        None => kept_kit(&context, arguments),
    };
    Ok(MountOptions {
        context: Some(context),
        cluster_file,
        kit,
        takeover: arguments.takeover,
        read_only: arguments.options.last() == Some(&MountOption::Ro),
        cache_limit_bytes: arguments.cache_limit,
        ..MountOptions::new(arguments.volume.clone(), &arguments.dir, state_dir)
    })
}

/// The kit that `volume create` kept on this machine, if it did.
fn kept_kit(context: &Context, arguments: &MountArguments) -> Option<PathBuf> {
    let state_dir = session::state_dir(context).ok()?;
    let path = session::kit_path(&state_dir, &arguments.volume);
    path.exists().then_some(path)
}

async fn foreground(arguments: MountArguments, cluster: Option<&Path>) -> anyhow::Result<()> {
    let options = options(&arguments, cluster)?;
    refuse_unknown(&options).await?;
    let said = format!(
        "{} is mounted at {}",
        arguments.volume,
        arguments.dir.display()
    );
    let (ready, is_ready) = oneshot::channel();
    let report = arguments.report_start;
    let teller = tokio::spawn(async move {
        if is_ready.await.is_ok() {
            if report {
                Started::Ready.tell();
            } else {
                tracing::info!("{said}");
            }
        }
    });
    let ended = serve(options, ready, signals::shutdown()?).await;
    let _ = teller.await;
    ended.map_err(failure)
}

/// A mistyped name is told as such, not as a missing key.
async fn refuse_unknown(options: &MountOptions) -> anyhow::Result<()> {
    let Some(context) = &options.context else {
        return Ok(());
    };
    if context.identity().expires_ms()? <= crate::units::now_ms() {
        // The mount may know a newer certificate, or says that this one has ended.
        return Ok(());
    }
    let client = context.client(ClientId::random(&mut rand::rng()))?;
    match client.volume(&options.volume).await {
        Err(error @ MetadError::NoSuchVolume(_)) => Err(error.into()),
        // Whatever else is wrong, the mount itself says it better.
        _ => Ok(()),
    }
}

fn failure(error: MountError) -> anyhow::Error {
    let code = error.exit_code();
    anyhow::Error::new(error).context_code(code)
}

/// Keeps the text of an error and gives it the exit code that its own crate chose.
trait WithCode {
    fn context_code(self, code: u8) -> anyhow::Error;
}

impl WithCode for anyhow::Error {
    fn context_code(self, code: u8) -> anyhow::Error {
        Failure::new(code, format!("{self:#}")).into()
    }
}

async fn background(arguments: MountArguments, cluster: Option<&Path>) -> anyhow::Result<()> {
    // What can be known at once is said at once, before anything is started.
    let options = options(&arguments, cluster)?;
    let mount_point = check_mount_point(&arguments.dir)?.path;
    std::fs::create_dir_all(&options.state_dir)
        .with_context(|| format!("making {}", options.state_dir.display()))?;
    let log_path = options.state_dir.join("mount.log");
    let mut log = File::options()
        .create(true)
        .append(true)
        .read(true)
        .open(&log_path)
        .with_context(|| format!("opening {}", log_path.display()))?;
    let log_start = log.seek(SeekFrom::End(0))?;
    let mut command = Command::new(std::env::current_exe()?);
    if let Some(file) = cluster {
        command.arg("--cluster").arg(file);
    }
    command
        .arg("mount")
        .arg(arguments.volume.as_str())
        .arg(&mount_point)
        .args(["--foreground", "--report-start", "--state-dir"])
        .arg(&options.state_dir);
    if let Some(kit) = &arguments.kit {
        command.arg("--kit").arg(kit);
    }
    if arguments.takeover {
        command.arg("--takeover");
    }
    if options.read_only {
        command.args(["-o", "ro"]);
    }
    if let Some(bytes) = arguments.cache_limit {
        command.args(["--cache-limit", &bytes.to_string()]);
    }
    use std::os::unix::process::CommandExt as _;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::from(log.try_clone()?))
        .process_group(0)
        .spawn()
        .context("starting the mount")?;
    let output = child.stdout.take().context("its output is piped")?;
    match tokio::task::spawn_blocking(move || Started::hear(output)).await? {
        Started::Ready => Ok(()),
        Started::Failed { code, error } => {
            let status = child.wait()?;
            if code == crate::exit::ERROR && !status.success() && error == Started::SILENT {
                let mut text = String::new();
                log.seek(SeekFrom::Start(log_start))?;
                log.read_to_string(&mut text)?;
                bail!(
                    "the mount ended with {status}; {}:\n{text}",
                    log_path.display()
                );
            }
            Err(Failure::new(code, error).into())
        }
    }
}

/// Something is mounted exactly there.
pub(crate) fn is_mounted(dir: &Path) -> bool {
    qsfs_fuse_client::fuse::is_mount_point(dir)
}
