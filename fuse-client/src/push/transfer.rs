//! One transfer: encode, place, store all `k + m` shards.
//!
//! Rows of pieces are encoded in parallel and streamed to all backends at once, a bounded number of bytes at a time. When a
//! backend fails, its shards get another place and are stored again from the spool; the others are kept. Nothing is
//! handed to commit unless every piece was acknowledged as durable.

use super::encode::{EncodeError, encode_object};
use super::spool::Spool;
use crate::backends::Backends;
use crate::cluster::Cluster;
use crate::store::LocalStore;
use crate::store::catalog::LocalFile;
use futures::stream::{self, StreamExt};
use parking_lot::Mutex;
use qsfs_proto::api::MetadError;
use qsfs_zdb::client::ClientError;
use qsfs_zstor::codec::{
    EncodedPiece, ObjectIds, PIECE_BYTES, ShardHashes, Stripe, StripeEncoder, StripeError,
};
use qsfs_zstor::id::{BackendId, Epoch, Salt, VolumeId};
use qsfs_zstor::key::VolumeKey;
use qsfs_zstor::placement::{Placement, choose};
use qsfs_zstor::policy::Policy;
use qsfs_zstor::record::EncodingRecord;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Piece bytes of one transfer in memory at once.
pub const ROW_BYTES_MAX: usize = 24 << 20;
/// Times shards of one attempt are placed anew.
pub const PLACEMENTS_MAX: usize = 4;
/// Tries of one piece on one backend.
const PIECE_TRIES: usize = 2;

