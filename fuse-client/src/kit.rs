//! The recovery kit: the one file with which, and the cluster, a lost client's volume is recovered.
//!
//! A text file (TOML), mode 0600. Its last line is a checksum over everything before, so that a kit that was cut or mistyped
//! is noticed before it is needed. The volume key is in it: it never goes anywhere else, and nothing here prints it.

use qsfs_proto::api::{Secret, Volume};
use qsfs_proto::context::Context;
use qsfs_proto::identity::{Identity, IdentityError, IdentityPem};
use qsfs_zstor::id::{ClusterId, KeyId, VolumeId, VolumeName};
use qsfs_zstor::key::VolumeKey;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use zeroize::{Zeroize, Zeroizing};

/// Version written.
pub const KIT_VERSION: u32 = 1;
/// A kit is smaller than this.
pub const KIT_BYTES_MAX: u64 = 1 << 20;

const HEADING: &str = "# QSFS recovery kit. Whoever has this file can read the volume; without it, nobody can.\n\
    # Keep a copy where neither this machine nor the backends are: on paper, on a stick, in a vault.\n\
    # Use: qsfs mount VOLUME DIR --kit THIS_FILE [--takeover]\n\n";
const CHECKSUM: &str = "# checksum ";

/// Why a kit cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KitError {
    /// The operating system refused.
    #[error("{step} recovery kit {}: {reason}", path.display())]
    Io {
        /// Verb.
        step: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        reason: std::io::Error,
    },
    /// Not a kit, or a damaged one.
    #[error("recovery kit {}: {reason}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is wrong; never quotes the file.
        reason: String,
    },
    /// Its identity cannot be used.
    #[error("recovery kit {}: identity: {reason}", path.display())]
    Identity {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: IdentityError,
    },
    /// It is of another volume.
    #[error("recovery kit is of volume {found}, not of {wanted}")]
    OtherVolume {
        /// What it says.
        found: String,
        /// What is wanted.
        wanted: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KitFile {
    version: u32,
    volume: VolumeName,
    volume_id: String,
    key_id: String,
    key: Secret,
    cluster: String,
    endpoints: Vec<String>,
    identity: IdentityPem,
}

/// A kit that parses. Its `Debug` shows names only.
#[derive(Clone)]
pub struct RecoveryKit {
    /// Name of the volume when the kit was written.
    pub volume: VolumeName,
    /// Its id.
    pub volume_id: VolumeId,
    /// Name of the key.
    pub key_id: KeyId,
    /// The key.
    pub key: VolumeKey,
    /// Cluster.
    pub cluster: ClusterId,
    /// metad endpoints when the kit was written.
    pub endpoints: Vec<String>,
    /// A client identity that may use the volume.
    pub identity: Identity,
}

impl fmt::Debug for RecoveryKit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "RecoveryKit(volume {} {}, key {}, cluster {})",
            self.volume, self.volume_id, self.key_id, self.cluster
        )
    }
}

/// The kit of a volume, for the one who just created it (or has its key).
pub fn create_kit(
    volume: &Volume,
    key: VolumeKey,
    endpoints: Vec<String>,
    identity: Identity,
) -> RecoveryKit {
    RecoveryKit {
        volume: volume.name.clone(),
        volume_id: volume.id,
        key_id: volume.key_id,
        key,
        cluster: identity.cluster(),
        endpoints,
        identity,
    }
}

