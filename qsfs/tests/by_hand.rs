//! The real thing: bootstrap, join, create, mount, every process by itself; and what happens when somebody gets it wrong.
//! Items 2, 8, 9 and 10 of the main job.

#![expect(clippy::unwrap_used, reason = "tests")]

use qsfs_jepsen_tests::binary::{Binary, Outcome};
use qsfs_jepsen_tests::dev_cluster::skip_reason;
use qsfs_jepsen_tests::wait::holds;
use qsfs_jepsen_tests::{Daemons, free_address, process, wait_for};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

struct Cluster {
    daemons: Daemons,
    qsfs: Binary,
    metads: Vec<String>,
    agents: Vec<String>,
    metad_tokens: Vec<String>,
    agent_tokens: Vec<String>,
}

impl Cluster {
    fn run(&self, arguments: &[&str]) -> Outcome {
        self.qsfs.run(arguments)
    }

    fn path(&self, name: &str) -> String {
        self.daemons.path(name)
    }
}

/// `qsfs metad bootstrap`, and what it printed.
fn bootstrap(daemons: &mut Daemons, name: &str) -> (String, Vec<String>) {
    let address = free_address();
    let (data, file) = (daemons.path(name), daemons.path(&format!("{name}.toml")));
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
        "--heartbeat",
        "300ms",
        "--down-after",
        "3s",
        "--lost-after",
        "60s",
        "--lease-ttl",
        "5s",
    ];
    let said = daemons.start_and_hear(name, &arguments, "cluster file: ");
    assert!(said.last().unwrap().ends_with(&file), "{said:?}");
    (address, said)
}

fn tokens(said: &[String], role: &str) -> Vec<String> {
    let prefix = format!("{role} ");
    let of_role = said.iter().filter_map(|line| line.strip_prefix(&prefix));
    of_role.map(str::to_owned).collect()
}

#[test]
fn a_cluster_is_built_by_hand() {
    if skip_reason().is_some() {
        return;
    }
    let mut cluster = start();
    eprintln!("-- volumes");
    volumes(&cluster);
    eprintln!("-- tokens");
    bad_tokens(&mut cluster);
    eprintln!("-- another cluster");
    another_cluster(&mut cluster);
    eprintln!("-- mounts");
    mounts(&mut cluster);
    eprintln!("-- garbage");
    garbage(&cluster);
    eprintln!("-- the first metad dies");
    first_metad_dies(&mut cluster);
    eprintln!("-- no quorum");
    no_quorum(&mut cluster);
}

fn start() -> Cluster {
    let mut daemons = Daemons::new(Path::new(env!("CARGO_BIN_EXE_qsfs")));
    let (first, said) = bootstrap(&mut daemons, "m1");
    let file = daemons.base().join("m1.toml");
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let mut cluster = Cluster {
        qsfs: daemons.binary().with_cluster(file),
        metads: vec![first],
        agents: Vec::new(),
        metad_tokens: tokens(&said, "metad"),
        agent_tokens: tokens(&said, "agent"),
        daemons,
    };
    assert!(
        cluster.metad_tokens.len() >= 2 && cluster.agent_tokens.len() >= 2,
        "{said:?}"
    );
    for (name, location) in [("m2", "par"), ("m3", "fra")] {
        let token = cluster.metad_tokens.remove(0);
        let address = free_address();
        let data = cluster.path(name);
        cluster.daemons.start(
            name,
            &[
                "metad",
                "join",
                &token,
                "--name",
                name,
                "--location",
                location,
                "--listen",
                &address,
                "--data",
                &data,
            ],
        );
        cluster.metads.push(address);
    }
    for (name, location) in [("a1", "ams"), ("a2", "par")] {
        let token = cluster.agent_tokens.remove(0);
        let token_file = cluster.path(&format!("{name}.token"));
        fs::write(&token_file, token).unwrap();
        join_agent(&mut cluster, name, location, &token_file);
    }
    wait_for("three voters and four backends", || {
        let said = cluster.run(&["status", "--json"]);
        let status: serde_json::Value =
            serde_json::from_str(&said.stdout).map_err(|_| said.stderr.clone())?;
        let up = status["backends"]
            .as_array()
            .map_or(0, |all| all.iter().filter(|b| b["state"] == "up").count());
        holds(status["quorum"]["healthy"] == 3 && up == 4, &status)
    });
    cluster
}

