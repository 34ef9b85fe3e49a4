//! The verbs of metad, in domain types. TLS, limits and the role table are proto's; decisions are the state's and the planner's.

use super::certificates::{self, Shown};
use super::consensus::Consensus;
use super::freshness::Fresh;
use super::leases;
use super::network::Network;
use super::soft::{Soft, Term, WriterReport};
use super::status::certificates::Certificates;
use super::watch::Watchers;
use super::{admission, agents, members, status};
use crate::machine::rows::Rows;
use crate::placing;
use crate::state::State;
use crate::state::command::{Command, Reply, Request};
use crate::state::kv::KvError;
use async_trait::async_trait;
use qsfs_proto::api::{
    Agent, AgentOrder, AgentReport, Applied, Backend, BackendFacts, ClusterSettings, Freshness,
    Intent, JoinGrant, JoinRequest, Member, MetadError, Mutation, PlacementAnswer, Role, TokenInfo,
    Verdict, Volume,
};
use qsfs_proto::ca::CertificateAuthority;
use qsfs_proto::identity::PeerIdentity;
use qsfs_proto::server::{CallError, Consistency, MetadService, RequestId, Watch};
use qsfs_proto::status::Status;
use qsfs_proto::watch::WatchRequest;
use qsfs_zstor::id::{AgentId, BackendId, DatafileId, MetadId, Stream, VolumeId, VolumeName};
use qsfs_zstor::placement::Candidate;
use qsfs_zstor::record::EncodingRecord;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Records read at once while a stream is filtered out of a listing.
const SCAN_PAGE: usize = 1_024;

/// What answers.
pub(crate) struct Service {
    consensus: Consensus,
    soft: Arc<Soft>,
    network: Network,
    authority: CertificateAuthority,
    fresh: Fresh,
    watchers: Arc<Watchers>,
    counting: status::Counting,
    shown: Shown,
}

fn damaged(error: &KvError) -> CallError {
    tracing::error!(%error, "the state cannot be read");
    MetadError::Unreachable(error.to_string()).into()
}

impl Service {
    pub(crate) fn new(
        consensus: Consensus,
        soft: Arc<Soft>,
        network: Network,
        authority: CertificateAuthority,
        (fresh, watchers): (Fresh, Arc<Watchers>),
    ) -> Self {
        Self {
            consensus,
            soft,
            network,
            authority,
            fresh,
            watchers,
            counting: status::Counting::default(),
            shown: Shown::default(),
        }
    }

    pub(super) fn authority(&self) -> &CertificateAuthority {
        &self.authority
    }

