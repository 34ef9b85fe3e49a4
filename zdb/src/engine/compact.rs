//! Compaction: copy what a datafile holds that is still needed, then remove it.
//!
//! Crash-safe by order: copies are durable before they are published, the old datafile's name is durably gone before its entries
//! are forgotten. A crash in between leaves copies of the same version, of which the index takes one; a tombstone is copied as
//! long as an entry exists on disk that would come back without it.
//!
//! Paced: after every batch the caller is asked, and may wait, so that what is written meanwhile finds the disk free.

use super::EngineError;
use super::entry::EntryHead;
use super::index::Place;
use super::snapshot::{Known, Told};
use super::store::{DamageReport, Store, append_counters, file_header, file_name};
use crate::datafile::{Datafile, DatafileError, DatafileReader, Frame, FrameParts, frame_bytes};
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Bytes copied between two syncs; small, since what is written meanwhile waits for the disk.
const COPY_BATCH_BYTES: u64 = 1 << 20;
/// Entries handled under one lock of the index.
const BATCH_ENTRIES: usize = 512;

/// Asked after every batch, which took so long: go on?
pub(super) type GoOn<'a> = &'a dyn Fn(Duration) -> bool;

/// A pass over a victim.
struct Pass<'a> {
    reader: &'a DatafileReader,
    victim: u32,
    /// Where copies go.
    number: u32,
    output: Option<Datafile>,
    damaged: bool,
}

impl Store {
    /// The datafile that is most worth compacting, if one is.
    pub(super) fn compaction_victim(&self) -> Option<u32> {
        let state = self.state.read();
        state
            .index
            .files()
            .filter(|(file, usage)| {
                let blocked = state
                    .blocked
                    .get(file)
                    .is_some_and(|&live| live == usage.live_bytes);
                // What is not published yet would look like garbage.
                let settled = state.pending.bytes_in(*file) == 0;
                *file != state.active
                    && settled
                    && !blocked
                    && usage.live_bytes * 2 <= usage.total_bytes
            })
            .min_by_key(|(_, usage)| usage.live_bytes)
            .map(|(file, _)| file)
    }

    /// Compact one datafile; `false` if none is worth it, or told to stop.
    pub(super) fn compact_step(&self, go_on: GoOn<'_>) -> Result<bool, EngineError> {
        let Some(victim) = self.compaction_victim() else {
            return Ok(false);
        };
        self.check_running()?;
        self.check_alive()?;
        let Some(reader) = self.state.read().readers.get(&victim).cloned() else {
            return Ok(false);
        };
        let before = self.state.read().index.file_use(victim).live_bytes;
        let mut pass = Pass {
            reader: &reader,
            victim,
            number: self.new_file_number(),
            output: None,
            damaged: false,
        };
        let copied = self.copy_needed(&mut pass, go_on);
        // What was copied is durable and in use, whatever came then; a mark for which there is no room is only missed.
        if let Some(mut output) = pass.output.take()
            && let Err(error) = output.mark()
            && output.is_stopped()
        {
            self.stop(error.to_string());
            return Err(error.into());
        }
        if !copied? {
            return Ok(false);
        }
        {
            let mut state = self.state.write();
            let left = state.index.file_use(victim).live_bytes;
            if left > 0 {
                // Part of what is needed could not be read: the file stays, as evidence and as the answer "corrupt".
                tracing::warn!(file = %reader.path().display(), damaged = pass.damaged, "a damaged datafile cannot be compacted");
                state.blocked.insert(victim, left);
                return Ok(left < before);
            }
        }
        self.remove_compacted(victim, &reader, go_on)?;
        Ok(true)
    }

    /// Nothing in the datafile is needed any more.
    fn remove_compacted(
        &self,
        victim: u32,
        reader: &DatafileReader,
        go_on: GoOn<'_>,
    ) -> Result<(), EngineError> {
        if self.sync != super::SyncPolicy::Always {
            // What made its entries unneeded must not be lost while they are.
            self.sync_active()?;
        }
        match self.media.remove(reader.path()) {
            // A flush was faster.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.map_err(EngineError::io("remove", reader.path()))?,
        }
        self.media
            .sync_dir(&self.dir)
            .map_err(EngineError::io("sync directory", &self.dir))?;
        self.forget_entries(victim, reader, go_on)?;
        self.forget_file(victim);
        Ok(())
    }

