//! Snapshot files: all rows in key order, between a header and a hash.
//!
//! ```text
//! "QSFSSNAP" | version u32 | meta length u32 | meta (postcard SnapshotMeta)
//! ( key length u32 | value length u32 | key | value )*   then  u32::MAX  | row count u64
//! BLAKE3 of everything before (32 bytes)
//! ```
//!
//! Little-endian. Written under a temporary name, synced, renamed: a file with a snapshot's name is complete.

use super::MachineError;
use crate::raft::TypeConfig;
use crate::state::kv::{Batch, KvError, Pair};
use openraft::SnapshotMeta;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
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

/// An open snapshot file, as openraft streams it.
#[derive(Debug)]
pub struct SnapshotFile {
    path: PathBuf,
    file: tokio::fs::File,
}

impl SnapshotFile {
    /// Opens a finished one for reading.
    pub fn open(path: &Path) -> Result<Self, MachineError> {
        let file = File::open(path).map_err(MachineError::io("open", path))?;
        Ok(Self {
            path: path.to_owned(),
            file: tokio::fs::File::from_std(file),
        })
    }

    /// Creates an unfinished one to be received.
    pub fn create(dir: &Path, number: u64) -> Result<Self, MachineError> {
        let path = dir
            .join("snapshot")
            .join(format!("incoming-{number}.{UNFINISHED}"));
        let file = File::create(&path).map_err(MachineError::io("create", &path))?;
        Ok(Self {
            path,
            file: tokio::fs::File::from_std(file),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until everything written is on disk.
    pub async fn finish(self) -> Result<PathBuf, MachineError> {
        self.file
            .sync_all()
            .await
            .map_err(MachineError::io("sync", &self.path))?;
        Ok(self.path)
    }
}

impl AsyncRead for SnapshotFile {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.file).poll_read(cx, buf)
    }
}

impl AsyncWrite for SnapshotFile {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.file).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.file).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.file).poll_shutdown(cx)
    }
}

impl AsyncSeek for SnapshotFile {
    fn start_seek(mut self: Pin<&mut Self>, position: std::io::SeekFrom) -> std::io::Result<()> {
        Pin::new(&mut self.file).start_seek(position)
    }

    fn poll_complete(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<u64>> {
        Pin::new(&mut self.file).poll_complete(cx)
    }
}

struct Hashing<T> {
    inner: T,
    hasher: blake3::Hasher,
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// Writes a snapshot from pages of rows, durably; returns its path.
pub fn write(
    dir: &Path,
    meta: &Meta,
    next_page: impl FnMut() -> Result<Vec<Pair>, KvError>,
) -> Result<PathBuf, MachineError> {
    let path = final_path(dir, meta);
    let part = path.with_extension(UNFINISHED);
    write_to(&part, meta, next_page)?;
    publish(dir, &part, &path)?;
    Ok(path)
}

/// The same into any file.
pub fn write_to(
    part: &Path,
    meta: &Meta,
    mut next_page: impl FnMut() -> Result<Vec<Pair>, KvError>,
) -> Result<(), MachineError> {
    let io = |step| MachineError::io(step, part);
    let file = File::create(part).map_err(io("create"))?;
    let mut out = Hashing {
        inner: BufWriter::with_capacity(256 << 10, file),
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
    let file = inner
        .into_inner()
        .map_err(|error| io("write")(error.into_error()))?;
    file.sync_all().map_err(io("sync"))
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("rows are far below 4 GiB")
}

/// Verifies a received file and gives it its name; returns its path.
pub fn accept(dir: &Path, part: &Path, meta: &Meta) -> Result<PathBuf, MachineError> {
    let found = read_rows(part, |_| Ok(()))?;
    if found.last_log_id != meta.last_log_id {
        return Err(MachineError::Snapshot {
            path: part.to_owned(),
            reason: "it is not the announced snapshot".into(),
        });
    }
    let path = final_path(dir, meta);
    if part == path {
        return Ok(path);
    }
    if part.parent() == path.parent() {
        publish(dir, part, &path)?;
    } else {
        // Not received but handed over by another state machine of this process: it stays that one's.
        let copy = path.with_extension(UNFINISHED);
        std::fs::copy(part, &copy).map_err(MachineError::io("copy", part))?;
        File::open(&copy)
            .and_then(|file| file.sync_all())
            .map_err(MachineError::io("sync", &copy))?;
        publish(dir, &copy, &path)?;
    }
    Ok(path)
}

fn final_path(dir: &Path, meta: &Meta) -> PathBuf {
    let (index, term) = meta
        .last_log_id
        .map_or((0, 0), |id| (id.index, id.leader_id.term));
    dir.join("snapshot")
        .join(format!("{index:020}-{term}.snap"))
}

/// Renames, syncs the directory, removes older snapshots.
fn publish(dir: &Path, part: &Path, path: &Path) -> Result<(), MachineError> {
    std::fs::rename(part, path).map_err(MachineError::io("rename", part))?;
    let folder = dir.join("snapshot");
    File::open(&folder)
        .and_then(|handle| handle.sync_all())
        .map_err(MachineError::io("sync", &folder))?;
    for old in finished(dir)? {
        if old != *path {
            std::fs::remove_file(&old).map_err(MachineError::io("remove", &old))?;
        }
    }
    Ok(())
}

fn listed(dir: &Path, extension: &str) -> Result<Vec<PathBuf>, MachineError> {
    let folder = dir.join("snapshot");
    let entries = std::fs::read_dir(&folder).map_err(MachineError::io("list", &folder))?;
    let mut found: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    found.sort();
    Ok(found)
}

/// The finished snapshots, oldest first.
pub fn finished(dir: &Path) -> Result<Vec<PathBuf>, MachineError> {
    listed(dir, "snap")
}

/// The newest finished snapshot.
pub fn newest(dir: &Path) -> Result<Option<PathBuf>, MachineError> {
    Ok(finished(dir)?.pop())
}

/// Removes what a crash left half written.
pub fn remove_unfinished(dir: &Path) -> Result<(), MachineError> {
    for path in listed(dir, UNFINISHED)? {
        std::fs::remove_file(&path).map_err(MachineError::io("remove", &path))?;
    }
    Ok(())
}

struct Reader {
    path: PathBuf,
    input: Hashing<BufReader<File>>,
}

impl Reader {
    fn open(path: &Path) -> Result<(Self, Meta), MachineError> {
        let file = File::open(path).map_err(MachineError::io("open", path))?;
        let mut reader = Self {
            path: path.to_owned(),
            input: Hashing {
                inner: BufReader::with_capacity(256 << 10, file),
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
        Ok(Some((self.bytes(key_bytes)?, self.bytes(value_bytes)?)))
    }
}

/// What a snapshot says of itself; its rows are not verified.
pub fn read_meta(path: &Path) -> Result<Meta, MachineError> {
    Reader::open(path).map(|(_, meta)| meta)
}

/// Hands on all rows in batches. An error at the end (a wrong hash) means: nothing of it may be used.
pub fn read_rows(
    path: &Path,
    mut load: impl FnMut(Batch) -> Result<(), KvError>,
) -> Result<Meta, MachineError> {
    let (mut reader, meta) = Reader::open(path)?;
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
pub fn as_snapshot(path: &Path) -> Result<openraft::Snapshot<TypeConfig>, MachineError> {
    Ok(openraft::Snapshot {
        meta: read_meta(path)?,
        snapshot: Box::new(SnapshotFile::open(path)?),
    })
}
