//! What differs between two trees: names, types, contents, modes, owners, sizes, modification times to the
//! nanosecond, link counts, which names are the same file, link targets.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Differences named at most, so that a broken mount does not fill the screen.
const DIFFERENCES_MAX: usize = 20;

/// What was compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Regular files (names).
    pub files: u64,
    /// Bytes of contents.
    pub bytes: u64,
    /// Directories.
    pub directories: u64,
    /// Everything else.
    pub others: u64,
}

/// Compares everything below two directories; `Err` says what differs.
pub fn compare(expected: &Path, actual: &Path) -> Result<Summary, String> {
    let mut walk = Walk::default();
    walk.directory(expected, actual);
    if walk.differences.is_empty() {
        Ok(walk.summary)
    } else {
        Err(walk.differences.join("\n"))
    }
}

#[derive(Default)]
struct Walk {
    summary: Summary,
    differences: Vec<String>,
    /// Inode there for every inode here: names that are one file here must be one file there.
    twins: BTreeMap<u64, u64>,
}

impl Walk {
    fn differ(&mut self, path: &Path, what: impl Into<String>) {
        if self.differences.len() < DIFFERENCES_MAX {
            self.differences
                .push(format!("{}: {}", path.display(), what.into()));
        }
    }

    fn directory(&mut self, expected: &Path, actual: &Path) {
        let (ours, theirs) = match (names(expected), names(actual)) {
            (Ok(ours), Ok(theirs)) => (ours, theirs),
            (Err(error), _) | (_, Err(error)) => {
                return self.differ(actual, format!("cannot be listed: {error}"));
            }
        };
        for name in theirs.iter().filter(|name| !ours.contains(name)) {
            self.differ(&actual.join(name), "is too much");
        }
        for name in &ours {
            if theirs.contains(name) {
                self.entry(&expected.join(name), &actual.join(name));
            } else {
                self.differ(&actual.join(name), "is missing");
            }
        }
    }

    fn entry(&mut self, expected: &Path, actual: &Path) {
        let (ours, theirs) = match (fs::symlink_metadata(expected), fs::symlink_metadata(actual)) {
            (Ok(ours), Ok(theirs)) => (ours, theirs),
            (Err(error), _) | (_, Err(error)) => {
                return self.differ(actual, format!("has no attributes: {error}"));
            }
        };
        for (what, our, their) in attributes(&ours, &theirs) {
            if our != their {
                self.differ(actual, format!("{what} is {their}, should be {our}"));
            }
        }
        if ours.is_file() && ours.nlink() > 1 {
            let twin = *self.twins.entry(ours.ino()).or_insert(theirs.ino());
            if twin != theirs.ino() {
                self.differ(actual, "is no longer the same file as its hard links");
            }
        }
        if ours.is_dir() {
            self.summary.directories += 1;
            self.directory(expected, actual);
        } else if ours.is_file() {
            self.summary.files += 1;
            self.contents(expected, actual);
        } else {
            self.summary.others += 1;
            if ours.is_symlink() && fs::read_link(expected).ok() != fs::read_link(actual).ok() {
                self.differ(actual, "points elsewhere");
            }
        }
    }

    fn contents(&mut self, expected: &Path, actual: &Path) {
        match same_contents(expected, actual) {
            Ok((bytes, None)) => self.summary.bytes += bytes,
            Ok((_, Some(at))) => self.differ(actual, format!("contents differ from byte {at} on")),
            Err(error) => self.differ(actual, format!("cannot be read: {error}")),
        }
    }
}

