//! `qsfs client`: makes this machine a client of a cluster.

use crate::table::print;
use crate::token::TokenArgument;
use anyhow::{Context as _, bail};
use clap::Subcommand;
use qsfs_proto::api::Role;
use qsfs_proto::context::Context;
use qsfs_proto::join::{Joiner, join};
use qsfs_proto::token::JoinToken;
use std::path::{Path, PathBuf};

/// Verbs of `qsfs client`.
#[derive(Debug, Subcommand)]
pub(crate) enum ClientCommand {
    /// Turn a client token into a cluster file for this machine
    Join {
        #[command(flatten)]
        token: TokenArgument,
        /// Name of this machine, for people
        #[arg(long)]
        name: Option<String>,
    },
}

/// Runs one.
pub(crate) async fn run(command: &ClientCommand, cluster: Option<&Path>) -> anyhow::Result<()> {
    let ClientCommand::Join { token, name } = command;
    let target = match cluster {
        Some(path) => path.to_owned(),
        None => user_context_path()?,
    };
    if target.exists() {
        bail!(
            "{} exists already; remove it or name another one with --cluster FILE",
            target.display()
        );
    }
    let token: JoinToken = token.read()?.parse()?;
    if token.role() != Role::Client {
        bail!(
            "this token lets a {} join, not a client; make one with `qsfs token create --role client`",
            token.role()
        );
    }
    let joiner = Joiner {
        role: Role::Client,
        name: name.clone().unwrap_or_else(host_name),
        location: String::new(),
        address: String::new(),
    };
    let (identity, grant) = join(&token, joiner).await?;
    Context::new(grant.endpoints, identity, None).save(&target)?;
    print(&format!("cluster file written to {}\n", target.display()))
}

/// `~/.config/qsfs/cluster.toml`.
pub(crate) fn user_context_path() -> anyhow::Result<PathBuf> {
    let config = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .filter(|dir| dir.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")))
        .context("HOME is not set: name the file with --cluster FILE")?;
    Ok(config.join("qsfs/cluster.toml"))
}

/// Name of this machine.
pub(crate) fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_else(|_| "client".to_owned())
}
