//! After the loss of the majority: a cluster begins anew with one node, from a backup or from what one survivor holds.
//!
//! ```text
//! backup or survivor -> rows -> a new metad id, all old ids removed -> a log of its own -> snapshot, log cut -> others join
//! ```
//!
//! The ids are new and the log begins empty, so that no node of the old cluster can ever vote in this one, or the reverse. The log
//! is cut before anybody joins: who joins must take the snapshot, for the log alone does not lead to this state.

use crate::backup;
use crate::machine::rows::Fill;
use crate::machine::{Machine, MachineError};
use crate::node::datadir::{DataDir, NodeFile};
use crate::node::{self, Core, NodeError};
use crate::options::{BOOTSTRAP_TOKEN_TTL_MS, RecoverOptions, Recovery, RestoreOptions, Restored};
use crate::raft::Raft;
use crate::state::command::{Command, Entry, MemberRow};
use crate::state::kv::KvError;
use openraft::BasicNode;
use qsfs_proto::api::{Mutation, Role, Secret};
use qsfs_proto::ca::CertificateAuthority;
use qsfs_proto::context::Context;
use qsfs_proto::identity::Identity;
use qsfs_proto::token::JoinToken;
use qsfs_zstor::id::MetadId;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Metad tokens made for those who shall join again.
const METAD_TOKENS: usize = 2;
/// Name of the admin made for it.
const ADMIN_NAME: &str = "admin";
/// Longest wait for Raft of one node to do anything.
const DEADLINE: Duration = Duration::from_secs(60);
/// What a survivor holds, while its directory is made anew.
const RECOVERED: &str = "recovered.backup";

fn failed(error: impl std::fmt::Display) -> NodeError {
    NodeError::Raft(error.to_string())
}

/// Makes the first metad of the cluster again, from a backup. Run it with [`serve`](fn@crate::serve); the others join by the tokens.
pub async fn restore(options: RestoreOptions) -> Result<Restored, NodeError> {
    let advertise = crate::birth::advertised(&options.listen, options.advertise.as_deref())?;
    let facts = backup::verify(&options.backup)?;
    let key_path = backup::key_path(&options.backup);
    let key = std::fs::read_to_string(&key_path).map_err(|source| NodeError::Io {
        step: "read",
        path: key_path,
        source,
    })?;
    let dir = DataDir::lock_new(&options.data)?;
    let member = |id| MemberRow {
        id,
        name: options.name.clone(),
        location: options.location.clone(),
        address: advertise.clone(),
        removed: false,
    };
    let (id, ca_pem) = build(dir.path(), &options.backup, member)?;
    let authority = CertificateAuthority::from_pem(&ca_pem, &Secret(key))?;
    let node = NodeFile::new(
        facts.cluster,
        id,
        (options.name.clone(), options.location.clone()),
        (options.listen.clone(), advertise.clone()),
    );
    let identity = authority.issue(Role::Metad, &id.to_string())?;
    let tokens = begin(&dir, &node, &identity, &authority).await?;
    dir.initialise(&node, &identity, authority.key_pem())?;
    let admin = authority.issue(Role::Admin, ADMIN_NAME)?;
    Ok(Restored {
        context: Context::new(vec![advertise], admin, None),
        tokens,
        facts,
    })
}

/// Makes a cluster of one out of the stopped survivor of a lost majority. Without `apply` it only says what would happen.
pub async fn recover(options: RecoverOptions) -> Result<Recovery, NodeError> {
    let dir = DataDir::lock(&options.data)?;
    let (node, identity, authority) = dir.load()?;
    let saved = dir.path().join(RECOVERED);
    // A recovery that was interrupted goes on from what it had saved: the old memory may be set aside already.
    if !dir.is_renewing() || !saved.exists() {
        let core = node::open_stopped(dir.path(), node.cluster)?;
        let (log, machine) = core;
        let applied = machine.raft_row().applied.map_or(0, |id| id.index);
        let last = log.bounds().1.map_or(0, |id| id.index);
        if !options.apply {
            return Ok(Recovery::Plan {
                name: node.name,
                applied: last.max(applied),
                term: log.bounds().1.map_or(0, |id| id.leader_id.term),
            });
        }
        // Everything it has, agreed on or not: what it was the only one to hold is better kept than lost.
        let from = machine.raft_row().applied.map_or(0, |id| id.index + 1);
        let mut next = from;
        loop {
            let entries = log.entries(next)?;
            let Some(newest) = entries.last() else { break };
            next = newest.log_id.index + 1;
            if machine.apply(entries)?.1 != Fill::Room {
                machine.relieve()?;
            }
        }
        machine.flush()?;
        if saved.exists() {
            std::fs::remove_file(&saved).map_err(MachineError::io("remove", &saved))?;
        }
        machine.copy_to(&saved)?;
    }
    let facts = backup::verify(&saved)?;
    dir.begin_renewal("recovered from one survivor")?;
    dir.set_aside(&node)?;
    let member = |id| MemberRow {
        id,
        name: node.name.clone(),
        location: node.location.clone(),
        address: node.advertise.clone(),
        removed: false,
    };
    let (id, _) = build(dir.path(), &saved, member)?;
    drop(identity);
    let renewed = NodeFile { id, ..node.clone() };
    let identity = authority.issue(Role::Metad, &id.to_string())?;
    let tokens = begin(&dir, &renewed, &identity, &authority).await?;
    dir.become_node(&renewed, &identity)?;
    std::fs::remove_file(&saved).map_err(MachineError::io("remove", &saved))?;
    let admin = authority.issue(Role::Admin, ADMIN_NAME)?;
    Ok(Recovery::Done(Box::new(Restored {
        context: Context::new(vec![node.advertise], admin, None),
        tokens,
        facts,
    })))
}

