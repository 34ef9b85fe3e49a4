//! Whole sessions against a cluster in memory: what was written comes back, whatever dies in between.

#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::control::Synced;
use crate::filesystem::FsError;
use crate::fuse::own_caller;
use crate::namespace::Ino;
use crate::push::checkpoint;
use crate::testing::{FakeCluster, Trouble, used_backends};
use qsfs_proto::api::Verdict;
use qsfs_zdb::media::DiskMedia;
use qsfs_zstor::id::{ClusterId, Stream};
use qsfs_zstor::record::ShardState;
use std::path::Path;

fn parts(cluster: &FakeCluster, dir: &Path, client: u8) -> SessionParts {
    let volume = cluster.volume_now();
    let dir = StateDir::new(dir);
    std::fs::create_dir_all(dir.root()).unwrap();
    let client = ClientId::from_bytes([client; 16]);
    let fresh = || {
        ClientFile::new(
            client,
            ClusterId::from_bytes([1; 16]),
            volume.id,
            &volume.name,
        )
    };
    let client_file = ClientFile::load(&dir).unwrap().unwrap_or_else(fresh);
    SessionParts {
        cluster: Arc::new(cluster.clone()),
        connector: Arc::new(cluster.clone()),
        key: FakeCluster::key(),
        dir,
        media: Arc::new(DiskMedia),
        client,
        client_file,
        takeover: false,
        read_only: false,
        cache_limit_bytes: None,
        founder: own_caller(),
        volume,
    }
}

async fn begin(cluster: &FakeCluster, dir: &Path) -> Session {
    Session::begin(parts(cluster, dir, 1)).await.unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn contents(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Half noise, half compressible.
        out.extend_from_slice(&state.to_le_bytes()[..4]);
        out.extend_from_slice(&[7; 4]);
    }
    out.truncate(bytes);
    out
}

fn write(session: &Session, name: &str, data: &[u8]) -> Ino {
    let filesystem = &session.filesystem;
    let known = filesystem.lookup(Ino::ROOT, name.as_bytes()).unwrap();
    let ino = known.map_or_else(
        || {
            filesystem
                .mknod(
                    Ino::ROOT,
                    name.as_bytes(),
                    libc::S_IFREG | 0o644,
                    0,
                    own_caller(),
                )
                .unwrap()
                .ino
        },
        |known| known.ino,
    );
    for (at, part) in (0_u64..).zip(data.chunks(1 << 17)) {
        filesystem
            .write(ino, at << 17, part, false, own_caller())
            .unwrap();
    }
    ino
}

async fn read(session: &Session, name: &str) -> Result<Vec<u8>, FsError> {
    let filesystem = &session.filesystem;
    let found = filesystem
        .lookup(Ino::ROOT, name.as_bytes())?
        .ok_or(FsError::NotFound)?;
    let mut all = Vec::new();
    while (all.len() as u64) < found.size {
        let mut buffer = vec![0; 1 << 17];
        let read = filesystem.read(found.ino, all.len() as u64, &mut buffer)?;
        let whole = filesystem.complete(buffer, read.missing).await?;
        all.extend_from_slice(&whole[..read.bytes]);
    }
    Ok(all)
}

