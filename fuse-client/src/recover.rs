//! Recovery: from a state directory, whatever is in it, to a namespace that is complete up to the newest that is known.
//!
//! ```text
//! head and records (metad) --+--> outrun? set aside what was not pushed, start from the head
//!                            +--> fetch the meta datafiles from recover_from to head that are not local
//! local store (journal cut to a prefix) --> namespace: replay; if it is ahead, behind or damaged: rebuild from the
//!                                           newest checkpoint, then replay
//! ```
//!
//! An empty state directory and one that was killed take the same way.

use crate::error::MountError;
use crate::fetch::{FetchError, Fetcher};
use crate::namespace::{Namespace, NamespaceError};
use crate::store::append::{
    KIND_CHECKPOINT_BEGIN, KIND_CHECKPOINT_END, KIND_CHECKPOINT_ROWS, KIND_RECORD, meta_header,
};
use crate::store::aside::set_aside;
use crate::store::layout::{DatafileName, Stage, StateDir};
use crate::store::open::{OpenContext, Opened, local_names, open};
use crate::store::{LocalStore, StoreSettings};
use futures::stream::{self, StreamExt, TryStreamExt};
use qsfs_proto::api::Volume;
use qsfs_zdb::datafile::{Datafile, FrameView};
use qsfs_zdb::media::{Media, OpenMode};
use qsfs_zstor::id::{DatafileId, Epoch, Stream};
use qsfs_zstor::record::EncodingRecord;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Meta datafiles fetched at once.
const FETCHES_MAX: usize = 4;
/// Bytes fetched at once of each.
const FETCH_BYTES: u32 = 4 << 20;

/// What recovery works from.
#[derive(Clone)]
pub struct RecoverFrom {
    /// State directory.
    pub dir: StateDir,
    /// Disk.
    pub media: Arc<dyn Media>,
    /// The volume, read after the lease was acquired.
    pub volume: Volume,
    /// All its records.
    pub records: Arc<Vec<EncodingRecord>>,
    /// Newest epoch under which the local state was complete.
    pub last_epoch: Epoch,
    /// Settings of the store.
    pub settings: StoreSettings,
    /// Reads shards.
    pub fetcher: Arc<Fetcher>,
}

/// What recovery did, for people.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RecoveryReport {
    /// Files of an outrun writer that were kept aside.
    pub set_aside: Vec<PathBuf>,
    /// Meta datafiles fetched from shards.
    pub fetched: u64,
    /// The namespace was rebuilt from a checkpoint or from nothing.
    pub rebuilt: bool,
    /// Sequence of the newest operation.
    pub sequence: u64,
}

/// A recovered volume.
pub struct Recovered {
    /// Store, its events, what opening found.
    pub opened: Opened,
    /// Namespace.
    pub namespace: Arc<Namespace>,
    /// What was done.
    pub report: RecoveryReport,
}

/// Recovers.
pub async fn recover(from: RecoverFrom) -> Result<Recovered, MountError> {
    let mut report = RecoveryReport::default();
    let by_id: BTreeMap<DatafileId, &EncodingRecord> = from
        .records
        .iter()
        .map(|record| (record.datafile, record))
        .collect();
    let head = from.volume.head;
    let written_by = by_id
        .get(&head.datafile)
        .map_or(Epoch(0), |record| record.epoch);
    if written_by > from.last_epoch {
        report.set_aside = outrun(&from, &by_id)?;
    }
    adopt_committed(&from, &by_id)?;
    drop_released(&from, &by_id)?;
    let wanted: Vec<&EncodingRecord> = by_id
        .range(head.recover_from..=head.datafile)
        .map(|(_, record)| *record)
        .filter(|record| record.stream == Stream::Meta)
        .collect();
    report.fetched = fetch_missing(&from, &wanted).await?;
    let task = tokio::task::spawn_blocking(move || {
        let opened = open_store(&from)?;
        let (namespace, rebuilt) = load_namespace(&from.dir, &opened.store, head.recover_from)?;
        report.rebuilt = rebuilt;
        report.sequence = namespace.applied_sequence();
        Ok(Recovered {
            opened,
            namespace: Arc::new(namespace),
            report,
        })
    });
    task.await
        .map_err(|error| MountError::Task(error.to_string()))?
}

