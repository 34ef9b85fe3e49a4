//! `qsfs backend`: the places where shards are.

use crate::exit::{self, Failure};
use crate::session::Session;
use crate::table::{Table, print, print_json};
use crate::units;
use clap::Subcommand;
use qsfs_proto::api::{Intent, Mutation};
use qsfs_proto::status::{BackendStatus, Status};
use qsfs_zstor::id::BackendId;
use std::path::Path;
use std::time::Duration;

/// Verbs of `qsfs backend`.
#[derive(Debug, Subcommand)]
pub(crate) enum BackendCommand {
    /// List all
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Move everything off a backend; refused if the others could not meet the policies
    Drain {
        /// As listed
        id: u64,
        /// Do it; without, only say what would happen
        #[arg(long)]
        apply: bool,
        /// Wait until it is empty, at most so long
        #[arg(long, value_name = "DURATION", value_parser = units::parse_duration)]
        wait: Option<Duration>,
    },
    /// Forget a backend that is empty or lost
    Retire {
        /// As listed
        id: u64,
        /// Do it; without, only say what would happen
        #[arg(long)]
        apply: bool,
    },
}

/// Runs one.
pub(crate) async fn run(command: &BackendCommand, cluster: Option<&Path>) -> anyhow::Result<()> {
    let session = Session::open(cluster)?;
    match command {
        BackendCommand::List { json } => list(&session, *json).await,
        BackendCommand::Drain { id, apply, wait } => drain(&session, *id, *apply, *wait).await,
        BackendCommand::Retire { id, apply } => retire(&session, *id, *apply).await,
    }
}

async fn list(session: &Session, json: bool) -> anyhow::Result<()> {
    let status = session.client().status().await?;
    if json {
        return print_json("backends", &status.backends);
    }
    backends_table(&status.backends).print()
}

/// The table that `backend list` and `status` show.
pub(crate) fn backends_table(backends: &[BackendStatus]) -> Table {
    let mut table = Table::new(&[
        "ID",
        "LOCATION",
        "NODE",
        "STATE",
        "USED",
        "CAPACITY",
        "SHARDS",
        "LAST SCRUB",
    ]);
    for backend in backends {
        table.row(vec![
            backend.id.to_string(),
            backend.location.clone(),
            backend.node.clone(),
            backend.state.clone(),
            units::bytes(backend.used_bytes),
            units::bytes(backend.capacity_bytes),
            backend.shards.to_string(),
            backend
                .last_scrub
                .clone()
                .unwrap_or_else(|| "never".to_owned()),
        ]);
    }
    table
}

fn find(status: &Status, id: u64) -> anyhow::Result<&BackendStatus> {
    let found = status.backends.iter().find(|backend| backend.id == id);
    found.ok_or_else(|| anyhow::anyhow!("no backend {id}; `qsfs backend list` lists them"))
}

async fn drain(
    session: &Session,
    id: u64,
    apply: bool,
    wait: Option<Duration>,
) -> anyhow::Result<()> {
    let status = session.client().status().await?;
    let backend = find(&status, id)?;
    let (shards, used) = (backend.shards, units::bytes(backend.used_bytes));
    if !apply {
        return print(&format!(
            "would move {shards} shards ({used}) off backend {id} at {}/{}; do it with --apply\n",
            backend.location, backend.node
        ));
    }
    session.apply(intent(id, Intent::Drain)).await?;
    let Some(patience) = wait else {
        return print(&format!("draining backend {id}: {shards} shards to move\n"));
    };
    wait_empty(session, id, shards, patience).await
}

async fn wait_empty(
    session: &Session,
    id: u64,
    shards: u64,
    patience: Duration,
) -> anyhow::Result<()> {
    let bar = crate::progress::spinner("draining");
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let status = session.client().status().await?;
        let left = find(&status, id)?.shards;
        bar.set_message(format!("draining: {left} of {shards} shards left"));
        if left == 0 {
            bar.finish_and_clear();
            return print(&format!(
                "backend {id} is empty; `qsfs backend retire {id} --apply` forgets it\n"
            ));
        }
        if tokio::time::Instant::now() >= deadline {
            bar.finish_and_clear();
            let text = format!("backend {id} still holds {left} shards; draining goes on");
            return Err(Failure::new(exit::FINDINGS, text).into());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn retire(session: &Session, id: u64, apply: bool) -> anyhow::Result<()> {
    let status = session.client().status().await?;
    let backend = find(&status, id)?;
    if backend.shards > 0 && backend.state != "lost" {
        anyhow::bail!(
            "backend {id} still holds {} shards; `qsfs backend drain {id} --apply` moves them off first",
            backend.shards
        );
    }
    if !apply {
        return print(&format!(
            "would forget backend {id} ({}); do it with --apply\n",
            backend.state
        ));
    }
    session.apply(intent(id, Intent::Retire)).await?;
    print(&format!("backend {id} is retired\n"))
}

fn intent(id: u64, intent: Intent) -> Mutation {
    Mutation::SetBackendIntent {
        backend: BackendId(id),
        intent,
    }
}
