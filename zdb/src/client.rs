//! A client of any 0-db, ours or a foreign one.
//!
//! Invariants: every operation ends within its deadline; a connection whose answer did not come in time is dropped (the answers after it
//! would belong to other questions); bytes under way are bounded; a SET or DEL whose answer is missing is [`ClientError::Timeout`], its
//! outcome *unknown*.

mod connection;
mod pool;

use bytes::Bytes;
use pool::{Pool, Repeat, Use};
use redis::Value;
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

/// A client of one namespace of one 0-db; clones share its connections.
#[derive(Debug, Clone)]
pub struct ZdbClient {
    pool: Arc<Pool>,
}

/// Bytes reserved of the budget for a value whose size is not known yet.
const GET_RESERVE_BYTES: usize = 1 << 20;

impl ZdbClient {
    /// Connections are made when they are first needed.
    pub fn new(config: ClientConfig) -> Self {
        Self {
            pool: Arc::new(Pool::new(config)),
        }
    }

    /// Where it connects to.
    pub fn endpoint(&self) -> &str {
        self.pool.endpoint()
    }

    /// The value of a key; `None` if there is none.
    pub async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, ClientError> {
        let mut command = redis::cmd("GET");
        command.arg(key);
        let answer = self
            .pool
            .ask(&command, Use::Data(GET_RESERVE_BYTES), Repeat::Once)
            .await;
        match answer {
            Ok(Value::Nil) => Ok(None),
            Ok(Value::BulkString(value)) => Ok(Some(Bytes::from(value))),
            Ok(other) => Err(self.surprised("GET", &other)),
            Err(ClientError::Refused { endpoint, text }) if text.starts_with("Internal Error") => {
                Err(ClientError::Corrupt { endpoint, text })
            }
            Err(error) => Err(error),
        }
    }

    /// Store a value; durable when this returns `Ok` (as far as the server keeps its promise).
    pub async fn set(&self, key: &[u8], value: Bytes) -> Result<(), ClientError> {
        let mut command = redis::Cmd::with_capacity(3, value.len() + key.len() + 16);
        command.arg("SET").arg(key).arg(&value[..]);
        // Storing the same bytes twice is storing them once: a connection that broke may be replaced.
        match self
            .pool
            .ask(&command, Use::Data(value.len()), Repeat::Once)
            .await?
        {
            Value::Nil | Value::BulkString(_) | Value::Okay => Ok(()),
            other => Err(self.surprised("SET", &other)),
        }
    }

    /// Append a value to a namespace in sequential mode; returns its new key.
    pub async fn append(&self, value: Bytes) -> Result<Bytes, ClientError> {
        let mut command = redis::Cmd::with_capacity(3, value.len() + 16);
        command.arg("SET").arg(&b""[..]).arg(&value[..]);
        match self
            .pool
            .ask(&command, Use::Data(value.len()), Repeat::Never)
            .await?
        {
            Value::BulkString(id) => Ok(Bytes::from(id)),
            other => Err(self.surprised("SET", &other)),
        }
    }

