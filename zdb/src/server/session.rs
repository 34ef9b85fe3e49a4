//! What a connection may do, and what its commands mean.

use super::command::Command;
use super::reply::{INTERNAL, NAMESPACE_REMOVED, Reply, engine_error};
use super::values::{PendingWrite, READ_ONLY, Values};
use super::watch::Ran;
use super::{Admin, Server, files, instance, manage, scan, values};
use crate::client::Password;
use crate::engine::{Caller, DEFAULT_NAMESPACE, EngineError, Namespace, VALUE_BYTES_MAX};
use bytes::Bytes;
use sha1::{Digest, Sha1};
use std::sync::Arc;
use std::time::Duration;

/// WAIT without a time waits this long; the protocol's bounds.
const WAIT_DEFAULT_MS: u64 = 5000;
const WAIT_MS: std::ops::RangeInclusive<u64> = 100..=1_800_000;
/// Bytes of passwords.
const ADMIN_PASSWORD_BYTES_MAX: usize = 128;
const NAMESPACE_PASSWORD_BYTES_MAX: usize = 255;
/// Characters of a proof, hex sha1.
const PROOF_BYTES: usize = 40;

/// How a request is answered.
pub(super) enum Answering {
    Now(Reply),
    /// With this the connection ends.
    Last(Reply),
    /// When the engine has done it.
    Write(PendingWrite),
    /// With values, read one after the other.
    Values(Values),
}

/// The state of one connection.
pub(super) struct Session {
    pub(super) server: Arc<Server>,
    pub(super) client: u64,
    pub(super) namespace: Option<Arc<Namespace>>,
    writable: bool,
    pub(super) admin: bool,
    nonce: Option<String>,
    /// Where the last DATA RAW ended.
    pub(super) raw: Option<files::Place>,
}

impl Session {
    pub(super) fn new(server: Arc<Server>, client: u64) -> Self {
        let namespace = server.engine.namespace(DEFAULT_NAMESPACE);
        let admin = matches!(server.config.admin, Admin::Everyone);
        Self {
            writable: !server.config.protect,
            server,
            client,
            namespace,
            admin,
            nonce: None,
            raw: None,
        }
    }

    /// Has it a namespace to work in?
    pub(super) fn is_let_in(&self) -> bool {
        self.namespace.is_some()
    }

    /// Bytes that carrying a request out takes before its answer is there: values that are read whole.
    pub(super) fn reading_bytes(&self, command: Command, request: &[Bytes]) -> usize {
        match (command, &self.namespace, request) {
            (Command::History | Command::Data, _, _) => VALUE_BYTES_MAX,
            (Command::Check, Some(namespace), [_, key]) => {
                let stat = namespace.stat(key).ok().flatten();
                stat.map_or(0, |stat| stat.bytes as usize)
            }
            _ => 0,
        }
    }

    /// What those that WAIT are told of a command that was run here; nothing if nobody waits.
    pub(super) fn ran(&self, command: Command) -> Option<Ran> {
        if !self.server.watch.is_watched() {
            return None;
        }
        Some(Ran {
            namespace: self.namespace.as_ref()?.name().to_owned(),
            client: self.client,
            command,
        })
    }

    /// Carry out a request.
    pub(super) async fn carry_out(
        &mut self,
        command: Command,
        request: Vec<Bytes>,
        caller: Caller,
    ) -> Answering {
        if self
            .namespace
            .as_ref()
            .is_some_and(|namespace| namespace.is_closed())
        {
            return Answering::Last(Reply::error(NAMESPACE_REMOVED));
        }
        let answering = match command {
            Command::Set | Command::SetX => values::set(self, &request, caller),
            Command::Del => values::delete(self, &request, caller),
            Command::Get => values::get(self, request),
            Command::MGet => values::mget(self, request),
            _ => self.at_once(command, &request).await.map(Answering::Now),
        };
        match answering {
            Ok(answering) => answering,
            Err(reply) if reply.is_removal() => Answering::Last(reply),
            Err(reply) => Answering::Now(reply),
        }
    }

