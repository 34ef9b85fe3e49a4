//! The command tree.

use crate::{
    agent, backend, cache, certificate, client, dev, exit, explain, heal, health, info, key,
    location, metad, mount, scrub, status, sync, table, token, umount, volume, zdb,
};
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use std::path::PathBuf;

/// A filesystem over disks in several places that you do not fully trust.
#[derive(Debug, Parser)]
#[command(
    name = "qsfs",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    /// Cluster file [default: $QSFS_CLUSTER, ~/.config/qsfs/cluster.toml, /etc/qsfs/cluster.toml]
    #[arg(long, global = true, value_name = "FILE")]
    cluster: Option<PathBuf>,
    /// What to log to standard error: error, warn, info, debug, trace, or a filter as in RUST_LOG
    #[arg(long, global = true, value_name = "LEVEL")]
    pub(crate) log_level: Option<String>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Nouns and verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// A whole cluster on this machine, to try things
    Dev(Box<dev::DevArguments>),
    /// The metadata service
    #[command(subcommand)]
    Metad(Box<metad::MetadCommand>),
    /// The storage agent of a node
    #[command(subcommand)]
    Agent(Box<agent::AgentCommand>),
    /// What lets a process join
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Who this machine is to the cluster, and until when
    #[command(subcommand)]
    Certificate(certificate::CertificateCommand),
    /// Clients of the cluster
    #[command(subcommand)]
    Client(client::ClientCommand),
    /// Volumes
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Mount a volume
    Mount(mount::MountArguments),
    /// Push what is at risk, then unmount
    Umount(umount::UmountArguments),
    /// Push now, and wait until everything written before is committed
    Sync(sync::SyncArguments),
    /// How everything is
    Status(status::StatusArguments),
    /// The verdict as exit code: 0 ok, 1 warning, 2 critical, 3 unknown
    Health,
    /// What a finding means and what to do
    Explain {
        /// Finding [default: list all]
        name: Option<String>,
    },
    /// Where a file's bytes are
    Info(info::InfoArguments),
    /// Backends
    #[command(subcommand)]
    Backend(backend::BackendCommand),
    /// Locations
    #[command(subcommand)]
    Location(location::LocationCommand),
    /// Re-silver
    #[command(subcommand)]
    Heal(heal::HealCommand),
    /// Scrub
    #[command(subcommand)]
    Scrub(scrub::ScrubCommand),
    /// Local datafiles of a mount
    #[command(subcommand)]
    Cache(cache::CacheCommand),
    /// Recovery kits
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// A 0-db by itself, without a cluster
    #[command(subcommand)]
    Zdb(zdb::ZdbCommand),
    /// Shell completions
    Completions {
        /// For which shell
        shell: Shell,
    },
    /// Version of this binary
    Version,
}

impl Command {
    /// Daemons log what they do; commands only what goes wrong.
    pub(crate) fn log_level(&self) -> &'static str {
        let daemon = match self {
            Self::Metad(command) => command.is_daemon(),
            Self::Agent(_) | Self::Mount(_) | Self::Zdb(_) => true,
            _ => false,
        };
        // Of the libraries only what goes wrong.
        if daemon {
            "info,openraft=warn,fjall=warn,lsm_tree=warn,sled=warn,h2=warn,hyper=warn"
        } else {
            "warn"
        }
    }
}

impl Command {
    /// It speaks to metad as the cluster file says. (Daemons and mounts renew what they use themselves.)
    fn asks_the_cluster(&self) -> bool {
        match self {
            Self::Metad(command) => !command.is_daemon(),
            Self::Token(_)
            | Self::Volume(_)
            | Self::Status(_)
            | Self::Health
            | Self::Backend(_)
            | Self::Location(_)
            | Self::Heal(_)
            | Self::Scrub(_) => true,
            _ => false,
        }
    }
}

/// Runs a command; the exit code.
pub(crate) async fn run(arguments: Cli) -> anyhow::Result<u8> {
    let cluster = arguments.cluster.as_deref();
    if arguments.command.asks_the_cluster() {
        crate::session::renew_if_due(cluster).await;
    }
    match arguments.command {
        Command::Dev(arguments) => dev::run(*arguments).await?,
        Command::Metad(command) => metad::run(*command, cluster).await?,
        Command::Agent(command) => agent::run(*command).await?,
        Command::Token(command) => token::run(&command, cluster).await?,
        Command::Certificate(command) => certificate::run(&command, cluster).await?,
        Command::Client(command) => client::run(&command, cluster).await?,
        Command::Volume(command) => volume::run(&command, cluster).await?,
        Command::Mount(arguments) => mount::run(arguments, cluster).await?,
        Command::Umount(arguments) => umount::run(&arguments).await?,
        Command::Sync(arguments) => sync::run(&arguments).await?,
        Command::Status(arguments) => status::run(&arguments, cluster).await?,
        Command::Health => return health::run(cluster).await,
        Command::Explain { name } => explain::run(name.as_deref())?,
        Command::Info(arguments) => info::run(&arguments).await?,
        Command::Backend(command) => backend::run(&command, cluster).await?,
        Command::Location(command) => location::run(&command, cluster).await?,
        Command::Heal(command) => heal::run(&command, cluster).await?,
        Command::Scrub(command) => scrub::run(&command, cluster).await?,
        Command::Cache(command) => cache::run(&command).await?,
        Command::Key(command) => key::run(&command, cluster).await?,
        Command::Zdb(command) => zdb::run(command).await?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "qsfs", &mut script);
            table::print(&String::from_utf8_lossy(&script))?;
        }
        Command::Version => table::print(concat!("qsfs ", env!("CARGO_PKG_VERSION"), "\n"))?,
    }
    Ok(exit::OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn dev_without_a_verb_is_dev_up() {
        for line in [
            &["qsfs", "dev", "./mnt", "--locations", "3"][..],
            &["qsfs", "dev", "up", "./mnt", "--locations", "3"],
            &["qsfs", "dev", "kill", "loc1", "--data-dir", "/d"],
            &["qsfs", "dev", "down", "--data-dir", "/d"],
        ] {
            assert!(Cli::try_parse_from(line).is_ok(), "{line:?}");
        }
        assert!(Cli::try_parse_from(["qsfs", "dev"]).is_err());
    }
}