fn join_agent(cluster: &mut Cluster, name: &str, location: &str, token_file: &str) {
    let (address, data) = (free_address(), cluster.path(name));
    let backends = [1, 2].map(|n| format!("{}=1GiB", cluster.path(&format!("{name}-disk{n}"))));
    cluster.daemons.start(
        name,
        &[
            "agent",
            "join",
            "--token-file",
            token_file,
            "--name",
            name,
            "--location",
            location,
            "--listen",
            &address,
            "--data",
            &data,
            "--backend",
            &backends[0],
            "--backend",
            &backends[1],
        ],
    );
    cluster.agents.push(address);
}

fn volumes(cluster: &Cluster) {
    let kit = cluster.path("big.kit");
    let unmet = cluster.run(&["volume", "create", "big", "--policy", "4+4", "--kit", &kit]);
    unmet
        .code_is(15)
        .fails_naming(&["policy cannot be met", "8 backends"]);
    assert!(!Path::new(&kit).exists());
    let unmet = cluster.run(&[
        "volume",
        "create",
        "big",
        "--policy",
        "3+1",
        "--survive",
        "location=1",
        "--kit",
        &kit,
    ]);
    unmet.code_is(15).fails_naming(&["location"]);
    cluster
        .run(&["volume", "create", "big", "--policy", "4-4"])
        .code_is(2);
    let kit = cluster.path("photos.kit");
    let said = cluster
        .run(&[
            "volume",
            "create",
            "photos",
            "--survive",
            "location=1,node=1",
            "--kit",
            &kit,
        ])
        .ok();
    assert!(
        said.stdout.contains("policy 2+2") && said.stdout.contains("Keep a copy"),
        "{}",
        said.stdout
    );
    assert_eq!(
        fs::metadata(&kit).unwrap().permissions().mode() & 0o777,
        0o600
    );
    cluster
        .run(&[
            "volume",
            "create",
            "photos",
            "--policy",
            "2+2",
            "--kit",
            &cluster.path("x.kit"),
        ])
        .fails_naming(&["exists"]);
    cluster
        .run(&[
            "volume",
            "create",
            "other",
            "--policy",
            "2+2",
            "--kit",
            &cluster.path("other.kit"),
        ])
        .ok();
    cluster
        .run(&["volume", "set", "other", "--push-interval", "1m"])
        .ok();
    assert!(
        cluster
            .run(&["volume", "info", "other"])
            .ok()
            .stdout
            .contains("1 min")
    );
    assert!(
        cluster
            .run(&["volume", "rm", "other"])
            .ok()
            .stdout
            .contains("--apply")
    );
    cluster.run(&["key", "verify-kit", "--kit", &kit]).ok();
}

fn bad_tokens(cluster: &mut Cluster) {
    let (address, data) = (free_address(), cluster.path("nobody"));
    let backend = format!("{}=1GiB", cluster.path("nobody-disk"));
    let join = |cluster: &Cluster, token: &str| {
        cluster.run(&[
            "agent",
            "join",
            token,
            "--name",
            "nobody",
            "--location",
            "ams",
            "--listen",
            &address,
            "--data",
            &data,
            "--backend",
            &backend,
        ])
    };
    let used = fs::read_to_string(cluster.path("a1.token")).unwrap();
    join(cluster, &used).fails_naming(&["token"]);
    join(cluster, "nonsense").fails_naming(&["not a join token"]);
    let good = cluster.agent_tokens.remove(0);
    join(cluster, &good[..good.len() - 3]).fails_naming(&["token"]);
    let client = cluster
        .run(&["token", "create", "--role", "client"])
        .ok()
        .stdout;
    join(cluster, client.trim()).fails_naming(&["client"]);
    let expired = cluster
        .run(&["token", "create", "--role", "agent", "--ttl", "1ms"])
        .ok()
        .stdout;
    join(cluster, expired.trim()).fails_naming(&["expired"]);
    let revoked = cluster
        .run(&["token", "create", "--role", "agent"])
        .ok()
        .stdout;
    let list = cluster.run(&["token", "list"]).ok().stdout;
    let newest = list
        .lines()
        .find(|line| line.contains("in 59 min") && line.contains("agent"))
        .unwrap();
    cluster
        .run(&["token", "revoke", newest.split_whitespace().next().unwrap()])
        .ok();
    join(cluster, revoked.trim()).fails_naming(&["token"]);
    assert!(
        cluster
            .run(&["status", "--json"])
            .ok()
            .stdout
            .matches("\"node\"")
            .count()
            == 4
    );
    // The client token still lets a machine become a client.
    let file = cluster.path("client.toml");
    let token_file = cluster.path("client.token");
    fs::write(&token_file, client).unwrap();
    cluster
        .run(&[
            "client",
            "join",
            "--token-file",
            &token_file,
            "--cluster",
            &file,
        ])
        .ok();
    let as_client = cluster.daemons.binary().with_cluster(file);
    as_client.run(["status"]).ok();
    as_client
        .run(["token", "create", "--role", "agent"])
        .fails_naming(&["denied"]);
}

