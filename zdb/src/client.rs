//! A client of any 0-db, ours or a foreign one.
//!
//! Invariants: every operation ends within its deadline; a connection whose answer did not come in time is dropped (the answers after it
//! would belong to other questions); bytes under way are bounded; a SET or DEL whose answer is missing is [`ClientError::Timeout`], its
//! outcome *unknown*.

use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// TLS to a backend.
#[derive(Debug, Clone)]
pub struct ClientTls {
    /// Protocol versions, groups, roots and client certificate.
    pub config: Arc<rustls::ClientConfig>,
    /// The name the server's certificate must carry.
    pub server_name: String,
}

/// A password; never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// Wrap a password.
    pub fn new(password: impl Into<String>) -> Self {
        Self(password.into())
    }

    /// The password itself, for the connection's handshake only.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Password {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Password(…)")
    }
}

/// Where a backend is and how to talk to it.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// `host:port`, or the path of a unix socket (starts with `/`).
    pub endpoint: String,
    /// The namespace to select.
    pub namespace: String,
    /// Its password.
    pub password: Option<Password>,
    /// `None` is plain text: only for a foreign 0-db, and for tests.
    pub tls: Option<ClientTls>,
    /// To connect, do the TLS handshake and select the namespace.
    pub connect_timeout: Duration,
    /// For one operation, from the moment its bytes are admitted.
    pub request_timeout: Duration,
    /// Connections held, at most.
    pub connections: usize,
    /// Bytes of values under way, at most.
    pub inflight_bytes: usize,
}

impl ClientConfig {
    /// Documented defaults: 5 s to connect, 30 s for an operation, 4 connections, 32 MiB under way.
    pub fn new(endpoint: impl Into<String>, namespace: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            namespace: namespace.into(),
            password: None,
            tls: None,
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(30),
            connections: 4,
            inflight_bytes: 32 << 20,
        }
    }
}

/// Why an operation did not happen, or may not have.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// No connection could be made, or it broke before the operation was sent: nothing happened.
    #[error("backend {endpoint} cannot be reached: {reason}")]
    Unreachable {
        /// Where.
        endpoint: String,
        /// What failed.
        reason: String,
    },
    /// No answer: a change may or may not have happened.
    #[error("backend {endpoint} did not answer ({reason}); the outcome is unknown")]
    Timeout {
        /// Where.
        endpoint: String,
        /// Deadline passed, or the connection broke.
        reason: String,
    },
    /// Quota or disk is full.
    #[error("backend {endpoint} has no space left")]
    Full {
        /// Where.
        endpoint: String,
    },
    /// The namespace takes no writes (locked, frozen, read-only, worm).
    #[error("backend {endpoint} takes no writes: {text}")]
    ReadOnly {
        /// Where.
        endpoint: String,
        /// The server's words.
        text: String,
    },
    /// The server refused.
    #[error("backend {endpoint} refused: {text}")]
    Refused {
        /// Where.
        endpoint: String,
        /// The server's words.
        text: String,
    },
    /// The server holds the key but its bytes do not verify.
    #[error("backend {endpoint} holds corrupt data under this key: {text}")]
    Corrupt {
        /// Where.
        endpoint: String,
        /// The server's words.
        text: String,
    },
}

/// Counters of a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NsInfo {
    /// Name.
    pub name: String,
    /// Live keys.
    pub entries: u64,
    /// Live payload bytes.
    pub data_size_bytes: u64,
    /// Quota; 0 is unlimited.
    pub data_limits_bytes: u64,
    /// Free bytes of the disk.
    pub free_disk_bytes: u64,
    /// Sequential keys (`mode: sequential`).
    pub sequential: bool,
    /// Locked or frozen.
    pub locked: bool,
}

impl NsInfo {
    /// What can still be stored: the smaller of quota and disk.
    pub fn free_bytes(&self) -> u64 {
        if self.data_limits_bytes == 0 {
            return self.free_disk_bytes;
        }
        let quota = self.data_limits_bytes.saturating_sub(self.data_size_bytes);
        quota.min(self.free_disk_bytes)
    }
}

/// One key of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanEntry {
    /// The key.
    pub key: Bytes,
    /// Bytes of its value.
    pub bytes: u64,
    /// When it was set, Unix seconds.
    pub timestamp: u64,
}

/// Part of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanPage {
    /// Hand this to the next scan.
    pub cursor: Bytes,
    /// Keys in the server's order.
    pub entries: Vec<ScanEntry>,
}
