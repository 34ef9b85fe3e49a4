//! Real engines on real directories, metad in memory.
#![expect(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::config::{CONFIG_VERSION, HostedConfig};
use crate::testing::{FakeMetad, encode, eventually};
use qsfs_proto::api::{AgentOrder, AgentReport, BackendFacts, ClusterSettings, RebuildJob, Secret};
use qsfs_zstor::id::ClusterId;
use qsfs_zstor::record::{EncodingRecord, ShardState};
use std::path::PathBuf;

const OBJECT_BYTES: u64 = 300_000;

/// An agent with `count` backends in directories, numbered from 0.
struct Node {
    metad: Arc<FakeMetad>,
    home: tempfile::TempDir,
    config: Config,
    renewed: Arc<Notify>,
    running: Option<Running>,
}

struct Running {
    engine: Arc<Engine>,
    stores: Arc<Stores>,
    tasks: JoinSet<()>,
    stop: CancellationToken,
}

impl Node {
    fn new(count: u64) -> Self {
        let home = tempfile::tempdir().unwrap();
        let backend = |id: u64| HostedConfig {
            id: Some(BackendId(id)),
            dir: home.path().join(format!("disk{id}")),
            namespace: format!("b-{id}"),
            password: Secret("secret".into()),
            capacity_bytes: 64 << 20,
        };
        let config = Config {
            version: CONFIG_VERSION,
            cluster: ClusterId::from_bytes([3; 16]),
            location: "loc1".parse().unwrap(),
            node: "n1".parse().unwrap(),
            listen: "127.0.0.1:0".parse().unwrap(),
            endpoint: "127.0.0.1:0".into(),
            metad: vec![],
            agent: Some(AgentId(1)),
            backend: (0..count).map(backend).collect(),
            attached: vec![],
        };
        let engine = Engine::open(EngineOptions::default()).unwrap();
        for backend in &config.backend {
            hosted::check_dir(&config, backend).unwrap();
            hosted::create(&engine, &config, backend).unwrap();
        }
        engine.close();
        std::fs::create_dir(home.path().join("data")).unwrap();
        Self {
            metad: FakeMetad::new(),
            home,
            config,
            renewed: Arc::default(),
            running: None,
        }
    }

    fn start(&mut self) {
        *self.metad.orders.lock() = None;
        let engine = Arc::new(Engine::open(EngineOptions::default()).unwrap());
        let stores = Arc::new(Stores::new(Box::new(|_| {
            unreachable!("all are hosted here")
        })));
        let backends = Arc::new(open_backends(&engine, &self.config, &stores));
        let (mut tasks, stop) = (JoinSet::new(), CancellationToken::new());
        let data = self.home.path().join("data");
        work(
            &mut tasks,
            (AgentId(1), Arc::clone(&self.renewed)),
            self.metad.clone(),
            &backends,
            Arc::clone(&stores),
            &data,
            &stop,
        );
        self.running = Some(Running {
            engine,
            stores,
            tasks,
            stop,
        });
    }

    async fn stop(&mut self) {
        let mut running = self.running.take().unwrap();
        running.stop.cancel();
        while running.tasks.join_next().await.is_some() {}
        running.engine.close();
    }

    fn store(&self, backend: u64) -> Arc<dyn PieceStore> {
        self.running
            .as_ref()
            .unwrap()
            .stores
            .own(BackendId(backend))
            .unwrap()
    }

    fn dir(&self, backend: u64) -> PathBuf {
        self.home.path().join(format!("disk{backend}"))
    }

    async fn settings(&self) {
        let settings = ClusterSettings {
            heartbeat_ms: 50,
            scrub_bytes_per_s: 0,
            ..ClusterSettings::default()
        };
        self.metad.order(AgentOrder::Settings(settings)).await;
    }

    async fn commit(&self, datafile: u64) -> EncodingRecord {
        let (record, pieces) = encode(datafile, "4+2", OBJECT_BYTES);
        for (backend, key, value) in pieces {
            self.store(backend as u64).set(&key, value).await.unwrap();
        }
        self.metad
            .records
            .lock()
            .insert((record.volume, record.datafile), record.clone());
        record
    }

