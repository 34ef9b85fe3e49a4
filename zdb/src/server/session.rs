//! What a connection may do, and what its commands mean.

use super::manage;
use super::reply::{NAMESPACE_REMOVED, Reply, engine_error};
use super::{Admin, Ran, Server};
use crate::client::Password;
use crate::engine::{Answer, DEFAULT_NAMESPACE, EngineError, KEY_BYTES_MAX, KeyPage, Namespace};
use bytes::{Bytes, BytesMut};
use sha1::{Digest, Sha1};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Keys in one answer to SCAN.
const SCAN_KEYS_MAX: usize = 1000;
const CURSOR_BYTES: usize = 17;
/// WAIT without a time waits this long; the protocol's bounds.
const WAIT_DEFAULT_MS: u64 = 5000;
const WAIT_MS: std::ops::RangeInclusive<u64> = 100..=1_800_000;

/// The commands that exist here, as WAIT names them.
const COMMANDS: [&str; 29] = [
    "WAIT", "PING", "TIME", "AUTH", "SET", "SETX", "GET", "MGET", "DEL", "EXISTS", "CHECK", "SCAN",
    "SCANX", "RSCAN", "KSCAN", "KEYCUR", "LENGTH", "KEYTIME", "INFO", "STOP", "DBSIZE", "NSNEW",
    "NSDEL", "NSLIST", "NSSET", "NSINFO", "SELECT", "FLUSH", "*",
];

/// A write that was put in the engine's queue.
pub(super) struct PendingWrite {
    answer: Answer,
    delete: bool,
}

impl PendingWrite {
    pub(super) fn try_now(&mut self) -> Option<Result<Option<Bytes>, EngineError>> {
        self.answer.try_stored()
    }

    pub(super) async fn wait(&mut self) -> Result<Option<Bytes>, EngineError> {
        self.answer.stored().await
    }

    /// Done, and no key to answer: deleted, or unchanged.
    pub(super) fn reply_without_key(&self) -> Reply {
        if self.delete { Reply::ok() } else { Reply::Nil }
    }

    /// Where DEL has other words than SET.
    pub(super) fn error(&self, error: &EngineError) -> Option<Reply> {
        (self.delete && matches!(error, EngineError::Worm))
            .then(|| Reply::error("Cannot delete a key when namespace is in worm mode"))
    }
}

pub(super) enum Answering {
    Now(Reply),
    Set(PendingWrite),
    Delete(PendingWrite),
}

/// The state of one connection.
pub(super) struct Session {
    pub(super) server: Arc<Server>,
    pub(super) client: u64,
    pub(super) namespace: Option<Arc<Namespace>>,
    pub(super) writable: bool,
    pub(super) admin: bool,
    nonce: Option<String>,
}

fn command_of(request: &[Bytes]) -> Option<&'static str> {
    let name = request.first()?;
    COMMANDS
        .iter()
        .find(|known| known.as_bytes().eq_ignore_ascii_case(name))
        .copied()
}

impl Session {
    pub(super) fn new(server: Arc<Server>, client: u64) -> Self {
        let namespace = server.engine.namespace(DEFAULT_NAMESPACE);
        let admin = matches!(server.config.admin, Admin::Everyone);
        Self {
            server,
            client,
            namespace,
            writable: true,
            admin,
            nonce: None,
        }
    }

    /// Has it a namespace to work in?
    pub(super) fn is_let_in(&self) -> bool {
        self.namespace.is_some()
    }

    /// Everything but SET and DEL sees what was written before it on this connection.
    pub(super) fn waits_for_writes(&self, request: &[Bytes]) -> bool {
        !matches!(command_of(request), Some("SET" | "SETX" | "DEL" | "PING"))
    }

    /// Bytes that the answer will hold in memory.
    pub(super) fn answer_bytes(&self, request: &[Bytes]) -> usize {
        let Some(namespace) = &self.namespace else {
            return 0;
        };
        if !matches!(command_of(request), Some("GET" | "MGET")) {
            return 0;
        }
        // What cannot be looked up is answered with an error, which is short.
        let known = |key: &Bytes| namespace.stat(key).ok().flatten();
        let sizes = request[1..].iter().filter_map(known);
        sizes.map(|stat| stat.bytes as usize).sum()
    }

