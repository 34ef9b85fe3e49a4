//! Names and places of everything in a state directory.
//!
//! ```text
//! STATE/lock                         held by the running mount
//! STATE/client.toml                  whose state this is
//! STATE/volume.kit                   the volume's key, 0600
//! STATE/control.sock                 control socket of the running mount
//! STATE/synced                       how far the journal is durable ([`super::synced_point`])
//! STATE/names/                       the namespace store
//! STATE/datafiles/{id:016x}.{data|meta}.{open|sealed|pushed}   (+ `.crc` of data files, written at seal)
//! STATE/spool/                       objects on their way to the backends, unlinked as soon as they are made
//! STATE/aside/epoch-{epoch}/         what a fenced or outrun writer had not pushed
//! ```
//!
//! The suffix is the lifecycle: the push queue is derived from it at every start, so it survives a restart.

use qsfs_zstor::id::{DatafileId, Stream};
use std::path::{Path, PathBuf};

/// How far a local datafile has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Being appended to, or closing.
    Open,
    /// Immutable and durable, not committed.
    Sealed,
    /// Committed: its shards are durable.
    Pushed,
}

impl Stage {
    const fn suffix(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Sealed => "sealed",
            Self::Pushed => "pushed",
        }
    }
}

/// One datafile name, parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DatafileName {
    /// Which.
    pub id: DatafileId,
    /// Stream.
    pub stream: Stream,
    /// Stage.
    pub stage: Stage,
}

impl DatafileName {
    /// File name inside `datafiles/`.
    pub fn file_name(&self) -> String {
        let stream = stream_word(self.stream);
        format!("{:016x}.{stream}.{}", self.id.0, self.stage.suffix())
    }

    /// The reverse of [`Self::file_name`]; `None` for anything else (side files, strangers).
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('.');
        let digits = parts.next().filter(|digits| digits.len() == 16)?;
        let id = DatafileId(u64::from_str_radix(digits, 16).ok()?);
        let stream = match parts.next()? {
            "data" => Stream::Data,
            "meta" => Stream::Meta,
            _ => return None,
        };
        let stage = match parts.next()? {
            "open" => Stage::Open,
            "sealed" => Stage::Sealed,
            "pushed" => Stage::Pushed,
            _ => return None,
        };
        let parsed = Self { id, stream, stage };
        (parts.next().is_none() && parsed.file_name() == name).then_some(parsed)
    }
}

/// `data` or `meta`.
pub const fn stream_word(stream: Stream) -> &'static str {
    match stream {
        Stream::Data => "data",
        Stream::Meta => "meta",
    }
}

/// The places in one state directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
}

impl StateDir {
    /// Paths under `root`; touches nothing.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Held by the running mount.
    pub fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Whose state this is.
    pub fn client_file(&self) -> PathBuf {
        self.root.join("client.toml")
    }

    /// The volume's key.
    pub fn kit(&self) -> PathBuf {
        self.root.join("volume.kit")
    }

    /// Control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.root.join("control.sock")
    }

    /// How far the journal is durable.
    pub fn synced_point(&self) -> PathBuf {
        self.root.join("synced")
    }

    /// Namespace store.
    pub fn names(&self) -> PathBuf {
        self.root.join("names")
    }

    /// Local datafiles.
    pub fn datafiles(&self) -> PathBuf {
        self.root.join("datafiles")
    }

    /// Spools of pushes in progress; a file in it is unlinked as soon as it is made.
    pub fn spool(&self) -> PathBuf {
        self.root.join("spool")
    }

    /// What is kept but no longer part of the volume.
    pub fn aside(&self) -> PathBuf {
        self.root.join("aside")
    }

    /// A datafile.
    pub fn datafile(&self, name: DatafileName) -> PathBuf {
        self.datafiles().join(name.file_name())
    }

    /// Page checksums of a data datafile.
    pub fn page_sums(&self, id: DatafileId) -> PathBuf {
        self.datafiles().join(format!("{:016x}.data.crc", id.0))
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn names_parse_what_they_print_and_refuse_strangers() {
        for stream in [Stream::Data, Stream::Meta] {
            for stage in [Stage::Open, Stage::Sealed, Stage::Pushed] {
                let id = DatafileId(0x1234);
                let name = DatafileName { id, stream, stage };
                assert_eq!(DatafileName::parse(&name.file_name()).unwrap(), name);
            }
        }
        for stranger in [
            "",
            "0000000000001234.data.crc",
            "1234.data.open",
            "0000000000001234.data.open.tmp",
            "000000000000123G.data.open",
            "000000000000ABCD.data.open",
            "+000000000001234.data.open",
        ] {
            assert_eq!(DatafileName::parse(stranger), None, "{stranger}");
        }
    }
}
