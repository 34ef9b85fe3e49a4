//! The backends as this client sees them: addresses and verdicts from metad, connections, and what it found out itself.
//!
//! A backend that failed is left alone for a while (doubling, bounded), so that reads and pushes do not wait for its
//! timeout again and again. metad's verdict counts as well: what is down there is asked last.

mod heard;

use crate::admission::Room;
use crate::cluster::Cluster;
use async_trait::async_trait;
use bytes::Bytes;
use heard::Heard;
use parking_lot::{Mutex, RwLock};
use qsfs_proto::api::{Backend, Intent, MetadError, Verdict};
use qsfs_zdb::client::{ClientConfig, ClientError, ClientTls, Password, ZdbClient};
use qsfs_zstor::id::BackendId;
use qsfs_zstor::placement::{Candidate, Site, room_per_shard};
use qsfs_zstor::policy::Geometry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// First time a failed backend is left alone.
pub const AVOID_FIRST: Duration = Duration::from_secs(2);
/// Longest time.
pub const AVOID_MAX: Duration = Duration::from_secs(30);
/// A full backend is not offered shards for so long.
pub const AVOID_FULL: Duration = Duration::from_secs(20);
/// Age after which the list of backends is asked for again.
pub const REFRESH: Duration = Duration::from_secs(10);
/// To connect to a backend.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// For one piece.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections per backend.
pub const CONNECTIONS: usize = 2;
/// Bytes under way per backend.
pub const INFLIGHT_BYTES: usize = 8 << 20;

/// A backend's key-value verbs. [`ZdbClient`] in production; tests put faults in between.
#[async_trait]
pub trait PieceStore: Send + Sync + 'static {
    /// The value under a key.
    async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, ClientError>;
    /// Stores durably.
    async fn set(&self, key: &[u8], value: Bytes) -> Result<(), ClientError>;
    /// Deletes; false when it was not there.
    async fn delete(&self, key: &[u8]) -> Result<bool, ClientError>;
}

#[async_trait]
impl PieceStore for ZdbClient {
    async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, ClientError> {
        Self::get(self, key).await
    }

    async fn set(&self, key: &[u8], value: Bytes) -> Result<(), ClientError> {
        Self::set(self, key, value).await
    }

    async fn delete(&self, key: &[u8]) -> Result<bool, ClientError> {
        Self::delete(self, key).await
    }
}

/// Makes connections to backends.
pub trait Connector: Send + Sync + 'static {
    /// A client of this backend; connects when first used.
    fn connect(&self, backend: &Backend) -> Arc<dyn PieceStore>;
}

/// Real connections: TLS with the cluster's CA, except to a 0-db attached from outside.
#[derive(Debug, Clone)]
pub struct ZdbConnector {
    /// TLS configuration of this client's identity.
    pub tls: Arc<rustls::ClientConfig>,
}

impl Connector for ZdbConnector {
    fn connect(&self, backend: &Backend) -> Arc<dyn PieceStore> {
        let address = &backend.address;
        Arc::new(ZdbClient::new(ClientConfig {
            password: address
                .password
                .as_ref()
                .map(|password| Password::new(password.0.clone())),
            tls: address.tls.then(|| ClientTls {
                config: Arc::clone(&self.tls),
                server_name: qsfs_proto::tls::AGENT_SERVER_NAME.to_owned(),
            }),
            connect_timeout: CONNECT_TIMEOUT,
            request_timeout: REQUEST_TIMEOUT,
            connections: CONNECTIONS,
            inflight_bytes: INFLIGHT_BYTES,
            ..ClientConfig::new(address.endpoint.clone(), address.namespace.clone())
        }))
    }
}

struct Known {
    backend: Backend,
    client: Arc<dyn PieceStore>,
}

#[derive(Debug, Clone, Copy)]
struct Trouble {
    until: Instant,
    wait: Duration,
}

/// See the module.
pub struct Backends {
    cluster: Arc<dyn Cluster>,
    connector: Arc<dyn Connector>,
    known: RwLock<BTreeMap<BackendId, Known>>,
    heard: RwLock<BTreeMap<BackendId, Heard>>,
    trouble: Mutex<BTreeMap<BackendId, Trouble>>,
    full: Mutex<BTreeMap<BackendId, Instant>>,
    refreshed: tokio::sync::Mutex<Option<Instant>>,
}

impl std::fmt::Debug for Backends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backends").finish_non_exhaustive()
    }
}

impl Backends {
    /// Nothing known yet.
    pub fn new(cluster: Arc<dyn Cluster>, connector: Arc<dyn Connector>) -> Self {
        Self {
            cluster,
            connector,
            known: RwLock::default(),
            heard: RwLock::default(),
            trouble: Mutex::default(),
            full: Mutex::default(),
            refreshed: tokio::sync::Mutex::new(None),
        }
    }

