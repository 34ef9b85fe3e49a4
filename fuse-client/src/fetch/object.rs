//! What is known of one stored object: its record and, once read, its header.

use qsfs_zstor::codec::{ChunkError, ChunkOpener, ObjectError, ObjectHeader, Stripe, StripeError};
use qsfs_zstor::key::VolumeKey;
use qsfs_zstor::record::EncodingRecord;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

struct Opened {
    header: ObjectHeader,
    opener: ChunkOpener,
    /// One past the chunk that was read last; tells who reads forward.
    next: AtomicU32,
}

/// See the module.
#[derive(Clone)]
pub struct Object {
    record: Arc<EncodingRecord>,
    stripe: Stripe,
    opened: Option<Arc<Opened>>,
}

impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Object")
            .field("datafile", &self.record.datafile)
            .finish_non_exhaustive()
    }
}

impl Object {
    /// From a record, which is checked; the header is not read yet.
    pub(super) fn bare(record: EncodingRecord) -> Result<Self, StripeError> {
        Ok(Self {
            stripe: Stripe::of(&record)?,
            record: Arc::new(record),
            opened: None,
        })
    }

    /// With the header in these bytes.
    pub(super) fn open_header(&self, key: &VolumeKey, bytes: &[u8]) -> Result<Self, ObjectError> {
        let (ids, stripe) = (self.stripe.ids(), &self.stripe);
        let header =
            ObjectHeader::decode(key, ids, stripe.chunk_bytes(), stripe.plain_bytes(), bytes)?;
        let opened = Opened {
            header,
            opener: ChunkOpener::new(key, ids),
            next: AtomicU32::new(0),
        };
        Ok(Self {
            opened: Some(Arc::new(opened)),
            ..self.clone()
        })
    }

    /// The same object after its record changed. Another encoding attempt is another object.
    pub(super) fn moved(&self, record: EncodingRecord) -> Result<Self, StripeError> {
        let stripe = Stripe::of(&record)?;
        let opened = self.opened.clone().filter(|_| stripe == self.stripe);
        Ok(Self {
            record: Arc::new(record),
            stripe,
            opened,
        })
    }

    /// Its record.
    pub fn record(&self) -> &EncodingRecord {
        &self.record
    }

    /// Its stripe.
    pub const fn stripe(&self) -> &Stripe {
        &self.stripe
    }

    /// Was the header read?
    pub const fn has_header(&self) -> bool {
        self.opened.is_some()
    }

    fn opened(&self) -> &Opened {
        self.opened
            .as_ref()
            .expect("objects are handed out with their header")
    }

    /// Its header.
    pub fn header(&self) -> &ObjectHeader {
        &self.opened().header
    }

    /// Decrypts and decompresses a chunk.
    pub(super) fn open_chunk(&self, chunk: u32, cipher: Vec<u8>) -> Result<Vec<u8>, ChunkError> {
        let Opened { header, opener, .. } = self.opened();
        opener.open(
            chunk,
            header.entry(chunk),
            header.plain_bytes_of(chunk),
            cipher,
        )
    }

    /// Notes a read; true when it goes on where the last one ended (or begins at the beginning).
    pub(super) fn goes_forward(&self, reading: &Range<u32>) -> bool {
        let last = self.opened().next.swap(reading.end, Ordering::Relaxed);
        reading.start <= last && last <= reading.end
    }
}
