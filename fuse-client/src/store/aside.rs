//! Keeping aside what a fenced or outrun writer had not pushed: never dropped, never merged.

use super::io_error;
use super::layout::{DatafileName, StateDir};
use super::open::local_names;
use super::synced_point;
use crate::ports::StoreError;
use qsfs_zdb::media::Media;
use qsfs_zstor::id::Stream;
use std::path::PathBuf;
use std::sync::Arc;

/// Moves the datafiles that `which` chooses to `aside/LABEL/`, checksums included, and lists them.
pub fn set_aside(
    media: &Arc<dyn Media>,
    dir: &StateDir,
    label: &str,
    which: impl Fn(&DatafileName) -> bool,
) -> Result<Vec<PathBuf>, StoreError> {
    let target = dir.aside().join(label);
    let mut moved = Vec::new();
    synced_point::forget(media, dir)
        .map_err(|source| io_error("remove", &dir.synced_point(), source))?;
    for name in local_names(media, dir)?.iter().filter(|name| which(name)) {
        media
            .create_dir_all(&target)
            .map_err(|source| io_error("create", &target, source))?;
        let (from, to) = (dir.datafile(*name), target.join(name.file_name()));
        media
            .rename(&from, &to)
            .map_err(|source| io_error("move aside", &from, source))?;
        let side = dir.page_sums(name.id);
        if name.stream == Stream::Data && media.exists(&side) {
            let to = target.join(side.file_name().unwrap_or_default());
            media
                .rename(&side, &to)
                .map_err(|source| io_error("move aside", &side, source))?;
        }
        moved.push(to);
    }
    if !moved.is_empty() {
        for path in [&target, &dir.datafiles()] {
            media
                .sync_dir(path)
                .map_err(|source| io_error("sync directory", path, source))?;
        }
    }
    Ok(moved)
}
