//! Who may be a metad, through the binary. Joining, leaving and replacing under load: `metad_faults.rs`.

#![expect(clippy::unwrap_used, reason = "tests")]

use qsfs_jepsen_tests::wait::holds;
use qsfs_jepsen_tests::{Daemons, free_address, wait_for};
use std::fs;
use std::path::Path;

fn bootstrap(daemons: &mut Daemons, name: &str) -> String {
    let (address, data) = (free_address(), daemons.path(name));
    let file = daemons.path(&format!("{name}.toml"));
    let arguments = [
        "--cluster",
        &file,
        "metad",
        "bootstrap",
        "--name",
        name,
        "--location",
        "ams",
        "--listen",
        &address,
        "--data",
        &data,
    ];
    daemons.start_and_hear(name, &arguments, "cluster file: ");
    file
}

#[test]
fn a_metad_with_another_clusters_memory_refuses_and_a_first_one_warns() {
    let mut daemons = Daemons::new(Path::new(env!("CARGO_BIN_EXE_qsfs")));
    for name in ["a1", "b1"] {
        let file = bootstrap(&mut daemons, name);
        let warned = daemons.log(name);
        assert!(
            warned.contains("all metads are at ams") && warned.contains("stops the cluster"),
            "one location holds the majority: {warned}"
        );
        let qsfs = daemons.binary().with_cluster(file);
        wait_for("the first metad", || {
            holds(qsfs.run(["token", "list"]).code == 0, "no leader yet")
        });
        assert_eq!(daemons.stop(name), Some(0));
    }
    // Its certificate is of one cluster, what it remembers of another.
    let (a, b) = (daemons.base().join("a1"), daemons.base().join("b1"));
    for memory in ["log", "state", "snapshot"] {
        fs::rename(a.join(memory), a.join(format!("own-{memory}"))).unwrap();
        fs::rename(b.join(memory), a.join(memory)).unwrap();
    }
    let data = daemons.path("a1");
    daemons.start("mixed", &["metad", "serve", "--data", &data]);
    assert_eq!(daemons.wait_end("mixed"), Some(1));
    let said = daemons.log("mixed");
    assert!(said.contains("it will not run"), "{said}");
    // With its own it runs as before.
    for memory in ["log", "state", "snapshot"] {
        fs::rename(a.join(memory), b.join(memory)).unwrap();
        fs::rename(a.join(format!("own-{memory}")), a.join(memory)).unwrap();
    }
    daemons.start("again", &["metad", "serve", "--data", &data]);
    let qsfs = daemons.binary().with_cluster(daemons.path("a1.toml"));
    wait_for("it serves again", || {
        holds(qsfs.run(["token", "list"]).code == 0, "no leader yet")
    });
    // A disk that was lost holds no metad: nothing begins to vote there without being admitted.
    let empty = daemons.path("empty");
    daemons.start("lost", &["metad", "serve", "--data", &empty]);
    assert_eq!(daemons.wait_end("lost"), Some(1));
    assert!(daemons.log("lost").contains("holds no metad"));
}
