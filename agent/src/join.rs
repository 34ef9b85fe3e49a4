//! `agent join`: from a token to an agent that metad knows.
//!
//! ```text
//! check everything ─▶ agent.toml (unfinished) ─▶ token → identity ─▶ register agent ─▶ make backends ─▶ register ─▶ agent.toml
//! ```
//!
//! Invariants: what a person got wrong is found before the token is used up; nothing that exists is overwritten; an
//! interrupted join is finished by the same command (the identity is there already, and registering is idempotent).

use crate::attached::look_at;
use crate::config::{CONFIG_VERSION, Config, DataDir, HostedConfig};
use crate::options::BackendSpec;
use crate::{AgentError, JoinOptions, hosted};
use qsfs_proto::api::{Applied, Mutation, Role, Secret};
use qsfs_proto::client::MetadClient;
use qsfs_proto::identity::{CERT_FILE, Identity};
use qsfs_proto::join::Joiner;
use qsfs_proto::token::JoinToken;
use qsfs_zdb::engine::{Engine, EngineOptions};
use qsfs_zstor::id::{AgentId, BackendId, ClientId, ClusterId, Salt};
use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

/// What was joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// Cluster.
    pub cluster: ClusterId,
    /// Agent.
    pub agent: AgentId,
    /// Backends, in the order given: directories first, then attached ones.
    pub backends: Vec<BackendId>,
    /// `host:port` by which others reach the hosted backends.
    pub endpoint: String,
}

/// Joins this node to the cluster of the token and registers its backends. Nothing serves yet: call
/// [`serve`](fn@crate::serve) next. A join that was interrupted is finished by calling it again.
pub async fn join(options: JoinOptions) -> Result<Joined, AgentError> {
    let token = parse_token(&options.token)?;
    let data = DataDir::create(&options.data)?;
    let wanted = plan(&options, &token).await?;
    let mut config = match data.load()? {
        Some(known) => resume(&data, known, wanted, options.listen.port() == 0)?,
        None if data.is_fresh()? => wanted,
        None => return Err(AgentError::DataNotEmpty(options.data)),
    };
    for backend in &config.backend {
        hosted::check_dir(&config, backend)?;
    }
    data.save(&config)?;
    let identity = obtain_identity(&data, &token, &mut config).await?;
    let client = MetadClient::new(
        config.metad.clone(),
        &identity,
        ClientId::random(&mut rand::rng()),
    )?;
    register(&data, &mut config, &client).await?;
    let ids = config.backend.iter().map(|backend| backend.id);
    let backends = ids
        .chain(config.attached.iter().map(|attached| attached.id))
        .flatten()
        .collect();
    let agent = config
        .agent
        .ok_or_else(|| AgentError::Unfinished(options.data.clone()))?;
    tracing::info!(cluster = %config.cluster, %agent, location = %config.location, node = %config.node, "joined");
    Ok(Joined {
        cluster: config.cluster,
        agent,
        backends,
        endpoint: config.endpoint,
    })
}

pub(crate) fn parse_token(text: &str) -> Result<JoinToken, AgentError> {
    let token: JoinToken = text
        .trim()
        .parse()
        .map_err(|error| AgentError::Token(format!("{error}")))?;
    if token.role() != Role::Agent {
        let role = format!("{:?}", token.role()).to_lowercase();
        return Err(AgentError::Token(format!(
            "it is for a {role}; make one for an agent with `qsfs token create --role agent`"
        )));
    }
    Ok(token)
}

/// The configuration these options ask for; namespaces and passwords are drawn.
async fn plan(options: &JoinOptions, token: &JoinToken) -> Result<Config, AgentError> {
    if options.backends.is_empty() && options.attach.is_empty() {
        return Err(AgentError::NoBackends);
    }
    let mut places = BTreeSet::new();
    let mut backend = Vec::new();
    for spec in &options.backends {
        let dir = absolute(&spec.dir)?;
        if !places.insert(dir.display().to_string()) {
            return Err(AgentError::Twice(dir.display().to_string()));
        }
        backend.push(draw(spec, dir));
    }
    let mut attached = Vec::new();
    for spec in &options.attach {
        let place = format!("{}/{}", spec.endpoint, spec.namespace);
        if !places.insert(place.clone()) {
            return Err(AgentError::Twice(place));
        }
        attached.push(look_at(spec).await?);
    }
    let listen = bindable(options.listen)?;
    let endpoint = match &options.advertise {
        Some(endpoint) => endpoint.clone(),
        None if listen.ip().is_unspecified() => {
            return Err(AgentError::Advertise(listen.to_string()));
        }
        None => listen.to_string(),
    };
    Ok(Config {
        version: CONFIG_VERSION,
        cluster: token.cluster(),
        location: options.location.clone(),
        node: options.name.clone(),
        listen,
        endpoint,
        metad: token.endpoints().to_vec(),
        agent: None,
        backend,
        attached,
    })
}

