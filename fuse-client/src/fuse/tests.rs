//! A real mount over a store in memory. Where the machine has no `/dev/fuse` these tests print that they were skipped.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::{MountHandle, MountOptions, check_mount_point, mount, own_caller};
use crate::filesystem::testing::MemoryStore;
use crate::filesystem::{FileSystem, FileSystemOptions};
use crate::namespace::Namespace;
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;

struct Mounted {
    handle: Option<MountHandle>,
    store: Arc<MemoryStore>,
    path: PathBuf,
    runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
}

impl Mounted {
    /// `None` where FUSE does not work; says so.
    fn new() -> Option<Self> {
        if !std::path::Path::new("/dev/fuse").exists() {
            eprintln!("skipped: /dev/fuse is missing on this machine");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mnt");
        fs::create_dir(&path).unwrap();
        let store = Arc::new(MemoryStore::new(64 << 20));
        let namespace = Arc::new(Namespace::open(&dir.path().join("names")).unwrap());
        let options = FileSystemOptions {
            read_only: false,
            control_socket: Some("/run/control.sock".into()),
        };
        let filesystem =
            FileSystem::new(namespace, Arc::clone(&store) as _, options, own_caller()).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let options = MountOptions {
            mount_point: path.clone(),
            volume: "test".into(),
        };
        let handle = mount(&options, Arc::new(filesystem), runtime.handle().clone()).unwrap();
        Some(Self {
            handle: Some(handle),
            store,
            path,
            runtime,
            _dir: dir,
        })
    }

    fn handle(&self) -> &MountHandle {
        self.handle.as_ref().unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            let lazy = std::thread::panicking();
            let unmounted = handle.unmount(lazy);
            if lazy {
                return;
            }
            unmounted.unwrap();
            self.runtime.block_on(handle.ended());
            handle.join().unwrap();
        }
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a script on the mount, where the machine has Python.
fn python(script: &str, mounted: &Mounted) {
    if Command::new("python3").arg("-V").output().is_err() {
        eprintln!("skipped: python3 is missing on this machine");
        return;
    }
    run(Command::new("python3")
        .args(["-c", script])
        .arg(&mounted.path));
}

#[test]
fn a_file_stays_what_random_writers_made_it() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    // After fsx: every way to change a file, against a copy in memory, with the kernel's pages dropped now and then.
    python(
        r"
import ctypes, mmap, os, random, sys
random.seed(4711)
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
path = os.path.join(sys.argv[1], 'fsx')
fd = os.open(path, os.O_CREAT | os.O_RDWR)
model = bytearray()
MAX = 300_000
def grow(end):
    if len(model) < end: model.extend(bytes(end - len(model)))
for step in range(3000):
    op = random.choice('wwwwrrrtmmpzdo')
    at, n = random.randrange(MAX), random.randrange(1, 20_000)
    n = min(n, MAX - at)
    if n == 0: continue
    if op == 'w':
        data = os.urandom(1) * n
        assert os.pwrite(fd, data, at) == n
        grow(at + n); model[at:at+n] = data
    elif op == 'r':
        assert os.pread(fd, n, at) == bytes(model[at:at+n]), step
    elif op == 't':
        os.ftruncate(fd, at)
        if at < len(model): del model[at:]
        else: grow(at)
    elif op == 'm' and len(model) > at + 1:
        n = min(n, len(model) - at)
        with mmap.mmap(fd, len(model)) as m:
            data = os.urandom(1) * n
            m[at:at+n] = data
            model[at:at+n] = data
            if random.random() < 0.5: m.flush()
    elif op in 'pz':
        assert libc.fallocate(fd, 3 if op == 'p' else 0x10, at, n) == 0
        if op == 'z': grow(at + n)
        end = min(at + n, len(model))
        if at < end: model[at:end] = bytes(end - at)
    elif op == 'd':
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    elif op == 'o':
        os.close(fd); fd = os.open(path, os.O_RDWR)
    assert os.fstat(fd).st_size == len(model), step
os.fsync(fd); os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
assert os.pread(fd, MAX, 0) == bytes(model)
",
        &mounted,
    );
    // What the kernel did not keep is what the filesystem has.
    let path = mounted.path.join("fsx");
    let before = fs::read(&path).unwrap();
    mounted.handle().drop_kernel_pages().unwrap();
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn a_tree_is_copied_with_links_modes_times_and_holes() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let source = tempfile::tempdir().unwrap();
    let root = source.path().join("tree");
    fs::create_dir_all(root.join("a/b/c")).unwrap();
    fs::write(root.join("a/one"), b"one").unwrap();
    fs::write(root.join("a/empty"), b"").unwrap();
    fs::hard_link(root.join("a/one"), root.join("a/b/same")).unwrap();
    symlink("../one", root.join("a/b/sym")).unwrap();
    symlink("nowhere", root.join("dangling")).unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"n\xff\xfe \xc3\xa9\n");
    fs::write(root.join(odd), vec![7; 300_000]).unwrap();
    fs::write(root.join("x".repeat(255)), b"long").unwrap();
    fs::set_permissions(root.join("a/one"), fs::Permissions::from_mode(0o4751)).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.write_at(b"end", 50 << 20).unwrap();
    sparse.write_at(b"mid", 1 << 20).unwrap();
    drop(sparse);
    run(Command::new("touch")
        .args(["-d", "1969-12-31T23:59:58.25Z"])
        .arg(root.join("a/empty")));
    let copy = mounted.path.join("tree");
    run(Command::new("cp")
        .args(["-a", "--sparse=always"])
        .arg(&root)
        .arg(&copy));
    run(Command::new("diff")
        .args(["-r", "--no-dereference"])
        .arg(&root)
        .arg(&copy));
    let listing = |root: &PathBuf| {
        run(Command::new("find").current_dir(root).args([
            ".",
            "-printf",
            "%p %y %m %U %G %n %T@ %l\n",
            "(",
            "-type",
            "f",
            "-printf",
            "%s\n",
            "-o",
            "-true",
            ")",
        ]))
        .lines()
        .map(String::from)
        .collect::<BTreeSet<_>>()
    };
    assert_eq!(listing(&root), listing(&copy));
    let one = fs::metadata(copy.join("a/one")).unwrap();
    assert_eq!(
        one.ino(),
        fs::metadata(copy.join("a/b/same")).unwrap().ino()
    );
    assert!(fs::metadata(copy.join("sparse")).unwrap().blocks() * 512 < 1 << 20);
    assert!(fs::create_dir(copy.join("y".repeat(256))).is_err());
}

