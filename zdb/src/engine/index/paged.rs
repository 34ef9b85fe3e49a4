//! The entries of a namespace in sequential mode: 32-byte records in a file, at their id, with a bounded cache of its pages.
//!
//! ```text
//! page = | crc u32 | page number u32 | zeros 24 | 127 records of 32 bytes |      4096 bytes
//! ```
//!
//! The file is working memory, not a store: it is made anew at every open (from the datafiles and what is known of them), never
//! synced, and its name is removed as soon as it is open. A page that does not verify when it comes back is an error, never an
//! answer; opening or reloading the namespace makes the file anew. Memory beyond the cache: two bytes per page of 127 ids.

use super::record::{Entry, RECORD_BYTES};
use crate::engine::EngineError;
use crate::media::{Media, MediaFile, OpenMode};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(in crate::engine) const PAGED_FILE: &str = "index.pages";
const PAGE: usize = 4096;
const HEADER: usize = 32;
const PER_PAGE: u64 = 127;
/// Pages kept in memory at most: 16 MiB.
const CACHE_PAGES_MAX: usize = 4096;

struct Page {
    number: u32,
    dirty: bool,
    /// Used since the hand of the clock came by.
    used: bool,
    bytes: Box<[u8; PAGE]>,
}

impl Page {
    fn checksum(&self) -> u32 {
        crc32fast::hash(&self.bytes[4..])
    }

    fn record(&self, at: usize) -> &[u8] {
        &self.bytes[at..at + RECORD_BYTES]
    }
}

#[derive(Default, Clone, Copy)]
struct Counts {
    /// Records that are not empty; a page without any is neither read nor kept.
    present: u8,
    live: u8,
}

struct Cache {
    pages: Vec<Page>,
    by_number: HashMap<u32, usize>,
    hand: usize,
    counts: Vec<Counts>,
}

pub(super) struct PagedTable {
    path: PathBuf,
    file: Box<dyn MediaFile>,
    cache: Mutex<Cache>,
    pages_max: usize,
}

impl std::fmt::Debug for PagedTable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("PagedTable")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// The id that a key is, if it is one.
pub(super) fn id_of(key: &[u8]) -> Option<u64> {
    let id = u64::from_le_bytes(key.try_into().ok()?);
    u32::try_from(id / PER_PAGE).ok().map(|_| id)
}

fn place_of(id: u64) -> (u32, usize) {
    let page = u32::try_from(id / PER_PAGE).expect("only ids for which there are pages come here");
    let slot = usize::try_from(id % PER_PAGE).unwrap_or(0);
    (page, HEADER + slot * RECORD_BYTES)
}

impl PagedTable {
    /// An empty table, its file in this directory.
    pub(super) fn create(media: &Arc<dyn Media>, dir: &Path) -> Result<Self, EngineError> {
        Self::with_cache(media, dir, CACHE_PAGES_MAX)
    }

