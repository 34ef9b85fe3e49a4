//! The identity of a process that runs: every new connection, as server and as client, uses the newest one.

use super::{Identity, IdentityError, PeerIdentity};
use crate::tls;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared by all connections of a process. Cheap to clone; clones are the same identity.
#[derive(Clone)]
pub struct LiveIdentity {
    peer: PeerIdentity,
    current: Arc<Mutex<Current>>,
}

struct Current {
    identity: Identity,
    certified: Arc<CertifiedKey>,
    /// How often it was replaced.
    generation: u64,
}

impl fmt::Debug for LiveIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LiveIdentity({})", self.peer)
    }
}

impl LiveIdentity {
    /// One that stays what it is until it is replaced.
    pub fn new(identity: Identity) -> Self {
        let certified = tls::certified(&identity)
            .expect("the parts of an identity were checked when it was made");
        Self {
            peer: identity.peer().clone(),
            current: Arc::new(Mutex::new(Current {
                identity,
                certified: Arc::new(certified),
                generation: 0,
            })),
        }
    }

    /// Who this is; never changes.
    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// As it is now.
    pub fn current(&self) -> Identity {
        self.lock().identity.clone()
    }

    /// Rises with every replacement: a connection made under an older one should be made anew.
    pub fn generation(&self) -> u64 {
        self.lock().generation
    }

    /// From now on new connections use this. Connections that stand go on as they are.
    pub fn replace(&self, identity: Identity) -> Result<(), IdentityError> {
        if *identity.peer() != self.peer {
            return Err(IdentityError::OtherIdentity {
                found: identity.peer().clone(),
                wanted: self.peer.clone(),
            });
        }
        let certified = Arc::new(tls::certified(&identity)?);
        let mut current = self.lock();
        current.identity = identity;
        current.certified = certified;
        current.generation += 1;
        Ok(())
    }

    fn certified(&self) -> Arc<CertifiedKey> {
        self.lock().certified.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        // No step under the lock can leave it half done.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<&Identity> for LiveIdentity {
    fn from(identity: &Identity) -> Self {
        Self::new(identity.clone())
    }
}

impl From<&LiveIdentity> for LiveIdentity {
    fn from(identity: &LiveIdentity) -> Self {
        identity.clone()
    }
}

impl ResolvesServerCert for LiveIdentity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified())
    }
}

impl ResolvesClientCert for LiveIdentity {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.certified())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