    pub(super) fn consensus(&self) -> &Consensus {
        &self.consensus
    }

    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&State<&Rows>) -> Result<T, KvError>,
    ) -> Result<T, CallError> {
        self.consensus.machine().read(read).map_err(|e| damaged(&e))
    }

    /// For how long certificates are made now.
    pub(super) fn certificate_life(&self) -> Result<Duration, CallError> {
        let life_ms = self.read(|state| state.certificate_life_ms())?;
        Ok(Duration::from_millis(life_ms))
    }

    fn certificates(&self) -> Result<Certificates, CallError> {
        let (agents, life_ms) =
            self.read(|state| Ok((state.agents()?, state.certificate_life_ms()?)))?;
        let places = agents.iter().map(|a| format!("{}/{}", a.location, a.node));
        let shown = places.filter_map(|place| Some((self.shown.of(&place)?, place)));
        Ok(Certificates {
            authority_expires_ms: self.authority.expires_ms(),
            life_ms,
            agents: shown.map(|(ends_ms, place)| (place, ends_ms)).collect(),
        })
    }

    fn known_volume(&self, id: VolumeId) -> Result<Volume, CallError> {
        self.read(|state| state.volume(id))?
            .ok_or_else(|| MetadError::NoSuchVolume(id.to_string()).into())
    }

    fn check_agent(&self, caller: &PeerIdentity, id: AgentId) -> Result<(), CallError> {
        let agent = self.read(|state| state.agent(id))?;
        let Some(agent) = agent else {
            return Err(MetadError::NotFound(format!("agent {id}")).into());
        };
        if caller.agent_place() == Some((agent.location, agent.node)) {
            return Ok(());
        }
        let text = format!("agent {id} is not {}", caller.subject);
        Err(MetadError::Denied(text).into())
    }

    /// What only the state knows of who may say what: an agent speaks for itself alone.
    fn check_mutation(&self, caller: &PeerIdentity, mutation: &Mutation) -> Result<(), CallError> {
        if caller.role != Role::Agent {
            return Ok(());
        }
        match mutation {
            Mutation::RegisterAgent { location, node } => {
                if caller.agent_place() == Some((location.clone(), node.clone())) {
                    return Ok(());
                }
                let text = format!("{location}/{node} is not {}", caller.subject);
                Err(MetadError::Denied(text).into())
            }
            Mutation::RegisterBackend { agent, .. } => self.check_agent(caller, *agent),
            Mutation::SwapShard { to, .. } => match self.read(|state| state.backend(*to))? {
                Some(backend) => self.check_agent(caller, backend.agent),
                None => Err(MetadError::NotFound(format!("backend {to}")).into()),
            },
            _ => Ok(()),
        }
    }

    /// What the state cannot know of a lease that is to be taken from its holder: how long this leader has waited ([`leases`]).
    async fn check_lease(&self, mutation: &Mutation, request: &Request) -> Result<(), CallError> {
        let Some(id) = leases::takes(mutation) else {
            return Ok(());
        };
        // Whose the lease is must be known as it is now: a new leader may not have applied yet what the one before granted.
        self.consensus.barrier().await?;
        let found = self.read(|state| {
            // A retry is answered as the first time, whoever holds the lease by now.
            if state.has_answered(request)? {
                return Ok(None);
            }
            Ok(state.volume(id)?.zip(Some(state.settings()?)))
        })?;
        let Some((volume, settings)) = found else {
            return Ok(());
        };
        let refused = self.soft.with(|term| term.refused.get(request));
        if let Some(refused) = refused.flatten() {
            return Err(refused.into());
        }
        let ttl = Duration::from_millis(settings.lease_ttl_ms);
        let now = Instant::now();
        let may_take = || {
            let waited = |term: &mut Term| term.holders.may_take(id, ttl, now);
            self.soft.with(waited).unwrap_or(false)
        };
        leases::check(mutation, &volume, may_take).map_err(|refused| {
            self.soft
                .with(|term| term.refused.note(request, refused.clone()));
            refused.into()
        })
    }

    /// A writer's report is for status alone: it stays in the leader's memory and out of the log.
    fn keep_report(&self, mutation: &mut Mutation) -> Option<(VolumeId, WriterReport)> {
        match mutation {
            Mutation::RenewLease {
                volume,
                epoch,
                report,
            } => {
                let writer = WriterReport {
                    report: std::mem::take(report),
                    epoch: *epoch,
                    at_ms: self.consensus.now_ms(),
                };
                Some((*volume, writer))
            }
            _ => None,
        }
    }
}

/// Backends that may take a new shard, with what they said of their room.
fn candidates(soft: &Soft, backends: &[Backend]) -> Vec<Candidate> {
    let serving = backends.iter().filter(|backend| {
        backend.intent == Intent::Serve && matches!(backend.verdict, Verdict::Up | Verdict::Suspect)
    });
    serving
        .map(|backend| {
            let facts = soft.with(|term| term.facts.backends.get(&backend.id).cloned());
            // Never heard by this leader: its capacity is the best guess; a push that fails asks again.
            let free = facts
                .flatten()
                .map_or(backend.capacity_bytes, |facts| facts.free_bytes);
            placing::candidate(backend, free)
        })
        .collect()
}

#[async_trait]
impl MetadService for Service {
    async fn join(&self, request: JoinRequest) -> Result<JoinGrant, CallError> {
        self.consensus.barrier().await?;
        admission::join(self, request).await
    }

