//! The one place that says what TLS means here: version 1.3 only, key exchange X25519MLKEM768 only, aws-lc-rs, certificates of
//! the cluster's own CA on both sides.
//!
//! The provider is given explicitly to every configuration, never taken from the process default: other crates in the
//! graph bring another provider. Session tickets are off on the server, so that every connection makes a full,
//! hybrid key exchange.

use crate::api::Role;
use crate::identity::{Identity, IdentityError, LiveIdentity, PeerIdentity, Validity};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, CommonState, DigitallySignedStruct, DistinguishedName,
    NamedGroup, RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use std::sync::Arc;
use x509_parser::prelude::{FromDer, X509Certificate};

/// DNS name in every metad certificate.
pub const METAD_SERVER_NAME: &str = "metad.qsfs";
/// DNS name in every agent certificate.
pub const AGENT_SERVER_NAME: &str = "agent.qsfs";
/// Application protocol of gRPC.
pub(crate) const ALPN_H2: &[u8] = b"h2";

/// Why a TLS configuration could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The identity's parts.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// rustls refused.
    #[error("TLS configuration: {0}")]
    Config(#[from] rustls::Error),
    /// The CA cannot be a root.
    #[error("the CA certificate cannot be used: {0}")]
    Verifier(String),
}

/// Which clients a server lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// A certificate of the cluster, any role.
    Required,
    /// A certificate of the cluster, of one of these roles.
    RequiredRoles(&'static [Role]),
    /// A certificate of the cluster, or none (metad: a joining process has none yet).
    Optional,
}

/// The provider everything here uses: aws-lc-rs with the hybrid group alone.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        kx_groups: vec![aws_lc_rs::kx_group::X25519MLKEM768],
        ..aws_lc_rs::default_provider()
    })
}

/// Server side. No ALPN is set. New connections use the identity as it is then.
pub fn server_config(
    identity: impl Into<LiveIdentity>,
    auth: ClientAuth,
) -> Result<Arc<ServerConfig>, TlsError> {
    Ok(Arc::new(plain_server_config(&identity.into(), auth)?))
}

/// Client side; the server must have a certificate of the same CA with the name that is connected to. No ALPN is set.
/// New connections use the identity as it is then.
pub fn client_config(identity: impl Into<LiveIdentity>) -> Result<Arc<ClientConfig>, TlsError> {
    Ok(Arc::new(plain_client_config(&identity.into())?))
}

/// The key exchange group of a finished handshake.
pub fn negotiated_group(connection: &CommonState) -> Option<NamedGroup> {
    connection
        .negotiated_key_exchange_group()
        .map(|group| group.name())
}

/// The identity in the other end's (verified) certificate; `None` when it sent none.
pub fn peer_identity(connection: &CommonState) -> Option<Result<PeerIdentity, IdentityError>> {
    connection
        .peer_certificates()
        .and_then(<[_]>::first)
        .map(PeerIdentity::from_certificate)
}

/// When the other end's certificate ends, ms since the epoch; `None` when it sent none.
pub(crate) fn peer_expires_ms(connection: &CommonState) -> Option<u64> {
    let certificate = connection.peer_certificates()?.first()?;
    Some(Validity::of(certificate).ok()?.ends_ms)
}

pub(crate) fn grpc_server_config(
    identity: impl Into<LiveIdentity>,
    auth: ClientAuth,
) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = plain_server_config(&identity.into(), auth)?;
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok(Arc::new(config))
}

pub(crate) fn grpc_client_config(
    identity: impl Into<LiveIdentity>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = plain_client_config(&identity.into())?;
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok(Arc::new(config))
}

/// Without a certificate of our own, trusting whatever server chains to the CA with this BLAKE3.
pub(crate) fn grpc_join_config(ca_hash: [u8; 32]) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedCa { ca_hash }))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok(Arc::new(config))
}