/// Another writer went on from a head this directory does not know. What was not pushed is kept aside; local copies
/// of what is committed stay.
fn outrun(
    from: &RecoverFrom,
    records: &BTreeMap<DatafileId, &EncodingRecord>,
) -> Result<Vec<PathBuf>, MountError> {
    let label = format!("epoch-{}", from.last_epoch);
    let moved = set_aside(&from.media, &from.dir, &label, |name| {
        name.stage != Stage::Pushed
    })?;
    for path in &moved {
        tracing::error!(
            path = %path.display(),
            "another writer took this volume over meanwhile: this datafile was never pushed and is not part of the volume; it \
             is kept aside"
        );
    }
    for name in local_names(&from.media, &from.dir)? {
        let ours = records
            .get(&name.id)
            .is_some_and(|record| record.epoch <= from.last_epoch && record.stream == name.stream);
        if !ours {
            remove(&from.media, &from.dir, name)?;
        }
    }
    Namespace::reset(&from.dir.names())?;
    Ok(moved)
}

/// Datafiles whose commit was answered to a process that died before it could note so: they are not pushed again.
fn adopt_committed(
    from: &RecoverFrom,
    records: &BTreeMap<DatafileId, &EncodingRecord>,
) -> Result<(), MountError> {
    let committed = |name: &DatafileName| {
        records
            .get(&name.id)
            .is_some_and(|record| record.stream == name.stream && record.epoch <= from.last_epoch)
    };
    let names = local_names(&from.media, &from.dir)?;
    let sealed = names.iter().filter(|name| name.stage == Stage::Sealed);
    let mut adopted = false;
    for name in sealed.filter(|name| committed(name)) {
        let pushed = DatafileName {
            stage: Stage::Pushed,
            ..*name
        };
        let path = from.dir.datafile(*name);
        from.media
            .rename(&path, &from.dir.datafile(pushed))
            .map_err(|source| state_file("rename", &path, &source))?;
        adopted = true;
    }
    if adopted {
        let dir = from.dir.datafiles();
        from.media
            .sync_dir(&dir)
            .map_err(|source| state_file("sync directory", &dir, &source))?;
    }
    Ok(())
}

/// Local copies of datafiles that were released since.
fn drop_released(
    from: &RecoverFrom,
    records: &BTreeMap<DatafileId, &EncodingRecord>,
) -> Result<(), MountError> {
    let recover_from = from.volume.head.recover_from;
    for name in local_names(&from.media, &from.dir)? {
        let old = name.stream == Stream::Meta && name.id < recover_from;
        if name.stage == Stage::Pushed && (old || !records.contains_key(&name.id)) {
            remove(&from.media, &from.dir, name)?;
        }
    }
    Ok(())
}

fn remove(media: &Arc<dyn Media>, dir: &StateDir, name: DatafileName) -> Result<(), MountError> {
    let mut paths = vec![dir.datafile(name)];
    let side = dir.page_sums(name.id);
    if name.stream == Stream::Data && media.exists(&side) {
        paths.push(side);
    }
    for path in paths {
        media
            .remove(&path)
            .map_err(|source| state_file("remove", &path, &source))?;
    }
    Ok(())
}

fn state_file(step: &'static str, path: &Path, source: &std::io::Error) -> MountError {
    MountError::StateFile {
        step,
        path: path.to_owned(),
        reason: source.to_string(),
    }
}

