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
const HEADER: DatafileHeader = DatafileHeader {
    purpose: *b"ZDBN",
    id: 0,
};
const KIND_SETTINGS: u8 = 1;

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
            password: (*bytes.get(10)? == 1).then(|| password.to_owned()),
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
        file.append(KIND_SETTINGS, &[&self.encode()])?;
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
        let mut settings = None;
        let (_, report) = Datafile::inspect(media, &marker, HEADER, &mut |frame| {
            if frame.kind == KIND_SETTINGS {
                settings = Self::decode(frame.payload);
            }
        })?;
        settings.map(Some).ok_or_else(|| {
            EngineError::from(DatafileError::Damaged {
                path: marker,
                offset: 0,
                bytes: report.length,
            })
        })
    }
}
