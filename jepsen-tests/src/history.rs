//! What a crash may leave behind: a prefix of what was done, and everything that an fsync acknowledged.
//!
//! A workload does [`Operation`]s one after the other, on the mount and in a [`Model`], and notes after which of them an fsync
//! returned. After the crash the mount is read back into a model; [`check`] looks for a prefix of the operations that
//! gives exactly that model. A write counts as several: the kernel hands a mount one `write(2)` in several requests, cut
//! where a page of the file ends, when it does not have the page that the write begins in (`fuse_fill_write_pages` in
//! Linux). Each request is whole, and the last write of the prefix may have come as far as one of them.

use rand::Rng;
use rand::rngs::StdRng;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Files of the workload at most; few, so that operations meet each other.
const FILES_MAX: u32 = 12;
/// Where the kernel may cut a write in two: multiples of a page within the file.
const PAGE_BYTES: u64 = 4096;

/// One operation on a flat directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Makes an empty file.
    Create {
        /// Name.
        name: String,
    },
    /// Writes at an offset, within the file or at its end.
    Write {
        /// Name.
        name: String,
        /// First byte.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// Sets the length.
    Truncate {
        /// Name.
        name: String,
        /// New length.
        length: u64,
    },
    /// Renames, over an existing file perhaps.
    Rename {
        /// Old name.
        from: String,
        /// New name.
        to: String,
    },
    /// Removes.
    Remove {
        /// Name.
        name: String,
    },
}

/// Contents of every file of the directory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Model(BTreeMap<String, Vec<u8>>);

/// What was done, and how much of it is owed after a crash.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// In order; the last one may have been under way at the crash.
    pub operations: Vec<Operation>,
    /// So many of them were done when the last successful fsync began.
    pub synced: usize,
}

impl Model {
    /// Names.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.0.keys()
    }

    /// Does the operation; it must make sense.
    pub fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Create { name } => {
                self.0.insert(name.clone(), Vec::new());
            }
            Operation::Write {
                name,
                offset,
                bytes,
            } => {
                let contents = self.0.entry(name.clone()).or_default();
                let start = usize::try_from(*offset).expect("small files");
                if contents.len() < start + bytes.len() {
                    contents.resize(start + bytes.len(), 0);
                }
                contents[start..start + bytes.len()].copy_from_slice(bytes);
            }
            Operation::Truncate { name, length } => {
                let length = usize::try_from(*length).expect("small files");
                self.0.entry(name.clone()).or_default().resize(length, 0);
            }
            Operation::Rename { from, to } => {
                if let Some(contents) = self.0.remove(from) {
                    self.0.insert(to.clone(), contents);
                }
            }
            Operation::Remove { name } => {
                self.0.remove(name);
            }
        }
    }

    /// Reads a directory back.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            files.insert(
                entry.file_name().to_string_lossy().into_owned(),
                fs::read(entry.path())?,
            );
        }
        Ok(Self(files))
    }

    /// A random operation that makes sense now.
    pub fn propose(&self, rng: &mut StdRng) -> Operation {
        let fresh = format!("file{}", rng.random_range(0..FILES_MAX));
        let Some(name) = self
            .names()
            .nth(rng.random_range(0..self.0.len().max(1)))
            .cloned()
        else {
            return Operation::Create { name: fresh };
        };
        let length = self.0[&name].len() as u64;
        match rng.random_range(0..10) {
            0 | 1 if !self.0.contains_key(&fresh) => Operation::Create { name: fresh },
            0 => Operation::Remove { name },
            1 if name != fresh => Operation::Rename {
                from: name,
                to: fresh,
            },
            2 => Operation::Truncate {
                name,
                length: rng.random_range(0..=length + 100),
            },
            _ => Operation::Write {
                name,
                offset: if rng.random_bool(0.7) {
                    length
                } else {
                    rng.random_range(0..=length)
                },
                bytes: (0..rng.random_range(1..9_000))
                    .map(|_| rng.random())
                    .collect(),
            },
        }
    }
}

impl Operation {
    /// What a crash in the middle of it may leave: the first requests of a write, none of anything else.
    fn begun(&self) -> Vec<Self> {
        let Self::Write {
            name,
            offset,
            bytes,
        } = self
        else {
            return Vec::new();
        };
        let end = offset + bytes.len() as u64;
        ((offset / PAGE_BYTES + 1)..=(end - 1) / PAGE_BYTES)
            .map(|page| {
                let length = usize::try_from(page * PAGE_BYTES - offset).expect("small files");
                Self::Write {
                    name: name.clone(),
                    offset: *offset,
                    bytes: bytes[..length].to_vec(),
                }
            })
            .collect()
    }

    /// Does it for real.
    pub fn perform(&self, dir: &Path) -> io::Result<()> {
        match self {
            Self::Create { name } => File::create_new(dir.join(name)).map(drop),
            Self::Write {
                name,
                offset,
                bytes,
            } => File::options()
                .write(true)
                .open(dir.join(name))?
                .write_all_at(bytes, *offset),
            Self::Truncate { name, length } => File::options()
                .write(true)
                .open(dir.join(name))?
                .set_len(*length),
            Self::Rename { from, to } => fs::rename(dir.join(from), dir.join(to)),
            Self::Remove { name } => fs::remove_file(dir.join(name)),
        }
    }
}

