//! Backups of the replicated state: whole snapshots in files of their own, verified after they were written.
//!
//! ```text
//! DATA/backups/{ms since the epoch:020}.backup   newest KEPT of them, 0600
//! FILE (a copy elsewhere)  +  FILE.ca-key.pem (0600): without the authority's key a restored cluster could admit nobody
//! ```
//!
//! The content is that of a snapshot (`machine/snapshot.rs`): header, rows, hash. A backup that holds less than half the rows
//! of the one before is an alarm, and nothing older is removed for it.

use crate::machine::{Machine, MachineError, snapshot};
use crate::node::NodeError;
use crate::state::State;
use crate::state::kv::MemoryKv;
use crate::state::row::Table;
use qsfs_zdb::media::DiskMedia;
use qsfs_zstor::id::ClusterId;
use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio_util::sync::CancellationToken;

/// Backups a node keeps of itself.
pub const KEPT: usize = 24;
/// Between two of them.
pub const INTERVAL: Duration = Duration::from_secs(3_600);
/// Between two looks for somebody who wants one now.
const LOOK: Duration = Duration::from_millis(500);
/// Longest wait for a running node to write one.
const WANTED_DEADLINE: Duration = Duration::from_secs(120);
/// In the backup directory: somebody wants one now.
const WANTED: &str = "wanted";
const EXTENSION: &str = "backup";

/// How the backups of a running node stand.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct BackupState {
    /// When the newest one that verified was begun, ms since the epoch; 0: there is none.
    pub newest_ms: u64,
    /// Why the last try failed; empty when it did not.
    pub problem: String,
    /// The newest holds so much less than the one before (rows: before, now) that it is an alarm.
    pub shrunk: Option<(u64, u64)>,
}

/// What a backup holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupFacts {
    /// Where it is.
    pub path: PathBuf,
    /// Of which cluster.
    pub cluster: ClusterId,
    /// Index of the newest entry in it.
    pub applied: u64,
    /// Its term.
    pub term: u64,
    /// Rows.
    pub rows: u64,
    /// Encoding records among them.
    pub records: u64,
    /// Volumes among them.
    pub volumes: u64,
}

/// Reads a whole backup, checks its hash, and says what it holds.
pub fn verify(path: &Path) -> Result<BackupFacts, NodeError> {
    let (mut rows, mut records, mut volumes) = (0, 0, 0);
    let mut singles = MemoryKv::default();
    let meta = snapshot::read_rows(&DiskMedia, path, |batch| {
        let of = |table: Table| {
            let tagged = batch
                .keys()
                .filter(|key| key.first() == Some(&(table as u8)));
            tagged.count() as u64
        };
        rows += batch.len() as u64;
        records += of(Table::Record);
        volumes += of(Table::Volume);
        let single = |key: &[u8]| key.first() == Some(&(Table::Single as u8));
        singles.commit(batch.into_iter().filter(|(key, _)| single(key)).collect());
        Ok(())
    })?;
    let cluster = State::new(&singles).cluster().map_err(MachineError::from)?;
    let cluster = cluster.ok_or_else(|| MachineError::Snapshot {
        path: path.to_owned(),
        reason: "it names no cluster".into(),
    })?;
    let (applied, term) = meta
        .last_log_id
        .map_or((0, 0), |id| (id.index, id.leader_id.term));
    Ok(BackupFacts {
        path: path.to_owned(),
        cluster: cluster.id,
        applied,
        term,
        rows,
        records,
        volumes,
    })
}

fn io(step: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> NodeError {
    let path = path.to_owned();
    move |source| NodeError::Io { step, path, source }
}

fn folder(data: &Path) -> PathBuf {
    data.join("backups")
}

/// The backups a node has of itself, oldest first.
pub fn kept(data: &Path) -> Result<Vec<PathBuf>, NodeError> {
    let dir = folder(data);
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut found: Vec<_> = fs::read_dir(&dir)
        .map_err(io("list", &dir))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == EXTENSION))
        .collect();
    found.sort();
    Ok(found)
}

/// Writes one more backup of a running node, reads it back, and removes the oldest beyond [`KEPT`].
fn keep_one(machine: &Machine, data: &Path) -> Result<(BackupFacts, Shrunk), NodeError> {
    let dir = folder(data);
    fs::create_dir_all(&dir).map_err(io("create", &dir))?;
    remove_unfinished(&dir)?;
    let before = kept(data)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now_ms = now.map_or(0, |now| now.as_millis());
    let path = dir.join(format!("{now_ms:020}.{EXTENSION}"));
    let part = path.with_extension("part");
    machine.copy_to(&part)?;
    fs::set_permissions(&part, fs::Permissions::from_mode(0o600)).map_err(io("protect", &part))?;
    let facts = verify(&part)?;
    fs::rename(&part, &path).map_err(io("rename", &part))?;
    sync_dir(&dir)?;
    if let Some(last) = before.last()
        && let Ok(last) = verify(last)
        && facts.rows < last.rows / 2
    {
        tracing::error!(
            rows = facts.rows, before = last.rows, path = %path.display(),
            "the newest backup of the metadata holds less than half of the one before: no older one is removed; look before you go on"
        );
        let shrunk = Some((last.rows, facts.rows));
        return Ok((BackupFacts { path, ..facts }, shrunk));
    }
    let over = (before.len() + 1).saturating_sub(KEPT);
    for old in before.iter().take(over) {
        fs::remove_file(old).map_err(io("remove", old))?;
    }
    Ok((BackupFacts { path, ..facts }, None))
}

