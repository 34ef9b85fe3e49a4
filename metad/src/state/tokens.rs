//! Join tokens: only the hash of the secret is here. Single use, expiring, bound to a role, and, once used, to the signing
//! request that used it: a joiner that did not hear the answer may ask again, nobody else may.

use super::kv::{Kv, KvError, RowKey};
use super::row::{Key, PAGE_ROWS, Table, decode};
use super::{State, Stop};
use qsfs_proto::api::{Applied, MetadError, Role, TokenInfo};
use serde::{Deserialize, Serialize};

/// An expired token is listed for so long, then forgotten.
pub const EXPIRED_KEPT_MS: u64 = 24 * 3_600_000;

/// Longest lifetime of a token.
pub const TTL_MAX_MS: u64 = 365 * 24 * 3_600_000;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Token {
    role: Role,
    expires_ms: u64,
    used_by: Option<[u8; 32]>,
    revoked: bool,
}

fn key(hash: &[u8; 32]) -> RowKey {
    Key::of(Table::Token).bytes(hash).done()
}

fn prefix_of(hash: &[u8]) -> String {
    hash.iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

pub(super) fn create<K: Kv>(
    state: &mut State<K>,
    hash: &[u8; 32],
    role: Role,
    ttl_ms: u64,
    now_ms: u64,
) -> Result<Applied, Stop> {
    if ttl_ms == 0 || ttl_ms > TTL_MAX_MS {
        return Err(MetadError::Invalid("token lifetime must be 1 ms to 365 days".into()).into());
    }
    if role == Role::Admin {
        return Err(MetadError::Invalid("there are no tokens for the admin role".into()).into());
    }
    if state.row::<Token>(&key(hash))?.is_some() {
        return Err(MetadError::Exists("token".into()).into());
    }
    let token = Token {
        role,
        expires_ms: now_ms.saturating_add(ttl_ms),
        used_by: None,
        revoked: false,
    };
    state.put_row(key(hash), &token);
    Ok(Applied::Done)
}

pub(super) fn revoke<K: Kv>(state: &mut State<K>, prefix: &str) -> Result<Applied, Stop> {
    let mut found = Vec::new();
    for (key, token) in all(state)? {
        if prefix_of(&key[1..]) == prefix {
            found.push((key, token));
        }
    }
    if found.is_empty() {
        return Err(MetadError::NotFound(format!("token {prefix}")).into());
    }
    for (key, mut token) in found {
        token.revoked = true;
        state.put_row(key, &token);
    }
    Ok(Applied::Done)
}

/// Uses a token up for this signing request. True: it was used by the same request before.
pub(super) fn consume<K: Kv>(
    state: &mut State<K>,
    hash: &[u8; 32],
    role: Role,
    csr: &[u8; 32],
    now_ms: u64,
) -> Result<bool, Stop> {
    let refuse = |text: String| Err(Stop::Refused(MetadError::Token(text)));
    let Some(mut token) = state.row::<Token>(&key(hash))? else {
        return refuse("unknown token; create one with `qsfs token create`".into());
    };
    if token.revoked {
        return refuse("it was revoked".into());
    }
    if token.role != role {
        return refuse(format!(
            "it is for the role {}, not {}",
            role_name(token.role),
            role_name(role)
        ));
    }
    match token.used_by {
        Some(by) if by == *csr => return Ok(true),
        Some(_) => return refuse("it was used already; every token joins one process".into()),
        None => {}
    }
    if token.expires_ms <= now_ms {
        return refuse("it expired; create another with `qsfs token create`".into());
    }
    token.used_by = Some(*csr);
    state.put_row(key(hash), &token);
    Ok(false)
}

/// Lower-case name of a role, as in commands.
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Metad => "metad",
        Role::Agent => "agent",
        Role::Client => "client",
        Role::Admin => "admin",
    }
}

fn all<K: Kv>(state: &State<K>) -> Result<Vec<(RowKey, Token)>, KvError> {
    let prefix = Key::of(Table::Token).done();
    let until = super::kv::prefix_end(&prefix);
    let (mut from, mut tokens) = (prefix, Vec::new());
    loop {
        let page = state.range(&from, &until, PAGE_ROWS)?;
        for (key, value) in &page {
            tokens.push((key.clone(), decode(key, value)?));
        }
        match page.last() {
            Some((last, _)) if page.len() == PAGE_ROWS => from = super::kv::after(last),
            _ => return Ok(tokens),
        }
    }
}

pub(super) fn sweep<K: Kv>(state: &mut State<K>, now_ms: u64) -> Result<(), KvError> {
    for (key, token) in all(state)? {
        if token.expires_ms.saturating_add(EXPIRED_KEPT_MS) < now_ms {
            state.delete(key);
        }
    }
    Ok(())
}

impl<K: Kv> State<K> {
    /// All tokens, by hash; revoked ones are not listed.
    pub fn tokens(&self) -> Result<Vec<TokenInfo>, KvError> {
        let listed = all(self)?.into_iter().filter(|(_, token)| !token.revoked);
        Ok(listed
            .map(|(key, token)| TokenInfo {
                prefix: prefix_of(&key[1..]),
                role: token.role,
                expires_ms: token.expires_ms,
                used: token.used_by.is_some(),
            })
            .collect())
    }
}