/// Local copies of committed meta datafiles that do not verify: their shards replace them.
fn drop_damaged(from: &RecoverFrom, wanted: &[&EncodingRecord]) -> Result<(), MountError> {
    for record in wanted {
        let name = DatafileName {
            id: record.datafile,
            stream: Stream::Meta,
            stage: Stage::Pushed,
        };
        let path = from.dir.datafile(name);
        if !from.media.exists(&path) {
            continue;
        }
        if let Err(reason) = verify_pushed(&from.media, &path, record.datafile, record.plain_bytes)
        {
            tracing::warn!(
                path = %path.display(), %reason,
                "a local copy of a committed datafile is damaged: it is fetched again"
            );
            remove(&from.media, &from.dir, name)?;
        }
    }
    Ok(())
}

/// Is the whole committed meta datafile there, and does every frame verify?
fn verify_pushed(
    media: &Arc<dyn Media>,
    path: &Path,
    id: DatafileId,
    pushed_bytes: u64,
) -> Result<(), String> {
    let file = media.open(path, OpenMode::Read);
    let bytes = file.and_then(|file| file.length());
    let bytes = bytes.map_err(|error| error.to_string())?;
    if bytes != pushed_bytes {
        return Err(format!("it has {bytes} bytes, {pushed_bytes} were pushed"));
    }
    let inspected = Datafile::inspect(media, path, meta_header(id), &mut |_| {});
    let (_, report) = inspected.map_err(|error| error.to_string())?;
    if report.torn_bytes_cut > 0 || !report.damaged.is_empty() {
        return Err("its frames do not verify".to_owned());
    }
    Ok(())
}

async fn fetch_missing(from: &RecoverFrom, wanted: &[&EncodingRecord]) -> Result<u64, MountError> {
    let datafiles = from.dir.datafiles();
    from.media
        .create_dir_all(&datafiles)
        .map_err(|source| state_file("create", &datafiles, &source))?;
    drop_damaged(from, wanted)?;
    let local: BTreeSet<DatafileId> = local_names(&from.media, &from.dir)?
        .iter()
        .map(|name| name.id)
        .collect();
    let missing: Vec<EncodingRecord> = wanted
        .iter()
        .filter(|record| !local.contains(&record.datafile))
        .map(|record| (*record).clone())
        .collect();
    if missing.is_empty() {
        return Ok(0);
    }
    tracing::info!(
        datafiles = missing.len(),
        "meta datafiles are fetched from their shards"
    );
    let count = missing.len() as u64;
    stream::iter(
        missing
            .into_iter()
            .map(|record| fetch_meta(&from.dir, &from.media, &from.fetcher, &from.volume, record)),
    )
    .buffer_unordered(FETCHES_MAX)
    .try_collect::<Vec<()>>()
    .await?;
    from.media
        .sync_dir(&datafiles)
        .map_err(|source| state_file("sync directory", &datafiles, &source))?;
    Ok(count)
}

/// Fetches one meta datafile into the state directory, where it counts as pushed.
pub async fn fetch_meta(
    dir: &StateDir,
    media: &Arc<dyn Media>,
    fetcher: &Arc<Fetcher>,
    volume: &Volume,
    record: EncodingRecord,
) -> Result<(), MountError> {
    let id = record.datafile;
    let plain_bytes = record.plain_bytes;
    let failed = |reason| MountError::Fetch {
        datafile: id.0,
        reason,
    };
    fetcher
        .load_object_of(record)
        .await
        .map_err(|error| match error {
            FetchError::Header(reason) => MountError::WrongKey {
                volume: volume.name.to_string(),
                reason: reason.to_string(),
            },
            other => failed(other),
        })?;
    let name = DatafileName {
        id,
        stream: Stream::Meta,
        stage: Stage::Pushed,
    };
    let path = dir.datafile(name);
    let part = path.with_extension("pushed.part");
    let io = |step: &'static str| {
        let part = part.clone();
        move |source: std::io::Error| state_file(step, &part, &source)
    };
    if media.exists(&part) {
        media.remove(&part).map_err(io("remove"))?;
    }
    let file = media
        .open(&part, OpenMode::CreateNew)
        .map_err(io("create"))?;
    let mut at = 0;
    while at < plain_bytes {
        let bytes = u32::try_from(plain_bytes - at)
            .unwrap_or(u32::MAX)
            .min(FETCH_BYTES);
        let read = fetcher.read(id, at, bytes).await;
        let data = read?;
        file.write_all_at(&data, at).map_err(io("write"))?;
        at += data.len() as u64;
    }
    file.sync_data().map_err(io("sync"))?;
    verify_pushed(media, &part, id, plain_bytes).map_err(|reason| MountError::Meta {
        datafile: id.0,
        reason: format!("it was pushed damaged: {reason}"),
    })?;
    media.rename(&part, &path).map_err(io("rename"))
}

