//! A backend elsewhere (or an attached plain 0-db) as a [`PieceStore`].

use crate::store::{KeyPage, PieceStore, StoreError, StoredKey};
use async_trait::async_trait;
use bytes::Bytes;
use qsfs_proto::api::BackendAddress;
use qsfs_zdb::client::{ClientConfig, ClientError, ClientTls, Password, ZdbClient};
use std::time::Duration;

/// To connect, do the TLS handshake and select the namespace.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// For one piece.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes under way to or from one backend.
const INFLIGHT_BYTES: usize = 8 << 20;
/// Connections to one backend.
const CONNECTIONS: usize = 2;

/// A client for a backend; `tls` is the cluster's, used unless the backend is a plain 0-db attached from outside.
pub(crate) fn connect(address: &BackendAddress, tls: &ClientTls) -> ZdbClient {
    client(address, address.tls.then(|| tls.clone()))
}

/// A client for a plain 0-db.
pub(crate) fn connect_plain(address: &BackendAddress) -> ZdbClient {
    client(address, None)
}

fn client(address: &BackendAddress, tls: Option<ClientTls>) -> ZdbClient {
    let mut config = ClientConfig::new(address.endpoint.clone(), address.namespace.clone());
    config.password = address
        .password
        .as_ref()
        .map(|secret| Password::new(secret.0.clone()));
    config.tls = tls;
    config.connect_timeout = CONNECT_TIMEOUT;
    config.request_timeout = REQUEST_TIMEOUT;
    config.connections = CONNECTIONS;
    config.inflight_bytes = INFLIGHT_BYTES;
    ZdbClient::new(config)
}

/// See the module.
pub(crate) struct ClientStore(pub(crate) ZdbClient);

impl From<ClientError> for StoreError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Corrupt { .. } => Self::Corrupt(error.to_string()),
            ClientError::Full { .. } => Self::Full(error.to_string()),
            ClientError::Unreachable { .. }
            | ClientError::Timeout { .. }
            | ClientError::ReadOnly { .. }
            | ClientError::Refused { .. } => Self::Unavailable(error.to_string()),
        }
    }
}

#[async_trait]
impl PieceStore for ClientStore {
    async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(self.0.get(key).await?)
    }

    async fn set(&self, key: &[u8], value: Bytes) -> Result<(), StoreError> {
        Ok(self.0.set(key, value).await?)
    }

    async fn delete(&self, key: &[u8]) -> Result<bool, StoreError> {
        Ok(self.0.delete(key).await?)
    }

    async fn keys(&self, from: Option<Bytes>) -> Result<KeyPage, StoreError> {
        let Some(page) = self.0.scan(from.as_deref()).await? else {
            return Ok(KeyPage {
                next: None,
                keys: Vec::new(),
            });
        };
        let stored = |entry: qsfs_zdb::client::ScanEntry| StoredKey {
            key: entry.key,
            set_ms: entry.timestamp.saturating_mul(1_000),
        };
        Ok(KeyPage {
            next: Some(page.cursor),
            keys: page.entries.into_iter().map(stored).collect(),
        })
    }
}
