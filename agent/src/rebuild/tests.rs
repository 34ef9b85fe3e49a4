#![expect(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::testing::Bench;

const OBJECT_BYTES: u64 = 200_000;

fn rebuilder(bench: &Bench) -> Rebuilder {
    Rebuilder {
        cluster: bench.metad.clone(),
        stores: Arc::clone(&bench.stores),
    }
}

async fn rebuild(bench: &Bench, job: &RebuildJob) -> Outcome {
    rebuilder(bench)
        .rebuild(job, 3, CancellationToken::new())
        .await
}

fn error(outcome: Outcome) -> String {
    match outcome {
        Outcome::Failed { error } => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_lost_shard_is_made_again_byte_for_byte_and_its_place_recorded() {
    for shard in [0, 3, 5] {
        let bench = Bench::new(7);
        let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
        let lost = bench.backends[shard as usize].snapshot();
        bench.backends[shard as usize].values.lock().clear();
        *bench.backends[shard as usize].away.lock() = true;
        let outcome = rebuild(&bench, &bench.job(&record, shard, 6)).await;
        assert!(
            matches!(outcome, Outcome::Rebuilt { bytes } if bytes > 0),
            "{outcome:?}"
        );
        assert_eq!(bench.backends[6].snapshot(), lost);
        let now = bench.metad.record(&record);
        assert_eq!(now.shards[shard as usize].backend, BackendId(6));
        assert_eq!(now.version, 1);
        assert!(
            bench.metad.reports.lock().is_empty(),
            "an absent backend is no bad shard"
        );
    }
}

#[tokio::test]
async fn corrupt_and_missing_pieces_of_survivors_are_bypassed_and_reported() {
    let bench = Bench::new(7);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    let lost = bench.backends[0].snapshot();
    *bench.backends[0].away.lock() = true;
    bench.backends[2].flip(1);
    let outcome = rebuild(&bench, &bench.job(&record, 0, 6)).await;
    assert!(matches!(outcome, Outcome::Rebuilt { .. }), "{outcome:?}");
    assert_eq!(bench.backends[6].snapshot(), lost);
    let reports = bench.metad.reports.lock().clone();
    assert_eq!(reports.len(), 1);
    assert_eq!((reports[0].shard, reports[0].backend), (2, BackendId(2)));
    assert_eq!(reports[0].state, ShardState::Corrupt);
    assert!(!reports[0].by_scrub);
}

#[tokio::test]
async fn different_survivors_may_be_bad_in_different_rows() {
    let bench = Bench::new(7);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    let lost = bench.backends[0].snapshot();
    *bench.backends[0].away.lock() = true;
    for shard in 1..6 {
        bench.backends[shard].flip(shard - 1);
    }
    bench.backends[3].lose(5);
    let outcome = rebuild(&bench, &bench.job(&record, 0, 6)).await;
    assert!(matches!(outcome, Outcome::Rebuilt { .. }), "{outcome:?}");
    assert_eq!(bench.backends[6].snapshot(), lost);
}

#[tokio::test]
async fn too_few_survivors_fail_with_the_reason_and_leave_nothing_behind() {
    let bench = Bench::new(7);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    for shard in [0, 1, 2] {
        *bench.backends[shard].away.lock() = true;
    }
    let reason = error(rebuild(&bench, &bench.job(&record, 0, 6)).await);
    assert!(reason.contains("3 good shards of 4 needed"), "{reason}");
    assert_eq!(bench.backends[6].len(), 0);
    assert_eq!(bench.metad.record(&record), record);
}

#[tokio::test]
async fn a_full_target_fails_with_the_reason_and_its_partial_pieces_are_removed() {
    let bench = Bench::new(7);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    *bench.backends[6].room.lock() = Some(3);
    let reason = error(rebuild(&bench, &bench.job(&record, 0, 6)).await);
    assert!(reason.contains("full"), "{reason}");
    assert_eq!(bench.backends[6].len(), 0);
}

#[tokio::test]
async fn a_corrupt_shard_is_made_again_in_place() {
    let bench = Bench::new(6);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    let whole = bench.backends[1].snapshot();
    bench.backends[1].flip(0);
    bench.backends[1].lose(3);
    bench
        .metad
        .records
        .lock()
        .get_mut(&(record.volume, record.datafile))
        .unwrap()
        .shards[1]
        .state = ShardState::Corrupt;
    let outcome = rebuild(&bench, &bench.job(&record, 1, 1)).await;
    assert!(matches!(outcome, Outcome::Rebuilt { .. }), "{outcome:?}");
    assert_eq!(bench.backends[1].snapshot(), whole);
    assert_eq!(
        bench.metad.record(&record).shards[1].state,
        ShardState::Stored
    );
}

#[tokio::test]
async fn a_drained_shard_is_copied_even_when_no_other_survivor_answers() {
    let bench = Bench::new(7);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    for shard in [0, 1, 3, 4, 5] {
        *bench.backends[shard].away.lock() = true;
    }
    let outcome = rebuild(&bench, &bench.job(&record, 2, 6)).await;
    assert!(matches!(outcome, Outcome::Rebuilt { .. }), "{outcome:?}");
    assert_eq!(bench.backends[6].snapshot(), bench.backends[2].snapshot());
}

#[tokio::test]
async fn a_sound_shard_of_another_attempt_is_found_out_by_its_hash() {
    // Every piece of shard 2 verifies and names the right place, but its bytes are others than the record's.
    let bench = Bench::new(7);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    let lost = bench.backends[0].snapshot();
    *bench.backends[0].away.lock() = true;
    let stripe = Stripe::of(&record).unwrap();
    for key in stripe.shard_keys(2) {
        let payload = vec![7; stripe.layout().piece_len(key.piece)];
        let value = qsfs_zstor::piece::encode_piece(&stripe, 2, key.piece, &payload);
        bench.backends[2]
            .set(&key.to_bytes(), value.into())
            .await
            .unwrap();
    }
    let outcome = rebuild(&bench, &bench.job(&record, 0, 6)).await;
    assert!(matches!(outcome, Outcome::Rebuilt { .. }), "{outcome:?}");
    assert_eq!(bench.backends[6].snapshot(), lost);
    assert_eq!(bench.metad.reports.lock()[0].shard, 2);
}

#[tokio::test]
async fn a_record_that_changes_meanwhile_is_looked_at_again() {
    let bench = Bench::new(7);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    *bench.metad.conflicts.lock() = 3;
    let outcome = rebuild(&bench, &bench.job(&record, 0, 6)).await;
    assert!(matches!(outcome, Outcome::Rebuilt { .. }), "{outcome:?}");
    assert_eq!(bench.metad.record(&record).shards[0].backend, BackendId(6));
}

#[tokio::test]
async fn an_order_that_was_carried_out_before_is_done_at_once_and_deletes_nothing() {
    let bench = Bench::new(7);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    let stale = bench.job(&record, 0, 6);
    assert!(matches!(
        rebuild(&bench, &stale).await,
        Outcome::Rebuilt { .. }
    ));
    let stored = bench.backends[6].snapshot();
    for backend in &bench.backends[..6] {
        *backend.away.lock() = true;
    }
    assert_eq!(rebuild(&bench, &stale).await, Outcome::Rebuilt { bytes: 0 });
    assert_eq!(bench.backends[6].snapshot(), stored);
}

#[tokio::test]
async fn a_cancelled_rebuild_removes_its_pieces() {
    let bench = Bench::new(7);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    // What an earlier run that was killed left behind.
    let (key, value) = bench.backends[0].snapshot().into_iter().next().unwrap();
    bench.backends[6].set(&key, value).await.unwrap();
    let job = bench.job(&record, 0, 6);
    let cancel = CancellationToken::new();
    let rebuilder = rebuilder(&bench);
    let mut run = std::pin::pin!(rebuilder.rebuild(&job, 1, cancel.clone()));
    assert!(
        futures::poll!(&mut run).is_ready() || {
            cancel.cancel();
            true
        }
    );
    let outcome = run.await;
    match outcome {
        Outcome::Cancelled => assert_eq!(bench.backends[6].len(), 0),
        Outcome::Rebuilt { .. } => {
            assert_eq!(bench.metad.record(&record).shards[0].backend, BackendId(6))
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_released_datafile_is_not_rebuilt() {
    let bench = Bench::new(7);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    let job = bench.job(&record, 0, 6);
    bench.metad.records.lock().clear();
    assert!(error(rebuild(&bench, &job).await).contains("released"));
    assert_eq!(bench.backends[6].len(), 0);
}

#[tokio::test]
async fn a_deletion_frees_all_keys_of_the_shard_and_only_those_and_may_be_repeated() {
    let bench = Bench::new(6);
    let record = bench.commit(1, "4+2", OBJECT_BYTES).await;
    let other = bench.commit(2, "4+2", OBJECT_BYTES).await;
    let rebuilder = rebuilder(&bench);
    bench
        .metad
        .records
        .lock()
        .remove(&(record.volume, record.datafile));
    let before = bench.backends[3].len();
    for _ in 0..2 {
        assert_eq!(
            rebuilder.delete(BackendId(3), &record, 3).await,
            Outcome::Deleted
        );
    }
    assert_eq!(bench.backends[3].len(), before / 2);
    assert!(
        matches!(
            rebuilder.delete(BackendId(3), &other, 3).await,
            Outcome::Failed { .. }
        ),
        "a record places it there"
    );
    assert_eq!(bench.backends[3].len(), before / 2);
    *bench.metad.away.lock() = true;
    assert!(matches!(
        rebuilder.delete(BackendId(3), &other, 3).await,
        Outcome::Failed { .. }
    ));
}