    /// Carry out a request.
    pub(super) async fn carry_out(&mut self, request: Vec<Bytes>) -> Answering {
        let Some(command) = command_of(&request) else {
            return Answering::Now(Reply::error("Command not supported"));
        };
        if self
            .namespace
            .as_ref()
            .is_some_and(|namespace| namespace.is_closed())
        {
            return Answering::Now(Reply::error(NAMESPACE_REMOVED));
        }
        if let Some(namespace) = &self.namespace {
            // Without anyone waiting this is an error that means nothing.
            let _ = self.server.ran.send(Ran {
                namespace: namespace.name().to_owned(),
                client: self.client,
                command,
            });
        }
        let answer = match command {
            "SET" | "SETX" => self.set(&request).map(Answering::Set),
            "DEL" => self.delete(&request).map(Answering::Delete),
            _ => Err(self.at_once(command, &request).await),
        };
        answer.unwrap_or_else(Answering::Now)
    }

    async fn at_once(&mut self, command: &'static str, request: &[Bytes]) -> Reply {
        let answer = match command {
            "PING" => Ok(Reply::Simple("PONG".to_owned())),
            "TIME" => Ok(time()),
            "INFO" => Ok(manage::info(self)),
            "AUTH" => self.auth(request),
            "SELECT" => self.select(request),
            "GET" => self.get(request).await,
            "MGET" => self.mget(request).await,
            "EXISTS" => self.exists(request),
            "CHECK" => self.check(request).await,
            "LENGTH" => self.stat(request, |stat| u64::from(stat.bytes)),
            "KEYTIME" => self.stat(request, |stat| u64::from(stat.timestamp)),
            "SCAN" | "SCANX" => self.scan(request, Namespace::keys_after),
            "RSCAN" => self.scan(request, Namespace::keys_before),
            "KSCAN" => self.kscan(request),
            "KEYCUR" => self.keycur(request),
            "DBSIZE" => self.dbsize(),
            "WAIT" => self.wait(request).await,
            "STOP" => Err(Reply::error("Unauthorized")),
            "*" => Err(Reply::error("This is not a valid command")),
            _ => manage::carry_out(self, command, request).await,
        };
        answer.unwrap_or_else(|error| error)
    }

    pub(super) fn current(&self) -> Result<&Arc<Namespace>, Reply> {
        self.namespace
            .as_ref()
            .ok_or_else(|| Reply::error("Namespace not found"))
    }

    /// The namespace, if data commands are possible in it now.
    fn thawed(&self) -> Result<&Arc<Namespace>, Reply> {
        let namespace = self.current()?;
        if namespace.settings().frozen {
            return Err(engine_error(&EngineError::Frozen));
        }
        Ok(namespace)
    }

    fn set(&self, request: &[Bytes]) -> Result<PendingWrite, Reply> {
        let (key, value, timestamp) = match request {
            [_, key, value] => (key, value, None),
            [_, key, value, timestamp] => (key, value, Some(timestamp)),
            _ => return Err(Reply::error("Unexpected arguments")),
        };
        let timestamp = timestamp.map(|text| self.timestamp(text)).transpose()?;
        let namespace = self.thawed()?;
        if !self.writable {
            return Err(Reply::error("Namespace is in read-only mode"));
        }
        // The key outlives the request in answers and overlays: it must not keep the value's buffer.
        let key = Bytes::copy_from_slice(key);
        match namespace.submit_set(key, value.clone(), timestamp) {
            Ok(answer) => Ok(PendingWrite {
                answer,
                delete: false,
            }),
            Err(error) => Err(engine_error(&error)),
        }
    }

    fn timestamp(&self, text: &[u8]) -> Result<u32, Reply> {
        if !self.admin {
            return Err(Reply::error("Permission denied"));
        }
        let number = std::str::from_utf8(text)
            .ok()
            .and_then(|text| text.parse().ok());
        number.ok_or_else(|| Reply::error("Invalid timestamp"))
    }