fn open_store(from: &RecoverFrom) -> Result<Opened, MountError> {
    let of = |stream| move |record: &&EncodingRecord| record.stream == stream;
    let data: BTreeSet<DatafileId> = from
        .records
        .iter()
        .filter(of(Stream::Data))
        .map(|record| record.datafile)
        .collect();
    let last_record = from
        .records
        .iter()
        .map(|record| record.datafile)
        .max()
        .unwrap_or_default();
    let opened = open(
        Arc::clone(&from.media),
        from.dir.clone(),
        OpenContext {
            settings: from.settings,
            last_known_id: last_record.max(from.volume.head.datafile),
            committed: &|id| data.contains(&id),
            extents: &|record| Namespace::record_extents(record).map_err(|error| error.to_string()),
        },
    )?;
    let found = &opened.report;
    if let Some(cut) = &found.cut_at {
        tracing::warn!(records = found.records_cut, %cut, "the journal was cut: what came after was never synced");
    }
    Ok(opened)
}

/// Opens the namespace and brings it to the end of the journal, rebuilding it if need be. True when it was rebuilt.
fn load_namespace(
    dir: &StateDir,
    store: &LocalStore,
    recover_from: DatafileId,
) -> Result<(Namespace, bool), MountError> {
    let files: Vec<Meta> = metas(store, recover_from);
    match Namespace::open(&dir.names()) {
        Ok(namespace) => match replay(store, &namespace, &files) {
            Ok(end) if end == namespace.applied_sequence() => return Ok((namespace, false)),
            Ok(end) => {
                let applied = namespace.applied_sequence();
                tracing::warn!(
                    applied,
                    journal = end,
                    "the namespace and its journal disagree: it is rebuilt"
                );
            }
            Err(error) => {
                tracing::warn!(%error, "the journal does not fit the namespace: it is rebuilt")
            }
        },
        Err(error) => tracing::warn!(%error, "the namespace cannot be opened: it is rebuilt"),
    }
    Namespace::reset(&dir.names())?;
    let namespace = Namespace::open(&dir.names())?;
    load_checkpoint(store, &namespace, &files)?;
    let end = replay(store, &namespace, &files)?;
    if end != namespace.applied_sequence() {
        let last = files.last().map_or(0, |file| file.id.0);
        let reason = format!(
            "operation {} is its last, {end} was expected",
            namespace.applied_sequence()
        );
        return Err(MountError::Meta {
            datafile: last,
            reason,
        });
    }
    namespace.flush()?;
    Ok((namespace, true))
}

struct Meta {
    id: DatafileId,
    path: PathBuf,
}

fn metas(store: &LocalStore, recover_from: DatafileId) -> Vec<Meta> {
    let wanted = |file: &Arc<crate::store::catalog::LocalFile>| {
        file.name.stream == Stream::Meta && file.name.id >= recover_from
    };
    let all = store.catalog().all();
    all.iter()
        .filter(|file| wanted(file))
        .map(|file| Meta {
            id: file.name.id,
            path: store.path_of(file),
        })
        .collect()
}

