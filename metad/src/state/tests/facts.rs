use super::*;
use crate::state::command::{Admission, Reply};
use crate::state::tombstones::Place;
use qsfs_proto::api::{Head, Intent, MetadError, Role, ShardReport, Verdict};

fn commit(epoch: Epoch, records: Vec<EncodingRecord>, head: Option<Head>) -> Mutation {
    Mutation::CommitDatafiles {
        volume: VOLUME,
        epoch,
        records,
        head,
    }
}

fn swap(datafile: u64, shard: u32, (from, to): (u64, u64), version: u64) -> Mutation {
    Mutation::SwapShard {
        volume: VOLUME,
        datafile: DatafileId(datafile),
        shard,
        from: BackendId(from),
        to: BackendId(to),
        version,
    }
}

fn head(datafile: u64, recover_from: u64) -> Option<Head> {
    Some(Head {
        datafile: DatafileId(datafile),
        recover_from: DatafileId(recover_from),
    })
}

#[test]
fn a_retry_gets_the_first_answer_and_is_not_applied_again() {
    let mut twin = Twin::new();
    let entry = Entry {
        time_ms: 2_000,
        request: Some(request(1, 5)),
        command: Command::Mutation(Mutation::AcquireLease {
            volume: VOLUME,
            client: client(1),
            holder: "h:1".into(),
            takeover: false,
        }),
    };
    let first = twin.apply(&entry);
    assert_eq!(twin.apply(&entry), first);
    assert_eq!(
        twin.state().volume(VOLUME).unwrap().unwrap().epoch,
        Epoch(1)
    );
}

#[test]
fn requests_may_arrive_out_of_order_but_none_that_the_client_gave_up() {
    let mut twin = Twin::new();
    let entry = |sequence| Entry {
        time_ms: 2_000,
        request: Some(request(1, sequence)),
        command: Command::Mutation(Mutation::SetSettings(ClusterSettings::default())),
    };
    assert!(twin.apply(&entry(300)).is_ok());
    assert!(twin.apply(&entry(299)).is_ok());
    assert!(matches!(
        twin.apply(&entry(10)),
        Err(MetadError::Unknown(_))
    ));
}

#[test]
fn a_stale_epoch_is_refused_for_commit_release_and_renewal() {
    let mut twin = Twin::new();
    let old = twin.acquire(1, false).unwrap();
    assert!(twin.acquire(2, false).is_err(), "held");
    let new = twin.acquire(2, true).unwrap();
    assert!(new > old);
    let fenced = Err(MetadError::Fenced { current: new });
    let records = vec![record(1, Stream::Data, &[1, 2, 3, 4])];
    assert_eq!(twin.mutate(commit(old, records, None)), fenced);
    let renewal = Mutation::RenewLease {
        volume: VOLUME,
        epoch: old,
        report: Default::default(),
    };
    assert_eq!(twin.mutate(renewal), fenced);
    let release = Mutation::ReleaseDatafiles {
        volume: VOLUME,
        epoch: old,
        datafiles: vec![DatafileId(1)],
    };
    assert_eq!(twin.mutate(release), fenced);
}

#[test]
fn the_same_client_gets_its_lease_back_at_once_under_a_new_epoch() {
    let mut twin = Twin::new();
    let first = twin.acquire(1, false).unwrap();
    assert_eq!(twin.acquire(1, false), Ok(first.next()));
    twin.now_ms += ClusterSettings::default().lease_ttl_ms;
    assert_eq!(twin.acquire(2, false), Ok(first.next().next()));
}

#[test]
fn a_commit_is_all_or_nothing() {
    let mut twin = Twin::new();
    let epoch = twin.acquire(1, false).unwrap();
    let before = twin.state().volume_totals(VOLUME).unwrap();
    let records = vec![
        record(1, Stream::Data, &[1, 2, 3, 4]),
        record(2, Stream::Data, &[1, 1, 1, 4]),
    ];
    assert!(matches!(
        twin.mutate(commit(epoch, records, None)),
        Err(MetadError::PolicyUnmet(_))
    ));
    assert_eq!(twin.state().volume_totals(VOLUME).unwrap(), before);
    assert_eq!(twin.state().record(VOLUME, DatafileId(1)).unwrap(), None);
}