fn plain_server_config(
    identity: &LiveIdentity,
    auth: ClientAuth,
) -> Result<ServerConfig, TlsError> {
    let builder = WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots(identity.current().ca_der()?)?),
        provider(),
    );
    let (builder, roles) = match auth {
        ClientAuth::Required => (builder, None),
        ClientAuth::RequiredRoles(roles) => (builder, Some(roles)),
        ClientAuth::Optional => (builder.allow_unauthenticated(), None),
    };
    let inner = builder
        .build()
        .map_err(|error| TlsError::Verifier(error.to_string()))?;
    let verifier = Arc::new(NamedClient {
        inner,
        own: identity.peer().clone(),
        roles,
    });
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(identity.clone()));
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn plain_client_config(identity: &LiveIdentity) -> Result<ClientConfig, TlsError> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(identity.current().ca_der()?)?)
        .with_client_cert_resolver(Arc::new(identity.clone())))
}

/// What a handshake needs of an identity.
pub(crate) fn certified(identity: &Identity) -> Result<CertifiedKey, IdentityError> {
    let key = provider()
        .key_provider
        .load_private_key(identity.key_der()?)
        .map_err(|error| IdentityError::malformed("private key", error))?;
    Ok(CertifiedKey::new(identity.chain()?, key))
}

fn roots(ca: CertificateDer<'static>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca)?;
    Ok(roots)
}

/// Do certificate, key and CA belong together? Expiry is the peer's to judge.
pub(crate) fn check_parts(
    leaf: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    ca: &CertificateDer<'_>,
) -> Result<(), IdentityError> {
    let leaf_parsed = parse("certificate", &leaf)?;
    let ca_parsed = parse("CA certificate", ca)?;
    leaf_parsed
        .verify_signature(Some(ca_parsed.public_key()))
        .map_err(|_| IdentityError::OtherCa)?;
    let key = provider()
        .key_provider
        .load_private_key(key)
        .map_err(|error| IdentityError::malformed("private key", error))?;
    CertifiedKey::new(vec![leaf.clone()], key)
        .keys_match()
        .map_err(|_| IdentityError::KeyMismatch)
}

/// Does the certificate hold this public key?
pub(crate) fn is_key_of(
    certificate: &CertificateDer<'_>,
    public_key: &[u8],
) -> Result<bool, IdentityError> {
    let certificate = parse("CA certificate", certificate)?;
    Ok(*certificate.public_key().subject_public_key.data == *public_key)
}

fn parse<'a>(
    what: &'static str,
    der: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, IdentityError> {
    X509Certificate::from_der(der)
        .map(|(_, parsed)| parsed)
        .map_err(|error| IdentityError::malformed(what, error))
}

/// What webpki checks, and then: the certificate must name an identity of our cluster, in an allowed role.
#[derive(Debug)]
struct NamedClient {
    inner: Arc<dyn ClientCertVerifier>,
    own: PeerIdentity,
    roles: Option<&'static [Role]>,
}

impl ClientCertVerifier for NamedClient {
    fn offer_client_auth(&self) -> bool {
        self.inner.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .inner
            .verify_client_cert(end_entity, intermediates, now)?;
        let refused =
            rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let Ok(peer) = PeerIdentity::from_certificate(end_entity) else {
            return Err(refused);
        };
        let role_allowed = self.roles.is_none_or(|roles| roles.contains(&peer.role));
        if peer.cluster == self.own.cluster && role_allowed {
            Ok(verified)
        } else {
            Err(refused)
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Trusts a metad server whose chain holds, and ends at, the CA with this BLAKE3.
#[derive(Debug)]
struct PinnedCa {
    ca_hash: [u8; 32],
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = intermediates
            .iter()
            .find(|der| *blake3::hash(der).as_bytes() == self.ca_hash)
            .ok_or(CertificateError::UnknownIssuer)?;
        let mut roots = RootCertStore::empty();
        roots.add(pinned.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?
            .verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    /// Never reached: only TLS 1.3 is spoken.
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