    /// Waits for a heartbeat from now on whose facts of a backend are as wanted.
    async fn facts(&self, backend: u64, wanted: impl Fn(&BackendFacts) -> bool) -> BackendFacts {
        self.metad.said.lock().clear();
        eventually("facts as wanted", || {
            let said = self.metad.said.lock();
            said.iter().find_map(|report| match report {
                AgentReport::Heartbeat { facts } => facts
                    .iter()
                    .find(|facts| facts.backend == BackendId(backend) && wanted(facts))
                    .cloned(),
                _ => None,
            })
        })
        .await
    }

    async fn said(&self, what: &str, wanted: impl Fn(&AgentReport) -> bool) -> AgentReport {
        eventually(what, || {
            self.metad
                .said
                .lock()
                .iter()
                .find(|report| wanted(report))
                .cloned()
        })
        .await
    }
}

async fn shard(
    store: &Arc<dyn PieceStore>,
    record: &EncodingRecord,
    shard: u32,
) -> Vec<Option<bytes::Bytes>> {
    let mut pieces = Vec::new();
    for key in qsfs_zstor::codec::Stripe::of(record)
        .unwrap()
        .shard_keys(shard)
    {
        pieces.push(store.get(&key.to_bytes()).await.unwrap());
    }
    pieces
}

