//! How a metad comes to be: the first of a cluster, or one that joins; and how it is run.

use crate::ground::{SystemClock, WallClock};
use crate::node::datadir::{DataDir, NodeFile};
use crate::node::{self, NodeError};
use crate::options::{
    BOOTSTRAP_TOKEN_TTL_MS, BootstrapOptions, Bootstrapped, JoinOptions, Joined, ServeOptions,
};
use crate::state::command::{Command, Entry, Genesis, MemberRow};
use crate::state::settings;
use openraft::BasicNode;
use qsfs_proto::api::{MetadError, Mutation, Role};
use qsfs_proto::ca::{CertificateAuthority, LEAF_VALIDITY};
use qsfs_proto::context::Context;
use qsfs_proto::join::Joiner;
use qsfs_proto::token::JoinToken;
use qsfs_zstor::id::{ClusterId, MetadId};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Tokens for the other two of three metads.
const METAD_TOKENS: usize = 2;
/// Name of the admin that a bootstrap makes.
const ADMIN_NAME: &str = "admin";
/// Longest wait for the first leader, who has nobody to wait for.
const FIRST_LEADER_DEADLINE: Duration = Duration::from_secs(30);

/// Makes the first metad of a new cluster: identity, CA, log with its first entries. Run it with [`serve`].
pub async fn bootstrap(options: BootstrapOptions) -> Result<Bootstrapped, NodeError> {
    settings::check(&options.settings)?;
    let life = options.certificate_life.unwrap_or(LEAF_VALIDITY);
    settings::check_certificate_life(life)?;
    let advertise = advertised(&options.listen, options.advertise.as_deref())?;
    let dir = DataDir::lock_new(&options.data)?;
    let cluster = ClusterId::random(&mut rand::rng());
    let authority = CertificateAuthority::create(cluster)?;
    let id = MetadId(1);
    let identity = authority.issue_for(Role::Metad, &id.to_string(), life)?;
    let admin = authority.issue_for(Role::Admin, ADMIN_NAME, life)?;
    let roles = std::iter::repeat_n(Role::Metad, METAD_TOKENS)
        .chain(std::iter::repeat_n(Role::Agent, options.agent_tokens));
    let mut tokens = Vec::new();
    for role in roles {
        let endpoints = vec![advertise.clone()];
        let fingerprint = authority.fingerprint();
        tokens.push(JoinToken::new(
            role,
            cluster,
            fingerprint,
            endpoints,
            &mut rand::rng(),
        )?);
    }
    let node = NodeFile::new(
        cluster,
        id,
        (options.name.clone(), options.location.clone()),
        (options.listen.clone(), advertise.clone()),
    );
    let genesis = Genesis {
        cluster,
        ca_pem: authority.ca_pem().to_owned(),
        settings: options.settings,
        member: MemberRow {
            id,
            name: options.name,
            location: options.location.clone(),
            address: advertise.clone(),
            removed: false,
        },
        tokens: tokens
            .iter()
            .map(|token| (token.secret_hash(), token.role(), BOOTSTRAP_TOKEN_TTL_MS))
            .collect(),
    };
    let core = node::start(&dir, &node, &identity).await?;
    let mut begun = begin(&core.raft, genesis, SystemClock.now_ms()).await;
    if begun.is_ok() && options.certificate_life.is_some() {
        begun = set_certificate_life(&core.raft, life).await;
    }
    let stopped = core.raft.shutdown().await;
    stopped.map_err(|error| NodeError::Raft(error.to_string()))?;
    begun?;
    core.machine.flush()?;
    dir.initialise(&node, &identity, authority.key_pem())?;
    let warning = format!(
        "all metads are at {} so far: join one at each of two other locations, or the loss of {} stops the cluster",
        options.location, options.location
    );
    Ok(Bootstrapped {
        context: Context::new(vec![advertise], admin, None),
        tokens,
        warnings: vec![warning],
    })
}

