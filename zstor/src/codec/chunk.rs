//! Chunks: compress, then encrypt; and back.
//!
//! AES-256-GCM with a key derived from the volume key and all ids of the encoding attempt, random salt included, so a
//! (key, nonce) pair is never used twice: the nonce is the chunk number, and a sealer seals each number once.
//! The additional data binds chunk number, plaintext length and whether it is compressed; the ids are in the key.
//!
//! Lengths of compressed chunks are visible to whoever sees the object's ciphertext boundaries; contents are not.

use crate::key::{CHUNK_KEY_CONTEXT, ObjectIds, VolumeKey};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use std::sync::{Mutex, PoisonError};
use zstd::bulk::{Compressor, Decompressor};

/// Plaintext bytes per chunk, unless told otherwise.
pub const CHUNK_BYTES: u32 = 1 << 20;
/// Most plaintext bytes per chunk; what a reader will ever allocate for one.
pub const CHUNK_BYTES_MAX: u32 = 16 << 20;
/// Bytes the cipher adds to a chunk.
pub const TAG_BYTES: usize = 16;

/// zstd level of chunks; see `docs/format.md` for the measurement behind it. Any level decodes the same.
const ZSTD_LEVEL: i32 = 1;
/// A chunk is stored compressed only if it shrinks by at least one part in so many: less is not worth decompressing.
const MIN_SAVING: usize = 64;
/// Compression contexts kept for reuse; each is about 1 MiB.
const CONTEXTS_MAX: usize = 8;

/// Why a chunk could not be sealed or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Empty, or more than the chunk size.
    #[error("chunk {chunk} has {got} bytes of plaintext, 1 to {max} are right")]
    PlainBytes {
        /// Chunk number.
        chunk: u32,
        /// As given.
        got: usize,
        /// Chunk size.
        max: usize,
    },
    /// Not the length that the chunk table tells.
    #[error("chunk {chunk} has {got} bytes of ciphertext, {want} are right")]
    CipherBytes {
        /// Chunk number.
        chunk: u32,
        /// As given.
        got: usize,
        /// As in the chunk table.
        want: usize,
    },
    /// Damaged, of another datafile or attempt, or the key is of another volume.
    #[error("chunk {chunk} does not authenticate: it is damaged, or the key is not this volume's")]
    Unauthentic {
        /// Chunk number.
        chunk: u32,
    },
    /// zstd could not do its work. After authentication: a fault of the writer.
    #[error("zstd failed on chunk {chunk}: {reason}")]
    Zstd {
        /// Chunk number.
        chunk: u32,
        /// What zstd said.
        reason: String,
    },
}

/// One line of the chunk table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkEntry {
    /// Ciphertext bytes, tag included.
    pub cipher_bytes: u32,
    /// Compressed with zstd; otherwise stored as it was.
    pub compressed: bool,
}

/// A few zstd contexts that threads share; making one costs more than compressing a small chunk.
struct Contexts<T>(Mutex<Vec<T>>);

impl<T> Contexts<T> {
    const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn put_back(&self, context: T) {
        let mut contexts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if contexts.len() < CONTEXTS_MAX {
            contexts.push(context);
        }
    }
}

fn aead_key(key: &VolumeKey, ids: &ObjectIds) -> LessSafeKey {
    let derived = key.derive(CHUNK_KEY_CONTEXT, ids);
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, derived.as_ref()).expect("32-byte key"))
}

fn nonce(chunk: u32) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&chunk.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// `chunk number 4 | plaintext bytes 4 | compressed 1`, little-endian.
fn additional_data(chunk: u32, plain_bytes: usize, compressed: bool) -> Aad<[u8; 9]> {
    let plain_bytes = u32::try_from(plain_bytes).expect("at most CHUNK_BYTES_MAX");
    let mut bytes = [0; 9];
    bytes[..4].copy_from_slice(&chunk.to_le_bytes());
    bytes[4..8].copy_from_slice(&plain_bytes.to_le_bytes());
    bytes[8] = u8::from(compressed);
    Aad::from(bytes)
}

/// Seals the chunks of one encoding attempt. Shared by threads: chunks may be sealed in any order.
pub struct ChunkSealer {
    aead: LessSafeKey,
    chunk_bytes: usize,
    contexts: Contexts<Compressor<'static>>,
}

impl ChunkSealer {
    /// For one attempt: the salt in `ids` must have been drawn for it. Panics if `chunk_bytes` is 0 or above
    /// [`CHUNK_BYTES_MAX`].
    pub fn new(key: &VolumeKey, ids: &ObjectIds, chunk_bytes: u32) -> Self {
        assert!(
            (1..=CHUNK_BYTES_MAX).contains(&chunk_bytes),
            "chunk size {chunk_bytes}"
        );
        Self {
            aead: aead_key(key, ids),
            chunk_bytes: chunk_bytes as usize,
            contexts: Contexts::new(),
        }
    }

