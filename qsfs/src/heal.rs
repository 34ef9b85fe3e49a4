//! `qsfs heal`: the campaign that returns every datafile to its policy.

use crate::session::Session;
use crate::table::{print, print_json};
use crate::units;
use clap::Subcommand;
use qsfs_proto::status::ResilverStatus;
use std::path::Path;

/// Verbs of `qsfs heal`.
#[derive(Debug, Subcommand)]
pub(crate) enum HealCommand {
    /// What is being healed, how fast, and what it waits for
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// Runs one.
pub(crate) async fn run(command: &HealCommand, cluster: Option<&Path>) -> anyhow::Result<()> {
    let HealCommand::Status { json } = command;
    let session = Session::open(cluster)?;
    let status = session.client().status().await?;
    if *json {
        return print_json("resilver", &status.resilver);
    }
    let below: u64 = status
        .volumes
        .iter()
        .map(|volume| volume.below_policy)
        .sum();
    print(&format!(
        "{}\ndatafiles below policy: {below}\n",
        line(&status.resilver)
    ))
}

/// Re-silver in one line.
pub(crate) fn line(resilver: &ResilverStatus) -> String {
    if resilver.pending_shards == 0 && resilver.running == 0 && resilver.waiting_for.is_none() {
        return "re-silver: nothing to do".to_owned();
    }
    let mut line = format!(
        "re-silver: {} shards to make, {} running, {}/s",
        resilver.pending_shards,
        resilver.running,
        units::bytes(resilver.bytes_per_s)
    );
    if let Some(eta) = resilver.eta_s {
        line.push_str(&format!(", about {} left", units::seconds(eta)));
    }
    if let Some(cause) = &resilver.waiting_for {
        line.push_str(&format!("; waits for {cause}"));
    }
    line
}
