//! Which role may call which verb. The only place that says so; every match is exhaustive, so that a new verb does not compile until
//! it has an answer here.
//!
//! A client certificate bound to one volume may touch only that volume. metad nodes call nothing here: they have the Raft channel.

use crate::api::{MetadError, Mutation, Role};
use crate::identity::{PeerIdentity, VolumeScope};
use crate::verb::Query;
use crate::watch::{Change, WatchRequest};
use qsfs_zstor::id::VolumeId;

/// Whom a verb is for.
enum For<'a> {
    Admin,
    Agent,
    /// Agents, clients that may touch all these volumes, admins.
    Data(&'a [VolumeId]),
    /// Clients that may touch this volume, and admins.
    Volume(VolumeId),
    /// Agents, clients, admins.
    Members,
}

fn refused(caller: &PeerIdentity, why: &str) -> MetadError {
    MetadError::Denied(format!(
        "a certificate of role {} ({}) {why}",
        caller.role, caller.subject
    ))
}

/// May the caller touch this volume (or see that it exists)?
pub(super) fn opens(caller: &PeerIdentity, volume: VolumeId) -> bool {
    match caller.role {
        Role::Admin | Role::Agent => true,
        Role::Client => match caller.volume_scope() {
            Some(VolumeScope::All) => true,
            Some(VolumeScope::One(own)) => own == volume,
            None => false,
        },
        Role::Metad => false,
    }
}

fn permit(caller: &PeerIdentity, whom: &For<'_>) -> Result<(), MetadError> {
    let (role_fits, volumes): (bool, &[VolumeId]) = match (whom, caller.role) {
        (_, Role::Metad) => (false, &[]),
        (_, Role::Admin) => (true, &[]),
        (For::Agent | For::Members, Role::Agent) => (true, &[]),
        (For::Members, Role::Client) => (true, &[]),
        (For::Data(volumes), Role::Agent | Role::Client) => (true, volumes),
        (For::Volume(volume), Role::Client) => (true, std::slice::from_ref(volume)),
        (For::Admin | For::Volume(_), Role::Agent) => (false, &[]),
        (For::Admin | For::Agent, Role::Client) => (false, &[]),
    };
    if !role_fits {
        return Err(refused(caller, "may not do this"));
    }
    match volumes.iter().find(|volume| !opens(caller, **volume)) {
        Some(volume) => Err(refused(caller, &format!("does not open volume {volume}"))),
        None => Ok(()),
    }
}

/// Asked before every mutation.
pub(super) fn permit_mutation(
    caller: &PeerIdentity,
    mutation: &Mutation,
) -> Result<(), MetadError> {
    let reported: Vec<VolumeId>;
    let whom = match mutation {
        Mutation::CreateVolume { .. }
        | Mutation::AlterVolume { .. }
        | Mutation::DeleteVolume { .. }
        | Mutation::SetBackendIntent { .. }
        | Mutation::SetSettings(_)
        | Mutation::CreateToken { .. }
        | Mutation::RevokeToken { .. }
        | Mutation::SetCertificateLife { .. } => For::Admin,
        Mutation::AcquireLease { volume, .. }
        | Mutation::RenewLease { volume, .. }
        | Mutation::ReleaseLease { volume, .. }
        | Mutation::CommitDatafiles { volume, .. }
        | Mutation::ReleaseDatafiles { volume, .. } => For::Volume(*volume),
        Mutation::SwapShard { .. }
        | Mutation::RegisterAgent { .. }
        | Mutation::RegisterBackend { .. } => For::Agent,
        Mutation::ReportShards { reports } => {
            reported = reports.iter().map(|report| report.volume).collect();
            For::Data(&reported)
        }
    };
    permit(caller, &whom)?;
    match mutation {
        Mutation::CommitDatafiles {
            volume, records, ..
        } if records.iter().any(|record| record.volume != *volume) => Err(MetadError::Invalid(
            "a record of another volume is in the commit".into(),
        )),
        Mutation::RegisterAgent { location, node } => own_place(caller, location, node),
        _ => Ok(()),
    }
}

/// An agent registers only the place its certificate names.
fn own_place(
    caller: &PeerIdentity,
    location: &qsfs_zstor::id::LocationName,
    node: &qsfs_zstor::id::NodeName,
) -> Result<(), MetadError> {
    match caller.agent_place() {
        Some((own_location, own_node)) if own_location != *location || own_node != *node => {
            Err(refused(caller, &format!("is not of {location}/{node}")))
        }
        _ => Ok(()),
    }
}

/// Asked before every read. What a volume's name stands for is checked by [`opens`] when it is known.
pub(super) fn permit_query(caller: &PeerIdentity, query: &Query) -> Result<(), MetadError> {
    let one: [VolumeId; 1];
    let whom = match query {
        Query::Volume(_)
        | Query::Volumes
        | Query::Backends
        | Query::BackendFacts
        | Query::Agents
        | Query::Status
        | Query::Members
        | Query::Settings
        | Query::CertificateLife
        // For whoever asks, and for nobody else. A metad holds the authority itself.
        | Query::RenewCertificate(_) => For::Members,
        Query::VolumeById(volume)
        | Query::Records { volume, .. }
        | Query::ListRecords { volume, .. } => {
            one = [*volume];
            For::Data(&one)
        }
        Query::Placement { volume, .. } => For::Volume(*volume),
        Query::BackendShards { .. } => For::Agent,
        Query::Tokens
        | Query::IssueClientCertificate { .. }
        | Query::Scrub { .. }
        | Query::RemoveMember(_)
        | Query::TransferLeader(_) => For::Admin,
    };
    permit(caller, &whom)
}

/// Asked before a watch opens: what of the request the caller may watch.
pub(super) fn permit_watch(
    caller: &PeerIdentity,
    request: WatchRequest,
) -> Result<WatchRequest, MetadError> {
    permit(caller, &For::Members)?;
    let Some(VolumeScope::One(own)) = caller.volume_scope() else {
        return Ok(request);
    };
    match request.volume {
        Some(volume) if volume != own => {
            Err(refused(caller, &format!("does not open volume {volume}")))
        }
        _ => Ok(WatchRequest {
            volume: Some(own),
            ..request
        }),
    }
}

/// May the caller see this change? Asked for every change that is told, whatever the request was narrowed to.
pub(super) fn sees(caller: &PeerIdentity, change: &Change) -> bool {
    match change {
        Change::Volume(volume) => opens(caller, volume.id),
        Change::VolumeRemoved(volume) | Change::RecordRemoved { volume, .. } => {
            opens(caller, *volume)
        }
        Change::Record(record) => opens(caller, record.volume),
        Change::Backend(_) | Change::Settings(_) => true,
    }
}

/// Asked before an agent session opens.
pub(super) fn permit_session(caller: &PeerIdentity) -> Result<(), MetadError> {
    match caller.role {
        Role::Agent => Ok(()),
        Role::Metad | Role::Client | Role::Admin => Err(refused(caller, "is not an agent's")),
    }
}
