//! `qsfs certificate`: who this machine is to the cluster, until when, and a new certificate by hand. Daemons and commands renew
//! theirs by themselves.

use crate::table::{Table, print, print_json};
use crate::units;
use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use qsfs_proto::api::Role;
use qsfs_proto::context::Context;
use qsfs_proto::identity::Identity;
use qsfs_proto::join::{Joiner, join};
use qsfs_proto::renewal;
use qsfs_proto::token::JoinToken;
use qsfs_zstor::id::ClientId;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Directory of the certificate in the data directory of a metad or an agent.
const IDENTITY_DIR: &str = "identity";

/// What a person does about a cluster file whose certificate has ended.
pub(crate) const ADVICE: &str = "for a client make a token (`qsfs token create --role client`) and run `qsfs certificate renew --token-file FILE`; \
                                 for the admin run `qsfs certificate renew --authority DATA` on the machine of a metad";

/// Verbs of `qsfs certificate`.
#[derive(Debug, Subcommand)]
pub(crate) enum CertificateCommand {
    /// Whose certificate it is and until when it is good
    Show {
        #[command(flatten)]
        of: WhoseArguments,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Get a new one now; a daemon that runs takes it into use by itself
    Renew {
        #[command(flatten)]
        of: WhoseArguments,
        /// File with a join token of the same role, for a certificate that has ended; - is standard input
        #[arg(long, value_name = "FILE")]
        token_file: Option<PathBuf>,
        /// Have it signed by the metad whose data directory is on this machine, running or not
        #[arg(long, value_name = "DATA", conflicts_with_all = ["token_file", "data"])]
        authority: Option<PathBuf>,
    },
}

/// Whose certificate.
#[derive(Debug, Args)]
pub(crate) struct WhoseArguments {
    /// Data directory of a metad or an agent [default: the cluster file]
    #[arg(long)]
    data: Option<PathBuf>,
}

/// Runs one.
pub(crate) async fn run(
    command: &CertificateCommand,
    cluster: Option<&Path>,
) -> anyhow::Result<()> {
    match command {
        CertificateCommand::Show { of, json } => show(&load(of, cluster)?, *json),
        CertificateCommand::Renew {
            of,
            token_file,
            authority,
        } => {
            let token = token_file.as_deref().map(crate::token::read_file);
            let token = token.transpose()?;
            let renewed = match &of.data {
                Some(data) => of_daemon(data, token.as_deref()).await?,
                None => of_file(cluster, token.as_deref(), authority.as_deref()).await?,
            };
            print(&format!(
                "new certificate of {} {}, good until {}\n",
                renewed.role(),
                renewed.subject(),
                until(&renewed)?
            ))
        }
    }
}

fn load(of: &WhoseArguments, cluster: Option<&Path>) -> anyhow::Result<Identity> {
    match &of.data {
        Some(data) => Ok(Identity::load(&data.join(IDENTITY_DIR))?),
        None => Ok(Context::find(cluster)?.identity().clone()),
    }
}

fn until(identity: &Identity) -> anyhow::Result<String> {
    Ok(units::until(identity.expires_ms()?))
}

fn show(identity: &Identity, as_json: bool) -> anyhow::Result<()> {
    let validity = identity.validity()?;
    if as_json {
        let value = json!({
            "cluster": identity.cluster(), "role": identity.role(), "subject": identity.subject(),
            "expires_ms": validity.ends_ms, "life_ms": validity.life_ms(),
            "ended": validity.ends_ms <= units::now_ms(),
        });
        return print_json("certificate", &value);
    }
    let mut table = Table::new(&["ROLE", "SUBJECT", "EXPIRES", "MADE FOR"]);
    table.row(vec![
        identity.role().to_string(),
        identity.subject().to_owned(),
        until(identity)?,
        units::seconds(validity.life_ms() / 1_000),
    ]);
    table.print()
}

async fn of_daemon(data: &Path, token: Option<&str>) -> anyhow::Result<Identity> {
    let identity = Identity::load(&data.join(IDENTITY_DIR))
        .with_context(|| format!("{} holds no metad and no agent", data.display()))?;
    match identity.role() {
        Role::Metad if token.is_some() => bail!("a metad needs no token: it holds the authority"),
        Role::Metad => Ok(qsfs_metad::renew_certificate(data)?),
        Role::Agent => Ok(qsfs_agent::renew_certificate(data, token).await?),
        role => bail!(
            "{} is of a {role}, not of a metad or an agent",
            data.display()
        ),
    }
}

async fn of_file(
    cluster: Option<&Path>,
    token: Option<&str>,
    authority: Option<&Path>,
) -> anyhow::Result<Identity> {
    let path = Context::locate(cluster)?;
    let context = Context::load(&path)?;
    let current = context.identity();
    let renewed = match (token, authority) {
        (Some(token), _) => by_token(&context, token).await?,
        (None, Some(data)) => qsfs_metad::authority(data)?.renew(current)?,
        (None, None) => {
            current.check_not_ended(units::now_ms(), ADVICE)?;
            let client = context.client(ClientId::random(&mut rand::rng()))?;
            renewal::request(&client, current).await?
        }
    };
    let kept = Context::update(&path, |context| context.with_identity(renewed))?;
    Ok(kept.identity().clone())
}

async fn by_token(context: &Context, token: &str) -> anyhow::Result<Identity> {
    let token: JoinToken = token.parse()?;
    let current = context.identity();
    if token.role() != current.role() || token.cluster() != current.cluster() {
        bail!(
            "the token is for a {} of cluster {}, the cluster file is of a {} of cluster {}",
            token.role(),
            token.cluster(),
            current.role(),
            current.cluster()
        );
    }
    let joiner = Joiner {
        role: token.role(),
        name: crate::client::host_name(),
        location: String::new(),
        address: String::new(),
    };
    Ok(join(&token, joiner).await?.0)
}