#[test]
fn the_head_never_goes_back_and_names_committed_meta_datafiles_only() {
    let mut twin = Twin::new();
    let epoch = twin.acquire(1, false).unwrap();
    let meta = |datafile| record(datafile, Stream::Meta, &[1, 2, 3, 4]);
    let both = vec![meta(1), meta(3)];
    assert!(twin.mutate(commit(epoch, both, head(3, 1))).is_ok());
    assert!(
        twin.mutate(commit(epoch, vec![meta(2)], head(2, 1)))
            .is_err()
    );
    assert!(twin.mutate(commit(epoch, vec![], head(4, 1))).is_err());
    let release = |datafile| Mutation::ReleaseDatafiles {
        volume: VOLUME,
        epoch,
        datafiles: vec![DatafileId(datafile)],
    };
    assert!(twin.mutate(release(1)).is_err(), "recovery needs it");
    assert!(twin.mutate(commit(epoch, vec![], head(3, 3))).is_ok());
    assert!(twin.mutate(release(1)).is_ok());
}

#[test]
fn a_swap_compares_the_version_and_buries_the_old_place() {
    let mut twin = Twin::new();
    let epoch = twin.acquire(1, false).unwrap();
    let agent = twin.register_agent("loc1", "n2");
    let spare = twin.register_backend(agent, "a");
    let records = vec![record(1, Stream::Data, &[1, 2, 3, 4])];
    twin.mutate(commit(epoch, records, None)).unwrap();
    let conflict = Err(MetadError::VersionConflict { current: 0 });
    assert_eq!(twin.mutate(swap(1, 0, (1, spare.0), 1)), conflict);
    assert_eq!(twin.mutate(swap(1, 0, (2, spare.0), 0)), conflict);
    let moved = twin.mutate(swap(1, 0, (1, spare.0), 0));
    assert_eq!(moved, Ok(Applied::Version(1)));
    let due = twin.state().tombstones_due(BackendId(1), 9).unwrap();
    assert_eq!(due.len(), 1);
    // It may go home while the deletion of the old place was not ordered...
    assert_eq!(
        twin.mutate(swap(1, 0, (spare.0, 1), 1)),
        Ok(Applied::Version(2))
    );
    assert!(
        twin.state()
            .tombstones_due(BackendId(1), 9)
            .unwrap()
            .is_empty()
    );
    // ... and not after.
    let place = twin.state().tombstones_due(spare, 9).unwrap()[0].0;
    twin.now_ms += ClusterSettings::default().tombstone_grace_ms;
    twin.internal(Command::OrderDeletes(vec![place])).unwrap();
    assert!(matches!(
        twin.mutate(swap(1, 0, (1, spare.0), 2)),
        Err(MetadError::Invalid(_))
    ));
    twin.internal(Command::ShardDeleted(place)).unwrap();
    assert!(twin.mutate(swap(1, 0, (1, spare.0), 2)).is_ok());
}

#[test]
fn a_report_counts_once_and_a_rebuild_in_place_repairs() {
    let mut twin = Twin::new();
    let epoch = twin.acquire(1, false).unwrap();
    let records = vec![record(1, Stream::Data, &[1, 2, 3, 4])];
    twin.mutate(commit(epoch, records, None)).unwrap();
    let report = |backend| ShardReport {
        volume: VOLUME,
        datafile: DatafileId(1),
        shard: 2,
        backend: BackendId(backend),
        state: ShardState::Corrupt,
        by_scrub: false,
    };
    let reports = vec![report(3), report(3), report(1)];
    twin.mutate(Mutation::ReportShards { reports }).unwrap();
    assert_eq!(twin.state().rot().unwrap().found_by_read, 1);
    twin.mutate(swap(1, 2, (3, 3), 1)).unwrap();
    assert_eq!(twin.state().rot().unwrap().repaired, 1);
    assert!(
        twin.state()
            .tombstones_due(BackendId(3), 9)
            .unwrap()
            .is_empty()
    );
}

