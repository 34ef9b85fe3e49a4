//! Who may be a metad, through the binary. Joining, leaving and replacing under load: `metad_faults.rs`.

#![expect(clippy::unwrap_used, reason = "tests")]

use nix::sys::signal::Signal;
use qsfs_jepsen_tests::wait::holds;
use qsfs_jepsen_tests::{Daemons, free_address, process, wait_for};
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

#[test]
fn a_healthy_metad_is_not_removed_while_a_silent_one_counts() {
    let mut daemons = Daemons::new(Path::new(env!("CARGO_BIN_EXE_qsfs")));
    let file = bootstrap(&mut daemons, "m1");
    let qsfs = daemons.binary().with_cluster(file);
    for name in ["m2", "m3"] {
        let token = wait_for("a token", || {
            let said = qsfs.run(["token", "create", "--role", "metad"]);
            holds(said.code == 0, said.stderr.clone()).map(|()| said.stdout)
        });
        let (address, data) = (free_address(), daemons.path(name));
        let arguments = [
            "metad",
            "join",
            token.trim(),
            "--name",
            name,
            "--location",
            "par",
            "--listen",
            &address,
            "--data",
            &data,
        ];
        daemons.start(name, &arguments);
    }
    let shown = |role_and_state: &str, count: usize| {
        let said = qsfs.run(["metad", "members"]);
        let found = said.stdout.lines().filter(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            words.ends_with(&role_and_state.split(' ').collect::<Vec<_>>())
        });
        holds(found.count() == count, said.stdout.clone() + &said.stderr)
    };
    wait_for("three voters", || {
        shown("voter up", 2).and(shown("leader up", 1))
    });
    // The first one leads still or not: the one that dies and the one that shall go are others.
    let members = qsfs.run(["metad", "members"]).ok().stdout;
    let followers: Vec<_> = members
        .lines()
        .filter(|line| line.contains(" voter "))
        .map(|line| line.split_whitespace().nth(1).unwrap())
        .collect();
    let (dies, stays) = (followers[0], followers[1]);
    process::signal(daemons.pid(dies), Signal::SIGKILL);
    wait_for("one is silent", || shown("voter silent", 1));
    let plan = qsfs.run(["metad", "remove", stays]).ok().stdout;
    assert!(
        plan.contains("2 voters are left, 1 of them answer") && plan.contains("WARNING"),
        "{plan}"
    );
    assert!(!plan.contains("do it with --apply"), "{plan}");
    let refused = qsfs.run(["metad", "remove", stays, "--apply"]);
    refused.fails_naming(&["only 1 of 2 voters would answer", "remove", dies]);
    // Nothing happened: the cluster commits, and the silent one may go.
    qsfs.run(["token", "create", "--role", "agent"]).ok();
    let plan = qsfs.run(["metad", "remove", dies]).ok().stdout;
    assert!(
        plan.contains("do it with --apply") && !plan.contains("WARNING"),
        "{plan}"
    );
    qsfs.run(["metad", "remove", dies, "--apply"]).ok();
    wait_for("two members", || {
        shown("voter up", 1).and(shown("voter silent", 0))
    });
    // With two healthy ones, one may go.
    qsfs.run(["metad", "remove", stays, "--apply"]).ok();
    qsfs.run(["token", "create", "--role", "agent"]).ok();
}
