//! Snapshot files: all rows in key order, between a header and a hash.
//!
//! ```text
//! "QSFSSNAP" | version u32 | meta length u32 | meta (postcard SnapshotMeta)
//! ( key length u32 | value length u32 | key | value )*   then  u32::MAX  | row count u64
//! BLAKE3 of everything before (32 bytes)
//! ```
//!
//! Little-endian. Written under a temporary name, synced, renamed: a file with a snapshot's name is complete.

use super::{MachineError, Prepared};
use crate::ground::{self, Ground, Work};
use crate::raft::TypeConfig;
use crate::state::kv::{Batch, KvError, Pair, RowKey};
use futures::future::BoxFuture;
use openraft::SnapshotMeta;
use parking_lot::Mutex;
use qsfs_zdb::media::{Media, MediaFile, OpenMode};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncSeek, AsyncWrite, ReadBuf};

/// What openraft knows of a snapshot.
pub type Meta = SnapshotMeta<u64, openraft::BasicNode>;

const MAGIC: &[u8; 8] = b"QSFSSNAP";
const VERSION: u32 = 1;
const END: u32 = u32::MAX;
const META_BYTES_MAX: u32 = 1 << 20;
const ROW_BYTES_MAX: u32 = 64 << 20;
/// Rows loaded in one batch.
const LOAD_ROWS: usize = 1_024;
const UNFINISHED: &str = "part";
const INCOMING: &str = "incoming-";
/// Read or written at once where a whole file is.
const BUFFER_BYTES: usize = 256 << 10;

/// Most bytes read or written at once.
const PIECE_BYTES: usize = 2 << 20;

/// An open snapshot file, as openraft streams it. What touches the disk is done aside.
pub struct SnapshotFile {
    path: PathBuf,
    file: Arc<dyn MediaFile>,
    work: Arc<dyn Work>,
    position: u64,
    /// The state that was made from it.
    prepared: Option<Prepared>,
    /// The one read or write under way; in a lock only because openraft wants the file to be shareable.
    busy: Mutex<Option<BoxFuture<'static, io::Result<Vec<u8>>>>>,
}

impl std::fmt::Debug for SnapshotFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SnapshotFile({})", self.path.display())
    }
}

impl SnapshotFile {
    fn new(ground: &Ground, path: &Path, file: Box<dyn MediaFile>) -> Self {
        Self {
            path: path.to_owned(),
            file: file.into(),
            work: Arc::clone(&ground.work),
            position: 0,
            prepared: None,
            busy: Mutex::default(),
        }
    }

    /// Opens a finished one for reading.
    pub fn open(ground: &Ground, path: &Path) -> Result<Self, MachineError> {
        let file = ground.media.open(path, OpenMode::Read);
        let file = file.map_err(MachineError::io("open", path))?;
        Ok(Self::new(ground, path, file))
    }

    /// Creates an unfinished one to be received.
    pub fn create(ground: &Ground, dir: &Path, number: u64) -> Result<Self, MachineError> {
        let path = dir
            .join("snapshot")
            .join(format!("{INCOMING}{number}.{UNFINISHED}"));
        let file = create(&*ground.media, &path)?;
        Ok(Self::new(ground, &path, file))
    }

    /// A received one from which a state was made already.
    pub fn prepared(ground: &Ground, path: &Path, state: Prepared) -> Result<Self, MachineError> {
        let mut file = Self::open(ground, path)?;
        file.prepared = Some(state);
        Ok(file)
    }