impl RecoveryKit {
    /// The text of the file.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut file = KitFile {
            version: KIT_VERSION,
            volume: self.volume.clone(),
            volume_id: self.volume_id.to_string(),
            key_id: self.key_id.to_string(),
            key: Secret(hex(self.key.expose()).to_string()),
            cluster: self.cluster.to_string(),
            endpoints: self.endpoints.clone(),
            identity: self.identity.to_pem(),
        };
        let body =
            Zeroizing::new(toml::to_string_pretty(&file).expect("plain strings and numbers"));
        file.key.0.zeroize();
        let mut text = Zeroizing::new(format!("{HEADING}{}\n", *body));
        let sum = checksum(&text);
        text.push_str(&format!("{CHECKSUM}{sum}\n"));
        text
    }

    /// Reads the text of a file; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, KitError> {
        let malformed = |reason: &str| KitError::Malformed {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let text = text.trim_end_matches(['\n', '\r', ' ']);
        let at = text.rfind(CHECKSUM).ok_or_else(|| {
            malformed("its last line, the checksum, is missing: this is no recovery kit, or its end was cut off")
        })?;
        let (body, last) = text.split_at(at);
        if last[CHECKSUM.len()..].trim() != checksum(body) {
            return Err(malformed(
                "its checksum does not match: it was damaged or edited; use another copy",
            ));
        }
        // The error of the parser would quote the line, and a line is the key.
        let mut file: KitFile = toml::from_str(body).map_err(|error| malformed(error.message()))?;
        if file.version != KIT_VERSION {
            return Err(malformed(&format!(
                "version {} is not known; use a newer qsfs",
                file.version
            )));
        }
        let key = unhex(&file.key.0);
        file.key.0.zeroize();
        let key = key.ok_or_else(|| malformed("the key is not 64 hexadecimal digits"))?;
        let id = |error: qsfs_zstor::id::IdError| malformed(&error.to_string());
        let identity = Identity::from_pem(file.identity).map_err(|reason| KitError::Identity {
            path: path.to_owned(),
            reason,
        })?;
        let kit = Self {
            volume: file.volume,
            volume_id: file.volume_id.parse().map_err(id)?,
            key_id: file.key_id.parse().map_err(id)?,
            key: VolumeKey::from_bytes(*key),
            cluster: file.cluster.parse().map_err(id)?,
            endpoints: file.endpoints,
            identity,
        };
        if kit.identity.cluster() != kit.cluster {
            return Err(malformed("its identity is of another cluster"));
        }
        if kit.endpoints.is_empty() {
            return Err(malformed("it lists no metad endpoints"));
        }
        Ok(kit)
    }

    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, KitError> {
        let io = |reason| KitError::Io {
            step: "read",
            path: path.to_owned(),
            reason,
        };
        let file = std::fs::File::open(path).map_err(io)?;
        let mut text = Zeroizing::new(String::new());
        std::io::Read::read_to_string(&mut std::io::Read::take(file, KIT_BYTES_MAX), &mut text)
            .map_err(io)?;
        Self::parse(&text, path)
    }

    /// Writes a file that only the owner can read, durably. An existing one is replaced as a whole.
    pub fn save(&self, path: &Path) -> Result<(), KitError> {
        let io = |step| {
            move |reason| KitError::Io {
                step,
                path: path.to_owned(),
                reason,
            }
        };
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        let _ = std::fs::remove_file(&fresh);
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)
            .map_err(io("create"))?;
        file.write_all(self.to_text().as_bytes())
            .map_err(io("write"))?;
        file.sync_all().map_err(io("sync"))?;
        std::fs::rename(&fresh, path).map_err(io("rename"))?;
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        std::fs::File::open(parent)
            .and_then(|dir| dir.sync_all())
            .map_err(io("sync the directory of"))
    }

    /// Is it the kit of this volume, with the key the volume uses now?
    pub fn verify(&self, volume: &Volume) -> Result<(), KitError> {
        if self.volume_id == volume.id && self.key_id == volume.key_id {
            return Ok(());
        }
        let name =
            |name: &VolumeName, id: VolumeId, key: KeyId| format!("{name} (id {id}, key {key})");
        Err(KitError::OtherVolume {
            found: name(&self.volume, self.volume_id, self.key_id),
            wanted: name(&volume.name, volume.id, volume.key_id),
        })
    }

    /// A context made of the kit alone, for a machine that has nothing else.
    pub fn context(&self) -> Context {
        Context::new(self.endpoints.clone(), self.identity.clone(), None)
    }
}

fn checksum(body: &str) -> String {
    blake3::hash(body.trim_end().as_bytes()).to_hex()[..16].to_owned()
}

fn hex(key: &[u8; 32]) -> Zeroizing<String> {
    let digits = b"0123456789abcdef";
    let mut text = Zeroizing::new(String::with_capacity(64));
    for byte in key {
        text.push(char::from(digits[usize::from(byte >> 4)]));
        text.push(char::from(digits[usize::from(byte & 15)]));
    }
    text
}

fn unhex(text: &str) -> Option<Zeroizing<[u8; 32]>> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut key = Zeroizing::new([0; 32]);
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |at: usize| {
            char::from(pair[at])
                .to_digit(16)
                .and_then(|digit| u8::try_from(digit).ok())
        };
        *byte = digit(0)? << 4 | digit(1)?;
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use qsfs_proto::api::Role;
    use qsfs_proto::ca::CertificateAuthority;

    fn kit() -> RecoveryKit {
        let cluster = ClusterId::from_bytes([7; 16]);
        let ca = CertificateAuthority::create(cluster).unwrap();
        RecoveryKit {
            volume: "photos".parse().unwrap(),
            volume_id: VolumeId::from_bytes([1; 16]),
            key_id: KeyId::from_bytes([2; 16]),
            key: VolumeKey::from_bytes([0xab; 32]),
            cluster,
            endpoints: vec!["127.0.0.1:7400".to_owned()],
            identity: ca.issue(Role::Client, "*").unwrap(),
        }
    }

    #[test]
    fn a_kit_comes_back_whole_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume.kit");
        kit().save(&path).unwrap();
        kit().save(&path).unwrap();
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap());
        assert_eq!(mode & 0o777, 0o600);
        let loaded = RecoveryKit::load(&path).unwrap();
        assert_eq!(loaded.key.expose(), &[0xab; 32]);
        assert_eq!(loaded.volume_id, VolumeId::from_bytes([1; 16]));
        assert!(!format!("{loaded:?}").contains("abab"));
    }

    #[test]
    fn a_cut_or_edited_kit_is_refused_without_showing_the_key() {
        let text = kit().to_text();
        let path = Path::new("k");
        for cut in [0, 10, text.len() / 2, text.len() - 20] {
            let error = RecoveryKit::parse(&text[..cut], path)
                .unwrap_err()
                .to_string();
            assert!(!error.contains("abab"), "{error}");
        }
        let edited = text.replace("photos", "fotos1");
        assert!(
            RecoveryKit::parse(&edited, path)
                .unwrap_err()
                .to_string()
                .contains("checksum")
        );
    }
}
