//! Compaction: copy what a datafile holds that is still needed, then remove it.
//!
//! Crash-safe by order: the copies are durable before they are published, the old datafile's name is durably gone before its entries
//! are forgotten. A crash in between leaves copies of the same version, of which the index takes one; a tombstone is copied as
//! long as an entry exists on disk that would come back without it.

use super::EngineError;
use super::entry::{EntryHead, KIND_COUNTERS, KIND_DELETE, KIND_SET};
use super::index::{Key, Place};
use super::store::{DamageReport, Store, append_counters, file_header, file_name};
use crate::datafile::{Datafile, DatafileError, DatafileReader, Frame, FrameParts, frame_bytes};
use bytes::Bytes;

/// Copies are written in batches of about this size.
const COPY_BATCH_BYTES: u64 = 4 << 20;

struct Copied {
    key: Key,
    from: Place,
    to: Place,
    bytes: u64,
}

/// What one pass over a victim collected.
#[derive(Default)]
struct Pass {
    /// All physical entries of the victim whose key the index knows.
    physical: Vec<(Key, Place)>,
    copied: Vec<Copied>,
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
                *file != state.active && !blocked && usage.live_bytes * 2 <= usage.total_bytes
            })
            .min_by_key(|(_, usage)| usage.live_bytes)
            .map(|(file, _)| file)
    }

    /// Compact one datafile; `false` if none is worth it. `go_on` is asked between batches.
    pub(super) fn compact_step(&self, go_on: &dyn Fn() -> bool) -> Result<bool, EngineError> {
        let Some(victim) = self.compaction_victim() else {
            return Ok(false);
        };
        self.check_running()?;
        self.check_alive()?;
        let Some(reader) = self.state.read().readers.get(&victim).cloned() else {
            return Ok(false);
        };
        let before = self.state.read().index.file_use(victim).live_bytes;
        let number = self.new_file_number();
        let output = self.dir.join(file_name(number));
        let pass = match self.copy_needed(&reader, victim, number, go_on) {
            Ok(Some(pass)) => pass,
            stopped => {
                // Never published. If the removal is lost, the next open finds copies, which are harmless.
                let _ = self.media.remove(&output);
                return stopped.map(|_| false);
            }
        };
        {
            let mut state = self.state.write();
            for copy in &pass.copied {
                state
                    .index
                    .add_copy(&copy.key, copy.from, copy.to, copy.bytes);
            }
            let left = state.index.file_use(victim).live_bytes;
            if left > 0 {
                // Part of what is needed could not be read: the file stays, as evidence and as the answer "corrupt".
                tracing::warn!(file = %reader.path().display(), damaged = pass.damaged, "a damaged datafile cannot be compacted");
                state.blocked.insert(victim, left);
                return Ok(left < before);
            }
        }
        self.media
            .remove(reader.path())
            .map_err(EngineError::io("remove", reader.path()))?;
        self.media
            .sync_dir(&self.dir)
            .map_err(EngineError::io("sync directory", &self.dir))?;
        let mut state = self.state.write();
        for (key, place) in &pass.physical {
            state.index.forget(key, *place);
        }
        state.index.forget_file(victim);
        state.readers.remove(&victim);
        state.blocked.remove(&victim);
        Ok(true)
    }

    /// Copy the needed entries into a new datafile, durably; `None` when told to stop.
    fn copy_needed(
        &self,
        reader: &DatafileReader,
        victim: u32,
        number: u32,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Pass>, EngineError> {
        let mut pass = Pass::default();
        let mut output: Option<Datafile> = None;
        let mut batch: Vec<(Key, Frame)> = Vec::new();
        let mut batch_bytes = 0;
        for frame in reader.frames(0) {
            let frame = match frame {
                Ok(frame) => frame,
                Err(DatafileError::Damaged {
                    path,
                    offset,
                    bytes,
                }) => {
                    pass.damaged = true;
                    self.report(DamageReport {
                        path,
                        offset,
                        bytes,
                        key: None,
                    });
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let Some((key, place)) = self.known(victim, &frame) else {
                continue;
            };
            pass.physical.push((key.clone(), place));
            if self.state.read().index.is_needed(&key, place) {
                batch_bytes += frame.payload.len() as u64;
                batch.push((key, frame));
            }
            if batch_bytes >= COPY_BATCH_BYTES {
                self.write_copies(&mut output, victim, number, &mut batch, &mut pass)?;
                batch_bytes = 0;
                if !go_on() {
                    return Ok(None);
                }
            }
        }
        self.write_copies(&mut output, victim, number, &mut batch, &mut pass)?;
        if let Some(mut output) = output {
            output.mark()?;
            self.state.write().readers.insert(number, output.reader());
        }
        Ok(Some(pass))
    }

    /// The key and place of an entry whose key the index knows.
    fn known(&self, victim: u32, frame: &Frame) -> Option<(Key, Place)> {
        if !matches!(frame.kind, KIND_SET | KIND_DELETE) {
            debug_assert_eq!(frame.kind, KIND_COUNTERS);
            return None;
        }
        let head = EntryHead::decode(&frame.payload)?;
        let key = self.state.read().index.shared_key(head.key)?;
        let place = Place {
            file: victim,
            offset: frame.offset,
        };
        Some((key, place))
    }

    fn write_copies(
        &self,
        output: &mut Option<Datafile>,
        victim: u32,
        number: u32,
        batch: &mut Vec<(Key, Frame)>,
        pass: &mut Pass,
    ) -> Result<(), EngineError> {
        if batch.is_empty() {
            return Ok(());
        }
        let file = match output {
            Some(file) => file,
            None => {
                let path = self.dir.join(file_name(number));
                let mut file = Datafile::create(&self.media, &path, file_header(number))?;
                append_counters(&mut file, self.writer.lock().counters)?;
                output.insert(file)
            }
        };
        let split: Vec<(u8, Bytes, [&[u8]; 1])> = batch
            .iter()
            .map(|(key, frame)| {
                let head = super::entry::head_bytes(key);
                (
                    frame.kind,
                    frame.payload.slice(..head),
                    [&frame.payload[head..]],
                )
            })
            .collect();
        let frames: Vec<FrameParts<'_>> = split
            .iter()
            .map(|(kind, prefix, parts)| FrameParts {
                kind: *kind,
                prefix,
                parts,
            })
            .collect();
        let offsets = file.append_batch(&frames)?;
        drop(frames);
        drop(split);
        for ((key, frame), offset) in batch.drain(..).zip(offsets) {
            pass.copied.push(Copied {
                key,
                from: Place {
                    file: victim,
                    offset: frame.offset,
                },
                to: Place {
                    file: number,
                    offset,
                },
                bytes: frame_bytes(frame.payload.len() as u64),
            });
        }
        Ok(())
    }
}