/// Finds the longest prefix of the history that gives `observed` and holds everything synced: how many operations of it
/// were done in full, or what is wrong.
pub fn check(history: &History, observed: &Model) -> Result<usize, String> {
    let mut model = Model::default();
    let mut found = (model == *observed).then_some(0);
    for (number, operation) in history.operations.iter().enumerate() {
        for begun in operation.begun() {
            // The parts of one write grow, so that the next may be applied over the one before, and the whole over them.
            model.apply(&begun);
            if model == *observed {
                found = Some(number);
            }
        }
        model.apply(operation);
        if model == *observed {
            found = Some(number + 1);
        }
    }
    match found {
        Some(length) if length >= history.synced => Ok(length),
        Some(length) => Err(format!(
            "lost what fsync acknowledged: {length} of {} operations are there, {} were synced",
            history.operations.len(),
            history.synced
        )),
        None => Err(format!(
            "what is there is no prefix of the {} operations ({} synced): {}",
            history.operations.len(),
            history.synced,
            nearest(history, observed)
        )),
    }
}

/// The synced state differs from what is there in these files, for people.
fn nearest(history: &History, observed: &Model) -> String {
    let mut model = Model::default();
    for operation in &history.operations {
        model.apply(operation);
    }
    let mut differences = Vec::new();
    for name in model.names().chain(observed.names()) {
        let length = |of: &Model| of.0.get(name).map(Vec::len);
        if model.0.get(name) != observed.0.get(name) {
            differences.push(format!(
                "{name}: length {:?}, at the end {:?}",
                length(observed),
                length(&model)
            ));
        }
    }
    differences.dedup();
    differences.join("; ")
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use rand::SeedableRng;

    fn history(seed: u64, length: usize) -> (History, Model) {
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut history, mut model) = (History::default(), Model::default());
        for _ in 0..length {
            let operation = model.propose(&mut rng);
            model.apply(&operation);
            history.operations.push(operation);
        }
        (history, model)
    }

    fn state_after(history: &History, skip: Option<usize>, length: usize) -> Model {
        let mut model = Model::default();
        for (number, operation) in history.operations[..length].iter().enumerate() {
            if Some(number) != skip {
                model.apply(operation);
            }
        }
        model
    }

    fn write(name: &str, offset: u64, bytes: &[u8]) -> Operation {
        Operation::Write {
            name: name.into(),
            offset,
            bytes: bytes.into(),
        }
    }

    #[test]
    fn every_prefix_is_accepted() {
        let (history, _) = history(3, 60);
        for length in 0..=60 {
            assert!(check(&history, &state_after(&history, None, length)).unwrap() >= length);
        }
    }

    #[test]
    fn performing_gives_what_the_model_says() {
        let (history, model) = history(11, 150);
        let dir = tempfile::tempdir().unwrap();
        for operation in &history.operations {
            operation.perform(dir.path()).unwrap();
        }
        assert_eq!(Model::read(dir.path()).unwrap(), model);
    }

    #[test]
    fn a_lost_fsync_is_caught() {
        let history = History {
            operations: vec![
                write("a", 0, b"1"),
                write("a", 1, b"2"),
                write("b", 0, b"3"),
            ],
            synced: 2,
        };
        let complaint = check(&history, &state_after(&history, None, 1)).unwrap_err();
        assert!(complaint.contains("fsync"), "{complaint}");
        assert_eq!(check(&history, &state_after(&history, None, 2)), Ok(2));
    }

    #[test]
    fn a_later_operation_without_an_earlier_one_is_caught() {
        let history = History {
            operations: vec![
                write("a", 0, b"1"),
                write("b", 0, b"2"),
                write("c", 0, b"3"),
            ],
            synced: 0,
        };
        let complaint = check(&history, &state_after(&history, Some(1), 3)).unwrap_err();
        assert!(complaint.contains("no prefix"), "{complaint}");
    }

    #[test]
    fn a_torn_write_is_caught() {
        let history = History {
            operations: vec![
                Operation::Create { name: "a".into() },
                write("a", 0, b"whole"),
            ],
            synced: 0,
        };
        let mut torn = Model::default();
        torn.apply(&write("a", 0, b"who"));
        assert!(check(&history, &torn).is_err());
    }

    #[test]
    fn the_last_write_may_end_with_a_page() {
        let whole = vec![7; 9_000];
        let mut history = History {
            operations: vec![write("a", 0, b"first"), write("a", 3, &whole)],
            synced: 1,
        };
        for (length, accepted) in [
            (4_093, true),
            (4_093 + 4_096, true),
            (4_092, false),
            (4_096, false),
        ] {
            let mut begun = state_after(&history, None, 1);
            begun.apply(&write("a", 3, &whole[..length]));
            assert_eq!(check(&history, &begun).ok(), accepted.then_some(1));
        }
        let mut begun = state_after(&history, None, 1);
        begun.apply(&write("a", 3, &whole[..4_093]));
        history.synced = 2;
        assert!(check(&history, &begun).is_err(), "an fsync owes all of it");
        history.synced = 1;
        history.operations.push(write("b", 0, b"later"));
        begun.apply(&write("b", 0, b"later"));
        assert!(check(&history, &begun).is_err(), "nothing follows a part");
    }
}
