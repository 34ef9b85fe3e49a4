//! Daemons that a test starts by hand; none outlives it.

use crate::binary::Binary;
use crate::process;
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;
use tempfile::TempDir;

/// For a daemon to say its first words.
const WORDS_PATIENCE: Duration = Duration::from_secs(60);

/// Addresses asked for before one is new.
const ADDRESSES_MAX: usize = 1_000;

/// A directory with daemons in it.
pub struct Daemons {
    binary: Binary,
    base: TempDir,
    running: Vec<(String, Child)>,
}

impl Daemons {
    /// None yet, in a new temporary directory.
    ///
    /// # Panics
    /// When that cannot be made.
    pub fn new(binary: &Path) -> Self {
        let base = tempfile::Builder::new()
            .prefix("qsfs-hand-")
            .tempdir()
            .expect("a temporary directory can be made");
        Self {
            binary: Binary::new(binary, base.path().join("home")),
            base,
            running: Vec::new(),
        }
    }

    /// The directory.
    pub fn base(&self) -> &Path {
        self.base.path()
    }

    /// A path in it, as text.
    ///
    /// # Panics
    /// When the temporary directory's path is not text.
    pub fn path(&self, name: &str) -> String {
        let path = self.base().join(name);
        path.to_str().expect("temporary paths are text").to_owned()
    }

    /// The binary, without a cluster file.
    pub fn binary(&self) -> &Binary {
        &self.binary
    }

    /// Starts `qsfs ARGUMENTS`; its standard error goes to `NAME.log`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(&mut self, name: &str, arguments: &[&str]) {
        self.spawn(name, arguments, Stdio::null());
    }

    /// Starts it and reads its standard output up to the line that begins with `last`.
    ///
    /// # Panics
    /// When it does not say that in time.
    pub fn start_and_hear(&mut self, name: &str, arguments: &[&str], last: &str) -> Vec<String> {
        let child = self.spawn(name, arguments, Stdio::piped());
        let output = child.stdout.take().expect("it is piped");
        let (said, hearing) = mpsc::channel();
        let last = last.to_owned();
        std::thread::spawn(move || {
            let mut heard = Vec::new();
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let done = line.starts_with(&last);
                heard.push(line);
                if done {
                    let _ = said.send(heard);
                    return;
                }
            }
        });
        hearing
            .recv_timeout(WORDS_PATIENCE)
            .unwrap_or_else(|_| panic!("{name} did not say what was awaited: {}", self.log(name)))
    }

    fn spawn(&mut self, name: &str, arguments: &[&str], output: Stdio) -> &mut Child {
        let log = File::create(self.log_file(name)).expect("a log can be made");
        let child = self
            .binary
            .command()
            .args(arguments)
            .stdout(output)
            .stderr(log)
            .spawn()
            .expect("qsfs can be started");
        self.running.push((name.to_owned(), child));
        &mut self.running.last_mut().expect("just pushed").1
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.base().join(format!("{name}.log"))
    }

    /// What a daemon logged.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.log_file(name)).unwrap_or_default()
    }

    /// The process id of one.
    ///
    /// # Panics
    /// When it is not there.
    pub fn pid(&self, name: &str) -> i32 {
        let found = self.running.iter().find(|(known, _)| known == name);
        found.expect("it was started").1.id().cast_signed()
    }

    /// Ends one with SIGTERM and waits; its exit code.
    ///
    /// # Panics
    /// When it is not there or does not end.
    pub fn stop(&mut self, name: &str) -> Option<i32> {
        process::signal(self.pid(name), Signal::SIGTERM);
        self.wait_end(name)
    }

    /// Waits until one ends by itself; its exit code, if no signal ended it.
    ///
    /// # Panics
    /// When it is not there or does not end.
    pub fn wait_end(&mut self, name: &str) -> Option<i32> {
        let at = self.running.iter().position(|(known, _)| known == name);
        let (_, mut child) = self.running.remove(at.expect("it was started"));
        let status = crate::wait_for(&format!("{name} to end"), || {
            let status = child.try_wait().map_err(|error| error.to_string())?;
            status.ok_or_else(|| "still running".to_owned())
        });
        status.code()
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        for (name, child) in &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
            if std::thread::panicking() {
                let log = fs::read_to_string(self.base.path().join(format!("{name}.log")));
                let log = log.unwrap_or_default();
                let from = log.floor_char_boundary(log.len().saturating_sub(2_000));
                eprintln!("--- {name}\n{}", &log[from..]);
            }
        }
        for (pid, _) in process::all_naming(self.base.path()) {
            process::signal(pid, Signal::SIGKILL);
        }
        for entry in fs::read_dir(self.base.path())
            .into_iter()
            .flatten()
            .flatten()
        {
            process::unmount_lazily(&entry.path());
        }
    }
}

/// A loopback address that was free a moment ago.
///
/// # Panics
/// When there is none.
pub fn free_address() -> String {
    // A daemon binds its address some time after it was given it, and until then the system would give it again.
    static GIVEN: Mutex<BTreeSet<SocketAddr>> = Mutex::new(BTreeSet::new());
    for _ in 0..ADDRESSES_MAX {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
        if given.insert(address) {
            return address.to_string();
        }
    }
    panic!("no port is free that was not given before");
}
