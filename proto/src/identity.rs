//! Who a process is: a certificate of the cluster's CA, its key, and the CA.
//!
//! The certificate's subject alternative name carries `qsfs://CLUSTER/ROLE/SUBJECT`. Subjects: a metad node has its Raft
//! id, an agent `location/node`, a client the volume id it is bound to or `*`, an admin its name.
//! Invariant: an [`Identity`] always has a certificate that parses, is of the CA beside it, and matches the key.
//!
//! [`LiveIdentity`] is the identity of a process that runs, replaced when its certificate is renewed ([`crate::renewal`]).

mod files;
mod live;

pub use files::{CA_FILE, CERT_FILE, KEY_FILE, NEXT_KEY_FILE};
pub use live::LiveIdentity;

pub(crate) use files::{Locked, write_private};

use crate::api::{Role, Secret};
use qsfs_zstor::id::{ClusterId, LocationName, MetadId, NodeName, VolumeId};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Longest subject, in bytes.
pub const SUBJECT_BYTES_MAX: usize = 160;
/// Longest PEM text accepted from a peer or a file.
pub const PEM_BYTES_MAX: usize = 64 << 10;

/// Why an identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file of the identity could not be read or written.
    #[error("{step} {path}: {source}")]
    Io {
        /// Verb phrase.
        step: &'static str,
        /// Path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Not PEM, or not what it should be.
    #[error("{what} is not valid: {reason}")]
    Malformed {
        /// Which part.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// The certificate names no QSFS identity.
    #[error(
        "the certificate names no QSFS identity (qsfs://CLUSTER/ROLE/SUBJECT): {0}; was it made by another CA?"
    )]
    Unnamed(String),
    /// The key is of another certificate.
    #[error("the private key does not belong to the certificate; join again")]
    KeyMismatch,
    /// The certificate is of another CA.
    #[error("the certificate was not signed by the CA beside it; join again")]
    OtherCa,
    /// Nobody accepts it any more.
    #[error(
        "the certificate of {whose} ended {days} days ago (or the clock here is wrong), and nobody accepts it any more: {advice}"
    )]
    Ended {
        /// Role and subject.
        whose: String,
        /// How long ago, in days.
        days: u64,
        /// What to do.
        advice: String,
    },
    /// A certificate of another process.
    #[error("the new certificate is of {found}, not of {wanted}")]
    OtherIdentity {
        /// Whose it is.
        found: PeerIdentity,
        /// Whose it should be.
        wanted: PeerIdentity,
    },
    /// The key could not be made.
    #[error("making a key: {0}")]
    KeyGeneration(String),
}

impl IdentityError {
    pub(crate) fn malformed(what: &'static str, reason: impl fmt::Display) -> Self {
        Self::Malformed {
            what,
            reason: reason.to_string(),
        }
    }
}

/// Which volumes a client certificate opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeScope {
    /// `*`: every volume.
    All,
    /// Only this one.
    One(VolumeId),
}

/// Who the other end of a connection is, as its certificate says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerIdentity {
    /// Cluster.
    pub cluster: ClusterId,
    /// Role.
    pub role: Role,
    /// What it stands for within the role (see the module).
    pub subject: String,
}

impl PeerIdentity {
    /// Checks the subject against the role.
    pub fn new(
        cluster: ClusterId,
        role: Role,
        subject: impl Into<String>,
    ) -> Result<Self, IdentityError> {
        let peer = Self {
            cluster,
            role,
            subject: subject.into(),
        };
        peer.validate()?;
        Ok(peer)
    }

