//! A location dies, each in turn, and comes back; a backend is gone for good; the dev cluster is stopped, started again and cleaned up.
//! Items 1 and 5 of the main job.

#![expect(clippy::unwrap_used, reason = "tests")]

use qsfs_jepsen_tests::dev_cluster::{shell, skip_reason};
use qsfs_jepsen_tests::tree::{TreeOptions, build, compare};
use qsfs_jepsen_tests::wait::holds;
use qsfs_jepsen_tests::{DevCluster, DevOptions, process, wait_for};
use std::fs;
use std::path::Path;
use std::time::Duration;

const TREE: TreeOptions = TreeOptions {
    files: 120,
    file_bytes_max: 30_000,
    large_bytes: 9 << 20,
};

#[test]
fn a_location_dies_and_comes_back() {
    if skip_reason().is_some() {
        return;
    }
    let mut cluster = DevCluster::start(
        Path::new(env!("CARGO_BIN_EXE_qsfs")),
        DevOptions::with(&[
            "--datafile-size",
            "4MiB",
            "--push-interval",
            "60s",
            "--lost-after",
            "20s",
            "--capacity",
            "2GiB",
        ]),
    );
    let tree = cluster.scratch("tree");
    build(&tree, 2, TREE).unwrap();
    shell(cluster.base(), "cp -a tree mnt/");
    cluster.sync();
    for location in ["loc1", "loc2"] {
        eprintln!("-- {location} dies");
        location_dies(&cluster, &tree, location);
    }
    eprintln!("-- a backend is gone for good");
    backend_gone(&cluster, &tree);
    eprintln!("-- stop and start again");
    stop_and_start(&mut cluster, &tree);
    eprintln!("-- the foreground is killed");
    foreground_killed(&mut cluster);
}

fn same(cluster: &DevCluster, tree: &Path) {
    if let Err(differences) = compare(tree, &cluster.mount().join("tree")) {
        panic!("{differences}");
    }
}

fn location_dies(cluster: &DevCluster, tree: &Path, location: &str) {
    cluster.evict();
    cluster.kill(&[location]);
    // Reads of what is not local, at once: nobody has noticed yet that the backends are gone.
    same(cluster, tree);
    // A new leader may suspect the other location, too, until its agents have found their way to it.
    wait_for("that location and no other to be down", || {
        let down = cluster.wait_finding("LOCATION_DOWN");
        holds(down == [location], format!("{down:?}"))
    });
    assert_eq!(cluster.qsfs(&["health"]).code, health_code(cluster));
    let written = cluster.mount().join(format!("while-{location}"));
    fs::write(&written, vec![7; 5_000_000]).unwrap();
    shell(
        cluster.mount(),
        "ls -lR . > /dev/null; stat tree > /dev/null; df . > /dev/null",
    );
    cluster
        .on_mount(&["sync"], &["--timeout", "5"])
        .fails_naming(&["policy"]);
    cluster.sync_degraded();
    let volume = cluster.volume().unwrap();
    assert!(
        volume.below_policy > 0 && volume.unreadable == 0,
        "{volume:?}"
    );
    assert_eq!(volume.loss_budget.locations, 0, "{volume:?}");
    cluster.start_again(&[location]);
    let status = cluster.wait_healed(Duration::from_secs(120));
    assert_eq!(
        status.volumes[0].loss_budget.locations, 1,
        "{:?}",
        status.volumes
    );
    cluster.sync();
    cluster.evict();
    same(cluster, tree);
    assert!(fs::read(&written).unwrap().iter().all(|byte| *byte == 7));
}

fn health_code(cluster: &DevCluster) -> i32 {
    use qsfs_proto::status::StatusVerdict;
    match cluster.status().unwrap().verdict {
        StatusVerdict::Ok => 0,
        StatusVerdict::Warning => 1,
        StatusVerdict::Critical => 2,
    }
}

fn backend_gone(cluster: &DevCluster, tree: &Path) {
    cluster.sync();
    let before = cluster.status().unwrap();
    let (agent, dir) = cluster.backend_dirs().into_iter().next().unwrap();
    eprintln!("   {} of {agent}", dir.display());
    fs::remove_dir_all(&dir).unwrap();
    wait_for("a backend to be lost", || {
        let status = cluster.status()?;
        let lost = status
            .backends
            .iter()
            .any(|backend| backend.state == "lost");
        holds(lost, format!("{:?}", status.backends))
    });
    let status = cluster.wait_healed(Duration::from_secs(90));
    let shards =
        |of: &qsfs_proto::status::Status| of.backends.iter().map(|b| b.shards).sum::<u64>();
    assert!(shards(&status) >= shards(&before), "{:?}", status.backends);
    cluster.evict();
    same(cluster, tree);
}

fn stop_and_start(cluster: &mut DevCluster, tree: &Path) {
    let at_risk = cluster.mount().join("at-the-end");
    fs::write(&at_risk, b"pushed by Ctrl-C").unwrap();
    cluster.interrupt();
    assert!(!process::is_mounted(cluster.mount()));
    let left = process::all_naming(cluster.base());
    assert!(left.is_empty(), "still running: {left:?}");
    cluster.up();
    same(cluster, tree);
    assert_eq!(fs::read(&at_risk).unwrap(), b"pushed by Ctrl-C");
    cluster.sync();
}

fn foreground_killed(cluster: &mut DevCluster) {
    cluster.kill_foreground();
    assert!(
        cluster.pid("metad-1").is_some(),
        "children outlive the foreground"
    );
    cluster.dev(&["down"]);
    let left = process::all_naming(cluster.base());
    assert!(left.is_empty(), "still running: {left:?}");
    assert!(!process::is_mounted(cluster.mount()));
}
