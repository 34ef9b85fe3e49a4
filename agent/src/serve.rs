//! `agent serve`: hosts the backends and does what metad orders.
//!
//! ```text
//! engine + server (RESP over TLS)     session ──orders──▶ director ──▶ runs
//!                                        ▲ heartbeats        └──────▶ tours, one per backend
//! ```
//!
//! Invariants: a backend that cannot be opened is told to metad and keeps no other from being served; data is served
//! whether or not metad answers; every task ends at shutdown.

use crate::attached::AttachedProbe;
use crate::certificate;
use crate::client_store::{self, ClientStore, connect_plain};
use crate::cluster::Cluster;
use crate::config::{Config, DataDir};
use crate::director::Director;
use crate::hosted::{self, HostedProbe, HostedStore};
use crate::jobs::Limits;
use crate::local::LocalBackend;
use crate::members::MembersWatch;
use crate::noticer::Noticer;
use crate::rebuild::Rebuilder;
use crate::session::SessionTask;
use crate::store::{PieceStore, Stores};
use crate::tour::TourTask;
use crate::tour_file::TourFile;
use crate::{AgentError, ServeOptions};
use qsfs_proto::api::Role;
use qsfs_proto::client::MetadClient;
use qsfs_proto::identity::{Identity, LiveIdentity};
use qsfs_proto::renewal::{IdentityDir, Renewal};
use qsfs_proto::tls::{AGENT_SERVER_NAME, ClientAuth, client_config, server_config};
use qsfs_zdb::client::ClientTls;
use qsfs_zdb::engine::{Engine, EngineOptions};
use qsfs_zdb::server::{Admin, ServerConfig};
use qsfs_zstor::id::{AgentId, BackendId, ClientId};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Who may speak to a backend.
const BACKEND_ROLES: &[Role] = &[Role::Agent, Role::Client, Role::Metad, Role::Admin];
/// Requests and answers of all clients in memory; with the rebuilds' windows it stays below what an agent may use.
const INFLIGHT_BYTES: usize = 64 << 20;
/// Orders and reports that wait between the session and the director.
const SESSION_QUEUE: usize = 256;

/// Serves until `shutdown`; returns earlier only when the backends cannot be served.
pub async fn serve(options: ServeOptions, shutdown: CancellationToken) -> Result<(), AgentError> {
    let data = Arc::new(DataDir::open(&options.data)?);
    let config = data
        .load()?
        .ok_or_else(|| AgentError::NotJoined(options.data.clone()))?;
    let agent = config
        .agent
        .filter(|_| config.is_complete())
        .ok_or_else(|| AgentError::Unfinished(options.data.clone()))?;
    let identity = Identity::load(&data.identity())?;
    certificate::check(&identity)?;
    let identity = LiveIdentity::new(identity);
    let listener = TcpListener::bind(config.listen)
        .await
        .map_err(|source| AgentError::Listen {
            address: config.listen.to_string(),
            source,
        })?;
    let client = MetadClient::new(
        config.metad.clone(),
        &identity,
        ClientId::random(&mut rand::rng()),
    )?;
    let engine = Engine::open(EngineOptions::default()).map_err(|error| AgentError::Backend {
        path: options.data.clone(),
        reason: error.to_string(),
    })?;
    let engine = Arc::new(engine);
    let tls = ClientTls {
        config: client_config(&identity)?,
        server_name: AGENT_SERVER_NAME.to_owned(),
    };
    let stores = Arc::new(Stores::new(Box::new(move |address| {
        Arc::new(ClientStore(client_store::connect(address, &tls))) as Arc<dyn PieceStore>
    })));
    let backends = Arc::new(open_backends(&engine, &config, &stores));
    let server = ServerConfig {
        tls: Some(server_config(
            &identity,
            ClientAuth::RequiredRoles(BACKEND_ROLES),
        )?),
        // Only this program makes namespaces.
        admin: Admin::Nobody,
        inflight_bytes: INFLIGHT_BYTES,
        ..ServerConfig::default()
    };
    // Whatever ends first takes the others with it.
    let stop = shutdown.child_token();
    let mut tasks = JoinSet::new();
    let renewed = Arc::new(Notify::new());
    work(
        &mut tasks,
        (agent, Arc::clone(&renewed)),
        Arc::new(client.clone()),
        &backends,
        stores,
        data.path(),
        &stop,
    );
    let renewing = client.clone();
    let watch = MembersWatch {
        client,
        config: config.clone(),
        data: Arc::clone(&data),
        shutdown: stop.clone(),
    };
    tasks.spawn(watch.run());
    let renewal = Renewal::new(
        identity,
        Arc::new(IdentityDir(data.identity())),
        Arc::new(renewing),
        certificate::REJOIN_ADVICE,
    );
    tasks.spawn(renewal.run(move |_| renewed.notify_one(), stop.clone()));
    tracing::info!(%agent, location = %config.location, node = %config.node, listen = %config.listen, backends = backends.len(), "agent serves");
    let served = qsfs_zdb::server::serve(listener, Arc::clone(&engine), server, stop.clone()).await;
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    engine.close();
    served.map_err(|error| AgentError::Server {
        address: config.listen.to_string(),
        reason: error.to_string(),
    })
}

