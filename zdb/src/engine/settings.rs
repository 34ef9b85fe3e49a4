//! The settings of a namespace, kept in its directory as the file `namespace` (a datafile with one frame, replaced whole).
//!
//! The file is also the directory's marker: when it is no longer the one that was opened, the directory is gone.

use super::{EngineError, Mode};
use crate::datafile::{Datafile, DatafileError, DatafileHeader};
use crate::media::Media;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

pub(super) const MARKER: &str = "namespace";
const MARKER_NEW: &str = "namespace.new";
/// What the marker is called once the namespace was deleted and its files are being removed.
pub(super) const DELETED: &str = "namespace.deleted";
const HEADER: DatafileHeader = DatafileHeader {
    purpose: *b"ZDBN",
    id: 0,
};
const KIND_SETTINGS: u8 = 1;
/// Settings behind the number of versions kept as history and the version before which everything was flushed.
const KIND_SETTINGS_2: u8 = 2;

/// Versions kept as history of a key at most.
pub const HISTORY_VERSIONS_MAX: u32 = 65_535;

/// What can be set on a namespace.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceSettings {
    /// Who chooses the keys.
    pub mode: Mode,
    /// Live payload bytes allowed; 0 is unlimited.
    pub maxsize_bytes: u64,
    /// Needed to select the namespace (or, if public, to write to it).
    pub password: Option<String>,
    /// Readable without the password.
    pub public: bool,
    /// Keys can be neither overwritten nor deleted.
    pub worm: bool,
    /// No writes for now.
    pub locked: bool,
    /// Neither reads nor writes for now.
    pub frozen: bool,
    /// Older versions kept of every key (at most [`HISTORY_VERSIONS_MAX`]); 0 keeps none. They take room on the disk, not of the quota.
    pub history_versions: u32,
}

impl Default for NamespaceSettings {
    fn default() -> Self {
        Self {
            mode: Mode::User,
            maxsize_bytes: 0,
            password: None,
            public: true,
            worm: false,
            locked: false,
            frozen: false,
            history_versions: 0,
        }
    }
}

impl std::fmt::Debug for NamespaceSettings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("NamespaceSettings")
            .field("mode", &self.mode)
            .field("maxsize_bytes", &self.maxsize_bytes)
            .field("password", &self.password.as_ref().map(|_| "…"))
            .field("public", &self.public)
            .field("worm", &self.worm)
            .field("locked", &self.locked)
            .field("frozen", &self.frozen)
            .field("history_versions", &self.history_versions)
            .finish()
    }
}

const PUBLIC: u8 = 1;
const WORM: u8 = 2;
const LOCKED: u8 = 4;
const FROZEN: u8 = 8;

impl NamespaceSettings {
    fn encode(&self) -> Vec<u8> {
        let flag = |on: bool, bit: u8| if on { bit } else { 0 };
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&self.maxsize_bytes.to_le_bytes());
        bytes.push(match self.mode {
            Mode::User => 0,
            Mode::Sequential => 1,
        });
        bytes.push(
            flag(self.public, PUBLIC)
                | flag(self.worm, WORM)
                | flag(self.locked, LOCKED)
                | flag(self.frozen, FROZEN),
        );
        bytes.push(u8::from(self.password.is_some()));
        bytes.extend_from_slice(self.password.as_deref().unwrap_or("").as_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let flags = *bytes.get(9)?;
        let password = std::str::from_utf8(bytes.get(11..)?).ok()?;
        Some(Self {
            maxsize_bytes: u64::from_le_bytes(bytes.get(0..8)?.try_into().ok()?),
            mode: match bytes.get(8)? {
                0 => Mode::User,
                1 => Mode::Sequential,
                _ => return None,
            },
            public: flags & PUBLIC != 0,
            worm: flags & WORM != 0,
            locked: flags & LOCKED != 0,
            frozen: flags & FROZEN != 0,
            history_versions: 0,
            password: (*bytes.get(10)? == 1).then(|| password.to_owned()),
        })
    }
}

/// What the marker file holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct StoredSettings {
    pub(super) settings: NamespaceSettings,
    /// FLUSH: entries of lower versions do not count any more, wherever they are found.
    pub(super) flushed_before: u64,
}

impl StoredSettings {
    /// The kind of version 1 as long as it can say everything, so that older programs read what they can.
    fn encode(&self) -> (u8, Vec<u8>) {
        let first = self.settings.encode();
        let history = self.settings.history_versions;
        if history == 0 && self.flushed_before == 0 {
            return (KIND_SETTINGS, first);
        }
        let mut bytes = Vec::with_capacity(16 + first.len());
        bytes.extend_from_slice(&history.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.flushed_before.to_le_bytes());
        bytes.extend_from_slice(&first);
        (KIND_SETTINGS_2, bytes)
    }

    fn decode(kind: u8, bytes: &[u8]) -> Option<Self> {
        let (history_versions, flushed_before, rest) = match kind {
            KIND_SETTINGS => (0, 0, bytes),
            KIND_SETTINGS_2 => (
                u32::from_le_bytes(bytes.get(0..4)?.try_into().ok()?),
                u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?),
                bytes.get(16..)?,
            ),
            _ => return None,
        };
        Some(Self {
            settings: NamespaceSettings {
                history_versions,
                ..NamespaceSettings::decode(rest)?
            },
            flushed_before,
        })
    }

    /// Replace the stored settings; durable when this returns.
    pub(super) fn save(&self, media: &Arc<dyn Media>, dir: &Path) -> Result<(), EngineError> {
        let fresh = dir.join(MARKER_NEW);
        if media.exists(&fresh) {
            media
                .remove(&fresh)
                .map_err(EngineError::io("remove", &fresh))?;
        }
        let mut file = Datafile::create(media, &fresh, HEADER)?;
        let (kind, bytes) = self.encode();
        // Twice, so that one rotten sector does not take the namespace along.
        file.append(kind, &[&bytes])?;
        file.append(kind, &[&bytes])?;
        file.mark()?;
        let marker = dir.join(MARKER);
        media
            .rename(&fresh, &marker)
            .map_err(EngineError::io("rename", &fresh))?;
        media
            .sync_dir(dir)
            .map_err(EngineError::io("sync directory", dir))
    }

    /// The stored settings; `None` if the directory holds no namespace yet.
    pub(super) fn load(media: &Arc<dyn Media>, dir: &Path) -> Result<Option<Self>, EngineError> {
        let marker = dir.join(MARKER);
        if !media.exists(&marker) {
            return Ok(None);
        }
        let mut stored = None;
        let (_, report) = Datafile::inspect(media, &marker, HEADER, &mut |frame| {
            stored = Self::decode(frame.kind, frame.payload).or(stored.take());
        })?;
        if !report.damaged.is_empty() {
            tracing::warn!(path = %marker.display(), "part of the settings is damaged; change any to write them anew");
        }
        stored.map(Some).ok_or_else(|| {
            EngineError::from(DatafileError::Damaged {
                path: marker,
                offset: 0,
                bytes: report.length,
            })
        })
    }
}
