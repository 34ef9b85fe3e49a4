//! Fetch: bytes of a committed datafile from its shards, piece by piece.
//!
//! ```text
//! bytes -> chunks -> [chunk cache] -> object range -> read plan -> pieces -> [piece cache] -> backends
//!                        ^ decrypt, decompress            ^ a piece that is dead, slow, missing or corrupt:
//!                                                           k others of its row, and the shard is reported
//! ```
//!
//! Invariants: nothing is returned that did not authenticate; everything has a deadline; concurrent requests for the same
//! piece or chunk share one fetch; memory is bounded by the two caches and the reads in flight.

pub mod byte_cache;
pub mod flights;
mod object;
mod report;

use crate::backends::Backends;
use crate::cluster::Cluster;
use crate::ports::StoreError;
use byte_cache::ByteCache;
use bytes::Bytes;
use flights::Flights;
use futures::stream::{FuturesUnordered, StreamExt};
pub use object::Object;
use parking_lot::Mutex;
use qsfs_proto::api::MetadError;
use qsfs_zdb::client::ClientError;
use qsfs_zstor::codec::{ChunkError, ObjectError, PieceRef, ReadPlan, StripeError, TooFewShards};
use qsfs_zstor::id::{DatafileId, VolumeId};
use qsfs_zstor::key::VolumeKey;
use qsfs_zstor::piece::verify_piece;
use qsfs_zstor::record::{EncodingRecord, ShardState};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Plaintext chunks kept in memory.
pub const CHUNK_CACHE_BYTES: usize = 96 << 20;
/// Pieces kept in memory: neighbouring chunks share them.
pub const PIECE_CACHE_BYTES: usize = 24 << 20;
/// Headers kept in memory.
pub const OBJECTS_MAX: usize = 512;
/// A read ends after this, with bytes or with an error.
pub const FETCH_DEADLINE: Duration = Duration::from_secs(30);
/// Repeated tries when too few shards answer end after this.
pub const TRY_AGAIN_FOR: Duration = Duration::from_secs(8);
/// A piece that takes longer is reconstructed from others.
pub const HEDGE_AFTER: Duration = Duration::from_millis(1_500);
/// A piece that takes longer has failed, even if there are no others.
pub const PIECE_DEADLINE: Duration = Duration::from_secs(10);
/// Chunks fetched ahead of a sequential reader.
pub const READ_AHEAD_CHUNKS: u32 = 6;
/// Chunks fetched ahead at once, by all readers.
pub const READ_AHEAD_MAX: usize = 12;