/// Why a transfer failed; it is tried again later.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// Encoding.
    #[error("encode: {0}")]
    Encode(#[from] EncodeError),
    /// Geometry.
    #[error("lay out the stripe: {0}")]
    Stripe(#[from] StripeError),
    /// No place.
    #[error("no placement: {0}")]
    Placement(String),
    /// metad.
    #[error(transparent)]
    Metad(#[from] MetadError),
    /// Backends failed faster than others could be chosen.
    #[error("store shards: {0}")]
    Backends(String),
    /// The spool cannot be read back.
    #[error("read the spool: {0}")]
    Spool(#[source] std::io::Error),
    /// A worker thread panicked.
    #[error("encoding thread failed: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

/// A stripe whose shards are all durable.
#[derive(Debug, Clone)]
pub struct StoredStripe {
    /// To commit.
    pub record: EncodingRecord,
    /// False: below policy.
    pub full_policy: bool,
    /// What is missing when below policy.
    pub missing: String,
}

/// What all transfers share.
#[derive(Clone)]
pub struct TransferContext {
    /// Where datafiles are.
    pub store: Arc<LocalStore>,
    /// metad.
    pub cluster: Arc<dyn Cluster>,
    /// Backends.
    pub backends: Arc<Backends>,
    /// Volume.
    pub volume: VolumeId,
    /// Its policy.
    pub policy: Policy,
    /// Its key.
    pub key: VolumeKey,
    /// Epoch held.
    pub epoch: Epoch,
    /// Plaintext bytes whose shards became durable since the mount; for progress.
    pub stored_bytes: Arc<AtomicU64>,
}

/// Runs one attempt, from the file to durable shards. `encoded` is called when the object is made.
pub async fn transfer(
    context: &TransferContext,
    file: &Arc<LocalFile>,
    encoded: impl FnOnce() + Send,
) -> Result<StoredStripe, TransferError> {
    let ids = ObjectIds {
        volume: context.volume,
        stream: file.name.stream,
        datafile: file.name.id,
        epoch: context.epoch,
        salt: Salt::random(&mut rand::rng()),
    };
    let (header, spool) = {
        let (context, file) = (context.clone(), Arc::clone(file));
        let encode = move || encode_object(&context.store, &file, &context.key, &ids);
        tokio::task::spawn_blocking(encode).await??
    };
    encoded();
    let stripe = Stripe::of_object(&header, context.policy.geometry, PIECE_BYTES)?;
    drop(header);
    let upload = Upload {
        context,
        stripe,
        encoder: Arc::new(StripeEncoder::new(stripe)),
        spool: Arc::new(spool),
        hashes: Mutex::new(ShardHashes::new(&stripe)),
    };
    upload.run().await
}

struct Upload<'a> {
    context: &'a TransferContext,
    stripe: Stripe,
    encoder: Arc<StripeEncoder>,
    spool: Arc<Spool>,
    hashes: Mutex<ShardHashes>,
}

impl Upload<'_> {
    async fn run(&self) -> Result<StoredStripe, TransferError> {
        let total = self.stripe.layout().geometry().total();
        let mut kept: Vec<Option<BackendId>> = vec![None; total];
        let mut unfit = BTreeSet::new();
        let mut last_error = String::new();
        for _ in 0..PLACEMENTS_MAX {
            let placement = match self.place(&kept, &unfit).await {
                Ok(placement) => placement,
                Err(TransferError::Placement(missing)) if !last_error.is_empty() => {
                    return Err(TransferError::Backends(format!("{last_error}; {missing}")));
                }
                Err(error) => return Err(error),
            };
            let wanted: Vec<Option<BackendId>> = placement
                .backends
                .iter()
                .zip(&kept)
                .map(|(backend, kept)| if kept.is_some() { None } else { Some(*backend) })
                .collect();
            let failed = self.store_shards(&wanted).await?;
            if failed.is_empty() {
                return self.finish(&placement);
            }
            for (shard, backend) in placement.backends.iter().enumerate() {
                if let Some(error) = failed.get(&shard) {
                    unfit.insert(*backend);
                    last_error = error.to_string();
                    tracing::warn!(
                        datafile = %self.stripe.ids().datafile, shard, backend = %backend, %error,
                        "a shard could not be stored: another place is chosen"
                    );
                } else {
                    kept[shard] = Some(*backend);
                }
            }
        }
        Err(TransferError::Backends(last_error))
    }

    fn finish(&self, placement: &Placement) -> Result<StoredStripe, TransferError> {
        let hashes = self.hashes.lock().all();
        let hashes = hashes.expect("every row was encoded at least once");
        let record = self.stripe.record(&hashes, &placement.backends)?;
        let (full_policy, missing) = (placement.full_policy, placement.missing.clone());
        Ok(StoredStripe {
            record,
            full_policy,
            missing,
        })
    }

    /// metad's choice, unless this client knows better about one of those backends.
    async fn place(
        &self,
        kept: &[Option<BackendId>],
        unfit: &BTreeSet<BackendId>,
    ) -> Result<Placement, TransferError> {
        let context = self.context;
        let shard_bytes = self.stripe.layout().stored_shard_bytes();
        let mut without = context.backends.unfit();
        if kept.iter().all(Option::is_none) {
            let answer = context
                .cluster
                .placement(context.volume, shard_bytes)
                .await?;
            if !answer
                .backends
                .iter()
                .any(|backend| without.contains(backend) || unfit.contains(backend))
            {
                let (backends, full_policy, missing) =
                    (answer.backends, answer.full_policy, answer.missing);
                return Ok(Placement {
                    backends,
                    full_policy,
                    missing,
                });
            }
        }
        context.backends.refresh(Duration::from_secs(1)).await?;
        without.extend(unfit);
        let choose_without = |without: &BTreeSet<BackendId>| {
            let candidates = context.backends.candidates(without);
            choose(
                &context.policy,
                context.policy.geometry,
                shard_bytes,
                &candidates,
                kept,
            )
        };
        choose_without(&without)
            // What failed once may be better than nothing; what failed in this attempt is not.
            .or_else(|_| choose_without(unfit))
            .map_err(|unplaceable| TransferError::Placement(unplaceable.missing))
    }

    /// Stores all pieces of the wanted shards; answers which shards failed.
    async fn store_shards(
        &self,
        wanted: &[Option<BackendId>],
    ) -> Result<BTreeMap<usize, ClientError>, TransferError> {
        let geometry = self.stripe.layout().geometry();
        let rows_at_once = (ROW_BYTES_MAX / (geometry.total() * PIECE_BYTES as usize)).clamp(1, 16);
        let failed: Mutex<BTreeMap<usize, ClientError>> = Mutex::default();
        let first = wanted.iter().all(Option::is_some);
        let row_plain = self.stripe.plain_bytes() / u64::from(self.encoder.rows()).max(1);
        let mut rows = stream::iter(0..self.encoder.rows())
            .map(|row| {
                let failed = &failed;
                async move {
                    let pieces = self.encode_row(row).await?;
                    if first {
                        let mut hashes = self.hashes.lock();
                        pieces.iter().for_each(|piece| hashes.add(&piece.header));
                    }
                    self.store_row(pieces, wanted, failed).await;
                    if first {
                        self.context
                            .stored_bytes
                            .fetch_add(row_plain, Ordering::Relaxed);
                    }
                    Ok::<(), TransferError>(())
                }
            })
            .buffer_unordered(rows_at_once);
        while let Some(row) = rows.next().await {
            row?;
        }
        drop(rows);
        Ok(failed.into_inner())
    }

    async fn encode_row(&self, row: u32) -> Result<Vec<EncodedPiece>, TransferError> {
        let (encoder, spool) = (Arc::clone(&self.encoder), Arc::clone(&self.spool));
        let encode = move || encoder.encode_row(row, |offset, buf| spool.read_at(offset, buf));
        tokio::task::spawn_blocking(encode)
            .await?
            .map_err(TransferError::Spool)
    }

    async fn store_row(
        &self,
        pieces: Vec<EncodedPiece>,
        wanted: &[Option<BackendId>],
        failed: &Mutex<BTreeMap<usize, ClientError>>,
    ) {
        let stores =
            pieces
                .into_iter()
                .zip(wanted)
                .enumerate()
                .filter_map(|(shard, (piece, backend))| {
                    let backend = (*backend)?;
                    (!failed.lock().contains_key(&shard)).then_some((shard, piece, backend))
                });
        let stores = stores.map(|(shard, piece, backend)| async move {
            if let Err(error) = self.store_piece(&piece, backend).await {
                failed.lock().entry(shard).or_insert(error);
            }
        });
        futures::future::join_all(stores).await;
    }

    async fn store_piece(
        &self,
        piece: &EncodedPiece,
        backend: BackendId,
    ) -> Result<(), ClientError> {
        let backends = &self.context.backends;
        let unknown = || ClientError::Unreachable {
            endpoint: format!("backend {backend}"),
            reason: "metad does not list it".to_owned(),
        };
        let client = backends.client(backend).await.ok_or_else(unknown)?;
        let key = piece.header.key().to_bytes();
        for again in 0..PIECE_TRIES {
            match client.set(&key, piece.value.clone()).await {
                Ok(()) => {
                    backends.note_ok(backend);
                    backends.note_stored(backend, piece.value.len() as u64);
                    return Ok(());
                }
                // The same key and value: storing it twice is harmless.
                Err(ClientError::Unreachable { .. } | ClientError::Timeout { .. })
                    if again + 1 < PIECE_TRIES => {}
                Err(error) => {
                    match &error {
                        ClientError::Full { .. } | ClientError::ReadOnly { .. } => {
                            backends.note_full(backend)
                        }
                        _ => backends.note_failed(backend),
                    }
                    return Err(error);
                }
            }
        }
        unreachable!("the last try returns")
    }
}
