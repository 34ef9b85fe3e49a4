//! The directory that a namespace is in: is it still the one that was opened, and how much room has its disk?
//!
//! A client that is alone waits for these questions at every commit. What was found a moment ago is therefore taken to be so still, where
//! that harms nobody: a directory that is taken away takes along what was written to it the moment before, too; and a disk does not fill
//! up in a moment that had plenty of room. Whatever is refused is refused for what was found just then.

use super::EngineError;
use super::settings::{MARKER, StoredSettings};
use super::store::{Store, Writer};
use crate::media::{Identity, Media};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A directory that was there so long ago is taken to be there still.
const ALIVE_FOR_MS: u64 = 20;
/// Room that was measured so long ago is taken to be there still...
const ROOM_FOR_MS: u64 = 20;
/// ...except for so much, which others may have written meanwhile: more than memory takes in that time. Far more than one commit writes.
const ROOM_PLENTY_BYTES: u64 = 256 << 20;

/// Room on the disk above the reserve.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// As it was measured, without what was planned since.
    bytes: u64,
    /// In milliseconds since the store was opened; 0: never.
    measured_at_ms: u64,
}

impl Room {
    pub(super) fn take(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

impl Store {
    /// Is the directory still the one that was opened?
    pub(super) fn check_alive(&self) -> Result<(), EngineError> {
        let known = self.identity.read();
        match identities(&self.media, &self.dir) {
            Ok(now) if now == *known => {
                let now_ms = self.since_opened_ms();
                self.alive_at_ms.store(now_ms, Ordering::Relaxed);
                Ok(())
            }
            _ => {
                self.alive_at_ms.store(0, Ordering::Relaxed);
                Err(EngineError::Gone {
                    dir: self.dir.clone(),
                })
            }
        }
    }

    /// As [`Store::check_alive`], but what was found a moment ago will do: many small reads and writes need not ask the disk each time.
    pub(super) fn check_alive_lately(&self) -> Result<(), EngineError> {
        let seen = self.alive_at_ms.load(Ordering::Relaxed);
        if seen > 0 && self.since_opened_ms().saturating_sub(seen) < ALIVE_FOR_MS {
            return Ok(());
        }
        self.check_alive()
    }

    /// Never 0.
    fn since_opened_ms(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).map_or(u64::MAX, |ms| ms + 1)
    }

    /// Bytes that may be written now so that the reserve is kept. Where less than plenty is left they are measured each time, so nothing is
    /// refused for what was measured before, and room that is there again is seen at once.
    pub(super) fn room(&self, writer: &mut Writer) -> u64 {
        let room = &mut writer.room;
        let now_ms = self.since_opened_ms();
        let lately = room.measured_at_ms > 0 && now_ms - room.measured_at_ms < ROOM_FOR_MS;
        if !lately || room.bytes < ROOM_PLENTY_BYTES {
            let space = self.media.space(&self.dir);
            room.bytes = space.map_or(0, |space| {
                space.free_bytes.saturating_sub(self.reserve_bytes)
            });
            room.measured_at_ms = now_ms;
        }
        room.bytes
    }

    /// Would the disk soon be full?
    pub(super) fn is_short_of_room(&self, datafiles: u64) -> bool {
        let room = self.datafile_bytes.saturating_mul(datafiles) + self.reserve_bytes;
        let space = self.media.space(&self.dir);
        space.map_or(true, |space| space.free_bytes < room)
    }

    /// Replace the stored settings, and with them the file by which the directory is known.
    pub(super) fn save_settings(&self, stored: &StoredSettings) -> Result<(), EngineError> {
        let mut identity = self.identity.write();
        let saved = stored.save(&self.media, &self.dir);
        // Also after an error: the new name may stand already.
        if let Ok(now) = identities(&self.media, &self.dir)
            && now.0 == identity.0
        {
            *identity = now;
        }
        saved
    }
}

pub(super) fn identities(
    media: &Arc<dyn Media>,
    dir: &Path,
) -> Result<(Identity, Identity), EngineError> {
    let marker = dir.join(MARKER);
    let directory = media.identity(dir).map_err(EngineError::io("find", dir))?;
    let marker = media
        .identity(&marker)
        .map_err(EngineError::io("find", &marker))?;
    Ok((directory, marker))
}
