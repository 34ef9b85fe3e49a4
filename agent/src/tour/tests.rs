#![expect(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::testing::{Bench, eventually};

const OBJECT_BYTES: u64 = 200_000;

struct Running {
    orders: mpsc::Sender<()>,
    progress: Arc<Mutex<Progress>>,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    data: tempfile::TempDir,
    _settings: watch::Sender<Option<ClusterSettings>>,
}

fn start(bench: &Bench, backend: u64, data: tempfile::TempDir) -> Running {
    let settings = ClusterSettings {
        scrub_bytes_per_s: 0,
        ..ClusterSettings::default()
    };
    let (sender, receiver) = watch::channel(Some(settings));
    let (orders, order_receiver) = mpsc::channel(1);
    let progress = Arc::<Mutex<Progress>>::default();
    let shutdown = CancellationToken::new();
    let task = TourTask {
        backend: BackendId(backend),
        cluster: bench.metad.clone(),
        store: bench.stores.own(BackendId(backend)).unwrap(),
        file: TourFile::new(data.path(), BackendId(backend)),
        progress: Arc::clone(&progress),
        settings: receiver,
        orders: order_receiver,
        shutdown: shutdown.clone(),
    };
    Running {
        orders,
        progress,
        shutdown,
        task: tokio::spawn(task.run()),
        data,
        _settings: sender,
    }
}

impl Running {
    async fn scrub(&self) {
        let before = self.progress.lock().last_scrub_ms;
        self.orders.send(()).await.unwrap();
        eventually("the end of a tour", || {
            (self.progress.lock().last_scrub_ms > before).then_some(())
        })
        .await;
    }

    async fn stop(self) -> tempfile::TempDir {
        self.shutdown.cancel();
        self.task.await.unwrap();
        self.data
    }
}

#[tokio::test]
async fn a_tour_finds_flipped_bits_and_lost_pieces_and_tells_metad() {
    let bench = Bench::new(6);
    for datafile in 1..5 {
        bench.commit(datafile, "4+2", OBJECT_BYTES).await;
    }
    let pieces = bench.backends[2].len() / 4;
    bench.backends[2].flip(pieces + 1);
    bench.backends[2].lose(3 * pieces);
    let running = start(&bench, 2, tempfile::tempdir().unwrap());
    running.scrub().await;
    let reports = bench.metad.reports.lock().clone();
    let found: Vec<(u64, u32, ShardState)> = reports
        .iter()
        .map(|report| (report.datafile.0, report.shard, report.state))
        .collect();
    assert_eq!(
        found,
        [(2, 2, ShardState::Corrupt), (4, 2, ShardState::Missing)]
    );
    assert!(
        reports
            .iter()
            .all(|report| report.by_scrub && report.backend == BackendId(2))
    );
    assert_eq!(running.progress.lock().found, 2);
    let data = running.stop().await;
    // The end of the tour is remembered.
    let running = start(&bench, 2, data);
    eventually("the cursor", || {
        (running.progress.lock().last_scrub_ms > 0).then_some(())
    })
    .await;
    running.stop().await;
}

#[tokio::test]
async fn a_backend_that_is_gone_is_no_finding() {
    let bench = Bench::new(6);
    bench.commit(1, "4+2", OBJECT_BYTES).await;
    *bench.backends[2].away.lock() = true;
    let running = start(&bench, 2, tempfile::tempdir().unwrap());
    running.orders.send(()).await.unwrap();
    eventually("the tour", || running.progress.lock().toured_bytes).await;
    *bench.backends[2].away.lock() = false;
    eventually("the end of the tour", || {
        (running.progress.lock().last_scrub_ms > 0).then_some(())
    })
    .await;
    assert!(bench.metad.reports.lock().is_empty());
    running.stop().await;
}

#[tokio::test]
async fn a_sweep_deletes_only_old_orphans_of_known_volumes() {
    let bench = Bench::new(6);
    let released = bench.commit(1, "4+2", OBJECT_BYTES).await;
    bench.commit(2, "4+2", OBJECT_BYTES).await;
    let uncommitted = bench.commit(3, "4+2", OBJECT_BYTES).await;
    let shard = bench.backends[0].len() / 3;
    bench
        .metad
        .records
        .lock()
        .retain(|key, _| key.1 == DatafileId(2));
    bench.backends[0]
        .set(b"foreign", Bytes::from_static(b"x"))
        .await
        .unwrap();
    let data = tempfile::tempdir().unwrap();
    let file = TourFile::new(data.path(), BackendId(0));
    // First tour: seen as orphans, nothing deleted.
    let running = start(&bench, 0, data);
    running.scrub().await;
    assert_eq!(bench.backends[0].len(), 3 * shard + 1);
    let data = running.stop().await;
    let (_, orphans) = file.load();
    assert!(orphans.contains(&ShardKey::of(&released, 0)));
    assert!(!orphans.contains(&ShardKey::of(&uncommitted, 0)));
    // Two days later.
    file.save_orphans(&Orphans::new([(
        ShardKey::of(&released, 0),
        now_ms() - 2 * ORPHAN_GRACE_MS,
    )]));
    let running = start(&bench, 0, data);
    running.scrub().await;
    assert_eq!(bench.backends[0].len(), 2 * shard + 1);
    running.stop().await;
}