async fn sync(session: &Session) -> Result<Synced, SyncError> {
    session.sync(soon(), false, &|_| {}).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_synced_and_evicted_reads_back_equal() {
    let (cluster, temp) = (FakeCluster::new("4+4", 1, 2), tempfile::tempdir().unwrap());
    let session = begin(&cluster, temp.path()).await;
    let files: Vec<(String, Vec<u8>)> = (0..6)
        .map(|n| (format!("f{n}"), contents(n, 1_500_000)))
        .collect();
    for (name, data) in &files {
        write(&session, name, data);
    }
    assert!(session.report().at_risk_bytes > 9_000_000);
    let synced = sync(&session).await.unwrap();
    assert!(synced.head > 0);
    assert_eq!(session.report().at_risk_bytes, 0);
    cluster.check_stored();
    let evicted = session.evict_all();
    assert!(evicted.datafiles >= 3, "{evicted:?}");
    assert_eq!(session.cache().status().evictable_bytes, 0);
    for (name, data) in &files {
        assert!(read(&session, name).await.unwrap() == *data, "{name}");
    }
    assert!(session.fetcher().counters().pieces.load(Ordering::Relaxed) > 0);
    let info = session.info(Path::new("f0")).await.unwrap().unwrap();
    assert!(
        info.datafiles[0].committed
            && info.datafiles[0].shards.len() == 8
            && info.datafiles[0].local == "remote"
    );
    // A second sync with nothing new pushes nothing.
    let commits = cluster.0.lock().commits;
    sync(&session).await.unwrap();
    assert_eq!(cluster.0.lock().commits, commits);
    session.end(soon(), &|_| {}).await.unwrap();
    assert_eq!(cluster.volume_now().lease, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_m_shards_may_be_gone_corrupt_or_dead_and_are_reported() {
    let (cluster, temp) = (FakeCluster::new("4+2", 0, 2), tempfile::tempdir().unwrap());
    let session = begin(&cluster, temp.path()).await;
    let data = contents(1, 2_500_000);
    write(&session, "a", &data);
    sync(&session).await.unwrap();
    session.evict_all();
    cluster.lose_shards(&[1]);
    cluster.rot_shard(2);
    assert!(read(&session, "a").await.unwrap() == data);
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let reports = cluster.0.lock().reports.clone();
        let has = |shard, state| {
            reports
                .iter()
                .any(|report| report.shard == shard && report.state == state)
        };
        if has(1, ShardState::Missing) && has(2, ShardState::Corrupt) {
            break;
        }
        assert!(Instant::now() < deadline, "{reports:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // One too many: an error that says why, not a hang.
    session.evict_all();
    cluster.lose_shards(&[3]);
    let error = read(&session, "a").await.unwrap_err().to_string();
    assert!(error.contains("usable shards"), "{error}");
    session.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_location_stops_neither_reads_nor_degraded_pushes() {
    let (cluster, temp) = (FakeCluster::new("4+4", 1, 2), tempfile::tempdir().unwrap());
    let session = begin(&cluster, temp.path()).await;
    let data = contents(2, 3_500_000);
    write(&session, "a", &data);
    sync(&session).await.unwrap();
    session.evict_all();
    cluster.set_trouble(&[1, 2, 3, 4], Some(Trouble::Down));
    assert!(read(&session, "a").await.unwrap() == data);
    // metad has not noticed yet: the client finds other places by itself.
    write(&session, "b", &data);
    let briefly = Instant::now() + Duration::from_secs(2);
    let refused = session.sync(briefly, false, &|_| {}).await.unwrap_err();
    assert!(
        matches!(refused, SyncError::BelowPolicy { .. }),
        "{refused}"
    );
    cluster.set_verdict(&[1, 2, 3, 4], Verdict::Down);
    write(&session, "c", &data);
    let synced = session.sync(soon(), true, &|_| {}).await.unwrap();
    assert!(synced.below_policy > 0 && !synced.missing.is_empty());
    cluster.check_stored();
    session.evict_all();
    for name in ["a", "b", "c"] {
        assert!(read(&session, name).await.unwrap() == data, "{name}");
    }
    session.stop().await;
}

/// A sync right after an agent came back was told that the policy does not hold, a moment before it was re-silvered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_waits_for_re_silver_that_is_under_way() {
    let (cluster, temp) = (FakeCluster::new("4+4", 1, 2), tempfile::tempdir().unwrap());
    let session = begin(&cluster, temp.path()).await;
    cluster.set_trouble(&[1, 2, 3, 4], Some(Trouble::Down));
    write(&session, "a", &contents(3, 100_000));
    let re_silver = async {
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let mut world = cluster.0.lock();
            if world.volume.as_ref().unwrap().head.datafile > DatafileId(0) {
                for record in world.records.values_mut() {
                    for (shard, backend) in record.shards.iter_mut().zip(1..) {
                        shard.backend = qsfs_zstor::id::BackendId(backend);
                    }
                }
                return;
            }
        }
    };
    let (synced, ()) = tokio::join!(sync(&session), re_silver);
    assert_eq!(synced.unwrap().below_policy, 0);
    session.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_never_answers_is_read_around() {
    let (cluster, temp) = (FakeCluster::new("4+4", 1, 2), tempfile::tempdir().unwrap());
    let session = begin(&cluster, temp.path()).await;
    let data = contents(12, 2_000_000);
    write(&session, "a", &data);
    sync(&session).await.unwrap();
    session.evict_all();
    cluster.set_trouble(&[1, 5], Some(Trouble::Hangs));
    assert!(read(&session, "a").await.unwrap() == data);
    session.stop().await;
}

/// Real 0-db servers over TCP instead of backends in memory; a shard's pieces are deleted behind the mount's back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_backends_hold_what_is_pushed() {
    let (cluster, temp) = (FakeCluster::new("4+2", 0, 2), tempfile::tempdir().unwrap());
    let servers = CancellationToken::new();
    let media: Arc<dyn Media> = Arc::new(qsfs_zdb::media::SimMedia::new());
    let mut engines = Vec::new();
    let count = cluster.0.lock().backends.len();
    for at in 0..count {
        let options = qsfs_zdb::engine::EngineOptions {
            media: Arc::clone(&media),
            root: Some(format!("/zdb{at}").into()),
            ..qsfs_zdb::engine::EngineOptions::default()
        };
        let engine = Arc::new(qsfs_zdb::engine::Engine::open(options).unwrap());
        engine.create_namespace("shards").unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        cluster.0.lock().backends[at].address.endpoint = listener.local_addr().unwrap().to_string();
        let config = qsfs_zdb::server::ServerConfig::default();
        engines.push(tokio::spawn(qsfs_zdb::server::serve(
            listener,
            engine,
            config,
            servers.clone(),
        )));
    }
    let ca = qsfs_proto::ca::CertificateAuthority::create(ClusterId::from_bytes([1; 16])).unwrap();
    let identity = ca.issue(qsfs_proto::api::Role::Client, "*").unwrap();
    let tls = qsfs_proto::tls::client_config(&identity).unwrap();
    let connector: Arc<dyn Connector> = Arc::new(crate::backends::ZdbConnector { tls });
    let parts = SessionParts {
        connector: Arc::clone(&connector),
        ..parts(&cluster, temp.path(), 1)
    };
    let session = Session::begin(parts).await.unwrap();
    let data = contents(13, 5_000_000);
    write(&session, "a", &data);
    sync(&session).await.unwrap();
    session.evict_all();
    let records: Vec<EncodingRecord> = cluster.0.lock().records.values().cloned().collect();
    for record in &records {
        let backend = record.shards[0].backend;
        let described = cluster
            .0
            .lock()
            .backends
            .iter()
            .find(|known| known.id == backend)
            .cloned()
            .unwrap();
        let client = connector.connect(&described);
        for key in qsfs_zstor::codec::Stripe::of(record).unwrap().shard_keys(0) {
            assert!(client.delete(&key.to_bytes()).await.unwrap());
        }
    }
    assert!(read(&session, "a").await.unwrap() == data);
    assert!(
        session
            .fetcher()
            .counters()
            .reconstructed
            .load(Ordering::Relaxed)
            > 0
    );
    session.end(soon(), &|_| {}).await.unwrap();
    servers.cancel();
    for engine in engines {
        engine.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_backend_and_one_that_dies_mid_push_are_replaced() {
    let (cluster, temp) = (FakeCluster::new("4+2", 0, 3), tempfile::tempdir().unwrap());
    let session = begin(&cluster, temp.path()).await;
    let data = contents(3, 6_000_000);
    write(&session, "first", &data[..1000]);
    sync(&session).await.unwrap();
    let used: Vec<u64> = used_backends(&cluster).into_iter().collect();
    cluster.set_trouble(&used[..1], Some(Trouble::Full));
    cluster.set_trouble(&used[1..2], Some(Trouble::DiesAfter(1)));
    write(&session, "a", &data);
    let synced = session.sync(soon(), true, &|_| {}).await.unwrap();
    assert!(synced.head > 0);
    cluster.set_trouble(&used, None);
    cluster.check_stored();
    session.evict_all();
    assert!(read(&session, "a").await.unwrap() == data);
    session.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_to_a_commit_is_asked_for() {
    let (cluster, temp) = (FakeCluster::new("2+1", 0, 1), tempfile::tempdir().unwrap());
    let session = begin(&cluster, temp.path()).await;
    cluster.0.lock().lose_commit_answers = 2;
    write(&session, "a", &contents(4, 100_000));
    sync(&session).await.unwrap();
    cluster.check_stored();
    assert_eq!(cluster.0.lock().lose_commit_answers, 0);
    session.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_mount_finds_everything_and_pushes_on() {
    let (cluster, temp) = (FakeCluster::new("4+4", 1, 2), tempfile::tempdir().unwrap());
    let (first, second) = (contents(5, 4_000_000), contents(6, 2_000_000));
    {
        let session = begin(&cluster, temp.path()).await;
        write(&session, "a", &first);
        sync(&session).await.unwrap();
        write(&session, "b", &second);
        session.filesystem.sync().unwrap();
        // Killed: nothing is pushed, nothing is given back.
        session.tasks.cancel();
        session.pushing.cancel();
        session.local().stop();
    }
    let session = begin(&cluster, temp.path()).await;
    assert!(
        read(&session, "a").await.unwrap() == first && read(&session, "b").await.unwrap() == second
    );
    sync(&session).await.unwrap();
    cluster.check_stored();
    session.evict_all();
    assert!(read(&session, "b").await.unwrap() == second);
    session.end(soon(), &|_| {}).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn takeover_with_the_key_alone_shows_the_last_push_and_fences_the_old_writer() {
    let (cluster, temp) = (FakeCluster::new("4+4", 1, 2), tempfile::tempdir().unwrap());
    let (old_dir, new_dir) = (temp.path().join("old"), temp.path().join("new"));
    let data = contents(7, 5_000_000);
    let old = begin(&cluster, &old_dir).await;
    write(&old, "a", &data);
    write(&old, "gone", &data[..10]);
    old.filesystem
        .unlink(Ino::ROOT, b"gone", own_caller())
        .unwrap();
    sync(&old).await.unwrap();
    write(&old, "unpushed", &data[..100_000]);
    old.filesystem.sync().unwrap();

    let held = Session::begin(parts(&cluster, &new_dir, 2))
        .await
        .unwrap_err();
    assert_eq!(held.exit_code(), 11, "{held}");
    let wrong = SessionParts {
        key: VolumeKey::from_bytes([1; 32]),
        takeover: true,
        ..parts(&cluster, &new_dir, 2)
    };
    let wrong = Session::begin(wrong).await.unwrap_err();
    assert_eq!(wrong.exit_code(), 12, "{wrong}");
    std::fs::remove_dir_all(&new_dir).unwrap();

    let taker = SessionParts {
        takeover: true,
        ..parts(&cluster, &new_dir, 3)
    };
    let new = Session::begin(taker).await.unwrap();
    assert!(read(&new, "a").await.unwrap() == data);
    assert!(matches!(
        read(&new, "unpushed").await,
        Err(FsError::NotFound)
    ));
    assert!(matches!(read(&new, "gone").await, Err(FsError::NotFound)));
    write(&new, "later", &data[..50_000]);
    sync(&new).await.unwrap();

    // The old one hears of it with its next renewal.
    assert_eq!(
        tokio::time::timeout(Duration::from_secs(20), old.fenced())
            .await
            .unwrap(),
        new.epoch()
    );
    let refused = old
        .filesystem
        .mkdir(Ino::ROOT, b"d", 0o755, own_caller())
        .unwrap_err();
    assert!(matches!(refused, FsError::ReadOnly(_)), "{refused}");
    assert!(old.end(soon(), &|_| {}).await.is_err());
    drop(old);
    let aside: Vec<_> = std::fs::read_dir(old_dir.join("aside").join("epoch-1"))
        .unwrap()
        .collect();
    assert!(aside.len() >= 2, "journal and data: {aside:?}");
    new.end(soon(), &|_| {}).await.unwrap();

    // It may come back, and sees what the other wrote.
    let again = begin(&cluster, &old_dir).await;
    assert!(read(&again, "later").await.unwrap() == data[..50_000]);
    assert!(matches!(
        read(&again, "unpushed").await,
        Err(FsError::NotFound)
    ));
    again.end(soon(), &|_| {}).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outrun_writer_that_was_killed_keeps_its_data_aside() {
    let (cluster, temp) = (FakeCluster::new("2+1", 0, 1), tempfile::tempdir().unwrap());
    let (old_dir, new_dir) = (temp.path().join("old"), temp.path().join("new"));
    let data = contents(8, 300_000);
    {
        let old = begin(&cluster, &old_dir).await;
        write(&old, "a", &data);
        sync(&old).await.unwrap();
        write(&old, "unpushed", &data);
        old.filesystem.sync().unwrap();
        old.tasks.cancel();
        old.pushing.cancel();
        old.local().stop();
    }
    let new = Session::begin(SessionParts {
        takeover: true,
        ..parts(&cluster, &new_dir, 2)
    })
    .await
    .unwrap();
    write(&new, "b", &data);
    new.end(soon(), &|_| {}).await.unwrap();
    let back = begin(&cluster, &old_dir).await;
    assert!(back.recovery.set_aside.len() >= 2, "{:?}", back.recovery);
    assert!(read(&back, "a").await.unwrap() == data && read(&back, "b").await.unwrap() == data);
    assert!(matches!(
        read(&back, "unpushed").await,
        Err(FsError::NotFound)
    ));
    back.end(soon(), &|_| {}).await.unwrap();
}

/// A mount was killed after metad had committed a datafile and before it could note so: the next mount pushed it again, metad said that
/// it was there already, and so on for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_committed_unnoticed_is_not_pushed_again() {
    let (cluster, temp) = (FakeCluster::new("2+1", 0, 1), tempfile::tempdir().unwrap());
    let dir = temp.path().join("a");
    let data = contents(11, 300_000);
    let session = begin(&cluster, &dir).await;
    write(&session, "a", &data);
    sync(&session).await.unwrap();
    let head = cluster.volume_now().head;
    session.tasks.cancel();
    session.pushing.cancel();
    session.local().stop();
    drop(session);
    let mut unnoticed = 0;
    for entry in std::fs::read_dir(dir.join("datafiles")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|stage| stage == "pushed") {
            std::fs::rename(&path, path.with_extension("sealed")).unwrap();
            unnoticed += 1;
        }
    }
    assert!(unnoticed >= 2, "data and journal");
    let again = begin(&cluster, &dir).await;
    sync(&again).await.unwrap();
    assert_eq!(cluster.volume_now().head, head, "nothing was to be pushed");
    assert!(read(&again, "a").await.unwrap() == data);
    write(&again, "b", &data);
    sync(&again).await.unwrap();
    assert!(cluster.volume_now().head.datafile > head.datafile);
    again.end(soon(), &|_| {}).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recovery_begins_at_a_checkpoint_and_the_dead_are_released() {
    let (cluster, temp) = (FakeCluster::new("2+1", 0, 1), tempfile::tempdir().unwrap());
    let (dir, other) = (temp.path().join("a"), temp.path().join("b"));
    let data = contents(9, 4_000_000);
    let session = begin(&cluster, &dir).await;
    write(&session, "dead", &data);
    write(&session, "a", &data[..70_000]);
    sync(&session).await.unwrap();
    session
        .filesystem
        .unlink(Ino::ROOT, b"dead", own_caller())
        .unwrap();
    write(&session, "b", &data[..80_000]);
    sync(&session).await.unwrap();
    let taken = {
        let (store, filesystem) = (Arc::clone(session.local()), Arc::clone(&session.filesystem));
        tokio::task::spawn_blocking(move || {
            checkpoint::take(&store, filesystem.namespace()).unwrap()
        })
        .await
        .unwrap()
    };
    write(&session, "c", &data[..90_000]);
    sync(&session).await.unwrap();
    assert_eq!(cluster.volume_now().head.recover_from, taken);
    assert!(cluster.volume_now().head.datafile > taken);
    let deadline = Instant::now() + Duration::from_secs(20);
    while cluster.0.lock().released.len() < 3 {
        assert!(Instant::now() < deadline, "{:?}", cluster.0.lock().released);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    session.end(soon(), &|_| {}).await.unwrap();
    cluster.check_stored();
    for again in 0..2 {
        let new = Session::begin(parts(&cluster, &other, 2)).await.unwrap();
        assert_eq!(new.recovery.rebuilt, again == 0, "{:?}", new.recovery);
        for (name, bytes) in [("a", 70_000), ("b", 80_000), ("c", 90_000)] {
            assert!(read(&new, name).await.unwrap() == data[..bytes], "{name}");
        }
        assert!(matches!(read(&new, "dead").await, Err(FsError::NotFound)));
        new.end(soon(), &|_| {}).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_sees_what_the_writer_pushes_and_refuses_writes() {
    let (cluster, temp) = (FakeCluster::new("2+1", 0, 1), tempfile::tempdir().unwrap());
    let data = contents(10, 200_000);
    let writer = begin(&cluster, &temp.path().join("w")).await;
    write(&writer, "a", &data);
    sync(&writer).await.unwrap();
    let follower = SessionParts {
        read_only: true,
        ..parts(&cluster, &temp.path().join("f"), 2)
    };
    let follower = Session::begin(follower).await.unwrap();
    assert!(read(&follower, "a").await.unwrap() == data);
    assert!(
        follower
            .filesystem
            .mkdir(Ino::ROOT, b"d", 0o755, own_caller())
            .is_err()
    );
    write(&writer, "b", &data);
    sync(&writer).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while follower
        .filesystem
        .lookup(Ino::ROOT, b"b")
        .unwrap()
        .is_none_or(|found| found.size < 200_000)
    {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(read(&follower, "b").await.unwrap() == data);
    follower.end(soon(), &|_| {}).await.unwrap();
    writer.end(soon(), &|_| {}).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_local_copy_of_committed_data_is_read_from_its_shards() {
    let (cluster, temp) = (FakeCluster::new("2+1", 0, 1), tempfile::tempdir().unwrap());
    let data = contents(11, 400_000);
    let session = begin(&cluster, temp.path()).await;
    write(&session, "a", &data);
    sync(&session).await.unwrap();
    let pushed = session
        .local()
        .catalog()
        .at(Stream::Data, crate::store::layout::Stage::Pushed)
        .remove(0);
    let path = session.local().path_of(&pushed);
    let mut raw = std::fs::read(&path).unwrap();
    raw[123_456] ^= 4;
    std::fs::write(&path, raw).unwrap();
    assert!(read(&session, "a").await.unwrap() == data);
    assert_eq!(session.cache().status().damaged_dropped, 1);
    session.stop().await;
}
