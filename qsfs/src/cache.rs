//! `qsfs cache`: what of a volume is on this machine.

use crate::table::{print, print_json};
use crate::umount::refusal;
use crate::units;
use anyhow::bail;
use clap::Subcommand;
use qsfs_fuse_client::control::{Answer, Client, Request};
use std::path::PathBuf;

/// Verbs of `qsfs cache`.
#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// How much is local, how much of it must stay
    Status {
        /// A directory of the mount
        #[arg(default_value = ".")]
        dir: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Drop local datafiles that are committed, and the kernel's pages
    Evict {
        /// A directory of the mount
        dir: PathBuf,
        /// Everything that may go
        #[arg(long)]
        all: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// Runs one.
pub(crate) async fn run(command: &CacheCommand) -> anyhow::Result<()> {
    match command {
        CacheCommand::Status { dir, json } => {
            let client = Client::find(dir).map_err(refusal)?;
            let answer = client.ask(&Request::CacheStatus, |_| {}).await;
            match answer.map_err(refusal)? {
                Answer::CacheStatus(status) if *json => print_json("cache", &status),
                Answer::CacheStatus(status) => print(&fields(&serde_json::to_value(&status)?)),
                _ => bail!("the mount answered another question"),
            }
        }
        CacheCommand::Evict { all: false, .. } => {
            bail!("only --all is known: drop everything that may go")
        }
        CacheCommand::Evict { dir, json, .. } => {
            let client = Client::find(dir).map_err(refusal)?;
            let answer = client.ask(&Request::Evict, |_| {}).await;
            match answer.map_err(refusal)? {
                Answer::Evicted(evicted) if *json => print_json("evicted", &evicted),
                Answer::Evicted(evicted) => print(&fields(&serde_json::to_value(&evicted)?)),
                _ => bail!("the mount answered another question"),
            }
        }
    }
}

/// One line per field; bytes as people read them.
fn fields(value: &serde_json::Value) -> String {
    let mut text = String::new();
    for (name, value) in value.as_object().into_iter().flatten() {
        let shown = match (name.ends_with("bytes"), value.as_u64()) {
            (true, Some(count)) => units::bytes(count),
            _ => value.to_string(),
        };
        text.push_str(&format!("{}: {shown}\n", name.replace('_', " ")));
    }
    text
}
