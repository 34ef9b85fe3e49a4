//! `qsfs key`: recovery kits.

use crate::exit::{self, Failure};
use crate::session::{self, Session};
use crate::table::print;
use anyhow::{Context as _, bail};
use clap::Subcommand;
use qsfs_fuse_client::kit::RecoveryKit;
use qsfs_zstor::id::VolumeName;
use std::path::{Path, PathBuf};

/// Verbs of `qsfs key`.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Check that a recovery kit is whole and that it is the one of its volume
    VerifyKit {
        /// Recovery kit
        #[arg(long, value_name = "FILE")]
        kit: PathBuf,
    },
    /// Write another copy of the kit of a volume that was created on this machine
    ExportKit {
        /// Volume
        volume: VolumeName,
        /// Where to
        #[arg(long, value_name = "FILE")]
        kit: PathBuf,
    },
}

/// Runs one.
pub(crate) async fn run(command: &KeyCommand, cluster: Option<&Path>) -> anyhow::Result<()> {
    match command {
        KeyCommand::VerifyKit { kit } => verify(kit, cluster).await,
        KeyCommand::ExportKit { volume, kit } => {
            let session = Session::open(cluster)?;
            let kept = session::kit_path(&session.state_dir()?, volume);
            if kit.exists() {
                bail!("{} exists already", kit.display());
            }
            let found = RecoveryKit::load(&kept).with_context(|| {
                format!("volume {volume} was not created on this machine: no kit is kept here")
            })?;
            found.save(kit)?;
            print(&format!("recovery kit: {}\n", kit.display()))
        }
    }
}

/// With the kit's own identity: it proves that the kit suffices. Where its certificate has ended, with that of the cluster file.
async fn verify(path: &Path, cluster: Option<&Path>) -> anyhow::Result<()> {
    let kit = RecoveryKit::load(path)?;
    let ended = kit.identity.expires_ms()? <= crate::units::now_ms();
    let context = if ended {
        Session::open(cluster)
            .context(
                "the certificate in the kit has ended, and there is no cluster file to ask with",
            )?
            .context()
            .clone()
    } else {
        kit.context()
    };
    let client = context.client(qsfs_zstor::id::ClientId::random(&mut rand::rng()))?;
    let volume = client.volume_by_id(kit.volume_id).await?;
    if let Err(error) = kit.verify(&volume) {
        return Err(Failure::new(exit::WRONG_KEY, error.to_string()).into());
    }
    let note = if ended {
        "; its certificate has ended: to mount with it, `qsfs client join` first"
    } else {
        ""
    };
    print(&format!(
        "{} is a good kit of volume {}; the cluster knows both{note}\n",
        path.display(),
        volume.name
    ))
}
