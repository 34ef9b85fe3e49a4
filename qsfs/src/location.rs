//! `qsfs location`: what can vanish whole.

use crate::session::Session;
use crate::table::{Table, print_json};
use crate::units;
use clap::Subcommand;
use qsfs_proto::status::Status;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Verbs of `qsfs location`.
#[derive(Debug, Subcommand)]
pub(crate) enum LocationCommand {
    /// List all
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Default, Serialize)]
struct Row {
    name: String,
    nodes: usize,
    backends: usize,
    backends_up: usize,
    used_bytes: u64,
    capacity_bytes: u64,
    shards: u64,
}

/// Runs one.
pub(crate) async fn run(command: &LocationCommand, cluster: Option<&Path>) -> anyhow::Result<()> {
    let LocationCommand::List { json } = command;
    let session = Session::open(cluster)?;
    let rows = sum(&session.client().status().await?);
    if *json {
        return print_json("locations", &rows);
    }
    let mut table = Table::new(&[
        "LOCATION",
        "NODES",
        "BACKENDS UP",
        "USED",
        "CAPACITY",
        "SHARDS",
    ]);
    for row in rows {
        table.row(vec![
            row.name,
            row.nodes.to_string(),
            format!("{} of {}", row.backends_up, row.backends),
            units::bytes(row.used_bytes),
            units::bytes(row.capacity_bytes),
            row.shards.to_string(),
        ]);
    }
    table.print()
}

fn sum(status: &Status) -> Vec<Row> {
    let mut locations = BTreeMap::<&str, (Row, Vec<&str>)>::new();
    for backend in status.backends.iter().filter(|b| b.state != "retired") {
        let (row, nodes) = locations.entry(&backend.location).or_default();
        row.backends += 1;
        row.backends_up += usize::from(backend.state == "up");
        row.used_bytes += backend.used_bytes;
        row.capacity_bytes += backend.capacity_bytes;
        row.shards += backend.shards;
        nodes.push(&backend.node);
    }
    locations
        .into_iter()
        .map(|(name, (mut row, mut nodes))| {
            nodes.sort_unstable();
            nodes.dedup();
            row.name = name.to_owned();
            row.nodes = nodes.len();
            row
        })
        .collect()
}
