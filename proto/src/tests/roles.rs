//! Every verb with every role, over real TLS. A new verb does not compile here until it has a row, and a new rpc fails the test.

use super::fake::{Cluster, Node, volume};
use crate::api::{
    BackendAddress, ClientReport, ClusterSettings, Intent, MetadError, Mutation, Role, ShardReport,
    VolumeSettings,
};
use crate::channel::{Versioned, connect, versioned};
use crate::identity::KeyRequest;
use crate::server::{CallError, RequestId};
use crate::tls::{grpc_client_config, grpc_join_config};
use crate::verb::Query;
use crate::watch::WatchRequest;
use crate::wire::pb::join_client::JoinClient;
use crate::wire::pb::metad_client::MetadClient as Stub;
use crate::wire::pb::raft_client::RaftClient;
use crate::wire::{Wire, error_of, pb};
use prost::Message as _;
use qsfs_zstor::id::{AgentId, BackendId, ClientId, DatafileId, Epoch, KeyId, MetadId, VolumeId};
use qsfs_zstor::record::ShardState;
use std::collections::BTreeSet;
use std::time::Duration;
use tonic::Status;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Caller {
    /// Without certificate.
    Stranger,
    Agent,
    /// A client of the volume that the verbs are about.
    Own,
    /// A client of another volume.
    Other,
    /// A client of all volumes.
    All,
    Admin,
    Metad,
}

use Caller::{Admin, Agent, All, Metad, Other, Own, Stranger};

const CALLERS: [Caller; 7] = [Stranger, Agent, Own, Other, All, Admin, Metad];

/// Who may.
type Row = &'static [Caller];
const ANYONE: Row = &CALLERS;
const CERTIFIED: Row = &[Agent, Own, Other, All, Admin, Metad];
const MEMBERS: Row = &[Agent, Own, Other, All, Admin];
const DATA: Row = &[Agent, Own, All, Admin];
const VOLUME: Row = &[Own, All, Admin];
const AGENTS: Row = &[Agent, Admin];
const SESSION: Row = &[Agent];
const ADMIN: Row = &[Admin];
const METADS: Row = &[Metad];

/// A sample of every variant beside its row; the match is exhaustive, so that none can be left out.
macro_rules! table {
    ($name:ident: $type:ident; $($pattern:pat => $row:ident, $sample:expr;)*) => {
        fn $name() -> Vec<($type, Row)> {
            fn covered(verb: &$type) {
                match verb { $($pattern => ()),* }
            }
            let rows: Vec<($type, Row)> = vec![$(($sample, $row)),*];
            rows.iter().for_each(|(verb, _)| covered(verb));
            rows
        }
    };
}

fn own() -> VolumeId {
    volume(1).id
}

table!(mutations: Mutation;
    Mutation::CreateVolume { .. } => ADMIN, Mutation::CreateVolume {
        id: own(), name: "v1".parse().unwrap(), policy: volume(1).policy,
        key_id: KeyId::from_bytes([1; 16]), settings: VolumeSettings::default(),
    };
    Mutation::AlterVolume { .. } => ADMIN,
        Mutation::AlterVolume { volume: own(), settings: VolumeSettings::default() };
    Mutation::DeleteVolume { .. } => ADMIN, Mutation::DeleteVolume { volume: own() };
    Mutation::AcquireLease { .. } => VOLUME, Mutation::AcquireLease {
        volume: own(), client: ClientId::from_bytes([1; 16]), holder: "h:1".into(), takeover: false,
    };
    Mutation::RenewLease { .. } => VOLUME, Mutation::RenewLease {
        volume: own(), epoch: Epoch(1), report: ClientReport::default(),
    };
    Mutation::ReleaseLease { .. } => VOLUME,
        Mutation::ReleaseLease { volume: own(), epoch: Epoch(1) };
    Mutation::CommitDatafiles { .. } => VOLUME, Mutation::CommitDatafiles {
        volume: own(), epoch: Epoch(1), records: vec![], head: None,
    };
    Mutation::ReleaseDatafiles { .. } => VOLUME, Mutation::ReleaseDatafiles {
        volume: own(), epoch: Epoch(1), datafiles: vec![DatafileId(1)],
    };
    Mutation::SwapShard { .. } => AGENTS, Mutation::SwapShard {
        volume: own(), datafile: DatafileId(1), shard: 0, from: BackendId(1), to: BackendId(2), version: 0,
    };
    Mutation::ReportShards { .. } => DATA, Mutation::ReportShards {
        reports: vec![ShardReport {
            volume: own(), datafile: DatafileId(1), shard: 0, backend: BackendId(1),
            state: ShardState::Missing, by_scrub: false,
        }],
    };
    Mutation::RegisterAgent { .. } => AGENTS, Mutation::RegisterAgent {
        location: "loc1".parse().unwrap(), node: "n1".parse().unwrap(),
    };
    Mutation::RegisterBackend { .. } => AGENTS, Mutation::RegisterBackend {
        agent: AgentId(1),
        address: BackendAddress {
            endpoint: "h:1".into(), namespace: "n".into(), password: None, tls: true,
        },
        capacity_bytes: 1,
    };
    Mutation::SetBackendIntent { .. } => ADMIN,
        Mutation::SetBackendIntent { backend: BackendId(1), intent: Intent::Drain };
    Mutation::SetSettings(_) => ADMIN, Mutation::SetSettings(ClusterSettings::default());
    Mutation::CreateToken { .. } => ADMIN,
        Mutation::CreateToken { hash: [1; 32], role: Role::Agent, ttl_ms: 1 };
    Mutation::RevokeToken { .. } => ADMIN, Mutation::RevokeToken { prefix: "a".into() };
    Mutation::SetCertificateLife { .. } => ADMIN, Mutation::SetCertificateLife { life_ms: 1 };
);

