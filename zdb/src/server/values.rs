//! Commands about values and keys.

use super::manage::blocking;
use super::reply::{Reply, engine_error};
use super::session::{Answering, Session};
use crate::engine::{Answer, Caller, EngineError, KEY_BYTES_MAX, KeyStat, Namespace};
use bytes::Bytes;
use std::sync::Arc;

/// A write that was put in the engine's queue.
pub(super) struct PendingWrite {
    answer: Answer,
    delete: bool,
    /// Bytes of its value.
    pub(super) value_bytes: usize,
}

impl PendingWrite {
    /// Was it carried out by the thread that asked?
    pub(super) fn is_known(&self) -> bool {
        self.answer.is_known()
    }

    /// The reply, if the outcome is known already.
    pub(super) fn try_reply(&mut self) -> Option<Reply> {
        let outcome = self.answer.try_stored()?;
        Some(self.reply(outcome))
    }

    /// The reply once the outcome is known.
    pub(super) async fn wait(&mut self) -> Reply {
        let outcome = self.answer.stored().await;
        self.reply(outcome)
    }

    fn reply(&self, outcome: Result<Option<Bytes>, EngineError>) -> Reply {
        match outcome {
            Ok(Some(key)) => Reply::Bulk(key),
            Ok(None) if self.delete => Reply::ok(),
            // The value was the same already.
            Ok(None) => Reply::Nil,
            Err(EngineError::Worm) if self.delete => Reply::error(WORM_DELETE),
            Err(error) => engine_error(&error),
        }
    }
}

pub(super) const READ_ONLY: &str = "Namespace is in read-only mode";
pub(super) const WORM_DELETE: &str = "Cannot delete a key when namespace is in worm mode";

/// Values to read, each answered by itself.
pub(super) struct Values {
    pub(super) namespace: Arc<Namespace>,
    pub(super) keys: Vec<Bytes>,
    /// Begin with the header of an array.
    pub(super) array: bool,
}

impl Values {
    /// Bytes that the answer for a key will hold in memory.
    pub(super) fn answer_bytes(&self, key: &[u8]) -> usize {
        // What cannot be looked up is answered with an error, which is short.
        let stat = self.namespace.stat(key).ok().flatten();
        stat.map_or(0, |stat| stat.bytes as usize)
    }

    /// The value of a key as a reply.
    pub(super) async fn read(&self, key: &[u8]) -> Reply {
        match self.namespace.get(key).await {
            Ok(Some(value)) => Reply::Bulk(value),
            Ok(None) => Reply::Nil,
            Err(error) => engine_error(&error),
        }
    }
}

pub(super) fn set(
    session: &Session,
    request: &[Bytes],
    caller: Caller,
) -> Result<Answering, Reply> {
    let (key, value, timestamp) = match request {
        [_, key, value] => (key, value, None),
        [_, key, value, timestamp] => (key, value, Some(session.timestamp(timestamp)?)),
        _ => return Err(Reply::error("Unexpected arguments")),
    };
    if key.len() > KEY_BYTES_MAX {
        return Err(Reply::error("Key too large"));
    }
    let namespace = session.writable()?;
    // The key outlives the request in answers and overlays: it must not keep the value's buffer.
    let key = Bytes::copy_from_slice(key);
    let answer = namespace.submit_set(key, value.clone(), timestamp, caller);
    Ok(Answering::Write(PendingWrite {
        answer: answer.map_err(|error| engine_error(&error))?,
        delete: false,
        value_bytes: value.len(),
    }))
}

pub(super) fn delete(
    session: &Session,
    request: &[Bytes],
    caller: Caller,
) -> Result<Answering, Reply> {
    let (key, timestamp) = match request {
        [_, key] => (key_argument(key)?, None),
        [_, key, timestamp] => {
            let timestamp = session.timestamp(timestamp)?;
            (key_argument(key)?, Some(timestamp))
        }
        _ => return Err(Reply::error("Unexpected arguments")),
    };
    let namespace = session.writable()?;
    let answer = namespace.submit_delete(Bytes::copy_from_slice(key), timestamp, caller);
    Ok(Answering::Write(PendingWrite {
        answer: answer.map_err(|error| engine_error(&error))?,
        delete: true,
        value_bytes: 0,
    }))
}