/// The first entries of the log, by a Raft of one.
pub(crate) async fn begin(
    raft: &crate::raft::Raft,
    genesis: Genesis,
    now_ms: u64,
) -> Result<(), NodeError> {
    let failed = |error: String| NodeError::Raft(error);
    let first = genesis.member.id.0;
    let address = genesis.member.address.clone();
    let members = BTreeMap::from([(first, BasicNode::new(address))]);
    raft.initialize(members)
        .await
        .map_err(|error| failed(error.to_string()))?;
    raft.wait(Some(FIRST_LEADER_DEADLINE))
        .current_leader(first, "the only metad leads")
        .await
        .map_err(|error| failed(error.to_string()))?;
    write(raft, now_ms, Command::Initialize(genesis)).await
}

async fn set_certificate_life(raft: &crate::raft::Raft, life: Duration) -> Result<(), NodeError> {
    let life_ms = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
    let set = Command::Mutation(Mutation::SetCertificateLife { life_ms });
    write(raft, SystemClock.now_ms(), set).await
}

async fn write(raft: &crate::raft::Raft, now_ms: u64, command: Command) -> Result<(), NodeError> {
    let failed = |error: String| NodeError::Raft(error);
    let written = raft
        .client_write(Entry::internal(now_ms, command).into())
        .await
        .map_err(|error| failed(error.to_string()))?;
    match written.data.0 {
        Some(Ok(_)) => Ok(()),
        Some(Err(refusal)) => Err(refusal.into()),
        None => Err(failed("the first command was not applied".into())),
    }
}

/// Makes a metad that joins a cluster. Run it with [`serve`]; the leader makes it a voter once it caught up.
pub async fn join(options: JoinOptions) -> Result<Joined, NodeError> {
    let token: JoinToken = options.token.parse()?;
    if token.role() != Role::Metad {
        let text = format!("it is for the role {}, not metad", token.role());
        return Err(MetadError::Token(text).into());
    }
    let advertise = advertised(&options.listen, options.advertise.as_deref())?;
    let dir = DataDir::lock_new(&options.data)?;
    let joiner = Joiner {
        role: Role::Metad,
        name: options.name.to_string(),
        location: options.location.to_string(),
        address: advertise.clone(),
    };
    let (identity, grant) = qsfs_proto::join::join(&token, joiner).await?;
    let incomplete = || MetadError::Invalid("the cluster did not grant what a metad needs".into());
    let id = grant.metad_id.ok_or_else(incomplete)?;
    let ca_key = grant.ca_key_pem.ok_or_else(incomplete)?;
    let node = NodeFile::new(
        grant.cluster,
        id,
        (options.name, options.location),
        (options.listen, advertise),
    );
    dir.initialise(&node, &identity, &ca_key)?;
    Ok(Joined { id })
}

/// Runs the metad of a data directory until `shutdown`. After [`NodeError::Full`] there is room again unless `shutdown` came, and after
/// [`NodeError::Rotten`] the next start mends: whoever started it should do so once more, in a new process.
pub async fn serve(options: ServeOptions, shutdown: CancellationToken) -> Result<(), NodeError> {
    node::run(DataDir::lock(&options.data)?, None, shutdown).await
}

/// The same on a listener that is open already.
pub async fn serve_on(
    options: ServeOptions,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), NodeError> {
    node::run(DataDir::lock(&options.data)?, Some(listener), shutdown).await
}

/// The address others use: one that can be dialled.
pub(crate) fn advertised(listen: &str, advertise: Option<&str>) -> Result<String, NodeError> {
    let address = advertise.unwrap_or(listen);
    let split = address.rsplit_once(':');
    let port = split.and_then(|(_, port)| port.parse::<u16>().ok());
    match (split, port) {
        (Some((host, _)), Some(port)) if port != 0 => {
            if ["0.0.0.0", "[::]", ""].contains(&host) {
                return Err(NodeError::Option(format!(
                    "others cannot reach {address}: say with --advertise host:port where this metad is"
                )));
            }
            Ok(address.to_owned())
        }
        _ => Err(NodeError::Option(format!(
            "{address:?} is not host:port with a fixed port, such as 10.0.0.1:7400"
        ))),
    }
}
