//! Every conversion there and back, and bytes that nobody of ours sent.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::{Wire, error_of, pb, status_of};
use crate::api::{
    Agent, AgentOrder, AgentReport, Applied, Backend, BackendAddress, BackendFacts, ClientReport,
    ClusterSettings, Head, Intent, JoinGrant, JoinRequest, Lease, Member, MetadError, Mutation,
    PlacementAnswer, RebuildJob, Role, Secret, ShardReport, TokenInfo, Verdict, Volume,
    VolumeSettings,
};
use crate::server::{CallError, RequestId};
use crate::status::{
    BackendStatus, Finding, LossBudget, QuorumStatus, ResilverStatus, RotStatus, Status,
    StatusVerdict, VolumeStatus,
};
use crate::verb::{Answer, Query};
use crate::watch::{Change, WatchRequest};
use proptest::prelude::{any, proptest};
use prost::Message;
use qsfs_zstor::id::{
    AgentId, BackendId, ClientId, ClusterId, DatafileId, Epoch, KeyId, LocationName, MetadId,
    NodeName, Salt, ShardHash, Stream, VolumeId, VolumeName,
};
use qsfs_zstor::policy::{Geometry, Policy};
use qsfs_zstor::record::{EncodingRecord, Shard, ShardState};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fmt::Debug;

/// A random valid value.
trait Arb {
    fn arb(rng: &mut StdRng) -> Self;
}

macro_rules! arb_numbers {
    ($($type:ty),*) => { $(impl Arb for $type {
        fn arb(rng: &mut StdRng) -> Self {
            // Small, large and 0 all matter to varints and defaults.
            match rng.random_range(0..3) { 0 => 0, 1 => rng.random_range(0..3), _ => rng.random() }
        }
    })* };
}
arb_numbers!(u8, u32, u64);

macro_rules! arb_ids {
    ($($type:ident),*) => { $(impl Arb for $type {
        fn arb(rng: &mut StdRng) -> Self { Self::random(rng) }
    })* };
}
arb_ids!(ClusterId, VolumeId, KeyId, ClientId, Salt, ShardHash);

macro_rules! arb_newtypes {
    ($($type:ident),*) => { $(impl Arb for $type {
        fn arb(rng: &mut StdRng) -> Self { Self(Arb::arb(rng)) }
    })* };
}
arb_newtypes!(MetadId, AgentId, BackendId, DatafileId, Epoch, Secret);

macro_rules! arb_names {
    ($($type:ident),*) => { $(impl Arb for $type {
        fn arb(rng: &mut StdRng) -> Self { format!("n{}", rng.random::<u64>()).parse().unwrap() }
    })* };
}
arb_names!(LocationName, NodeName, VolumeName);

macro_rules! arb_struct {
    ($type:ident { $($field:ident),* $(,)? }) => {
        impl Arb for $type {
            fn arb(rng: &mut StdRng) -> Self { Self { $($field: Arb::arb(rng)),* } }
        }
    };
}

macro_rules! arb_enum {
    ($type:ident: $($make:expr),* $(,)?) => {
        impl Arb for $type {
            fn arb(rng: &mut StdRng) -> Self {
                let makers: &[fn(&mut StdRng) -> $type] = &[$($make),*];
                makers[rng.random_range(0..makers.len())](rng)
            }
        }
    };
}