    /// That state, if there is one.
    pub fn take_prepared(&mut self) -> Option<Prepared> {
        self.prepared.take()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until everything written is on disk.
    pub async fn finish(self) -> Result<PathBuf, MachineError> {
        let file = Arc::clone(&self.file);
        let synced = ground::blocking(&self.work, move || file.sync_data()).await;
        let synced = synced.unwrap_or_else(|lost| Err(io::Error::other(lost)));
        synced.map_err(MachineError::io("sync", &self.path))?;
        Ok(self.path)
    }

    /// Goes on with what is under way, or begins `job`.
    fn poll_work(
        &mut self,
        cx: &mut Context<'_>,
        job: impl FnOnce(Arc<dyn MediaFile>, u64) -> JobOf,
    ) -> Poll<io::Result<Vec<u8>>> {
        let busy = self.busy.get_mut();
        let running = busy.get_or_insert_with(|| {
            let job = job(Arc::clone(&self.file), self.position);
            let work = Arc::clone(&self.work);
            Box::pin(async move {
                let done = ground::blocking(&work, job).await;
                done.unwrap_or_else(|lost| Err(io::Error::other(lost)))
            })
        });
        let ended = std::task::ready!(running.as_mut().poll(cx));
        *busy = None;
        Poll::Ready(ended)
    }
}

type JobOf = Box<dyn FnOnce() -> io::Result<Vec<u8>> + Send>;

impl AsyncRead for SnapshotFile {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let wanted = buf.remaining().min(PIECE_BYTES);
        let read = self.poll_work(cx, |file, position| {
            Box::new(move || {
                let mut bytes = vec![0; wanted];
                let read = file.read_at(&mut bytes, position)?;
                bytes.truncate(read);
                Ok(bytes)
            })
        });
        let mut bytes = std::task::ready!(read)?;
        // Another buffer than the one it was begun for may be smaller; the rest is read again.
        bytes.truncate(buf.remaining());
        self.position += bytes.len() as u64;
        buf.put_slice(&bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SnapshotFile {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = self.poll_work(cx, |file, position| {
            let bytes = buf[..buf.len().min(PIECE_BYTES)].to_vec();
            Box::new(move || {
                file.write_all_at(&bytes, position)?;
                Ok(bytes)
            })
        });
        let bytes = std::task::ready!(written)?;
        self.position += bytes.len() as u64;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A write has reached the file when it is ready.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncSeek for SnapshotFile {
    fn start_seek(mut self: Pin<&mut Self>, position: io::SeekFrom) -> io::Result<()> {
        *self.busy.get_mut() = None;
        let (base, step) = match position {
            io::SeekFrom::Start(position) => (position, 0),
            io::SeekFrom::End(step) => (self.file.length()?, step),
            io::SeekFrom::Current(step) => (self.position, step),
        };
        let target = base.checked_add_signed(step);
        self.position = target.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(())
    }

    fn poll_complete(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<u64>> {
        Poll::Ready(Ok(self.position))
    }
}

/// An empty file, in place of what was there.
fn create(media: &dyn Media, path: &Path) -> Result<Box<dyn MediaFile>, MachineError> {
    if media.exists(path) {
        media
            .remove(path)
            .map_err(MachineError::io("remove the leftover of", path))?;
    }
    let created = media.open(path, OpenMode::CreateNew);
    created.map_err(MachineError::io("create", path))
}

/// A file read or written from its beginning to its end.
struct Cursor {
    file: Box<dyn MediaFile>,
    position: u64,
}

impl Write for Cursor {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all_at(bytes, self.position)?;
        self.position += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Cursor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

struct Hashing<T> {
    inner: T,
    hasher: blake3::Hasher,
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// Writes a snapshot from pages of rows, durably; returns its path.
pub fn write(
    media: &dyn Media,
    dir: &Path,
    meta: &Meta,
    next_page: impl FnMut() -> Result<Vec<Pair>, KvError>,
) -> Result<PathBuf, MachineError> {
    let path = final_path(dir, meta);
    let part = path.with_extension(UNFINISHED);
    write_to(media, &part, meta, next_page)?;
    publish(media, dir, &part, &path)?;
    Ok(path)
}

/// The same into any file.
pub fn write_to(
    media: &dyn Media,
    part: &Path,
    meta: &Meta,
    mut next_page: impl FnMut() -> Result<Vec<Pair>, KvError>,
) -> Result<(), MachineError> {
    let io = |step| MachineError::io(step, part);
    let file = Cursor {
        file: create(media, part)?,
        position: 0,
    };
    let mut out = Hashing {
        inner: BufWriter::with_capacity(BUFFER_BYTES, file),
        hasher: blake3::Hasher::new(),
    };
    let body = postcard::to_stdvec(meta).expect("plain data types always encode");
    let mut head = MAGIC.to_vec();
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&length(&body).to_le_bytes());
    head.extend_from_slice(&body);
    out.write_all(&head).map_err(io("write"))?;
    let mut rows = 0u64;
    loop {
        let page = next_page()?;
        if page.is_empty() {
            break;
        }
        for (key, value) in page {
            rows += 1;
            out.write_all(&length(&key).to_le_bytes())
                .and_then(|()| out.write_all(&length(&value).to_le_bytes()))
                .and_then(|()| out.write_all(&key))
                .and_then(|()| out.write_all(&value))
                .map_err(io("write"))?;
        }
    }
    out.write_all(&END.to_le_bytes())
        .and_then(|()| out.write_all(&rows.to_le_bytes()))
        .map_err(io("write"))?;
    let hash = out.hasher.finalize();
    let mut inner = out.inner;
    inner.write_all(hash.as_bytes()).map_err(io("write"))?;
    let cursor = inner
        .into_inner()
        .map_err(|error| io("write")(error.into_error()))?;
    cursor.file.sync_data().map_err(io("sync"))
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("rows are far below 4 GiB")
}

/// Gives a received file, which was verified, its name; returns its path.
pub fn accept(
    media: &dyn Media,
    dir: &Path,
    part: &Path,
    meta: &Meta,
) -> Result<PathBuf, MachineError> {
    let path = final_path(dir, meta);
    if part == path {
        return Ok(path);
    }
    if part.parent() == path.parent() {
        publish(media, dir, part, &path)?;
    } else {
        // Not received but handed over by another state machine of this process: it stays that one's.
        let copy = path.with_extension(UNFINISHED);
        copy_file(media, part, &copy)?;
        publish(media, dir, &copy, &path)?;
    }
    Ok(path)
}

fn copy_file(media: &dyn Media, from: &Path, to: &Path) -> Result<(), MachineError> {
    let mut source = Cursor {
        file: media
            .open(from, OpenMode::Read)
            .map_err(MachineError::io("open", from))?,
        position: 0,
    };
    let mut copy = Cursor {
        file: create(media, to)?,
        position: 0,
    };
    io::copy(&mut source, &mut copy).map_err(MachineError::io("copy", from))?;
    let synced = copy.file.sync_data();
    synced.map_err(MachineError::io("sync", to))
}

fn final_path(dir: &Path, meta: &Meta) -> PathBuf {
    let (index, term) = meta
        .last_log_id
        .map_or((0, 0), |id| (id.index, id.leader_id.term));
    dir.join("snapshot")
        .join(format!("{index:020}-{term}.snap"))
}

/// Renames, syncs the directory, removes older snapshots.
fn publish(media: &dyn Media, dir: &Path, part: &Path, path: &Path) -> Result<(), MachineError> {
    media
        .rename(part, path)
        .map_err(MachineError::io("rename", part))?;
    let folder = dir.join("snapshot");
    media
        .sync_dir(&folder)
        .map_err(MachineError::io("sync", &folder))?;
    for old in finished(media, dir)? {
        if old < *path {
            media
                .remove(&old)
                .map_err(MachineError::io("remove", &old))?;
        }
    }
    Ok(())
}

fn listed(media: &dyn Media, dir: &Path, extension: &str) -> Result<Vec<PathBuf>, MachineError> {
    let folder = dir.join("snapshot");
    let names = media
        .list(&folder)
        .map_err(MachineError::io("list", &folder))?;
    let mut found: Vec<_> = names
        .iter()
        .map(|name| folder.join(name))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    found.sort();
    Ok(found)
}

/// The finished snapshots, oldest first.
pub fn finished(media: &dyn Media, dir: &Path) -> Result<Vec<PathBuf>, MachineError> {
    listed(media, dir, "snap")
}

/// The newest finished snapshot.
pub fn newest(media: &dyn Media, dir: &Path) -> Result<Option<PathBuf>, MachineError> {
    Ok(finished(media, dir)?.pop())
}

/// Bytes of the newest finished snapshot; none without one.
pub fn newest_bytes(media: &dyn Media, dir: &Path) -> Result<u64, MachineError> {
    let Some(path) = newest(media, dir)? else {
        return Ok(0);
    };
    let file = media.open(&path, OpenMode::Read);
    let file = file.map_err(MachineError::io("open", &path))?;
    file.length()
        .map_err(MachineError::io("ask for the size of", &path))
}

/// Removes what was received of snapshots and did not become one.
pub fn remove_incoming(media: &dyn Media, dir: &Path) -> Result<(), MachineError> {
    for path in listed(media, dir, UNFINISHED)? {
        let name = path.file_name().and_then(std::ffi::OsStr::to_str);
        if name.is_some_and(|name| name.starts_with(INCOMING)) {
            media
                .remove(&path)
                .map_err(MachineError::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Removes what a crash left half written.
pub fn remove_unfinished(media: &dyn Media, dir: &Path) -> Result<(), MachineError> {
    for path in listed(media, dir, UNFINISHED)? {
        media
            .remove(&path)
            .map_err(MachineError::io("remove", &path))?;
    }
    Ok(())
}

struct Reader {
    path: PathBuf,
    input: Hashing<BufReader<Cursor>>,
}

impl Reader {
    fn open(media: &dyn Media, path: &Path) -> Result<(Self, Meta), MachineError> {
        let file = media.open(path, OpenMode::Read);
        let file = Cursor {
            file: file.map_err(MachineError::io("open", path))?,
            position: 0,
        };
        let mut reader = Self {
            path: path.to_owned(),
            input: Hashing {
                inner: BufReader::with_capacity(BUFFER_BYTES, file),
                hasher: blake3::Hasher::new(),
            },
        };
        if reader.array::<8>()? != *MAGIC {
            return Err(reader.damaged("it does not begin as one"));
        }
        let version = reader.number()?;
        if version != VERSION {
            return Err(reader.damaged(&format!("version {version} is not known here")));
        }
        let bytes = reader.number()?;
        if bytes > META_BYTES_MAX {
            return Err(reader.damaged("its header is too long"));
        }
        let body = reader.bytes(bytes)?;
        let meta = postcard::from_bytes(&body)
            .map_err(|error| reader.damaged(&format!("header: {error}")))?;
        Ok((reader, meta))
    }

    fn damaged(&self, reason: &str) -> MachineError {
        MachineError::Snapshot {
            path: self.path.clone(),
            reason: reason.to_owned(),
        }
    }

    fn bytes(&mut self, length: u32) -> Result<Vec<u8>, MachineError> {
        let mut bytes = vec![0; length as usize];
        self.input
            .read_exact(&mut bytes)
            .map_err(|error| self.damaged(&error.to_string()))?;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], MachineError> {
        let mut bytes = [0; N];
        self.input
            .read_exact(&mut bytes)
            .map_err(|error| self.damaged(&error.to_string()))?;
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u32, MachineError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn row(&mut self) -> Result<Option<Pair>, MachineError> {
        let key_bytes = self.number()?;
        if key_bytes == END {
            return Ok(None);
        }
        let value_bytes = self.number()?;
        if key_bytes > ROW_BYTES_MAX || value_bytes > ROW_BYTES_MAX {
            return Err(self.damaged("a row is impossibly long"));
        }
        let key = RowKey::from_vec(self.bytes(key_bytes)?);
        Ok(Some((key, self.bytes(value_bytes)?)))
    }
}

/// What a snapshot says of itself; its rows are not verified.
pub fn read_meta(media: &dyn Media, path: &Path) -> Result<Meta, MachineError> {
    Reader::open(media, path).map(|(_, meta)| meta)
}

/// Hands on all rows in batches. An error at the end (a wrong hash) means: nothing of it may be used.
pub fn read_rows(
    media: &dyn Media,
    path: &Path,
    mut load: impl FnMut(Batch) -> Result<(), KvError>,
) -> Result<Meta, MachineError> {
    let (mut reader, meta) = Reader::open(media, path)?;
    let mut batch = Batch::new();
    let mut rows = 0u64;
    while let Some((key, value)) = reader.row()? {
        rows += 1;
        batch.insert(key, Some(value));
        if batch.len() == LOAD_ROWS {
            load(std::mem::take(&mut batch))?;
        }
    }
    if u64::from_le_bytes(reader.array()?) != rows {
        return Err(reader.damaged("rows are missing"));
    }
    let expected = reader.input.hasher.finalize();
    if reader.array::<32>()? != *expected.as_bytes() {
        return Err(reader.damaged("its hash is wrong"));
    }
    load(batch)?;
    Ok(meta)
}

/// The snapshot as openraft wants it.
pub fn as_snapshot(
    ground: &Ground,
    path: &Path,
) -> Result<openraft::Snapshot<TypeConfig>, MachineError> {
    Ok(openraft::Snapshot {
        meta: read_meta(&*ground.media, path)?,
        snapshot: Box::new(SnapshotFile::open(ground, path)?),
    })
}
