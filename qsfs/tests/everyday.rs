//! One cluster through its everyday life and its accidents: real input, push and fetch, rot, crashes, the client machine gone.
//! Items 1, 3, 4, 6, 7, 8 and 9 of the main job.

#![expect(clippy::unwrap_used, reason = "tests")]

use nix::sys::signal::Signal;
use qsfs_jepsen_tests::binary::Outcome;
use qsfs_jepsen_tests::dev_cluster::{shell, skip_reason};
use qsfs_jepsen_tests::history::{self, History, Model};
use qsfs_jepsen_tests::tree::{TreeOptions, build, compare, files_below};
use qsfs_jepsen_tests::wait::holds;
use qsfs_jepsen_tests::{DevCluster, DevOptions, process, wait_for};
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const TREE: TreeOptions = TreeOptions {
    files: 250,
    file_bytes_max: 40_000,
    large_bytes: 12 << 20,
};

/// Operations after which the mount is killed.
const CRASH_AFTER: usize = 1_500;

#[test]
fn a_volume_lives_through_its_accidents() {
    if skip_reason().is_some() {
        return;
    }
    let mut cluster = DevCluster::start(
        Path::new(env!("CARGO_BIN_EXE_qsfs")),
        DevOptions::with(&[
            "--datafile-size",
            "4MiB",
            "--push-interval",
            "5s",
            "--capacity",
            "2GiB",
        ]),
    );
    let tree = cluster.scratch("tree");
    step("real input", || real_input(&cluster, &tree));
    step("real programs", || real_programs(&cluster));
    step("push, evict, fetch", || push_evict_fetch(&cluster, &tree));
    step("listings", || listings(&cluster));
    step("rot", || rot(&cluster, &tree));
    step("the metad leader dies", || leader_dies(&cluster));
    step("an agent dies in a push", || agent_dies(&cluster));
    step("the mount dies", || mount_dies(&cluster));
    step("the client machine is gone", || {
        client_gone(&cluster, &tree)
    });
    step("the end", || cluster.interrupt());
    let left = process::all_naming(cluster.base());
    assert!(left.is_empty(), "still running: {left:?}");
    assert!(!process::is_mounted(cluster.mount()));
}

fn step(what: &str, run: impl FnOnce()) {
    let begun = std::time::Instant::now();
    eprintln!("-- {what}");
    run();
    eprintln!("-- {what}: {:.1?}", begun.elapsed());
}

fn same(expected: &Path, actual: &Path) {
    if let Err(differences) = compare(expected, actual) {
        panic!(
            "{} differs from {}:\n{differences}",
            actual.display(),
            expected.display()
        );
    }
}

fn real_input(cluster: &DevCluster, tree: &Path) {
    build(tree, 1, TREE).unwrap();
    shell(cluster.base(), "cp -a tree/. mnt/tree");
    same(tree, &cluster.mount().join("tree"));
    shell(cluster.base(), "diff -r --no-dereference tree mnt/tree");
}

fn real_programs(cluster: &DevCluster) {
    shell(
        cluster.base(),
        "mkdir repo && cd repo && git init -q && cp -r ../tree/. . && git add -A \
         && git -c user.name=t -c user.email=t@example.org commit -qm first \
         && cd .. && git clone -q repo mnt/clone && cd mnt/clone && git fsck --strict && test -z \"$(git status --porcelain)\"",
    );
    let rows = shell(
        cluster.mount(),
        "sqlite3 data.db 'pragma journal_mode=wal; create table t(n integer primary key, b blob); \
         with recursive s(n) as (select 1 union all select n+1 from s where n<500) insert into t select n, randomblob(2000) from s; \
         update t set b=zeroblob(10) where n%3=0; pragma integrity_check; select count(*), sum(n) from t;'",
    );
    assert!(rows.contains("ok") && rows.contains("500|125250"), "{rows}");
    let sum = |dir: &str| {
        shell(
            cluster.base(),
            &format!("tar -C {dir} --sort=name -cf - . | sha256sum"),
        )
    };
    assert_eq!(sum("tree"), sum("mnt/tree"));
}

