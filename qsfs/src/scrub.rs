//! `qsfs scrub`: the tours that read and verify every piece.

use crate::session::Session;
use crate::table::{Table, print, print_json};
use clap::Subcommand;
use qsfs_proto::status::Status;
use qsfs_zstor::id::BackendId;
use serde_json::json;
use std::path::Path;

/// Verbs of `qsfs scrub`.
#[derive(Debug, Subcommand)]
pub(crate) enum ScrubCommand {
    /// Which tours run, when the last ones ended, what they found
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Begin a tour now
    Start {
        /// Only of this backend
        #[arg(long, value_name = "ID")]
        backend: Option<u64>,
    },
}

/// Runs one.
pub(crate) async fn run(command: &ScrubCommand, cluster: Option<&Path>) -> anyhow::Result<()> {
    let session = Session::open(cluster)?;
    match command {
        ScrubCommand::Start { backend } => {
            session.client().scrub(backend.map(BackendId)).await?;
            print("scrub begun; `qsfs scrub status` shows how far it is\n")
        }
        ScrubCommand::Status { json } => status(&session, *json).await,
    }
}

async fn status(session: &Session, as_json: bool) -> anyhow::Result<()> {
    let facts = session.client().backend_facts().await?;
    let status = session.client().status().await?;
    if as_json {
        return print_json("scrub", &json!({ "backends": facts, "rot": status.rot }));
    }
    let mut table = Table::new(&["BACKEND", "TOUR", "LAST TOUR ENDED", "FOUND"]);
    for fact in &facts {
        table.row(vec![
            fact.backend.to_string(),
            fact.scrub_percent
                .map_or_else(|| "none".to_owned(), |percent| format!("{percent} %")),
            last(&status, fact.backend),
            fact.scrub_found.to_string(),
        ]);
    }
    table.print()?;
    print(&(rot_line(&status) + "\n"))
}

fn last(status: &Status, id: BackendId) -> String {
    let backend = status.backends.iter().find(|backend| backend.id == id.0);
    backend
        .and_then(|backend| backend.last_scrub.clone())
        .unwrap_or_else(|| "never".to_owned())
}

/// What rot was found and mended, in one line.
pub(crate) fn rot_line(status: &Status) -> String {
    format!(
        "rot: {} found by reads, {} by scrub, {} repaired",
        status.rot.found_by_read, status.rot.found_by_scrub, status.rot.repaired
    )
}