    /// The entries of a datafile whose name is gone.
    fn forget_entries(
        &self,
        victim: u32,
        reader: &DatafileReader,
        go_on: GoOn<'_>,
    ) -> Result<(), EngineError> {
        let mut heads = reader.heads(0);
        let mut done = false;
        while !done {
            let began = Instant::now();
            let mut gone: Vec<(Vec<u8>, Place, u64)> = Vec::with_capacity(BATCH_ENTRIES);
            while gone.len() < BATCH_ENTRIES {
                let Some(head) = heads.next() else {
                    done = true;
                    break;
                };
                match head.map(|head| Known::tell(victim, &head)) {
                    Ok(Told::Entry(known)) => {
                        gone.push((known.head.key.to_vec(), known.place, known.head.version));
                    }
                    // An entry that cannot be told counts as there until the next open: that keeps tombstones longer, no more.
                    Ok(_) | Err(DatafileError::Damaged { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let mut state = self.state.write();
            // Looked up under the lock: a flush may come in between.
            let flushed_before = self.flushed_before.load(Ordering::Acquire);
            for (key, place, version) in gone {
                if version >= flushed_before {
                    state.index.forget(&key, place)?;
                }
            }
            drop(state);
            // Not to be given up half way; only paced.
            let _ = go_on(began.elapsed());
        }
        Ok(())
    }

    /// Copy the needed entries into a new datafile, durably; `false` when told to stop.
    fn copy_needed(&self, pass: &mut Pass<'_>, go_on: GoOn<'_>) -> Result<bool, EngineError> {
        let mut heads = pass.reader.heads(0);
        let mut batch: Vec<Frame> = Vec::new();
        let mut batch_bytes = 0;
        let mut began = Instant::now();
        while let Some(head) = heads.next() {
            let (place, payload_bytes, key) = match head {
                Ok(head) => match Known::tell(pass.victim, &head) {
                    Told::Entry(known) if self.is_needed(&known)? => {
                        let key = Bytes::copy_from_slice(known.head.key);
                        (known.place, head.payload_bytes, key)
                    }
                    _ => continue,
                },
                Err(DatafileError::Damaged {
                    path,
                    offset,
                    bytes,
                }) => {
                    self.report_damage(pass, path, offset..offset + bytes, None);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            match pass.reader.read_sized(place.offset, payload_bytes) {
                Ok(frame) => {
                    batch_bytes += frame.payload.len() as u64;
                    batch.push(frame);
                }
                Err(DatafileError::Damaged {
                    path,
                    offset,
                    bytes,
                }) => self.report_damage(pass, path, offset..offset + bytes, Some(key)),
                Err(error) => return Err(error.into()),
            }
            if batch_bytes >= COPY_BATCH_BYTES || batch.len() >= BATCH_ENTRIES {
                self.write_copies(pass, &mut batch)?;
                batch_bytes = 0;
                if !go_on(began.elapsed()) {
                    return Ok(false);
                }
                began = Instant::now();
            }
        }
        self.write_copies(pass, &mut batch)?;
        Ok(true)
    }

    fn report_damage(
        &self,
        pass: &mut Pass<'_>,
        path: PathBuf,
        range: std::ops::Range<u64>,
        key: Option<Bytes>,
    ) {
        pass.damaged = true;
        self.report(DamageReport {
            path,
            offset: range.start,
            bytes: range.end - range.start,
            key,
        });
    }

    fn is_needed(&self, known: &Known<'_>) -> Result<bool, EngineError> {
        let state = self.state.read();
        let flushed = known.head.version < self.flushed_before.load(Ordering::Acquire);
        Ok(!flushed && state.index.is_needed(known.head.key, known.place)?)
    }

    /// Append, sync, publish.
    fn write_copies(&self, pass: &mut Pass<'_>, batch: &mut Vec<Frame>) -> Result<(), EngineError> {
        if batch.is_empty() {
            return Ok(());
        }
        let output = match &mut pass.output {
            Some(file) => file,
            None => {
                let path = self.dir.join(file_name(pass.number));
                let mut file = Datafile::create(&self.media, &path, file_header(pass.number))?;
                append_counters(&mut file, self.writer.lock().counters)?;
                self.state
                    .write()
                    .readers
                    .insert(pass.number, file.reader());
                pass.output.insert(file)
            }
        };
        let split: Vec<(&[u8], [&[u8]; 1])> = batch.iter().map(split_at_head).collect();
        let frames: Vec<FrameParts<'_>> = batch
            .iter()
            .zip(&split)
            .map(|(frame, (prefix, value))| FrameParts {
                kind: frame.kind,
                prefix,
                parts: value,
            })
            .collect();
        let offsets = output.append_batch(&frames)?;
        if let Err(error) = output.sync() {
            self.stop(error.to_string());
            return Err(error.into());
        }
        let mut state = self.state.write();
        let flushed_before = self.flushed_before.load(Ordering::Acquire);
        for (frame, offset) in batch.iter().zip(offsets) {
            let bytes = frame_bytes(frame.payload.len() as u64);
            let from = Place {
                file: pass.victim,
                offset: frame.offset,
            };
            let to = Place {
                file: pass.number,
                offset,
            };
            match EntryHead::decode(frame.kind, &frame.payload) {
                Some(head) if head.version >= flushed_before => {
                    state.index.add_copy(head.key, from, to, bytes)?;
                }
                _ => state.index.add_bytes(pass.number, bytes),
            }
        }
        state.dirty.insert(pass.number);
        drop(state);
        batch.clear();
        Ok(())
    }
}

fn split_at_head(frame: &Frame) -> (&[u8], [&[u8]; 1]) {
    let head = EntryHead::decode(frame.kind, &frame.payload);
    let (prefix, value) = frame.payload.split_at(head.map_or(0, |head| head.bytes()));
    (prefix, [value])
}
