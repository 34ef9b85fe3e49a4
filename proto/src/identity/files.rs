//! An identity in a directory: `cert.pem`, `key.pem`, `ca.pem`, each durable and readable by its owner only.
//!
//! ```text
//! save:  ca.pem (if it differs) -> key.pem.next -> cert.pem (from here on the new one counts) -> key.pem.next becomes key.pem
//! ```
//! Key and certificate are two files and cannot be replaced at once. Whoever dies in between leaves a certificate whose key is in
//! `key.pem.next`, which [`Identity::load`] takes when `key.pem` does not fit; one without a certificate for it counts for nothing.
//! A directory with a certificate is complete.

use super::{Identity, IdentityError, IdentityPem, PEM_BYTES_MAX};
use crate::api::Secret;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// File of the leaf certificate in an identity directory.
pub const CERT_FILE: &str = "cert.pem";
/// File of the private key.
pub const KEY_FILE: &str = "key.pem";
/// File of the key of a certificate that is about to replace the one that is there.
pub const NEXT_KEY_FILE: &str = "key.pem.next";
/// File of the cluster's CA certificate.
pub const CA_FILE: &str = "ca.pem";

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let path = path.to_owned();
    move |source| IdentityError::Io { step, path, source }
}

impl Identity {
    /// Reads the files of a directory.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let with_key = |name: &str| {
            Self::from_pem(IdentityPem {
                certificate: read_pem(&dir.join(CERT_FILE))?,
                key: Secret(read_pem(&dir.join(name))?),
                ca: read_pem(&dir.join(CA_FILE))?,
            })
        };
        let refused = match with_key(KEY_FILE) {
            Ok(identity) => return Ok(identity),
            Err(refused) => refused,
        };
        // The file of the key may be missing as well: a first save that was interrupted.
        if dir.join(NEXT_KEY_FILE).exists()
            && let Ok(identity) = with_key(NEXT_KEY_FILE)
        {
            return Ok(identity);
        }
        Err(refused)
    }

    /// Writes the files; what is there is replaced, and a reader or a crash in between sees the old identity or the new one.
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        fs::create_dir_all(dir).map_err(io_error("creating", dir))?;
        let _locked = Locked::dir(dir).map_err(io_error("locking", dir))?;
        self.save_locked(dir)
    }

    /// [`Self::save`] unless the directory holds an identity of the same process that ends later. Answers with the one it holds then.
    pub(crate) fn save_newer(&self, dir: &Path) -> Result<Self, IdentityError> {
        let _locked = Locked::dir(dir).map_err(io_error("locking", dir))?;
        if let Ok(kept) = Self::load(dir)
            && kept.supersedes(self)
        {
            return Ok(kept);
        }
        self.save_locked(dir)?;
        Ok(self.clone())
    }

    fn save_locked(&self, dir: &Path) -> Result<(), IdentityError> {
        let (key, next) = (dir.join(KEY_FILE), dir.join(NEXT_KEY_FILE));
        // A change that was interrupted is ended first: its key must not be written over while the certificate needs it.
        if next.exists() && Self::load(dir).is_ok_and(|kept| is_key_in(&next, &kept)) {
            become_file(&next, &key)?;
        }
        let ca = dir.join(CA_FILE);
        if read_pem(&ca).ok().as_deref() != Some(self.pem.ca.as_str()) {
            write_private(&ca, self.pem.ca.as_bytes()).map_err(io_error("writing", &ca))?;
        }
        write_private(&next, self.pem.key.0.as_bytes()).map_err(io_error("writing", &next))?;
        let certificate = dir.join(CERT_FILE);
        write_private(&certificate, self.pem.certificate.as_bytes())
            .map_err(io_error("writing", &certificate))?;
        become_file(&next, &key)
    }
}

fn is_key_in(path: &Path, identity: &Identity) -> bool {
    read_pem(path).is_ok_and(|key| key == identity.pem.key.0)
}

fn become_file(from: &Path, to: &Path) -> Result<(), IdentityError> {
    fs::rename(from, to)
        .and_then(|()| sync_parent(to))
        .map_err(io_error("writing", to))
}

fn read_pem(path: &Path) -> Result<String, IdentityError> {
    let bytes = fs::metadata(path).map_err(io_error("reading", path))?.len();
    if bytes > PEM_BYTES_MAX as u64 {
        let error = io::Error::other("the file is too long to be PEM");
        return Err(io_error("reading", path)(error));
    }
    fs::read_to_string(path).map_err(io_error("reading", path))
}

/// Keeps other processes that change the same identity out. Held only while files are read and written.
pub(crate) struct Locked {
    _dir: fs::File,
}

impl Locked {
    /// Locks a directory.
    pub(crate) fn dir(path: &Path) -> io::Result<Self> {
        let dir = fs::File::open(path)?;
        dir.lock()?;
        Ok(Self { _dir: dir })
    }

    /// Locks the directory of a file.
    pub(crate) fn parent_of(path: &Path) -> io::Result<Self> {
        Self::dir(parent(path))
    }
}

fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

fn sync_parent(path: &Path) -> io::Result<()> {
    fs::File::open(parent(path))?.sync_all()
}

/// Writes a file that only its owner may read: durable under a temporary name first, then renamed over `path`, so that a
/// reader sees the old or the new text, never half of it.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    let draft = PathBuf::from(draft);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    // `mode` counts only for a new file; a leftover draft keeps its own.
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&draft, path)?;
    sync_parent(path)
}