#[test]
fn a_token_joins_one_process_which_may_ask_again() {
    let mut twin = Twin::new();
    let create = Mutation::CreateToken {
        hash: [5; 32],
        role: Role::Agent,
        ttl_ms: 1_000,
    };
    twin.mutate(create).unwrap();
    let consume = |role, csr| Command::ConsumeToken {
        hash: [5; 32],
        role,
        csr: [csr; 32],
    };
    let refused = |outcome: Outcome| matches!(outcome, Err(MetadError::Token(_)));
    assert!(refused(twin.internal(consume(Role::Client, 1))));
    assert!(twin.internal(consume(Role::Agent, 1)).is_ok());
    assert!(twin.internal(consume(Role::Agent, 1)).is_ok());
    assert!(refused(twin.internal(consume(Role::Agent, 2))));
    let create = Mutation::CreateToken {
        hash: [6; 32],
        role: Role::Metad,
        ttl_ms: 1_000,
    };
    twin.mutate(create).unwrap();
    twin.now_ms += 1_000;
    let admission = Admission {
        hash: [6; 32],
        csr: [0; 32],
        name: "m2".parse().unwrap(),
        location: "loc2".parse().unwrap(),
        address: "b:1".into(),
    };
    assert!(refused(twin.internal(Command::AdmitMetad(admission))));
}

#[test]
fn metad_names_are_unique_and_ids_are_never_reused() {
    let mut twin = Twin::new();
    let admit = |twin: &mut Twin, number: u8, name: &str| {
        let create = Mutation::CreateToken {
            hash: [number; 32],
            role: Role::Metad,
            ttl_ms: 1_000,
        };
        let _ = twin.mutate(create);
        twin.internal(Command::AdmitMetad(Admission {
            hash: [number; 32],
            csr: [number; 32],
            name: name.parse().unwrap(),
            location: "loc2".parse().unwrap(),
            address: format!("host:{number}"),
        }))
    };
    assert_eq!(admit(&mut twin, 1, "m2"), Ok(Reply::Admitted(MetadId(2))));
    assert_eq!(admit(&mut twin, 1, "m2"), Ok(Reply::Admitted(MetadId(2))));
    assert!(matches!(
        admit(&mut twin, 2, "m2"),
        Err(MetadError::Exists(_))
    ));
    twin.internal(Command::RemoveMetad(MetadId(2))).unwrap();
    assert_eq!(admit(&mut twin, 3, "m2"), Ok(Reply::Admitted(MetadId(3))));
}

#[test]
fn a_deleted_volume_is_gone_at_once_and_its_records_become_tombstones() {
    let mut twin = Twin::new();
    let epoch = twin.acquire(1, false).unwrap();
    let records = (1..=3).map(|d| record(d, Stream::Data, &[1, 2, 3, 4]));
    twin.mutate(commit(epoch, records.collect(), None)).unwrap();
    let delete = Mutation::DeleteVolume { volume: VOLUME };
    assert!(matches!(
        twin.mutate(delete.clone()),
        Err(MetadError::Held { .. })
    ));
    twin.mutate(Mutation::ReleaseLease {
        volume: VOLUME,
        epoch,
    })
    .unwrap();
    twin.mutate(delete).unwrap();
    assert_eq!(twin.state().doomed_volumes().unwrap(), [VOLUME]);
    let reaped = twin.internal(Command::ReapVolume(VOLUME));
    assert_eq!(reaped, Ok(Reply::Remaining(false)));
    assert_eq!(twin.state().backend_load(BackendId(1)).unwrap().shards, 0);
    assert_eq!(twin.replayed(usize::MAX), twin.kv);
    assert_eq!(
        twin.state().tombstones_due(BackendId(1), 9).unwrap().len(),
        3
    );
}