    pub(super) fn with_cache(
        media: &Arc<dyn Media>,
        dir: &Path,
        pages_max: usize,
    ) -> Result<Self, EngineError> {
        let path = dir.join(PAGED_FILE);
        if media.exists(&path) {
            media
                .remove(&path)
                .map_err(EngineError::io("remove", &path))?;
        }
        let file = media
            .open(&path, OpenMode::CreateNew)
            .map_err(EngineError::io("create", &path))?;
        media
            .remove(&path)
            .map_err(EngineError::io("remove the name of", &path))?;
        Ok(Self {
            path,
            file,
            cache: Mutex::new(Cache {
                pages: Vec::new(),
                by_number: HashMap::new(),
                hand: 0,
                counts: Vec::new(),
            }),
            pages_max,
        })
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Entry>, EngineError> {
        let Some(id) = id_of(key) else {
            return Ok(None);
        };
        let (number, at) = place_of(id);
        let mut cache = self.cache.lock();
        if cache.counts(number).present == 0 {
            return Ok(None);
        }
        let frame = self.frame(&mut cache, number)?;
        Ok(Entry::decode(cache.pages[frame].record(at)))
    }

    pub(super) fn put(&mut self, key: &[u8], entry: &Entry) -> Result<(), EngineError> {
        self.write(key, Some(entry))
    }

    pub(super) fn remove(&mut self, key: &[u8]) -> Result<(), EngineError> {
        self.write(key, None)
    }

    fn write(&mut self, key: &[u8], entry: Option<&Entry>) -> Result<(), EngineError> {
        let id = id_of(key).expect("callers put only ids");
        let (number, at) = place_of(id);
        let mut cache = self.cache.lock();
        if entry.is_none() && cache.counts(number).present == 0 {
            return Ok(());
        }
        let frame = self.frame(&mut cache, number)?;
        let page = &mut cache.pages[frame];
        let old = Entry::decode(page.record(at));
        let bytes = entry.map_or([0; RECORD_BYTES], Entry::encode);
        page.bytes[at..at + RECORD_BYTES].copy_from_slice(&bytes);
        page.dirty = true;
        let wanted = number as usize + 1;
        if cache.counts.len() < wanted {
            cache.counts.resize(wanted, Counts::default());
        }
        let counts = &mut cache.counts[number as usize];
        let lives = |entry: Option<&Entry>| u8::from(entry.is_some_and(|entry| !entry.deleted));
        counts.present = counts.present + u8::from(entry.is_some()) - u8::from(old.is_some());
        counts.live = counts.live + lives(entry) - lives(old.as_ref());
        Ok(())
    }

    /// The page in memory; brought there if it is not.
    fn frame(&self, cache: &mut Cache, number: u32) -> Result<usize, EngineError> {
        if let Some(&frame) = cache.by_number.get(&number) {
            cache.pages[frame].used = true;
            return Ok(frame);
        }
        let mut page = Page {
            number,
            dirty: false,
            used: true,
            bytes: Box::new([0; PAGE]),
        };
        if cache.counts(number).present > 0 {
            self.read(&mut page)?;
        }
        let frame = self.make_room(cache)?;
        if frame == cache.pages.len() {
            cache.pages.push(page);
        } else {
            cache.pages[frame] = page;
        }
        cache.by_number.insert(number, frame);
        Ok(frame)
    }

    fn read(&self, page: &mut Page) -> Result<(), EngineError> {
        let offset = u64::from(page.number) * PAGE as u64;
        let failed = EngineError::io("read the index pages of", &self.path);
        self.file
            .read_exact_at(&mut page.bytes[..], offset)
            .map_err(&failed)?;
        let told = u32::from_le_bytes([page.bytes[0], page.bytes[1], page.bytes[2], page.bytes[3]]);
        let place =
            u32::from_le_bytes([page.bytes[4], page.bytes[5], page.bytes[6], page.bytes[7]]);
        if told != page.checksum() || place != page.number {
            let reason = "a page does not verify; reload the namespace to make the index anew";
            return Err(failed(io::Error::new(io::ErrorKind::InvalidData, reason)));
        }
        Ok(())
    }

    /// The number of a frame that can be used: a new one, or one whose page was put away.
    fn make_room(&self, cache: &mut Cache) -> Result<usize, EngineError> {
        if cache.pages.len() < self.pages_max {
            return Ok(cache.pages.len());
        }
        loop {
            let hand = cache.hand;
            cache.hand = (hand + 1) % cache.pages.len();
            let page = &mut cache.pages[hand];
            if page.used {
                page.used = false;
                continue;
            }
            let number = page.number;
            if page.dirty {
                page.bytes[4..8].copy_from_slice(&number.to_le_bytes());
                let checksum = page.checksum();
                page.bytes[..4].copy_from_slice(&checksum.to_le_bytes());
                let offset = u64::from(number) * PAGE as u64;
                if let Err(error) = self.file.write_all_at(&page.bytes[..], offset) {
                    // What is in memory is all there is of this page: rather more memory than an index that forgets.
                    page.used = true;
                    tracing::warn!(path = %self.path.display(), %error, "cannot put a page of the index away");
                    return Ok(cache.pages.len());
                }
                page.dirty = false;
            }
            cache.by_number.remove(&number);
            return Ok(hand);
        }
    }

    /// The next page at or behind (`up`) or at or before this one that holds a live record.
    fn next_live(&self, from: u32, up: bool) -> Option<u32> {
        let cache = self.cache.lock();
        let live = |number: &u32| cache.counts(*number).live > 0;
        let end = u32::try_from(cache.counts.len()).unwrap_or(u32::MAX);
        if up {
            (from..end).find(live)
        } else {
            (0..=from.min(end)).rev().find(live)
        }
    }

    /// Live records from an id on, upwards or downwards.
    pub(super) fn walk(
        &self,
        from: Option<u64>,
        up: bool,
        keys_max: usize,
    ) -> Result<Vec<(u64, Entry)>, EngineError> {
        let mut found = Vec::new();
        let Some(from) = from else {
            return Ok(found);
        };
        let last = u64::from(u32::MAX);
        let mut page = u32::try_from((from / PER_PAGE).min(last)).unwrap_or(u32::MAX);
        while let Some(number) = self.next_live(page, up) {
            let first = u64::from(number) * PER_PAGE;
            let mut records = Vec::new();
            {
                let mut cache = self.cache.lock();
                let frame = self.frame(&mut cache, number)?;
                for id in first..first + PER_PAGE {
                    let record = cache.pages[frame].record(place_of(id).1);
                    let wanted = if up { id >= from } else { id <= from };
                    records.extend(
                        Entry::decode(record)
                            .filter(|entry| wanted && !entry.deleted)
                            .map(|entry| (id, entry)),
                    );
                }
            }
            if !up {
                records.reverse();
            }
            found.extend(records);
            let next = if up {
                number.checked_add(1)
            } else {
                number.checked_sub(1)
            };
            match next {
                Some(next) if found.len() < keys_max => page = next,
                _ => break,
            }
        }
        found.truncate(keys_max);
        Ok(found)
    }
}

impl Cache {
    fn counts(&self, number: u32) -> Counts {
        self.counts
            .get(number as usize)
            .copied()
            .unwrap_or_default()
    }
}
