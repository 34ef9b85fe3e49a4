//! Running the `qsfs` binary as a person or a script would, never without a deadline.

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

/// No command of a test takes longer; one that does hangs, which is a bug.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(120);

/// What a finished command said.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Command line, for messages.
    pub command: String,
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// The same, if it succeeded.
    ///
    /// # Panics
    /// With everything it said, if it did not.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.code_is(0)
    }

    /// The same, if its exit code is `code`.
    ///
    /// # Panics
    /// With everything it said, if it is not.
    #[track_caller]
    pub fn code_is(self, code: i32) -> Self {
        assert!(
            self.code == code,
            "`{}` ended with {} instead of {code}\nstdout: {}\nstderr: {}",
            self.command,
            self.code,
            self.stdout,
            self.stderr
        );
        self
    }

    /// The same, if it failed and its standard error names every one of `words`.
    ///
    /// # Panics
    /// With everything it said, otherwise.
    #[track_caller]
    pub fn fails_naming(self, words: &[&str]) -> Self {
        assert!(
            self.code > 0,
            "`{}` should have failed, it ended with {}: {}{}",
            self.command,
            self.code,
            self.stdout,
            self.stderr
        );
        let said = self.stderr.to_lowercase();
        for word in words {
            assert!(
                said.contains(&word.to_lowercase()),
                "`{}` failed without naming {word:?}: {}",
                self.command,
                self.stderr
            );
        }
        self
    }
}

/// The binary under test and the context file its commands get.
#[derive(Debug, Clone)]
pub struct Binary {
    path: PathBuf,
    cluster: Option<PathBuf>,
    home: PathBuf,
}

impl Binary {
    /// The binary at `path`; `home` becomes `$HOME`, so that nobody's real configuration is seen or touched.
    pub fn new(path: impl Into<PathBuf>, home: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            cluster: None,
            home: home.into(),
        }
    }

    /// The same binary with `--cluster FILE` in its environment.
    #[must_use]
    pub fn with_cluster(&self, file: impl Into<PathBuf>) -> Self {
        Self {
            cluster: Some(file.into()),
            ..self.clone()
        }
    }

    /// A command, ready for arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command
            .env("HOME", &self.home)
            .env("NO_COLOR", "1")
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("QSFS_CLUSTER")
            .stdin(Stdio::null());
        if let Some(file) = &self.cluster {
            command.env("QSFS_CLUSTER", file);
        }
        command
    }

    /// Runs to the end, within [`COMMAND_DEADLINE`].
    pub fn run<I, S>(&self, arguments: I) -> Outcome
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = self.command();
        command.args(arguments);
        run_within(&mut command, COMMAND_DEADLINE)
    }
}

/// Runs any command to its end, captured; kills it at the deadline.
///
/// # Panics
/// When it cannot be started or does not end in time.
pub fn run_within(command: &mut Command, deadline: Duration) -> Outcome {
    let line = describe(command);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start `{line}`: {error}"));
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let end = Instant::now() + deadline;
    let status = loop {
        match child.try_wait().expect("own child can be waited for") {
            Some(status) => break status,
            None if Instant::now() >= end => {
                let _ = child.kill();
                let _ = child.wait();
                panic!(
                    "`{line}` did not end within {deadline:?}\nstdout: {}\nstderr: {}",
                    stdout.join().unwrap_or_default(),
                    stderr.join().unwrap_or_default()
                );
            }
            None => sleep(Duration::from_millis(10)),
        }
    };
    Outcome {
        command: line,
        code: code(status),
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
    }
}

/// Runs a tool of the system (`cp`, `git`, `sqlite3`) in `dir`, within [`COMMAND_DEADLINE`].
pub fn tool(dir: &Path, program: &str, arguments: &[&str]) -> Outcome {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::null());
    run_within(&mut command, COMMAND_DEADLINE)
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or(-1)
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn describe(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}
