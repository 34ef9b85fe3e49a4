//! What a stopped node's directory holds, for people. Nothing is changed, except that the state's store tidies itself when opened.

use crate::durable;
use crate::log::segments;
use crate::machine::rows::Rows;
use crate::machine::sled_kv::SledStores;
use crate::machine::{MachineError, RAFT_ROW, load_raft_row, snapshot};
use crate::node::NodeError;
use crate::node::datadir::DataDir;
use crate::raft::{LogId, Vote};
use crate::state::State;
use crate::state::kv::{Kv, KvError, RowKey, after};
use crate::state::row::PAGE_ROWS;
use qsfs_zdb::media::{DiskMedia, Media};
use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

/// One line of the report: what, and what was found.
pub type Line = (String, String);

fn or_trouble<T: Display, E: Display>(found: Result<Option<T>, E>) -> String {
    match found {
        Ok(Some(found)) => found.to_string(),
        Ok(None) => "none".into(),
        Err(error) => format!("DAMAGED: {error}"),
    }
}

/// Reads log, vote, snapshots and state of a stopped node.
pub fn inspect(data: &Path) -> Result<Vec<Line>, NodeError> {
    let dir = DataDir::lock(data)?;
    let (node, ..) = dir.load()?;
    let mut lines = vec![
        (
            "node".into(),
            format!("{} (id {}) at {}", node.name, node.id, node.location),
        ),
        ("cluster".into(), node.cluster.to_string()),
        ("address".into(), node.advertise.clone()),
        ("peers".into(), dir.peers()?.join(" ")),
    ];
    if dir.is_renewing() {
        let text = "yes: what is below is not used any more";
        lines.push(("being renewed".into(), text.into()));
    }
    let log = data.join("log");
    let vote = durable::load::<Vote>(&DiskMedia, &log.join("vote"));
    lines.push(("vote".into(), or_trouble(vote)));
    let purged = durable::load::<LogId>(&DiskMedia, &log.join("purged"));
    lines.push(("log cut up to".into(), or_trouble(purged)));
    let media: Arc<dyn Media> = Arc::new(DiskMedia);
    for (path, found) in segments::inspect(&media, &log)? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        lines.push((format!("segment {name}"), found));
    }
    for path in snapshot::finished(&DiskMedia, data)? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let mut rows = 0;
        let read = snapshot::read_rows(&DiskMedia, &path, |batch| {
            rows += batch.len();
            Ok(())
        });
        let text = match read {
            Ok(meta) => format!("whole: {rows} rows up to {}", or_none(meta.last_log_id)),
            Err(error) => format!("DAMAGED: {error}"),
        };
        lines.push((format!("snapshot {name}"), text));
    }
    match state(data) {
        Ok(found) => lines.extend(found),
        Err(error) => lines.push(("state".into(), format!("DAMAGED: {error}"))),
    }
    for path in crate::backup::kept(data)? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let text = match crate::backup::verify(&path) {
            Ok(facts) => format!("whole: {} rows up to {}", facts.rows, facts.applied),
            Err(error) => format!("DAMAGED: {error}"),
        };
        lines.push((format!("backup {name}"), text));
    }
    Ok(lines)
}

fn or_none(id: Option<LogId>) -> String {
    id.map_or("none".into(), |id| id.to_string())
}

fn state(data: &Path) -> Result<Vec<Line>, MachineError> {
    let dir = data.join("state");
    if !dir.exists() {
        return Ok(vec![("state".into(), "none".into())]);
    }
    let generation: u64 = durable::load(&DiskMedia, &dir.join("current"))?.unwrap_or(0);
    let kv = Rows::open_verified(&SledStores, &dir, generation)?;
    let raft = load_raft_row(&kv)?;
    let state = State::new(&kv);
    let voters: Vec<_> = raft.membership.membership().voter_ids().collect();
    let applied = raft.applied.map_or(0, |id| id.index);
    let text = format!(
        "whole: applied {}, voters {voters:?}, {} volumes, {} backends, {} metads (the log may lead further)",
        or_none(raft.applied),
        state.volumes()?.len(),
        state.backends()?.len(),
        state.members()?.len(),
    );
    let hash = format!("{} after entry {applied}", hash(&kv)?);
    Ok(vec![("state".into(), text), ("state hash".into(), hash)])
}

/// Of all rows but Raft's own: nodes that applied the same entries have the same.
fn hash(kv: &Rows) -> Result<blake3::Hash, KvError> {
    let mut hasher = blake3::Hasher::new();
    let mut from = RowKey::new();
    loop {
        let page = kv.range(&from, RAFT_ROW, PAGE_ROWS)?;
        for (key, value) in &page {
            for part in [key.as_slice(), value] {
                hasher.update(&(part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
        }
        match page.last() {
            Some((last, _)) if page.len() == PAGE_ROWS => from = after(last),
            _ => return Ok(hasher.finalize()),
        }
    }
}