    fn delete(&self, request: &[Bytes]) -> Result<PendingWrite, Reply> {
        if let [_, _, timestamp] = request {
            self.timestamp(timestamp)?;
        } else if request.len() != 2 {
            return Err(Reply::error("Unexpected arguments"));
        }
        let key = key_argument(&request[1])?;
        let namespace = self.thawed()?;
        if !self.writable {
            return Err(Reply::error("Namespace is in read-only mode"));
        }
        match namespace.submit_delete(Bytes::copy_from_slice(key)) {
            Ok(answer) => Ok(PendingWrite {
                answer,
                delete: true,
            }),
            Err(error) => Err(engine_error(&error)),
        }
    }

    async fn get(&self, request: &[Bytes]) -> Result<Reply, Reply> {
        let key = only_key(request)?;
        value_reply(self.thawed()?.get(key).await)
    }

    async fn mget(&self, request: &[Bytes]) -> Result<Reply, Reply> {
        if request.len() < 2 {
            return Err(Reply::error("Invalid arguments"));
        }
        let namespace = self.thawed()?;
        let wanted = self.answer_bytes(request);
        if wanted > self.server.config.connection_inflight_bytes {
            return Err(Reply::error("Payload too big"));
        }
        let mut values = Vec::with_capacity(request.len() - 1);
        for key in &request[1..] {
            let key = key_argument(key)?;
            values.push(value_reply(namespace.get(key).await)?);
        }
        Ok(Reply::Array(values))
    }

    fn exists(&self, request: &[Bytes]) -> Result<Reply, Reply> {
        let key = only_key(request)?;
        let exists = self.thawed()?.exists(key);
        Ok(Reply::Integer(i64::from(
            exists.map_err(|error| engine_error(&error))?,
        )))
    }

    async fn check(&self, request: &[Bytes]) -> Result<Reply, Reply> {
        let key = only_key(request)?;
        Ok(match self.thawed()?.check(key).await {
            Ok(Some(sound)) => Reply::Integer(i64::from(sound)),
            Ok(None) => Reply::Nil,
            Err(EngineError::Frozen) => engine_error(&EngineError::Frozen),
            Err(_) => Reply::Integer(-1),
        })
    }

    fn stat(
        &self,
        request: &[Bytes],
        field: impl FnOnce(&crate::engine::KeyStat) -> u64,
    ) -> Result<Reply, Reply> {
        let key = only_key(request)?;
        let stat = self.thawed()?.stat(key);
        let stat = stat.map_err(|error| engine_error(&error))?;
        Ok(stat.map_or(Reply::Nil, |stat| Reply::integer(field(&stat))))
    }

    fn scan(
        &self,
        request: &[Bytes],
        pages: impl FnOnce(&Namespace, Option<u64>, usize) -> Result<KeyPage, EngineError>,
    ) -> Result<Reply, Reply> {
        let position = match request {
            [_] => None,
            [_, cursor] => {
                Some(decode_cursor(cursor).ok_or_else(|| Reply::error("Invalid key format"))?)
            }
            _ => return Err(Reply::error("Unexpected arguments")),
        };
        let page = pages(self.thawed()?, position, SCAN_KEYS_MAX);
        let page = page.map_err(|error| engine_error(&error))?;
        let Some(last) = page.next else {
            return Err(Reply::error("No more data"));
        };
        let rows = page.keys.into_iter().map(|stat| {
            Reply::Array(vec![
                Reply::Bulk(stat.key),
                Reply::integer(u64::from(stat.bytes)),
                Reply::integer(u64::from(stat.timestamp)),
            ])
        });
        Ok(Reply::Array(vec![
            Reply::Bulk(encode_cursor(last)),
            Reply::Array(rows.collect()),
        ]))
    }