#[test]
fn a_large_directory_is_listed_whole_while_it_changes() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let dir = mounted.path.join("many");
    fs::create_dir(&dir).unwrap();
    for number in 0..10_000 {
        fs::File::create(dir.join(format!("{number:05}"))).unwrap();
    }
    let mut seen = BTreeSet::new();
    for (index, entry) in fs::read_dir(&dir).unwrap().enumerate() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        // Renames and removals of what was listed must neither hide nor repeat others, nor make this endless.
        if index % 3 == 0 {
            fs::rename(dir.join(&name), dir.join(format!("r{name}"))).unwrap();
        } else if index % 3 == 1 {
            fs::remove_file(dir.join(&name)).unwrap();
        }
        assert!(seen.insert(name));
    }
    assert_eq!(seen.len(), 10_000);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 10_000 - 3333);
    fs::remove_dir_all(&dir).unwrap();
    assert_eq!(fs::metadata(&mounted.path).unwrap().nlink(), 2);
}

#[test]
fn unlinked_files_live_until_closed_and_pages_can_be_dropped() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let path = mounted.path.join("file");
    let mut file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let text: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    file.write_all(&text).unwrap();
    file.sync_all().unwrap();
    assert!(mounted.store.syncs.load(Ordering::Relaxed) > 0);
    fs::remove_file(&path).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    // What is not in the kernel's pages and not local is fetched.
    mounted.store.remote.store(true, Ordering::Relaxed);
    assert!(mounted.handle().drop_kernel_pages().unwrap() >= 1);
    let mut read = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut read).unwrap();
    assert!(read == text, "fetched contents differ");
    assert!(mounted.store.fetches.load(Ordering::Relaxed) > 0);
    mounted.store.remote.store(false, Ordering::Relaxed);
    let handle = mounted.handle();
    assert!(
        matches!(handle.unmount(false), Err(super::MountError::Busy(_))),
        "an open file keeps the mount"
    );
    drop(file);
}

