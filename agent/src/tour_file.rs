//! Where a backend's scrub tour is remembered: two small files in the agent's data directory.
//!
//! ```text
//! scrub-7.toml     cursor, last tour          orphans-7     one line each: volume datafile salt shard first-seen-ms
//! ```
//!
//! Both are replaced atomically. Losing them costs a tour that begins anew and a grace that begins anew, nothing else;
//! so what cannot be read is named in the log and forgotten.

use crate::durable::replace_file;
use crate::jobs::ShardKey;
use crate::orphans::Orphans;
use crate::scrub::Cursor;
use qsfs_zstor::id::{BackendId, DatafileId};
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct TourFile {
    cursor: PathBuf,
    orphans: PathBuf,
}

impl TourFile {
    /// For a backend, in the agent's data directory.
    pub(crate) fn new(data: &Path, backend: BackendId) -> Self {
        Self {
            cursor: data.join(format!("scrub-{backend}.toml")),
            orphans: data.join(format!("orphans-{backend}")),
        }
    }

    /// What was saved, or the beginning.
    pub(crate) fn load(&self) -> (Cursor, Orphans) {
        let cursor = read(&self.cursor).and_then(|text| match text.as_str() {
            "" => Ok(Cursor::default()),
            text => toml::from_str(text).map_err(|error| error.to_string()),
        });
        let orphans = read(&self.orphans).and_then(|text| parse(&text));
        (kept(&self.cursor, cursor), kept(&self.orphans, orphans))
    }

    /// Keeps the cursor.
    pub(crate) fn save_cursor(&self, cursor: &Cursor) {
        let text = toml::to_string(cursor).expect("a cursor is a plain table");
        report(&self.cursor, replace_file(&self.cursor, text.as_bytes()));
    }

    /// Keeps the orphans.
    pub(crate) fn save_orphans(&self, orphans: &Orphans) {
        let mut text = String::new();
        for (key, seen_ms) in orphans.entries() {
            let ShardKey {
                volume,
                datafile,
                salt,
                shard,
            } = key;
            writeln!(text, "{volume} {datafile} {salt} {shard} {seen_ms}")
                .expect("strings take everything");
        }
        report(&self.orphans, replace_file(&self.orphans, text.as_bytes()));
    }
}

fn read(path: &Path) -> Result<String, String> {
    match std::fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other.map_err(|error| error.to_string()),
    }
}

fn kept<T: Default>(path: &Path, read: Result<T, String>) -> T {
    read.unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), error, "cannot read what a scrub remembered; it begins anew");
        T::default()
    })
}

fn report(path: &Path, saved: io::Result<()>) {
    if let Err(error) = saved {
        tracing::warn!(path = %path.display(), %error, "cannot save where the scrub is; after a restart it begins earlier");
    }
}

fn parse(text: &str) -> Result<Orphans, String> {
    let entries: Result<Vec<(ShardKey, u64)>, String> = text.lines().map(parse_line).collect();
    Ok(Orphans::new(entries?))
}

fn parse_line(line: &str) -> Result<(ShardKey, u64), String> {
    let bad = || format!("{line:?} is not an orphan");
    let fields: Vec<&str> = line.split(' ').collect();
    let [volume, datafile, salt, shard, seen_ms] = fields[..] else {
        return Err(bad());
    };
    let key = ShardKey {
        volume: volume.parse().map_err(|_| bad())?,
        datafile: DatafileId(datafile.parse().map_err(|_| bad())?),
        salt: salt.parse().map_err(|_| bad())?,
        shard: shard.parse().map_err(|_| bad())?,
    };
    Ok((key, seen_ms.parse().map_err(|_| bad())?))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::fixture::record;
    use crate::orphans::Claim;

    #[test]
    fn what_is_saved_is_loaded_and_what_is_broken_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let file = TourFile::new(dir.path(), BackendId(7));
        assert_eq!(file.load(), (Cursor::default(), Orphans::default()));
        let cursor = Cursor {
            touring: true,
            volume: Some(record(3, 4).volume),
            datafile: DatafileId(3),
            bytes: 9,
            ..Cursor::default()
        };
        let mut orphans = Orphans::default();
        orphans.judge(ShardKey::of(&record(1, 4), 2), 5, Claim::Released, 6, 7);
        file.save_cursor(&cursor);
        file.save_orphans(&orphans);
        assert_eq!(file.load(), (cursor, orphans));
        std::fs::write(dir.path().join("scrub-7.toml"), "touring = 3").unwrap();
        std::fs::write(dir.path().join("orphans-7"), "x y").unwrap();
        assert_eq!(file.load(), (Cursor::default(), Orphans::default()));
    }
}