#[test]
fn a_backend_is_retired_only_when_empty_and_then_owes_no_deletion() {
    let mut twin = Twin::new();
    let epoch = twin.acquire(1, false).unwrap();
    let records = vec![record(1, Stream::Data, &[1, 2, 3, 4])];
    twin.mutate(commit(epoch, records, None)).unwrap();
    let retire = Mutation::SetBackendIntent {
        backend: BackendId(1),
        intent: Intent::Retire,
    };
    assert!(twin.mutate(retire.clone()).is_err());
    let release = Mutation::ReleaseDatafiles {
        volume: VOLUME,
        epoch,
        datafiles: vec![DatafileId(1), DatafileId(77)],
    };
    twin.mutate(release).unwrap();
    twin.mutate(retire).unwrap();
    assert!(
        twin.state()
            .tombstones_due(BackendId(1), 9)
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        twin.state().tombstones_due(BackendId(2), 9).unwrap().len(),
        1
    );
}

#[test]
fn log_time_never_goes_back() {
    let mut twin = Twin::new();
    twin.now_ms = 50_000;
    twin.acquire(1, false).unwrap();
    twin.now_ms = 10;
    assert!(
        twin.acquire(2, false).is_err(),
        "the lease did not become older"
    );
    assert_eq!(twin.state().log_time_ms().unwrap(), 50_000);
}

#[test]
fn verdicts_keep_the_time_they_were_first_set() {
    let mut twin = Twin::new();
    let down = || Command::SetVerdicts(vec![(BackendId(1), Verdict::Down)]);
    twin.now_ms = 5_000;
    twin.internal(down()).unwrap();
    twin.now_ms = 9_000;
    twin.internal(down()).unwrap();
    let backend = twin.state().backend(BackendId(1)).unwrap().unwrap();
    assert_eq!(backend.verdict_since_ms, 5_000);
}

#[test]
fn a_hosted_backend_that_moved_to_another_port_is_the_same_backend() {
    let mut twin = Twin::new();
    let agents = twin.state().agents().unwrap();
    let mutation = Mutation::RegisterBackend {
        agent: agents[0].id,
        address: BackendAddress {
            endpoint: "elsewhere:1".into(),
            namespace: "a".into(),
            password: None,
            tls: true,
        },
        capacity_bytes: 1,
    };
    assert_eq!(twin.mutate(mutation), Ok(Applied::Backend(BackendId(1))));
}

#[test]
fn a_deletion_that_was_never_ordered_is_not_believed() {
    let mut twin = Twin::new();
    let epoch = twin.acquire(1, false).unwrap();
    let records = vec![record(1, Stream::Data, &[1, 2, 3, 4])];
    twin.mutate(commit(epoch, records, None)).unwrap();
    let release = Mutation::ReleaseDatafiles {
        volume: VOLUME,
        epoch,
        datafiles: vec![DatafileId(1)],
    };
    twin.mutate(release).unwrap();
    let place = Place {
        backend: BackendId(1),
        volume: VOLUME,
        datafile: DatafileId(1),
        salt: record(1, Stream::Data, &[]).salt,
        shard: 0,
    };
    twin.internal(Command::ShardDeleted(place)).unwrap();
    assert_eq!(
        twin.state().tombstones_due(BackendId(1), 9).unwrap().len(),
        1
    );
}