pub(super) fn get(session: &Session, mut request: Vec<Bytes>) -> Result<Answering, Reply> {
    only_key(&request)?;
    // A frozen namespace says so when it is asked.
    let namespace = Arc::clone(session.current()?);
    request.remove(0);
    Ok(Answering::Values(Values {
        namespace,
        keys: request,
        array: false,
    }))
}

pub(super) fn mget(session: &Session, mut request: Vec<Bytes>) -> Result<Answering, Reply> {
    request.remove(0);
    if request.is_empty() {
        return Err(Reply::error("Invalid arguments"));
    }
    if request.iter().any(|key| key.len() > KEY_BYTES_MAX) {
        return Err(Reply::error("Invalid key"));
    }
    Ok(Answering::Values(Values {
        namespace: Arc::clone(session.thawed()?),
        keys: request,
        array: true,
    }))
}

pub(super) fn exists(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    let key = only_key(request)?;
    let exists = session.thawed()?.exists(key);
    let exists = exists.map_err(|error| engine_error(&error))?;
    Ok(Reply::Integer(i64::from(exists)))
}

pub(super) async fn check(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    let key = only_key(request)?;
    Ok(match session.current()?.check(key).await {
        Ok(Some(sound)) => Reply::Integer(i64::from(sound)),
        Ok(None) => Reply::Nil,
        Err(error @ (EngineError::Frozen | EngineError::Closed)) => engine_error(&error),
        Err(_) => Reply::Integer(-1),
    })
}

/// LENGTH and KEYTIME.
pub(super) fn stat(
    session: &Session,
    request: &[Bytes],
    field: impl FnOnce(&KeyStat) -> u32,
) -> Result<Reply, Reply> {
    let key = only_key(request)?;
    let stat = session.thawed()?.stat(key);
    let stat = stat.map_err(|error| engine_error(&error))?;
    Ok(stat.map_or(Reply::Nil, |stat| Reply::integer(u64::from(field(&stat)))))
}

/// HISTORY key, then HISTORY key VERSION with the version that the answer before named, back to the first that is kept.
pub(super) async fn history(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    let (key, version) = match request {
        [_, key] => (key, None),
        [_, key, version] => (key, Some(version)),
        _ => return Err(Reply::error("Invalid arguments")),
    };
    let namespace = Arc::clone(session.thawed()?);
    let version = match version {
        None => None,
        Some(version) => {
            let version = <[u8; 8]>::try_from(&version[..]);
            match u64::from_le_bytes(version.map_err(|_| Reply::error("Invalid arguments"))?) {
                0 => return Err(Reply::error("No more history")),
                version => Some(version),
            }
        }
    };
    let not_found = || Reply::error("Key not found");
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        return Err(not_found());
    }
    let key = key.clone();
    let found = blocking(session, move |_| namespace.history(&key, version)).await?;
    let found = found.ok_or_else(not_found)?;
    let previous = found.previous.map(u64::to_le_bytes);
    Ok(Reply::Array(vec![
        previous.map_or(Reply::Nil, Reply::bulk),
        Reply::bulk(found.timestamp.to_string()),
        Reply::Bulk(found.value),
    ]))
}

pub(super) fn key_argument(key: &Bytes) -> Result<&Bytes, Reply> {
    match key.len() {
        0 => Err(Reply::error("Invalid argument")),
        1..=KEY_BYTES_MAX => Ok(key),
        _ => Err(Reply::error("Invalid key")),
    }
}

pub(super) fn only_key(request: &[Bytes]) -> Result<&Bytes, Reply> {
    match request {
        [_, key] => key_argument(key),
        _ => Err(Reply::error("Unexpected arguments")),
    }
}
