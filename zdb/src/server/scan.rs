//! Commands that go through the keys of a namespace.

use super::cursor;
use super::manage::blocking;
use super::reply::{Reply, engine_error};
use super::session::Session;
use super::values::only_key;
use crate::engine::{EngineError, KeyPage, Mode, Namespace};
use bytes::Bytes;
use std::sync::Arc;

/// Keys in one answer to SCAN; as many as 0-db gets through in its 2 ms.
const SCAN_KEYS_MAX: usize = 1000;
/// KSCAN answers at once and whole: what matches more is refused.
const KSCAN_BYTES_MAX: usize = 8 << 20;

/// SCAN and RSCAN. What follows the cursor is not looked at, as in 0-db.
pub(super) async fn scan(
    session: &Session,
    request: &[Bytes],
    pages: fn(&Namespace, Option<u64>, usize) -> Result<KeyPage, EngineError>,
) -> Result<Reply, Reply> {
    let namespace = Arc::clone(session.thawed()?);
    let position = match request.get(1) {
        None => None,
        Some(cursor) => {
            Some(cursor::decode(cursor).ok_or_else(|| Reply::error("Invalid key format"))?)
        }
    };
    // The index of a sequential namespace may have to be read from the disk.
    let page = if namespace.settings().mode == Mode::Sequential {
        blocking(session, move |_| pages(&namespace, position, SCAN_KEYS_MAX)).await?
    } else {
        let page = pages(&namespace, position, SCAN_KEYS_MAX);
        page.map_err(|error| engine_error(&error))?
    };
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
        Reply::Bulk(cursor::encode(last)),
        Reply::Array(rows.collect()),
    ]))
}

pub(super) async fn kscan(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    let namespace = session.thawed()?;
    if namespace.settings().mode == Mode::Sequential {
        return Err(Reply::error(
            "Index running mode doesn't support this feature",
        ));
    }
    let prefix = only_key(request)?;
    let mut found = Vec::new();
    let mut bytes = 0;
    let mut position = None;
    loop {
        let page = namespace.keys_after(position, SCAN_KEYS_MAX);
        let page = page.map_err(|error| engine_error(&error))?;
        for stat in page.keys {
            if stat.key.starts_with(prefix) {
                bytes += stat.key.len() + size_of::<Reply>();
                found.push(Reply::Bulk(stat.key));
            }
        }
        if bytes > KSCAN_BYTES_MAX {
            return Err(Reply::error(
                "Too many keys match, use SCAN or a longer prefix",
            ));
        }
        if page.next.is_none() {
            break;
        }
        position = page.next;
        // Others are served while a large namespace is gone through.
        tokio::task::yield_now().await;
    }
    if found.is_empty() {
        return Err(Reply::error("No keys match"));
    }
    Ok(Reply::Array(vec![Reply::bulk("0"), Reply::Array(found)]))
}

pub(super) fn keycur(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    let key = only_key(request)?;
    match session.thawed()?.stat(key) {
        Ok(Some(stat)) => Ok(Reply::Bulk(cursor::encode(stat.position))),
        Ok(None) => Err(Reply::error("Key not found")),
        Err(error) => Err(engine_error(&error)),
    }
}

pub(super) fn dbsize(session: &Session) -> Result<Reply, Reply> {
    let usage = session.current()?.usage();
    Ok(Reply::integer(
        usage.map_err(|error| engine_error(&error))?.keys,
    ))
}