/// Rows before and now, when there are alarmingly fewer.
type Shrunk = Option<(u64, u64)>;

/// When a backup was begun: its name says it.
fn begun_ms(path: &Path) -> u64 {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    stem.and_then(|stem| stem.parse().ok()).unwrap_or(0)
}

/// What a crash left half written.
fn remove_unfinished(dir: &Path) -> Result<(), NodeError> {
    let entries = fs::read_dir(dir).map_err(io("list", dir))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    for path in paths.filter(|path| path.extension().is_some_and(|e| e == "part")) {
        fs::remove_file(&path).map_err(io("remove", &path))?;
    }
    Ok(())
}

fn sync_dir(dir: &Path) -> Result<(), NodeError> {
    fs::File::open(dir)
        .and_then(|handle| handle.sync_all())
        .map_err(io("sync", dir))
}

/// Backs a running node up, now and then and whenever somebody wants it, until `stop`.
pub(crate) async fn run(
    machine: Machine,
    data: PathBuf,
    tell: impl Fn(BackupState, DiskRoom),
    stop: CancellationToken,
) {
    let mut due = Instant::now() + INTERVAL;
    let mut state = BackupState {
        newest_ms: kept(&data).map_or(0, |kept| kept.last().map_or(0, |path| begun_ms(path))),
        ..BackupState::default()
    };
    loop {
        tell(state.clone(), disk_room(&data));
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop.cancelled() => return,
        }
        let wanted = folder(&data).join(WANTED);
        if Instant::now() < due && !wanted.exists() {
            continue;
        }
        due = Instant::now() + INTERVAL;
        let (machine, data) = (machine.clone(), data.clone());
        let written = tokio::task::spawn_blocking(move || keep_one(&machine, &data)).await;
        match written {
            Ok(Ok((facts, shrunk))) => {
                tracing::info!(path = %facts.path.display(), rows = facts.rows, "backed up");
                state = BackupState {
                    newest_ms: begun_ms(&facts.path),
                    problem: String::new(),
                    shrunk,
                };
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "no backup was written");
                state.problem = error.to_string();
            }
            Err(_) => return,
        }
        if let Err(error) = fs::remove_file(&wanted)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::error!(%error, "a wish for a backup cannot be removed");
        }
    }
}

/// Free bytes and all bytes of the disk under a directory; 0 when it does not say.
pub(crate) type DiskRoom = (u64, u64);

fn disk_room(data: &Path) -> DiskRoom {
    nix::sys::statvfs::statvfs(data).map_or((0, 0), |disk| {
        let block = disk.fragment_size();
        (disk.blocks_available() * block, disk.blocks() * block)
    })
}

/// Where the authority's key of a backup is.
pub fn key_path(backup: &Path) -> PathBuf {
    let mut name = backup.as_os_str().to_owned();
    name.push(".ca-key.pem");
    PathBuf::from(name)
}

/// Has the node that runs on `data` write a backup, and copies it with the authority's key to `to`.
pub async fn take(data: &Path, to: &Path) -> Result<BackupFacts, NodeError> {
    if to.exists() {
        let text = format!("{} exists already: name another file", to.display());
        return Err(NodeError::Option(text));
    }
    let dir = folder(data);
    fs::create_dir_all(&dir).map_err(io("create", &dir))?;
    let newest_before = kept(data)?.pop();
    let wanted = dir.join(WANTED);
    fs::write(&wanted, []).map_err(io("create", &wanted))?;
    let deadline = Instant::now() + WANTED_DEADLINE;
    let newest = loop {
        let newest = kept(data)?.pop();
        if newest > newest_before && !wanted.exists() {
            break newest.unwrap_or_default();
        }
        if Instant::now() > deadline {
            drop(fs::remove_file(&wanted));
            let text = format!(
                "no metad wrote a backup in {} within {WANTED_DEADLINE:?}: is one running on {}?",
                dir.display(),
                data.display()
            );
            return Err(NodeError::Option(text));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let key = data.join("ca-key.pem");
    copy_private(&key, &key_path(to))?;
    copy_private(&newest, to)?;
    verify(to)
}

/// Copies a file, durably, readable by its owner only.
pub(crate) fn copy_private(from: &Path, to: &Path) -> Result<(), NodeError> {
    let mut input = fs::File::open(from).map_err(io("open", from))?;
    let mut output = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)
        .map_err(io("create", to))?;
    std::io::copy(&mut input, &mut output)
        .and_then(|_| output.sync_all())
        .map_err(io("write", to))?;
    sync_dir(
        to.parent()
            .filter(|dir| !dir.as_os_str().is_empty())
            .unwrap_or(Path::new(".")),
    )
}
