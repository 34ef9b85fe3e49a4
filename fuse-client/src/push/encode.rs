//! From a sealed local datafile to an object in a spool: verify, compress, encrypt. Two threads share the chunks.

use super::spool::Spool;
use crate::ports::StoreError;
use crate::store::LocalStore;
use crate::store::append::meta_header;
use crate::store::catalog::LocalFile;
use qsfs_zdb::datafile::Datafile;
use qsfs_zstor::codec::{
    CHUNK_BYTES, ChunkEntry, ChunkError, ChunkSealer, ObjectError, ObjectHeader, ObjectIds,
};
use qsfs_zstor::id::Stream;
use qsfs_zstor::key::VolumeKey;
use std::sync::mpsc;

/// Why a datafile cannot be encoded.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// It cannot be read, or does not verify: rot is never pushed.
    #[error(transparent)]
    Local(#[from] StoreError),
    /// It is gone.
    #[error("local datafile is gone")]
    Gone,
    /// A chunk.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// The header.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The spool cannot be written.
    #[error("write the spool: {0}")]
    Spool(#[source] std::io::Error),
    /// The second thread ended early.
    #[error("the second encoding thread ended early")]
    Thread,
}

type SealedChunk = Result<(ChunkEntry, Vec<u8>), EncodeError>;

/// A source of verified plaintext.
struct Plain<'a> {
    store: &'a LocalStore,
    file: &'a LocalFile,
}

impl Plain<'_> {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), EncodeError> {
        match self.file.name.stream {
            Stream::Data => {
                if self.store.read_data(self.file.name.id, offset, buf)? {
                    Ok(())
                } else {
                    Err(EncodeError::Gone)
                }
            }
            Stream::Meta => Ok(self.store.read_meta(self.file, offset, buf)?),
        }
    }
}

/// Encodes the whole datafile into a spool. Blocking.
pub fn encode_object(
    store: &LocalStore,
    file: &LocalFile,
    key: &VolumeKey,
    ids: &ObjectIds,
) -> Result<(ObjectHeader, Spool), EncodeError> {
    match file.name.stream {
        Stream::Meta => verify_meta(store, file)?,
        // Also for one that seems empty: without its checksums nobody knows what it held.
        Stream::Data => Plain { store, file }.read(0, &mut [])?,
    }
    let chunks = ObjectHeader::chunks_of(file.bytes, CHUNK_BYTES)?;
    let header_bytes = ObjectHeader::encoded_len(chunks) as u64;
    let tags = u64::from(chunks) * qsfs_zstor::codec::TAG_BYTES as u64;
    let spool = Spool::new(
        store.media(),
        &store.dir().spool(),
        header_bytes + file.bytes + tags,
    );
    let spool = spool.map_err(EncodeError::Spool)?;
    let plain = Plain { store, file };
    let sealer = ChunkSealer::new(key, ids, CHUNK_BYTES);
    let seal = |chunk: u32, buf: &mut Vec<u8>| -> SealedChunk {
        let offset = u64::from(chunk) * u64::from(CHUNK_BYTES);
        let bytes = (file.bytes - offset).min(u64::from(CHUNK_BYTES));
        buf.resize(usize::try_from(bytes).unwrap_or(usize::MAX), 0);
        plain.read(offset, buf)?;
        let mut out = Vec::new();
        let entry = sealer.seal(chunk, buf, &mut out)?;
        Ok((entry, out))
    };
    let entries = std::thread::scope(|scope| {
        let (sender, odd) = mpsc::sync_channel::<SealedChunk>(1);
        let seal = &seal;
        scope.spawn(move || {
            let mut buf = Vec::new();
            for chunk in (1..chunks).step_by(2) {
                // The other side hangs up when it failed.
                if sender.send(seal(chunk, &mut buf)).is_err() {
                    return;
                }
            }
        });
        let mut entries = Vec::with_capacity(chunks as usize);
        let (mut at, mut buf) = (header_bytes, Vec::new());
        for chunk in 0..chunks {
            let (entry, bytes) = if chunk % 2 == 0 {
                seal(chunk, &mut buf)?
            } else {
                odd.recv().map_err(|_| EncodeError::Thread)??
            };
            spool.write_at(&bytes, at).map_err(EncodeError::Spool)?;
            at += bytes.len() as u64;
            entries.push(entry);
        }
        drop(odd);
        Ok::<_, EncodeError>(entries)
    })?;
    let header = ObjectHeader::new(*ids, CHUNK_BYTES, file.bytes, entries)?;
    spool
        .write_at(&header.encode(key), 0)
        .map_err(EncodeError::Spool)?;
    Ok((header, spool))
}

/// Every frame of a meta datafile carries its checksum.
fn verify_meta(store: &LocalStore, file: &LocalFile) -> Result<(), EncodeError> {
    let path = store.path_of(file);
    let damaged = |offset: u64, what: String| {
        EncodeError::Local(StoreError::Damaged {
            path: path.display().to_string(),
            offset,
            advice: format!(
                "{what}; operations from there on are not pushed until the file is restored"
            ),
        })
    };
    let inspected = Datafile::inspect(store.media(), &path, meta_header(file.name.id), &mut |_| {});
    let (_, report) = inspected.map_err(|error| damaged(0, error.to_string()))?;
    match report.damaged.first() {
        Some(damage) => Err(damaged(damage.offset, "a frame does not verify".to_owned())),
        None if report.torn_bytes_cut > 0 || !report.ends_marked => {
            Err(damaged(report.length, "its end is missing".to_owned()))
        }
        None => Ok(()),
    }
}
