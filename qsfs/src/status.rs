//! `qsfs status`: the verdict first, then everything that belongs to it, on one screen.

use crate::backend::backends_table;
use crate::session::Session;
use crate::table::{print, print_value};
use crate::units;
use clap::Args;
use qsfs_proto::api::{Freshness, MetadError};
use qsfs_proto::status::{Finding, Status, StatusVerdict, VolumeStatus};
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

/// Between two pictures of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// `qsfs status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArguments {
    /// As JSON (the contract for scripts)
    #[arg(long)]
    json: bool,
    /// Again every second, until interrupted
    #[arg(long)]
    watch: bool,
}

/// Runs it.
pub(crate) async fn run(arguments: &StatusArguments, cluster: Option<&Path>) -> anyhow::Result<()> {
    let session = Session::open(cluster)?;
    loop {
        let Asked { status, stale } = ask(&session).await?;
        if arguments.json {
            print_value(&status)?;
        } else {
            if arguments.watch && std::io::stdout().is_terminal() {
                print("\x1b[2J\x1b[H")?;
            }
            print(&render(&status, stale))?;
        }
        if !arguments.watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

/// A status, and how fresh it is when there is no quorum behind it.
pub(crate) struct Asked {
    /// What was answered; without a quorum `NO_QUORUM` is among the findings.
    pub(crate) status: Status,
    /// One node's answer without a quorum.
    pub(crate) stale: Option<Freshness>,
}

/// The status; without a quorum what one node knows.
pub(crate) async fn ask(session: &Session) -> anyhow::Result<Asked> {
    let error = match session.client().status().await {
        Ok(status) => {
            return Ok(Asked {
                status,
                stale: None,
            });
        }
        Err(error @ MetadError::NoQuorum(_)) => error,
        Err(error) => return Err(error.into()),
    };
    let (client, observed) = session.client().stale().observed();
    let Ok(mut status) = client.status().await else {
        return Err(error.into());
    };
    let stale = observed.freshness();
    let finding = no_quorum(&status, stale.and_then(|fresh| fresh.age_ms), &error);
    status.findings.insert(0, finding);
    status.verdict = StatusVerdict::Critical;
    Ok(Asked { status, stale })
}

fn no_quorum(status: &Status, age_ms: Option<u64>, error: &MetadError) -> Finding {
    let age = match age_ms {
        Some(age_ms) => format!(
            "it was up to date {} ago",
            units::seconds(age_ms.div_ceil(1_000))
        ),
        None => "it has not been up to date since it was started".into(),
    };
    Finding {
        name: "NO_QUORUM".into(),
        subject: "metad".into(),
        text: format!(
            "no majority of the {} voters answers ({error}); what follows is what one metad knows, and {age}",
            status.quorum.voters
        ),
        severity: StatusVerdict::Critical,
    }
}

fn render(status: &Status, stale: Option<Freshness>) -> String {
    let mut text = String::new();
    let mut line = |what: String| {
        text.push_str(&what);
        text.push('\n');
    };
    if let Some(fresh) = stale {
        line(format!(
            "NO QUORUM: this is what one metad node knows, {} (applied {})",
            match fresh.age_ms {
                Some(age_ms) => format!("at most {} old", units::seconds(age_ms.div_ceil(1_000))),
                None => "how old is unknown".into(),
            },
            fresh.applied
        ));
    }
    line(verdict(status));
    for finding in &status.findings {
        line(format!(
            "  {} {}: {}",
            finding.name, finding.subject, finding.text
        ));
    }
    for volume in &status.volumes {
        line(String::new());
        line(volume_lines(volume));
    }
    line(String::new());
    line(crate::heal::line(&status.resilver));
    line(crate::scrub::rot_line(status));
    let quorum = &status.quorum;
    line(format!(
        "quorum: {} of {} voters healthy, leader {}, term {}, applied {}",
        quorum.healthy, quorum.voters, quorum.leader, quorum.term, quorum.applied
    ));
    line(String::new());
    text.push_str(&backends_table(&status.backends).render());
    text
}

fn verdict(status: &Status) -> String {
    let word = match status.verdict {
        StatusVerdict::Ok => "ok",
        StatusVerdict::Warning => "WARNING",
        StatusVerdict::Critical => "CRITICAL",
    };
    match status.findings.len() {
        0 => format!("{word}: nothing to do"),
        1 => format!("{word}: 1 finding (`qsfs explain NAME` says more)"),
        many => format!("{word}: {many} findings (`qsfs explain NAME` says more)"),
    }
}

fn volume_lines(volume: &VolumeStatus) -> String {
    let mut text = format!(
        "volume {}: policy {}, {} in {} datafiles, head {}, epoch {}, writer {}",
        volume.name,
        volume.policy,
        units::bytes(volume.bytes),
        volume.datafiles,
        volume.head,
        volume.epoch,
        volume.writer.as_deref().unwrap_or("none")
    );
    let budget = &volume.loss_budget;
    let _ = write!(
        text,
        "\n  may still be lost: {} locations, {} nodes or {} backends\n  at risk: {}",
        budget.locations,
        budget.nodes,
        budget.backends,
        at_risk(volume)
    );
    if volume.below_policy > 0 || volume.unreadable > 0 {
        let _ = write!(
            text,
            "\n  below policy: {} datafiles, unreadable now: {}",
            volume.below_policy, volume.unreadable
        );
    }
    text
}

fn at_risk(volume: &VolumeStatus) -> String {
    if volume.at_risk_bytes == 0 {
        return "nothing".to_owned();
    }
    format!(
        "{}, the oldest for {}",
        units::bytes(volume.at_risk_bytes),
        units::seconds(volume.at_risk_age_s)
    )
}
