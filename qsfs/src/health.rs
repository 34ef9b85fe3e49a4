//! `qsfs health`: the verdict as an exit code, for monitoring.

use crate::session::Session;
use crate::status::{Asked, ask};
use crate::table::print;
use qsfs_proto::status::StatusVerdict;
use std::path::Path;

const OK: u8 = 0;
const WARNING: u8 = 1;
const CRITICAL: u8 = 2;
const UNKNOWN: u8 = 3;

/// Prints one line and answers the exit code.
pub(crate) async fn run(cluster: Option<&Path>) -> anyhow::Result<u8> {
    let asked = match Session::open(cluster) {
        Ok(session) => ask(&session).await,
        Err(error) => Err(error),
    };
    let Asked { status, stale } = match asked {
        Ok(answer) => answer,
        Err(error) => {
            print(&format!("unknown: {error:#}\n"))?;
            return Ok(UNKNOWN);
        }
    };
    let names: Vec<String> = status
        .findings
        .iter()
        .map(|finding| format!("{} {}", finding.name, finding.subject))
        .collect();
    let (word, code) = match status.verdict {
        _ if stale.is_some() => ("critical: no quorum", CRITICAL),
        StatusVerdict::Ok => ("ok", OK),
        StatusVerdict::Warning => ("warning", WARNING),
        StatusVerdict::Critical => ("critical", CRITICAL),
    };
    let separator = if names.is_empty() { "" } else { ": " };
    print(&format!("{word}{separator}{}\n", names.join(", ")))?;
    Ok(code)
}
