//! What runs on a simulated host: one real metad, from its log to its gRPC server.

use super::net::{self, PORT, SimDial, Unreliable};
use super::service::UnreliableService;
use super::world::{CLUSTER, Doors, NodeFailure, NodeSlot, World};
use qsfs_metad::NodeError;
use qsfs_metad::log::LogError;
use qsfs_metad::node::bare::{Bare, BareOptions};
use qsfs_metad::node::is_damage;
use qsfs_metad::state::command::{Genesis, MemberRow};
use qsfs_proto::api::{ClusterSettings, Role};
use qsfs_proto::ca::CertificateAuthority;
use qsfs_zdb::media::OpenMode;
use qsfs_zstor::id::MetadId;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use turmoil::net::TcpListener;

/// Tokens that the first node makes, one for every admission of a run.
pub const TOKENS: u8 = 60;
/// Life of a lease: short, so that runs of seconds see many end.
pub const LEASE_TTL_MS: u64 = 1_500;

/// The secret of a token, hashed.
pub fn token_hash(number: u8) -> [u8; 32] {
    [number; 32]
}

/// Where others reach a node.
pub fn address(name: &str) -> String {
    format!("{name}:{PORT}")
}

fn genesis() -> Genesis {
    let day_ms = 86_400_000;
    let tokens = (1..=TOKENS).map(|number| (token_hash(number), Role::Metad, day_ms));
    Genesis {
        cluster: CLUSTER,
        ca_pem: "simulated".into(),
        settings: ClusterSettings {
            // Nobody sends heartbeats here: no backend may be taken for lost because of that.
            heartbeat_ms: day_ms,
            suspect_after_ms: 3 * day_ms,
            down_after_ms: 4 * day_ms,
            lost_after_ms: 5 * day_ms,
            lease_ttl_ms: LEASE_TTL_MS,
            ..ClusterSettings::default()
        },
        member: MemberRow {
            id: MetadId(1),
            name: "m1".parse().expect("a name"),
            location: "loc1".parse().expect("a name"),
            address: address("m1"),
            removed: false,
        },
        tokens: tokens.collect(),
    }
}

/// Runs the node of a host until the host is stopped. A node that fails is noted; the host then waits to be started again.
pub async fn run(world: Arc<World>, node: usize) -> turmoil::Result {
    let (name, failure) = match serve(&world, node).await {
        Ok(text) => (
            name_of(&world, node),
            NodeFailure {
                damaged: false,
                text,
            },
        ),
        Err(error) => (
            name_of(&world, node),
            NodeFailure {
                damaged: is_damage(&error),
                text: error.to_string(),
            },
        ),
    };
    world.note(&name, format_args!("stopped: {}", failure.text));
    {
        let mut nodes = world.nodes.lock();
        nodes[node].doors = None;
        nodes[node].failure = Some(failure);
    }
    std::future::pending().await
}

fn name_of(world: &World, node: usize) -> String {
    world.nodes.lock()[node].name.clone()
}

async fn serve(world: &Arc<World>, node: usize) -> Result<String, NodeError> {
    let (name, id, took_part, starts) = {
        let mut nodes = world.nodes.lock();
        let slot = &mut nodes[node];
        slot.failure = None;
        slot.starts += 1;
        let Some(id) = slot.id else {
            return Ok("not a member yet".into());
        };
        (slot.name.clone(), id, slot.took_part, slot.starts)
    };
    world.note(&name, format_args!("starts as {id} ({starts})"));
    let me = world.identity_of(id);
    let bare = loop {
        let authority = CertificateAuthority::from_pem(&world.authority.0, &world.authority.1)?;
        let options = BareOptions {
            ground: world.ground(node),
            dir: NodeSlot::dir(),
            cluster: CLUSTER,
            id,
            took_part,
            dial: Arc::new(SimDial { me: me.clone() }),
            authority,
        };
        match Bare::start(options).await {
            Err(NodeError::Log(LogError::Damaged { path, offset, .. }))
                if super::broken::cuts_rot(world) =>
            {
                cut(world, node, &path, offset);
            }
            started => break started?,
        }
    };
    if id == MetadId(1) && bare.machine().raft_row().applied.is_none() && !took_part {
        bare.initialize(genesis()).await?;
    }
    world.nodes.lock()[node].harmed = false;
    let doors = Doors {
        consensus: bare.consensus().clone(),
        machine: bare.machine().clone(),
    };
    tokio::spawn(watch_raft(Arc::clone(world), node, doors.clone()));
    world.nodes.lock()[node].doors = Some(doors);
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await;
    let listener = listener.map_err(|source| NodeError::Io {
        step: "listen on",
        path: name.clone().into(),
        source,
    })?;
    let service = Arc::new(UnreliableService {
        world: Arc::clone(world),
        inner: bare.service(),
    });
    let raft = Arc::new(Unreliable {
        world: Arc::clone(world),
        node,
        inner: bare.transport(),
    });
    let connections = ReceiverStream::new(net::accept(listener));
    let shutdown = CancellationToken::new();
    let serving = qsfs_proto::server::serve_known(connections, me, service, raft, shutdown);
    tokio::select! {
        served = serving => { served?; Ok("its server ended".into()) }
        why = bare.failed() => Ok(why),
    }
}

/// What the broken variant does that takes rot for a torn tail.
fn cut(world: &World, node: usize, path: &std::path::Path, offset: u64) {
    use qsfs_zdb::media::Media;
    let ground_media = world.nodes.lock()[node].media.clone();
    let dir = NodeSlot::dir().join("log");
    if let Ok(file) = ground_media.open(path, OpenMode::ReadWrite) {
        drop(file.truncate(offset).and_then(|()| file.sync_data()));
    }
    for name in ground_media.list(&dir).unwrap_or_default() {
        let other = dir.join(&name);
        if name.ends_with(".log") && other.as_path() > path {
            drop(ground_media.remove(&other));
        }
    }
    world.note("!", format_args!("cut {} at {offset}", path.display()));
}

/// Notes who leads and whom the node knows.
async fn watch_raft(world: Arc<World>, node: usize, doors: Doors) {
    let name = name_of(&world, node);
    let mut metrics = doors.consensus.raft().metrics();
    let mut seen = (0, None);
    loop {
        let now = {
            let metrics = metrics.borrow_and_update();
            let peers = metrics.membership_config.nodes().count() > 1;
            if peers && !metrics.vote.leader_id().term.eq(&0) {
                world.nodes.lock()[node].took_part = true;
            }
            if let Some(lying) = &world.nodes.lock()[node].lying {
                let leads = metrics.current_leader == Some(metrics.id);
                lying.leads.store(leads, Ordering::Relaxed);
            }
            (metrics.current_term, metrics.current_leader)
        };
        if now != seen {
            let leader = now.1.map_or("nobody".to_owned(), |id| id.to_string());
            world.note(&name, format_args!("term {} led by {leader}", now.0));
            seen = now;
        }
        if metrics.changed().await.is_err() {
            return;
        }
    }
}
