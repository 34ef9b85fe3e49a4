//! What a person asks for: options of `qsfs agent join` and `qsfs agent serve`, parsed once.

use qsfs_zstor::id::{LocationName, NodeName};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// Least capacity of a backend: below it not even a few pieces fit.
pub const CAPACITY_BYTES_MIN: u64 = 16 << 20;

/// Options of [`join`](fn@crate::join).
pub struct JoinOptions {
    /// Join token as printed by `metad bootstrap` or `token create --role agent`.
    pub token: String,
    /// Name of this node, unique in its location.
    pub name: NodeName,
    /// Location of this node.
    pub location: LocationName,
    /// Where the backends are served; port 0 takes a free one and remembers it.
    pub listen: SocketAddr,
    /// `host:port` by which others reach `listen`, when it differs.
    pub advertise: Option<String>,
    /// Data directory of the agent: identity, configuration, scrub cursors; no shards.
    pub data: PathBuf,
    /// Directories that become backends.
    pub backends: Vec<BackendSpec>,
    /// Namespaces of separately run 0-db servers that become backends.
    pub attach: Vec<AttachSpec>,
}

/// Options of [`serve`](fn@crate::serve).
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Data directory that was joined.
    pub data: PathBuf,
}

/// Why an option is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// No `=`.
    #[error("{0:?} is not a backend: write DIRECTORY=CAPACITY, such as /disks/a=4TiB")]
    Backend(String),
    /// Not a size.
    #[error(
        "{0:?} is not a size: write a number of bytes or one with KiB, MiB, GiB, TiB (or KB, MB, GB, TB)"
    )]
    Size(String),
    /// Too small to be of use.
    #[error("a backend of {0} bytes is too small: at least {CAPACITY_BYTES_MIN} bytes")]
    TooSmall(u64),
    /// Not an attach address.
    #[error(
        "{0:?} is not an attachable 0-db: write zdb://HOST:PORT/NAMESPACE?capacity=SIZE&password-file=FILE"
    )]
    Attach(String),
    /// A password in the address would show in process lists.
    #[error(
        "a password does not belong into the address {0:?}: put it in a file, password-file=FILE"
    )]
    PasswordInAddress(String),
    /// Unknown query parameter.
    #[error(
        "{address:?} has the unknown parameter {parameter:?}: known are password-file, capacity"
    )]
    Parameter {
        /// The address as given.
        address: String,
        /// The parameter.
        parameter: String,
    },
}

/// `--backend DIR=CAPACITY`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendSpec {
    /// Directory of the backend; made when missing, otherwise it must be empty.
    pub dir: PathBuf,
    /// Bytes it may hold.
    pub capacity_bytes: u64,
}

impl FromStr for BackendSpec {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let (dir, size) = text
            .rsplit_once('=')
            .filter(|(dir, _)| !dir.is_empty())
            .ok_or_else(|| OptionError::Backend(text.to_owned()))?;
        Ok(Self {
            dir: PathBuf::from(dir),
            capacity_bytes: parse_capacity(size)?,
        })
    }
}

/// `--attach zdb://HOST:PORT/NAMESPACE?password-file=FILE&capacity=SIZE`: a plain 0-db, the one connection
/// without TLS; what is stored there is ciphertext all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachSpec {
    /// `host:port`.
    pub endpoint: String,
    /// Namespace.
    pub namespace: String,
    /// File whose first line is the namespace's password.
    pub password_file: Option<PathBuf>,
    /// Bytes it may hold; by default what the server says (quota or free disk).
    pub capacity_bytes: Option<u64>,
}

impl FromStr for AttachSpec {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let bad = || OptionError::Attach(text.to_owned());
        let rest = text.strip_prefix("zdb://").ok_or_else(bad)?;
        let (place, query) = match rest.split_once('?') {
            Some((place, query)) => (place, query),
            None => (rest, ""),
        };
        let (endpoint, namespace) = place.split_once('/').ok_or_else(bad)?;
        if endpoint.contains('@') {
            return Err(OptionError::PasswordInAddress(text.to_owned()));
        }
        let (host, port) = endpoint.rsplit_once(':').ok_or_else(bad)?;
        if host.is_empty()
            || port.parse::<u16>().is_err()
            || namespace.is_empty()
            || namespace.contains('/')
        {
            return Err(bad());
        }
        let mut spec = Self {
            endpoint: endpoint.to_owned(),
            namespace: namespace.to_owned(),
            password_file: None,
            capacity_bytes: None,
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("password-file", file)) => spec.password_file = Some(PathBuf::from(file)),
                Some(("capacity", size)) => spec.capacity_bytes = Some(parse_capacity(size)?),
                Some(("password", _)) => {
                    return Err(OptionError::PasswordInAddress(place.to_owned()));
                }
                _ => {
                    return Err(OptionError::Parameter {
                        address: place.to_owned(),
                        parameter: pair.to_owned(),
                    });
                }
            }
        }
        Ok(spec)
    }
}

fn parse_capacity(text: &str) -> Result<u64, OptionError> {
    let bytes = parse_size(text)?;
    if bytes < CAPACITY_BYTES_MIN {
        return Err(OptionError::TooSmall(bytes));
    }
    Ok(bytes)
}

/// Bytes of `4TiB`, `500GB`, `1048576`.
pub fn parse_size(text: &str) -> Result<u64, OptionError> {
    let bad = || OptionError::Size(text.to_owned());
    let trimmed = text.trim();
    let digits = trimmed
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(bad()),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    number.checked_mul(factor).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_backend_is_a_directory_and_a_capacity() {
        let spec: BackendSpec = "/disks/a=b=4TiB".parse().unwrap();
        assert_eq!(spec.dir, PathBuf::from("/disks/a=b"));
        assert_eq!(spec.capacity_bytes, 4 << 40);
        for bad in [
            "/disks/a",
            "=4TiB",
            "/a=",
            "/a=4XiB",
            "/a=1KiB",
            "/a=99999999TiB",
        ] {
            assert!(bad.parse::<BackendSpec>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_attached_zdb_has_no_password_in_its_address() {
        let spec: AttachSpec = "zdb://10.0.0.9:9900/ns?password-file=/etc/p&capacity=1GiB"
            .parse()
            .unwrap();
        assert_eq!(spec.endpoint, "10.0.0.9:9900");
        assert_eq!(spec.namespace, "ns");
        assert_eq!(spec.password_file, Some(PathBuf::from("/etc/p")));
        assert_eq!(spec.capacity_bytes, Some(1 << 30));
        for bad in [
            "10.0.0.9:9900/ns",
            "zdb://host/ns",
            "zdb://host:9900",
            "zdb://host:9900/",
            "zdb://:9900/ns",
            "zdb://host:99999/ns",
            "zdb://u@host:9900/ns",
            "zdb://host:9900/ns?password=x",
            "zdb://host:9900/ns?what=x",
        ] {
            assert!(bad.parse::<AttachSpec>().is_err(), "{bad:?}");
        }
    }
}
