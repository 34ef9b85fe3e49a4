//! Local files are cut and flipped, disks and backends are full, an agent dies while it rebuilds.
//! Items 4, 7 and 10 of the main job.

#![expect(clippy::unwrap_used, reason = "tests")]

use nix::sys::signal::Signal;
use qsfs_jepsen_tests::binary::Outcome;
use qsfs_jepsen_tests::dev_cluster::{shell, skip_reason};
use qsfs_jepsen_tests::tree::files_below;
use qsfs_jepsen_tests::wait::holds;
use qsfs_jepsen_tests::{DevCluster, DevOptions, process, wait_for};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

const AGENTS: [&str; 4] = [
    "agent-loc1-1",
    "agent-loc1-2",
    "agent-loc2-1",
    "agent-loc2-2",
];

fn start(capacity: &str) -> DevCluster {
    let options = [
        "--datafile-size",
        "4MiB",
        "--push-interval",
        "10m",
        "--capacity",
        capacity,
    ];
    DevCluster::start(
        Path::new(env!("CARGO_BIN_EXE_qsfs")),
        DevOptions::with(&options),
    )
}

/// Bytes that do not compress.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    StdRng::seed_from_u64(seed).fill_bytes(&mut noise);
    noise
}

fn write_synced(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
    File::open(path).unwrap().sync_all().unwrap();
}

/// A second volume of a dev cluster with a mount and a state directory of its own.
struct Second<'a> {
    cluster: &'a DevCluster,
    name: &'static str,
    mount: PathBuf,
    state: PathBuf,
    options: Vec<&'static str>,
}

