//! The cluster's certificate authority: one self-signed ECDSA P-256 certificate, made at bootstrap, its key with every
//! metad node (no secret exists once).
//!
//! Signatures are classical: TLS libraries do not offer ML-DSA certificates yet. A forged signature needs a quantum computer *during* the
//! handshake; what is recorded today stays secret because the key exchange is hybrid post-quantum ([`crate::tls`]).
//! Of a signing request only the public key is taken: names, uses and validity are the CA's alone.

use crate::api::{Role, Secret};
use crate::identity::{
    Identity, IdentityError, KeyRequest, PEM_BYTES_MAX, PeerIdentity, Validity,
    certificate_from_pem, wall_ms,
};
use crate::tls::{AGENT_SERVER_NAME, METAD_SERVER_NAME};
use qsfs_zstor::id::ClusterId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::time::Duration;

/// Life of a leaf unless the cluster's setting says otherwise: two years. It is renewed at two thirds ([`crate::renewal`]).
pub const LEAF_VALIDITY: Duration = Duration::from_secs(2 * 366 * 24 * 3_600);
/// Validity of the CA: twenty years. No leaf outlives it.
pub const CA_VALIDITY: Duration = Duration::from_secs(20 * 366 * 24 * 3_600);
/// Shortest life of a leaf: what is renewed more often has no time to be.
pub const LEAF_VALIDITY_MIN: Duration = Duration::from_secs(5);

/// Why the CA did not sign.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The request or the CA's own parts do not parse.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The certificate could not be made.
    #[error("signing: {0}")]
    Signing(#[from] rcgen::Error),
    /// The key is not the CA's.
    #[error("the key is not the key of the CA certificate")]
    KeyMismatch,
    /// The CA's certificate names no cluster.
    #[error("the CA certificate names no cluster: {0}")]
    NoCluster(String),
}

/// Signs certificates of one cluster.
pub struct CertificateAuthority {
    cluster: ClusterId,
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    expires_ms: u64,
    key_pem: Secret,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CertificateAuthority({})", self.cluster)
    }
}

impl CertificateAuthority {
    /// A new CA for a new cluster.
    pub fn create(cluster: ClusterId) -> Result<Self, CaError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
            .distinguished_name
            .push(DnType::CommonName, format!("QSFS CA {cluster}"));
        params.subject_alt_names = vec![SanType::URI(format!("qsfs://{cluster}").try_into()?)];
        set_validity(&mut params, Validity::for_life(wall_ms(), ms(CA_VALIDITY)));
        let certificate = params.self_signed(&key)?;
        Self::from_pem(&certificate.pem(), &Secret(key.serialize_pem()))
    }

    /// From the PEMs that [`Self::ca_pem`] and [`Self::key_pem`] gave.
    pub fn from_pem(ca_pem: &str, key_pem: &Secret) -> Result<Self, CaError> {
        let certificate = certificate_from_pem("CA certificate", ca_pem)?;
        let cluster = cluster_of(&certificate)?;
        let key = KeyPair::from_pem(&key_pem.0)?;
        if !crate::tls::is_key_of(&certificate, key.public_key_raw())? {
            return Err(CaError::KeyMismatch);
        }
        Ok(Self {
            cluster,
            certificate_pem: ca_pem.to_owned(),
            expires_ms: Validity::of(&certificate)?.ends_ms,
            issuer: Issuer::from_ca_cert_der(&certificate, key)?,
            certificate,
            key_pem: key_pem.clone(),
        })
    }

    /// The cluster it signs for.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Its certificate.
    pub fn ca_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// When it ends, ms since the epoch.
    pub fn expires_ms(&self) -> u64 {
        self.expires_ms
    }

    /// Its key. Belongs into 0600 files of metad nodes and into the grant of a joining metad node, nowhere else.
    pub fn key_pem(&self) -> &Secret {
        &self.key_pem
    }

    /// BLAKE3 of its certificate: what join tokens pin.
    pub fn fingerprint(&self) -> [u8; 32] {
        *blake3::hash(&self.certificate).as_bytes()
    }

    /// Signs the public key of a request (its signature is checked) for the given identity, to live for `life`, but not longer than
    /// the CA. Answers PEM.
    pub fn sign(
        &self,
        csr_pem: &str,
        role: Role,
        subject: &str,
        life: Duration,
    ) -> Result<String, CaError> {
        if csr_pem.len() > PEM_BYTES_MAX {
            return Err(IdentityError::malformed("signing request", "it is too long").into());
        }
        let peer = PeerIdentity::new(self.cluster, role, subject)?;
        let request = CertificateSigningRequestParams::from_pem(csr_pem)
            .map_err(|error| IdentityError::malformed("signing request", error))?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("{role} {subject}"));
        params.subject_alt_names = vec![SanType::URI(peer.to_string().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if let Some(name) = server_name(role) {
            let name = SanType::DnsName(name.try_into()?);
            params.subject_alt_names.push(name);
            let usage = ExtendedKeyUsagePurpose::ServerAuth;
            params.extended_key_usages.push(usage);
        }
        let now_ms = wall_ms();
        let life_ms = ms(life).min(self.expires_ms.saturating_sub(now_ms));
        set_validity(&mut params, Validity::for_life(now_ms, life_ms));
        Ok(params.signed_by(&request.public_key, &self.issuer)?.pem())
    }

    /// A new key and its certificate in one step, for identities made beside the CA (bootstrap, tests).
    pub fn issue(&self, role: Role, subject: &str) -> Result<Identity, CaError> {
        self.issue_for(role, subject, LEAF_VALIDITY)
    }

    /// A new key and certificate of the same identity, made for as long as the present one was. Who asks for that holds the authority.
    pub fn renew(&self, identity: &Identity) -> Result<Identity, CaError> {
        if identity.cluster() != self.cluster {
            return Err(CaError::KeyMismatch);
        }
        let life = Duration::from_millis(identity.validity()?.life_ms());
        self.issue_for(identity.role(), identity.subject(), life)
    }

    /// [`Self::issue`], to live for `life`.
    pub fn issue_for(
        &self,
        role: Role,
        subject: &str,
        life: Duration,
    ) -> Result<Identity, CaError> {
        let request = KeyRequest::new()?;
        let certificate = self.sign(request.csr_pem(), role, subject, life)?;
        Ok(request.finish(certificate, self.certificate_pem.clone())?)
    }
}

/// Only roles that listen have a server name, so a stolen client certificate can never pose as a server.
fn server_name(role: Role) -> Option<&'static str> {
    match role {
        Role::Metad => Some(METAD_SERVER_NAME),
        Role::Agent => Some(AGENT_SERVER_NAME),
        Role::Client | Role::Admin => None,
    }
}

fn ms(life: Duration) -> u64 {
    u64::try_from(life.as_millis()).unwrap_or(u64::MAX)
}

fn set_validity(params: &mut CertificateParams, validity: Validity) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_millis(validity.begins_ms);
    params.not_after = epoch + Duration::from_millis(validity.ends_ms);
}

fn cluster_of(certificate: &CertificateDer<'_>) -> Result<ClusterId, CaError> {
    use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|error| CaError::NoCluster(error.to_string()))?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|error| CaError::NoCluster(error.to_string()))?;
    names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .find_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix("qsfs://")?.parse().ok(),
            _ => None,
        })
        .ok_or_else(|| CaError::NoCluster("it has no name qsfs://CLUSTER".into()))
}
