//! Reads and idempotent operations as one enum, so that the role table and the wire match over every verb.

use crate::api::{
    Agent, Backend, BackendFacts, ClusterSettings, Member, PlacementAnswer, TokenInfo, Volume,
};
use crate::status::Status;
use qsfs_zstor::id::{BackendId, DatafileId, MetadId, Stream, VolumeId, VolumeName};
use qsfs_zstor::record::EncodingRecord;

/// Everything that may be asked besides a `Mutation`. Asking twice does no harm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Query {
    Volume(VolumeName),
    VolumeById(VolumeId),
    Volumes,
    Records {
        volume: VolumeId,
        datafiles: Vec<DatafileId>,
    },
    ListRecords {
        volume: VolumeId,
        stream: Option<Stream>,
        after: DatafileId,
        limit: u32,
    },
    Backends,
    BackendFacts,
    Agents,
    BackendShards {
        backend: BackendId,
        after: (VolumeId, DatafileId),
        limit: u32,
    },
    Placement {
        volume: VolumeId,
        shard_bytes: u64,
    },
    Status,
    Members,
    Settings,
    Tokens,
    IssueClientCertificate {
        csr_pem: String,
        volume: Option<VolumeId>,
    },
    Scrub {
        backend: Option<BackendId>,
    },
    RemoveMember(MetadId),
    TransferLeader(MetadId),
    /// A signing request; who asks gets a certificate of the same identity.
    RenewCertificate(String),
    CertificateLife,
}

/// The answer to a [`Query`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Volume(Box<Volume>),
    Volumes(Vec<Volume>),
    Records(Vec<EncodingRecord>),
    Backends(Vec<Backend>),
    BackendFacts(Vec<BackendFacts>),
    Agents(Vec<Agent>),
    BackendShards(Vec<(EncodingRecord, u32)>),
    Placement(PlacementAnswer),
    Status(Box<Status>),
    Members(Vec<Member>),
    Settings(ClusterSettings),
    Tokens(Vec<TokenInfo>),
    Certificate(String),
    /// In ms.
    CertificateLife(u64),
    Done,
}
