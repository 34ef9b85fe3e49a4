//! The whole status, per the contract for scripts. Gathered here; what it means is decided in [`findings`], pure.

pub mod certificates;
mod counting;
pub mod findings;
mod metads;
mod time;

use super::consensus::Consensus;
use super::facts::NodeFacts;
use super::members;
use super::network::Network;
use super::soft::{Soft, Term, WriterReport};
use crate::machine::rows::Rows;
use crate::plan::index::{Index, VolumeHealth};
use crate::state::State;
use crate::state::backends::BackendLoad;
use crate::state::command::MemberRow;
use crate::state::kv::KvError;
use crate::state::volumes::VolumeTotals;
use certificates::Certificates;
pub(super) use counting::Counting;
use findings::{Picture, VolumePicture};
use qsfs_proto::api::{Backend, BackendFacts, Intent, Member, Verdict, Volume};
use qsfs_proto::status::{
    BackendStatus, LossBudget, QuorumStatus, ResilverStatus, RotStatus, SCHEMA_VERSION, Status,
    StatusVerdict, VolumeStatus,
};
use std::collections::BTreeMap;

/// A writer's report older than this says nothing about now.
pub const REPORT_FRESH_MS: u64 = 30_000;

/// What the leader alone knows, copied out of its memory.
struct LeaderView {
    facts: BTreeMap<qsfs_zstor::id::BackendId, BackendFacts>,
    writers: BTreeMap<qsfs_zstor::id::VolumeId, WriterReport>,
    health: BTreeMap<qsfs_zstor::id::VolumeId, VolumeHealth>,
    resilver: ResilverStatus,
    bad_shards: u64,
    leader_since_ms: Option<u64>,
    /// Not all records were looked at yet.
    counting: bool,
}

/// What the state holds.
struct StateView {
    volumes: Vec<(Volume, VolumeTotals)>,
    backends: Vec<(Backend, BackendLoad)>,
    members: Vec<MemberRow>,
    rot: RotStatus,
}

pub(super) async fn gather(
    consensus: &Consensus,
    soft: &Soft,
    network: &Network,
    (counting, certificates): (&Counting, &Certificates),
) -> Result<Status, KvError> {
    let now_ms = consensus.now_ms();
    let view = match soft.with(|term| leader_view(term, now_ms)) {
        Some(view) => view,
        None => follower_view(consensus, counting).await,
    };
    let state = consensus.machine().read(state_view)?;
    let members = members::list(consensus.raft(), network, &state.members);
    let nodes: Vec<_> = members
        .iter()
        .map(|member| network.facts_of(member.id))
        .collect();
    Ok(assemble(
        now_ms,
        &view,
        &state,
        (&members, &nodes, certificates),
        quorum(consensus, &members),
    ))
}

fn state_view(state: &State<&Rows>) -> Result<StateView, KvError> {
    let mut volumes = Vec::new();
    for volume in state.volumes()? {
        let totals = state.volume_totals(volume.id)?;
        volumes.push((volume, totals));
    }
    let mut backends = Vec::new();
    for backend in state.backends()? {
        let load = state.backend_load(backend.id)?;
        backends.push((backend, load));
    }
    Ok(StateView {
        volumes,
        backends,
        members: state.members()?,
        rot: state.rot()?,
    })
}

fn leader_view(term: &mut Term, now_ms: u64) -> LeaderView {
    let (pending_shards, bad_shards) = term.index.pending_shards();
    let (bytes_per_s, shard_bytes) = term.rate(now_ms);
    let eta_s = (pending_shards * shard_bytes).checked_div(bytes_per_s);
    LeaderView {
        facts: term.facts.backends.clone(),
        writers: term.writers.clone(),
        health: health(&term.index),
        resilver: ResilverStatus {
            pending_shards: pending_shards.max(term.index.pending_records() as u64),
            running: term.facts.running.len() as u64,
            bytes_per_s,
            eta_s: eta_s.filter(|_| pending_shards > 0),
            waiting_for: term.plan.waiting_for.clone(),
        },
        bad_shards,
        leader_since_ms: Some(term.facts.leader_since_ms),
        counting: term.index.is_counting(),
    }
}

/// A node that does not lead has no facts.
async fn follower_view(consensus: &Consensus, counting: &Counting) -> LeaderView {
    let count = counting.ask(consensus.machine()).await;
    let counted = count.is_some();
    let count = count.unwrap_or_default();
    LeaderView {
        facts: BTreeMap::new(),
        writers: BTreeMap::new(),
        health: count.health.clone(),
        resilver: ResilverStatus {
            pending_shards: count.pending_shards,
            waiting_for: Some("this metad does not lead: what runs is not known here".into()),
            ..ResilverStatus::default()
        },
        bad_shards: count.bad_shards,
        leader_since_ms: None,
        counting: !counted,
    }
}

fn health(index: &Index) -> BTreeMap<qsfs_zstor::id::VolumeId, VolumeHealth> {
    index
        .volumes()
        .map(|v| (v.id, index.health(v.id)))
        .collect()
}