/// Shows every frame of a meta datafile; stops at the first error.
fn visit(
    store: &LocalStore,
    file: &Meta,
    mut each: impl FnMut(FrameView<'_>) -> Result<(), NamespaceError>,
) -> Result<(), MountError> {
    let mut failed = None;
    let mut show = |frame: FrameView<'_>| {
        if failed.is_none() {
            failed = each(frame).err();
        }
    };
    let inspected = Datafile::inspect(store.media(), &file.path, meta_header(file.id), &mut show);
    let meta = |reason: String| MountError::Meta {
        datafile: file.id.0,
        reason,
    };
    let (_, report) = inspected.map_err(|error| meta(error.to_string()))?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    match report.damaged.first() {
        Some(damage) => Err(meta(format!(
            "{} is damaged at byte {}; if it is a `.pushed` file, remove it: it is fetched again",
            file.path.display(),
            damage.offset
        ))),
        None => Ok(()),
    }
}

/// Replays all records; answers the sequence of the newest that the meta stream holds.
fn replay(store: &LocalStore, namespace: &Namespace, files: &[Meta]) -> Result<u64, MountError> {
    let mut end = 0;
    for file in files {
        visit(store, file, |frame| {
            match frame.kind {
                KIND_RECORD => {
                    let found = Namespace::record_sequence(frame.payload)?;
                    // Also where the namespace already knows better: the stream itself must be whole.
                    if found > end + 1 {
                        return Err(NamespaceError::Gap {
                            applied: end,
                            found,
                        });
                    }
                    end = end.max(found);
                    namespace.replay(frame.payload)?;
                }
                KIND_CHECKPOINT_BEGIN => end = end.max(number(frame.payload)?),
                _ => {}
            }
            Ok(())
        })?;
    }
    Ok(end)
}

fn load_checkpoint(
    store: &LocalStore,
    namespace: &Namespace,
    files: &[Meta],
) -> Result<(), MountError> {
    for file in files.iter().rev() {
        let mut checkpoint = None;
        let mut batches = 0_u64;
        let mut complete = false;
        visit(store, file, |frame| {
            match frame.kind {
                KIND_CHECKPOINT_BEGIN => checkpoint = Some(number(frame.payload)?),
                KIND_CHECKPOINT_ROWS => batches += 1,
                KIND_CHECKPOINT_END => complete = number(frame.payload)? == batches,
                _ => {}
            }
            Ok(())
        })?;
        let Some(sequence) = checkpoint.filter(|_| complete) else {
            continue;
        };
        let mut loader = namespace.load()?;
        visit(store, file, |frame| match frame.kind {
            KIND_CHECKPOINT_ROWS => loader.rows(frame.payload),
            _ => Ok(()),
        })?;
        let loaded = loader.finish()?;
        if loaded != sequence {
            let reason = format!("the checkpoint says operation {sequence}, its rows say {loaded}");
            return Err(MountError::Meta {
                datafile: file.id.0,
                reason,
            });
        }
        return Ok(());
    }
    Ok(())
}

fn number(payload: &[u8]) -> Result<u64, NamespaceError> {
    let bytes = payload
        .try_into()
        .map_err(|_| NamespaceError::Checkpoint("a number in it is not 8 bytes"))?;
    Ok(u64::from_le_bytes(bytes))
}

/// Replays meta datafiles that were fetched later: a follower going on.
pub fn follow(
    media: &Arc<dyn Media>,
    dir: &StateDir,
    namespace: &Namespace,
    ids: &[DatafileId],
) -> Result<(), MountError> {
    for id in ids {
        let path = dir.datafile(DatafileName {
            id: *id,
            stream: Stream::Meta,
            stage: Stage::Pushed,
        });
        let mut failed = None;
        let mut each = |frame: FrameView<'_>| {
            if frame.kind == KIND_RECORD && failed.is_none() {
                failed = namespace.replay(frame.payload).err();
            }
        };
        let inspected = Datafile::inspect(media, &path, meta_header(*id), &mut each);
        inspected.map_err(|error| MountError::Meta {
            datafile: id.0,
            reason: error.to_string(),
        })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
    }
    Ok(())
}
