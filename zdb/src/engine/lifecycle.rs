//! What changes a namespace as a whole: settings, flush, reload, deletion.

use super::namespace::{Namespace, NamespaceOptions};
use super::settings::{DELETED, HISTORY_VERSIONS_MAX, MARKER, NamespaceSettings, StoredSettings};
use super::store::file_number;
use super::{EngineError, load};
use crate::media::Media;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What [`Namespace::jump`] did: numbers of datafiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Jump {
    /// Complete now.
    pub closed: u32,
    /// Written to from now on.
    pub opened: u32,
}

impl Namespace {
    /// Change settings; durable when this returns. The mode can change only while nothing was ever written.
    pub fn change_settings(
        &self,
        change: impl FnOnce(&mut NamespaceSettings),
    ) -> Result<(), EngineError> {
        let store = &self.shared.store;
        store.check_alive()?;
        let _changing = self.changing.lock();
        let _exclusive = self.shared.exclusive()?;
        let before = self.settings();
        let mut changed = before.clone();
        change(&mut changed);
        changed.history_versions = changed.history_versions.min(HISTORY_VERSIONS_MAX);
        // No commit while the mode changes: the first entry decides.
        let writer = (changed.mode != before.mode).then(|| store.writer.lock());
        if writer
            .as_ref()
            .is_some_and(|writer| writer.counters.next_version > 1)
        {
            return Err(EngineError::InUseMode);
        }
        let stored = StoredSettings {
            settings: changed.clone(),
            flushed_before: store.flushed_before.load(Ordering::Acquire),
        };
        let empty = match writer {
            Some(_) => Some(load::empty_index(&store.media, &store.dir, &stored)?),
            None => None,
        };
        store.save_settings(&stored)?;
        let mut state = store.state.write();
        if let Some(empty) = empty {
            state.index = empty;
        }
        if changed.history_versions != before.history_versions {
            state.index.set_history(changed.history_versions);
        }
        drop(state);
        *self.shared.settings.write() = changed;
        Ok(())
    }

    /// Delete every key at once; durable when this returns, and the space is free. After a crash in the middle either all keys are there
    /// or none.
    pub fn flush(&self) -> Result<(), EngineError> {
        let store = &self.shared.store;
        store.check_running()?;
        store.check_alive()?;
        let _changing = self.changing.lock();
        let settings = self.settings();
        refuse_changes(&settings)?;
        let _exclusive = self.shared.exclusive()?;
        let mut writer = store.writer.lock();
        // What is published later would be there again.
        store.wait_for_pending();
        store.check_running()?;
        store.rotate(&mut writer)?;
        let stored = StoredSettings {
            settings,
            flushed_before: writer.counters.next_version,
        };
        let empty = load::empty_index(&store.media, &store.dir, &stored)?;
        store.save_settings(&stored)?;
        store.forget_everything(stored.flushed_before, empty);
        Ok(())
    }

    /// Complete the datafile that is written to, and begin the next.
    pub fn jump(&self) -> Result<Jump, EngineError> {
        let store = &self.shared.store;
        store.check_running()?;
        store.check_alive()?;
        let exclusive = self.shared.exclusive()?;
        let mut writer = store.writer.lock();
        let closed = store.state.read().active;
        store.rotate(&mut writer)?;
        let opened = store.state.read().active;
        drop(writer);
        drop(exclusive);
        self.shared.start_maintenance();
        Ok(Jump { closed, opened })
    }

    /// Make the index anew from the datafiles, every byte of which is read and verified. Reading goes on meanwhile, writing waits.
    pub fn reload(&self) -> Result<(), EngineError> {
        let _changing = self.changing.lock();
        let _exclusive = self.shared.exclusive()?;
        let store = &self.shared.store;
        store.reload(&StoredSettings {
            settings: self.settings(),
            flushed_before: store.flushed_before.load(Ordering::Acquire),
        })
    }

    /// Remove the files of a closed namespace. What a crash leaves is removed at the next open of the engine.
    pub(super) fn remove_files(&self) -> Result<(), EngineError> {
        let store = &self.shared.store;
        let (marker, deleted) = (store.dir.join(MARKER), store.dir.join(DELETED));
        // From here on it is deleted, whatever is left of its files.
        store
            .media
            .rename(&marker, &deleted)
            .map_err(EngineError::io("rename", &marker))?;
        store
            .media
            .sync_dir(&store.dir)
            .map_err(EngineError::io("sync directory", &store.dir))?;
        remove_deleted(&store.media, &store.dir)
    }
}

/// Remove what is left of a deleted namespace; its marker goes last.
pub(super) fn remove_deleted(media: &Arc<dyn Media>, dir: &Path) -> Result<(), EngineError> {
    let names = media.list(dir).map_err(EngineError::io("list", dir))?;
    let files = names.iter().filter(|name| *name != DELETED);
    for name in files {
        let path = dir.join(name);
        media
            .remove(&path)
            .map_err(EngineError::io("remove", &path))?;
    }
    media
        .sync_dir(dir)
        .map_err(EngineError::io("sync directory", dir))?;
    let marker = dir.join(DELETED);
    if media.exists(&marker) {
        media
            .remove(&marker)
            .map_err(EngineError::io("remove", &marker))?;
    }
    media
        .remove_dir(dir)
        .map_err(EngineError::io("remove directory", dir))
}

/// The settings a namespace has from now on, stored.
pub(super) fn stored_settings(
    media: &Arc<dyn Media>,
    options: &NamespaceOptions,
) -> Result<StoredSettings, EngineError> {
    let dir = &options.dir;
    let mut wanted = StoredSettings {
        settings: options.settings.clone(),
        flushed_before: 0,
    };
    let names = || media.list(dir).map_err(EngineError::io("list", dir));
    match StoredSettings::load(media, dir)? {
        None if !options.create => return Err(EngineError::Gone { dir: dir.clone() }),
        None if names()?.iter().any(|name| file_number(name).is_some()) => {
            // Settings are stored before the first datafile is made: these were lost, and nobody knows what they said.
            return Err(EngineError::SettingsLost { dir: dir.clone() });
        }
        None => {}
        Some(stored) if !options.replace_settings || stored.settings == wanted.settings => {
            return Ok(stored);
        }
        // What is there was written in that mode.
        Some(stored) if stored.settings.mode != wanted.settings.mode => {
            return Err(EngineError::InUseMode);
        }
        Some(stored) => wanted.flushed_before = stored.flushed_before,
    }
    wanted.save(media, dir)?;
    Ok(wanted)
}

fn refuse_changes(settings: &NamespaceSettings) -> Result<(), EngineError> {
    if settings.frozen {
        return Err(EngineError::Frozen);
    }
    if settings.locked {
        return Err(EngineError::Locked);
    }
    if settings.worm {
        return Err(EngineError::Worm);
    }
    Ok(())
}
