//! metad before and after a disaster, through the binary: remove, backup, verify, restore, recover, inspect.

#![expect(clippy::unwrap_used, reason = "tests")]

use qsfs_jepsen_tests::binary::Binary;
use qsfs_jepsen_tests::wait::holds;
use qsfs_jepsen_tests::{Daemons, free_address, wait_for};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

fn tokens_said(said: &str) -> Vec<String> {
    let lines = said.lines().filter_map(|line| line.strip_prefix("metad "));
    lines.map(str::to_owned).collect()
}

fn join(daemons: &mut Daemons, name: &str, location: &str, token: &str) {
    let (address, data) = (free_address(), daemons.path(name));
    let arguments = [
        "metad",
        "join",
        token,
        "--name",
        name,
        "--location",
        location,
        "--listen",
        &address,
        "--data",
        &data,
    ];
    daemons.start(name, &arguments);
}

fn until_voters(qsfs: &Binary, voters: u64) {
    wait_for("the voters", || {
        let said = qsfs.run(["status", "--json"]);
        let status: serde_json::Value =
            serde_json::from_str(&said.stdout).map_err(|_| said.stderr.clone())?;
        let quorum = &status["quorum"];
        holds(
            quorum["voters"] == voters && quorum["healthy"] == voters,
            &status,
        )
    });
}

/// Something small that the cluster remembers.
fn remember(qsfs: &Binary, count: usize) {
    for _ in 0..count {
        qsfs.run(["token", "create", "--role", "client"]).ok();
    }
}

fn remembered(qsfs: &Binary) -> usize {
    let said = qsfs.run(["token", "list"]).ok().stdout;
    said.lines().filter(|line| line.contains("client")).count()
}

struct Cluster {
    daemons: Daemons,
    qsfs: Binary,
}

/// m1, m2, m3.
fn start() -> Cluster {
    let mut daemons = Daemons::new(Path::new(env!("CARGO_BIN_EXE_qsfs")));
    let (address, data, file) = (
        free_address(),
        daemons.path("m1"),
        daemons.path("first.toml"),
    );
    let arguments = [
        "--cluster",
        &file,
        "metad",
        "bootstrap",
        "--name",
        "m1",
        "--location",
        "ams",
        "--listen",
        &address,
        "--data",
        &data,
    ];
    let said = daemons
        .start_and_hear("m1", &arguments, "cluster file: ")
        .join("\n");
    let tokens = tokens_said(&said);
    for (name, (location, token)) in [("m2", ("par", &tokens[0])), ("m3", ("fra", &tokens[1]))] {
        join(&mut daemons, name, location, token);
    }
    let qsfs = daemons.binary().with_cluster(&file);
    until_voters(&qsfs, 3);
    Cluster { daemons, qsfs }
}

#[test]
fn a_cluster_comes_back_from_a_backup_and_from_its_last_survivor() {
    let mut cluster = start();
    remember(&cluster.qsfs, 3);
    let backup = back_up(&cluster);
    remember(&cluster.qsfs, 2);
    for name in ["m1", "m2", "m3"] {
        cluster.daemons.stop(name);
    }
    inspected(&cluster);
    restored(&mut cluster, &backup);
    survived(&mut cluster);
}