    /// Asks metad again unless that was done less than `max_age` ago. Callers at the same time share one question.
    pub async fn refresh(&self, max_age: Duration) -> Result<(), MetadError> {
        let mut refreshed = self.refreshed.lock().await;
        if refreshed.is_some_and(|at| at.elapsed() < max_age) {
            return Ok(());
        }
        let listed = self.cluster.backends().await?;
        // Facts are soft: placement can do without. A new leader has none yet, and an old one's are still the newest then.
        let asked = Instant::now();
        let facts = self.cluster.backend_facts().await.unwrap_or_default();
        let ids: BTreeSet<BackendId> = listed.iter().map(|backend| backend.id).collect();
        {
            let mut heard = self.heard.write();
            for facts in facts {
                let age = facts.age_ms.map(Duration::from_millis);
                let heard = heard.entry(facts.backend).or_default();
                heard.hear(facts.free_bytes, age, asked);
            }
            heard.retain(|id, _| ids.contains(id));
        }
        let mut known = self.known.write();
        known.retain(|id, _| ids.contains(id));
        for backend in listed {
            match known.get_mut(&backend.id) {
                Some(old) if old.backend.address == backend.address => old.backend = backend,
                _ => {
                    let client = self.connector.connect(&backend);
                    known.insert(backend.id, Known { backend, client });
                }
            }
        }
        *refreshed = Some(Instant::now());
        Ok(())
    }

    /// A client of the backend; asks metad when it is not known.
    pub async fn client(&self, id: BackendId) -> Option<Arc<dyn PieceStore>> {
        if let Some(known) = self.known.read().get(&id) {
            return Some(Arc::clone(&known.client));
        }
        if let Err(error) = self.refresh(Duration::from_secs(1)).await {
            tracing::warn!(backend = %id, %error, "cannot learn where a backend is");
        }
        self.known
            .read()
            .get(&id)
            .map(|known| Arc::clone(&known.client))
    }

    /// How gladly a backend is asked: 0 is well, higher is worse.
    pub fn cost(&self, id: BackendId) -> u64 {
        let troubled = self
            .trouble
            .lock()
            .get(&id)
            .is_some_and(|trouble| trouble.until > Instant::now());
        let verdict = self
            .known
            .read()
            .get(&id)
            .map(|known| known.backend.verdict);
        let said = match verdict {
            Some(Verdict::Up) => 0,
            Some(Verdict::Suspect) => 1,
            Some(Verdict::Down) => 4,
            Some(Verdict::Lost) | None => 8,
        };
        said + if troubled { 4 } else { 0 }
    }

    /// True when it should be asked only if nothing else is left.
    pub fn avoided(&self, id: BackendId) -> bool {
        self.cost(id) >= 4
    }

    /// It answered.
    pub fn note_ok(&self, id: BackendId) {
        self.trouble.lock().remove(&id);
    }

    /// It could not be reached or did not answer in time.
    pub fn note_failed(&self, id: BackendId) {
        let mut trouble = self.trouble.lock();
        let now = Instant::now();
        let wait = match trouble.get(&id) {
            // Many requests fail at once; that is one failure.
            Some(known) if known.until > now => return,
            Some(known) => (known.wait * 2).min(AVOID_MAX),
            None => AVOID_FIRST,
        };
        trouble.insert(
            id,
            Trouble {
                until: now + wait,
                wait,
            },
        );
    }

    /// It is full.
    pub fn note_full(&self, id: BackendId) {
        self.full.lock().insert(id, Instant::now() + AVOID_FULL);
    }

    /// Backends that new shards should not go to, by what this client found out.
    pub fn unfit(&self) -> BTreeSet<BackendId> {
        let now = Instant::now();
        let full = self.full.lock();
        let trouble = self.trouble.lock();
        let full = full
            .iter()
            .filter(|(_, until)| **until > now)
            .map(|(id, _)| *id);
        full.chain(
            trouble
                .iter()
                .filter(|(_, trouble)| trouble.until > now)
                .map(|(id, _)| *id),
        )
        .collect()
    }

    /// Those that may take new shards.
    pub fn candidates(&self, without: &BTreeSet<BackendId>) -> Vec<Candidate> {
        let heard = self.heard.read();
        self.known
            .read()
            .values()
            .map(|known| &known.backend)
            .filter(|backend| backend.verdict == Verdict::Up && backend.intent == Intent::Serve)
            .filter(|backend| !without.contains(&backend.id))
            .map(|backend| Candidate {
                backend: backend.id,
                location: backend.location.clone(),
                node: backend.node.clone(),
                free_bytes: heard
                    .get(&backend.id)
                    .and_then(Heard::free_bytes)
                    .unwrap_or(backend.capacity_bytes),
            })
            .collect()
    }

    /// Where a backend is, if it is reachable as far as is known.
    pub fn living_site(&self, id: BackendId) -> Option<Site> {
        let known = self.known.read();
        let backend = &known.get(&id)?.backend;
        let lives = matches!(backend.verdict, Verdict::Up | Verdict::Suspect)
            && backend.intent != Intent::Retire;
        lives.then(|| Site {
            backend: id,
            location: backend.location.clone(),
            node: backend.node.clone(),
        })
    }

