//! Records from pieces alone: what is left when all of metad is gone.

use crate::codec::stripe::{ShardHashes, Stripe, StripeError};
use crate::id::{BackendId, ShardHash};
use crate::piece::PieceHeader;
use crate::record::EncodingRecord;

/// Why pieces do not make a stripe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecoverError {
    /// No pieces.
    #[error("no pieces were given")]
    Nothing,
    /// Pieces of two stripes; group them by volume, datafile and salt first.
    #[error("piece {0} belongs to another stripe than the first one")]
    Mixed(crate::piece::PieceKey),
}

/// A stripe as its pieces tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredStripe {
    /// Ids and sizes.
    pub stripe: Stripe,
    /// For every shard of which all pieces were seen on one backend: that backend and the shard's hash.
    pub shards: Vec<Option<(BackendId, ShardHash)>>,
}

impl RecoveredStripe {
    /// Complete shards.
    pub fn complete(&self) -> usize {
        self.shards.iter().flatten().count()
    }

    /// Enough shards to read the datafile.
    pub fn readable(&self) -> bool {
        self.complete() >= self.stripe.layout().geometry().data()
    }

    /// The record, when every shard is complete. Otherwise shards must be rebuilt first: the hash of a shard that was
    /// not seen is not known.
    pub fn record(&self) -> Result<EncodingRecord, StripeError> {
        let known: Vec<_> = self.shards.iter().flatten().collect();
        let hashes: Vec<ShardHash> = known.iter().map(|(_, hash)| *hash).collect();
        let backends: Vec<BackendId> = known.iter().map(|(backend, _)| *backend).collect();
        self.stripe.record(&hashes, &backends)
    }
}

/// Rebuilds a record from verified pieces and the backends they were found on; all of one encoding attempt. A shard that is
/// complete on several backends is taken from the lowest.
pub fn record_from_pieces(
    pieces: impl IntoIterator<Item = (BackendId, PieceHeader)>,
) -> Result<RecoveredStripe, RecoverError> {
    let mut backends = std::collections::BTreeMap::<BackendId, ShardHashes>::new();
    let mut stripe: Option<Stripe> = None;
    for (backend, header) in pieces {
        let stripe = *stripe.get_or_insert(*header.stripe());
        if *header.stripe() != stripe {
            return Err(RecoverError::Mixed(header.key()));
        }
        backends
            .entry(backend)
            .or_insert_with(|| ShardHashes::new(&stripe))
            .add(&header);
    }
    let stripe = stripe.ok_or(RecoverError::Nothing)?;
    let find = |shard| {
        backends
            .iter()
            .find_map(|(backend, hashes)| Some((*backend, hashes.shard(shard)?)))
    };
    let shards = (0..stripe.layout().geometry().total()).map(find).collect();
    Ok(RecoveredStripe { stripe, shards })
}
