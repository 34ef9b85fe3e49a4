//! Certificates that live for seconds, through the binary: everything renews itself while it serves, what was off past its end comes back
//! in the way it is told, and an ended certificate opens nothing.

#![expect(clippy::unwrap_used, reason = "tests")]

use qsfs_jepsen_tests::binary::{Binary, Outcome};
use qsfs_jepsen_tests::dev_cluster::skip_reason;
use qsfs_jepsen_tests::wait::holds;
use qsfs_jepsen_tests::{Daemons, free_address, wait_for};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Long enough that a busy machine renews in time, which has a third of it.
const LIFE: &str = "24s";
/// Lives that everything must live through.
const LIVES: u64 = 3;
const DAEMONS: [&str; 4] = ["m1", "m2", "m3", "a1"];

struct Cluster {
    daemons: Daemons,
    admin: Binary,
}

impl Cluster {
    fn path(&self, name: &str) -> String {
        self.daemons.path(name)
    }

    /// When the certificate of a daemon ends, and for how long it was made. Both in ms.
    fn certificate(&self, of: &str) -> (u64, u64) {
        let data = self.path(of);
        certificate(
            &self
                .admin
                .run(["certificate", "show", "--json", "--data", &data]),
        )
    }

    fn status(&self) -> Result<Value, String> {
        let said = self.admin.run(["status", "--json"]);
        serde_json::from_str(&said.stdout).map_err(|_| said.stderr)
    }

    fn wait_well(&self, what: &str) {
        wait_for(what, || {
            let status = self.status()?;
            let up = status["backends"].as_array().map_or(0, |all| {
                all.iter()
                    .filter(|backend| backend["state"] == "up")
                    .count()
            });
            holds(status["quorum"]["healthy"] == 3 && up == 2, &status)
        });
    }

    fn token(&self, role: &str) -> String {
        let said = self.admin.run(["token", "create", "--role", role]).ok();
        let file = self.path(&format!("{role}.token"));
        fs::write(&file, said.stdout).unwrap();
        file
    }
}

fn certificate(said: &Outcome) -> (u64, u64) {
    let said = said.clone().ok();
    let value: Value = serde_json::from_str(&said.stdout).unwrap();
    let of = &value["certificate"];
    (
        of["expires_ms"].as_u64().unwrap(),
        of["life_ms"].as_u64().unwrap(),
    )
}

