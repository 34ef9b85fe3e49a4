//! Singletons: the cluster's identity and settings, id counters, log time, rot counters.

use super::command::{Genesis, Reply};
use super::kv::{Kv, KvError, RowKey};
use super::row::{Key, Table};
use super::{State, Stop, busy, members, tokens};
use qsfs_proto::api::{Applied, ClusterSettings, MetadError};
use qsfs_proto::ca::{CA_VALIDITY, LEAF_VALIDITY, LEAF_VALIDITY_MIN};
use qsfs_proto::status::RotStatus;
use qsfs_zstor::id::ClusterId;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The cluster as agreed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Identity.
    pub id: ClusterId,
    /// PEM of its certificate authority.
    pub ca_pem: String,
    /// When it was bootstrapped, ms since the epoch.
    pub created_ms: u64,
}

/// The next ids to give out. Ids are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Agents.
    pub agent: u64,
    /// Backends.
    pub backend: u64,
    /// Metad nodes.
    pub metad: u64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            agent: 1,
            backend: 1,
            metad: 2,
        }
    }
}

/// The key of a row of which there is one.
pub(super) fn single(name: &str) -> RowKey {
    Key::of(Table::Single).bytes(name.as_bytes()).done()
}

/// Log time: the running maximum of the entries' times, so that it never goes back.
pub(super) fn advance_time<K: Kv>(state: &mut State<K>, time_ms: u64) -> Result<u64, KvError> {
    let last: u64 = state.busy_kept(busy::Name::Time)?;
    if time_ms > last {
        state.put_busy(busy::Name::Time, time_ms);
    }
    Ok(time_ms.max(last))
}

pub(super) fn initialize<K: Kv>(
    state: &mut State<K>,
    genesis: &Genesis,
    now_ms: u64,
) -> Result<Reply, Stop> {
    if let Some(cluster) = state.cluster()? {
        return Err(MetadError::Exists(format!("cluster {}", cluster.id)).into());
    }
    check(&genesis.settings)?;
    let cluster = Cluster {
        id: genesis.cluster,
        ca_pem: genesis.ca_pem.clone(),
        created_ms: now_ms,
    };
    state.put_row(single("cluster"), &cluster);
    state.put_row(single("settings"), &genesis.settings);
    members::put(state, &genesis.member);
    for (hash, role, ttl_ms) in &genesis.tokens {
        tokens::create(state, hash, *role, *ttl_ms, now_ms)?;
    }
    state.touch().settings = true;
    Ok(Reply::Applied(Applied::Done))
}

/// Is this the row of the settings?
pub(super) fn is_settings(key: &[u8]) -> bool {
    key.first() == Some(&(Table::Single as u8)) && key.get(1..) == Some(b"settings".as_slice())
}

pub(super) fn set<K: Kv>(
    state: &mut State<K>,
    settings: &ClusterSettings,
) -> Result<Applied, Stop> {
    check(settings)?;
    state.put_row(single("settings"), settings);
    state.touch().settings = true;
    Ok(Applied::Done)
}

/// For how long certificates are made from now on.
pub(super) fn set_certificate_life<K: Kv>(
    state: &mut State<K>,
    life_ms: u64,
) -> Result<Applied, Stop> {
    check_certificate_life(Duration::from_millis(life_ms))?;
    state.put_row(single("certificate-life"), &life_ms);
    Ok(Applied::Done)
}

/// Refuses a life that leaves no time to renew, or that the authority could not give.
pub fn check_certificate_life(life: Duration) -> Result<(), MetadError> {
    if (LEAF_VALIDITY_MIN..=CA_VALIDITY).contains(&life) {
        return Ok(());
    }
    let text = format!(
        "certificates must live for {} s to {} days",
        LEAF_VALIDITY_MIN.as_secs(),
        CA_VALIDITY.as_secs() / 86_400
    );
    Err(MetadError::Invalid(text))
}

/// Refuses settings that contradict themselves.
pub fn check(settings: &ClusterSettings) -> Result<(), MetadError> {
    let rules = [
        (
            settings.heartbeat_ms >= 50,
            "heartbeat must be at least 50 ms",
        ),
        (
            settings.suspect_after_ms >= 2 * settings.heartbeat_ms,
            "suspect-after must be at least two heartbeats",
        ),
        (
            settings.down_after_ms >= settings.suspect_after_ms,
            "down-after must not be shorter than suspect-after",
        ),
        (
            settings.lost_after_ms >= settings.down_after_ms,
            "lost-after must not be shorter than down-after",
        ),
        (
            settings.scrub_interval_ms >= 1_000,
            "scrub interval must be at least 1 s",
        ),
        (
            settings.lease_ttl_ms >= 1_000,
            "lease lifetime must be at least 1 s",
        ),
        (
            settings.rebuilds_max >= 1,
            "at least one rebuild must be allowed",
        ),
    ];
    match rules.iter().find(|(holds, _)| !holds) {
        Some((_, rule)) => Err(MetadError::Invalid((*rule).to_owned())),
        None => Ok(()),
    }
}

impl<K: Kv> State<K> {
    /// Log time in ms since the epoch.
    pub fn log_time_ms(&self) -> Result<u64, KvError> {
        self.busy(busy::Name::Time)
    }

    /// The cluster, once initialised.
    pub fn cluster(&self) -> Result<Option<Cluster>, KvError> {
        self.row(&single("cluster"))
    }

    /// Cluster settings.
    pub fn settings(&self) -> Result<ClusterSettings, KvError> {
        Ok(self.row(&single("settings"))?.unwrap_or_default())
    }

    /// For how long certificates are made, in ms.
    pub fn certificate_life_ms(&self) -> Result<u64, KvError> {
        let set: Option<u64> = self.row(&single("certificate-life"))?;
        let default = || u64::try_from(LEAF_VALIDITY.as_millis()).unwrap_or(u64::MAX);
        Ok(set.unwrap_or_else(default))
    }

    /// Rot found and mended.
    pub fn rot(&self) -> Result<RotStatus, KvError> {
        Ok(self.row(&single("rot"))?.unwrap_or_default())
    }

    pub(super) fn put_rot(&mut self, rot: &RotStatus) {
        self.put_row(single("rot"), rot);
    }

    pub(super) fn counters(&self) -> Result<Counters, KvError> {
        Ok(self.row(&single("counters"))?.unwrap_or_default())
    }

    pub(super) fn put_counters(&mut self, counters: &Counters) {
        self.put_row(single("counters"), counters);
    }

    pub(super) fn last_sweep_ms(&mut self) -> Result<u64, KvError> {
        self.busy_kept(busy::Name::Sweep)
    }

    pub(super) fn put_last_sweep_ms(&mut self, now_ms: u64) {
        self.put_busy(busy::Name::Sweep, now_ms);
    }
}