fn another_cluster(cluster: &mut Cluster) {
    let (address, said) = bootstrap(&mut cluster.daemons, "stranger");
    let token = tokens(&said, "agent").remove(0);
    let data = cluster.path("a1");
    let backend = format!("{}=1GiB", cluster.path("stranger-disk"));
    let other = cluster.run(&[
        "agent",
        "join",
        &token,
        "--name",
        "a1",
        "--location",
        "ams",
        "--listen",
        &free_address(),
        "--data",
        &data,
        "--backend",
        &backend,
    ]);
    assert!(other.code == 1, "{other:?}");
    // Our certificate at their address: neither side takes the other for its own.
    let ours = fs::read_to_string(cluster.path("m1.toml")).unwrap();
    let wrong = cluster.path("wrong.toml");
    let crossed: String = ours
        .lines()
        .map(|line| match line.starts_with("endpoints") {
            true => format!("endpoints = [\"{address}\"]\n"),
            false => format!("{line}\n"),
        })
        .collect();
    fs::write(&wrong, crossed).unwrap();
    let refused = cluster.daemons.binary().with_cluster(wrong).run(["status"]);
    assert!(refused.code > 0 && refused.stdout.is_empty(), "{refused:?}");
    assert_eq!(cluster.daemons.stop("stranger"), Some(0));
}

fn mounts(cluster: &mut Cluster) {
    let (mount, state) = (cluster.path("mnt"), cluster.path("state"));
    fs::create_dir(&mount).unwrap();
    cluster.run(&["mount", "nothing", &mount]).code_is(10);
    let wrong = cluster.path("other.kit");
    cluster
        .run(&[
            "mount",
            "photos",
            &mount,
            "--state-dir",
            &state,
            "--kit",
            &wrong,
        ])
        .code_is(12);
    let damaged = cluster.path("damaged.kit");
    let kit = fs::read_to_string(cluster.path("photos.kit")).unwrap();
    fs::write(&damaged, kit.replacen("photos", "fotos!", 1)).unwrap();
    cluster
        .run(&[
            "mount",
            "photos",
            &mount,
            "--state-dir",
            &state,
            "--kit",
            &damaged,
        ])
        .fails_naming(&["damaged.kit"]);
    assert!(!process::is_mounted(Path::new(&mount)));
    // The kit was kept on this machine when the volume was created.
    cluster.run(&["mount", "photos", &mount]).ok();
    assert!(process::is_mounted(Path::new(&mount)));
    fs::write(Path::new(&mount).join("a"), b"hello").unwrap();
    cluster
        .run(&["mount", "photos", &mount])
        .fails_naming(&["mounted"]);
    cluster.run(&["sync", &mount]).ok();
    let second = cluster.path("second");
    fs::create_dir(&second).unwrap();
    let kit = cluster.path("photos.kit");
    let held = cluster.run(&[
        "mount",
        "photos",
        &second,
        "--state-dir",
        &state,
        "--kit",
        &kit,
    ]);
    held.code_is(11).fails_naming(&["--takeover"]);
    cluster
        .run(&["volume", "rm", "photos", "--apply"])
        .code_is(11);
    cluster.run(&["umount", &mount]).ok();
    assert!(!process::is_mounted(Path::new(&mount)));
    cluster
        .run(&["umount", &mount])
        .fails_naming(&["not inside a mounted"]);
    // Elsewhere, with the kit alone.
    let bare = cluster.daemons.binary().with_cluster("");
    bare.run([
        "mount",
        "photos",
        &second,
        "--state-dir",
        &state,
        "--kit",
        &kit,
    ])
    .ok();
    assert_eq!(fs::read(Path::new(&second).join("a")).unwrap(), b"hello");
    cluster.run(&["umount", &second]).ok();
    // The state directory is of another volume.
    let wrong = cluster.run(&[
        "mount",
        "other",
        &second,
        "--state-dir",
        &state,
        "--kit",
        &cluster.path("other.kit"),
    ]);
    wrong.fails_naming(&["belongs to"]);
    cluster.run(&["volume", "rm", "other", "--apply"]).ok();
}

