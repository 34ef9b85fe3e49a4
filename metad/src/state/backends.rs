//! Backends and the agents that host them.

use super::command::Reply;
use super::kv::{Kv, KvError, RowKey};
use super::row::{Key, Table};
use super::{State, Stop, busy, tombstones};
use qsfs_proto::api::{Agent, Applied, Backend, BackendAddress, Intent, MetadError, Verdict};
use qsfs_zstor::id::{AgentId, BackendId, LocationName, NodeName};
use serde::{Deserialize, Serialize};

/// What records place on a backend; kept up by commit, swap and release so that nobody has to count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendLoad {
    /// Shards.
    pub shards: u64,
    /// Their bytes.
    pub bytes: u64,
}

pub(super) fn backend_key(id: BackendId) -> RowKey {
    Key::of(Table::Backend).number(id.0).done()
}

fn agent_key(id: AgentId) -> RowKey {
    Key::of(Table::Agent).number(id.0).done()
}

fn agent_name_key(location: &LocationName, node: &NodeName) -> RowKey {
    Key::of(Table::AgentName)
        .bytes(location.as_str().as_bytes())
        .bytes(&[0])
        .bytes(node.as_str().as_bytes())
        .done()
}

pub(super) fn register_agent<K: Kv>(
    state: &mut State<K>,
    location: &LocationName,
    node: &NodeName,
) -> Result<Applied, Stop> {
    let name = agent_name_key(location, node);
    if let Some(id) = state.row(&name)? {
        return Ok(Applied::Agent(id));
    }
    let mut counters = state.counters()?;
    let id = AgentId(counters.agent);
    counters.agent += 1;
    state.put_counters(&counters);
    state.put_row(name, &id);
    let agent = Agent {
        id,
        location: location.clone(),
        node: node.clone(),
    };
    state.put_row(agent_key(id), &agent);
    Ok(Applied::Agent(id))
}

/// Idempotent by (endpoint, namespace) within the agent; a hosted backend (TLS) whose agent moved to another port is
/// the same backend, as its namespace is unique there.
pub(super) fn register<K: Kv>(
    state: &mut State<K>,
    agent: AgentId,
    address: &BackendAddress,
    capacity_bytes: u64,
    now_ms: u64,
) -> Result<Applied, Stop> {
    let Some(host) = state.row::<Agent>(&agent_key(agent))? else {
        return Err(MetadError::NotFound(format!("agent {agent}")).into());
    };
    let all = state.backends()?;
    let own = || all.iter().filter(|backend| backend.agent == agent);
    let same_namespace = |b: &&Backend| b.address.namespace == address.namespace;
    let known = own()
        .filter(same_namespace)
        .find(|b| b.address.endpoint == address.endpoint)
        .or_else(|| {
            own()
                .filter(same_namespace)
                .find(|b| b.address.tls && address.tls)
        });
    if let Some(known) = known {
        let changed = Backend {
            address: address.clone(),
            capacity_bytes,
            ..known.clone()
        };
        if changed != *known {
            state.put_backend(&changed);
        }
        return Ok(Applied::Backend(known.id));
    }
    let mut counters = state.counters()?;
    let id = BackendId(counters.backend);
    counters.backend += 1;
    state.put_counters(&counters);
    state.put_backend(&Backend {
        id,
        agent,
        location: host.location,
        node: host.node,
        address: address.clone(),
        capacity_bytes,
        verdict: Verdict::Up,
        verdict_since_ms: now_ms,
        intent: Intent::Serve,
    });
    Ok(Applied::Backend(id))
}

pub(super) fn set_intent<K: Kv>(
    state: &mut State<K>,
    id: BackendId,
    intent: Intent,
) -> Result<Applied, Stop> {
    let Some(mut backend) = state.backend(id)? else {
        return Err(MetadError::NotFound(format!("backend {id}")).into());
    };
    if backend.intent == Intent::Retire && intent != Intent::Retire {
        return Err(MetadError::Invalid(format!("backend {id} was retired for good")).into());
    }
    let load = state.backend_load(id)?;
    if intent == Intent::Retire && load.shards > 0 {
        return Err(MetadError::Invalid(format!(
            "backend {id} still holds {} shards; drain it first: qsfs backend drain {id}",
            load.shards
        ))
        .into());
    }
    if intent == Intent::Retire {
        tombstones::forget_backend(state, id)?;
    }
    backend.intent = intent;
    state.put_backend(&backend);
    Ok(Applied::Done)
}

pub(super) fn set_verdicts<K: Kv>(
    state: &mut State<K>,
    verdicts: &[(BackendId, Verdict)],
    now_ms: u64,
) -> Result<Reply, Stop> {
    for (id, verdict) in verdicts {
        if let Some(mut backend) = state.backend(*id)?
            && backend.verdict != *verdict
        {
            backend.verdict = *verdict;
            backend.verdict_since_ms = now_ms;
            state.put_backend(&backend);
        }
    }
    Ok(Reply::Applied(Applied::Done))
}

impl<K: Kv> State<K> {
    /// All backends, by id.
    pub fn backends(&self) -> Result<Vec<Backend>, KvError> {
        self.rows(&Key::of(Table::Backend).done())
    }

    /// One backend.
    pub fn backend(&self, id: BackendId) -> Result<Option<Backend>, KvError> {
        self.row(&backend_key(id))
    }

    /// All agents, by id.
    pub fn agents(&self) -> Result<Vec<Agent>, KvError> {
        self.rows(&Key::of(Table::Agent).done())
    }

    /// One agent.
    pub fn agent(&self, id: AgentId) -> Result<Option<Agent>, KvError> {
        self.row(&agent_key(id))
    }

    /// What records place on a backend.
    pub fn backend_load(&self, id: BackendId) -> Result<BackendLoad, KvError> {
        self.busy(busy::Name::Load(id))
    }

    pub(super) fn put_backend_load(&mut self, id: BackendId, load: BackendLoad) {
        self.put_busy(busy::Name::Load(id), load);
    }

    fn put_backend(&mut self, backend: &Backend) {
        self.put_row(backend_key(backend.id), backend);
        self.touch().backends.insert(backend.id);
    }
}