/// Why bytes cannot be had now.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// metad has no record of the datafile.
    #[error("metad has no record of datafile {0}")]
    NoRecord(DatafileId),
    /// metad cannot be asked.
    #[error("ask metad for the record: {0}")]
    Metad(#[from] MetadError),
    /// Too few shards.
    #[error("{0}; {1}")]
    TooFewShards(TooFewShards, String),
    /// The record makes no sense.
    #[error("record: {0}")]
    Stripe(#[from] StripeError),
    /// The header does not authenticate.
    #[error("object header: {0}")]
    Header(#[from] ObjectError),
    /// A chunk does not authenticate.
    #[error("chunk: {0}")]
    Chunk(#[from] ChunkError),
    /// It took too long.
    #[error("no answer within {} s", FETCH_DEADLINE.as_secs())]
    Deadline,
    /// Bytes past the end are wanted.
    #[error("bytes past the end of the datafile ({0} bytes) are wanted")]
    PastEnd(u64),
    /// The task was lost.
    #[error("the fetching task ended early")]
    Lost,
}

/// Counters for people.
#[derive(Debug, Default)]
pub struct FetchCounters {
    /// Pieces read from backends.
    pub pieces: AtomicU64,
    /// Ranges that needed reconstruction.
    pub reconstructed: AtomicU64,
    /// Shards reported as corrupt or missing.
    pub reported: AtomicU64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct PieceId {
    datafile: DatafileId,
    salt: qsfs_zstor::id::Salt,
    piece: PieceRef,
}

#[derive(Debug, Clone)]
enum PieceFailure {
    Missing,
    Corrupt(String),
    Unreachable(String),
}

type PieceResult = Result<Bytes, PieceFailure>;
type ChunkResult = Result<Bytes, FetchError>;
type ObjectResult = Result<Arc<Object>, FetchError>;

#[derive(Debug, Default)]
struct Objects {
    tick: u64,
    known: HashMap<DatafileId, (u64, Arc<Object>)>,
}

/// See the module.
pub struct Fetcher {
    cluster: Arc<dyn Cluster>,
    backends: Arc<Backends>,
    volume: VolumeId,
    key: VolumeKey,
    objects: Mutex<Objects>,
    object_flights: Flights<DatafileId, ObjectResult>,
    chunks: Mutex<ByteCache<(DatafileId, u32)>>,
    chunk_flights: Flights<(DatafileId, u32), ChunkResult>,
    pieces: Mutex<ByteCache<PieceId>>,
    piece_flights: Flights<PieceId, PieceResult>,
    ahead: Arc<tokio::sync::Semaphore>,
    reporter: report::Reporter,
    counters: FetchCounters,
}

impl std::fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fetcher")
            .field("volume", &self.volume)
            .finish_non_exhaustive()
    }
}

impl Fetcher {
    /// Must be called within a runtime: shards are reported by a task.
    pub fn new(
        cluster: Arc<dyn Cluster>,
        backends: Arc<Backends>,
        volume: VolumeId,
        key: VolumeKey,
    ) -> Arc<Self> {
        Arc::new(Self {
            reporter: report::Reporter::start(Arc::clone(&cluster)),
            cluster,
            backends,
            volume,
            key,
            objects: Mutex::default(),
            object_flights: Flights::default(),
            chunks: Mutex::new(ByteCache::new(CHUNK_CACHE_BYTES)),
            chunk_flights: Flights::default(),
            pieces: Mutex::new(ByteCache::new(PIECE_CACHE_BYTES)),
            piece_flights: Flights::default(),
            ahead: Arc::new(tokio::sync::Semaphore::new(READ_AHEAD_MAX)),
            counters: FetchCounters::default(),
        })
    }

    /// Counters.
    pub const fn counters(&self) -> &FetchCounters {
        &self.counters
    }

    /// Forgets everything in memory.
    pub fn clear(&self) {
        self.chunks.lock().clear();
        self.pieces.lock().clear();
    }

    /// Bytes kept in memory.
    pub fn cached_bytes(&self) -> usize {
        self.chunks.lock().bytes() + self.pieces.lock().bytes()
    }

    /// Bytes of a committed datafile.
    pub async fn read(
        self: &Arc<Self>,
        id: DatafileId,
        offset: u64,
        bytes: u32,
    ) -> Result<Bytes, StoreError> {
        let read = tokio::time::timeout(FETCH_DEADLINE, self.read_chunks(id, offset, bytes));
        let outcome = read.await.unwrap_or(Err(FetchError::Deadline));
        outcome.map_err(|error| StoreError::Unavailable {
            datafile: id,
            reason: error.to_string(),
        })
    }

    async fn read_chunks(
        self: &Arc<Self>,
        id: DatafileId,
        offset: u64,
        bytes: u32,
    ) -> Result<Bytes, FetchError> {
        let object = self.object(id).await?;
        let plain_bytes = object.header().plain_bytes();
        let end = offset.saturating_add(u64::from(bytes));
        if end > plain_bytes {
            return Err(FetchError::PastEnd(plain_bytes));
        }
        let covering = object.header().chunks_covering(offset..end);
        self.read_ahead(id, &object, covering.clone());
        let chunks =
            futures::future::join_all(covering.clone().map(|chunk| self.chunk(id, chunk))).await;
        let chunk_bytes = u64::from(object.header().chunk_bytes());
        let first = u64::from(covering.start) * chunk_bytes;
        let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        if let [only] = &chunks[..] {
            return Ok(only
                .clone()?
                .slice(index(offset - first)..index(end - first)));
        }
        let mut out = Vec::with_capacity(bytes as usize);
        for (chunk, start) in chunks
            .into_iter()
            .zip((first..).step_by(index(chunk_bytes)))
        {
            let chunk = chunk?;
            let from = index(offset.saturating_sub(start)).min(chunk.len());
            let to = index(end - start).min(chunk.len());
            out.extend_from_slice(&chunk[from..to]);
        }
        Ok(Bytes::from(out))
    }

    /// Fetches what lies ahead when the reader goes forward.
    fn read_ahead(self: &Arc<Self>, id: DatafileId, object: &Object, reading: Range<u32>) {
        if !object.goes_forward(&reading) {
            return;
        }
        let last = object.header().chunks();
        for chunk in (reading.end..last).take(READ_AHEAD_CHUNKS as usize) {
            self.fetch_ahead(id, chunk);
        }
    }

    fn fetch_ahead(self: &Arc<Self>, id: DatafileId, chunk: u32) {
        if self.chunks.lock().contains(&(id, chunk)) {
            return;
        }
        let Ok(permit) = Arc::clone(&self.ahead).try_acquire_owned() else {
            return;
        };
        let fetch = self.chunk(id, chunk);
        tokio::spawn(async move {
            // Whoever really wants it hears of a failure.
            let _ = fetch.await;
            drop(permit);
        });
    }

    /// A hint that these bytes are about to be read; must be called within a runtime.
    pub fn prefetch(self: &Arc<Self>, id: DatafileId, offset: u64, bytes: u32) {
        let fetcher = Arc::clone(self);
        if self.ahead.available_permits() == 0 {
            return;
        }
        tokio::spawn(async move {
            let Ok(object) = fetcher.object(id).await else {
                return;
            };
            for chunk in object
                .header()
                .chunks_covering(offset..offset.saturating_add(u64::from(bytes)))
            {
                fetcher.fetch_ahead(id, chunk);
            }
        });
    }

    /// One chunk of plaintext.
    fn chunk(
        self: &Arc<Self>,
        id: DatafileId,
        chunk: u32,
    ) -> impl Future<Output = ChunkResult> + Send + use<> {
        let this = Arc::clone(self);
        async move {
            if let Some(cached) = this.chunks.lock().get(&(id, chunk)) {
                return Ok(cached);
            }
            let fetcher = Arc::clone(&this);
            let start = move || async move {
                let plain = fetcher.fetch_chunk(id, chunk).await?;
                fetcher.chunks.lock().put((id, chunk), plain.clone());
                Ok(plain)
            };
            let flight = this
                .chunk_flights
                .join(&(id, chunk), Err(FetchError::Lost), start);
            flight.await
        }
    }

    async fn fetch_chunk(self: &Arc<Self>, id: DatafileId, chunk: u32) -> ChunkResult {
        let object = self.object(id).await?;
        let range = object.header().object_range(chunk..chunk + 1);
        let (object, cipher) = self.read_object(object, range.clone()).await?;
        match open_chunk(&object, chunk, cipher).await {
            Err(FetchError::Chunk(error)) => {
                // Every piece verified by its own hash, and still: someone who has no key made one. Others may be right.
                tracing::error!(datafile = %id, chunk, %error, "a chunk does not authenticate: it is read from other shards");
                let cipher = self.read_around(&object, range).await?;
                open_chunk(&object, chunk, cipher).await
            }
            opened => opened,
        }
    }

    /// The header (and record) of a datafile.
    pub async fn object(self: &Arc<Self>, id: DatafileId) -> ObjectResult {
        {
            let mut objects = self.objects.lock();
            objects.tick += 1;
            let tick = objects.tick;
            if let Some((used, object)) = objects.known.get_mut(&id) {
                *used = tick;
                return Ok(Arc::clone(object));
            }
        }
        let fetcher = Arc::clone(self);
        let start = move || async move { fetcher.load_object(id).await };
        let flight = self.object_flights.join(&id, Err(FetchError::Lost), start);
        flight.await
    }

    async fn load_object(self: &Arc<Self>, id: DatafileId) -> ObjectResult {
        let record = self.record(id).await?;
        self.load_object_of(record).await
    }

    /// Reads and keeps the header of the object a record names.
    pub async fn load_object_of(self: &Arc<Self>, record: EncodingRecord) -> ObjectResult {
        let id = record.datafile;
        let bare = Object::bare(record)?;
        let header_bytes = bare.stripe().object_header_bytes() as u64;
        let (bare, bytes) = self.read_object(Arc::new(bare), 0..header_bytes).await?;
        let opened = match bare.open_header(&self.key, &bytes) {
            Ok(opened) => opened,
            Err(first) => {
                // Another key, or someone without a key made a piece: others may be right.
                let around = self.read_around(&bare, 0..header_bytes).await;
                let second = around.map(|bytes| bare.open_header(&self.key, &bytes));
                second.ok().and_then(Result::ok).ok_or(first)?
            }
        };
        let object = Arc::new(opened);
        self.keep(id, &object);
        Ok(object)
    }

    fn keep(&self, id: DatafileId, object: &Arc<Object>) {
        let mut objects = self.objects.lock();
        objects.tick += 1;
        let tick = objects.tick;
        objects.known.insert(id, (tick, Arc::clone(object)));
        if objects.known.len() > OBJECTS_MAX {
            let oldest = objects
                .known
                .iter()
                .min_by_key(|(_, (used, _))| *used)
                .map(|(id, _)| *id);
            oldest.and_then(|id| objects.known.remove(&id));
        }
    }

    async fn record(&self, id: DatafileId) -> Result<EncodingRecord, FetchError> {
        let records = self.cluster.records(self.volume, &[id]).await?;
        records
            .into_iter()
            .find(|record| record.datafile == id)
            .ok_or(FetchError::NoRecord(id))
    }

    /// A range of the object; tries again, with a fresh record, while too few shards answer.
    async fn read_object(
        self: &Arc<Self>,
        mut object: Arc<Object>,
        range: Range<u64>,
    ) -> Result<(Arc<Object>, Vec<u8>), FetchError> {
        let deadline = Instant::now() + TRY_AGAIN_FOR;
        let mut wait = Duration::from_millis(200);
        let mut hasty = true;
        loop {
            let error = match self.try_range(&object, range.clone(), hasty, &[]).await {
                Ok(bytes) => return Ok((object, bytes)),
                Err(error) => error,
            };
            if !hasty {
                if Instant::now() + wait > deadline {
                    return Err(error);
                }
                tokio::time::sleep(wait).await;
                wait *= 2;
            }
            hasty = false;
            // Shards may have moved, backends may have come back.
            let _ = self.backends.refresh(Duration::from_millis(500)).await;
            match self.record(object.record().datafile).await {
                Ok(record) if record.version != object.record().version => {
                    object = Arc::new(object.moved(record)?);
                    if object.has_header() {
                        self.keep(object.record().datafile, &object);
                    }
                    hasty = true;
                }
                Err(FetchError::NoRecord(id)) => return Err(FetchError::NoRecord(id)),
                _ => {}
            }
        }
    }

    /// The range without the shards that hold it directly.
    async fn read_around(
        self: &Arc<Self>,
        object: &Arc<Object>,
        range: Range<u64>,
    ) -> Result<Vec<u8>, FetchError> {
        let direct = object.stripe().layout().locate(range.clone());
        let shards: Vec<usize> = direct.iter().map(|slice| slice.shard).collect();
        self.try_range(object, range, false, &shards).await
    }

    async fn try_range(
        self: &Arc<Self>,
        object: &Arc<Object>,
        range: Range<u64>,
        hasty: bool,
        without: &[usize],
    ) -> Result<Vec<u8>, FetchError> {
        let mut plan = ReadPlan::new(object.stripe().layout(), range);
        let backend = |shard: usize| object.record().shards[shard].backend;
        plan.prefer(|shard| self.backends.cost(backend(shard)));
        for shard in 0..object.record().shards.len() {
            let known_bad = object.record().shards[shard].state != ShardState::Stored;
            if without.contains(&shard)
                || hasty && (known_bad || self.backends.avoided(backend(shard)))
            {
                plan.fail_shard(shard);
            }
        }
        let mut failures = Vec::new();
        loop {
            let needed = plan
                .needed()
                .map_err(|few| FetchError::TooFewShards(few, failures.join("; ")))?;
            if needed.is_empty() {
                break;
            }
            let mut asked: FuturesUnordered<_> = needed
                .into_iter()
                .map(|piece| {
                    let fetch = self.piece(object, piece);
                    let patience = if hasty { HEDGE_AFTER } else { PIECE_DEADLINE };
                    async move { (piece, tokio::time::timeout(patience, fetch).await) }
                })
                .collect();
            while let Some((piece, outcome)) = asked.next().await {
                match outcome {
                    Ok(Ok(payload)) => plan.supply(piece, payload),
                    Ok(Err(failure)) => {
                        failures.push(self.note_failure(object, piece, &failure));
                        match failure {
                            PieceFailure::Unreachable(_) => plan.fail_shard(piece.shard),
                            PieceFailure::Missing | PieceFailure::Corrupt(_) => plan.fail(piece),
                        }
                    }
                    Err(_) => {
                        failures.push(format!("shard {} is slow", piece.shard));
                        plan.fail(piece);
                        if !hasty {
                            self.backends.note_failed(backend(piece.shard));
                        }
                    }
                }
            }
        }
        if !failures.is_empty() {
            self.counters.reconstructed.fetch_add(1, Ordering::Relaxed);
        }
        tokio::task::spawn_blocking(move || plan.assemble())
            .await
            .map_err(|_| FetchError::Lost)
    }

    /// Reports what is provably bad; says what happened.
    fn note_failure(&self, object: &Object, piece: PieceRef, failure: &PieceFailure) -> String {
        let shard = &object.record().shards[piece.shard];
        let (state, text) = match failure {
            PieceFailure::Unreachable(why) => {
                return format!("shard {} on backend {}: {why}", piece.shard, shard.backend);
            }
            PieceFailure::Missing => (ShardState::Missing, "is missing".to_owned()),
            PieceFailure::Corrupt(why) => (ShardState::Corrupt, format!("is corrupt: {why}")),
        };
        self.counters.reported.fetch_add(1, Ordering::Relaxed);
        self.reporter.report(object.record(), piece.shard, state);
        format!("shard {} on backend {} {text}", piece.shard, shard.backend)
    }

    fn piece(
        self: &Arc<Self>,
        object: &Arc<Object>,
        piece: PieceRef,
    ) -> impl Future<Output = PieceResult> + Send + use<> {
        let (this, object) = (Arc::clone(self), Arc::clone(object));
        async move {
            let id = PieceId {
                datafile: object.record().datafile,
                salt: object.record().salt,
                piece,
            };
            if let Some(cached) = this.pieces.lock().get(&id) {
                return Ok(cached);
            }
            let fetcher = Arc::clone(&this);
            let lost = Err(PieceFailure::Unreachable(
                "the fetching task ended early".to_owned(),
            ));
            let start = move || async move {
                let payload = fetcher.fetch_piece(&object, piece).await?;
                fetcher.pieces.lock().put(id, payload.clone());
                Ok(payload)
            };
            let flight = this.piece_flights.join(&id, lost, start);
            flight.await
        }
    }

    async fn fetch_piece(&self, object: &Object, piece: PieceRef) -> PieceResult {
        let backend = object.record().shards[piece.shard].backend;
        let unreachable = |why: String| Err(PieceFailure::Unreachable(why));
        let Some(client) = self.backends.client(backend).await else {
            return unreachable("metad does not list this backend".to_owned());
        };
        let shard = u32::try_from(piece.shard).unwrap_or(u32::MAX);
        let key = object.stripe().piece_key(shard, piece.piece).to_bytes();
        self.counters.pieces.fetch_add(1, Ordering::Relaxed);
        let value = match client.get(&key).await {
            Ok(Some(value)) => value,
            Ok(None) => {
                self.backends.note_ok(backend);
                return Err(PieceFailure::Missing);
            }
            Err(ClientError::Corrupt { text, .. }) => return Err(PieceFailure::Corrupt(text)),
            Err(error) => {
                self.backends.note_failed(backend);
                return unreachable(error.to_string());
            }
        };
        self.backends.note_ok(backend);
        let (header, payload) =
            verify_piece(&value).map_err(|error| PieceFailure::Corrupt(error.to_string()))?;
        let expected = header.expect(object.stripe(), shard, piece.piece);
        expected.map_err(|error| PieceFailure::Corrupt(error.to_string()))?;
        let from = value.len() - payload.len();
        Ok(value.slice(from..))
    }
}

async fn open_chunk(object: &Arc<Object>, chunk: u32, cipher: Vec<u8>) -> ChunkResult {
    let object = Arc::clone(object);
    let open = move || object.open_chunk(chunk, cipher);
    let opened = tokio::task::spawn_blocking(open)
        .await
        .map_err(|_| FetchError::Lost)?;
    Ok(Bytes::from(opened?))
}
