//! `qsfs agent`: the storage agent of one node.

use crate::signals;
use crate::token::TokenArgument;
use clap::Subcommand;
use qsfs_agent::{AttachSpec, BackendSpec, JoinOptions, ServeOptions};
use qsfs_zstor::id::{LocationName, NodeName};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Verbs of `qsfs agent`.
#[derive(Debug, Subcommand)]
pub(crate) enum AgentCommand {
    /// Join a cluster with this node's disks, and serve
    Join {
        #[command(flatten)]
        token: TokenArgument,
        /// Location
        #[arg(long)]
        location: LocationName,
        /// Name of this node, unique in its location [default: its host name]
        #[arg(long)]
        name: Option<NodeName>,
        /// Address to serve the backends on
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7410")]
        listen: SocketAddr,
        /// How others reach it, where that differs
        #[arg(long, value_name = "HOST:PORT")]
        advertise: Option<String>,
        /// Data directory: identity and configuration, no shards
        #[arg(long, default_value = "/var/lib/qsfs/agent")]
        data: PathBuf,
        /// A directory that becomes a backend; may be repeated
        #[arg(long = "backend", value_name = "DIR=SIZE")]
        backends: Vec<BackendSpec>,
        /// A namespace of a separately run 0-db that becomes a backend (plain connection, no TLS); may be repeated
        #[arg(long, value_name = "zdb://HOST:PORT/NS?password-file=FILE")]
        attach: Vec<AttachSpec>,
    },
    /// Serve again on the data of an earlier join
    Serve {
        /// Data directory
        #[arg(long, default_value = "/var/lib/qsfs/agent")]
        data: PathBuf,
    },
}

/// Runs one.
pub(crate) async fn run(command: AgentCommand) -> anyhow::Result<()> {
    let data = match command {
        AgentCommand::Serve { data } => data,
        AgentCommand::Join {
            token,
            location,
            name,
            listen,
            advertise,
            data,
            backends,
            attach,
        } => {
            let name = match name {
                Some(name) => name,
                None => crate::client::host_name().parse()?,
            };
            let joined = qsfs_agent::join(JoinOptions {
                token: token.read()?,
                name,
                location,
                listen,
                advertise,
                data: data.clone(),
                backends,
                attach,
            })
            .await?;
            tracing::info!(agent = %joined.agent, endpoint = joined.endpoint, "joined");
            data
        }
    };
    qsfs_agent::serve(ServeOptions { data }, signals::shutdown()?).await?;
    Ok(())
}
