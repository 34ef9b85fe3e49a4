//! Log and snapshots under endless commits.

use super::*;
use qsfs_metad::node::bounding::due_at;

/// Smaller still, so that the state outgrows them.
const SMALLER: Sizes = Sizes {
    segment_bytes: 4 << 10,
    snapshot_cost_min: 16 << 10,
    snapshot_cost_max: 64 << 10,
    ..SMALL
};

fn bytes_in(dir: &Path, wanted: &str) -> u64 {
    let found = std::fs::read_dir(dir).unwrap();
    let files = found.map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|e| e == wanted));
    // One that was replaced meanwhile is not there any more.
    files
        .filter_map(|path| std::fs::metadata(path).ok())
        .map(|found| found.len())
        .sum()
}

/// Looks again until it is so: a snapshot that is due takes a moment.
async fn stays_within(node: &Node, sizes: &Sizes) {
    let dir = node.dir.clone();
    let within = move || {
        let snapshot = bytes_in(&dir.join("snapshot"), "snap");
        let log = bytes_in(&dir.join("log"), "log");
        // What is due, what is kept behind it, and segments of which a part is needed: at both ends, and the one at work.
        log <= due_at(sizes, snapshot) + sizes.kept.bytes + 3 * sizes.segment_bytes
    };
    until("the log outgrows its bound", within).await;
}

/// More than an entry of this test costs.
const ENTRY_COST_MAX: u64 = 1_536;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_and_snapshots_stay_bounded_and_are_not_rewritten_for_every_few_changes() {
    let mut nodes = Nodes::start(3, |node| node.sizes = SMALLER).await;
    let mut snapshots = vec![Vec::new(); 3];
    let mut due = [0; 3];
    for round in 0..60 {
        nodes.grow(25).await;
        for (at, node) in nodes.nodes.iter().enumerate() {
            stays_within(node, &SMALLER).await;
            if round == 40 {
                due[at] = due_at(&SMALLER, bytes_in(&node.dir.join("snapshot"), "snap"));
            }
            let metrics = node.bare().consensus().raft().data_metrics();
            let newest = metrics.borrow().snapshot.map(|id| id.index);
            if due[at] > 0 && snapshots[at].last() != Some(&newest) {
                snapshots[at].push(newest);
            }
        }
    }
    nodes.agree().await;
    for (due, seen) in due.iter().zip(&snapshots) {
        assert!(*due > SMALLER.snapshot_cost_min, "too small a state");
        assert!(seen.len() > 2, "no snapshots: {seen:?}");
        for two in seen.windows(2) {
            let entries = two[1].unwrap() - two[0].unwrap();
            assert!(entries * ENTRY_COST_MAX >= *due, "{seen:?}, due at {due}");
        }
    }
}