    async fn at_once(&mut self, command: Command, request: &[Bytes]) -> Result<Reply, Reply> {
        match command {
            Command::Ping => Ok(Reply::simple("PONG")),
            Command::Time => Ok(instance::time()),
            Command::Info => Ok(instance::info(self)),
            Command::Auth => self.auth(request),
            Command::Select => self.select(request),
            Command::Exists => values::exists(self, request),
            Command::Check => values::check(self, request).await,
            Command::Length => values::stat(self, request, |stat| stat.bytes),
            Command::KeyTime => values::stat(self, request, |stat| stat.timestamp),
            Command::Scan | Command::ScanX => {
                scan::scan(self, request, Namespace::keys_after).await
            }
            Command::RScan => scan::scan(self, request, Namespace::keys_before).await,
            Command::History => values::history(self, request).await,
            Command::KScan => scan::kscan(self, request).await,
            Command::KeyCur => scan::keycur(self, request),
            Command::DbSize => scan::dbsize(self),
            Command::Wait => self.wait(request).await,
            Command::NsNew => manage::create(self, request).await,
            Command::NsDel => manage::remove(self, request).await,
            Command::NsList => Ok(manage::list(self)),
            Command::NsSet => manage::change(self, request).await,
            Command::NsInfo => manage::nsinfo(self, request),
            Command::NsJump => manage::jump(self).await,
            Command::Reload => manage::reload(self, request).await,
            Command::Flush => manage::flush(self).await,
            Command::Stop => instance::stop(self),
            Command::Hooks => instance::hooks(self),
            Command::Index => files::index(self, request),
            Command::Data => files::data(self, request).await,
            Command::Mirror | Command::Master => instance::mirror(self),
            Command::Asterisk => Err(Reply::error("This is not a valid command")),
            // Answered by `carry_out`.
            Command::Set | Command::SetX | Command::Del | Command::Get | Command::MGet => {
                Err(Reply::error(INTERNAL))
            }
        }
    }

    pub(super) fn current(&self) -> Result<&Arc<Namespace>, Reply> {
        self.namespace
            .as_ref()
            .ok_or_else(|| Reply::error("Namespace not found"))
    }

    /// The namespace, if data commands are possible in it now.
    pub(super) fn thawed(&self) -> Result<&Arc<Namespace>, Reply> {
        let namespace = self.current()?;
        if namespace.settings().frozen {
            return Err(engine_error(&EngineError::Frozen));
        }
        Ok(namespace)
    }

    /// The namespace, if this connection may write to it. Whether it is frozen or locked is for the engine to decide, in order with the
    /// writes.
    pub(super) fn writable(&self) -> Result<&Arc<Namespace>, Reply> {
        if !self.writable {
            return Err(Reply::error(READ_ONLY));
        }
        self.current()
    }

    pub(super) fn require_admin(&self) -> Result<(), Reply> {
        if self.admin {
            return Ok(());
        }
        self.server.counters.unauthorized.add(1);
        Err(Reply::error("Permission denied"))
    }

    /// Only an admin may set one.
    pub(super) fn timestamp(&self, text: &[u8]) -> Result<u32, Reply> {
        self.require_admin()?;
        let number = std::str::from_utf8(text)
            .ok()
            .and_then(|text| text.parse().ok());
        number.ok_or_else(|| Reply::error("Invalid timestamp"))
    }

    async fn wait(&self, request: &[Bytes]) -> Result<Reply, Reply> {
        let (watched, ms) = match request {
            [_, watched] => (watched, None),
            [_, watched, ms] => (watched, Some(ms)),
            _ => return Err(Reply::error("Invalid arguments")),
        };
        let Some(watched) = Command::named(watched) else {
            return Err(Reply::error("Unknown command to watch"));
        };
        let ms = match ms {
            None => WAIT_DEFAULT_MS,
            Some(ms) => std::str::from_utf8(ms)
                .ok()
                .and_then(|text| text.parse().ok())
                .filter(|ms| WAIT_MS.contains(ms))
                .ok_or_else(|| Reply::error("Invalid timeout"))?,
        };
        let name = self.current()?.name();
        let wanted = |ran: &Ran| {
            ran.client != self.client
                && ran.namespace == name
                && (watched == Command::Asterisk || ran.command == watched)
        };
        let patience = Duration::from_millis(ms);
        match self.server.watch.next(patience, wanted).await {
            Some(command) => Ok(Reply::simple(command.name())),
            None => Err(Reply::error("Timeout")),
        }
    }