table!(queries: Query;
    Query::Volume(_) => DATA, Query::Volume("v1".parse().unwrap());
    Query::VolumeById(_) => DATA, Query::VolumeById(own());
    Query::Volumes => MEMBERS, Query::Volumes;
    Query::Records { .. } => DATA,
        Query::Records { volume: own(), datafiles: vec![DatafileId(1)] };
    Query::ListRecords { .. } => DATA, Query::ListRecords {
        volume: own(), stream: None, after: DatafileId(0), limit: 1,
    };
    Query::Backends => MEMBERS, Query::Backends;
    Query::BackendFacts => MEMBERS, Query::BackendFacts;
    Query::Agents => MEMBERS, Query::Agents;
    Query::BackendShards { .. } => AGENTS, Query::BackendShards {
        backend: BackendId(1), after: (own(), DatafileId(0)), limit: 1,
    };
    Query::Placement { .. } => VOLUME, Query::Placement { volume: own(), shard_bytes: 1 };
    Query::Status => MEMBERS, Query::Status;
    Query::Members => MEMBERS, Query::Members;
    Query::Settings => MEMBERS, Query::Settings;
    Query::Tokens => ADMIN, Query::Tokens;
    Query::IssueClientCertificate { .. } => ADMIN, Query::IssueClientCertificate {
        csr_pem: KeyRequest::new().unwrap().csr_pem().to_owned(), volume: Some(own()),
    };
    Query::Scrub { .. } => ADMIN, Query::Scrub { backend: None };
    Query::RemoveMember(_) => ADMIN, Query::RemoveMember(MetadId(9));
    Query::TransferLeader(_) => ADMIN, Query::TransferLeader(MetadId(9));
    Query::RenewCertificate(_) => MEMBERS,
        Query::RenewCertificate(KeyRequest::new().unwrap().csr_pem().to_owned());
    Query::CertificateLife => MEMBERS, Query::CertificateLife;
);

/// The calls of every service, by name as in the schema.
const RPCS: [(&str, Row); 9] = [
    ("Join", ANYONE),
    ("Hello", CERTIFIED),
    // Their rows are those of the verbs.
    ("Mutate", MEMBERS),
    // Each mutation in it is asked about by itself.
    ("Mutations", CERTIFIED),
    ("Ask", MEMBERS),
    ("AgentSession", SESSION),
    ("Watch", MEMBERS),
    // Raft's.
    ("Call", METADS),
    ("Calls", METADS),
];

struct Door {
    stub: Stub<Versioned>,
    raft: RaftClient<Versioned>,
    join: JoinClient<Versioned>,
}

async fn door(cluster: &Cluster, node: &Node, caller: Caller) -> Door {
    let subject = |role, subject: &str| cluster.ca.issue(role, subject).unwrap();
    let identity = match caller {
        Stranger => None,
        Agent => Some(subject(Role::Agent, "loc1/n1")),
        Own => Some(subject(Role::Client, &own().to_string())),
        Other => Some(subject(Role::Client, &volume(2).id.to_string())),
        All => Some(subject(Role::Client, "*")),
        Admin => Some(subject(Role::Admin, "root")),
        Metad => Some(subject(Role::Metad, "7")),
    };
    let config = match &identity {
        Some(identity) => grpc_client_config(identity).unwrap(),
        None => grpc_join_config(cluster.ca.fingerprint()).unwrap(),
    };
    let channel = connect(&node.address, config, Duration::from_secs(10));
    let channel = channel.await.unwrap();
    Door {
        stub: Stub::new(versioned(channel.clone())),
        raft: RaftClient::new(versioned(channel.clone())),
        join: JoinClient::new(versioned(channel)),
    }
}

/// Denied, or else whatever was said (a permitted call may fail for other reasons).
fn permitted<T>(ended: Result<T, Status>) -> bool {
    match ended {
        Ok(_) => true,
        Err(status) => match error_of(&status) {
            Some(error) => !matches!(error, CallError::Refused(MetadError::Denied(_))),
            None => panic!("not an answer: {status:?}"),
        },
    }
}

