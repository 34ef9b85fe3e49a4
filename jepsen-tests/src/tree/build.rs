//! A random tree with everything that is awkward: sparse and empty files, hard and symbolic links, long and non-ASCII
//! names, odd modes, nanosecond times. The same seed makes the same tree.

use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::fs::{self, File, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// How much of a tree.
#[derive(Debug, Clone, Copy)]
pub struct TreeOptions {
    /// Regular files.
    pub files: usize,
    /// Largest ordinary file, in bytes.
    pub file_bytes_max: usize,
    /// One file of this size, incompressible.
    pub large_bytes: usize,
}

const WORDS: [&str; 8] = [
    "src",
    "größe",
    "日本語",
    "with space",
    "naïve\u{301}",
    "-dash",
    "emoji🦀",
    "x",
];

/// Fills `root` (made when missing).
pub fn build(root: &Path, seed: u64, options: TreeOptions) -> io::Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    fs::create_dir_all(root)?;
    let mut dirs = vec![root.to_owned()];
    let mut files = Vec::new();
    for number in 0..options.files {
        let parent = dirs[rng.random_range(0..dirs.len())].clone();
        if number.is_multiple_of(12) && dirs.len() < 200 {
            let dir = parent.join(name(&mut rng, number, "d"));
            fs::create_dir(&dir)?;
            dirs.push(dir);
        }
        let path = parent.join(name(&mut rng, number, "f"));
        write_file(&mut rng, &path, number, options.file_bytes_max)?;
        if number % 9 == 4 {
            let target: &PathBuf = &files[rng.random_range(0..files.len())];
            fs::hard_link(target, parent.join(format!("hard{number}")))?;
        }
        if number % 7 == 3 {
            symlink(
                format!("../nowhere/{}", WORDS[number % WORDS.len()]),
                parent.join(format!("soft{number}")),
            )?;
        }
        files.push(path);
    }
    fs::write(root.join("n".repeat(255)), b"the longest name there is")?;
    let mut large = vec![0; options.large_bytes];
    rng.fill_bytes(&mut large);
    fs::write(root.join("large"), large)?;
    adorn(&mut rng, &files, &dirs)
}

fn name(rng: &mut StdRng, number: usize, kind: &str) -> String {
    format!("{}{kind}{number}", WORDS[rng.random_range(0..WORDS.len())])
}

fn write_file(rng: &mut StdRng, path: &Path, number: usize, bytes_max: usize) -> io::Result<()> {
    let mut file = File::create(path)?;
    match number % 10 {
        0 => Ok(()),
        1 => {
            file.seek(SeekFrom::Start(rng.random_range(4_096..2_000_000)))?;
            file.write_all(b"after a hole")?;
            file.set_len(3_000_000)
        }
        _ => {
            let mut bytes = vec![0; rng.random_range(1..=bytes_max)];
            if number.is_multiple_of(3) {
                rng.fill_bytes(&mut bytes);
            } else {
                for (at, byte) in bytes.iter_mut().enumerate() {
                    *byte = b"fn main() { println!(\"hello\"); }\n"[(at + number) % 33];
                }
            }
            file.write_all(&bytes)
        }
    }
}

/// Modes and times last, directories deepest first, so that nothing disturbs them afterwards.
fn adorn(rng: &mut StdRng, files: &[PathBuf], dirs: &[PathBuf]) -> io::Result<()> {
    for path in files {
        let mode = [0o644, 0o600, 0o755, 0o444, 0o640][rng.random_range(0..5)];
        fs::set_permissions(path, Permissions::from_mode(mode))?;
        set_times(rng, path)?;
    }
    for path in dirs.iter().rev() {
        fs::set_permissions(
            path,
            Permissions::from_mode([0o755, 0o700, 0o2775][rng.random_range(0..3)]),
        )?;
        set_times(rng, path)?;
    }
    Ok(())
}

fn set_times(rng: &mut StdRng, path: &Path) -> io::Result<()> {
    let time = TimeSpec::new(
        rng.random_range(0..1_700_000_000),
        rng.random_range(0..1_000_000_000),
    );
    utimensat(
        nix::fcntl::AT_FDCWD,
        path,
        &time,
        &time,
        UtimensatFlags::FollowSymlink,
    )
    .map_err(io::Error::from)
}