fn back_up(cluster: &Cluster) -> String {
    let (data, file) = (
        cluster.daemons.path("m1"),
        cluster.daemons.path("meta.backup"),
    );
    let backup = ["metad", "backup", "--data", &data, "--to", &file];
    let said = cluster.qsfs.run(backup).ok().stdout;
    assert!(said.contains("whole"), "{said}");
    for name in [file.clone(), format!("{file}.ca-key.pem")] {
        let mode = fs::metadata(name).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    cluster.qsfs.run(backup).fails_naming(&["exists already"]);
    cluster.qsfs.run(["metad", "verify", &file]).ok();
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let rotten = cluster.daemons.path("rotten.backup");
    fs::write(&rotten, bytes).unwrap();
    cluster
        .qsfs
        .run(["metad", "verify", &rotten])
        .fails_naming(&["damaged"]);
    file
}

fn inspected(cluster: &Cluster) {
    let data = cluster.daemons.path("m2");
    let said = cluster
        .qsfs
        .run(["metad", "inspect", "--data", &data])
        .ok()
        .stdout;
    for word in ["vote", "segment", "whole: entries", "state", "3 metads"] {
        assert!(said.contains(word), "{word} is missing:\n{said}");
    }
    assert!(!said.contains("DAMAGED"), "{said}");
}

fn restored(cluster: &mut Cluster, backup: &str) {
    let (address, data) = (free_address(), cluster.daemons.path("n1"));
    let file = format!("{data}/cluster.toml");
    let mut arguments = vec![
        "metad",
        "restore",
        backup,
        "--name",
        "n1",
        "--location",
        "ams",
        "--listen",
        &address,
        "--data",
        &data,
    ];
    let qsfs = cluster.daemons.binary().with_cluster(&file);
    let plan = qsfs.run(&arguments).ok().stdout;
    assert!(
        plan.contains("is lost") && plan.contains("--apply"),
        "{plan}"
    );
    assert!(!Path::new(&data).exists());
    arguments.push("--apply");
    let said = qsfs.run(&arguments).ok().stdout;
    cluster
        .daemons
        .start("n1", &["metad", "serve", "--data", &data]);
    until_voters(&qsfs, 1);
    assert_eq!(remembered(&qsfs), 3, "what was there when it was backed up");
    let tokens = tokens_said(&said);
    join(&mut cluster.daemons, "n2", "par", &tokens[0]);
    join(&mut cluster.daemons, "n3", "fra", &tokens[1]);
    until_voters(&qsfs, 3);
    remember(&qsfs, 1);
    // Those who joined hold all of it: without the first, nothing is missing.
    cluster.daemons.stop("n1");
    wait_for("the other two", || {
        holds(qsfs.run(["token", "list"]).code == 0, "no leader yet")
    });
    assert_eq!(remembered(&qsfs), 4);
    let plan = qsfs.run(["metad", "remove", "n1"]).ok().stdout;
    assert!(plan.contains("--apply"), "{plan}");
    qsfs.run(["metad", "remove", "n1", "--apply"]).ok();
    until_voters(&qsfs, 2);
    cluster.qsfs = qsfs;
}

fn survived(cluster: &mut Cluster) {
    for name in ["n2", "n3"] {
        cluster.daemons.stop(name);
    }
    let data = cluster.daemons.path("n3");
    let file = format!("{data}/cluster.toml");
    let qsfs = cluster.daemons.binary().with_cluster(&file);
    let plan = qsfs.run(["metad", "recover", "--data", &data]).ok().stdout;
    assert!(
        plan.contains("n3 holds everything") && plan.contains("is lost"),
        "{plan}"
    );
    let said = qsfs
        .run(["metad", "recover", "--data", &data, "--apply"])
        .ok()
        .stdout;
    cluster
        .daemons
        .start("n3", &["metad", "serve", "--data", &data]);
    until_voters(&qsfs, 1);
    assert_eq!(remembered(&qsfs), 4);
    join(&mut cluster.daemons, "o1", "ams", &tokens_said(&said)[0]);
    until_voters(&qsfs, 2);
}

fn status(qsfs: &Binary) -> Result<serde_json::Value, String> {
    let said = qsfs.run(["status", "--json"]);
    serde_json::from_str(&said.stdout).map_err(|_| said.stderr)
}

#[test]
fn changes_are_watched_and_without_a_quorum_status_says_how_old_it_is() {
    let mut cluster = start();
    let before = status(&cluster.qsfs).unwrap()["quorum"]["applied"].to_string();
    for rebuilds in ["3", "4"] {
        let change = ["metad", "settings", "--rebuilds", rebuilds];
        cluster.qsfs.run(change).ok();
    }
    let watch = [
        "metad", "watch", "--after", &before, "--count", "2", "--json",
    ];
    let said = cluster.qsfs.run(watch).ok().stdout;
    let lines: Vec<serde_json::Value> = said
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let began = &lines[0];
    assert_eq!(
        (&began["event"], &began["index"].to_string()),
        (&"began".into(), &before)
    );
    let changes: Vec<_> = lines
        .iter()
        .filter(|line| line["event"] == "changes")
        .collect();
    let rebuilds = changes
        .iter()
        .map(|line| &line["changes"][0]["settings"]["rebuilds_max"]);
    assert_eq!(rebuilds.collect::<Vec<_>>(), [3, 4]);
    assert!(changes[0]["index"].as_u64() < changes[1]["index"].as_u64());
    let said = cluster
        .qsfs
        .run(["metad", "watch", "--after", &before, "--count", "1"])
        .ok()
        .stdout;
    assert!(said.contains("settings changed"), "{said}");

    // m1 stays, which has been up to date until now.
    for name in ["m2", "m3"] {
        cluster.daemons.stop(name);
    }
    wait_for("no quorum", || {
        let status = status(&cluster.qsfs)?;
        let told = |finding: &&serde_json::Value| finding["name"] == "NO_QUORUM";
        let finding = status["findings"]
            .as_array()
            .into_iter()
            .flatten()
            .find(told);
        let text = finding.map_or("", |finding| finding["text"].as_str().unwrap());
        holds(
            status["verdict"] == "critical" && text.contains("it was up to date"),
            &status,
        )
    });
    let said = cluster.qsfs.run(["status"]).ok().stdout;
    assert!(
        said.contains("NO QUORUM") && said.contains("at most"),
        "{said}"
    );
}