#[tokio::test]
async fn every_verb_is_for_its_roles_and_no_other() {
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    let mut sequence = 0;
    for caller in CALLERS {
        let mut door = door(&cluster, &node, caller).await;
        for (mutation, row) in mutations() {
            sequence += 1;
            let id = RequestId {
                client: ClientId::from_bytes([1; 16]),
                session: 1,
                sequence,
                oldest_pending: 1,
            };
            let before = cluster.applied();
            let ended = door.stub.mutate(pb::MutateRequest {
                id: id.to_wire(),
                mutation: mutation.to_wire(),
            });
            let may = permitted(ended.await);
            assert_eq!(may, row.contains(&caller), "{caller:?}: {mutation:?}");
            assert_eq!(cluster.applied() > before, may, "{caller:?}: {mutation:?}");
            // The same in a stream of mutations.
            sequence += 1;
            let request = pb::MutateRequest {
                id: RequestId { sequence, ..id }.to_wire(),
                mutation: mutation.to_wire(),
            };
            let before = cluster.applied();
            let calls = futures::stream::iter([pb::MutateCall {
                call: 1,
                request: request.encode_to_vec().into(),
            }]);
            if let Ok(replies) = door.stub.mutations(calls).await {
                let reply = replies.into_inner().message().await;
                assert!(reply.is_ok_and(|reply| reply.is_some()));
            }
            assert_eq!(cluster.applied() > before, may, "{caller:?}: {mutation:?}");
        }
        for (query, row) in queries() {
            for stale in [false, true] {
                let ended = door.stub.ask(pb::AskRequest {
                    stale,
                    query: query.to_wire(),
                });
                let may = permitted(ended.await);
                assert_eq!(may, row.contains(&caller), "{caller:?}: {query:?}");
            }
        }
    }
    node.stop().await;
}

async fn call(door: &mut Door, rpc: &str) -> bool {
    match rpc {
        "Join" => {
            let request = pb::JoinRequest {
                role: 2,
                csr_pem: KeyRequest::new().unwrap().csr_pem().to_owned(),
                name: "n1".into(),
                location: "loc1".into(),
                ..Default::default()
            };
            permitted(door.join.join(request).await)
        }
        "Hello" => permitted(door.stub.hello(pb::HelloRequest {}).await),
        "Mutate" => {
            let report = Mutation::ReportShards { reports: vec![] };
            let id = RequestId {
                client: ClientId::from_bytes([2; 16]),
                session: 1,
                sequence: 1,
                oldest_pending: 1,
            };
            let request = pb::MutateRequest {
                id: id.to_wire(),
                mutation: report.to_wire(),
            };
            permitted(door.stub.mutate(request).await)
        }
        "Mutations" => {
            let calls = futures::stream::iter([pb::MutateCall::default()]);
            permitted(door.stub.mutations(calls).await)
        }
        "Ask" => {
            let request = pb::AskRequest {
                stale: false,
                query: Query::Volumes.to_wire(),
            };
            permitted(door.stub.ask(request).await)
        }
        "AgentSession" => {
            let kind = Some(pb::session_frame::Kind::Open(1));
            let frames = futures::stream::iter([pb::SessionFrame { kind }]);
            permitted(door.stub.agent_session(frames).await)
        }
        "Watch" => {
            let request: pb::WatchRequest = WatchRequest::everything(None).to_wire();
            permitted(door.stub.watch(request).await)
        }
        "Call" => {
            let request = pb::RaftMessage {
                target: 1,
                rpc: 1,
                payload: Default::default(),
            };
            permitted(door.raft.call(request).await)
        }
        "Calls" => {
            let calls = futures::stream::iter([pb::RaftCall::default()]);
            permitted(door.raft.calls(calls).await)
        }
        other => panic!("no way to call {other}"),
    }
}

#[tokio::test]
async fn every_rpc_is_for_its_roles_and_no_other() {
    let schema = include_str!("../../proto/qsfs.proto");
    let names = schema.lines().filter_map(|line| {
        let rest = line.trim().strip_prefix("rpc ")?;
        Some(rest.split_once('(')?.0)
    });
    let rows = RPCS.iter().map(|(name, _)| *name);
    assert_eq!(names.collect::<BTreeSet<_>>(), rows.collect());
    let cluster = Cluster::new();
    let node = Node::start(&cluster, 1).await;
    cluster.lead(Some(&node));
    for caller in CALLERS {
        let mut door = door(&cluster, &node, caller).await;
        for (rpc, row) in RPCS {
            let may = call(&mut door, rpc).await;
            assert_eq!(may, row.contains(&caller), "{caller:?}: {rpc}");
        }
    }
    node.stop().await;
}