impl Arb for bool {
    fn arb(rng: &mut StdRng) -> Self {
        rng.random()
    }
}
impl Arb for String {
    fn arb(rng: &mut StdRng) -> Self {
        (0..rng.random_range(0..20))
            .map(|_| rng.random::<char>())
            .collect()
    }
}
impl Arb for [u8; 32] {
    fn arb(rng: &mut StdRng) -> Self {
        rng.random()
    }
}
impl<T: Arb> Arb for Option<T> {
    fn arb(rng: &mut StdRng) -> Self {
        rng.random::<bool>().then(|| T::arb(rng))
    }
}
impl<T: Arb> Arb for Vec<T> {
    fn arb(rng: &mut StdRng) -> Self {
        (0..rng.random_range(0..4)).map(|_| T::arb(rng)).collect()
    }
}
impl<T: Arb> Arb for Box<T> {
    fn arb(rng: &mut StdRng) -> Self {
        Self::new(T::arb(rng))
    }
}
impl<A: Arb, B: Arb> Arb for (A, B) {
    fn arb(rng: &mut StdRng) -> Self {
        (A::arb(rng), B::arb(rng))
    }
}
impl Arb for Geometry {
    fn arb(rng: &mut StdRng) -> Self {
        Self::new(rng.random_range(1..17), rng.random_range(1..17)).unwrap()
    }
}
impl Arb for EncodingRecord {
    fn arb(rng: &mut StdRng) -> Self {
        let geometry = Geometry::arb(rng);
        Self {
            volume: Arb::arb(rng),
            datafile: Arb::arb(rng),
            stream: Arb::arb(rng),
            epoch: Arb::arb(rng),
            salt: Arb::arb(rng),
            geometry,
            chunk_bytes: rng.random_range(1..u32::MAX),
            plain_bytes: Arb::arb(rng),
            object_bytes: Arb::arb(rng),
            shard_bytes: Arb::arb(rng),
            piece_bytes: rng.random_range(1..u32::MAX),
            shards: (0..geometry.total()).map(|_| Arb::arb(rng)).collect(),
            version: Arb::arb(rng),
        }
    }
}
/// A record and one of its shards.
fn record_and_shard(rng: &mut StdRng) -> (EncodingRecord, u32) {
    let record = EncodingRecord::arb(rng);
    let total = u32::try_from(record.geometry.total()).unwrap();
    (record, rng.random_range(0..total))
}
impl Arb for RebuildJob {
    fn arb(rng: &mut StdRng) -> Self {
        let (record, shard) = record_and_shard(rng);
        Self {
            record,
            shard,
            to: Arb::arb(rng),
        }
    }
}

