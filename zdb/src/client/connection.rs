//! One connection: stream, TLS, namespace selected, then the redis crate's multiplexer over it.

use super::{ClientConfig, ClientError, Password};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ProtocolVersion, RedisConnectionInfo, RedisError, Value};
use sha1::{Digest, Sha1};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A connection with its namespace selected. Dropping it closes it.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) redis: MultiplexedConnection,
    driver: JoinHandle<()>,
    /// Tells this connection from the one that replaces it.
    pub(super) generation: u64,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Connection {
    /// Connect, do the handshakes and select the namespace; within the connect timeout.
    pub(super) async fn open(config: &ClientConfig, generation: u64) -> Result<Self, ClientError> {
        match tokio::time::timeout(config.connect_timeout, Self::establish(config, generation))
            .await
        {
            Ok(result) => result,
            Err(_) => Err(unreachable(
                config,
                format!("no connection within {:?}", config.connect_timeout),
            )),
        }
    }

    async fn establish(config: &ClientConfig, generation: u64) -> Result<Self, ClientError> {
        let stream = dial(config).await?;
        let info = RedisConnectionInfo::default()
            .set_protocol(ProtocolVersion::RESP2)
            .set_skip_set_lib_name();
        // Deadlines are kept by the pool, which must also drop the connection.
        let settings = AsyncConnectionConfig::new()
            .set_response_timeout(None)
            .set_connection_timeout(None);
        let (redis, driver) = MultiplexedConnection::new_with_config(&info, stream, settings)
            .await
            .map_err(|error| unreachable(config, error.to_string()))?;
        let mut connection = Self {
            redis,
            driver: tokio::spawn(driver),
            generation,
        };
        connection.select(config).await?;
        Ok(connection)
    }

    /// Has the other side closed it?
    pub(super) fn is_closed(&self) -> bool {
        self.driver.is_finished()
    }

    async fn select(&mut self, config: &ClientConfig) -> Result<(), ClientError> {
        let mut select = redis::cmd("SELECT");
        select.arg(&config.namespace);
        if let Some(password) = &config.password {
            match self.challenge(config).await? {
                Some(nonce) => {
                    select.arg("SECURE").arg(secure_hash(&nonce, password));
                }
                None => {
                    select.arg(password.expose());
                }
            }
        }
        self.handshake(config, &select).await.map(|_| ())
    }

    /// The nonce for SECURE; `None` if this 0-db does not know it.
    async fn challenge(&mut self, config: &ClientConfig) -> Result<Option<String>, ClientError> {
        let mut command = redis::cmd("AUTH");
        command.arg("SECURE").arg("CHALLENGE");
        match self.handshake(config, &command).await {
            Ok(Value::SimpleString(nonce)) => Ok(Some(nonce)),
            Ok(Value::BulkString(nonce)) => Ok(String::from_utf8(nonce).ok()),
            Ok(_) | Err(ClientError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn handshake(
        &mut self,
        config: &ClientConfig,
        command: &redis::Cmd,
    ) -> Result<Value, ClientError> {
        match self.redis.send_packed_command(command).await {
            Ok(Value::ServerError(error)) => Err(ClientError::Refused {
                endpoint: config.endpoint.clone(),
                text: server_text(error.code(), error.details()),
            }),
            Ok(value) => Ok(value),
            Err(error) => Err(match refusal(&error) {
                Some(text) => ClientError::Refused {
                    endpoint: config.endpoint.clone(),
                    text,
                },
                None => unreachable(config, error.to_string()),
            }),
        }
    }
}

/// The words after the `-` of an error answer; `None` if it is no answer but a broken connection.
pub(super) fn refusal(error: &RedisError) -> Option<String> {
    if error.is_io_error() || error.is_unrecoverable_error() {
        return None;
    }
    Some(server_text(error.code()?, error.detail()))
}

/// The redis crate splits the answer at its first space.
pub(super) fn server_text(code: &str, detail: Option<&str>) -> String {
    match detail {
        Some(detail) => format!("{code} {detail}"),
        None => code.to_owned(),
    }
}

/// What `AUTH SECURE` and `SELECT … SECURE` want: hex sha1 of `nonce:password`.
pub(super) fn secure_hash(nonce: &str, password: &Password) -> String {
    let mut hasher = Sha1::new();
    hasher.update(nonce.as_bytes());
    hasher.update(b":");
    hasher.update(password.expose().as_bytes());
    crate::hex::encode(&hasher.finalize())
}

fn unreachable(config: &ClientConfig, reason: String) -> ClientError {
    ClientError::Unreachable {
        endpoint: config.endpoint.clone(),
        reason,
    }
}

async fn dial(config: &ClientConfig) -> Result<Box<dyn Stream>, ClientError> {
    let failed = |error: std::io::Error| unreachable(config, error.to_string());
    if config.endpoint.starts_with('/') {
        let stream = UnixStream::connect(&config.endpoint)
            .await
            .map_err(failed)?;
        return secure(config, stream).await;
    }
    let stream = TcpStream::connect(&config.endpoint).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    secure(config, stream).await
}

async fn secure<S: Stream + 'static>(
    config: &ClientConfig,
    stream: S,
) -> Result<Box<dyn Stream>, ClientError> {
    let Some(tls) = &config.tls else {
        return Ok(Box::new(stream));
    };
    let name = rustls::pki_types::ServerName::try_from(tls.server_name.clone())
        .map_err(|error| unreachable(config, error.to_string()))?;
    let stream = tokio_rustls::TlsConnector::from(tls.config.clone())
        .connect(name, stream)
        .await
        .map_err(|error| unreachable(config, format!("TLS handshake: {error}")))?;
    Ok(Box::new(stream))
}