/// Bytes that are no TLS at all, at every port: nobody cares.
fn garbage(cluster: &Cluster) {
    for address in cluster.metads.iter().chain(&cluster.agents) {
        let mut stream = TcpStream::connect(address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let _ = stream.write_all(&[0x2a; 4_096]);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(
            answer.len() < 1_024,
            "{address} answered {} bytes to garbage",
            answer.len()
        );
    }
    cluster.run(&["status"]).ok();
    wait_for("health after the garbage", || {
        let said = cluster.run(&["health"]);
        holds(said.code == 0, cluster.run(&["status"]).stdout)
    });
}

/// Agents that joined when there was one metad knew only that one, and were taken for dead when it died.
fn first_metad_dies(cluster: &mut Cluster) {
    cluster.run(&["metad", "members"]).ok();
    wait_for("the agents to know all metads", || {
        let known = ["a1", "a2"].map(|name| {
            let path = Path::new(&cluster.path(name)).join("agent.toml");
            fs::read_to_string(path).unwrap_or_default()
        });
        let all = |text: &String| cluster.metads.iter().all(|metad| text.contains(metad));
        holds(known.iter().all(all), "one is not known")
    });
    let sessions = |cluster: &Cluster, name: &str| {
        let log = cluster.daemons.log(name);
        log.matches("session with metad begins").count()
    };
    let before = ["a1", "a2"].map(|name| sessions(cluster, name));
    assert_eq!(cluster.daemons.stop("m1"), Some(0));
    wait_for("the agents to find the new leader", || {
        let now = ["a1", "a2"].map(|name| sessions(cluster, name));
        holds(
            now[0] > before[0] && now[1] > before[1],
            format!("{before:?} {now:?}"),
        )
    });
    cluster.run(&["status"]).ok();
    let data = cluster.path("m1");
    cluster
        .daemons
        .start("m1", &["metad", "serve", "--data", &data]);
    wait_for("three metads again", || {
        let said = cluster.run(&["health"]);
        holds(said.code == 0, said.stdout)
    });
}

fn no_quorum(cluster: &mut Cluster) {
    for name in ["m2", "m3"] {
        assert_eq!(
            cluster.daemons.stop(name),
            Some(0),
            "{name}: {}",
            cluster.daemons.log(name)
        );
    }
    let refused = cluster.run(&[
        "volume",
        "create",
        "late",
        "--policy",
        "2+2",
        "--kit",
        &cluster.path("late.kit"),
    ]);
    refused.code_is(13);
    let health = cluster.run(&["health"]);
    assert!(health.code >= 2, "{health:?}");
    let data = cluster.path("m2");
    cluster
        .daemons
        .start("m2", &["metad", "serve", "--data", &data]);
    wait_for("a quorum again", || {
        let said = cluster.run(&["volume", "list", "--json"]);
        holds(
            said.code == 0 && said.stdout.contains("photos"),
            &said.stderr,
        )
    });
    for name in ["a1", "a2", "m2", "m1"] {
        assert_eq!(
            cluster.daemons.stop(name),
            Some(0),
            "{name}: {}",
            cluster.daemons.log(name)
        );
    }
}
