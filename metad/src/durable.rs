//! Small files that are replaced whole: the vote, the purge mark, which state directory is current.
//!
//! ```text
//! 0        4        8            8+n
//! | crc32  | length | postcard... |      little-endian; the checksum covers length and payload
//! ```
//!
//! Written beside, synced, renamed over, directory synced: after a crash the old or the new content is there, never a mix.

use qsfs_zdb::media::{Media, OpenMode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};

/// Largest content.
const CONTENT_BYTES_MAX: u64 = 1 << 20;

/// Why a small file is not usable.
#[derive(Debug, thiserror::Error)]
pub enum DurableError {
    /// The disk refused.
    #[error("{step} {path}: {source}", path = path.display())]
    Io {
        /// Verb phrase.
        step: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The content does not verify.
    #[error("{path} is damaged ({reason}): this node must be rebuilt from its peers", path = path.display())]
    Damaged {
        /// File.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Replaces the file durably.
pub fn store<T: Serialize>(media: &dyn Media, path: &Path, value: &T) -> Result<(), DurableError> {
    let fail = |step| {
        move |source| DurableError::Io {
            step,
            path: path.to_owned(),
            source,
        }
    };
    let body = postcard::to_stdvec(value).expect("plain data types always encode");
    let length = u32::try_from(body.len()).expect("small files are small");
    let mut rest = length.to_le_bytes().to_vec();
    rest.extend_from_slice(&body);
    let mut content = crc32fast::hash(&rest).to_le_bytes().to_vec();
    content.extend_from_slice(&rest);

    let beside = path.with_extension("new");
    if media.exists(&beside) {
        media
            .remove(&beside)
            .map_err(fail("remove the leftover of"))?;
    }
    let file = media
        .open(&beside, OpenMode::CreateNew)
        .map_err(fail("create"))?;
    file.write_all_at(&content, 0).map_err(fail("write"))?;
    file.sync_data().map_err(fail("sync"))?;
    media.rename(&beside, path).map_err(fail("rename"))?;
    let dir = path.parent().unwrap_or(Path::new("."));
    media.sync_dir(dir).map_err(fail("sync the directory of"))
}

/// Reads it; `None` if it was never written.
pub fn load<T: DeserializeOwned>(
    media: &dyn Media,
    path: &Path,
) -> Result<Option<T>, DurableError> {
    if !media.exists(path) {
        return Ok(None);
    }
    let fail = |step| {
        move |source| DurableError::Io {
            step,
            path: path.to_owned(),
            source,
        }
    };
    let damaged = |reason: &str| DurableError::Damaged {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    let file = media.open(path, OpenMode::Read).map_err(fail("open"))?;
    let bytes = file.length().map_err(fail("measure"))?;
    if !(8..=CONTENT_BYTES_MAX).contains(&bytes) {
        return Err(damaged("its size is impossible"));
    }
    let mut content = vec![0; usize::try_from(bytes).expect("checked above")];
    file.read_exact_at(&mut content, 0).map_err(fail("read"))?;
    let (crc, rest) = content.split_at(4);
    if crc != crc32fast::hash(rest).to_le_bytes() {
        return Err(damaged("its checksum is wrong"));
    }
    let (length, body) = rest.split_at(4);
    if length != u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes() {
        return Err(damaged("its length is wrong"));
    }
    postcard::from_bytes(body)
        .map(Some)
        .map_err(|error| damaged(&error.to_string()))
}