    /// Appends the sealed chunk to `out`. Deterministic. Each chunk number must be sealed with one plaintext only: sealing another
    /// one under the same number and salt would break the cipher.
    pub fn seal(
        &self,
        chunk: u32,
        plain: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<ChunkEntry, ChunkError> {
        if plain.is_empty() || plain.len() > self.chunk_bytes {
            return Err(ChunkError::PlainBytes {
                chunk,
                got: plain.len(),
                max: self.chunk_bytes,
            });
        }
        let start = out.len();
        out.reserve(plain.len() + TAG_BYTES);
        let compressed = self.compress(chunk, plain, out)?;
        if !compressed {
            out.truncate(start);
            out.extend_from_slice(plain);
        }
        let tag = self
            .aead
            .seal_in_place_separate_tag(
                nonce(chunk),
                additional_data(chunk, plain.len(), compressed),
                &mut out[start..],
            )
            .expect("a chunk is far below the cipher's limit");
        out.extend_from_slice(tag.as_ref());
        let cipher_bytes = u32::try_from(out.len() - start).expect("at most CHUNK_BYTES_MAX + tag");
        Ok(ChunkEntry {
            cipher_bytes,
            compressed,
        })
    }

    /// Appends the compressed form if it is small enough; false otherwise, `out` may then have grown.
    fn compress(&self, chunk: u32, plain: &[u8], out: &mut Vec<u8>) -> Result<bool, ChunkError> {
        let room = plain.len() - plain.len().div_ceil(MIN_SAVING);
        if room == 0 {
            return Ok(false);
        }
        let mut context = match self.contexts.take() {
            Some(context) => context,
            None => Compressor::new(ZSTD_LEVEL).map_err(|error| ChunkError::Zstd {
                chunk,
                reason: error.to_string(),
            })?,
        };
        let start = out.len();
        out.resize(start + room, 0);
        // An error here is "does not fit in the room given": then the chunk is stored as it is.
        let written = context.compress_to_buffer(plain, &mut out[start..]).ok();
        self.contexts.put_back(context);
        if let Some(bytes) = written {
            out.truncate(start + bytes);
        }
        Ok(written.is_some())
    }
}

/// Opens chunks of one encoding attempt. Shared by threads.
pub struct ChunkOpener {
    aead: LessSafeKey,
    contexts: Contexts<Decompressor<'static>>,
}

impl ChunkOpener {
    /// For the attempt named by `ids`.
    pub fn new(key: &VolumeKey, ids: &ObjectIds) -> Self {
        Self {
            aead: aead_key(key, ids),
            contexts: Contexts::new(),
        }
    }

    /// Opens a chunk whose plaintext has exactly `plain_bytes`. `cipher` is the chunk as stored, tag included; it is used
    /// as scratch space. Nothing that does not authenticate is ever decompressed or returned.
    pub fn open(
        &self,
        chunk: u32,
        entry: ChunkEntry,
        plain_bytes: usize,
        mut cipher: Vec<u8>,
    ) -> Result<Vec<u8>, ChunkError> {
        if plain_bytes == 0 || plain_bytes > CHUNK_BYTES_MAX as usize {
            let max = CHUNK_BYTES_MAX as usize;
            return Err(ChunkError::PlainBytes {
                chunk,
                got: plain_bytes,
                max,
            });
        }
        let want = if entry.compressed {
            entry.cipher_bytes as usize
        } else {
            plain_bytes + TAG_BYTES
        };
        if cipher.len() != want || entry.cipher_bytes as usize != want {
            return Err(ChunkError::CipherBytes {
                chunk,
                got: cipher.len(),
                want,
            });
        }
        let aad = additional_data(chunk, plain_bytes, entry.compressed);
        let opened = self
            .aead
            .open_in_place(nonce(chunk), aad, &mut cipher)
            .map_err(|_| ChunkError::Unauthentic { chunk })?
            .len();
        cipher.truncate(opened);
        if !entry.compressed {
            return Ok(cipher);
        }
        self.decompress(chunk, &cipher, plain_bytes)
    }

    fn decompress(
        &self,
        chunk: u32,
        packed: &[u8],
        plain_bytes: usize,
    ) -> Result<Vec<u8>, ChunkError> {
        let failed = |error: std::io::Error| ChunkError::Zstd {
            chunk,
            reason: error.to_string(),
        };
        let mut context = match self.contexts.take() {
            Some(context) => context,
            None => Decompressor::new().map_err(failed)?,
        };
        let mut plain = vec![0; plain_bytes];
        let result = context.decompress_to_buffer(packed, &mut plain[..]);
        self.contexts.put_back(context);
        let got = result.map_err(failed)?;
        if got != plain_bytes {
            return Err(ChunkError::PlainBytes {
                chunk,
                got,
                max: plain_bytes,
            });
        }
        Ok(plain)
    }
}