    async fn mutate(
        &self,
        caller: &PeerIdentity,
        id: RequestId,
        mut mutation: Mutation,
    ) -> Result<Applied, CallError> {
        if !self.consensus.leads() {
            // Its answer names the leader; nothing is proposed by a node that does not lead.
            self.consensus.barrier().await?;
        }
        self.check_mutation(caller, &mutation)?;
        let report = self.keep_report(&mut mutation);
        let request = Request {
            client: id.client,
            session: id.session,
            sequence: id.sequence,
            oldest_pending: id.oldest_pending,
        };
        self.check_lease(&mutation, &request).await?;
        let (asked, prolongs) = (Instant::now(), leases::prolongs(&mutation));
        let command = Command::Mutation(mutation);
        let proposed = self.consensus.propose(command, Some(request)).await;
        // Without an answer it may have been granted.
        if let Some(volume) = prolongs
            && !matches!(proposed, Err(CallError::Decided(_)))
        {
            self.soft.with(|term| term.holders.heard(volume, asked));
        }
        match proposed? {
            Reply::Applied(applied) => {
                if let Some((volume, writer)) = report {
                    self.soft.with(|term| term.writers.insert(volume, writer));
                }
                Ok(applied)
            }
            other => Err(MetadError::Unknown(format!("answered {other:?}")).into()),
        }
    }

    async fn barrier(&self, consistency: Consistency) -> Result<Freshness, CallError> {
        match consistency {
            Consistency::Linearizable => Ok(Freshness {
                applied: self.consensus.barrier().await?,
                age_ms: Some(0),
            }),
            Consistency::Stale => {
                // First the age: what is applied meanwhile only makes the answer newer.
                let age = self.fresh.age();
                let applied = self.consensus.machine().raft_row().applied;
                Ok(Freshness {
                    applied: applied.map_or(0, |id| id.index),
                    // At most: a part of a millisecond is a whole one.
                    age_ms: age.map(|age| {
                        u64::try_from(age.as_micros().div_ceil(1_000)).unwrap_or(u64::MAX)
                    }),
                })
            }
        }
    }

    async fn volume(&self, _: &PeerIdentity, name: &VolumeName) -> Result<Volume, CallError> {
        let found = self.read(|state| match state.volume_id(name)? {
            Some(id) => state.volume(id),
            None => Ok(None),
        })?;
        found.ok_or_else(|| MetadError::NoSuchVolume(name.to_string()).into())
    }

    async fn volume_by_id(&self, _: &PeerIdentity, id: VolumeId) -> Result<Volume, CallError> {
        self.known_volume(id)
    }

    async fn volumes(&self, _: &PeerIdentity) -> Result<Vec<Volume>, CallError> {
        self.read(|state| state.volumes())
    }

    async fn records(
        &self,
        _: &PeerIdentity,
        volume: VolumeId,
        datafiles: &[DatafileId],
    ) -> Result<Vec<EncodingRecord>, CallError> {
        self.known_volume(volume)?;
        self.read(|state| {
            let found = datafiles.iter().map(|id| state.record(volume, *id));
            found.filter_map(Result::transpose).collect()
        })
    }

    async fn list_records(
        &self,
        _: &PeerIdentity,
        volume: VolumeId,
        stream: Option<Stream>,
        after: DatafileId,
        limit: u32,
    ) -> Result<Vec<EncodingRecord>, CallError> {
        self.known_volume(volume)?;
        let (mut after, limit) = (after, limit as usize);
        let mut found = Vec::new();
        loop {
            let page = self.read(|state| state.records_after(volume, after, SCAN_PAGE))?;
            let full = page.len() == SCAN_PAGE;
            after = page.last().map_or(after, |last| last.datafile);
            let wanted = page
                .into_iter()
                .filter(|record| stream.is_none_or(|stream| stream == record.stream));
            found.extend(wanted.take(limit - found.len()));
            if !full || found.len() >= limit {
                return Ok(found);
            }
            tokio::task::yield_now().await;
        }
    }

    async fn backends(&self, _: &PeerIdentity) -> Result<Vec<Backend>, CallError> {
        self.read(|state| state.backends())
    }

    async fn backend_facts(&self, _: &PeerIdentity) -> Result<Vec<BackendFacts>, CallError> {
        let now_ms = self.consensus.now_ms();
        let facts = self.soft.with(|term| agents::facts(term, now_ms));
        Ok(facts.unwrap_or_default())
    }

    async fn agents(&self, _: &PeerIdentity) -> Result<Vec<Agent>, CallError> {
        self.read(|state| state.agents())
    }