#[test]
fn a_group_does_what_its_proposals_would_have_done_one_by_one() {
    let proposal = |sequence: u64, namespace: &str, agent: u64| Entry {
        time_ms: 1_000 + sequence,
        request: Some(request(5, sequence)),
        command: Command::Mutation(Mutation::RegisterBackend {
            agent: AgentId(agent),
            address: BackendAddress {
                endpoint: "host:9900".into(),
                namespace: namespace.into(),
                password: None,
                tls: true,
            },
            capacity_bytes: 1,
        }),
    };
    let proposals = vec![
        proposal(1, "x", 1),
        // Refused: no such agent. What stands around it goes through.
        proposal(2, "y", 77),
        proposal(3, "z", 1),
        // A retry of the first, in the same group.
        proposal(1, "x", 1),
    ];
    let (mut single, mut grouped) = (Twin::new(), Twin::new());
    let one_by_one: Vec<_> = proposals.iter().map(|entry| single.apply(entry)).collect();
    let group = Entry::internal(1_003, Command::Group(proposals.clone()));
    assert_eq!(grouped.apply(&group), Ok(Reply::Group(one_by_one.clone())));
    assert_eq!(grouped.kv.rows(), single.kv.rows());
    assert!(one_by_one[1].is_err());
    assert_eq!(one_by_one[3], one_by_one[0]);

    let nested = Entry::internal(1_004, Command::Group(vec![group]));
    let Ok(Reply::Group(outcomes)) = grouped.apply(&nested) else {
        panic!("a group is answered as one")
    };
    assert!(matches!(outcomes[..], [Err(MetadError::Invalid(_))]));
}

/// A retry within the life of its session is answered as before; the session's life is counted by the log's clock alone.
#[test]
fn sessions_expire_by_log_time() {
    use crate::state::sessions::{SESSION_TTL_MS, SWEEP_INTERVAL_MS};
    let mut twin = Twin::new();
    let acquire = |time_ms| Entry {
        time_ms,
        request: Some(request(1, 1)),
        command: Command::Mutation(Mutation::AcquireLease {
            volume: VOLUME,
            client: client(1),
            holder: "h:1".into(),
            takeover: false,
        }),
    };
    let sessions = |twin: &Twin| {
        let table = [crate::state::row::Table::Session as u8];
        let rows = twin.kv.rows().keys();
        rows.filter(|key| key.starts_with(&table)).count()
    };
    let begun_ms = 2_000;
    let first = twin.apply(&acquire(begun_ms));
    // Nearly expired, and asked again: alive, with the first answer.
    let late_ms = begun_ms + SESSION_TTL_MS;
    assert_eq!(twin.apply(&acquire(late_ms)), first);
    assert_eq!(sessions(&twin), 1);
    // Only entries move that clock: nothing expires while the log stands still, everything once it has gone on.
    twin.now_ms = late_ms + SESSION_TTL_MS + SWEEP_INTERVAL_MS + 1;
    twin.internal(Command::SetVerdicts(vec![])).unwrap();
    assert_eq!(sessions(&twin), 0);
    assert_eq!(twin.replayed(usize::MAX), twin.kv);
    assert_eq!(twin.replayed(2), twin.kv);
}

#[test]
fn tokens_that_nobody_made_or_that_were_revoked_join_nobody_and_no_secret_is_kept() {
    let mut twin = Twin::new();
    let refused = |outcome: Outcome, says: &str| match outcome {
        Err(MetadError::Token(text)) => assert!(text.contains(says), "{text}"),
        other => panic!("{other:?}"),
    };
    let consume = |hash| Command::ConsumeToken {
        hash: [hash; 32],
        role: Role::Agent,
        csr: [1; 32],
    };
    refused(twin.internal(consume(9)), "unknown token");
    let create = |hash, role| Mutation::CreateToken {
        hash: [hash; 32],
        role,
        ttl_ms: 1_000,
    };
    twin.mutate(create(7, Role::Agent)).unwrap();
    let revoke = Mutation::RevokeToken {
        prefix: "07070707".into(),
    };
    twin.mutate(revoke).unwrap();
    refused(twin.internal(consume(7)), "revoked");
    twin.mutate(create(8, Role::Agent)).unwrap();
    twin.now_ms += 1_000;
    refused(twin.internal(consume(8)), "expired");
    assert!(
        twin.mutate(create(6, Role::Admin)).is_err(),
        "none for admins"
    );
}
