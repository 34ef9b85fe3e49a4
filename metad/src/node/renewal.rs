//! A node whose log, vote or state is damaged stops voting and comes back as a new member.
//!
//! ```text
//! damage found at open -> mark "renewing" (durable) -> peers: remove me, give me a new id -> damaged files set aside -> start empty
//! ```
//!
//! What is damaged may have been acknowledged, a vote as well as an entry. A node that forgot either must not take part under the
//! id that gave it: another leader could be elected, or something committed, on the strength of a promise nobody remembers.
//! So it never opens that data again (the mark outlives a crash), asks the cluster, which must have a majority without it, to
//! remove its old id, and joins under a new one, like any new metad, copying everything from its peers. With a majority damaged
//! nobody can grant that: the nodes wait and say so, and nothing is answered.

use super::NodeError;
use super::datadir::{DataDir, NodeFile};
use crate::durable::DurableError;
use crate::log::LogError;
use crate::machine::MachineError;
use qsfs_proto::api::{MetadError, Mutation, Role};
use qsfs_proto::ca::CertificateAuthority;
use qsfs_proto::client::{MetadClient, Timing};
use qsfs_proto::identity::Identity;
use qsfs_proto::join::Joiner;
use qsfs_proto::token::JoinToken;
use qsfs_zdb::datafile::DatafileError;
use qsfs_zstor::id::{ClientId, MetadId};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Between two tries to be taken back.
const RETRY: Duration = Duration::from_secs(1);

/// One request of a try.
const REQUEST: Duration = Duration::from_secs(12);

/// Life of the certificate a node gives itself to ask as admin.
const ADMIN_LIFE: Duration = Duration::from_secs(3_600);

/// Lifetime of the token a node makes for itself.
const TOKEN_TTL_MS: u64 = 10 * 60_000;

/// Did bytes that were durable go bad? Then only the peers can help; what else went wrong (a full disk, a wrong permission, a
/// newer format) is for a person, and nothing is given up for it.
pub fn is_damage(error: &NodeError) -> bool {
    match error {
        NodeError::Log(
            LogError::Damaged { .. } | LogError::Hole { .. } | LogError::Gone { .. },
        )
        | NodeError::Log(LogError::Mark(DurableError::Damaged { .. }))
        | NodeError::Machine(
            MachineError::Snapshot { .. } | MachineError::Durable(DurableError::Damaged { .. }),
        ) => true,
        NodeError::Log(LogError::Segment(error)) => matches!(
            error,
            DatafileError::Damaged { .. }
                | DatafileError::NoHeader { .. }
                | DatafileError::Foreign { .. }
        ),
        _ => false,
    }
}

/// Waits until the peers have taken this node back under a new id; answers with who it is now. The data directory is then that of
/// a node that has just joined.
pub(super) async fn renew(
    dir: &DataDir,
    node: &NodeFile,
    authority: &CertificateAuthority,
    shutdown: &CancellationToken,
) -> Result<(NodeFile, Identity), NodeError> {
    let peers = dir.peers()?;
    if peers.is_empty() {
        return Err(NodeError::Alone {
            path: dir.path().to_owned(),
        });
    }
    tracing::error!(
        name = %node.name, old_id = %node.id, ?peers,
        "this metad does not vote and answers nothing until its peers have taken it back under a new id"
    );
    loop {
        let tried = tokio::select! {
            tried = rejoin(node, authority, &peers) => tried,
            () = shutdown.cancelled() => return Err(NodeError::Stopped),
        };
        match tried {
            Ok((id, identity)) => {
                let renewed = NodeFile { id, ..node.clone() };
                dir.replace(node, &renewed, &identity)?;
                tracing::warn!(name = %node.name, old_id = %node.id, new_id = %id, "taken back; copying everything from the peers");
                return Ok((renewed, identity));
            }
            Err(error) => {
                tracing::error!(%error, "the peers did not take this metad back yet; it waits");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = shutdown.cancelled() => return Err(NodeError::Stopped),
        }
    }
}

async fn rejoin(
    node: &NodeFile,
    authority: &CertificateAuthority,
    peers: &[String],
) -> Result<(MetadId, Identity), NodeError> {
    // Every metad holds the cluster's authority: what it issues to itself it could issue to anyone.
    let admin = authority.issue_for(Role::Admin, &format!("metad-{}", node.id), ADMIN_LIFE)?;
    let timing = Timing {
        read: REQUEST,
        mutation: REQUEST,
        ..Timing::default()
    };
    let own = ClientId::from_bytes(rand::random());
    let client = MetadClient::with_timing(peers.to_vec(), &admin, own, timing)?;
    // The old id, and one that an earlier try was given without learning it: names are unique, so they are this node.
    for member in client.members().await? {
        if member.name == node.name || member.address == node.advertise {
            client.remove_member(member.id).await?;
        }
    }
    let token = own_token(authority, peers)?;
    let create = Mutation::CreateToken {
        hash: token.secret_hash(),
        role: Role::Metad,
        ttl_ms: TOKEN_TTL_MS,
    };
    client.mutate(create).await?;
    let joiner = Joiner {
        role: Role::Metad,
        name: node.name.to_string(),
        location: node.location.to_string(),
        address: node.advertise.clone(),
    };
    let (identity, grant) = qsfs_proto::join::join(&token, joiner).await?;
    let incomplete = || MetadError::Invalid("the cluster did not grant what a metad needs".into());
    Ok((grant.metad_id.ok_or_else(incomplete)?, identity))
}

fn own_token(authority: &CertificateAuthority, peers: &[String]) -> Result<JoinToken, NodeError> {
    let (cluster, fingerprint) = (authority.cluster(), authority.fingerprint());
    let mut rng = rand::rng();
    Ok(JoinToken::new(
        Role::Metad,
        cluster,
        fingerprint,
        peers.to_vec(),
        &mut rng,
    )?)
}
