//! Join tokens: what a person carries from the cluster to a new machine.
//!
//! ```text
//! qsfs1-BASE32( role:u8  cluster:16  BLAKE3(CA DER):32  secret:20  n:u8  n x (len:u8 endpoint)  check:4 )
//! ```
//! `check` is the start of the BLAKE3 of all before it, so that a mistyped token is told from a refused one. The cluster keeps only
//! the BLAKE3 of the secret.

use crate::api::{Role, Secret};
use data_encoding::{BASE32_NOPAD, HEXLOWER};
use qsfs_zstor::id::ClusterId;
use std::fmt;
use std::str::FromStr;
use zeroize::Zeroizing;

/// Start of every token; the digit is the version.
pub const TOKEN_PREFIX: &str = "qsfs1-";
/// Most endpoints in a token.
pub const TOKEN_ENDPOINTS_MAX: usize = 16;
/// Longest token accepted, in characters.
pub const TOKEN_CHARS_MAX: usize = 8 << 10;
const SECRET_BYTES: usize = 20;
const CHECK_BYTES: usize = 4;

/// Why a text is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Does not begin with the prefix.
    #[error("this is not a join token: it must begin with {TOKEN_PREFIX}")]
    NotAToken,
    /// Of a later version.
    #[error("this join token is of another version of qsfs: it must begin with {TOKEN_PREFIX}")]
    Version,
    /// Cut or mistyped.
    #[error("the join token is damaged ({0}); copy it again, whole, in one line")]
    Damaged(&'static str),
    /// Cannot be put into a token.
    #[error("a token cannot hold this: {0}")]
    Endpoints(String),
}

/// One token. `Display` is the token itself, with its secret: print it to its owner only.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    role: Role,
    cluster: ClusterId,
    ca_hash: [u8; 32],
    secret: Zeroizing<[u8; SECRET_BYTES]>,
    endpoints: Vec<String>,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("role", &self.role)
            .field("cluster", &self.cluster)
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

/// BLAKE3 of a token's secret, as `Mutation::CreateToken` registers it and a `JoinRequest` is checked against.
pub fn secret_hash(secret: &Secret) -> [u8; 32] {
    *blake3::hash(secret.0.as_bytes()).as_bytes()
}

impl JoinToken {
    /// A new one with a random secret. `ca_hash` is [`crate::ca::CertificateAuthority::fingerprint`].
    pub fn new(
        role: Role,
        cluster: ClusterId,
        ca_hash: [u8; 32],
        endpoints: Vec<String>,
        rng: &mut impl rand::CryptoRng,
    ) -> Result<Self, TokenError> {
        let bad = if endpoints.is_empty() || endpoints.len() > TOKEN_ENDPOINTS_MAX {
            Some(format!("1 to {TOKEN_ENDPOINTS_MAX} endpoints"))
        } else {
            endpoints
                .iter()
                .find(|endpoint| endpoint.is_empty() || endpoint.len() > 255)
                .map(|endpoint| format!("endpoint {endpoint:?}"))
        };
        if let Some(bad) = bad {
            return Err(TokenError::Endpoints(bad));
        }
        let mut secret = Zeroizing::new([0; SECRET_BYTES]);
        rng.fill_bytes(secret.as_mut());
        Ok(Self {
            role,
            cluster,
            ca_hash,
            secret,
            endpoints,
        })
    }

    /// What it lets join.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Cluster it leads into.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// BLAKE3 of the cluster's CA certificate.
    pub fn ca_hash(&self) -> [u8; 32] {
        self.ca_hash
    }

    /// metad endpoints, `host:port`.
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// The secret as it is sent in a `JoinRequest`.
    pub fn secret(&self) -> Secret {
        Secret(HEXLOWER.encode(self.secret.as_ref()))
    }

    /// [`secret_hash`] of [`Self::secret`].
    pub fn secret_hash(&self) -> [u8; 32] {
        secret_hash(&self.secret())
    }
}