fn open_backends(engine: &Engine, config: &Config, stores: &Stores) -> Vec<LocalBackend> {
    let mut backends = Vec::new();
    for backend in &config.backend {
        let Some(id) = backend.id else { continue };
        let opened = hosted::open(engine, config, backend);
        let store = opened.as_ref().ok().map(|namespace| {
            Arc::new(HostedStore {
                namespace: Arc::clone(namespace),
            }) as Arc<dyn PieceStore>
        });
        let probe = HostedProbe {
            opened,
            dir: backend.dir.clone(),
        };
        backends.push(LocalBackend::new(id, store, Box::new(probe)));
    }
    for attached in &config.attached {
        let Some(id) = attached.id else { continue };
        let client = connect_plain(&attached.address());
        let store = Arc::new(ClientStore(client.clone())) as Arc<dyn PieceStore>;
        let probe = AttachedProbe {
            client,
            capacity_bytes: attached.capacity_bytes,
        };
        backends.push(LocalBackend::new(id, Some(store), Box::new(probe)));
    }
    for backend in &backends {
        if let Some(store) = &backend.store {
            stores.host(backend.id, Arc::clone(store));
        }
    }
    backends
}

/// Starts everything that listens to metad. `renewed` is notified when the agent has another certificate.
pub(crate) fn work(
    tasks: &mut JoinSet<()>,
    (agent, renewed): (AgentId, Arc<Notify>),
    cluster: Arc<dyn Cluster>,
    backends: &Arc<Vec<LocalBackend>>,
    stores: Arc<Stores>,
    data: &Path,
    shutdown: &CancellationToken,
) {
    let (settings, settings_seen) = watch::channel(None);
    let (report_sender, reports) = mpsc::channel(SESSION_QUEUE);
    let (event_sender, events) = mpsc::channel(SESSION_QUEUE);
    let mut tours: BTreeMap<BackendId, mpsc::Sender<()>> = BTreeMap::new();
    for backend in backends.iter() {
        let Some(store) = &backend.store else {
            continue;
        };
        // One order waits at most: more of them mean the same.
        let (wake, orders) = mpsc::channel(1);
        tours.insert(backend.id, wake);
        let tour = TourTask {
            backend: backend.id,
            cluster: Arc::clone(&cluster),
            store: Arc::clone(store),
            file: TourFile::new(data, backend.id),
            progress: Arc::clone(&backend.progress),
            settings: settings_seen.clone(),
            orders,
            shutdown: shutdown.clone(),
        };
        tasks.spawn(tour.run());
    }
    let noticer = Noticer {
        cluster: Arc::clone(&cluster),
        stores: backends
            .iter()
            .filter_map(|backend| Some((backend.id, Arc::clone(backend.store.as_ref()?))))
            .collect(),
        settings: settings_seen.clone(),
        shutdown: shutdown.clone(),
    };
    tasks.spawn(noticer.run());
    let director = Director {
        rebuilder: Arc::new(Rebuilder {
            cluster: Arc::clone(&cluster),
            stores,
        }),
        events,
        reports: report_sender,
        settings,
        tours,
        shutdown: shutdown.clone(),
    };
    tasks.spawn(director.run(Limits::default()));
    let session = SessionTask {
        agent,
        cluster,
        backends: Arc::clone(backends),
        settings: settings_seen,
        reports,
        events: event_sender,
        renewed,
        shutdown: shutdown.clone(),
    };
    tasks.spawn(session.run());
}

#[cfg(test)]
mod tests;
