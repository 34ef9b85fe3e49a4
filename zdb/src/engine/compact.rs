//! Compaction: copy what a datafile holds that is still needed, then remove it.
//!
//! Crash-safe by order: copies are durable before they are published, the old datafile's name is durably gone before its entries
//! are forgotten. A crash in between leaves copies of the same version, of which the index takes one; a tombstone is copied as
//! long as an entry exists on disk that would come back without it.
//!
//! Paced: after every small piece the caller is asked, and may wait, so that what is written meanwhile finds the disk free. A piece goes to
//! the disk at once, but without a sync: syncs are what others wait for longest, so one serves many pieces that are there already.

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

/// Bytes given to the disk at once; small, since what is written meanwhile waits behind them. Where datafiles are small, so are pieces.
const PIECE_BYTES: u64 = 128 << 10;
const PIECE_PART: u64 = 64;
/// Pieces between two syncs, and entries in them.
const SYNC_PIECES: usize = 32;
const SYNC_ENTRIES: usize = 16_384;
/// Entries handled under one lock of the index.
const BATCH_ENTRIES: usize = 512;

/// Asked after every piece of work, which took so long: go on?
pub(super) type GoOn<'a> = &'a dyn Fn(Duration) -> bool;

/// A pass over a victim.
struct Pass<'a> {
    reader: &'a DatafileReader,
    victim: u32,
    /// Where copies go.
    number: u32,
    output: Option<Datafile>,
    /// What was copied since the last sync, and in how many pieces.
    copied: Vec<Copied>,
    pieces: usize,
    damaged: bool,
}

/// A copy that is not durable yet.
struct Copied {
    /// Key and version, if it is an entry.
    entry: Option<(Bytes, u64)>,
    from: Place,
    to: Place,
    bytes: u64,
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
            copied: Vec::new(),
            pieces: 0,
            damaged: false,
        };
        let copied = self.copy_needed(&mut pass, go_on);
        // What was copied is durable and in use, whatever came then; a mark for which there is no room is only missed.
        let began = Instant::now();
        if let Some(mut output) = pass.output.take()
            && let Err(error) = output.mark()
            && output.is_stopped()
        {
            self.stop(error.to_string());
            return Err(error.into());
        }
        if !copied? || !go_on(began.elapsed()) {
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
        let began = Instant::now();
        match self.media.remove(reader.path()) {
            // A flush was faster.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.map_err(EngineError::io("remove", reader.path()))?,
        }
        self.media
            .sync_dir(&self.dir)
            .map_err(EngineError::io("sync directory", &self.dir))?;
        let _ = go_on(began.elapsed());
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
        let piece_bytes = PIECE_BYTES.min(self.datafile_bytes / PIECE_PART);
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
            if batch_bytes >= piece_bytes || batch.len() >= BATCH_ENTRIES {
                self.write_piece(pass, &mut batch)?;
                batch_bytes = 0;
                if pass.pieces >= SYNC_PIECES || pass.copied.len() >= SYNC_ENTRIES {
                    self.publish_copies(pass)?;
                }
                if !go_on(began.elapsed()) {
                    self.publish_copies(pass)?;
                    return Ok(false);
                }
                began = Instant::now();
            }
        }
        self.write_piece(pass, &mut batch)?;
        self.publish_copies(pass)?;
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

    /// Append copies, and let them reach the disk.
    fn write_piece(&self, pass: &mut Pass<'_>, batch: &mut Vec<Frame>) -> Result<(), EngineError> {
        if batch.is_empty() {
            return Ok(());
        }
        let output = self.output(pass)?;
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
        if let Err(error) = output.write_out(offsets[0]) {
            self.stop(error.to_string());
            return Err(error.into());
        }
        let copies = batch.iter().zip(offsets).map(|(frame, offset)| {
            let head = EntryHead::decode(frame.kind, &frame.payload);
            Copied {
                entry: head.map(|head| (Bytes::copy_from_slice(head.key), head.version)),
                from: Place {
                    file: pass.victim,
                    offset: frame.offset,
                },
                to: Place {
                    file: pass.number,
                    offset,
                },
                bytes: frame_bytes(frame.payload.len() as u64),
            }
        });
        pass.copied.extend(copies);
        pass.pieces += 1;
        batch.clear();
        Ok(())
    }

    /// Where copies go, made when it is first needed.
    fn output<'a>(&self, pass: &'a mut Pass<'_>) -> Result<&'a mut Datafile, EngineError> {
        if pass.output.is_none() {
            let path = self.dir.join(file_name(pass.number));
            let mut file = Datafile::create(&self.media, &path, file_header(pass.number))?;
            append_counters(&mut file, self.writer.lock().counters)?;
            let mut state = self.state.write();
            state.readers.insert(pass.number, file.reader());
            pass.output = Some(file);
        }
        Ok(pass.output.as_mut().expect("made above"))
    }

    /// Sync what was copied, and let the index point at it.
    fn publish_copies(&self, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        let Some(output) = &pass.output else {
            return Ok(());
        };
        if let Err(error) = output.sync() {
            self.stop(error.to_string());
            return Err(error.into());
        }
        for copies in pass.copied.chunks(BATCH_ENTRIES) {
            let mut state = self.state.write();
            let flushed_before = self.flushed_before.load(Ordering::Acquire);
            for copy in copies {
                match &copy.entry {
                    Some((key, version)) if *version >= flushed_before => {
                        state.index.add_copy(key, copy.from, copy.to, copy.bytes)?;
                    }
                    _ => state.index.add_bytes(pass.number, copy.bytes),
                }
            }
            state.dirty.insert(pass.number);
        }
        pass.copied.clear();
        pass.pieces = 0;
        Ok(())
    }
}

fn split_at_head(frame: &Frame) -> (&[u8], [&[u8]; 1]) {
    let head = EntryHead::decode(frame.kind, &frame.payload);
    let (prefix, value) = frame.payload.split_at(head.map_or(0, |head| head.bytes()));
    (prefix, [value])
}