fn names(dir: &Path) -> io::Result<Vec<OsString>> {
    let mut names: Vec<OsString> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<io::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn kind(metadata: &Metadata) -> u64 {
    let kind = metadata.file_type();
    let bits = [
        kind.is_dir(),
        kind.is_file(),
        kind.is_symlink(),
        kind.is_fifo(),
        kind.is_socket(),
        kind.is_block_device(),
        kind.is_char_device(),
    ];
    bits.iter()
        .position(|bit| *bit)
        .map_or(0, |at| at as u64 + 1)
}

fn attributes(ours: &Metadata, theirs: &Metadata) -> Vec<(&'static str, String, String)> {
    let pair = |what, our: String, their: String| (what, our, their);
    let time = |metadata: &Metadata| format!("{}.{:09}", metadata.mtime(), metadata.mtime_nsec());
    let mut pairs = vec![
        pair("type", kind(ours).to_string(), kind(theirs).to_string()),
        pair(
            "mode",
            format!("{:o}", ours.mode()),
            format!("{:o}", theirs.mode()),
        ),
        pair("owner", ours.uid().to_string(), theirs.uid().to_string()),
        pair("group", ours.gid().to_string(), theirs.gid().to_string()),
        pair("modification time", time(ours), time(theirs)),
    ];
    if !ours.is_dir() {
        pairs.push(pair(
            "size",
            ours.size().to_string(),
            theirs.size().to_string(),
        ));
        pairs.push(pair(
            "link count",
            ours.nlink().to_string(),
            theirs.nlink().to_string(),
        ));
    }
    pairs
}

/// Length, and the first byte that differs.
fn same_contents(expected: &Path, actual: &Path) -> io::Result<(u64, Option<u64>)> {
    let (mut ours, mut theirs) = (File::open(expected)?, File::open(actual)?);
    let (mut our, mut their) = (vec![0; 1 << 18], vec![0; 1 << 18]);
    let mut at = 0;
    loop {
        let length = fill(&mut ours, &mut our)?;
        let other = fill(&mut theirs, &mut their)?;
        if let Some(place) = our[..length]
            .iter()
            .zip(&their[..other])
            .position(|(a, b)| a != b)
        {
            return Ok((at, Some(at + place as u64)));
        }
        if length != other {
            return Ok((at, Some(at + length.min(other) as u64)));
        }
        if length == 0 {
            return Ok((at, None));
        }
        at += length as u64;
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..])? {
            0 => break,
            more => length += more,
        }
    }
    Ok(length)
}

/// Every regular file below `root`, sorted; for tests that pick one.
pub fn files_below(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                dirs.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::tree::{TreeOptions, build};
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;
    use tempfile::TempDir;

    const SMALL: TreeOptions = TreeOptions {
        files: 60,
        file_bytes_max: 5_000,
        large_bytes: 300_000,
    };

    fn twins() -> (TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        build(&a, 7, SMALL).unwrap();
        let copied = Command::new("cp").arg("-a").arg(&a).arg(&b).status();
        assert!(copied.unwrap().success());
        (dir, a, b)
    }

    #[test]
    fn a_faithful_copy_has_no_differences() {
        let (_dir, a, b) = twins();
        let summary = compare(&a, &b).unwrap();
        assert!(
            summary.files > 60 && summary.directories >= 5,
            "{summary:?}"
        );
        assert!(summary.others > 0 && summary.bytes > 300_000, "{summary:?}");
    }

    #[test]
    fn every_kind_of_damage_is_caught() {
        type Damage = fn(&Path);
        let damages: [(&str, Damage); 6] = [
            ("contents differ from byte 7 on", |b| {
                let mut bytes = fs::read(b.join("large")).unwrap();
                bytes[7] ^= 1;
                let time = fs::metadata(b.join("large")).unwrap().modified().unwrap();
                fs::write(b.join("large"), bytes).unwrap();
                File::options()
                    .write(true)
                    .open(b.join("large"))
                    .unwrap()
                    .set_modified(time)
                    .unwrap();
            }),
            ("is missing", |b| fs::remove_file(b.join("large")).unwrap()),
            ("is too much", |b| fs::write(b.join("more"), b"").unwrap()),
            ("mode is", |b| {
                fs::set_permissions(b.join("large"), fs::Permissions::from_mode(0o611)).unwrap();
            }),
            ("modification time is", |b| {
                let file = File::options().write(true).open(b.join("large")).unwrap();
                file.set_modified(std::time::UNIX_EPOCH).unwrap();
            }),
            ("link count is", |b| {
                fs::hard_link(b.join("large"), b.join("extra")).unwrap()
            }),
        ];
        for (complaint, damage) in damages {
            let (_dir, a, b) = twins();
            damage(&b);
            let differences = compare(&a, &b).unwrap_err();
            assert!(
                differences.contains(complaint),
                "{complaint}: {differences}"
            );
        }
    }

    #[test]
    fn a_hard_link_that_became_a_copy_is_caught() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for root in [&a, &b] {
            fs::create_dir(root).unwrap();
            for name in ["1", "3"] {
                fs::write(root.join(name), b"same").unwrap();
            }
        }
        fs::hard_link(a.join("1"), a.join("2")).unwrap();
        fs::hard_link(a.join("3"), a.join("4")).unwrap();
        fs::hard_link(b.join("3"), b.join("2")).unwrap();
        fs::hard_link(b.join("1"), b.join("4")).unwrap();
        let differences = compare(&a, &b).unwrap_err();
        assert!(
            differences.contains("no longer the same file"),
            "{differences}"
        );
    }
}