    /// Delete a key; `false` if there was none.
    pub async fn delete(&self, key: &[u8]) -> Result<bool, ClientError> {
        let mut command = redis::cmd("DEL");
        command.arg(key);
        match self.pool.ask(&command, Use::Data(0), Repeat::Never).await {
            Ok(_) => Ok(true),
            Err(ClientError::Refused { text, .. }) if text == "Key not found" => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Is there such a key?
    pub async fn exists(&self, key: &[u8]) -> Result<bool, ClientError> {
        let mut command = redis::cmd("EXISTS");
        command.arg(key);
        match self.pool.ask(&command, Use::Data(0), Repeat::Once).await? {
            Value::Int(count) => Ok(count > 0),
            other => Err(self.surprised("EXISTS", &other)),
        }
    }

    /// Let the server verify a value without sending it: `None` no such key, `Some(false)` corrupt.
    pub async fn check(&self, key: &[u8]) -> Result<Option<bool>, ClientError> {
        let mut command = redis::cmd("CHECK");
        command.arg(key);
        match self.pool.ask(&command, Use::Data(0), Repeat::Once).await? {
            Value::Nil => Ok(None),
            Value::Int(verdict) => Ok(Some(verdict == 1)),
            other => Err(self.surprised("CHECK", &other)),
        }
    }

    /// The next keys after a cursor (`None`: from the start); `None` at the end.
    pub async fn scan(&self, cursor: Option<&[u8]>) -> Result<Option<ScanPage>, ClientError> {
        let mut command = redis::cmd("SCAN");
        if let Some(cursor) = cursor {
            command.arg(cursor);
        }
        match self.pool.ask(&command, Use::Control, Repeat::Once).await {
            Ok(answer) => match scan_page(answer) {
                Some(page) => Ok(Some(page)),
                None => Err(self.surprised("SCAN", &Value::Nil)),
            },
            Err(ClientError::Refused { text, .. }) if text == "No more data" => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Counters of the namespace.
    pub async fn nsinfo(&self) -> Result<NsInfo, ClientError> {
        let mut command = redis::cmd("NSINFO");
        command.arg(self.pool.namespace());
        match self.pool.ask(&command, Use::Control, Repeat::Once).await? {
            Value::BulkString(text) => Ok(parse_nsinfo(&String::from_utf8_lossy(&text))),
            other => Err(self.surprised("NSINFO", &other)),
        }
    }

    /// Does the server answer?
    pub async fn ping(&self) -> Result<(), ClientError> {
        let command = redis::cmd("PING");
        self.pool
            .ask(&command, Use::Control, Repeat::Once)
            .await
            .map(|_| ())
    }

    /// Any command, for tools and tests; the answer as the redis crate has it.
    pub async fn command(&self, arguments: &[&[u8]]) -> Result<Value, ClientError> {
        let mut command = redis::Cmd::new();
        for argument in arguments {
            command.arg(argument);
        }
        self.pool.ask(&command, Use::Control, Repeat::Never).await
    }

    fn surprised(&self, command: &str, answer: &Value) -> ClientError {
        let kind = match answer {
            Value::Nil => "nil",
            Value::Int(_) => "an integer",
            Value::BulkString(_) => "a bulk string",
            Value::Array(_) => "an array",
            _ => "something else",
        };
        ClientError::Refused {
            endpoint: self.endpoint().to_owned(),
            text: format!("{command} was answered with {kind}, which no 0-db does"),
        }
    }
}

fn bulk(value: Value) -> Option<Bytes> {
    match value {
        Value::BulkString(bytes) => Some(Bytes::from(bytes)),
        _ => None,
    }
}

fn unsigned(value: &Value) -> Option<u64> {
    match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}

fn scan_page(answer: Value) -> Option<ScanPage> {
    let Value::Array(parts) = answer else {
        return None;
    };
    let mut parts = parts.into_iter();
    let cursor = bulk(parts.next()?)?;
    let Value::Array(rows) = parts.next()? else {
        return None;
    };
    let entries = rows.into_iter().map(|row| {
        let Value::Array(fields) = row else {
            return None;
        };
        let mut fields = fields.into_iter();
        Some(ScanEntry {
            key: bulk(fields.next()?)?,
            bytes: unsigned(&fields.next()?)?,
            timestamp: unsigned(&fields.next()?)?,
        })
    });
    Some(ScanPage {
        cursor,
        entries: entries.collect::<Option<_>>()?,
    })
}

fn parse_nsinfo(text: &str) -> NsInfo {
    let mut info = NsInfo::default();
    let number = |value: &str| value.parse().unwrap_or(0);
    for line in text.lines() {
        let Some((field, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        match field.trim() {
            "name" => info.name = value.to_owned(),
            "entries" => info.entries = number(value),
            "data_size_bytes" => info.data_size_bytes = number(value),
            "data_limits_bytes" => info.data_limits_bytes = number(value),
            "data_disk_freespace_bytes" => info.free_disk_bytes = number(value),
            "mode" => info.sequential = value == "sequential",
            "locked" => info.locked = value != "no" && value != "0",
            _ => {}
        }
    }
    info
}