#[test]
fn the_mount_answers_its_socket_and_refuses_a_second_mount() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let script = r"
import os, sys, mmap, fcntl
root = sys.argv[1]
assert os.getxattr(root, 'user.qsfs.control') == b'/run/control.sock'
assert os.listxattr(root) == []
p = os.path.join(root, 'f')
open(p, 'w').write('x' * 10000)
os.setxattr(p, 'user.a', b'1')
assert os.listxattr(p) == ['user.a'] and os.getxattr(p, 'user.a') == b'1'
os.removexattr(p, 'user.a')
f = open(p, 'r+b')
m = mmap.mmap(f.fileno(), 0)
m[5000:5003] = b'abc'
m.flush()
assert open(p, 'rb').read()[4999:5004] == b'xabcx'
fcntl.flock(f, fcntl.LOCK_EX)
fcntl.lockf(f, fcntl.LOCK_EX, 10, 0)
os.truncate(p, 20000)
fd = os.open(p, os.O_RDWR)
assert os.lseek(fd, 0, os.SEEK_HOLE) == 10000
assert os.pread(fd, 5, 9998) == b'xx\0\0\0'
os.posix_fallocate(fd, 0, 30000)
assert os.fstat(fd).st_size == 30000
os.mkfifo(os.path.join(root, 'fifo'))
os.rename(p, p + '2')
assert not os.path.exists(p) and os.path.exists(p + '2')
s = os.statvfs(root)
assert s.f_namemax == 255 and s.f_blocks * s.f_frsize == 1 << 40
";
    run(Command::new("python3")
        .args(["-c", script])
        .arg(&mounted.path));
    let again = check_mount_point(&mounted.path).unwrap_err().to_string();
    assert!(again.contains("qsfs:test"), "{again}");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table
        .lines()
        .find(|line| line.contains(mounted.path.to_str().unwrap()))
        .unwrap();
    assert!(line.contains("fuse.qsfs qsfs:test"), "{line}");
}

const DOOMED: &str = "QSFS_TEST_DOOMED_MOUNT";

/// Runs in a process of its own, which the test below kills.
#[test]
#[ignore = "the other half of the test below"]
fn a_mount_that_waits_to_be_killed() {
    let path = std::env::var_os(DOOMED).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let namespace = Arc::new(Namespace::open(&dir.path().join("names")).unwrap());
    let store = Arc::new(MemoryStore::new(1 << 20));
    let options = FileSystemOptions::default();
    let filesystem = FileSystem::new(namespace, store, options, own_caller()).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let options = MountOptions {
        mount_point: path.into(),
        volume: "doomed".into(),
    };
    let _handle = mount(&options, Arc::new(filesystem), runtime.handle().clone()).unwrap();
    // The parent waits for this.
    fs::remove_dir_all(dir.path()).unwrap();
    println!("mounted");
    loop {
        std::thread::park();
    }
}

