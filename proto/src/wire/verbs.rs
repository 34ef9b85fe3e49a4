//! Wire forms of what is said: requests, answers, errors, session frames.

use super::nouns::check_shard;
use super::{Wire, WireError, pb, required, wire_oneof, wire_struct};
use crate::api::{
    AgentOrder, AgentReport, Applied, JoinGrant, JoinRequest, MetadError, Mutation, RebuildJob,
};
use crate::server::RequestId;
use crate::verb::{Answer, Query};
use crate::watch::{Change, WatchRequest};

wire_struct!(RequestId {
    client,
    session,
    sequence,
    oldest_pending
});
wire_struct!(JoinRequest {
    secret,
    role,
    csr_pem,
    name,
    location,
    address
});
wire_struct!(JoinGrant {
    cluster,
    cert_pem,
    ca_pem,
    endpoints,
    metad_id,
    ca_key_pem
});
wire_struct!(RebuildJob { record, shard, to } check check_job);

fn check_job(job: &RebuildJob) -> Result<(), WireError> {
    check_shard(&job.record, job.shard)
}

wire_oneof!(MetadError in metad_error;
    fields {
        Held = Held { holder, epoch },
        Fenced = Fenced { current },
        VersionConflict = VersionConflict { current },
        TooOld = TooOld { oldest },
    }
    values {
        NoSuchVolume, PolicyUnmet, NotFound, Exists, Denied, Token, Invalid, NoQuorum, Unknown,
        Unreachable, Busy,
    }
    units {}
);

wire_oneof!(Mutation in mutation;
    fields {
        CreateVolume = CreateVolume { id, name, policy, key_id, settings },
        AlterVolume = AlterVolume { volume, settings },
        DeleteVolume = DeleteVolume { volume },
        AcquireLease = AcquireLease { volume, client, holder, takeover },
        RenewLease = RenewLease { volume, epoch, report },
        ReleaseLease = ReleaseLease { volume, epoch },
        CommitDatafiles = CommitDatafiles { volume, epoch, records, head },
        ReleaseDatafiles = ReleaseDatafiles { volume, epoch, datafiles },
        SwapShard = SwapShard { volume, datafile, shard, from, to, version },
        ReportShards = ReportShards { reports },
        RegisterAgent = RegisterAgent { location, node },
        RegisterBackend = RegisterBackend { agent, address, capacity_bytes },
        SetBackendIntent = SetBackendIntent { backend, intent },
        CreateToken = CreateToken { hash, role, ttl_ms },
        RevokeToken = RevokeToken { prefix },
        SetCertificateLife = SetCertificateLife { life_ms },
    }
    values { SetSettings }
    units {}
);

wire_oneof!(Applied in applied;
    fields {}
    values { Volume, Epoch, Agent, Backend, Version }
    units { Done }
);

wire_oneof!(Query in query;
    fields {
        Records = AskRecords { volume, datafiles },
        ListRecords = AskListRecords { volume, stream, after, limit },
        BackendShards = AskBackendShards { backend, after, limit },
        Placement = AskPlacement { volume, shard_bytes },
        IssueClientCertificate = AskClientCertificate { csr_pem, volume },
        Scrub = AskScrub { backend },
    }
    values { Volume, VolumeById, RemoveMember, TransferLeader, RenewCertificate }
    units { Volumes, Backends, BackendFacts, Agents, Status, Members, Settings, Tokens, CertificateLife }
);

wire_oneof!(Answer in answer;
    fields {}
    values {
        Volume, Volumes, Records, Backends, BackendFacts, Agents, BackendShards, Placement, Status,
        Members, Settings, Tokens, Certificate, CertificateLife,
    }
    units { Done }
);

wire_oneof!(AgentOrder in agent_order;
    fields {
        DeleteShard = DeleteShard { backend, record, shard },
        Scrub = ScrubBackend { backend },
    }
    values { Rebuild, Settings, Backends }
    units {}
);

wire_oneof!(AgentReport in agent_report;
    fields {
        Heartbeat = Heartbeat { facts },
        RebuildDone = RebuildDone { volume, datafile, shard, bytes, error },
        ShardDeleted = ShardDeleted { backend, volume, datafile, salt, shard },
    }
    values {}
    units {}
);

wire_struct!(WatchRequest {
    after,
    volume,
    records,
    volumes,
    backends,
    settings
});

wire_oneof!(Change in change;
    fields { RecordRemoved = RecordRemoved { volume, datafile } }
    values { Volume, VolumeRemoved, Record, Backend, Settings }
    units {}
);
