//! The certificate of a mount: renewed while it is mounted, kept in the cluster file it came from, or, where there is none, in the
//! state directory's copy of the recovery kit. The kit that a person keeps elsewhere is never written.

use crate::error::MountError;
use crate::kit::RecoveryKit;
use qsfs_proto::identity::Identity;
use qsfs_proto::renewal::{Home, RenewalError};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// What a person does about a certificate that has ended.
pub(crate) const ADVICE: &str = "make a token (`qsfs token create --role client`), then `qsfs certificate renew --token-file FILE`, or without a cluster \
                          file `qsfs client join --token-file FILE`; a kit stays good for its key";

/// Refuses an identity that has ended: metad and the agents would.
pub(crate) fn check(identity: &Identity) -> Result<(), MountError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now_ms = now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
    let checked = identity.check_not_ended(now_ms, ADVICE);
    checked.map_err(|error| MountError::Identity(error.to_string()))
}

/// A state directory's copy of the kit. One mount has it.
pub(crate) struct KitCopy(pub(crate) PathBuf);

fn failed(error: crate::kit::KitError) -> RenewalError {
    RenewalError::Home(Box::new(error))
}

impl Home for KitCopy {
    fn load(&self) -> Result<Identity, RenewalError> {
        Ok(RecoveryKit::load(&self.0).map_err(failed)?.identity)
    }

    fn keep(&self, identity: &Identity) -> Result<Identity, RenewalError> {
        let kit = RecoveryKit::load(&self.0).map_err(failed)?;
        if kit.identity.supersedes(identity) {
            return Ok(kit.identity);
        }
        let renewed = RecoveryKit {
            identity: identity.clone(),
            ..kit
        };
        renewed.save(&self.0).map_err(failed)?;
        Ok(renewed.identity)
    }
}