fn push_evict_fetch(cluster: &DevCluster, tree: &Path) {
    cluster.sync();
    let volume = cluster.volume().unwrap();
    assert!(
        volume.datafiles > 3 && volume.below_policy == 0,
        "{volume:?}"
    );
    wait_for("nothing at risk", || {
        let volume = cluster.volume()?;
        holds(volume.at_risk_bytes == 0, format!("{volume:?}"))
    });
    cluster.evict();
    let local = data_datafiles(cluster);
    assert!(local.is_empty(), "evict --all left {local:?}");
    same(tree, &cluster.mount().join("tree"));
    shell(&cluster.mount().join("clone"), "git fsck --strict");
    // What is not committed is not evicted.
    fs::write(cluster.mount().join("fresh"), b"not pushed yet").unwrap();
    cluster.evict();
    assert_eq!(
        fs::read(cluster.mount().join("fresh")).unwrap(),
        b"not pushed yet"
    );
}

/// Sealed data datafiles in the state directory of the mount.
fn data_datafiles(cluster: &DevCluster) -> Vec<PathBuf> {
    let dir = cluster.data().join("mount/data/datafiles");
    let files = files_below(&dir).unwrap();
    files
        .into_iter()
        .filter(|file| file.to_string_lossy().ends_with(".data.pushed"))
        .collect()
}

