//! Certificates: who gets a new one, when the known ones end, and this node's own, which it signs itself.

use super::service::Service;
use crate::machine::Machine;
use crate::state::kv::KvError;
use async_trait::async_trait;
use parking_lot::Mutex;
use qsfs_proto::api::{MetadError, Role};
use qsfs_proto::ca::CertificateAuthority;
use qsfs_proto::identity::{LiveIdentity, PeerIdentity, VolumeScope};
use qsfs_proto::renewal::{IdentityDir, Renewal, Signer};
use qsfs_proto::server::CallError;
use qsfs_zstor::id::MetadId;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Agents remembered at most; more places were never registered.
const AGENTS_MAX: usize = 16_384;

/// What a person does when a metad's certificate has ended, which takes that its program was off.
const ADVICE: &str = "start this metad again (qsfs metad serve), it then renews itself";

/// When the certificates end that agents showed to this node, by `location/node`. Not replicated: they show them to whoever leads.
#[derive(Debug, Default)]
pub(crate) struct Shown(Mutex<BTreeMap<String, u64>>);

impl Shown {
    pub(super) fn note(&self, caller: &PeerIdentity, expires_ms: u64) {
        if caller.role != Role::Agent {
            return;
        }
        let mut shown = self.0.lock();
        if shown.len() < AGENTS_MAX || shown.contains_key(&caller.subject) {
            shown.insert(caller.subject.clone(), expires_ms);
        }
    }

    pub(super) fn of(&self, place: &str) -> Option<u64> {
        self.0.lock().get(place).copied()
    }
}

fn signed(
    authority: &CertificateAuthority,
    csr_pem: &str,
    (role, subject): (Role, &str),
    life: Duration,
) -> Result<String, MetadError> {
    let signed = authority.sign(csr_pem, role, subject, life);
    signed.map_err(|error| MetadError::Invalid(error.to_string()))
}

/// Signs for the caller itself, on the leader, unless it is gone.
pub(super) fn renew(
    service: &Service,
    caller: &PeerIdentity,
    csr_pem: &str,
) -> Result<String, CallError> {
    let gone = |what: String| -> CallError {
        let text = format!("{what} does not exist any more: its certificate is not renewed");
        MetadError::Denied(text).into()
    };
    match caller.role {
        Role::Agent => {
            let place = caller.agent_place();
            let agents = service.read(|state| state.agents())?;
            let mut places = agents.into_iter().map(|agent| (agent.location, agent.node));
            if !places.any(|known| Some(known) == place) {
                return Err(gone(format!("agent {}", caller.subject)));
            }
        }
        Role::Client => {
            if let Some(VolumeScope::One(volume)) = caller.volume_scope()
                && service.read(|state| state.volume(volume))?.is_none()
            {
                return Err(gone(format!("volume {volume}")));
            }
        }
        Role::Admin => {}
        Role::Metad => return Err(MetadError::Denied("a metad renews itself".into()).into()),
    }
    let who = (caller.role, caller.subject.as_str());
    let life = service.certificate_life()?;
    Ok(signed(service.authority(), csr_pem, who, life)?)
}

/// The authority that every metad holds, as the signer of the node's own certificate.
struct OwnAuthority {
    authority: CertificateAuthority,
    machine: Machine,
    id: MetadId,
}

#[async_trait]
impl Signer for OwnAuthority {
    async fn sign(&self, csr_pem: &str) -> Result<String, MetadError> {
        let found = self.machine.read(|state| {
            let members = state.members()?;
            Ok::<_, KvError>((members, state.certificate_life_ms()?))
        });
        let (members, life_ms) =
            found.map_err(|error| MetadError::Unreachable(error.to_string()))?;
        // A new node knows no members before it has caught up.
        if !members.is_empty() && !members.iter().any(|member| member.id == self.id) {
            let text = format!("metad {} was removed from the cluster", self.id);
            return Err(MetadError::Denied(text));
        }
        let life = Duration::from_millis(life_ms);
        signed(
            &self.authority,
            csr_pem,
            (Role::Metad, &self.id.to_string()),
            life,
        )
    }
}

/// What renews the node's own certificate, kept in `dir`.
pub(super) fn own(
    live: &LiveIdentity,
    dir: PathBuf,
    authority: CertificateAuthority,
    (machine, id): (Machine, MetadId),
) -> Renewal {
    let signer = Arc::new(OwnAuthority {
        authority,
        machine,
        id,
    });
    Renewal::new(live.clone(), Arc::new(IdentityDir(dir)), signer, ADVICE)
}
