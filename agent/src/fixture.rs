//! Records for tests.
#![expect(clippy::unwrap_used, reason = "tests")]

use qsfs_zstor::id::{BackendId, DatafileId, Epoch, Salt, ShardHash, Stream, VolumeId};
use qsfs_zstor::policy::Geometry;
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};

/// A record of `data + 2` shards of 16 MiB on backends 0, 1, …
pub(crate) fn record(datafile: u64, data: u32) -> EncodingRecord {
    EncodingRecord {
        volume: VolumeId::from_bytes([1; 16]),
        datafile: DatafileId(datafile),
        stream: Stream::Data,
        epoch: Epoch(1),
        salt: Salt::from_bytes([2; 16]),
        geometry: Geometry::new(data, 2).unwrap(),
        chunk_bytes: 1 << 20,
        plain_bytes: 64 << 20,
        object_bytes: 64 << 20,
        shard_bytes: 16 << 20,
        piece_bytes: 1 << 20,
        shards: (0..u64::from(data) + 2)
            .map(|index| Shard {
                backend: BackendId(index),
                hash: ShardHash::from_bytes([0; 32]),
                state: ShardState::Stored,
            })
            .collect(),
        version: 0,
    }
}