    /// Reads the identity out of a certificate that was verified already.
    pub fn from_certificate(der: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (_, certificate) = X509Certificate::from_der(der)
            .map_err(|error| IdentityError::malformed("certificate", error))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| IdentityError::malformed("certificate", error))?
            .ok_or_else(|| IdentityError::Unnamed("it has no alternative name".into()))?;
        let mut uris = names
            .value
            .general_names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            });
        match (uris.next(), uris.next()) {
            (Some(uri), None) => uri.parse(),
            (None, _) => Err(IdentityError::Unnamed("it has no URI name".into())),
            (Some(_), Some(_)) => Err(IdentityError::Unnamed("it has several URI names".into())),
        }
    }

    /// The Raft id of a metad node.
    pub fn metad_id(&self) -> Option<MetadId> {
        match self.role {
            Role::Metad => self.subject.parse().ok().map(MetadId),
            Role::Agent | Role::Client | Role::Admin => None,
        }
    }

    /// Location and node of an agent.
    pub fn agent_place(&self) -> Option<(LocationName, NodeName)> {
        let (location, node) = match self.role {
            Role::Agent => self.subject.split_once('/')?,
            Role::Metad | Role::Client | Role::Admin => return None,
        };
        Some((location.parse().ok()?, node.parse().ok()?))
    }

    /// What a client may touch.
    pub fn volume_scope(&self) -> Option<VolumeScope> {
        match self.role {
            Role::Client if self.subject == "*" => Some(VolumeScope::All),
            Role::Client => self.subject.parse().ok().map(VolumeScope::One),
            Role::Metad | Role::Agent | Role::Admin => None,
        }
    }

    fn validate(&self) -> Result<(), IdentityError> {
        let good = match self.role {
            Role::Metad => self.metad_id().is_some(),
            Role::Agent => self.agent_place().is_some(),
            Role::Client => self.volume_scope().is_some(),
            Role::Admin => self.subject.parse::<NodeName>().is_ok(),
        };
        if good && self.subject.len() <= SUBJECT_BYTES_MAX {
            Ok(())
        } else {
            let shown: String = self.subject.chars().take(80).collect();
            let reason = format!("{shown:?} is no subject of role {}", self.role);
            Err(IdentityError::malformed("identity", reason))
        }
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "qsfs://{}/{}/{}", self.cluster, self.role, self.subject)
    }
}

impl FromStr for PeerIdentity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let unnamed = || IdentityError::Unnamed(uri.chars().take(200).collect());
        let rest = uri.strip_prefix("qsfs://").ok_or_else(unnamed)?;
        let mut parts = rest.splitn(3, '/');
        let (Some(cluster), Some(role), Some(subject)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(unnamed());
        };
        let cluster = cluster.parse().map_err(|_| unnamed())?;
        let role = role.parse().map_err(|_| unnamed())?;
        Self::new(cluster, role, subject)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Metad => "metad",
            Self::Agent => "agent",
            Self::Client => "client",
            Self::Admin => "admin",
        })
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        match text {
            "metad" => Ok(Self::Metad),
            "agent" => Ok(Self::Agent),
            "client" => Ok(Self::Client),
            "admin" => Ok(Self::Admin),
            _ => Err(IdentityError::malformed(
                "role",
                "it must be metad, agent, client or admin",
            )),
        }
    }
}

/// From when to when a certificate is good. Times in ms since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// Not before. The CA sets it back by [`Self::BACKDATED_MS`], or by the whole life of a shorter one.
    pub begins_ms: u64,
    /// Not after.
    pub ends_ms: u64,
}

impl Validity {
    /// A certificate begins so long before it was made, so that a peer whose clock is behind accepts it.
    pub const BACKDATED_MS: u64 = 24 * 3_600_000;

    /// Of a certificate that is made at `now_ms` to live for `life_ms`.
    pub fn for_life(now_ms: u64, life_ms: u64) -> Self {
        Self {
            begins_ms: now_ms.saturating_sub(life_ms.min(Self::BACKDATED_MS)),
            ends_ms: now_ms.saturating_add(life_ms),
        }
    }

    /// How long it was made to live; the other way round from [`Self::for_life`].
    pub fn life_ms(self) -> u64 {
        let whole = self.ends_ms.saturating_sub(self.begins_ms);
        if whole >= 2 * Self::BACKDATED_MS {
            whole - Self::BACKDATED_MS
        } else {
            whole / 2
        }
    }

    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|error| IdentityError::malformed("certificate", error))?;
        let ms = |seconds: i64| u64::try_from(seconds).unwrap_or(0).saturating_mul(1_000);
        let validity = parsed.validity();
        Ok(Self {
            begins_ms: ms(validity.not_before.timestamp()),
            ends_ms: ms(validity.not_after.timestamp()),
        })
    }
}

/// Now, in ms since the epoch.
pub(crate) fn wall_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// The plain form of an [`Identity`], to be kept inside other files (context, recovery kit). All PEM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityPem {
    /// Leaf certificate.
    pub certificate: String,
    /// Private key of the certificate.
    pub key: Secret,
    /// Certificate of the cluster's CA.
    pub ca: String,
}

/// A certificate of the cluster, its key, and the CA that vouches for both ends.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    pem: IdentityPem,
    peer: PeerIdentity,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.peer)
    }
}

