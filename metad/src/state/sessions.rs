//! Exactly once: a retry of a request gets the first answer.
//!
//! A client may have several requests under way, which arrive in any order, so answers are kept per sequence until the client
//! says that it waits for none below (`oldest_pending`). What is below cannot be told from new and is refused as unknown,
//! never applied. Sessions expire by log time.

use super::command::Request;
use super::kv::{Kv, KvError, RowKey, after, prefix_end};
use super::row::{Key, PAGE_ROWS, Table, array_at, decode, number_at};
use super::{Outcome, State, busy, tokens};
use qsfs_proto::api::MetadError;
use qsfs_zstor::id::ClientId;
use serde::{Deserialize, Serialize};

/// A session without requests for so long is forgotten.
pub const SESSION_TTL_MS: u64 = 24 * 3_600_000;

/// Between two sweeps of expired sessions and tokens, in log time.
pub const SWEEP_INTERVAL_MS: u64 = 10 * 60_000;

/// Sessions removed by one sweep at most; the next continues.
pub const SWEEP_MAX: usize = 256;

/// Answers forgotten one by one when a client's oldest pending request moves on.
const STEP_MAX: u64 = 32;

/// What is known of a client's requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Session {
    /// Answers below are forgotten.
    floor: u64,
    /// Log time of its last request.
    last_ms: u64,
}

fn session_name(id: &Request) -> busy::Name {
    busy::Name::Session(id.client, id.session)
}

fn answer_key(id: &Request, sequence: u64) -> RowKey {
    Key::of(Table::Answer)
        .bytes(id.client.as_bytes())
        .number(id.session)
        .number(sequence)
        .done()
}

/// What is known of a request's session, and the first answer, if the request was applied before.
pub(super) fn answered<K: Kv>(
    state: &State<K>,
    id: &Request,
) -> Result<(Session, Option<Outcome>), KvError> {
    let session: Session = state.busy(session_name(id))?;
    if id.sequence < session.floor {
        let text = format!("request {} is older than what is remembered", id.sequence);
        return Ok((session, Some(Err(MetadError::Unknown(text)))));
    }
    Ok((session, state.row(&answer_key(id, id.sequence))?))
}

impl<K: Kv> State<K> {
    /// Was this request applied before, so that it is only answered again?
    pub fn has_answered(&self, id: &Request) -> Result<bool, KvError> {
        Ok(answered(self, id)?.1.is_some())
    }
}

pub(super) fn remember<K: Kv>(
    state: &mut State<K>,
    id: &Request,
    session: Session,
    outcome: &Outcome,
    now_ms: u64,
) -> Result<(), KvError> {
    let floor = session.floor.max(id.oldest_pending.min(id.sequence));
    if floor - session.floor <= STEP_MAX {
        // The common case: no need to look which of them there are.
        for sequence in session.floor..floor {
            state.delete(answer_key(id, sequence));
        }
    } else {
        let from = answer_key(id, session.floor);
        delete_range(state, &from, &answer_key(id, floor))?;
    }
    let session = Session {
        floor,
        last_ms: now_ms,
    };
    state.put_busy(session_name(id), session);
    state.put_row(answer_key(id, id.sequence), outcome);
    Ok(())
}

fn delete_range<K: Kv>(state: &mut State<K>, from: &[u8], until: &[u8]) -> Result<(), KvError> {
    loop {
        let page = state.range(from, until, PAGE_ROWS)?;
        let full = page.len() == PAGE_ROWS;
        for (key, _) in page {
            state.delete(key);
        }
        if !full {
            return Ok(());
        }
    }
}

/// Forgets sessions and tokens that expired, a bounded number now and then.
pub(super) fn sweep<K: Kv>(state: &mut State<K>, now_ms: u64) -> Result<(), KvError> {
    if now_ms < state.last_sweep_ms()?.saturating_add(SWEEP_INTERVAL_MS) {
        return Ok(());
    }
    state.put_last_sweep_ms(now_ms);
    state.settle();
    tokens::sweep(state, now_ms)?;
    let prefix = Key::of(Table::Session).done();
    let (mut from, until) = (prefix.clone(), prefix_end(&prefix));
    let mut removed = 0;
    while removed < SWEEP_MAX {
        let page = state.range(&from, &until, PAGE_ROWS)?;
        for (key, value) in &page {
            let session: Session = decode(key, value)?;
            if session.last_ms.saturating_add(SESSION_TTL_MS) < now_ms && removed < SWEEP_MAX {
                removed += 1;
                forget(state, key)?;
            }
        }
        match page.last() {
            Some((last, _)) if page.len() == PAGE_ROWS => from = after(last),
            _ => break,
        }
    }
    Ok(())
}

fn forget<K: Kv>(state: &mut State<K>, session_key: &[u8]) -> Result<(), KvError> {
    let answers = Key::of(Table::Answer).bytes(&session_key[1..]).done();
    delete_range(state, &answers, &prefix_end(&answers))?;
    let client = ClientId::from_bytes(array_at(session_key, 1)?);
    state.delete_busy(busy::Name::Session(client, number_at(session_key, 17)?));
    Ok(())
}