/// Flips a bit in the middle of every file of a backend that holds pieces.
fn flip_on_disk(dir: &Path) {
    let mut flipped = 0;
    for entry in std::fs::read_dir(dir.join("pieces")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        if bytes.len() > 10_000 {
            // Deep inside the payload of the second piece.
            bytes[12_000] ^= 4;
            use std::os::unix::fs::FileExt;
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&bytes[12_000..12_001], 12_000).unwrap();
            flipped += 1;
        }
    }
    assert!(flipped > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_directory_is_told_and_its_shard_is_rebuilt_elsewhere() {
    let mut node = Node::new(7);
    node.start();
    node.settings().await;
    let record = node.commit(1).await;
    let lost = shard(&node.store(2), &record, 2).await;
    assert!(lost.iter().all(Option::is_some));
    node.facts(2, |facts| {
        let filled = facts.pieces > 0 && facts.used_bytes > 0 && facts.free_bytes > 0;
        facts.healthy && filled && facts.age_ms.is_some()
    })
    .await;
    std::fs::remove_dir_all(node.dir(2)).unwrap();
    let facts = node.facts(2, |facts| !facts.healthy).await;
    assert!(facts.problem.contains("gone"), "{}", facts.problem);
    node.facts(3, |facts| facts.healthy).await;
    let job = RebuildJob {
        record: record.clone(),
        shard: 2,
        to: BackendId(6),
    };
    node.metad.order(AgentOrder::Rebuild(job)).await;
    let done = node
        .said("the end of the rebuild", |report| {
            matches!(report, AgentReport::RebuildDone { .. })
        })
        .await;
    assert!(
        matches!(&done, AgentReport::RebuildDone { error: None, bytes, .. } if *bytes > 0),
        "{done:?}"
    );
    assert_eq!(shard(&node.store(6), &record, 2).await, lost);
    assert_eq!(node.metad.record(&record).shards[2].backend, BackendId(6));
    // Not even a restart makes the directory again.
    node.stop().await;
    node.start();
    node.settings().await;
    node.facts(2, |facts| !facts.healthy && facts.problem.contains("gone"))
        .await;
    assert_eq!(shard(&node.store(6), &record, 2).await, lost);
    assert!(!node.dir(2).exists());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bits_flipped_on_disk_are_found_by_an_ordered_scrub_and_mended_in_place() {
    let mut node = Node::new(6);
    node.start();
    node.settings().await;
    let record = node.commit(1).await;
    let whole = shard(&node.store(4), &record, 4).await;
    flip_on_disk(&node.dir(4));
    node.metad
        .order(AgentOrder::Scrub {
            backend: BackendId(4),
        })
        .await;
    node.facts(4, |facts| facts.last_scrub_ms > 0 && facts.scrub_found == 1)
        .await;
    let reports = node.metad.reports.lock().clone();
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert_eq!(
        (reports[0].shard, reports[0].state, reports[0].by_scrub),
        (4, ShardState::Corrupt, true)
    );
    let job = RebuildJob {
        record: record.clone(),
        shard: 4,
        to: BackendId(4),
    };
    node.metad.order(AgentOrder::Rebuild(job)).await;
    let done = node
        .said("the end of the rebuild", |report| {
            matches!(report, AgentReport::RebuildDone { .. })
        })
        .await;
    assert!(
        matches!(&done, AgentReport::RebuildDone { error: None, .. }),
        "{done:?}"
    );
    assert_eq!(shard(&node.store(4), &record, 4).await, whole);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_that_a_read_meets_is_told_without_a_scrub() {
    let mut node = Node::new(6);
    node.start();
    node.settings().await;
    let record = node.commit(1).await;
    flip_on_disk(&node.dir(4));
    let stripe = qsfs_zstor::codec::Stripe::of(&record).unwrap();
    let mut refused = 0;
    for key in stripe.shard_keys(4) {
        refused += usize::from(node.store(4).get(&key.to_bytes()).await.is_err());
    }
    assert_eq!(refused, 1);
    let reports = eventually("a report", || {
        Some(node.metad.reports.lock().clone()).filter(|reports| !reports.is_empty())
    })
    .await;
    assert_eq!(
        (reports[0].shard, reports[0].state, reports[0].by_scrub),
        (4, ShardState::Corrupt, false)
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_frees_the_backend_and_is_answered() {
    let mut node = Node::new(6);
    node.start();
    node.settings().await;
    let record = node.commit(1).await;
    node.metad.records.lock().clear();
    node.metad
        .order(AgentOrder::DeleteShard {
            backend: BackendId(5),
            record,
            shard: 5,
        })
        .await;
    node.said("the end of the deletion", |report| {
        matches!(
            report,
            AgentReport::ShardDeleted {
                backend: BackendId(5),
                shard: 5,
                ..
            }
        )
    })
    .await;
    node.facts(5, |facts| facts.pieces == 0 && facts.used_bytes == 0)
        .await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_session_is_opened_again_and_orders_go_on() {
    let mut node = Node::new(2);
    node.start();
    node.settings().await;
    for round in 2..5 {
        *node.metad.away.lock() = round == 3;
        *node.metad.orders.lock() = None;
        if round == 3 {
            tokio::task::yield_now().await;
            *node.metad.away.lock() = false;
        }
        eventually("another session", || {
            (*node.metad.sessions.lock() >= round).then_some(())
        })
        .await;
        node.facts(1, |facts| facts.healthy).await;
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_shown_in_a_session_of_its_own() {
    let mut node = Node::new(1);
    node.start();
    for round in 1..=3 {
        eventually("a session under the newest certificate", || {
            (*node.metad.sessions.lock() >= round).then_some(())
        })
        .await;
        node.settings().await;
        node.facts(0, |_| true).await;
        assert_eq!(*node.metad.sessions.lock(), round, "it stays until then");
        node.renewed.notify_one();
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_stops_amid_rebuilds_leaves_nothing_wrong() {
    let mut node = Node::new(7);
    node.start();
    node.settings().await;
    let mut records = Vec::new();
    for datafile in 1..9 {
        records.push(node.commit(datafile).await);
    }
    for record in &records {
        let job = RebuildJob {
            record: record.clone(),
            shard: 0,
            to: BackendId(6),
        };
        node.metad.order(AgentOrder::Rebuild(job)).await;
    }
    node.stop().await;
    node.start();
    node.settings().await;
    for record in &records {
        // A new leader derives the same jobs again, also those that were done.
        let job = RebuildJob {
            record: record.clone(),
            shard: 0,
            to: BackendId(6),
        };
        node.metad.order(AgentOrder::Rebuild(job)).await;
    }
    for record in &records {
        eventually("all are moved", || {
            (node.metad.record(record).shards[0].backend == BackendId(6)).then_some(())
        })
        .await;
        let made = shard(&node.store(6), record, 0).await;
        assert_eq!(made, shard(&node.store(0), record, 0).await);
    }
    node.stop().await;
}

#[test]
fn a_directory_with_foreign_files_or_of_another_agent_is_refused() {
    let node = Node::new(1);
    let mut config = node.config.clone();
    let backend = config.backend[0].clone();
    hosted::check_dir(&config, &backend).unwrap();
    config.node = "n2".parse().unwrap();
    assert!(matches!(
        hosted::check_dir(&config, &backend),
        Err(AgentError::BackendTaken { .. })
    ));
    config.cluster = ClusterId::from_bytes([4; 16]);
    assert!(matches!(
        hosted::check_dir(&config, &backend),
        Err(AgentError::OtherCluster { .. })
    ));
    std::fs::remove_file(backend.dir.join("qsfs-backend.toml")).unwrap();
    assert!(matches!(
        hosted::check_dir(&config, &backend),
        Err(AgentError::BackendNotEmpty(_))
    ));
}