impl Identity {
    /// Checks that the parts parse and belong together.
    pub fn from_pem(pem: IdentityPem) -> Result<Self, IdentityError> {
        let leaf = certificate_from_pem("certificate", &pem.certificate)?;
        let ca = certificate_from_pem("CA certificate", &pem.ca)?;
        let peer = PeerIdentity::from_certificate(&leaf)?;
        let identity = Self { pem, peer };
        let key = identity.key_der()?;
        crate::tls::check_parts(leaf, key, &ca)?;
        Ok(identity)
    }

    /// The plain form, to embed in another file.
    pub fn to_pem(&self) -> IdentityPem {
        self.pem.clone()
    }

    /// Who this is.
    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// Cluster.
    pub fn cluster(&self) -> ClusterId {
        self.peer.cluster
    }

    /// Role.
    pub fn role(&self) -> Role {
        self.peer.role
    }

    /// Subject within the role.
    pub fn subject(&self) -> &str {
        &self.peer.subject
    }

    /// Is this the same process's, and does it end later than the other?
    pub fn supersedes(&self, other: &Self) -> bool {
        let ends = |identity: &Self| identity.expires_ms().unwrap_or(0);
        self.peer == other.peer && self.pem.ca == other.pem.ca && ends(self) > ends(other)
    }

    /// From when to when the certificate is good.
    pub fn validity(&self) -> Result<Validity, IdentityError> {
        Validity::of(&certificate_from_pem("certificate", &self.pem.certificate)?)
    }

    /// When the certificate ends, ms since the epoch.
    pub fn expires_ms(&self) -> Result<u64, IdentityError> {
        Ok(self.validity()?.ends_ms)
    }

    /// Refuses a certificate that has ended. `advice`: what its owner does then.
    pub fn check_not_ended(&self, now_ms: u64, advice: &str) -> Result<(), IdentityError> {
        let ends_ms = self.validity()?.ends_ms;
        if now_ms < ends_ms {
            return Ok(());
        }
        Err(IdentityError::Ended {
            whose: format!("{} {}", self.peer.role, self.peer.subject),
            days: (now_ms - ends_ms) / 86_400_000,
            advice: advice.to_owned(),
        })
    }

    /// The CA as PEM.
    pub fn ca_pem(&self) -> &str {
        &self.pem.ca
    }

    /// BLAKE3 of the certificate of the cluster's CA: what join tokens pin.
    pub fn ca_fingerprint(&self) -> Result<[u8; 32], IdentityError> {
        let ca = certificate_from_pem("CA certificate", &self.pem.ca)?;
        Ok(*blake3::hash(&ca).as_bytes())
    }

    /// Leaf first, then the CA: a joining process pins the CA by its hash and needs to see it.
    pub(crate) fn chain(&self) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
        Ok(vec![
            certificate_from_pem("certificate", &self.pem.certificate)?,
            self.ca_der()?,
        ])
    }

    pub(crate) fn ca_der(&self) -> Result<CertificateDer<'static>, IdentityError> {
        certificate_from_pem("CA certificate", &self.pem.ca)
    }

    pub(crate) fn key_der(&self) -> Result<PrivateKeyDer<'static>, IdentityError> {
        PrivateKeyDer::from_pem_slice(self.pem.key.0.as_bytes())
            .map_err(|error| IdentityError::malformed("private key", error))
    }
}

/// A new key that waits for its certificate. The key never leaves the process that made it.
pub struct KeyRequest {
    key_pem: Secret,
    csr_pem: String,
}

impl fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyRequest(..)")
    }
}

impl KeyRequest {
    /// Draws an ECDSA P-256 key.
    pub fn new() -> Result<Self, IdentityError> {
        let failed = |error: rcgen::Error| IdentityError::KeyGeneration(error.to_string());
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let params = rcgen::CertificateParams::default();
        let request = params.serialize_request(&key).map_err(failed)?;
        Ok(Self {
            key_pem: Secret(key.serialize_pem()),
            csr_pem: request.pem().map_err(failed)?,
        })
    }

    /// The certificate signing request, for the CA.
    pub fn csr_pem(&self) -> &str {
        &self.csr_pem
    }

    /// Joins the key with its certificate.
    pub fn finish(self, certificate: String, ca: String) -> Result<Identity, IdentityError> {
        Identity::from_pem(IdentityPem {
            certificate,
            key: self.key_pem,
            ca,
        })
    }
}

pub(crate) fn certificate_from_pem(
    what: &'static str,
    pem: &str,
) -> Result<CertificateDer<'static>, IdentityError> {
    if pem.len() > PEM_BYTES_MAX {
        return Err(IdentityError::malformed(what, "it is too long"));
    }
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| IdentityError::malformed(what, error))
}
