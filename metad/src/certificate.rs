//! By hand, on the machine of a metad: a new certificate for it, or for whoever lost every other way. The node may run meanwhile; it
//! takes what it finds.

use crate::node::NodeError;
use crate::node::datadir::DataDir;
use qsfs_proto::ca::CertificateAuthority;
use qsfs_proto::identity::Identity;

/// The cluster's authority, of which every metad holds the key.
pub fn authority(data: &std::path::Path) -> Result<CertificateAuthority, NodeError> {
    let (_, _, authority) = DataDir::read(data)?;
    Ok(authority)
}

/// A new certificate for the metad of a data directory, made for as long as the present one.
pub fn renew_certificate(data: &std::path::Path) -> Result<Identity, NodeError> {
    let (_, identity, authority) = DataDir::read(data)?;
    let renewed = authority.renew(&identity)?;
    renewed.save(&DataDir::identity_of(data))?;
    Ok(renewed)
}
