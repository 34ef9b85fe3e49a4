//! Newtypes for every id, index and epoch, so that no two can be confused.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Why a text or byte string is not an id or a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Wrong length or not hexadecimal.
    #[error("{kind} must be {expected} hexadecimal digits, got {got:?}")]
    NotHex {
        /// What was being parsed.
        kind: &'static str,
        /// Number of digits wanted.
        expected: usize,
        /// The text as given.
        got: String,
    },
    /// A name that is empty, too long, or has characters outside `a-z A-Z 0-9 . _ -`.
    #[error(
        "{kind} {got:?} is not a valid name: 1 to 64 of a-z A-Z 0-9 . _ -, starting with a letter or digit"
    )]
    BadName {
        /// What was being parsed.
        kind: &'static str,
        /// The text as given.
        got: String,
    },
}

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name([u8; $len]);

        impl $name {
            /// Length in bytes.
            pub const LEN: usize = $len;

            /// Wraps raw bytes.
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// The raw bytes.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }

            /// A fresh one from the given randomness source.
            pub fn random(rng: &mut impl rand::RngCore) -> Self {
                let mut bytes = [0; $len];
                rng.fill_bytes(&mut bytes);
                Self(bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                data_encoding::HEXLOWER_PERMISSIVE
                    .decode(text.as_bytes())
                    .ok()
                    .and_then(|bytes| bytes.try_into().ok())
                    .map(Self)
                    .ok_or_else(|| IdError::NotHex { kind: $kind, expected: $len * 2, got: text.into() })
            }
        }
    };
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl $name {
            /// The one after this.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                if is_name(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(IdError::BadName { kind: $kind, got: text.chars().take(80).collect() })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
    };
}

/// Longest name of a volume, location or node, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    text.len() <= NAME_BYTES_MAX
        && text
            .bytes()
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(allowed)
}

bytes_id!(
    /// Identity of a cluster, drawn at bootstrap.
    ClusterId, 16, "cluster id"
);
bytes_id!(
    /// Identity of a volume, drawn when it is created; never reused.
    VolumeId, 16, "volume id"
);
bytes_id!(
    /// Random name of a volume's key. Not derived from the key; tells a wrong kit from the right one.
    KeyId, 16, "key id"
);
bytes_id!(
    /// Identity of a client state directory, drawn when it is made; holder of leases and of request sequences.
    ClientId, 16, "client id"
);
bytes_id!(
    /// Random salt of one encoding attempt of one datafile: no (key, nonce) pair is ever used twice.
    Salt, 16, "salt"
);
bytes_id!(
    /// Hash of a whole shard: BLAKE3 over the BLAKE3s of its pieces' payloads, in order. Known from piece headers alone.
    ShardHash, 32, "shard hash"
);

number_id!(
    /// A metad node in the Raft membership. Never reused.
    MetadId
);
number_id!(
    /// An agent. Never reused.
    AgentId
);
number_id!(
    /// A backend. Never reused.
    BackendId
);
number_id!(
    /// A datafile within its volume; both streams share one ascending sequence. 0 is "none".
    DatafileId
);
number_id!(
    /// Fencing number of a volume's writer; higher at every change of hands.
    Epoch
);

name_id!(
    /// A failure domain that can vanish whole.
    LocationName, "location"
);
name_id!(
    /// One machine inside a location.
    NodeName, "node"
);
name_id!(
    /// A volume's name.
    VolumeName, "volume"
);

/// The two kinds of datafile of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Stream {
    /// File contents.
    Data,
    /// The journal and the checkpoints of the namespace.
    Meta,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_ids_round_trip_and_refuse_other_lengths() {
        let id = VolumeId::from_bytes([0xab; 16]);
        assert_eq!(id.to_string().parse::<VolumeId>(), Ok(id));
        assert!("abcd".parse::<VolumeId>().is_err());
        assert!("zz".repeat(16).parse::<VolumeId>().is_err());
    }

    #[test]
    fn names_refuse_paths_spaces_and_emptiness() {
        for bad in ["", "a b", "../x", "a/b", "-x", ".x", "é", &"x".repeat(65)] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
        for good in ["dev", "loc1", "a.b-c_d", "7"] {
            assert_eq!(
                good.parse::<LocationName>().map(String::from),
                Ok(good.to_owned())
            );
        }
    }
}
