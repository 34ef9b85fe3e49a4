//! What was durable must be there: sealed files by their own ends, open ones up to the synced point. Nothing is changed here.

use super::{CUT_OFF, NOT_VERIFIED, OpenError, Scan, damaged_journal, journal_error};
use crate::ports::DataExtent;
use crate::store::append::{KIND_RECORD, meta_header};
use crate::store::layout::{DatafileName, Stage};
use crate::store::pages;
use qsfs_zdb::datafile::{Datafile, DatafileError, FrameView};
use qsfs_zdb::media::OpenMode;
use qsfs_zstor::id::{DatafileId, Stream};
use std::collections::BTreeSet;
use std::path::Path;

impl Scan<'_> {
    /// Bytes that a data datafile had when it was sealed, from the checksums beside it: it may have been cut since, which every
    /// read of what is missing then says. `None` when they cannot be read, which every read says, too.
    pub(super) fn sealed_bytes(&self, id: DatafileId) -> Option<u64> {
        let file = self
            .media
            .open(&self.dir.page_sums(id), OpenMode::Read)
            .ok()?;
        let mut raw = vec![0; usize::try_from(file.length().ok()?).ok()?];
        file.read_exact_at(&mut raw, 0).ok()?;
        Some(pages::decode(&raw).ok()?.0)
    }

    /// Verifies a meta datafile that exists nowhere else; true when it is a checkpoint.
    pub(super) fn check_sealed_meta(
        &mut self,
        id: DatafileId,
        path: &Path,
    ) -> Result<bool, OpenError> {
        let mut checkpoint = false;
        let mut named = BTreeSet::new();
        let mut visit = |frame: FrameView<'_>| {
            checkpoint |= frame.kind != KIND_RECORD;
            if frame.kind == KIND_RECORD {
                // A record that cannot be read is complained about when it is replayed.
                let extents = (self.context.extents)(frame.payload).unwrap_or_default();
                named.extend(extents.iter().map(|extent| extent.datafile));
            }
        };
        let inspected = Datafile::inspect(&self.media, path, meta_header(id), &mut visit);
        let (_, report) = inspected.map_err(|error| journal_error(path, error))?;
        match report.damaged.first() {
            Some(damage) => Err(damaged_journal(path, damage.offset, NOT_VERIFIED)),
            None if report.torn_bytes_cut > 0 || !report.ends_marked => {
                Err(damaged_journal(path, report.length, CUT_OFF))
            }
            None => {
                self.named.append(&mut named);
                Ok(checkpoint)
            }
        }
    }

    /// What was durable must be there: all of it before the synced point. Nothing is changed.
    pub(super) fn check_synced(&self, names: &[DatafileName]) -> Result<(), OpenError> {
        let known =
            |id: &&DatafileId| self.catalog.get(**id).is_some() || (self.context.committed)(**id);
        if let Some(id) = self.named.iter().find(|id| !known(id)) {
            let stage = Stage::Sealed;
            return Err(self.damaged_data(*id, stage, 0, "it is missing"));
        }
        let Some(synced) = self.synced else {
            return Ok(());
        };
        let newest = |name: &&DatafileName| name.id == synced.journal;
        if names.iter().find(newest).is_none() && synced.journal > self.context.last_known_id {
            let gone = DatafileName {
                id: synced.journal,
                stream: Stream::Meta,
                stage: Stage::Open,
            };
            return Err(damaged_journal(
                &self.dir.datafile(gone),
                0,
                "it is missing",
            ));
        }
        let open = |name: &&DatafileName| (name.stream, name.stage) == (Stream::Meta, Stage::Open);
        for name in names.iter().filter(open) {
            let durable = synced.durable_bytes(name.id);
            if durable > 0 {
                self.check_synced_journal(name.id, &self.dir.datafile(*name), durable)?;
            }
        }
        Ok(())
    }

    fn damaged_data(
        &self,
        id: DatafileId,
        stage: Stage,
        offset: u64,
        what: &'static str,
    ) -> OpenError {
        let name = DatafileName {
            id,
            stream: Stream::Data,
            stage,
        };
        OpenError::DamagedData {
            path: self.dir.datafile(name).display().to_string(),
            offset,
            what,
        }
    }

    /// `durable` bytes of this journal were synced, and all data that they name.
    fn check_synced_journal(
        &self,
        id: DatafileId,
        path: &Path,
        durable: u64,
    ) -> Result<(), OpenError> {
        let (mut records, mut checkpoint, mut bad) = (0_u64, false, None);
        let mut visit = |frame: FrameView<'_>| {
            checkpoint |= frame.kind != KIND_RECORD;
            records += 1;
            if frame.offset >= durable || checkpoint || bad.is_some() {
                return;
            }
            // A record that cannot be read is complained about when the journal is cut.
            let extents = (self.context.extents)(frame.payload).unwrap_or_default();
            bad = extents
                .iter()
                .find_map(|extent| Some((*extent, self.complaint(extent)?)));
        };
        let inspected = Datafile::inspect(&self.media, path, meta_header(id), &mut visit);
        let report = match inspected {
            Ok((_, report)) => report,
            // An older one may be a checkpoint whose making had just begun.
            Err(DatafileError::NoHeader {
                never_born: true, ..
            }) if durable == u64::MAX => return Ok(()),
            Err(error) => return Err(journal_error(path, error)),
        };
        if checkpoint || (durable == u64::MAX && records == 0) {
            // A checkpoint that was not complete is taken again.
            return Ok(());
        }
        if let Some((extent, what)) = bad {
            return Err(self.damaged_data(extent.datafile, Stage::Open, extent.offset, what));
        }
        let whole = report.torn_bytes_cut == 0 && report.damaged.is_empty();
        let short = match durable {
            u64::MAX => !whole,
            durable => report.length < durable,
        };
        if short {
            return Err(damaged_journal(path, report.length, CUT_OFF));
        }
        Ok(())
    }

    pub(super) fn verifies(&self, extent: &DataExtent) -> bool {
        self.complaint(extent).is_none()
    }

    /// What is wrong with the data that a record names. A sealed datafile was verified when it was sealed; reads and the push
    /// verify it again.
    fn complaint(&self, extent: &DataExtent) -> Option<&'static str> {
        let end = extent.offset.saturating_add(u64::from(extent.bytes));
        let Some(open) = self.open_data.get(&extent.datafile) else {
            let known = match self.catalog.get(extent.datafile) {
                Some(file) => file.name.stream == Stream::Data && end <= file.bytes,
                None => (self.context.committed)(extent.datafile),
            };
            return (!known).then_some("it is missing");
        };
        if end > open.length {
            return Some("its end is missing");
        }
        let mut data = vec![0; extent.bytes as usize];
        let read = open.file.read_exact_at(&mut data, extent.offset);
        match read {
            Ok(()) if crc32fast::hash(&data) == extent.crc => None,
            Ok(()) => Some("the bytes do not match their checksum"),
            Err(_) => Some("the bytes cannot be read"),
        }
    }
}
