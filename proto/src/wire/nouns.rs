//! Wire forms of what is spoken about.

use super::{Wire, WireError, pb, required, wire_enum, wire_list, wire_struct};
use crate::api::{
    Agent, Backend, BackendAddress, BackendFacts, ClientReport, ClusterSettings, Head, Intent,
    Lease, Member, PlacementAnswer, Role, ShardReport, TokenInfo, Verdict, Volume, VolumeSettings,
};
use crate::raft::RaftRpc;
use crate::status::{
    BackendStatus, Finding, LossBudget, QuorumStatus, ResilverStatus, RotStatus, Status,
    StatusVerdict, VolumeStatus,
};
use qsfs_zstor::id::{DatafileId, Stream, VolumeId};
use qsfs_zstor::policy::{Geometry, Policy};
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};

wire_enum!(Role {
    Metad,
    Agent,
    Client,
    Admin
});
wire_enum!(Stream { Data, Meta });
wire_enum!(ShardState {
    Stored,
    Missing,
    Corrupt
});
wire_enum!(Verdict {
    Up,
    Suspect,
    Down,
    Lost
});
wire_enum!(Intent {
    Serve,
    Drain,
    Retire
});
wire_enum!(RaftRpc {
    Append,
    Vote,
    Snapshot,
    ReadIndex
});
wire_enum!(StatusVerdict {
    Ok,
    Warning,
    Critical
});

impl Wire<pb::Geometry> for Geometry {
    fn to_wire(&self) -> pb::Geometry {
        let (data, parity) = (*self).into();
        pb::Geometry { data, parity }
    }
    fn from_wire(wire: pb::Geometry) -> Result<Self, WireError> {
        Self::new(wire.data, wire.parity).map_err(WireError::new)
    }
}
required!(Geometry => Geometry);

impl Wire<Option<pb::Position>> for (VolumeId, DatafileId) {
    fn to_wire(&self) -> Option<pb::Position> {
        Some(pb::Position {
            volume: self.0.to_wire(),
            datafile: self.1.to_wire(),
        })
    }
    fn from_wire(wire: Option<pb::Position>) -> Result<Self, WireError> {
        let wire = wire.ok_or_else(WireError::missing)?;
        Ok((
            Wire::from_wire(wire.volume)?,
            Wire::from_wire(wire.datafile)?,
        ))
    }
}

impl Wire<pb::BackendShard> for (EncodingRecord, u32) {
    fn to_wire(&self) -> pb::BackendShard {
        pb::BackendShard {
            record: self.0.to_wire(),
            shard: self.1,
        }
    }
    fn from_wire(wire: pb::BackendShard) -> Result<Self, WireError> {
        let record: EncodingRecord = Wire::from_wire(wire.record)?;
        check_shard(&record, wire.shard)?;
        Ok((record, wire.shard))
    }
}

/// The named shard must be one of the record.
pub(super) fn check_shard(record: &EncodingRecord, shard: u32) -> Result<(), WireError> {
    let total = record.geometry.total();
    if usize::try_from(shard).is_ok_and(|shard| shard < total) {
        Ok(())
    } else {
        Err(WireError::new(format_args!("shard {shard} of {total}")))
    }
}

fn check_record(record: &EncodingRecord) -> Result<(), WireError> {
    let (shards, total) = (record.shards.len(), record.geometry.total());
    if shards != total {
        let geometry = record.geometry;
        return Err(WireError::new(format_args!(
            "{shards} shards in a record of geometry {geometry}"
        )));
    }
    if record.chunk_bytes == 0 || record.piece_bytes == 0 {
        return Err(WireError::new("chunk_bytes and piece_bytes must not be 0"));
    }
    Ok(())
}

wire_struct!(Policy {
    geometry,
    survive_locations,
    survive_nodes
});
wire_struct!(Shard {
    backend,
    hash,
    state
});
wire_struct!(EncodingRecord {
    volume, datafile, stream, epoch, salt, geometry, chunk_bytes, plain_bytes, object_bytes,
    shard_bytes, piece_bytes, shards, version,
} check check_record);
wire_struct!(ClusterSettings {
    heartbeat_ms,
    suspect_after_ms,
    down_after_ms,
    lost_after_ms,
    scrub_interval_ms,
    scrub_bytes_per_s,
    tombstone_grace_ms,
    lease_ttl_ms,
    rebuilds_max,
});
wire_struct!(VolumeSettings {
    push_interval_ms,
    datafile_bytes,
    quota_bytes
});
wire_struct!(Head {
    datafile,
    recover_from
});
wire_struct!(Lease {
    client,
    holder,
    expires_ms
});
wire_struct!(Volume {
    id,
    name,
    policy,
    key_id,
    epoch,
    lease,
    head,
    settings,
    created_ms,
});
wire_struct!(ClientReport {
    at_risk_bytes,
    at_risk_age_s,
    local_bytes,
    push_blocked
});
wire_struct!(BackendAddress {
    endpoint,
    namespace,
    password,
    tls
});
wire_struct!(Backend {
    id,
    agent,
    location,
    node,
    address,
    capacity_bytes,
    verdict,
    verdict_since_ms,
    intent,
});
wire_struct!(BackendFacts {
    backend,
    healthy,
    problem,
    used_bytes,
    free_bytes,
    pieces,
    last_scrub_ms,
    scrub_percent,
    scrub_found,
    age_ms,
});
wire_struct!(Agent { id, location, node });
wire_struct!(Member {
    id,
    name,
    location,
    address,
    voter,
    healthy,
    leader
});
wire_struct!(ShardReport {
    volume,
    datafile,
    shard,
    backend,
    state,
    by_scrub
});
wire_struct!(PlacementAnswer {
    backends,
    full_policy,
    missing
});
wire_struct!(TokenInfo {
    prefix,
    role,
    expires_ms,
    used
});

wire_list!(Volume => VolumeList);
wire_list!(EncodingRecord => RecordList);
wire_list!(Backend => BackendList);
wire_list!(BackendFacts => BackendFactsList);
wire_list!(Agent => AgentList);
wire_list!((EncodingRecord, u32) => BackendShardList);
wire_list!(Member => MemberList);
wire_list!(TokenInfo => TokenList);

wire_struct!(Finding {
    name,
    subject,
    text,
    severity
});
wire_struct!(QuorumStatus {
    leader,
    voters,
    healthy,
    term,
    applied
});
wire_struct!(LossBudget {
    locations,
    nodes,
    backends
});
wire_struct!(VolumeStatus {
    name,
    policy,
    epoch,
    writer,
    head,
    datafiles,
    below_policy,
    unreadable,
    bytes,
    at_risk_bytes,
    at_risk_age_s,
    loss_budget,
});
wire_struct!(ResilverStatus {
    pending_shards,
    running,
    bytes_per_s,
    eta_s,
    waiting_for
});
wire_struct!(RotStatus {
    found_by_read,
    found_by_scrub,
    repaired
});
wire_struct!(BackendStatus {
    id,
    location,
    node,
    state,
    used_bytes,
    capacity_bytes,
    shards,
    last_scrub,
});
wire_struct!(Status {
    schema_version,
    verdict,
    findings,
    quorum,
    volumes,
    resilver,
    rot,
    backends,
});
