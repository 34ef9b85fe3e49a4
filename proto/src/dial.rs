//! How a connection to a metad node comes to be: TCP and TLS, or what a simulation has instead of them.

use crate::identity::LiveIdentity;
use crate::tls::{METAD_SERVER_NAME, TlsError, grpc_client_config};
use async_trait::async_trait;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Bytes in both directions.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> ByteStream for T {}

/// Opens connections on which the other end knows who we are.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// Connects to `host:port`. The caller sets the deadline.
    async fn dial(&self, address: &str) -> io::Result<Box<dyn ByteStream>>;

    /// As whom it dials: rises when our certificate is renewed. Connections made before should be made anew; calls under way on
    /// them may end there.
    fn generation(&self) -> u64 {
        0
    }
}

/// TCP, then TLS with the server name of metad.
pub(crate) struct TlsDial {
    config: Arc<ClientConfig>,
    /// `None`: who joins has none yet.
    identity: Option<LiveIdentity>,
}

impl TlsDial {
    pub(crate) fn over(config: Arc<ClientConfig>) -> Arc<dyn Dial> {
        Arc::new(Self {
            config,
            identity: None,
        })
    }

    pub(crate) fn of(identity: LiveIdentity) -> Result<Arc<dyn Dial>, TlsError> {
        Ok(Arc::new(Self {
            config: grpc_client_config(&identity)?,
            identity: Some(identity),
        }))
    }
}

#[async_trait]
impl Dial for TlsDial {
    async fn dial(&self, address: &str) -> io::Result<Box<dyn ByteStream>> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from(METAD_SERVER_NAME).map_err(io::Error::other)?;
        let connector = TlsConnector::from(self.config.clone());
        Ok(Box::new(connector.connect(name, stream).await?))
    }

    fn generation(&self) -> u64 {
        let identity = self.identity.as_ref();
        identity.map_or(0, LiveIdentity::generation)
    }
}
