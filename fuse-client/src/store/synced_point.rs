//! The synced point: how far the journal, and all data it names, is known to be durable.
//!
//! After every round of syncs the point it reached is noted in a file of its own, without a sync: after a killed process it is
//! exact, after a power cut it may be older, and it is never ahead of the truth. At the next open whatever does not verify before
//! that point is damage, and an error; what does not verify behind it was never acknowledged, and is cut.
//!
//! ```text
//! 0       8         16       24      28
//! +-------+---------+--------+-------+
//! | magic | journal | offset | crc32 |   little-endian; crc32 of all before
//! +-------+---------+--------+-------+
//! ```

use super::layout::StateDir;
use parking_lot::Mutex;
use qsfs_zdb::media::{Media, MediaFile, OpenMode};
use qsfs_zstor::id::DatafileId;
use std::io;
use std::sync::Arc;

/// First bytes of the file; the digit is the version.
const MAGIC: &[u8; 8] = b"QSFSSYN1";
const BYTES: usize = 28;

/// Everything before `offset` of this journal, and every journal before it, was durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SyncedPoint {
    /// The newest journal that was synced.
    pub journal: DatafileId,
    /// Its length in bytes then.
    pub offset: u64,
}

impl SyncedPoint {
    /// The file's contents.
    pub fn encode(self) -> [u8; BYTES] {
        let mut raw = [0; BYTES];
        raw[..8].copy_from_slice(MAGIC);
        raw[8..16].copy_from_slice(&self.journal.0.to_le_bytes());
        raw[16..24].copy_from_slice(&self.offset.to_le_bytes());
        let crc = crc32fast::hash(&raw[..24]);
        raw[24..].copy_from_slice(&crc.to_le_bytes());
        raw
    }

    /// The reverse; `None` for anything else.
    pub fn decode(raw: &[u8]) -> Option<Self> {
        let raw: &[u8; BYTES] = raw.try_into().ok()?;
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&raw[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let point = Self {
            journal: DatafileId(word(8)),
            offset: word(16),
        };
        (point.encode() == *raw).then_some(point)
    }

    /// Bytes of a journal that must verify: all of an older one.
    pub fn durable_bytes(self, journal: DatafileId) -> u64 {
        match journal.cmp(&self.journal) {
            std::cmp::Ordering::Less => u64::MAX,
            std::cmp::Ordering::Equal => self.offset,
            std::cmp::Ordering::Greater => 0,
        }
    }
}

/// What the last mount noted. A file that does not verify says nothing: then less is known, and nothing wrong is believed.
pub fn read(media: &Arc<dyn Media>, dir: &StateDir) -> io::Result<Option<SyncedPoint>> {
    let path = dir.synced_point();
    if !media.exists(&path) {
        return Ok(None);
    }
    let file = media.open(&path, OpenMode::Read)?;
    let mut raw = [0; BYTES];
    let fits = file.length()? == BYTES as u64;
    if fits {
        file.read_exact_at(&mut raw, 0)?;
    }
    let point = SyncedPoint::decode(&raw).filter(|_| fits);
    if point.is_none() {
        tracing::warn!(path = %path.display(), "the note of what was synced does not verify");
    }
    Ok(point)
}

/// Forgets it: nothing is open any more, or what was open is set aside.
pub fn forget(media: &Arc<dyn Media>, dir: &StateDir) -> io::Result<()> {
    let path = dir.synced_point();
    if media.exists(&path) {
        media.remove(&path)?;
    }
    Ok(())
}

/// The file of a running mount.
#[derive(Debug, Default)]
pub(super) struct SyncedPointFile {
    state: Mutex<Option<(Box<dyn MediaFile>, SyncedPoint)>>,
}

impl SyncedPointFile {
    /// Notes a point that a round of syncs reached.
    pub(super) fn note(
        &self,
        media: &Arc<dyn Media>,
        dir: &StateDir,
        point: SyncedPoint,
    ) -> io::Result<()> {
        let mut state = self.state.lock();
        if let Some((file, noted)) = state.as_mut() {
            if point > *noted {
                file.write_all_at(&point.encode(), 0)?;
                *noted = point;
            }
            return Ok(());
        }
        forget(media, dir)?;
        let file = media.open(&dir.synced_point(), OpenMode::CreateNew)?;
        file.write_all_at(&point.encode(), 0)?;
        *state = Some((file, point));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    fn point(journal: u64, offset: u64) -> SyncedPoint {
        SyncedPoint {
            journal: DatafileId(journal),
            offset,
        }
    }

    proptest! {
        #[test]
        fn a_changed_note_is_no_note(journal: u64, offset: u64, at in 0..BYTES, bit in 0..8_u32) {
            let raw = point(journal, offset).encode();
            prop_assert_eq!(SyncedPoint::decode(&raw), Some(point(journal, offset)));
            let mut flipped = raw;
            flipped[at] ^= 1 << bit;
            prop_assert_eq!(SyncedPoint::decode(&flipped), None);
            prop_assert_eq!(SyncedPoint::decode(&raw[..at]), None);
        }
    }

    #[test]
    fn older_journals_are_durable_whole() {
        let synced = point(5, 100);
        let bytes = [4, 5, 6].map(|id| synced.durable_bytes(DatafileId(id)));
        assert_eq!(bytes, [u64::MAX, 100, 0]);
    }

    #[test]
    fn a_note_never_goes_back() {
        let media: Arc<dyn Media> = Arc::new(qsfs_zdb::media::SimMedia::new());
        let dir = StateDir::new("/s");
        media.create_dir_all(dir.root()).unwrap();
        let file = SyncedPointFile::default();
        for (noted, read_back) in [((3, 50), (3, 50)), ((2, 90), (3, 50)), ((3, 51), (3, 51))] {
            file.note(&media, &dir, point(noted.0, noted.1)).unwrap();
            let wanted = Some(point(read_back.0, read_back.1));
            assert_eq!(read(&media, &dir).unwrap(), wanted);
        }
        forget(&media, &dir).unwrap();
        assert_eq!(read(&media, &dir).unwrap(), None);
    }
}