impl<'a> Second<'a> {
    fn create(cluster: &'a DevCluster, name: &'static str, options: &[&'static str]) -> Self {
        let second = Self {
            cluster,
            name,
            mount: cluster.scratch(name),
            state: cluster.base().join(format!("{name}-state")),
            options: options.to_vec(),
        };
        let kit = second.kit();
        let size = ["--datafile-size", "1MiB", "--push-interval", "10m"];
        let create = ["volume", "create", name, "--policy", "4+4", "--kit", &kit];
        cluster.qsfs(&[&create[..], &size].concat()).ok();
        second
    }

    fn kit(&self) -> String {
        text(&self.cluster.base().join(format!("{}.kit", self.name)))
    }

    fn try_mount(&self) -> Outcome {
        let (mount, state, kit) = (text(&self.mount), text(&self.state), self.kit());
        let mount = [
            "mount",
            self.name,
            &mount,
            "--state-dir",
            &state,
            "--kit",
            &kit,
        ];
        self.cluster.qsfs(&[&mount[..], &self.options].concat())
    }

    fn mount(&self) {
        self.try_mount().ok();
    }

    fn on(&self, verb: &[&str], options: &[&str]) -> Outcome {
        let mount = text(&self.mount);
        self.cluster.qsfs(&[verb, &[&mount], options].concat())
    }

    /// Until the agents that were killed are back for all, it says what is below policy.
    fn sync_in_full(&self) {
        wait_for("a sync in full", || {
            let said = self.on(&["sync"], &[]);
            holds(said.code == 0, said.stderr)
        });
    }

    fn kill(&self) {
        let (pid, _) = process::all_naming(&self.state)
            .into_iter()
            .find(|(_, line)| line.contains("mount"))
            .unwrap();
        process::signal(pid, Signal::SIGKILL);
        wait_for("the mount to be dead", || {
            holds(!process::is_alive(pid), "alive")
        });
    }

    /// Local datafiles whose names end so.
    fn local(&self, suffix: &str) -> Vec<PathBuf> {
        let mut files = files_below(&self.state.join("datafiles")).unwrap_or_default();
        files.retain(|file| file.to_string_lossy().ends_with(suffix));
        files.sort();
        files
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn local_files_are_harmed_and_named() {
    if skip_reason().is_some() {
        return;
    }
    let mut cluster = start("2GiB");
    let second = Second::create(&cluster, "harmed", &[]);
    second.mount();
    let kept = noise(1, 700_000);
    write_synced(&second.mount.join("kept"), &kept);
    eprintln!("-- while it runs");
    harmed_while_running(&second, &kept);
    eprintln!("-- while it is dead");
    harmed_while_dead(&second, &kept);
    eprintln!("-- sealed, with no agent to push to");
    harmed_when_sealed(&second, &kept);
    eprintln!("-- pushed");
    harmed_when_pushed(&second, &kept);
    second.on(&["umount"], &[]).ok();
    cluster.interrupt();
}

/// What is open for writing: reads and syncs say which file it is, and go on when it is restored.
fn harmed_while_running(second: &Second<'_>, kept: &[u8]) {
    let open = second.local(".data.open").remove(0);
    // A name that is removed leaves the open file as it is.
    for harm in [Harm::Flip, Harm::Cut] {
        let restore = harm.does(&open);
        second.on(&["cache", "evict"], &["--all"]).ok();
        let read = fs::read(second.mount.join("kept"));
        assert!(read.is_err(), "{harm:?}: wrong bytes were given out");
        let log = fs::read_to_string(second.state.join("mount.log")).unwrap();
        assert!(log.contains(&name_of(&open)), "{harm:?} is not in the log");
        restore.undo();
        assert!(fs::read(second.mount.join("kept")).unwrap() == kept);
    }
}

/// A mount that finds what was durable damaged names the file and what to do, changes nothing, and goes on when it is restored.
fn harmed_while_dead(second: &Second<'_>, kept: &[u8]) {
    second.kill();
    process::unmount_lazily(&second.mount);
    for suffix in [".data.open", ".meta.open"] {
        let file = second.local(suffix).remove(0);
        for harm in HARMS {
            let restore = harm.does(&file);
            let harmed = fs::read(&file).ok();
            second
                .try_mount()
                .fails_naming(&[&name_of(&file), "recovery kit"]);
            assert!(!process::is_mounted(&second.mount), "{harm:?}");
            assert!(fs::read(&file).ok() == harmed, "{harm:?}: it was changed");
            restore.undo();
        }
    }
    second.mount();
    assert!(fs::read(second.mount.join("kept")).unwrap() == kept);
}

/// What waits to be pushed: nothing damaged is ever pushed, `sync` and `status` say which file it is.
fn harmed_when_sealed(second: &Second<'_>, kept: &[u8]) {
    let cluster = second.cluster;
    cluster.kill(&AGENTS);
    write_synced(&second.mount.join("late"), &noise(2, 300_000));
    second.on(&["sync"], &["--timeout", "2"]).fails_naming(&[]);
    let files =
        [".data.sealed", ".data.crc", ".meta.sealed"].map(|suffix| second.local(suffix).remove(0));
    let restores: Vec<Restore> = files.iter().map(|file| Harm::Flip.does(file)).collect();
    cluster.start_again(&AGENTS);
    wait_for("status to name what cannot be pushed", || {
        let status = cluster.status()?;
        let text = format!("{:?}", status.findings);
        holds(text.contains("datafiles/"), text)
    });
    second
        .on(&["sync"], &["--timeout", "3"])
        .fails_naming(&["damaged", "datafiles/"]);
    let read = fs::read(second.mount.join("kept"));
    assert!(read.is_err() || read.unwrap() == kept);
    restores.into_iter().for_each(Restore::undo);
    second.sync_in_full();
    assert!(fs::read(second.mount.join("kept")).unwrap() == kept);
}

/// What is committed: its shards replace it, without a word to whoever reads.
fn harmed_when_pushed(second: &Second<'_>, kept: &[u8]) {
    let before = [".data.pushed", ".meta.pushed"].map(|suffix| second.local(suffix).len());
    assert!(before.iter().all(|files| *files > 0), "{before:?}");
    for harm in HARMS {
        second.kill();
        process::unmount_lazily(&second.mount);
        for file in second.local(".pushed") {
            // For good: nobody restores these.
            drop(harm.does(&file));
        }
        second.mount();
        assert!(fs::read(second.mount.join("kept")).unwrap() == kept);
        assert_eq!(second.local(".meta.pushed").len(), before[1], "{harm:?}");
    }
}

#[test]
fn disks_are_full() {
    if skip_reason().is_some() {
        return;
    }
    let mut cluster = start("48MiB");
    eprintln!("-- the cache limit");
    cache_limit(&cluster);
    eprintln!("-- the client's disk");
    client_disk(&cluster);
    eprintln!("-- the backends");
    backends(&cluster);
    cluster.interrupt();
}

fn is_enospc(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ENOSPC)
}

/// Writes files until there is no space; those that were synced, with their contents.
fn write_until_full(dir: &Path, bytes: usize) -> Vec<(PathBuf, Vec<u8>)> {
    let mut written = Vec::new();
    for number in 0..10_000_u64 {
        let (path, contents) = (dir.join(format!("f{number}")), noise(number, bytes));
        let outcome = fs::write(&path, &contents).and_then(|()| File::open(&path)?.sync_all());
        match outcome {
            Ok(()) => written.push((path, contents)),
            Err(error) => {
                assert!(is_enospc(&error), "{error}");
                let _ = fs::remove_file(&path);
                return written;
            }
        }
    }
    panic!("never full");
}

fn all_there(written: &[(PathBuf, Vec<u8>)]) {
    for (path, contents) in written {
        assert!(fs::read(path).unwrap() == *contents, "{}", path.display());
    }
}

fn writes_again(dir: &Path) {
    wait_for("writes to succeed again", || {
        fs::write(dir.join("again"), noise(99, 500_000)).map_err(|error| error.to_string())
    });
}

/// Committed datafiles make room by themselves; what is not committed stays, and writers wait, then get ENOSPC.
fn cache_limit(cluster: &DevCluster) {
    let limit = 8 << 20;
    let second = Second::create(cluster, "limited", &["--cache-limit", "8MiB"]);
    second.mount();
    let written: Vec<_> = (0..24)
        .map(|number| {
            (
                second.mount.join(format!("w{number}")),
                noise(number, 1_000_000),
            )
        })
        .collect();
    for (path, contents) in &written {
        write_synced(path, contents);
    }
    second.on(&["sync"], &[]).ok();
    let local_bytes = || {
        let all = second.local("");
        all.iter()
            .map(|file| fs::metadata(file).map_or(0, |meta| meta.len()))
            .sum::<u64>()
    };
    wait_for("the cache to be below its limit", || {
        holds(local_bytes() <= limit, local_bytes())
    });
    all_there(&written);
    cluster.kill(&AGENTS);
    let late = write_until_full(&second.mount, 1_000_000);
    assert!(!late.is_empty());
    // What was there at the limit is local and readable without any backend.
    all_there(&late);
    shell(
        &second.mount,
        "ls -l . > /dev/null && stat f0 > /dev/null && df . > /dev/null",
    );
    cluster.start_again(&AGENTS);
    writes_again(&second.mount);
    all_there(&late);
    shell(&second.mount, "rm -f *");
    second.sync_in_full();
    second.on(&["umount"], &[]).ok();
}

/// A real disk that is full, if this test may mount one.
fn client_disk(cluster: &DevCluster) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root may mount a small disk for the state directory");
        return;
    }
    let second = Second::create(cluster, "small", &[]);
    fs::create_dir(&second.state).unwrap();
    shell(
        cluster.base(),
        "mount -t tmpfs -o size=160m tmpfs small-state",
    );
    second.mount();
    cluster.kill(&AGENTS);
    let written = write_until_full(&second.mount, 4_000_000);
    assert!(!written.is_empty());
    all_there(&written);
    shell(&second.mount, "ls -l . > /dev/null && df . > /dev/null");
    // Killed on a full disk: all of it is there again.
    second.kill();
    process::unmount_lazily(&second.mount);
    second.mount();
    all_there(&written);
    shell(&second.mount, "rm -f f*");
    cluster.start_again(&AGENTS);
    writes_again(&second.mount);
    second.sync_in_full();
    shell(&second.mount, "rm -f *");
    second.sync_in_full();
    second.on(&["umount"], &[]).ok();
    wait_for("the process that used the disk to end", || {
        let said = Command::new("umount").arg(&second.state).status();
        holds(said.is_ok_and(|status| status.success()), "busy")
    });
}