    fn kscan(&self, request: &[Bytes]) -> Result<Reply, Reply> {
        let prefix = only_key(request)?;
        let namespace = self.thawed()?;
        if namespace.settings().mode == crate::engine::Mode::Sequential {
            return Err(Reply::error(
                "Index running mode doesn't support this feature",
            ));
        }
        let mut found = Vec::new();
        let mut position = None;
        loop {
            let page = namespace.keys_after(position, SCAN_KEYS_MAX);
            let page = page.map_err(|error| engine_error(&error))?;
            let matching = page
                .keys
                .into_iter()
                .filter(|stat| stat.key.starts_with(prefix));
            found.extend(matching.map(|stat| Reply::Bulk(stat.key)));
            if page.next.is_none() || found.len() >= SCAN_KEYS_MAX {
                break;
            }
            position = page.next;
        }
        if found.is_empty() {
            return Err(Reply::error("No keys match"));
        }
        Ok(Reply::Array(vec![Reply::bulk("0"), Reply::Array(found)]))
    }

    fn keycur(&self, request: &[Bytes]) -> Result<Reply, Reply> {
        let key = only_key(request)?;
        match self.thawed()?.stat(key) {
            Ok(Some(stat)) => Ok(Reply::Bulk(encode_cursor(stat.position))),
            Ok(None) => Err(Reply::error("Key not found")),
            Err(error) => Err(engine_error(&error)),
        }
    }

    fn dbsize(&self) -> Result<Reply, Reply> {
        let usage = self
            .current()?
            .usage()
            .map_err(|error| engine_error(&error))?;
        Ok(Reply::integer(usage.keys))
    }

    async fn wait(&self, request: &[Bytes]) -> Result<Reply, Reply> {
        let (watched, ms) = match request {
            [_, watched] => (watched, WAIT_DEFAULT_MS),
            [_, watched, ms] => {
                let ms = std::str::from_utf8(ms)
                    .ok()
                    .and_then(|text| text.parse().ok());
                let ms = ms.filter(|ms| WAIT_MS.contains(ms));
                (watched, ms.ok_or_else(|| Reply::error("Invalid timeout"))?)
            }
            _ => return Err(Reply::error("Invalid arguments")),
        };
        let any = &watched[..] == b"*";
        let known = COMMANDS
            .iter()
            .find(|known| known.as_bytes().eq_ignore_ascii_case(watched));
        let Some(watched) = known else {
            return Err(Reply::error("Unknown command to watch"));
        };
        let name = self.current()?.name().to_owned();
        let mut ran = self.server.ran.subscribe();
        let seen = async {
            loop {
                match ran.recv().await {
                    Ok(ran)
                        if ran.client != self.client
                            && ran.namespace == name
                            && (any || ran.command == *watched) =>
                    {
                        return ran.command;
                    }
                    Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                    // The server holds a sender; it ends with the server.
                    Err(_) => std::future::pending::<()>().await,
                }
            }
        };
        match tokio::time::timeout(Duration::from_millis(ms), seen).await {
            Ok(command) => Ok(Reply::Simple(command.to_owned())),
            Err(_) => Err(Reply::error("Timeout")),
        }
    }

    fn auth(&mut self, request: &[Bytes]) -> Result<Reply, Reply> {
        match request {
            [_, password] => {
                let Admin::Password(wanted) = &self.server.config.admin else {
                    return Err(Reply::error("Authentication disabled"));
                };
                if password.len() > 128 {
                    return Err(Reply::error("Password too long"));
                }
                if !same(password, wanted.expose().as_bytes()) {
                    return Err(Reply::error("Access denied"));
                }
            }
            [_, method, challenge]
                if method.eq_ignore_ascii_case(b"SECURE")
                    && challenge.eq_ignore_ascii_case(b"CHALLENGE") =>
            {
                let nonce = crate::hex::encode(&rand::random::<[u8; 8]>());
                self.nonce = Some(nonce.clone());
                return Ok(Reply::Simple(nonce));
            }
            [_, method, hash] if method.eq_ignore_ascii_case(b"SECURE") => {
                let Admin::Password(wanted) = self.server.config.admin.clone() else {
                    return Err(Reply::error("Authentication disabled"));
                };
                self.secure(hash, &wanted)?;
            }
            [_, _, _] => return Err(Reply::error("Only SECURE extra method supported")),
            _ => return Err(Reply::error("Unexpected arguments")),
        }
        self.admin = true;
        Ok(Reply::ok())
    }