#[test]
fn a_dead_mount_of_a_killed_process_is_detached() {
    use std::io::BufRead;
    if !std::path::Path::new("/dev/fuse").exists() {
        eprintln!("skipped: /dev/fuse is missing on this machine");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mnt");
    fs::create_dir(&path).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture"])
        .arg("fuse::tests::a_mount_that_waits_to_be_killed")
        .env(DOOMED, &path)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let output = std::io::BufReader::new(child.stdout.take().unwrap());
    let mounted = output.lines().any(|line| line.unwrap().contains("mounted"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(mounted, "the child did not mount");
    assert!(super::mountpoint::is_dead(&path));
    let checked = check_mount_point(&path).unwrap();
    assert!(checked.detached_dead_mount);
    assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
}

/// User and system time of this process so far.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split(' ').collect();
    let ticks = |index: usize| fields[index].parse::<f64>().unwrap();
    (ticks(12) + ticks(13)) / 100.0
}

/// Prints what the mount does over a store in memory: `cargo test --release -p qsfs-fuse-client measure -- --ignored
/// --nocapture`.
#[test]
#[ignore = "a benchmark, not a test"]
fn measure_the_mount() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let timed = |what: &str, unit: &str, amount: f64, work: &mut dyn FnMut()| {
        let (start, cpu) = (std::time::Instant::now(), cpu_seconds());
        work();
        let rate = amount / start.elapsed().as_secs_f64();
        let cpu = amount / (cpu_seconds() - cpu);
        eprintln!("{what}: {rate:.0} {unit}/s, {cpu:.0} per CPU second");
    };
    let dir = mounted.path.join("many");
    fs::create_dir(&dir).unwrap();
    let small = vec![5; 4096];
    let count = 20_000u32;
    let name = |number: u32| dir.join(format!("{number:06}"));
    timed(
        "create+write+close 4 KiB",
        "files",
        f64::from(count),
        &mut || {
            for number in 0..count {
                fs::write(name(number), &small).unwrap();
            }
        },
    );
    timed("list and stat", "files", f64::from(count), &mut || {
        for entry in fs::read_dir(&dir).unwrap() {
            entry.unwrap().metadata().unwrap();
        }
    });
    timed("open+read+close", "files", f64::from(count), &mut || {
        for number in 0..count {
            assert_eq!(fs::read(name(number)).unwrap().len(), 4096);
        }
    });
    timed("unlink", "files", f64::from(count), &mut || {
        for number in 0..count {
            fs::remove_file(name(number)).unwrap();
        }
    });
    let path = mounted.path.join("large");
    let megabytes = 1024;
    let block = vec![9; 1 << 20];
    timed(
        "sequential write",
        "MB",
        1.048_576 * f64::from(megabytes),
        &mut || {
            let mut file = fs::File::create(&path).unwrap();
            for _ in 0..megabytes {
                file.write_all(&block).unwrap();
            }
            file.sync_all().unwrap();
        },
    );
    let read_all = || {
        let mut file = fs::File::open(&path).unwrap();
        let mut buffer = vec![0; 1 << 20];
        while file.read(&mut buffer).unwrap() > 0 {}
    };
    timed(
        "sequential read, kernel's pages",
        "MB",
        1.048_576 * f64::from(megabytes),
        &mut || {
            read_all();
        },
    );
    mounted.handle().drop_kernel_pages().unwrap();
    timed(
        "sequential read, local",
        "MB",
        1.048_576 * f64::from(megabytes),
        &mut || {
            read_all();
        },
    );
    mounted.handle().drop_kernel_pages().unwrap();
    let file = fs::File::open(&path).unwrap();
    let mut page = vec![0; 4096];
    timed("random 4 KiB reads", "reads", 20_000.0, &mut || {
        let mut place = 12345u64;
        for _ in 0..20_000 {
            place = place
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            file.read_exact_at(&mut page, (place >> 20) % (1 << 18) * 4096)
                .unwrap();
        }
    });
    drop(file);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    timed("4 KiB appends", "writes", 20_000.0, &mut || {
        for index in 0..20_000u64 {
            file.write_all_at(&small, (1 << 30) + index * 4096).unwrap();
        }
    });
    drop(file);
}
