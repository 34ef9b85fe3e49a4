//! Does what is committed meet the volume's policy, and could it now?

use super::transfer::TransferContext;
use qsfs_proto::api::MetadError;
use qsfs_zstor::id::DatafileId;
use qsfs_zstor::placement::{choose, holds, survival};
use qsfs_zstor::record::{EncodingRecord, ShardState};
use std::collections::BTreeSet;
use std::time::Duration;

/// Records asked for in one question about policy.
const POLICY_PAGE: usize = 512;

/// Of these datafiles, those whose committed placement does not meet the policy. Backends that are merely down count
/// as there: re-silver or their return will tell.
pub async fn below_policy(
    context: &TransferContext,
    suspects: &BTreeSet<DatafileId>,
) -> Result<BTreeSet<DatafileId>, MetadError> {
    if suspects.is_empty() {
        return Ok(BTreeSet::new());
    }
    context.backends.refresh(Duration::from_secs(1)).await?;
    let suspects: Vec<DatafileId> = suspects.iter().copied().collect();
    let mut below = BTreeSet::new();
    for page in suspects.chunks(POLICY_PAGE) {
        let records = context.cluster.records(context.volume, page).await?;
        below.extend(
            records
                .iter()
                .filter(|record| !meets_policy(context, record))
                .map(|record| record.datafile),
        );
    }
    Ok(below)
}

/// Does the placement of a record meet the policy?
pub fn meets_policy(context: &TransferContext, record: &EncodingRecord) -> bool {
    let site = |shard: &qsfs_zstor::record::Shard| {
        (shard.state == ShardState::Stored)
            .then(|| context.backends.site(shard.backend))
            .flatten()
    };
    let sites: Vec<_> = record.shards.iter().map(site).collect();
    survival(record.geometry, &sites).is_some_and(|survival| holds(&context.policy, &survival))
}

/// Could a datafile of full size be placed at full policy on the backends that are up, as far as this client knows? Then what is below
/// policy is being re-silvered.
pub fn can_meet_policy(context: &TransferContext) -> bool {
    let geometry = context.policy.geometry;
    let shard_bytes = context.store.settings().datafile_bytes / geometry.data() as u64;
    let candidates = context.backends.candidates(&BTreeSet::new());
    let nothing_kept = vec![None; geometry.total()];
    choose(
        &context.policy,
        geometry,
        shard_bytes,
        &candidates,
        &nothing_kept,
    )
    .is_ok_and(|placement| placement.full_policy)
}