fn now_ms() -> u64 {
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

fn start() -> Cluster {
    let mut daemons = Daemons::new(Path::new(env!("CARGO_BIN_EXE_qsfs")));
    let (address, data, file) = (
        free_address(),
        daemons.path("m1"),
        daemons.path("admin.toml"),
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
        "--heartbeat",
        "300ms",
        "--down-after",
        "3s",
        "--certificate-life",
        LIFE,
    ];
    let said = daemons.start_and_hear("m1", &arguments, "cluster file: ");
    let tokens = |role: &str| -> Vec<String> {
        let prefix = format!("{role} ");
        let of_role = said.iter().filter_map(|line| line.strip_prefix(&prefix));
        of_role.map(str::to_owned).collect()
    };
    for ((name, location), token) in [("m2", "par"), ("m3", "fra")].iter().zip(tokens("metad")) {
        let (address, data) = (free_address(), daemons.path(name));
        let arguments = [
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
        ];
        daemons.start(name, &arguments);
    }
    let disks = [1, 2].map(|n| format!("{}=1GiB", daemons.path(&format!("disk{n}"))));
    let (address, data) = (free_address(), daemons.path("a1"));
    let token = tokens("agent").remove(0);
    let arguments = [
        "agent",
        "join",
        &token,
        "--name",
        "n1",
        "--location",
        "ams",
        "--listen",
        &address,
        "--data",
        &data,
        "--backend",
        &disks[0],
        "--backend",
        &disks[1],
    ];
    daemons.start("a1", &arguments);
    let admin = daemons.binary().with_cluster(file);
    let cluster = Cluster { daemons, admin };
    cluster.wait_well("three voters and two backends");
    cluster
}

/// A mount that writes and pushes all the time, where there is FUSE.
fn mount(cluster: &Cluster) -> Option<String> {
    if skip_reason().is_some() {
        return None;
    }
    let (kit, dir, state) = (
        cluster.path("v.kit"),
        cluster.path("mnt"),
        cluster.path("state"),
    );
    let create = ["volume", "create", "v", "--policy", "1+1", "--kit", &kit];
    cluster.admin.run(create).ok();
    fs::create_dir(&dir).unwrap();
    // With nothing but the kit: what is renewed is kept in the state directory.
    let nobody = cluster.daemons.binary();
    let arguments = ["mount", "v", &dir, "--kit", &kit, "--state-dir", &state];
    nobody.run(arguments).ok();
    Some(dir)
}

#[test]
fn certificates_of_seconds_are_renewed_under_load_and_ended_ones_open_nothing() {
    let mut cluster = start();
    let client_file = cluster.path("client.toml");
    let token = cluster.token("client");
    let client = cluster.daemons.binary().with_cluster(&client_file);
    let join = [
        "--cluster",
        &client_file,
        "client",
        "join",
        "--token-file",
        &token,
    ];
    client.run(join).ok();
    for file in ["client", "admin"] {
        fs::copy(
            cluster.path(&format!("{file}.toml")),
            cluster.path(&format!("{file}-old.toml")),
        )
        .unwrap();
    }
    let mounted = mount(&cluster);
    let (_, life_ms) = cluster.certificate("a1");
    assert_eq!(life_ms, 24_000);
    let renewed = |firsts: &[u64]| {
        let of =
            |(name, first): (&&str, &u64)| cluster.certificate(name).0 >= first + LIVES * life_ms;
        DAEMONS.iter().zip(firsts).all(of)
    };
    let firsts = DAEMONS.map(|name| cluster.certificate(name).0);
    let mut rounds = 0;
    while !renewed(&firsts) {
        assert!(
            now_ms() < firsts[0] + 10 * LIVES * life_ms,
            "{:?}",
            cluster.daemons.log("a1")
        );
        // Nothing may fail at any time.
        client.run(["backend", "list"]).ok();
        let prefix = cluster
            .admin
            .run(["token", "create", "--role", "agent"])
            .ok();
        assert!(prefix.stdout.starts_with("qsfs1-"));
        let status = cluster.status().unwrap();
        let findings = status["findings"].to_string();
        assert!(!findings.contains("CERTIFICATE"), "{findings}");
        assert!(
            !findings.contains("NODE_DOWN") && !findings.contains("METAD_DOWN"),
            "{findings}"
        );
        if let Some(dir) = &mounted {
            fs::write(format!("{dir}/f{rounds}"), format!("round {rounds}")).unwrap();
            client.run(["sync", dir, "--timeout", "60"]).ok();
        }
        rounds += 1;
    }
    assert!(rounds > 3, "{rounds} rounds in {LIVES} lives");
    // Files were renewed by the commands that used them.
    for file in ["client", "admin"] {
        let show = |name: &str| {
            let file = cluster.path(&format!("{name}.toml"));
            let shown =
                cluster
                    .daemons
                    .binary()
                    .with_cluster(file)
                    .run(["certificate", "show", "--json"]);
            certificate(&shown).0
        };
        assert!(show(file) > show(&format!("{file}-old")) && show(file) > now_ms());
    }
    ended_files(&cluster, &client_file);
    // Nobody uses it for a while now.
    let fresh = ["certificate", "renew"];
    cluster.admin.run(fresh).ok();
    if let Some(dir) = &mounted {
        remount(&cluster, dir, rounds);
    }
    cluster.admin.run(fresh).ok();
    off_past_the_end(&mut cluster);
}

/// What was written in every round is there, and the mount finds its renewed certificate again.
fn remount(cluster: &Cluster, dir: &str, rounds: u32) {
    for round in 0..rounds {
        let held = fs::read_to_string(format!("{dir}/f{round}")).unwrap();
        assert_eq!(held, format!("round {round}"));
    }
    cluster.daemons.binary().run(["umount", dir]).ok();
    // The kit's own certificate has ended, the state directory's copy has the renewed one.
    let state = cluster.path("state");
    let kit = cluster.path("v.kit");
    let again = ["mount", "v", dir, "--kit", &kit, "--state-dir", &state];
    let nobody = cluster.daemons.binary();
    nobody.run(again).ok();
    nobody.run(["umount", dir]).ok();
}

/// Cluster files that nobody used in time: refused with the way out, and the way out works.
fn ended_files(cluster: &Cluster, client_file: &str) {
    // By hand, while it is good.
    let by_hand = cluster.daemons.binary().with_cluster(client_file);
    let before = fs::read_to_string(client_file).unwrap();
    by_hand.run(["certificate", "renew"]).ok();
    assert_ne!(fs::read_to_string(client_file).unwrap(), before);
    by_hand.run(["backend", "list"]).ok();
    let old = cluster.path("client-old.toml");
    let late = cluster.daemons.binary().with_cluster(&old);
    let refused = late.run(["backend", "list"]);
    refused.code_is(1).fails_naming(&[
        "certificate of client",
        "ended",
        "qsfs certificate renew --token-file",
    ]);
    late.run(["certificate", "renew"])
        .code_is(1)
        .fails_naming(&["ended"]);
    let wrong = cluster.token("agent");
    late.run(["certificate", "renew", "--token-file", &wrong])
        .code_is(1)
        .fails_naming(&["is for a agent"]);
    let token = cluster.token("client");
    late.run(["certificate", "renew", "--token-file", &token])
        .ok();
    late.run(["backend", "list"]).ok();
    let old = cluster.path("admin-old.toml");
    let late = cluster.daemons.binary().with_cluster(&old);
    late.run(["token", "list"])
        .code_is(1)
        .fails_naming(&["ended", "--authority"]);
    let (metad, agent) = (cluster.path("m1"), cluster.path("a1"));
    late.run(["certificate", "renew", "--authority", &agent])
        .code_is(1)
        .fails_naming(&["holds no metad"]);
    late.run(["certificate", "renew", "--authority", &metad])
        .ok();
    late.run(["token", "list"]).ok();
}

/// A metad comes back by itself, an agent with a token, both as who they were.
fn off_past_the_end(cluster: &mut Cluster) {
    for name in ["m2", "a1"] {
        assert_eq!(cluster.daemons.stop(name), Some(0));
    }
    let ends = ["m2", "a1"].map(|name| cluster.certificate(name).0);
    wait_for("their certificates to end", || {
        // The admin's would end as well if nobody used it.
        cluster.status()?;
        holds(ends.iter().all(|ends_ms| now_ms() > *ends_ms), "not yet")
    });
    let (metad, agent) = (cluster.path("m2"), cluster.path("a1"));
    cluster
        .daemons
        .start("m2", &["metad", "serve", "--data", &metad]);
    cluster
        .daemons
        .start("a1", &["agent", "serve", "--data", &agent]);
    assert_eq!(cluster.daemons.wait_end("a1"), Some(1));
    let said = cluster.daemons.log("a1");
    assert!(
        said.contains("certificate of agent ams/n1 ended") && said.contains("--token-file"),
        "{said}"
    );
    let renew = ["certificate", "renew", "--data", &agent];
    cluster
        .admin
        .run(renew)
        .code_is(1)
        .fails_naming(&["ended", "--token-file"]);
    let token = cluster.token("agent");
    cluster
        .admin
        .run([&renew[..], &["--token-file", &token]].concat())
        .ok();
    cluster
        .daemons
        .start("a1", &["agent", "serve", "--data", &agent]);
    cluster.wait_well("the metad and the agent are back");
    let status = cluster.status().unwrap();
    assert_eq!(
        status["backends"].as_array().unwrap().len(),
        2,
        "no twins: {status}"
    );
}