fn listings(cluster: &DevCluster) {
    let json = |arguments: &[&str]| -> serde_json::Value {
        let said = cluster.qsfs(&[arguments, &["--json"]].concat()).ok().stdout;
        let value: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(value["schema_version"], 1, "{arguments:?}");
        value
    };
    assert_eq!(
        json(&["metad", "members"])["members"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    assert_eq!(
        json(&["backend", "list"])["backends"]
            .as_array()
            .unwrap()
            .len(),
        8
    );
    assert_eq!(
        json(&["location", "list"])["locations"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    assert_eq!(
        json(&["volume", "list"])["volumes"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    for listing in [
        &["token", "list"][..],
        &["heal", "status"],
        &["scrub", "status"],
        &["metad", "settings"],
    ] {
        json(listing);
    }
    let status = json(&["status"]);
    assert_eq!(status["verdict"], "ok", "{status}");
    assert_eq!(
        status["volumes"][0]["loss_budget"]["locations"], 1,
        "{status}"
    );
    let screen = cluster.qsfs(&["status"]).ok().stdout;
    assert!(screen.starts_with("ok: nothing to do"), "{screen}");
    assert!(screen.lines().count() <= 40, "more than a screen: {screen}");
    assert!(cluster.qsfs(&["health"]).ok().stdout.starts_with("ok"));
    assert!(
        cluster
            .qsfs(&["explain", "location_down"])
            .ok()
            .stdout
            .contains("What to do")
    );
    cluster
        .qsfs(&["explain", "NO_SUCH_THING"])
        .fails_naming(&["NO_SUCH_THING"]);
    let file = cluster.mount().join("tree/large");
    let info = cluster.qsfs(&["info", file.to_str().unwrap()]).ok().stdout;
    assert!(
        info.contains("committed at 4+4") && info.contains("loc2"),
        "{info}"
    );
    cluster
        .qsfs(&["info", "/etc/hostname"])
        .fails_naming(&["not inside a mounted"]);
    assert!(cluster.dev(&["ps"]).stdout.contains("agent-loc2-2"));
    cluster.qsfs(&["volume", "info", "nothing"]).code_is(10);
    let mount = cluster.mount().to_str().unwrap();
    cluster
        .qsfs(&["mount", "dev", mount, "--state-dir", "/nonexistent/x"])
        .fails_naming(&["mounted"]);
    let tree = cluster.base().join("tree");
    cluster
        .qsfs(&["mount", "dev", tree.to_str().unwrap()])
        .fails_naming(&["not empty"]);
    cluster.qsfs(&["completions", "bash"]).ok();
}

/// Flips a byte in the middle of every datafile of some backends, while everything runs.
fn rot(cluster: &DevCluster, tree: &Path) {
    cluster.sync();
    cluster.evict();
    let before = cluster.status().unwrap().rot;
    let backends = cluster.backend_dirs();
    assert_eq!(backends.len(), 8, "{backends:?}");
    // Two backends: fewer than the four shards that may be bad.
    let flipped: usize = backends
        .iter()
        .step_by(5)
        .map(|(_, dir)| flip_all(dir))
        .sum();
    assert!(flipped > 0, "nothing to flip in {backends:?}");
    same(tree, &cluster.mount().join("tree"));
    cluster.qsfs(&["scrub", "start"]).ok();
    let status = wait_for("rot to be found and repaired", || {
        let status = cluster.status()?;
        let found = status.rot.found_by_read + status.rot.found_by_scrub;
        let fine = found > before.found_by_read + before.found_by_scrub
            && status.rot.repaired >= found
            && scrubbed(cluster);
        if fine {
            Ok(status)
        } else {
            Err(format!("{:?}", status.rot))
        }
    });
    eprintln!("   flipped {flipped} bytes: {:?}", status.rot);
    assert!(
        status.rot.found_by_scrub > before.found_by_scrub,
        "{:?}",
        status.rot
    );
    cluster.wait_healed(Duration::from_secs(90));
    cluster.evict();
    same(tree, &cluster.mount().join("tree"));
}

/// Every backend has ended a tour.
fn scrubbed(cluster: &DevCluster) -> bool {
    cluster.status().is_ok_and(|status| {
        status
            .backends
            .iter()
            .all(|backend| backend.last_scrub.is_some())
    })
}

fn flip_all(dir: &Path) -> usize {
    let mut flipped = 0;
    for file in files_below(dir).unwrap() {
        let length = fs::metadata(&file).unwrap().len();
        // Small files are configuration; rot there is another story.
        if length < 100_000 {
            continue;
        }
        let file = File::options().read(true).write(true).open(&file).unwrap();
        for at in (50_000..length).step_by(400_000) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            flipped += 1;
        }
    }
    flipped
}

/// Writes until told to stop; the names written, all synced.
fn write_meanwhile(dir: PathBuf, act: impl FnOnce()) -> Vec<(PathBuf, Vec<u8>)> {
    fs::create_dir_all(&dir).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            let mut written = Vec::new();
            while !stop.load(Ordering::Relaxed) && written.len() < 400 {
                let path = dir.join(format!("w{}", written.len()));
                let bytes: Vec<u8> = (0..150_000_u32)
                    .flat_map(|at| {
                        (at.wrapping_mul(2_654_435_761) ^ u32::try_from(written.len()).unwrap())
                            .to_le_bytes()
                    })
                    .collect();
                fs::write(&path, &bytes).unwrap();
                File::open(&path).unwrap().sync_all().unwrap();
                written.push((path, bytes));
            }
            written
        }
    });
    act();
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap()
}

fn all_there(written: &[(PathBuf, Vec<u8>)]) {
    assert!(!written.is_empty());
    for (path, bytes) in written {
        assert!(
            fs::read(path).unwrap() == *bytes,
            "{} differs",
            path.display()
        );
    }
}

fn leader_dies(cluster: &DevCluster) {
    let leader = cluster.status().unwrap().quorum.leader;
    let written = write_meanwhile(cluster.mount().join("leader"), || {
        cluster.kill(&[&leader]);
        cluster.sync();
    });
    let status = cluster.status().unwrap();
    assert_ne!(status.quorum.leader, leader);
    cluster.wait_finding("METAD_DOWN");
    assert_eq!(cluster.qsfs(&["health"]).code, 1);
    cluster.start_again(&[&leader]);
    cluster.wait_healed(Duration::from_secs(60));
    cluster.sync_in_full();
    cluster.evict();
    all_there(&written);
}

fn agent_dies(cluster: &DevCluster) {
    let written = write_meanwhile(cluster.mount().join("agent"), || {
        cluster.kill(&["agent-loc1-2"]);
        cluster.sync_degraded();
    });
    cluster.start_again(&["agent-loc1-2"]);
    cluster.wait_healed(Duration::from_secs(90));
    cluster.sync_in_full();
    cluster.evict();
    all_there(&written);
}

fn mount_dies(cluster: &DevCluster) {
    let dir = cluster.mount().join("crash");
    fs::create_dir(&dir).unwrap();
    // The directory itself is no part of the history.
    File::open(&dir).unwrap().sync_all().unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let (mut history, mut model) = (History::default(), Model::default());
    let pid = cluster.pid("mount").unwrap();
    let (enough, now) = std::sync::mpsc::channel();
    // Kills while the workload goes on, so that something is always under way.
    let killer = std::thread::spawn(move || {
        now.recv().unwrap();
        process::signal(pid, Signal::SIGKILL);
    });
    for number in 0.. {
        if number == CRASH_AFTER {
            enough.send(()).unwrap();
        }
        let operation = model.propose(&mut rng);
        model.apply(&operation);
        history.operations.push(operation.clone());
        if operation.perform(&dir).is_err() {
            break;
        }
        if number % 40 == 39 {
            let begun = history.operations.len();
            match File::open(&dir).and_then(|dir| dir.sync_all()) {
                Ok(()) => history.synced = begun,
                Err(_) => break,
            }
        }
    }
    killer.join().unwrap();
    wait_for("the mount to be dead", || {
        holds(!process::is_alive(pid), "alive")
    });
    cluster.start_again(&["mount"]);
    let observed = Model::read(&dir).unwrap();
    match history::check(&history, &observed) {
        Ok(length) => eprintln!(
            "   {length} of {} operations are there, {} were synced",
            history.operations.len(),
            history.synced
        ),
        Err(complaint) => panic!("{complaint}"),
    }
    assert!(history.synced > 0, "nothing was synced before the kill");
    cluster.sync();
}

fn client_gone(cluster: &DevCluster, tree: &Path) {
    cluster.sync();
    let late = cluster.mount().join("never-pushed");
    fs::write(&late, b"lost with the machine").unwrap();
    let state = cluster.data().join("mount/data");
    let old = cluster.scratch("old-machine");
    cluster.kill(&["mount"]);
    process::unmount_lazily(cluster.mount());
    // Away, but not quite: the old machine comes back later.
    fs::rename(&state, old.join("data")).unwrap();
    let elsewhere = cluster.scratch("elsewhere");
    let kit = cluster.data().join("volume.kit");
    let (kit, new_state) = (kit.to_str().unwrap(), cluster.base().join("new-state"));
    let mount_new: &[&str] = &[
        "mount",
        "dev",
        elsewhere.to_str().unwrap(),
        "--kit",
        kit,
        "--state-dir",
        new_state.to_str().unwrap(),
        "--takeover",
    ];
    let bare = cluster.binary().with_cluster("").run(mount_new);
    bare.ok();
    same(tree, &elsewhere.join("tree"));
    assert!(!elsewhere.join("never-pushed").exists());
    fs::write(elsewhere.join("new-writer"), b"writes on").unwrap();
    on(cluster, &["sync"], &elsewhere).ok();
    // The old writer: held or fenced, whichever it notices first, and nothing of it is merged in silence.
    let old_state = old.join("data");
    let refused = cluster.qsfs(&[
        "mount",
        "dev",
        cluster.mount().to_str().unwrap(),
        "--state-dir",
        old_state.to_str().unwrap(),
    ]);
    refused.code_is(11);
    let space = shell(cluster.base(), "df elsewhere | tail -1");
    assert!(space.contains("qsfs"), "{space}");
    on(cluster, &["umount"], &elsewhere).ok();
    assert!(!process::is_mounted(&elsewhere));
}

fn on(cluster: &DevCluster, verb: &[&str], dir: &Path) -> Outcome {
    cluster.qsfs(&[verb, &[dir.to_str().unwrap()]].concat())
}
