//! `info PATH`: where the bytes of a file are.

use super::Session;
use crate::control::{DatafileInfo, ExtentInfo, FileInfo, ShardInfo};
use crate::namespace::NamespaceError;
use crate::store::layout::Stage;
use qsfs_proto::api::Verdict;
use qsfs_zstor::id::DatafileId;
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

impl Session {
    /// `None` when there is no such file. Answers what is known locally even when metad does not.
    pub async fn info(&self, path: &Path) -> Result<Option<FileInfo>, NamespaceError> {
        let namespace = self.filesystem.namespace();
        let Some(attributes) = namespace.lookup_path(path)? else {
            return Ok(None);
        };
        let extents = namespace.extents_of(attributes.ino)?;
        let ids: BTreeSet<DatafileId> = extents.iter().map(|extent| extent.datafile).collect();
        let wanted: Vec<DatafileId> = ids.iter().copied().collect();
        let _ = self
            .context
            .backends
            .refresh(std::time::Duration::from_secs(2))
            .await;
        let (records, records_missing) = match self
            .context
            .cluster
            .records(self.context.volume, &wanted)
            .await
        {
            Ok(records) => (records, String::new()),
            Err(error) => (Vec::new(), error.to_string()),
        };
        let records: BTreeMap<DatafileId, EncodingRecord> = records
            .into_iter()
            .map(|record| (record.datafile, record))
            .collect();
        Ok(Some(FileInfo {
            path: path.to_owned(),
            ino: attributes.ino.0,
            size: attributes.size,
            extents: extents
                .iter()
                .map(|extent| ExtentInfo {
                    file_offset: extent.start,
                    bytes: extent.bytes,
                    datafile: extent.datafile.0,
                    offset: extent.offset,
                })
                .collect(),
            datafiles: ids
                .into_iter()
                .map(|id| self.datafile_info(id, records.get(&id)))
                .collect(),
            records_missing,
        }))
    }

    fn datafile_info(&self, id: DatafileId, record: Option<&EncodingRecord>) -> DatafileInfo {
        let local = match self.local().catalog().get(id).map(|file| file.name.stage) {
            Some(Stage::Sealed) => "sealed",
            Some(Stage::Pushed) => "pushed",
            Some(Stage::Open) => "open",
            None if self.local().is_open(id) => "open",
            None => "remote",
        };
        DatafileInfo {
            datafile: id.0,
            local: local.to_owned(),
            committed: record.is_some(),
            geometry: record
                .map(|record| record.geometry.to_string())
                .unwrap_or_default(),
            shards: record.map(|record| self.shards(record)).unwrap_or_default(),
        }
    }

    fn shards(&self, record: &EncodingRecord) -> Vec<ShardInfo> {
        let info = |(index, shard): (usize, &Shard)| {
            let backend = self.context.backends.describe(shard.backend);
            let verdict = backend
                .as_ref()
                .map_or("unknown", |backend| match backend.verdict {
                    Verdict::Up => "up",
                    Verdict::Suspect => "suspect",
                    Verdict::Down => "down",
                    Verdict::Lost => "lost",
                });
            let state = match shard.state {
                ShardState::Stored => "stored",
                ShardState::Missing => "missing",
                ShardState::Corrupt => "corrupt",
            };
            ShardInfo {
                shard: index as u64,
                backend: shard.backend.0,
                location: backend
                    .as_ref()
                    .map(|backend| backend.location.to_string())
                    .unwrap_or_default(),
                node: backend
                    .as_ref()
                    .map(|backend| backend.node.to_string())
                    .unwrap_or_default(),
                endpoint: backend
                    .map(|backend| backend.address.endpoint)
                    .unwrap_or_default(),
                verdict: verdict.to_owned(),
                state: state.to_owned(),
            }
        };
        record.shards.iter().enumerate().map(info).collect()
    }
}
