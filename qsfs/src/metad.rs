//! `qsfs metad`: the metadata service.

mod keep;
mod watch;

use crate::session::Session;
use crate::table::{Table, print, print_json};
use crate::token::TokenArgument;
use crate::{signals, units};
use anyhow::Context as _;
use clap::{Args, Subcommand};
use qsfs_metad::{BootstrapOptions, JoinOptions, NodeError, ServeOptions};
use qsfs_proto::api::ClusterSettings;
use qsfs_zstor::id::{LocationName, NodeName};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How the line with the context file begins, for whoever reads our output.
pub(crate) const CLUSTER_FILE_LABEL: &str = "cluster file: ";

/// Agent tokens that a bootstrap prints; `qsfs token create` makes more.
const AGENT_TOKENS: usize = 4;

/// Verbs of `qsfs metad`.
#[derive(Debug, Subcommand)]
pub(crate) enum MetadCommand {
    /// Begin a new cluster with this node, print join tokens, and serve
    Bootstrap {
        #[command(flatten)]
        node: NodeArguments,
        #[command(flatten)]
        settings: SettingArguments,
    },
    /// Join a cluster as a further metad node, and serve
    Join {
        #[command(flatten)]
        token: TokenArgument,
        #[command(flatten)]
        node: NodeArguments,
    },
    /// Serve again on the data of an earlier bootstrap or join
    Serve {
        /// Data directory
        #[arg(long)]
        data: PathBuf,
    },
    #[command(flatten)]
    Keep(keep::KeepCommand),
    /// List the metad nodes
    Members {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what changes, as it changes
    Watch(watch::WatchArguments),
    /// Show the cluster's settings, or change those that are given
    Settings {
        #[command(flatten)]
        settings: SettingArguments,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

impl MetadCommand {
    /// It runs until it is ended.
    pub(crate) fn is_daemon(&self) -> bool {
        matches!(
            self,
            Self::Bootstrap { .. } | Self::Join { .. } | Self::Serve { .. }
        )
    }
}

/// Who and where a node is.
#[derive(Debug, Args)]
pub(crate) struct NodeArguments {
    /// Name, unique in the cluster
    #[arg(long)]
    name: NodeName,
    /// Location
    #[arg(long)]
    location: LocationName,
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// How others reach it, where that differs
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Data directory
    #[arg(long)]
    data: PathBuf,
}

/// Settings of the cluster.
#[derive(Debug, Args)]
pub(crate) struct SettingArguments {
    /// Between heartbeats of an agent
    #[arg(long, value_parser = units::parse_duration)]
    heartbeat: Option<Duration>,
    /// Silence after which a backend is suspect [default: half of --down-after]
    #[arg(long, value_parser = units::parse_duration)]
    suspect_after: Option<Duration>,
    /// Silence after which a backend is down
    #[arg(long, value_parser = units::parse_duration)]
    down_after: Option<Duration>,
    /// Down for so long, a backend is lost and its shards are rebuilt elsewhere
    #[arg(long, value_parser = units::parse_duration)]
    lost_after: Option<Duration>,
    /// Between scrub tours of a backend
    #[arg(long, value_parser = units::parse_duration)]
    scrub_interval: Option<Duration>,
    /// How long pieces of released datafiles are kept
    #[arg(long, value_parser = units::parse_duration)]
    tombstone_grace: Option<Duration>,
    /// Life of a writer's lease without renewal
    #[arg(long, value_parser = units::parse_duration)]
    lease_ttl: Option<Duration>,
    /// Rebuilds that may run at once
    #[arg(long)]
    rebuilds: Option<u32>,
    /// How long certificates live that are made from now on; each is renewed by itself at two thirds
    #[arg(long, value_parser = units::parse_duration)]
    certificate_life: Option<Duration>,
}

impl SettingArguments {
    fn over(&self, old: ClusterSettings) -> ClusterSettings {
        let ms = |new: Option<Duration>, old: u64| new.map_or(old, units::millis);
        let half_down = self.down_after.map(|down| down / 2);
        ClusterSettings {
            heartbeat_ms: ms(self.heartbeat, old.heartbeat_ms),
            suspect_after_ms: ms(self.suspect_after.or(half_down), old.suspect_after_ms),
            down_after_ms: ms(self.down_after, old.down_after_ms),
            lost_after_ms: ms(self.lost_after, old.lost_after_ms),
            scrub_interval_ms: ms(self.scrub_interval, old.scrub_interval_ms),
            tombstone_grace_ms: ms(self.tombstone_grace, old.tombstone_grace_ms),
            lease_ttl_ms: ms(self.lease_ttl, old.lease_ttl_ms),
            rebuilds_max: self.rebuilds.unwrap_or(old.rebuilds_max),
            ..old
        }
    }
}

/// Runs one.
pub(crate) async fn run(command: MetadCommand, cluster: Option<&Path>) -> anyhow::Result<()> {
    match command {
        MetadCommand::Bootstrap { node, settings } => bootstrap(node, &settings, cluster).await,
        MetadCommand::Join { token, node } => {
            let data = node.data.clone();
            qsfs_metad::join(JoinOptions {
                token: token.read()?,
                name: node.name,
                location: node.location,
                listen: node.listen.to_string(),
                advertise: node.advertise,
                data: node.data,
            })
            .await?;
            serve(data).await
        }
        MetadCommand::Serve { data } => serve(data).await,
        MetadCommand::Keep(command) => keep::run(command, cluster).await,
        MetadCommand::Members { json } => members(&Session::open(cluster)?, json).await,
        MetadCommand::Watch(arguments) => watch::run(&Session::open(cluster)?, &arguments).await,
        MetadCommand::Settings { settings, json } => {
            show_settings(&Session::open(cluster)?, &settings, json).await
        }
    }
}

async fn serve(data: PathBuf) -> anyhow::Result<()> {
    let shutdown = signals::shutdown()?;
    let options = ServeOptions { data: data.clone() };
    let ended = qsfs_metad::serve(options, shutdown.clone()).await;
    match ended {
        Err(NodeError::Full { .. } | NodeError::Rotten { .. }) if !shutdown.is_cancelled() => {
            Err(begin_anew(&data))
        }
        ended => Ok(ended?),
    }
}

/// This program once more in place of this process, which keeps nothing but its number, its standard streams and its environment.
/// Returns only if that fails.
fn begin_anew(data: &Path) -> anyhow::Error {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return anyhow::Error::new(error).context("finding this program"),
    };
    let mut command = std::process::Command::new(program);
    let arguments: Vec<String> = std::env::args().collect();
    let level = arguments
        .iter()
        .position(|argument| argument == "--log-level");
    command.args(
        level
            .and_then(|at| arguments.get(at..at + 2))
            .unwrap_or_default(),
    );
    command.args(
        arguments
            .iter()
            .filter(|argument| argument.starts_with("--log-level=")),
    );
    command.args(["metad", "serve", "--data"]).arg(data);
    anyhow::Error::new(command.exec()).context("starting this metad again")
}

async fn bootstrap(
    node: NodeArguments,
    settings: &SettingArguments,
    cluster: Option<&Path>,
) -> anyhow::Result<()> {
    let data = node.data.clone();
    let file = cluster.map_or_else(|| data.join("cluster.toml"), Path::to_owned);
    if file.exists() {
        anyhow::bail!(
            "{} exists already: it belongs to a cluster; name another one with --cluster FILE",
            file.display()
        );
    }
    let done = qsfs_metad::bootstrap(BootstrapOptions {
        name: node.name,
        location: node.location,
        listen: node.listen.to_string(),
        advertise: node.advertise,
        data: node.data,
        settings: settings.over(ClusterSettings::default()),
        certificate_life: settings.certificate_life,
        agent_tokens: AGENT_TOKENS,
    })
    .await?;
    for warning in &done.warnings {
        tracing::warn!("{warning}");
    }
    done.context.save(&file)?;
    let mut text = String::from("join tokens, each good for one use:\n");
    for token in &done.tokens {
        text.push_str(&format!("{} {token}\n", token.role()));
    }
    if let Ok(own) = crate::client::user_context_path()
        && !own.exists()
        && cluster.is_none()
    {
        done.context
            .save(&own)
            .context("writing your own cluster file")?;
        text.push_str(&format!("your own cluster file: {}\n", own.display()));
    }
    text.push_str(&format!("{CLUSTER_FILE_LABEL}{}\n", file.display()));
    print(&text)?;
    serve(data).await
}

async fn members(session: &Session, json: bool) -> anyhow::Result<()> {
    let members = session.members().await?;
    if json {
        return print_json("members", &members);
    }
    let mut table = Table::new(&["ID", "NAME", "LOCATION", "ADDRESS", "ROLE", "STATE"]);
    for member in members {
        let role = match (member.leader, member.voter) {
            (true, _) => "leader",
            (_, true) => "voter",
            _ => "learner",
        };
        table.row(vec![
            member.id.to_string(),
            member.name.to_string(),
            member.location.to_string(),
            member.address,
            role.to_owned(),
            if member.healthy { "up" } else { "silent" }.to_owned(),
        ]);
    }
    table.print()
}

async fn show_settings(
    session: &Session,
    arguments: &SettingArguments,
    json: bool,
) -> anyhow::Result<()> {
    let old = session.client().settings().await?;
    let settings = arguments.over(old.clone());
    if settings != old {
        let change = qsfs_proto::api::Mutation::SetSettings(settings.clone());
        session.apply(change).await?;
    }
    if let Some(life) = arguments.certificate_life {
        let life_ms = units::millis(life);
        let change = qsfs_proto::api::Mutation::SetCertificateLife { life_ms };
        session.apply(change).await?;
    }
    let mut shown = serde_json::to_value(&settings)?;
    shown["certificate_life_ms"] = session.client().certificate_life_ms().await?.into();
    if json {
        return print_json("settings", &shown);
    }
    let mut table = Table::new(&["SETTING", "VALUE"]);
    if let serde_json::Value::Object(fields) = shown {
        for (name, value) in fields {
            table.row(vec![name, value.to_string()]);
        }
    }
    table.print()
}