    async fn backend_shards(
        &self,
        _: &PeerIdentity,
        backend: BackendId,
        (volume, datafile): (VolumeId, DatafileId),
        limit: u32,
    ) -> Result<Vec<(EncodingRecord, u32)>, CallError> {
        let after = Some((volume, datafile, u32::from(u8::MAX)));
        self.read(|state| {
            let mut page = state.shards_on(backend, after, limit as usize)?;
            // All shards of the last record belong to the page.
            while let Some(last) = page.last().copied() {
                let next = state.shards_on(backend, Some(last), 1)?;
                match next.first() {
                    Some(more) if (more.0, more.1) == (last.0, last.1) => page.push(*more),
                    _ => break,
                }
            }
            let mut found = Vec::with_capacity(page.len());
            for (volume, datafile, shard) in page {
                if let Some(record) = state.record(volume, datafile)? {
                    found.push((record, shard));
                }
            }
            Ok(found)
        })
    }

    async fn placement(
        &self,
        _: &PeerIdentity,
        volume: VolumeId,
        shard_bytes: u64,
    ) -> Result<PlacementAnswer, CallError> {
        let volume = self.known_volume(volume)?;
        let backends = self.read(|state| state.backends())?;
        let candidates = candidates(&self.soft, &backends);
        placing::place_new(&volume.policy, shard_bytes, &candidates)
            .map_err(|missing| MetadError::PolicyUnmet(missing).into())
    }

    async fn status(&self, _: &PeerIdentity) -> Result<Status, CallError> {
        let certificates = self.certificates()?;
        let asked = (&self.counting, &certificates);
        status::gather(&self.consensus, &self.soft, &self.network, asked)
            .await
            .map_err(|error| damaged(&error))
    }

    async fn members(&self, _: &PeerIdentity) -> Result<Vec<Member>, CallError> {
        let rows = self.read(|state| state.members())?;
        Ok(members::list(self.consensus.raft(), &self.network, &rows))
    }

    async fn settings(&self, _: &PeerIdentity) -> Result<ClusterSettings, CallError> {
        self.read(|state| state.settings())
    }

    async fn tokens(&self, _: &PeerIdentity) -> Result<Vec<TokenInfo>, CallError> {
        self.read(|state| state.tokens())
    }

    async fn issue_client_certificate(
        &self,
        _: &PeerIdentity,
        csr_pem: &str,
        volume: Option<VolumeId>,
    ) -> Result<String, CallError> {
        let subject = match volume {
            Some(id) => self.known_volume(id)?.id.to_string(),
            None => "*".to_owned(),
        };
        self.authority
            .sign(csr_pem, Role::Client, &subject, self.certificate_life()?)
            .map_err(|error| MetadError::Invalid(error.to_string()).into())
    }

    async fn renew_certificate(
        &self,
        caller: &PeerIdentity,
        csr_pem: &str,
    ) -> Result<String, CallError> {
        certificates::renew(self, caller, csr_pem)
    }

    async fn certificate_life_ms(&self, _: &PeerIdentity) -> Result<u64, CallError> {
        self.read(|state| state.certificate_life_ms())
    }

    fn heard_certificate(&self, caller: &PeerIdentity, expires_ms: u64) {
        self.shown.note(caller, expires_ms);
    }

    async fn scrub(&self, _: &PeerIdentity, backend: Option<BackendId>) -> Result<(), CallError> {
        agents::scrub(&self.soft, backend)
    }

    async fn remove_member(&self, _: &PeerIdentity, member: MetadId) -> Result<(), CallError> {
        let rows = self.read(|state| state.members())?;
        let all = members::list(self.consensus.raft(), &self.network, &rows);
        members::remove(&self.consensus, &all, member).await
    }

    async fn transfer_leader(&self, _: &PeerIdentity, to: MetadId) -> Result<(), CallError> {
        let text = format!(
            "leadership cannot be handed to metad {to} in this version; stop the leading metad and another takes over"
        );
        Err(MetadError::Invalid(text).into())
    }

    async fn watch(
        &self,
        caller: &PeerIdentity,
        request: WatchRequest,
    ) -> Result<Watch, CallError> {
        let whose = format!("{} {}", caller.role, caller.subject);
        self.watchers.open(&whose, request)
    }

    async fn agent_session(
        &self,
        caller: &PeerIdentity,
        agent: AgentId,
        reports: mpsc::Receiver<AgentReport>,
    ) -> Result<mpsc::Receiver<AgentOrder>, CallError> {
        self.consensus.barrier().await?;
        self.check_agent(caller, agent)?;
        agents::open(&self.consensus, &self.soft, agent, reports)
    }
}