arb_enum!(Role: |_| Role::Metad, |_| Role::Agent, |_| Role::Client, |_| Role::Admin);
arb_enum!(Stream: |_| Stream::Data, |_| Stream::Meta);
arb_enum!(ShardState: |_| ShardState::Stored, |_| ShardState::Missing, |_| ShardState::Corrupt);
arb_enum!(Verdict: |_| Verdict::Up, |_| Verdict::Suspect, |_| Verdict::Down, |_| Verdict::Lost);
arb_enum!(Intent: |_| Intent::Serve, |_| Intent::Drain, |_| Intent::Retire);
arb_enum!(StatusVerdict: |_| StatusVerdict::Ok, |_| StatusVerdict::Warning, |_| StatusVerdict::Critical);
arb_struct!(Policy {
    geometry,
    survive_locations,
    survive_nodes
});
arb_struct!(Shard {
    backend,
    hash,
    state
});
arb_struct!(ClusterSettings {
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
arb_struct!(VolumeSettings {
    push_interval_ms,
    datafile_bytes,
    quota_bytes
});
arb_struct!(Head {
    datafile,
    recover_from
});
arb_struct!(Lease {
    client,
    holder,
    expires_ms
});
arb_struct!(Volume {
    id,
    name,
    policy,
    key_id,
    epoch,
    lease,
    head,
    settings,
    created_ms
});
arb_struct!(ClientReport {
    at_risk_bytes,
    at_risk_age_s,
    local_bytes,
    push_blocked
});
arb_struct!(BackendAddress {
    endpoint,
    namespace,
    password,
    tls
});
arb_struct!(Backend {
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
arb_struct!(BackendFacts {
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
arb_struct!(Agent { id, location, node });
arb_struct!(Member {
    id,
    name,
    location,
    address,
    voter,
    healthy,
    leader
});
arb_struct!(ShardReport {
    volume,
    datafile,
    shard,
    backend,
    state,
    by_scrub
});
arb_struct!(PlacementAnswer {
    backends,
    full_policy,
    missing
});
arb_struct!(TokenInfo {
    prefix,
    role,
    expires_ms,
    used
});
arb_struct!(RequestId {
    client,
    session,
    sequence,
    oldest_pending
});
arb_struct!(JoinRequest {
    secret,
    role,
    csr_pem,
    name,
    location,
    address
});
arb_struct!(JoinGrant {
    cluster,
    cert_pem,
    ca_pem,
    endpoints,
    metad_id,
    ca_key_pem
});
arb_struct!(Finding {
    name,
    subject,
    text,
    severity
});
arb_struct!(QuorumStatus {
    leader,
    voters,
    healthy,
    term,
    applied
});
arb_struct!(LossBudget {
    locations,
    nodes,
    backends
});
arb_struct!(VolumeStatus {
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
arb_struct!(ResilverStatus {
    pending_shards,
    running,
    bytes_per_s,
    eta_s,
    waiting_for
});
arb_struct!(RotStatus {
    found_by_read,
    found_by_scrub,
    repaired
});
arb_struct!(BackendStatus {
    id,
    location,
    node,
    state,
    used_bytes,
    capacity_bytes,
    shards,
    last_scrub,
});
arb_struct!(Status {
    schema_version,
    verdict,
    findings,
    quorum,
    volumes,
    resilver,
    rot,
    backends,
});
arb_enum!(MetadError:
    |r| Self::NoSuchVolume(Arb::arb(r)),
    |r| Self::Held { holder: Arb::arb(r), epoch: Arb::arb(r) },
    |r| Self::Fenced { current: Arb::arb(r) },
    |r| Self::PolicyUnmet(Arb::arb(r)),
    |r| Self::VersionConflict { current: Arb::arb(r) },
    |r| Self::NotFound(Arb::arb(r)),
    |r| Self::Exists(Arb::arb(r)),
    |r| Self::Denied(Arb::arb(r)),
    |r| Self::Token(Arb::arb(r)),
    |r| Self::Invalid(Arb::arb(r)),
    |r| Self::NoQuorum(Arb::arb(r)),
    |r| Self::Unknown(Arb::arb(r)),
    |r| Self::Unreachable(Arb::arb(r)),
    |r| Self::TooOld { oldest: Arb::arb(r) },
    |r| Self::Busy(Arb::arb(r)),
);
arb_struct!(WatchRequest {
    after,
    volume,
    records,
    volumes,
    backends,
    settings
});
arb_enum!(Change:
    |r| Self::Volume(Arb::arb(r)),
    |r| Self::VolumeRemoved(Arb::arb(r)),
    |r| Self::Record(Arb::arb(r)),
    |r| Self::RecordRemoved { volume: Arb::arb(r), datafile: Arb::arb(r) },
    |r| Self::Backend(Arb::arb(r)),
    |r| Self::Settings(Arb::arb(r)),
);
arb_enum!(Mutation:
    |r| Self::CreateVolume {
        id: Arb::arb(r), name: Arb::arb(r), policy: Arb::arb(r), key_id: Arb::arb(r), settings: Arb::arb(r),
    },
    |r| Self::AlterVolume { volume: Arb::arb(r), settings: Arb::arb(r) },
    |r| Self::DeleteVolume { volume: Arb::arb(r) },
    |r| Self::AcquireLease {
        volume: Arb::arb(r), client: Arb::arb(r), holder: Arb::arb(r), takeover: Arb::arb(r),
    },
    |r| Self::RenewLease { volume: Arb::arb(r), epoch: Arb::arb(r), report: Arb::arb(r) },
    |r| Self::ReleaseLease { volume: Arb::arb(r), epoch: Arb::arb(r) },
    |r| Self::CommitDatafiles {
        volume: Arb::arb(r), epoch: Arb::arb(r), records: Arb::arb(r), head: Arb::arb(r),
    },
    |r| Self::ReleaseDatafiles { volume: Arb::arb(r), epoch: Arb::arb(r), datafiles: Arb::arb(r) },
    |r| Self::SwapShard {
        volume: Arb::arb(r), datafile: Arb::arb(r), shard: Arb::arb(r), from: Arb::arb(r),
        to: Arb::arb(r), version: Arb::arb(r),
    },
    |r| Self::ReportShards { reports: Arb::arb(r) },
    |r| Self::RegisterAgent { location: Arb::arb(r), node: Arb::arb(r) },
    |r| Self::RegisterBackend { agent: Arb::arb(r), address: Arb::arb(r), capacity_bytes: Arb::arb(r) },
    |r| Self::SetBackendIntent { backend: Arb::arb(r), intent: Arb::arb(r) },
    |r| Self::SetSettings(Arb::arb(r)),
    |r| Self::CreateToken { hash: Arb::arb(r), role: Arb::arb(r), ttl_ms: Arb::arb(r) },
    |r| Self::RevokeToken { prefix: Arb::arb(r) },
    |r| Self::SetCertificateLife { life_ms: Arb::arb(r) },
);
arb_enum!(Applied:
    |_| Self::Done,
    |r| Self::Volume(Arb::arb(r)),
    |r| Self::Epoch(Arb::arb(r)),
    |r| Self::Agent(Arb::arb(r)),
    |r| Self::Backend(Arb::arb(r)),
    |r| Self::Version(Arb::arb(r)),
);
arb_enum!(Query:
    |r| Self::Volume(Arb::arb(r)),
    |r| Self::VolumeById(Arb::arb(r)),
    |_| Self::Volumes,
    |r| Self::Records { volume: Arb::arb(r), datafiles: Arb::arb(r) },
    |r| Self::ListRecords {
        volume: Arb::arb(r), stream: Arb::arb(r), after: Arb::arb(r), limit: Arb::arb(r),
    },
    |_| Self::Backends,
    |_| Self::BackendFacts,
    |_| Self::Agents,
    |r| Self::BackendShards { backend: Arb::arb(r), after: Arb::arb(r), limit: Arb::arb(r) },
    |r| Self::Placement { volume: Arb::arb(r), shard_bytes: Arb::arb(r) },
    |_| Self::Status,
    |_| Self::Members,
    |_| Self::Settings,
    |_| Self::Tokens,
    |r| Self::IssueClientCertificate { csr_pem: Arb::arb(r), volume: Arb::arb(r) },
    |r| Self::Scrub { backend: Arb::arb(r) },
    |r| Self::RemoveMember(Arb::arb(r)),
    |r| Self::TransferLeader(Arb::arb(r)),
    |r| Self::RenewCertificate(Arb::arb(r)),
    |_| Self::CertificateLife,
);
arb_enum!(Answer:
    |r| Self::Volume(Arb::arb(r)),
    |r| Self::Volumes(Arb::arb(r)),
    |r| Self::Records(Arb::arb(r)),
    |r| Self::Backends(Arb::arb(r)),
    |r| Self::BackendFacts(Arb::arb(r)),
    |r| Self::Agents(Arb::arb(r)),
    |r| Self::BackendShards(vec![record_and_shard(r), record_and_shard(r)]),
    |r| Self::Placement(Arb::arb(r)),
    |r| Self::Status(Arb::arb(r)),
    |r| Self::Members(Arb::arb(r)),
    |r| Self::Settings(Arb::arb(r)),
    |r| Self::Tokens(Arb::arb(r)),
    |r| Self::Certificate(Arb::arb(r)),
    |r| Self::CertificateLife(Arb::arb(r)),
    |_| Self::Done,
);
arb_enum!(AgentOrder:
    |r| Self::Rebuild(Arb::arb(r)),
    |r| {
        let (record, shard) = record_and_shard(r);
        Self::DeleteShard { backend: Arb::arb(r), record, shard }
    },
    |r| Self::Scrub { backend: Arb::arb(r) },
    |r| Self::Settings(Arb::arb(r)),
    |r| Self::Backends(Arb::arb(r)),
);
arb_enum!(AgentReport:
    |r| Self::Heartbeat { facts: Arb::arb(r) },
    |r| Self::RebuildDone {
        volume: Arb::arb(r), datafile: Arb::arb(r), shard: Arb::arb(r), bytes: Arb::arb(r), error: Arb::arb(r),
    },
    |r| Self::ShardDeleted {
        backend: Arb::arb(r), volume: Arb::arb(r), datafile: Arb::arb(r), salt: Arb::arb(r), shard: Arb::arb(r),
    },
);

fn there_and_back<P: Message + Default, D: Wire<P> + Arb + PartialEq + Debug>(rng: &mut StdRng) {
    let value = D::arb(rng);
    let bytes = value.to_wire().encode_to_vec();
    let back = D::from_wire(P::decode(bytes.as_slice()).unwrap());
    assert_eq!(back.as_ref(), Ok(&value));
    // A damaged message is another value or an error, never a panic.
    let mut damaged = bytes;
    for _ in 0..4 {
        if !damaged.is_empty() {
            let at = rng.random_range(0..damaged.len());
            damaged[at] = rng.random();
        }
    }
    hostile::<P, D>(&damaged);
}

fn hostile<P: Message + Default, D: Wire<P>>(bytes: &[u8]) {
    if let Ok(message) = P::decode(bytes)
        && let Err(error) = D::from_wire(message)
    {
        assert!(!error.to_string().is_empty());
    }
}

proptest! {
    #[test]
    fn every_message_says_what_was_meant(seed: u64) {
        let rng = &mut StdRng::seed_from_u64(seed);
        there_and_back::<pb::Mutation, Mutation>(rng);
        there_and_back::<pb::Applied, Applied>(rng);
        there_and_back::<pb::Query, Query>(rng);
        there_and_back::<pb::Answer, Answer>(rng);
        there_and_back::<pb::AgentOrder, AgentOrder>(rng);
        there_and_back::<pb::AgentReport, AgentReport>(rng);
        there_and_back::<pb::MetadError, MetadError>(rng);
        there_and_back::<pb::JoinRequest, JoinRequest>(rng);
        there_and_back::<pb::JoinGrant, JoinGrant>(rng);
        there_and_back::<pb::RequestId, RequestId>(rng);
        there_and_back::<pb::WatchRequest, WatchRequest>(rng);
        there_and_back::<pb::Change, Change>(rng);
    }

    #[test]
    fn errors_are_carried_whole(seed: u64) {
        let rng = &mut StdRng::seed_from_u64(seed);
        let refused = CallError::Refused(Arb::arb(rng));
        assert_eq!(error_of(&status_of(&refused)), Some(refused));
        let decided = CallError::Decided(Arb::arb(rng));
        assert_eq!(error_of(&status_of(&decided)), Some(decided));
        let other = CallError::NotLeader { leader: Arb::arb(rng) };
        assert_eq!(error_of(&status_of(&other)), Some(other));
    }

    #[test]
    fn no_bytes_make_a_conversion_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        hostile::<pb::Mutation, Mutation>(&bytes);
        hostile::<pb::Answer, Answer>(&bytes);
        hostile::<pb::AgentOrder, AgentOrder>(&bytes);
        hostile::<pb::AgentReport, AgentReport>(&bytes);
        hostile::<pb::JoinRequest, JoinRequest>(&bytes);
        hostile::<pb::WatchRequest, WatchRequest>(&bytes);
        hostile::<pb::Change, Change>(&bytes);
    }
}

#[test]
fn records_that_contradict_themselves_are_refused() {
    let rng = &mut StdRng::seed_from_u64(1);
    let good = EncodingRecord::arb(rng);
    let refuse = |change: fn(&mut pb::EncodingRecord)| {
        let mut wire: pb::EncodingRecord = good.to_wire();
        change(&mut wire);
        EncodingRecord::from_wire(wire).unwrap_err().to_string()
    };
    assert!(refuse(|wire| drop(wire.shards.pop())).contains("shards in a record"));
    assert!(refuse(|wire| wire.geometry = None).starts_with("geometry: missing"));
    assert!(refuse(|wire| wire.chunk_bytes = 0).contains("chunk_bytes"));
    assert!(refuse(|wire| wire.volume.push(0)).starts_with("volume: 17 bytes"));
    assert!(refuse(|wire| wire.stream = 99).starts_with("stream: missing"));
    let hash = refuse(|wire| wire.shards[0].hash.clear());
    assert!(
        hash.starts_with("shards.hash") || hash.contains("bytes"),
        "{hash}"
    );
}

#[test]
fn lists_and_texts_beyond_their_limits_are_refused() {
    let facts = vec![pb::BackendFacts::default(); super::LIST_MAX + 1];
    let report = pb::AgentReport {
        kind: Some(pb::agent_report::Kind::Heartbeat(pb::Heartbeat { facts })),
    };
    assert!(AgentReport::from_wire(report).is_err());
    let request = pb::JoinRequest {
        csr_pem: "x".repeat(super::TEXT_BYTES_MAX + 1),
        role: 1,
        ..Default::default()
    };
    assert!(JoinRequest::from_wire(request).is_err());
    let long = MetadError::Invalid("é".repeat(super::TEXT_BYTES_MAX));
    let Some(CallError::Refused(MetadError::Invalid(text))) = error_of(&status_of(&long.into()))
    else {
        panic!("another error");
    };
    assert!(text.len() <= super::ERROR_TEXT_BYTES_MAX && !text.is_empty());
}
