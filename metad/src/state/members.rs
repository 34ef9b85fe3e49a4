//! Metad nodes as they joined. Who votes is Raft's own membership; names and addresses are here.

use super::command::{Admission, MemberRow, Reply};
use super::kv::{Kv, KvError, RowKey};
use super::row::{Key, Table};
use super::{State, Stop, tokens};
use qsfs_proto::api::{Applied, MetadError, Role};
use qsfs_zstor::id::MetadId;

fn key(id: MetadId) -> RowKey {
    Key::of(Table::Member).number(id.0).done()
}

pub(super) fn put<K: Kv>(state: &mut State<K>, member: &MemberRow) {
    state.put_row(key(member.id), member);
}

/// Token, unique name and new id in one step. The same joiner asking again gets the same id.
pub(super) fn admit<K: Kv>(
    state: &mut State<K>,
    admission: &Admission,
    now_ms: u64,
) -> Result<Reply, Stop> {
    let again = tokens::consume(state, &admission.hash, Role::Metad, &admission.csr, now_ms)?;
    let members = state.members()?;
    let namesake = members.iter().find(|member| member.name == admission.name);
    match namesake {
        Some(member) if again && member.address == admission.address => {
            return Ok(Reply::Admitted(member.id));
        }
        Some(member) => {
            let text = format!("a metad named {} (at {})", member.name, member.address);
            return Err(MetadError::Exists(text).into());
        }
        None => {}
    }
    if let Some(member) = members.iter().find(|m| m.address == admission.address) {
        let text = format!("a metad at {} ({})", member.address, member.name);
        return Err(MetadError::Exists(text).into());
    }
    let mut counters = state.counters()?;
    let id = MetadId(counters.metad);
    counters.metad += 1;
    state.put_counters(&counters);
    put(
        state,
        &MemberRow {
            id,
            name: admission.name.clone(),
            location: admission.location.clone(),
            address: admission.address.clone(),
            removed: false,
        },
    );
    Ok(Reply::Admitted(id))
}

pub(super) fn remove<K: Kv>(state: &mut State<K>, id: MetadId) -> Result<Reply, Stop> {
    let Some(mut member) = state.row::<MemberRow>(&key(id))? else {
        return Err(MetadError::NotFound(format!("metad {id}")).into());
    };
    member.removed = true;
    put(state, &member);
    Ok(Reply::Applied(Applied::Done))
}

impl<K: Kv> State<K> {
    /// Everyone is removed; one member, of a new id, is all there is.
    pub(crate) fn begin_again(
        &mut self,
        member: impl FnOnce(MetadId) -> MemberRow,
    ) -> Result<(), KvError> {
        for mut old in self.members()? {
            old.removed = true;
            put(self, &old);
        }
        let mut counters = self.counters()?;
        let id = MetadId(counters.metad);
        counters.metad += 1;
        self.put_counters(&counters);
        put(self, &member(id));
        self.keep_entry();
        Ok(())
    }

    /// Was this one removed? Its id is never used again.
    pub fn was_removed(&self, id: MetadId) -> Result<bool, KvError> {
        let row: Option<MemberRow> = self.row(&key(id))?;
        Ok(row.is_some_and(|member| member.removed))
    }

    /// Members that were not removed, by id.
    pub fn members(&self) -> Result<Vec<MemberRow>, KvError> {
        let mut rows: Vec<MemberRow> = self.rows(&Key::of(Table::Member).done())?;
        rows.retain(|member| !member.removed);
        Ok(rows)
    }
}