/// Eight backends of 48 MiB hold 192 MiB at 4+4: what does not fit is refused with ENOSPC and never acknowledged, so that all that is
/// acknowledged can be pushed; removing makes room again.
fn backends(cluster: &DevCluster) {
    let write = |name: &str| {
        let dir = cluster.mount().join(name);
        fs::create_dir_all(&dir).unwrap();
        write_until_full(&dir, 1 << 20)
    };
    // What the other volumes had is removed from the backends after a grace, and what is rebuilt of them takes room of its own until it
    // is done: the writer that is looked at here knows of its own writes only.
    wait_for(
        "the backends to be empty again, and nothing to be rebuilt",
        || {
            let status = cluster.status()?;
            let below: u64 = status.volumes.iter().map(|v| v.below_policy).sum();
            let resilver = &status.resilver;
            if below + resilver.pending_shards + resilver.running > 0 {
                return Err(format!("{below} datafiles are below policy, {resilver:?}"));
            }
            let space =
                nix::sys::statvfs::statvfs(cluster.mount()).map_err(|error| error.to_string())?;
            let free = space.blocks_available() * space.fragment_size();
            holds(free > 160 << 20, format!("{free} bytes are free"))
        },
    );
    let old = write("old");
    assert!((100..192).contains(&old.len()), "{} MiB", old.len());
    cluster.sync_in_full();
    assert!(write("none").len() < 20, "there was room after all");
    cluster.sync_in_full();
    shell(cluster.mount(), "rm -rf old none");
    cluster.sync_in_full();
    wait_for("what was removed to make room", || {
        let path = cluster.mount().join("room");
        fs::write(path, noise(7, 30 << 20)).map_err(|error| error.to_string())
    });
    let new = write("new");
    assert!(new.len() > 50, "{} MiB", new.len());
    cluster.sync_in_full();
    cluster.evict();
    all_there(&new);
}

