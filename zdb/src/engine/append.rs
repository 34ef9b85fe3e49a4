//! Appending what was decided, and going on to the next datafile.

use super::EngineError;
use super::commit::{Outcome, Planned};
use super::index::Place;
use super::store::{Store, Writer, append_counters, file_header, file_name};
use crate::datafile::{Datafile, DatafileError, FrameParts};

/// A datafile that holds mostly garbage is completed at this part of its full size, so that compaction can have it.
const EARLY_ROTATION_PART: u64 = 8;

/// A datafile is extended by this much ahead of small appends, at most by that part of its full size.
const FILL_AHEAD_BYTES: u64 = 1 << 20;
const FILL_AHEAD_PART: u64 = 8;

impl Store {
    /// Append in order, rotating as files fill up. An entry that cannot be written turns its outcome into the error.
    pub(super) fn append_planned(
        &self,
        writer: &mut Writer,
        planned: &mut [Planned],
        outcomes: &mut [Outcome],
    ) {
        let mut rest = planned;
        while !rest.is_empty() {
            if let Err(gone) = self.rotate_if_due(writer, rest[0].frame_bytes()) {
                for entry in rest {
                    outcomes[entry.operation] = Err(gone.clone());
                }
                return;
            }
            let room = self.datafile_bytes.saturating_sub(writer.active.len());
            let mut bytes = 0;
            let fitting = rest.iter().take_while(|entry| {
                bytes += entry.frame_bytes();
                bytes <= room
            });
            let count = fitting.count().max(1);
            let (now, later) = rest.split_at_mut(count);
            if self.append_run(writer, now).is_err() {
                // Alone, what is small (a deletion) may still find room.
                for entry in now {
                    if let Err(error) = self.append_run(writer, std::slice::from_mut(entry)) {
                        outcomes[entry.operation] = Err(error.into());
                    }
                }
            }
            rest = later;
        }
    }

    fn append_run(&self, writer: &mut Writer, run: &mut [Planned]) -> Result<(), DatafileError> {
        let values: Vec<[&[u8]; 1]> = run.iter().map(|entry| [&entry.value[..]]).collect();
        let frames: Vec<FrameParts<'_>> = run
            .iter()
            .zip(&values)
            .map(|(entry, value)| FrameParts {
                kind: entry.kind,
                prefix: &entry.head,
                parts: value,
            })
            .collect();
        let crcs: Vec<u32> = run.iter().map(|entry| entry.value_crc).collect();
        self.fill_ahead(writer, run);
        let offsets = writer.active.append_summed(&frames, &crcs)?;
        let mut state = self.state.write();
        let file = state.active;
        for (entry, offset) in run.iter_mut().zip(offsets) {
            entry.place = Place { file, offset };
        }
        // Before the datafile can be completed: from then on only this keeps compaction from taking it for garbage.
        state.pending.add(file, run);
        Ok(())
    }

    /// Before small appends the file is extended for many of them at once.
    fn fill_ahead(&self, writer: &mut Writer, run: &[Planned]) {
        let fill = FILL_AHEAD_BYTES.min(self.datafile_bytes / FILL_AHEAD_PART);
        let bytes: u64 = run.iter().map(Planned::frame_bytes).sum();
        let ahead = writer.active.ahead_bytes();
        let room = self.datafile_bytes.saturating_sub(writer.active.len());
        if bytes <= ahead || bytes > fill / 4 || room < fill * 2 {
            return;
        }
        if let Err(error) = writer.active.fill_ahead(fill) {
            // The append itself says whether there is room for it.
            tracing::debug!(%error, "cannot extend the datafile ahead");
        }
    }

    /// An error only if the directory is gone.
    fn rotate_if_due(&self, writer: &mut Writer, next_bytes: u64) -> Result<(), EngineError> {
        let length = writer.active.len();
        let mostly_garbage = {
            let state = self.state.read();
            let live = state.index.file_use(state.active).live_bytes
                + state.pending.bytes_in(state.active);
            length > self.datafile_bytes / EARLY_ROTATION_PART && live < length / 4
        };
        let full = length + next_bytes > self.datafile_bytes && !writer.active.is_empty();
        if !full && !mostly_garbage {
            return Ok(());
        }
        // No datafile is begun in a directory that took the place of the one that was opened.
        self.check_alive()?;
        if let Err(error) = self.rotate(writer) {
            // The old datafile may still take it; if not, the append says why.
            tracing::warn!(dir = %self.dir.display(), %error, "cannot begin a new datafile");
        }
        Ok(())
    }

    pub(super) fn rotate(&self, writer: &mut Writer) -> Result<(), EngineError> {
        let number = self.new_file_number();
        let path = self.dir.join(file_name(number));
        let fresh =
            Datafile::create(&self.media, &path, file_header(number)).and_then(|mut file| {
                append_counters(&mut file, writer.counters)?;
                file.sync()?;
                Ok(file)
            });
        let fresh = match fresh {
            Ok(fresh) => fresh,
            Err(error) => {
                // Nothing was acknowledged in it. If it cannot be removed, the next open finds it empty.
                let _ = self.media.remove(&path);
                return Err(error.into());
            }
        };
        let completed = writer.active.trim().and_then(|()| writer.active.mark());
        if let Err(error) = completed {
            if writer.active.is_stopped() {
                self.stop(error.to_string());
            }
            // Else only the mark found no room: the old datafile goes on.
            let _ = self.media.remove(&path);
            return Err(error.into());
        }
        let mut state = self.state.write();
        state.readers.insert(number, fresh.reader());
        state.active = number;
        writer.active = fresh;
        Ok(())
    }
}