fn quorum(consensus: &Consensus, members: &[Member]) -> QuorumStatus {
    let metrics = consensus.raft().metrics();
    let metrics = metrics.borrow();
    let voters = || members.iter().filter(|member| member.voter);
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let leader = members.iter().find(|member| member.leader);
    QuorumStatus {
        leader: leader.map_or(String::new(), |member| member.name.to_string()),
        voters: count(voters().count()),
        healthy: count(voters().filter(|member| member.healthy).count()),
        term: metrics.current_term,
        applied: metrics.last_applied.map_or(0, |id| id.index),
    }
}

fn assemble(
    now_ms: u64,
    view: &LeaderView,
    state: &StateView,
    (members, nodes, certificates): (&[Member], &[Option<NodeFacts>], &Certificates),
    quorum: QuorumStatus,
) -> Status {
    let volumes: Vec<_> = state
        .volumes
        .iter()
        .map(|(volume, totals)| volume_picture(volume, totals, view, now_ms))
        .collect();
    let picture = Picture {
        backends: &state.backends,
        facts: &view.facts,
        volumes: &volumes,
        members,
        nodes,
        certificates,
        now_ms,
        leads: view.leader_since_ms.is_some(),
        counting: view.counting,
        bad_shards: view.bad_shards,
        resilver: &view.resilver,
    };
    let mut found = findings::find(&picture);
    // Worst first; equal ones in the order they were found.
    found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    let verdict = found
        .first()
        .map_or(StatusVerdict::Ok, |worst| worst.severity);
    Status {
        schema_version: SCHEMA_VERSION,
        verdict,
        findings: found,
        quorum,
        volumes: volumes.into_iter().map(|volume| volume.status).collect(),
        resilver: view.resilver.clone(),
        rot: state.rot.clone(),
        backends: state
            .backends
            .iter()
            .map(|(backend, load)| backend_status(backend, load, view.facts.get(&backend.id)))
            .collect(),
    }
}

fn volume_picture(
    volume: &Volume,
    totals: &VolumeTotals,
    view: &LeaderView,
    now_ms: u64,
) -> VolumePicture {
    let health = view.health.get(&volume.id).cloned().unwrap_or_default();
    let report = view
        .writers
        .get(&volume.id)
        .filter(|writer| writer.epoch == volume.epoch);
    let age_ms = report.map(|writer| now_ms.saturating_sub(writer.at_ms));
    let fresh = age_ms.is_some_and(|age_ms| age_ms <= REPORT_FRESH_MS);
    // A new leader has heard nobody yet: it says so only after the time a report may take.
    let listening = view
        .leader_since_ms
        .is_some_and(|since| now_ms.saturating_sub(since) > REPORT_FRESH_MS);
    let writes = volume.lease.is_some();
    let untouched = LossBudget {
        locations: volume.policy.survive_locations,
        nodes: volume.policy.survive_nodes,
        backends: u32::try_from(volume.policy.geometry.parity()).unwrap_or(0),
    };
    let said = report
        .map(|writer| writer.report.clone())
        .unwrap_or_default();
    VolumePicture {
        status: VolumeStatus {
            name: volume.name.to_string(),
            policy: volume.policy.to_string(),
            epoch: volume.epoch.0,
            writer: volume.lease.as_ref().map(|lease| lease.holder.clone()),
            head: volume.head.datafile.0,
            datafiles: totals.datafiles,
            below_policy: health.below_policy,
            unreadable: health.unreadable,
            bytes: totals.bytes,
            at_risk_bytes: said.at_risk_bytes,
            at_risk_age_s: said.at_risk_age_s,
            loss_budget: health.budget().unwrap_or(untouched),
        },
        push_interval_ms: volume.settings.push_interval_ms,
        // Who has unmounted is not blocked any more, whatever was said last.
        push_blocked: if writes {
            said.push_blocked
        } else {
            String::new()
        },
        silent_writer_s: (writes && !fresh && (listening || age_ms.is_some()))
            .then(|| age_ms.map(|age_ms| age_ms / 1_000)),
    }
}

fn backend_status(
    backend: &Backend,
    load: &BackendLoad,
    facts: Option<&BackendFacts>,
) -> BackendStatus {
    let state = match (backend.intent, backend.verdict) {
        (Intent::Retire, _) => "retired",
        (_, Verdict::Lost) => "lost",
        (_, Verdict::Down) => "down",
        (Intent::Drain, _) => "draining",
        (_, Verdict::Suspect) => "suspect",
        (_, Verdict::Up) => "up",
    };
    let scrubbed = facts.map(|facts| facts.last_scrub_ms).filter(|at| *at > 0);
    BackendStatus {
        id: backend.id.0,
        location: backend.location.to_string(),
        node: backend.node.to_string(),
        state: state.to_owned(),
        used_bytes: facts.map_or(load.bytes, |facts| facts.used_bytes),
        capacity_bytes: backend.capacity_bytes,
        shards: load.shards,
        last_scrub: scrubbed.map(time::rfc3339),
    }
}