fn check(body: &[u8]) -> [u8; CHECK_BYTES] {
    let hash = blake3::hash(body);
    let [a, b, c, d, ..] = *hash.as_bytes();
    [a, b, c, d]
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut body = Zeroizing::new(Vec::with_capacity(256));
        body.push(match self.role {
            Role::Metad => 1,
            Role::Agent => 2,
            Role::Client => 3,
            Role::Admin => 4,
        });
        body.extend_from_slice(self.cluster.as_bytes());
        body.extend_from_slice(&self.ca_hash);
        body.extend_from_slice(self.secret.as_ref());
        // At most TOKEN_ENDPOINTS_MAX endpoints of at most 255 bytes: checked when made.
        body.push(u8::try_from(self.endpoints.len()).map_err(|_| fmt::Error)?);
        for endpoint in &self.endpoints {
            body.push(u8::try_from(endpoint.len()).map_err(|_| fmt::Error)?);
            body.extend_from_slice(endpoint.as_bytes());
        }
        let check = check(&body);
        body.extend_from_slice(&check);
        let text = Zeroizing::new(BASE32_NOPAD.encode(&body).to_ascii_lowercase());
        write!(f, "{TOKEN_PREFIX}{}", text.as_str())
    }
}

/// Takes `count` bytes off the front.
fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8], TokenError> {
    let (head, tail) = rest
        .split_at_checked(count)
        .ok_or(TokenError::Damaged("it is too short"))?;
    *rest = tail;
    Ok(head)
}

fn take_array<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], TokenError> {
    take(rest, N)?
        .try_into()
        .map_err(|_| TokenError::Damaged("it is too short"))
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let Some(encoded) = text.strip_prefix(TOKEN_PREFIX) else {
            let other_version = text.starts_with("qsfs") && text.contains('-');
            return Err(if other_version {
                TokenError::Version
            } else {
                TokenError::NotAToken
            });
        };
        if encoded.len() > TOKEN_CHARS_MAX {
            return Err(TokenError::Damaged("it is too long"));
        }
        let upper = Zeroizing::new(encoded.to_ascii_uppercase());
        let bytes = BASE32_NOPAD
            .decode(upper.as_bytes())
            .map(Zeroizing::new)
            .map_err(|_| TokenError::Damaged("it is not base32"))?;
        let body_bytes = bytes.len().checked_sub(CHECK_BYTES);
        let (body, sum) = bytes.split_at(body_bytes.ok_or(TokenError::Damaged("it is too short"))?);
        if check(body) != sum {
            return Err(TokenError::Damaged("its checksum is wrong"));
        }
        let mut rest = body;
        let role = match take_array::<1>(&mut rest)? {
            [1] => Role::Metad,
            [2] => Role::Agent,
            [3] => Role::Client,
            [4] => Role::Admin,
            _ => return Err(TokenError::Damaged("its role is unknown")),
        };
        let cluster = ClusterId::from_bytes(take_array(&mut rest)?);
        let ca_hash = take_array(&mut rest)?;
        let secret = Zeroizing::new(take_array(&mut rest)?);
        let [count] = take_array(&mut rest)?;
        if count == 0 || usize::from(count) > TOKEN_ENDPOINTS_MAX {
            return Err(TokenError::Damaged("it has no endpoints, or too many"));
        }
        let mut endpoints = Vec::with_capacity(count.into());
        for _ in 0..count {
            let [len] = take_array(&mut rest)?;
            let endpoint = std::str::from_utf8(take(&mut rest, len.into())?)
                .map_err(|_| TokenError::Damaged("an endpoint is not text"))?;
            endpoints.push(endpoint.to_owned());
        }
        if !rest.is_empty() {
            return Err(TokenError::Damaged("it is too long"));
        }
        Ok(Self {
            role,
            cluster,
            ca_hash,
            secret,
            endpoints,
        })
    }
}
