//! Membership: who joined becomes a learner, and a voter once it caught up.

use super::consensus::Consensus;
use super::network::Network;
use crate::raft::Raft;
use crate::state::command::{Command, MemberRow};
use openraft::{BasicNode, ChangeMembers};
use qsfs_proto::api::{Member, MetadError, VotersLeft};
use qsfs_proto::server::CallError;
use qsfs_zstor::id::MetadId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A learner this close behind the leader votes.
const CAUGHT_UP_ENTRIES: u64 = 100;

/// A peer that replied within is healthy.
pub const HEALTHY_WITHIN: Duration = Duration::from_secs(3);

/// Longest wait for a change of membership.
const CHANGE_DEADLINE: Duration = Duration::from_secs(10);

/// One step towards: everyone who joined votes, and nobody else does. True: not yet so.
pub(super) async fn tend(consensus: &Consensus) -> bool {
    let rows = consensus.machine().read(|state| state.members());
    let Ok(rows) = rows else {
        return false;
    };
    let raft = consensus.raft();
    if let Some(change) = next_step(raft, &rows) {
        tracing::info!(?change, "membership changes");
        let changed =
            tokio::time::timeout(CHANGE_DEADLINE, raft.change_membership(change, true)).await;
        match changed {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the membership did not change"),
            Err(_) => tracing::warn!("the membership change takes long"),
        }
    }
    let metrics = raft.metrics();
    let metrics = metrics.borrow();
    let membership = metrics.membership_config.membership();
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let named: BTreeSet<u64> = rows.iter().map(|row| row.id.0).collect();
    voters != named || membership.nodes().any(|(id, _)| !named.contains(id))
}

fn next_step(raft: &Raft, rows: &[MemberRow]) -> Option<ChangeMembers<u64, BasicNode>> {
    let metrics = raft.metrics();
    let metrics = metrics.borrow();
    let membership = metrics.membership_config.membership();
    if membership.get_joint_config().len() > 1 {
        // The leader that began this change may be gone: whoever leads ends it, once its first half is agreed on.
        let begun = metrics.membership_config.log_id();
        let agreed = *begun <= metrics.last_applied;
        return agreed.then(|| ChangeMembers::AddVoterIds(BTreeSet::new()));
    }
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let known: BTreeMap<u64, &BasicNode> = membership.nodes().map(|(id, n)| (*id, n)).collect();
    for row in rows {
        if !known.contains_key(&row.id.0) {
            let node = BasicNode::new(row.address.clone());
            return Some(ChangeMembers::AddNodes(BTreeMap::from([(row.id.0, node)])));
        }
    }
    // Without its own row (nothing is applied yet) a leader would take everyone out.
    if rows.iter().any(|row| row.id.0 == metrics.id) {
        let named = |id: &u64| rows.iter().any(|row| row.id.0 == *id);
        if let Some(gone) = voters.iter().find(|id| !named(id)) {
            return Some(ChangeMembers::RemoveVoters(BTreeSet::from([*gone])));
        }
        if let Some(gone) = known.keys().find(|id| !named(id)) {
            return Some(ChangeMembers::RemoveNodes(BTreeSet::from([*gone])));
        }
    }
    let replication = metrics.replication.as_ref()?;
    let last = metrics.last_log_index.unwrap_or(0);
    let ready = rows.iter().find(|row| {
        let matched = replication.get(&row.id.0).copied().flatten();
        !voters.contains(&row.id.0)
            && matched.is_some_and(|id| id.index + CAUGHT_UP_ENTRIES >= last)
    })?;
    Some(ChangeMembers::AddVoterIds(BTreeSet::from([ready.id.0])))
}

/// The members as status shows them.
pub(super) fn list(raft: &Raft, network: &Network, rows: &[MemberRow]) -> Vec<Member> {
    let metrics = raft.metrics();
    let metrics = metrics.borrow();
    let membership = metrics.membership_config.membership();
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let member = |row: &MemberRow| Member {
        id: row.id,
        name: row.name.clone(),
        location: row.location.clone(),
        address: row.address.clone(),
        voter: voters.contains(&row.id.0),
        healthy: row.id.0 == metrics.id || network.heard_within(row.id, HEALTHY_WITHIN),
        leader: metrics.current_leader == Some(row.id.0),
    };
    rows.iter().map(member).collect()
}

/// Takes a node out for good: its row says so, and [`tend`], which alone changes Raft's membership, follows. Refused when those who
/// are left could agree on nothing, not even on the removal: it would stay half done, and the cluster would stand.
pub(super) async fn remove(
    consensus: &Consensus,
    members: &[Member],
    id: MetadId,
) -> Result<(), CallError> {
    let mut metrics = consensus.raft().metrics();
    if metrics.borrow().id == id.0 {
        let text = "this metad leads; stop it first, then remove it";
        return Err(MetadError::Invalid(text.into()).into());
    }
    let left = VotersLeft::without(members, id);
    if !left.have_quorum() {
        let silent = members
            .iter()
            .filter(|m| m.voter && !m.healthy && m.id != id);
        let silent: Vec<_> = silent.map(|member| member.name.as_str()).collect();
        let text = format!(
            "without metad {id} only {} of {} voters would answer, and nothing could be agreed on any more; start {names} again, or remove {names} first",
            left.answering,
            left.voters,
            names = silent.join(", ")
        );
        return Err(MetadError::Invalid(text).into());
    }
    consensus.propose_internal(Command::RemoveMetad(id)).await?;
    let gone = metrics.wait_for(|metrics| {
        let membership = metrics.membership_config.membership();
        let named = membership.nodes().any(|(known, _)| *known == id.0);
        !named && membership.get_joint_config().len() == 1
    });
    match tokio::time::timeout(CHANGE_DEADLINE, gone).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) => Err(MetadError::Unknown("this node is stopping".into()).into()),
        Err(_) => Err(MetadError::Unknown("the change takes long".into()).into()),
    }
}
