//! The same file workloads on any directory: plain, memory FUSE, ours.

use anyhow::{Context, Result};
use nix::fcntl::PosixFadviseAdvice;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Bytes in a MB as storage people count them.
const MB: f64 = 1e6;
const BLOCK: usize = 1 << 20;
/// Bytes of each small file.
pub(crate) const SMALL_BYTES: usize = 4096;
/// Small files.
pub(crate) const SMALL_FILES: usize = 10_000;
/// 4 KiB random reads.
const RANDOM_READS: u64 = 20_000;

/// Cheap deterministic bytes that do not compress (xorshift64*).
pub(crate) struct Noise(u64);

impl Noise {
    /// From a seed other than 0.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Fills a buffer.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
    }
}

/// Writes `bytes` in blocks of 1 MiB, fsync at the end; MB/s.
pub(crate) fn write_sequential(path: &Path, bytes: u64, seed: u64) -> Result<f64> {
    let mut block = vec![0; BLOCK];
    let mut noise = Noise::new(seed);
    noise.fill(&mut block);
    let began = Instant::now();
    let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    for _ in 0..bytes / BLOCK as u64 {
        // A fresh word per 4 KiB keeps blocks distinct without the generator showing in the time.
        for page in block.chunks_mut(4096) {
            page[..8].copy_from_slice(&noise.next().to_le_bytes());
        }
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(bytes as f64 / MB / began.elapsed().as_secs_f64())
}

/// Reads it all in blocks of 1 MiB; MB/s.
pub(crate) fn read_sequential(path: &Path) -> Result<f64> {
    let mut block = vec![0; BLOCK];
    let began = Instant::now();
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut bytes = 0u64;
    loop {
        match file.read(&mut block)? {
            0 => break,
            n => bytes += n as u64,
        }
    }
    Ok(bytes as f64 / MB / began.elapsed().as_secs_f64())
}

/// 4 KiB reads at random page offsets; reads per second.
pub(crate) fn read_random(path: &Path) -> Result<f64> {
    let file = File::open(path)?;
    let pages = file.metadata()?.len() / 4096;
    let mut noise = Noise::new(7);
    let mut page = [0; 4096];
    let began = Instant::now();
    for _ in 0..RANDOM_READS {
        file.read_exact_at(&mut page, noise.next() % pages * 4096)?;
    }
    Ok(RANDOM_READS as f64 / began.elapsed().as_secs_f64())
}

/// Tells the kernel to forget the clean pages of a file.
pub(crate) fn drop_pages(path: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).open(path)?;
    file.sync_all()?;
    nix::fcntl::posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}

/// Operations per second on 10,000 files of 4 KiB.
pub(crate) struct Small {
    /// create + write + close
    pub(crate) create: f64,
    /// stat
    pub(crate) stat: f64,
    /// open + read + close
    pub(crate) read: f64,
    /// unlink
    pub(crate) unlink: f64,
}

/// Runs the small file workload in `dir` (100 files a directory).
pub(crate) fn small_files(dir: &Path) -> Result<Small> {
    let mut content = vec![0; SMALL_BYTES];
    let mut noise = Noise::new(99);
    let path =
        |index: usize| -> PathBuf { dir.join(format!("small/{:03}/{index:05}", index / 100)) };
    for directory in 0..SMALL_FILES.div_ceil(100) {
        fs::create_dir_all(dir.join(format!("small/{directory:03}")))?;
    }
    let rate = |work: &mut dyn FnMut(usize) -> Result<()>| -> Result<f64> {
        let began = Instant::now();
        (0..SMALL_FILES).try_for_each(work)?;
        Ok(SMALL_FILES as f64 / began.elapsed().as_secs_f64())
    };
    let create = rate(&mut |index| {
        noise.fill(&mut content[..64]);
        Ok(fs::write(path(index), &content)?)
    })?;
    let stat = rate(&mut |index| {
        anyhow::ensure!(
            fs::metadata(path(index))?.len() == SMALL_BYTES as u64,
            "size of {index}"
        );
        Ok(())
    })?;
    let read = rate(&mut |index| {
        anyhow::ensure!(
            fs::read(path(index))?.len() == SMALL_BYTES,
            "length of {index}"
        );
        Ok(())
    })?;
    let unlink = rate(&mut |index| Ok(fs::remove_file(path(index))?))?;
    fs::remove_dir_all(dir.join("small"))?;
    Ok(Small {
        create,
        stat,
        read,
        unlink,
    })
}

/// Makes a repository of `files` files in 20 commits to clone from.
pub(crate) fn make_repository(at: &Path, files: usize) -> Result<()> {
    fs::create_dir_all(at)?;
    let mut noise = Noise::new(5);
    git(at, &["init", "-q"])?;
    for commit in 0..20 {
        for index in 0..files / 20 {
            let dir = at.join(format!("d{:02}/e{}", commit, index % 10));
            fs::create_dir_all(&dir)?;
            let lines: Vec<String> = (0..20 + noise.next() % 200)
                .map(|_| format!("line {:x}", noise.next() % 5000))
                .collect();
            fs::write(dir.join(format!("f{index}.txt")), lines.join("\n"))?;
        }
        git(at, &["add", "-A"])?;
        git(at, &["commit", "-q", "-m", "step"])?;
    }
    Ok(())
}

/// Clones it; seconds.
pub(crate) fn clone(from: &Path, into: &Path) -> Result<f64> {
    let began = Instant::now();
    let source = format!("file://{}", from.display());
    let target = into.display().to_string();
    git(Path::new("/"), &["clone", "-q", &source, &target])?;
    let seconds = began.elapsed().as_secs_f64();
    git(into, &["fsck", "--no-progress"])?;
    Ok(seconds)
}

fn git(dir: &Path, arguments: &[&str]) -> Result<()> {
    let identity = [
        "-c",
        "user.name=bench",
        "-c",
        "user.email=bench@localhost",
        "-c",
        "gc.auto=0",
    ];
    let output = Command::new("git")
        .current_dir(dir)
        .args(identity)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("git is needed (package git)")?;
    anyhow::ensure!(
        output.status.success(),
        "git {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
