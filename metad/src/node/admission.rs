//! Joining: a token and a signing request become a certificate.
//!
//! What can be refused without using the token up is refused first. The token is consumed through the log, bound to the
//! signing request, so that the same joiner may ask again when the answer was lost.

use super::service::Service;
use crate::state::command::{Admission, Command, Reply};
use qsfs_proto::api::{JoinGrant, JoinRequest, MetadError, Role, Secret};
use qsfs_proto::server::CallError;
use qsfs_proto::token::secret_hash;
use qsfs_zstor::id::{IdError, LocationName, MetadId, NodeName};

/// Longest address.
const ADDRESS_BYTES_MAX: usize = 255;

fn invalid(error: impl std::fmt::Display) -> CallError {
    MetadError::Invalid(error.to_string()).into()
}

fn place(request: &JoinRequest) -> Result<(NodeName, LocationName), CallError> {
    let name = request.name.parse().map_err(|e: IdError| invalid(e))?;
    let location = request.location.parse().map_err(|e: IdError| invalid(e))?;
    Ok((name, location))
}

/// Admits a process, on the leader.
pub(super) async fn join(service: &Service, request: JoinRequest) -> Result<JoinGrant, CallError> {
    let hash = secret_hash(&request.secret);
    let csr = *blake3::hash(request.csr_pem.as_bytes()).as_bytes();
    let life = service.certificate_life()?;
    let sign = |subject: &str| {
        service
            .authority()
            .sign(&request.csr_pem, request.role, subject, life)
            .map_err(invalid)
    };
    let (cert_pem, metad_id) = match request.role {
        Role::Metad => {
            let (name, location) = place(&request)?;
            check_address(&request.address)?;
            // A request that cannot be signed must not use the token up; the id is not known yet.
            sign("0")?;
            let admission = Admission {
                hash,
                csr,
                name,
                location,
                address: request.address.clone(),
            };
            let id = admit(service, admission).await?;
            (sign(&id.to_string())?, Some(id))
        }
        Role::Agent => {
            let (name, location) = place(&request)?;
            let certificate = sign(&format!("{location}/{name}"))?;
            consume(service, hash, request.role, csr).await?;
            (certificate, None)
        }
        Role::Client => {
            let certificate = sign("*")?;
            consume(service, hash, request.role, csr).await?;
            (certificate, None)
        }
        Role::Admin => return Err(MetadError::Denied("nobody joins as admin".into()).into()),
    };
    let members = service.read(|state| state.members())?;
    let mut endpoints: Vec<_> = members.into_iter().map(|member| member.address).collect();
    endpoints.retain(|endpoint| *endpoint != request.address);
    Ok(JoinGrant {
        cluster: service.authority().cluster(),
        cert_pem,
        ca_pem: service.authority().ca_pem().to_owned(),
        endpoints,
        metad_id,
        ca_key_pem: metad_id.map(|_| Secret(service.authority().key_pem().0.clone())),
    })
}

fn check_address(address: &str) -> Result<(), CallError> {
    let port = address
        .rsplit_once(':')
        .map(|(_, port)| port.parse::<u16>());
    match port {
        Some(Ok(port)) if port != 0 && address.len() <= ADDRESS_BYTES_MAX => Ok(()),
        _ => Err(invalid(format!(
            "address {address:?} is not host:port with a fixed port"
        ))),
    }
}

async fn admit(service: &Service, admission: Admission) -> Result<MetadId, CallError> {
    let command = Command::AdmitMetad(admission);
    match service.consensus().propose_internal(command).await? {
        Reply::Admitted(id) => Ok(id),
        other => Err(MetadError::Unknown(format!("admission was answered {other:?}")).into()),
    }
}

async fn consume(
    service: &Service,
    hash: [u8; 32],
    role: Role,
    csr: [u8; 32],
) -> Result<(), CallError> {
    let command = Command::ConsumeToken { hash, role, csr };
    service.consensus().propose_internal(command).await?;
    Ok(())
}
