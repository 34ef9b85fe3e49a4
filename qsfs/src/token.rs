//! `qsfs token`: what lets a process join.

use crate::session::Session;
use crate::table::{Table, print, print_json};
use crate::units;
use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};
use qsfs_proto::api::{Mutation, Role};
use qsfs_proto::token::JoinToken;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where a join token comes from.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct TokenArgument {
    /// The join token. It can be used once; --token-file keeps it out of process lists
    token: Option<String>,
    /// File with the join token; - is standard input
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl TokenArgument {
    /// The token's text.
    pub(crate) fn read(&self) -> anyhow::Result<String> {
        let text = match (&self.token, &self.token_file) {
            (Some(token), _) => token.clone(),
            (None, Some(file)) => return read_file(file),
            (None, None) => bail!("give a token or --token-file FILE"),
        };
        Ok(text.trim().to_owned())
    }
}

/// The token in a file; `-` is standard input.
pub(crate) fn read_file(file: &Path) -> anyhow::Result<String> {
    let text = if file.as_os_str() == "-" {
        std::io::read_to_string(std::io::stdin()).context("reading the token")?
    } else {
        std::fs::read_to_string(file)
            .with_context(|| format!("reading the token from {}", file.display()))?
    };
    Ok(text.trim().to_owned())
}

/// Verbs of `qsfs token`.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a single-use token and print it
    Create {
        /// What it lets join
        #[arg(long)]
        role: TokenRole,
        /// How long it is good for
        #[arg(long, default_value = "1h", value_parser = units::parse_duration)]
        ttl: Duration,
    },
    /// List tokens, never their secrets
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a token useless
    Revoke {
        /// As listed
        prefix: String,
    },
}

/// Roles that a token can give.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum TokenRole {
    /// A storage agent
    Agent,
    /// A metadata node
    Metad,
    /// A client
    Client,
}

impl From<TokenRole> for Role {
    fn from(role: TokenRole) -> Self {
        match role {
            TokenRole::Agent => Self::Agent,
            TokenRole::Metad => Self::Metad,
            TokenRole::Client => Self::Client,
        }
    }
}

/// Runs one.
pub(crate) async fn run(command: &TokenCommand, cluster: Option<&Path>) -> anyhow::Result<()> {
    let session = Session::open(cluster)?;
    match command {
        TokenCommand::Create { role, ttl } => {
            let token = create(&session, (*role).into(), *ttl).await?;
            print(&format!("{token}\n"))
        }
        TokenCommand::List { json } => list(&session, *json).await,
        TokenCommand::Revoke { prefix } => {
            let prefix = prefix.clone();
            session.apply(Mutation::RevokeToken { prefix }).await
        }
    }
}

/// Makes a token; only the hash of its secret goes to metad.
pub(crate) async fn create(session: &Session, role: Role, ttl: Duration) -> anyhow::Result<String> {
    let members = session.members().await?;
    let endpoints = members.into_iter().map(|member| member.address).collect();
    let identity = session.context().identity();
    let (cluster, ca) = (identity.cluster(), identity.ca_fingerprint()?);
    let token = JoinToken::new(role, cluster, ca, endpoints, &mut rand::rng())?;
    session
        .apply(Mutation::CreateToken {
            hash: token.secret_hash(),
            role,
            ttl_ms: units::millis(ttl),
        })
        .await?;
    Ok(token.to_string())
}

async fn list(session: &Session, json: bool) -> anyhow::Result<()> {
    let tokens = session.client().tokens().await?;
    if json {
        return print_json("tokens", &tokens);
    }
    let mut table = Table::new(&["TOKEN", "ROLE", "EXPIRES", "USED"]);
    for token in tokens {
        table.row(vec![
            token.prefix,
            token.role.to_string(),
            units::until(token.expires_ms),
            if token.used { "yes" } else { "no" }.to_owned(),
        ]);
    }
    table.print()
}