fn absolute(dir: &Path) -> Result<PathBuf, AgentError> {
    // An existing directory may be named in two ways; a missing one has no links in its last part.
    dir.canonicalize()
        .or_else(|_| std::path::absolute(dir))
        .map_err(AgentError::io("find", dir))
}

fn draw(spec: &BackendSpec, dir: PathBuf) -> HostedConfig {
    let mut rng = rand::rng();
    let name = Salt::random(&mut rng).to_string();
    HostedConfig {
        id: None,
        dir,
        namespace: format!("b-{}", &name[..16]),
        password: Secret(format!(
            "{}{}",
            Salt::random(&mut rng),
            Salt::random(&mut rng)
        )),
        capacity_bytes: spec.capacity_bytes,
    }
}

/// The address with a real port, if it can be had now.
fn bindable(listen: SocketAddr) -> Result<SocketAddr, AgentError> {
    TcpListener::bind(listen)
        .and_then(|listener| listener.local_addr())
        .map_err(|source| AgentError::Listen {
            address: listen.to_string(),
            source,
        })
}

/// An interrupted join goes on with what was drawn then, if it is the same join.
fn resume(
    data: &DataDir,
    known: Config,
    wanted: Config,
    any_port: bool,
) -> Result<Config, AgentError> {
    let path = data.path().to_owned();
    if known.cluster != wanted.cluster {
        return Err(AgentError::OtherCluster {
            path,
            found: known.cluster.to_string(),
            wanted: wanted.cluster.to_string(),
        });
    }
    if known.is_complete() {
        return Err(AgentError::AlreadyJoined {
            path,
            agent: known
                .agent
                .map(|agent| agent.to_string())
                .unwrap_or_default(),
            cluster: known.cluster.to_string(),
        });
    }
    let places = |config: &Config| -> Vec<String> {
        let dirs = config
            .backend
            .iter()
            .map(|hosted| format!("{}={}", hosted.dir.display(), hosted.capacity_bytes));
        let attached = config
            .attached
            .iter()
            .map(|other| format!("{}/{}", other.endpoint, other.namespace));
        dirs.chain(attached).collect()
    };
    let different = [
        ("--location", known.location != wanted.location),
        ("--name", known.node != wanted.node),
        ("--backend or --attach", places(&known) != places(&wanted)),
    ];
    if let Some((what, _)) = different.into_iter().find(|(_, differs)| *differs) {
        return Err(AgentError::OtherOptions { path, what });
    }
    let metad = wanted.metad;
    if any_port {
        // Backends may be registered with the port that was taken then.
        return Ok(Config { metad, ..known });
    }
    Ok(Config {
        listen: wanted.listen,
        endpoint: wanted.endpoint,
        metad,
        ..known
    })
}

async fn obtain_identity(
    data: &DataDir,
    token: &JoinToken,
    config: &mut Config,
) -> Result<Identity, AgentError> {
    let dir = data.identity();
    if dir.join(CERT_FILE).exists() {
        return Ok(Identity::load(&dir)?);
    }
    let joiner = Joiner {
        role: Role::Agent,
        name: config.node.to_string(),
        location: config.location.to_string(),
        address: String::new(),
    };
    let (identity, grant) = qsfs_proto::join::join(token, joiner).await?;
    config.metad = grant.endpoints;
    identity.save(&dir)?;
    Ok(identity)
}

async fn register(
    data: &DataDir,
    config: &mut Config,
    client: &MetadClient,
) -> Result<(), AgentError> {
    let mutation = Mutation::RegisterAgent {
        location: config.location.clone(),
        node: config.node.clone(),
    };
    let agent = match client.mutate(mutation).await? {
        Applied::Agent(agent) => agent,
        other => return Err(AgentError::Answer(format!("{other:?}"))),
    };
    config.agent = Some(agent);
    let engine = Engine::open(EngineOptions {
        compaction: false,
        ..EngineOptions::default()
    })
    .map_err(|error| AgentError::Backend {
        path: data.path().to_owned(),
        reason: error.to_string(),
    })?;
    for backend in &config.backend {
        hosted::create(&engine, config, backend)?;
    }
    engine.close();
    for index in 0..config.backend.len() {
        let backend = &config.backend[index];
        let address = backend.address(&config.endpoint);
        let mutation = Mutation::RegisterBackend {
            agent,
            address,
            capacity_bytes: backend.capacity_bytes,
        };
        config.backend[index].id = Some(register_backend(client, mutation).await?);
    }
    for attached in &mut config.attached {
        let address = attached.address();
        let mutation = Mutation::RegisterBackend {
            agent,
            address,
            capacity_bytes: attached.capacity_bytes,
        };
        attached.id = Some(register_backend(client, mutation).await?);
    }
    data.save(config)
}

async fn register_backend(
    client: &MetadClient,
    mutation: Mutation,
) -> Result<BackendId, AgentError> {
    match client.mutate(mutation).await? {
        Applied::Backend(id) => Ok(id),
        other => Err(AgentError::Answer(format!("{other:?}"))),
    }
}