/// Fills an empty memory from a backup; answers the node's new id and the authority's certificate.
fn build(
    dir: &Path,
    from: &Path,
    member: impl FnOnce(MetadId) -> MemberRow,
) -> Result<(MetadId, String), NodeError> {
    let machine = Machine::reborn(dir, from, member)?;
    let (members, cluster) = machine
        .read(|state| Ok::<_, KvError>((state.members()?, state.cluster()?)))
        .map_err(MachineError::from)?;
    let own = members.first().ok_or_else(|| failed("no member"))?;
    let cluster = cluster.ok_or_else(|| failed("the backup names no cluster"))?;
    Ok((own.id, cluster.ca_pem))
}

/// A Raft of one on the new memory: its first entries, a snapshot, and a log that begins after it.
async fn begin(
    dir: &DataDir,
    node: &NodeFile,
    identity: &Identity,
    authority: &CertificateAuthority,
) -> Result<Vec<JoinToken>, NodeError> {
    let core = node::start(dir, node, identity).await?;
    let begun = first_entries(&core, node, authority).await;
    let stopped = core.raft.shutdown().await;
    stopped.map_err(failed)?;
    core.machine.flush()?;
    begun
}

async fn first_entries(
    core: &Core,
    node: &NodeFile,
    authority: &CertificateAuthority,
) -> Result<Vec<JoinToken>, NodeError> {
    let raft = &core.raft;
    let members = BTreeMap::from([(node.id.0, BasicNode::new(node.advertise.clone()))]);
    raft.initialize(members).await.map_err(failed)?;
    let leads = raft.wait(Some(DEADLINE));
    let leads = leads.current_leader(node.id.0, "the only metad leads");
    leads.await.map_err(failed)?;
    let mut tokens = Vec::new();
    for _ in 0..METAD_TOKENS {
        let token = JoinToken::new(
            Role::Metad,
            authority.cluster(),
            authority.fingerprint(),
            vec![node.advertise.clone()],
            &mut rand::rng(),
        )?;
        let create = Mutation::CreateToken {
            hash: token.secret_hash(),
            role: Role::Metad,
            ttl_ms: BOOTSTRAP_TOKEN_TTL_MS,
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now_ms = now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(0));
        let entry = Entry::internal(now_ms, Command::Mutation(create));
        let written = raft.client_write(entry.into()).await.map_err(failed)?;
        match written.data.0 {
            Some(Ok(_)) => tokens.push(token),
            Some(Err(refusal)) => return Err(refusal.into()),
            None => return Err(failed("a token was not applied")),
        }
    }
    cut_log(raft).await?;
    Ok(tokens)
}

async fn cut_log(raft: &Raft) -> Result<(), NodeError> {
    let upto = raft.metrics().borrow().last_applied;
    let upto = upto.ok_or_else(|| failed("nothing is applied"))?;
    raft.trigger().snapshot().await.map_err(failed)?;
    let waiting = raft.wait(Some(DEADLINE));
    let taken = waiting.metrics(
        |metrics| metrics.snapshot >= Some(upto),
        "a snapshot of all",
    );
    taken.await.map_err(failed)?;
    raft.trigger().purge_log(upto.index).await.map_err(failed)?;
    let cut = waiting.metrics(
        |metrics| metrics.purged >= Some(upto),
        "the log begins after it",
    );
    cut.await.map_err(failed)?;
    Ok(())
}