    fn auth(&mut self, request: &[Bytes]) -> Result<Reply, Reply> {
        let disabled = || Reply::error("Authentication disabled");
        match request {
            [_, password] => {
                let wanted = self.server.config.admin.password().ok_or_else(disabled)?;
                if password.is_empty() {
                    return Err(Reply::error("Invalid argument"));
                }
                if password.len() > ADMIN_PASSWORD_BYTES_MAX {
                    return Err(Reply::error("Password too long"));
                }
                if !same(password, wanted.expose().as_bytes()) {
                    return Err(Reply::error("Access denied"));
                }
            }
            [_, method, word] if method.is_empty() || word.is_empty() => {
                return Err(Reply::error("Invalid argument"));
            }
            [_, method, word] if method.eq_ignore_ascii_case(b"SECURE") => {
                if word.eq_ignore_ascii_case(b"CHALLENGE") {
                    let nonce = crate::hex::encode(&rand::random::<[u8; 8]>());
                    self.nonce = Some(nonce.clone());
                    return Ok(Reply::simple(nonce));
                }
                let wanted = self.server.config.admin.password().cloned();
                self.prove(word, &wanted.ok_or_else(disabled)?)?;
            }
            [_, _, _] => return Err(Reply::error("Only SECURE extra method supported")),
            _ => return Err(Reply::error("Unexpected arguments")),
        }
        self.admin = true;
        Ok(Reply::ok())
    }

    /// Compare with sha1 of nonce and password; the nonce is used up, whatever comes of it.
    fn prove(&mut self, proof: &[u8], wanted: &Password) -> Result<(), Reply> {
        if self.nonce.is_none() {
            return Err(Reply::error(
                "No CHALLENGE requested, secure authentication not available",
            ));
        }
        if proof.len() != PROOF_BYTES {
            return Err(Reply::error("Invalid hash length"));
        }
        let nonce = self.nonce.take().unwrap_or_default();
        let mut hasher = Sha1::new();
        hasher.update(nonce.as_bytes());
        hasher.update(b":");
        hasher.update(wanted.expose().as_bytes());
        let expected = crate::hex::encode(&hasher.finalize());
        if same(proof, expected.as_bytes()) {
            Ok(())
        } else {
            Err(Reply::error("Access denied"))
        }
    }

    fn select(&mut self, request: &[Bytes]) -> Result<Reply, Reply> {
        let [_, name, secrets @ ..] = request else {
            return Err(Reply::error("Invalid argument"));
        };
        let namespace = manage::named(self, name)?;
        let settings = namespace.settings();
        let mut writable = true;
        if let Some(password) = self.password_of(namespace.name(), settings.password) {
            match secrets {
                [] if settings.public => writable = false,
                [] => return Err(Reply::error("Namespace protected and private")),
                [secret] if secret.len() > NAMESPACE_PASSWORD_BYTES_MAX => {
                    return Err(Reply::error("Password too long"));
                }
                [secret] if same(secret, password.expose().as_bytes()) => {}
                [_] => return Err(Reply::error("Access denied")),
                [method, proof] if method.eq_ignore_ascii_case(b"SECURE") => {
                    self.prove(proof, &password)?;
                }
                [_, _] => return Err(Reply::error("Only SECURE extra method supported")),
                _ => return Err(Reply::error("Too many arguments")),
            }
        }
        self.writable = writable;
        self.namespace = Some(namespace);
        Ok(Reply::ok())
    }

    /// What SELECT asks for. The default namespace of a protected server has the admin's password.
    pub(super) fn password_of(&self, name: &str, own: Option<String>) -> Option<Password> {
        if self.server.config.protect && name == DEFAULT_NAMESPACE {
            return self.server.config.admin.password().cloned();
        }
        own.map(Password::new)
    }
}

/// In time that does not tell how much agrees.
fn same(given: &[u8], wanted: &[u8]) -> bool {
    blake3::hash(given) == blake3::hash(wanted)
}
