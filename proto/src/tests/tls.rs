//! The handshake itself, both directions.

use crate::api::Role;
use crate::ca::CertificateAuthority;
use crate::identity::Identity;
use crate::tls::{
    AGENT_SERVER_NAME, ClientAuth, METAD_SERVER_NAME, client_config, negotiated_group,
    peer_identity, provider, server_config,
};
use qsfs_zstor::id::ClusterId;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{ClientConfig, NamedGroup, ProtocolVersion, RootCertStore, SupportedProtocolVersion};
use rustls_pki_types::ServerName;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

struct Seen {
    group: Option<NamedGroup>,
    version: Option<ProtocolVersion>,
    subject: Option<String>,
}

/// One handshake and one byte each way (TLS 1.3 clients learn of a refusal only when they read). Server's and client's view.
async fn shake(
    server: Arc<rustls::ServerConfig>,
    client: Arc<ClientConfig>,
    name: &'static str,
) -> (io::Result<Seen>, io::Result<Seen>) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let serve = async move {
        let mut stream = TlsAcceptor::from(server).accept(near).await?;
        stream.write_all(b"!").await?;
        stream.flush().await?;
        let (_, state) = stream.get_ref();
        Ok(Seen {
            group: negotiated_group(state),
            version: state.protocol_version(),
            subject: peer_identity(state).map(|peer| peer.unwrap().to_string()),
        })
    };
    let call = async move {
        let name = ServerName::try_from(name).unwrap();
        let mut stream = TlsConnector::from(client).connect(name, far).await?;
        stream.read_u8().await?;
        let (_, state) = stream.get_ref();
        Ok(Seen {
            group: negotiated_group(state),
            version: state.protocol_version(),
            subject: peer_identity(state).map(|peer| peer.unwrap().to_string()),
        })
    };
    tokio::join!(serve, call)
}

fn ca() -> CertificateAuthority {
    CertificateAuthority::create(ClusterId::random(&mut rand::rng())).unwrap()
}

/// A client with a certificate store of `identity`'s CA, but none of its own, and whatever else is to be wrong.
fn bare_client(
    identity: &Identity,
    provider: CryptoProvider,
    versions: &[&'static SupportedProtocolVersion],
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.ca_der().unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    Arc::new(config)
}

#[tokio::test]
async fn the_hybrid_group_and_tls_13_are_negotiated_and_both_names_seen() {
    let ca = ca();
    let metad = ca.issue(Role::Metad, "1").unwrap();
    let agent = ca.issue(Role::Agent, "loc1/n1").unwrap();
    let (server, client) = shake(
        server_config(&metad, ClientAuth::Required).unwrap(),
        client_config(&agent).unwrap(),
        METAD_SERVER_NAME,
    )
    .await;
    for (seen, other) in [(server.unwrap(), &agent), (client.unwrap(), &metad)] {
        assert_eq!(seen.group, Some(NamedGroup::X25519MLKEM768));
        assert_eq!(seen.version, Some(ProtocolVersion::TLSv1_3));
        assert_eq!(seen.subject, Some(other.peer().to_string()));
    }
}

#[tokio::test]
async fn a_classical_group_or_an_older_version_is_refused() {
    let ca = ca();
    let metad = ca.issue(Role::Metad, "1").unwrap();
    let classical = CryptoProvider {
        kx_groups: vec![aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    };
    let clients = [
        bare_client(&metad, classical.clone(), &[&rustls::version::TLS13]),
        bare_client(&metad, classical, &[&rustls::version::TLS12]),
    ];
    for client in clients {
        let server = server_config(&metad, ClientAuth::Optional).unwrap();
        let (server, client) = shake(server, client, METAD_SERVER_NAME).await;
        assert!(server.is_err() && client.is_err());
    }
}

#[tokio::test]
async fn clients_without_certificate_of_another_ca_or_role_are_refused() {
    let (ca, other) = (ca(), ca());
    let agent = ca.issue(Role::Agent, "loc1/n1").unwrap();
    let client = ca.issue(Role::Client, "*").unwrap();
    let foreign = other.issue(Role::Client, "*").unwrap();
    let only_agents = ClientAuth::RequiredRoles(&[Role::Agent]);
    let nobody = (*provider()).clone();
    let nobody = bare_client(&agent, nobody, &[&rustls::version::TLS13]);
    // Trusts the right server, but shows a certificate of another CA.
    let foreign_client = {
        let mut roots = RootCertStore::empty();
        roots.add(agent.ca_der().unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(foreign.chain().unwrap(), foreign.key_der().unwrap())
            .unwrap();
        Arc::new(config)
    };
    let own = client_config(&client).unwrap();
    let cases = [
        (ClientAuth::Required, nobody.clone(), false),
        (ClientAuth::Optional, nobody, true),
        (ClientAuth::Required, foreign_client.clone(), false),
        (ClientAuth::Optional, foreign_client, false),
        (only_agents, own.clone(), false),
        (ClientAuth::Required, own, true),
    ];
    for (index, (auth, client, good)) in cases.into_iter().enumerate() {
        let server = server_config(&agent, auth).unwrap();
        let (server, client) = shake(server, client, AGENT_SERVER_NAME).await;
        assert_eq!((server.is_ok(), client.is_ok()), (good, good), "{index}");
    }
}

#[tokio::test]
async fn servers_of_another_ca_or_role_are_refused() {
    let (ca, other) = (ca(), ca());
    let client = ca.issue(Role::Client, "*").unwrap();
    let servers = [
        other.issue(Role::Metad, "1").unwrap(),
        ca.issue(Role::Agent, "loc1/n1").unwrap(),
        ca.issue(Role::Client, "*").unwrap(),
        ca.issue(Role::Admin, "root").unwrap(),
    ];
    for server in servers {
        let config = server_config(&server, ClientAuth::Optional).unwrap();
        let trusting = client_config(&client).unwrap();
        let (_, seen) = shake(config, trusting, METAD_SERVER_NAME).await;
        assert!(seen.is_err(), "{server:?}");
    }
}
