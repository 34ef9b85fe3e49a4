//! `qsfs metad backup | verify | restore | recover | inspect | remove`: before and after a disaster.

use crate::session::Session;
use crate::table::{Table, print};
use anyhow::Context as _;
use clap::{Args, Subcommand};
use qsfs_metad::backup::{self, BackupFacts};
use qsfs_metad::{RecoverOptions, Recovery, RestoreOptions, Restored};
use qsfs_proto::api::VotersLeft;
use qsfs_zstor::id::NodeName;
use std::path::{Path, PathBuf};

/// Verbs for keeping and getting back what metad remembers.
#[derive(Debug, Subcommand)]
pub(crate) enum KeepCommand {
    /// Take a node out of the cluster for good
    Remove {
        /// Its name
        name: NodeName,
        /// Do it
        #[arg(long)]
        apply: bool,
    },
    /// Have the node that runs here write a backup, and copy it
    Backup {
        /// Data directory of the running node
        #[arg(long)]
        data: PathBuf,
        /// File to write; the authority's key goes beside it. Keep both away from this machine
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
    /// Read a whole backup and say what it holds
    Verify {
        /// Backup
        file: PathBuf,
    },
    /// Begin the cluster again with one node, from a backup
    Restore(RestoreArguments),
    /// Begin the cluster again with this node, the survivor of a lost majority
    Recover {
        /// Data directory of the stopped survivor
        #[arg(long)]
        data: PathBuf,
        /// Do it
        #[arg(long)]
        apply: bool,
    },
    /// Show what a stopped node's directory holds
    Inspect {
        /// Data directory
        #[arg(long)]
        data: PathBuf,
    },
}

/// Which backup, and what the node is to be.
#[derive(Debug, Args)]
pub(crate) struct RestoreArguments {
    /// Backup; FILE.ca-key.pem is beside it
    file: PathBuf,
    #[command(flatten)]
    node: super::NodeArguments,
    /// Do it
    #[arg(long)]
    apply: bool,
}

/// Runs one.
pub(crate) async fn run(command: KeepCommand, cluster: Option<&Path>) -> anyhow::Result<()> {
    match command {
        KeepCommand::Remove { name, apply } => remove(&Session::open(cluster)?, &name, apply).await,
        KeepCommand::Backup { data, to } => {
            let facts = backup::take(&data, &to).await?;
            let key = backup::key_path(&to);
            print(&format!(
                "{}the key of the cluster's authority: {}\nkeep both files away from this machine, and readable by nobody else\n",
                described(&facts),
                key.display()
            ))
        }
        KeepCommand::Verify { file } => print(&described(&backup::verify(&file)?)),
        KeepCommand::Restore(arguments) => restore(arguments, cluster).await,
        KeepCommand::Recover { data, apply } => recover(data, apply, cluster).await,
        KeepCommand::Inspect { data } => {
            let mut table = Table::new(&["WHAT", "FOUND"]);
            for (what, found) in qsfs_metad::inspect::inspect(&data)? {
                table.row(vec![what, found]);
            }
            table.print()
        }
    }
}

fn described(facts: &BackupFacts) -> String {
    format!(
        "{}: whole. cluster {}, up to entry {} of term {}, {} rows, {} volumes, {} encoding records\n",
        facts.path.display(),
        facts.cluster,
        facts.applied,
        facts.term,
        facts.rows,
        facts.volumes,
        facts.records
    )
}

async fn remove(session: &Session, name: &NodeName, apply: bool) -> anyhow::Result<()> {
    let members = session.members().await?;
    let member = members
        .iter()
        .find(|member| member.name == *name)
        .with_context(|| format!("no metad is named {name}; see `qsfs metad members`"))?;
    let left = VotersLeft::without(&members, member.id);
    if !apply {
        return print(&format!(
            "would take metad {name} at {} out for good: {} voters are left, {} of them answer\n{}",
            member.location,
            left.voters,
            left.answering,
            removal_advice(left)
        ));
    }
    session.client().remove_member(member.id).await?;
    print(&format!(
        "metad {name} is out; another one joins with `qsfs token create --role metad` and `qsfs metad join`\n"
    ))
}

fn removal_advice(left: VotersLeft) -> String {
    let silent = left.voters - left.answering;
    if !left.have_quorum() {
        return format!(
            "WARNING: they could agree on nothing any more ({} must answer), so this is refused; first start those that do not answer, or remove them\n",
            left.majority()
        );
    }
    let warning = if left.spare() == 0 && silent > 0 {
        format!(
            "WARNING: {silent} of them do not answer; when one more fails, nothing can be committed\n"
        )
    } else {
        String::new()
    };
    format!("{warning}do it with --apply\n")
}

/// What is lost is the same for both: whatever came after.
fn loss(applied: u64) -> String {
    format!(
        "whatever the cluster agreed on after entry {applied} is lost: commits of datafiles since then (their data is unreachable until \
         the clients that still have it push it again), leases, tokens, settings\n\
         the other nodes of the old cluster must never run again: their data directories are of no use to the new one\n"
    )
}

async fn restore(arguments: RestoreArguments, cluster: Option<&Path>) -> anyhow::Result<()> {
    let facts = backup::verify(&arguments.file)?;
    print(&format!("{}{}", described(&facts), loss(facts.applied)))?;
    if !arguments.apply {
        return print("nothing was changed; do it with --apply\n");
    }
    let node = arguments.node;
    let data = node.data.clone();
    let restored = qsfs_metad::restore(RestoreOptions {
        backup: arguments.file,
        name: node.name,
        location: node.location,
        listen: node.listen.to_string(),
        advertise: node.advertise,
        data: node.data,
    })
    .await?;
    begun(&restored, &data, cluster)
}

async fn recover(data: PathBuf, apply: bool, cluster: Option<&Path>) -> anyhow::Result<()> {
    let options = RecoverOptions {
        data: data.clone(),
        apply,
    };
    match qsfs_metad::recover(options).await? {
        Recovery::Plan {
            name,
            applied,
            term,
        } => print(&format!(
            "{name} holds everything up to entry {applied} of term {term}\n{}nothing was changed; do it with --apply\n",
            loss(applied)
        )),
        Recovery::Done(restored) => begun(&restored, &data, cluster),
    }
}

fn begun(restored: &Restored, data: &Path, cluster: Option<&Path>) -> anyhow::Result<()> {
    let file = cluster.map_or_else(|| data.join("cluster.toml"), Path::to_owned);
    restored.context.save(&file)?;
    let mut text = String::from("join tokens for the other metads, each good for one use:\n");
    for token in &restored.tokens {
        text.push_str(&format!("{} {token}\n", token.role()));
    }
    text.push_str(&format!(
        "start it: qsfs metad serve --data {}\ncluster file: {}\n",
        data.display(),
        file.display()
    ));
    print(&text)
}