/// Whoever is to rebuild dies in the middle of it: it is done elsewhere, or later.
#[test]
fn an_agent_dies_while_it_rebuilds() {
    if skip_reason().is_some() {
        return;
    }
    let mut cluster = start("2GiB");
    let contents = noise(5, 48 << 20);
    fs::write(cluster.mount().join("large"), &contents).unwrap();
    cluster.sync();
    cluster.evict();
    let (agent, dir) = cluster.backend_dirs().remove(0);
    fs::remove_dir_all(&dir).unwrap();
    // A small rebuild is over before it is seen: then the agent dies right behind it.
    wait_for("a rebuild to be under way", || {
        let status = cluster.status()?;
        let lost = status.backends.iter().any(|b| b.state == "lost");
        holds(
            lost || status.resilver.pending_shards > 0,
            format!("{:?} {:?}", status.resilver, status.backends),
        )
    });
    let others: Vec<&str> = AGENTS.into_iter().filter(|name| *name != agent).collect();
    cluster.kill(&others[..1]);
    assert!(fs::read(cluster.mount().join("large")).unwrap() == contents);
    cluster.start_again(&others[..1]);
    cluster.wait_healed(std::time::Duration::from_secs(120));
    cluster.evict();
    assert!(fs::read(cluster.mount().join("large")).unwrap() == contents);
    cluster.interrupt();
}

#[derive(Debug, Clone, Copy)]
enum Harm {
    Flip,
    Cut,
    Remove,
}

const HARMS: [Harm; 3] = [Harm::Flip, Harm::Cut, Harm::Remove];

struct Restore {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Harm {
    fn does(self, path: &Path) -> Restore {
        let bytes = fs::read(path).unwrap();
        match self {
            Self::Flip => {
                let mut flipped = bytes.clone();
                flipped[bytes.len() / 2] ^= 0x10;
                overwrite(path, &flipped);
            }
            Self::Cut => overwrite(path, &bytes[..bytes.len() / 2]),
            Self::Remove => fs::remove_file(path).unwrap(),
        }
        Restore {
            path: path.to_owned(),
            bytes,
        }
    }
}

impl Restore {
    fn undo(self) {
        overwrite(&self.path, &self.bytes);
    }
}

/// In place: whoever has the file open sees it.
fn overwrite(path: &Path, bytes: &[u8]) {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}