    /// Where a backend is, whether it answers now or not; `None` when it is lost or retired.
    pub fn site(&self, id: BackendId) -> Option<Site> {
        let known = self.known.read();
        let backend = &known.get(&id)?.backend;
        let there = backend.verdict != Verdict::Lost && backend.intent != Intent::Retire;
        there.then(|| Site {
            backend: id,
            location: backend.location.clone(),
            node: backend.node.clone(),
        })
    }

    /// What metad last said of a backend.
    pub fn describe(&self, id: BackendId) -> Option<Backend> {
        self.known
            .read()
            .get(&id)
            .map(|known| known.backend.clone())
    }

    /// Bytes of plaintext that fit at this geometry on all backends that are not lost or leaving, up or not, as last heard; `None`
    /// while none is known.
    pub fn plain_room(&self, geometry: Geometry) -> Option<Room> {
        let heard = self.heard.read();
        let known = self.known.read();
        let (mut total, mut free) = (Vec::new(), Vec::new());
        let staying = known
            .values()
            .map(|known| &known.backend)
            .filter(|backend| backend.verdict != Verdict::Lost && backend.intent == Intent::Serve);
        for backend in staying {
            let left = heard
                .get(&backend.id)
                .and_then(Heard::free_bytes)
                .unwrap_or(backend.capacity_bytes);
            total.push(backend.capacity_bytes);
            free.push(left.min(backend.capacity_bytes));
        }
        let plain =
            |bytes: &[u64]| room_per_shard(bytes, geometry).saturating_mul(geometry.data() as u64);
        (!total.is_empty()).then(|| Room {
            total_bytes: plain(&total),
            left_bytes: plain(&free),
        })
    }

    /// So many bytes more were just stored there.
    pub fn note_stored(&self, id: BackendId, bytes: u64) {
        let mut heard = self.heard.write();
        heard.entry(id).or_default().note(bytes, Instant::now());
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::testing::FakeCluster;
    use qsfs_proto::api::BackendFacts;

    const FREE: u64 = 1 << 30;

    fn facts(backend: u64, free_bytes: u64, age_ms: u64) -> BackendFacts {
        BackendFacts {
            backend: BackendId(backend),
            healthy: true,
            free_bytes,
            age_ms: Some(age_ms),
            ..BackendFacts::default()
        }
    }

    fn free(backends: &Backends) -> Vec<u64> {
        let all = backends.candidates(&BTreeSet::new());
        all.iter().map(|candidate| candidate.free_bytes).collect()
    }

    /// A client asked for the room right after it had stored a datafile: the answer was from before, and replaced what it had counted.
    #[tokio::test]
    async fn what_was_stored_meanwhile_is_taken_off_of_facts_that_are_old_when_they_come() {
        let fake = FakeCluster::new("2+2", 1, 1);
        let backends = Backends::new(Arc::new(fake.clone()), Arc::new(fake.clone()));
        fake.0.lock().facts = (1..=4).map(|id| facts(id, FREE, 0)).collect();
        backends.refresh(Duration::ZERO).await.unwrap();
        assert_eq!(free(&backends), [FREE; 4]);
        let geometry: Geometry = "2+2".parse().unwrap();
        let room = backends.plain_room(geometry).unwrap().left_bytes;
        for id in 1..=4 {
            backends.note_stored(BackendId(id), 1_000);
        }
        assert_eq!(free(&backends), [FREE - 1_000; 4]);
        // An hour ago, and not said again.
        fake.0.lock().facts = (1..=3).map(|id| facts(id, FREE, 3_600_000)).collect();
        backends.refresh(Duration::ZERO).await.unwrap();
        assert_eq!(free(&backends), [FREE - 1_000; 4]);
        let left = backends.plain_room(geometry).unwrap().left_bytes;
        assert!(left < room, "{left} of {room}");
    }

    /// While a new leader had not heard the agents yet, or did not answer, full backends were taken for empty ones.
    #[tokio::test]
    async fn a_metad_that_knows_no_facts_takes_none_away() {
        let fake = FakeCluster::new("2+2", 1, 1);
        let backends = Backends::new(Arc::new(fake.clone()), Arc::new(fake.clone()));
        fake.0.lock().facts = (1..=4).map(|id| facts(id, FREE, 0)).collect();
        backends.refresh(Duration::ZERO).await.unwrap();
        fake.0.lock().facts.clear();
        backends.refresh(Duration::ZERO).await.unwrap();
        assert_eq!(free(&backends), [FREE; 4]);
        // Of a backend that is not listed any more nothing is kept.
        fake.0.lock().backends.pop();
        backends.note_stored(BackendId(4), 1);
        backends.refresh(Duration::ZERO).await.unwrap();
        assert_eq!(free(&backends), [FREE; 3]);
        assert_eq!(backends.heard.read().len(), 3);
    }
}