    /// Compare with sha1 of nonce and password; the nonce is used up.
    fn secure(&mut self, hash: &[u8], wanted: &Password) -> Result<(), Reply> {
        if self.nonce.is_none() {
            return Err(Reply::error(
                "No CHALLENGE requested, secure authentication not available",
            ));
        }
        if hash.len() != 40 {
            return Err(Reply::error("Invalid hash length"));
        }
        let nonce = self.nonce.take().unwrap_or_default();
        let mut hasher = Sha1::new();
        hasher.update(nonce.as_bytes());
        hasher.update(b":");
        hasher.update(wanted.expose().as_bytes());
        let expected = crate::hex::encode(&hasher.finalize());
        if same(hash, expected.as_bytes()) {
            Ok(())
        } else {
            Err(Reply::error("Access denied"))
        }
    }

    fn select(&mut self, request: &[Bytes]) -> Result<Reply, Reply> {
        let (name, secrets) = match request {
            [_, name, secrets @ ..] if !name.is_empty() => (name, secrets),
            _ => return Err(Reply::error("Invalid argument")),
        };
        let found = std::str::from_utf8(name)
            .ok()
            .and_then(|name| self.server.engine.namespace(name));
        let namespace = found.ok_or_else(|| Reply::error("Namespace not found"))?;
        let settings = namespace.settings();
        let mut writable = true;
        if let Some(password) = &settings.password {
            match secrets {
                [] if settings.public => writable = false,
                [] => return Err(Reply::error("Namespace protected and private")),
                [secret] if secret.len() > 255 => return Err(Reply::error("Password too long")),
                [secret] if same(secret, password.as_bytes()) => {}
                [_] => return Err(Reply::error("Access denied")),
                [method, hash] if method.eq_ignore_ascii_case(b"SECURE") => {
                    self.secure(hash, &Password::new(password.clone()))?;
                }
                [_, _] => return Err(Reply::error("Only SECURE extra method supported")),
                _ => return Err(Reply::error("Too many arguments")),
            }
        }
        self.writable = writable;
        self.namespace = Some(namespace);
        Ok(Reply::ok())
    }
}

fn value_reply(value: Result<Option<Bytes>, EngineError>) -> Result<Reply, Reply> {
    match value {
        Ok(Some(value)) => Ok(Reply::Bulk(value)),
        Ok(None) => Ok(Reply::Nil),
        Err(error) => Err(engine_error(&error)),
    }
}

/// In time that does not tell how much agrees.
fn same(given: &[u8], wanted: &[u8]) -> bool {
    blake3::hash(given) == blake3::hash(wanted)
}

fn key_argument(key: &Bytes) -> Result<&Bytes, Reply> {
    match key.len() {
        0 => Err(Reply::error("Invalid argument")),
        1..=KEY_BYTES_MAX => Ok(key),
        _ => Err(Reply::error("Invalid key")),
    }
}

fn only_key(request: &[Bytes]) -> Result<&Bytes, Reply> {
    match request {
        [_, key] => key_argument(key),
        _ => Err(Reply::error("Unexpected arguments")),
    }
}

/// Opaque to clients, 17 bytes as in 0-db: a position in scan order, and what shows that it is one of ours.
fn encode_cursor(position: u64) -> Bytes {
    let mut bytes = BytesMut::with_capacity(CURSOR_BYTES);
    bytes.extend_from_slice(&[8]);
    bytes.extend_from_slice(&position.to_le_bytes());
    bytes.extend_from_slice(&blake3::hash(&position.to_le_bytes()).as_bytes()[..8]);
    bytes.freeze()
}

fn decode_cursor(cursor: &[u8]) -> Option<u64> {
    let position = u64::from_le_bytes(cursor.get(1..9)?.try_into().ok()?);
    (encode_cursor(position)[..] == *cursor).then_some(position)
}

fn time() -> Reply {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Reply::Array(vec![
        Reply::bulk(now.as_secs().to_string()),
        Reply::bulk(now.subsec_micros().to_string()),
    ])
}
