//! Three metads as real processes under partitions, kill -9, SIGSTOP, full disks and changes of members; then all checkers.
//!
//! As a test (no arguments of its own) it is one short run with a fixed seed. `just jepsen` runs it as long as one likes:
//!
//! ```text
//! metad_faults run [--seed N] [--seconds N] [--faults partition,kill,stop,disk,members] [--clients N] [--disk loop|tmpfs] [--out DIR]
//! metad_faults check DIR       the checkers once more, on the files of a run
//! ```
//!
//! It has a `main` of its own because it starts itself again inside namespaces of its own (`jepsen_tests::metad::privately`).

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use qsfs_jepsen_tests::metad::arena::Disk;
use qsfs_jepsen_tests::metad::checkers::{Terms, check_all};
use qsfs_jepsen_tests::metad::final_state::FinalState;
use qsfs_jepsen_tests::metad::history::read_lines;
use qsfs_jepsen_tests::metad::plan::Kind;
use qsfs_jepsen_tests::metad::privately;
use qsfs_jepsen_tests::metad::run::{Options, history_file, run};
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

const NAME: &str = "metad_keeps_its_promises_under_faults";

/// The short run: every fault of the kinds below at least once.
const SHORT: [&str; 9] = [
    "run",
    "--seed",
    "1",
    "--seconds",
    "45",
    "--disk",
    "tmpfs",
    "--faults",
    "partition,kill,stop,disk",
];

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run and check
    Run(RunArguments),
    /// The part of a run that is inside its namespaces
    #[command(hide = true)]
    Inside {
        #[command(flatten)]
        arguments: RunArguments,
        #[arg(long)]
        work: PathBuf,
    },
    /// Check the files of a run again
    Check {
        /// Its output directory
        dir: PathBuf,
    },
}

#[derive(clap::Args, Clone)]
struct RunArguments {
    /// Seed of plan and workload; a random one if none is given
    #[arg(long)]
    seed: Option<u64>,
    /// Time for faults
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Which
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "partition,kill,stop,disk,members"
    )]
    faults: Vec<Kind>,
    /// Clients at once, each in a namespace of its own
    #[arg(long, default_value_t = 5)]
    clients: usize,
    /// What nodes write to: loop (ext4 in a file) or tmpfs
    #[arg(long, default_value = "loop", value_parser = disk)]
    disk: Disk,
    /// Directory for history, end, faults, logs and report [default: jepsen-SEED in the temporary directory]
    #[arg(long)]
    out: Option<PathBuf>,
}

fn disk(text: &str) -> Result<Disk, String> {
    match text {
        "loop" => Ok(Disk::Loop),
        "tmpfs" => Ok(Disk::Tmpfs),
        _ => Err(format!("{text:?} is neither loop nor tmpfs")),
    }
}

fn main() -> ExitCode {
    let own = ["run", "inside", "check"];
    let first = std::env::args().nth(1).unwrap_or_default();
    if !own.contains(&first.as_str()) && first != "--help" {
        return as_test();
    }
    match by_hand(Arguments::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn by_hand(verb: Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Run(arguments) => {
            if let Some(why) = privately::obstacle() {
                bail!("not here: {why}");
            }
            let seed = arguments
                .seed
                .unwrap_or_else(|| rand::random::<u32>().into());
            let out = arguments.out.clone();
            let out = out.unwrap_or_else(|| std::env::temp_dir().join(format!("jepsen-{seed}")));
            outside(&arguments, seed, &out)
        }
        Verb::Inside { arguments, work } => inside(arguments, work),
        Verb::Check { dir } => check(&dir),
    }
}

/// Starts this program again inside, and removes what is left when it is over, however it ends.
fn outside(arguments: &RunArguments, seed: u64, out: &Path) -> anyhow::Result<ExitCode> {
    fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
    let work = tempfile::Builder::new().prefix("qsfs-faults-").tempdir()?;
    let kinds: Vec<_> = arguments.faults.iter().map(Kind::to_string).collect();
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let disk = match arguments.disk {
        Disk::Loop => "loop",
        Disk::Tmpfs => "tmpfs",
    };
    let inside: Vec<String> = [
        "inside".into(),
        format!("--work={}", text(work.path())),
        format!("--seed={seed}"),
        format!("--seconds={}", arguments.seconds),
        format!("--faults={}", kinds.join(",")),
        format!("--clients={}", arguments.clients),
        format!("--disk={disk}"),
        format!("--out={}", text(&fs::canonicalize(out)?)),
    ]
    .into();
    let mut child = privately::start(&std::env::current_exe()?, &inside)?;
    let (tell, told) = mpsc::channel();
    let interrupted = tell.clone();
    ctrlc::set_handler(move || {
        let _ = interrupted.send(());
    })?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if told.recv_timeout(Duration::from_millis(50)).is_ok() {
            child.kill()?;
            child.wait()?;
            drop(work);
            eprintln!("interrupted; the history so far is in {}", out.display());
            return Ok(ExitCode::from(130));
        }
    };
    Ok(match status.code() {
        Some(0) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn inside(arguments: RunArguments, work: PathBuf) -> anyhow::Result<ExitCode> {
    let out = arguments.out.context("--out is given by the outer part")?;
    println!("output: {}", out.display());
    let report = run(Options {
        seed: arguments
            .seed
            .context("--seed is given by the outer part")?,
        time: Duration::from_secs(arguments.seconds),
        kinds: arguments.faults,
        clients: arguments.clients,
        disk: arguments.disk,
        out,
        work,
        binary: PathBuf::from(env!("CARGO_BIN_EXE_qsfs")),
    })?;
    print!("{report}");
    Ok(match report.is_well() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn check(dir: &Path) -> anyhow::Result<ExitCode> {
    let history = File::open(history_file(dir)).context("opening the history")?;
    let events = read_lines(BufReader::new(history))?;
    let end = fs::read_to_string(dir.join("final.json")).context("reading final.json")?;
    let end: FinalState = serde_json::from_str(&end)?;
    let mut code = ExitCode::SUCCESS;
    for checked in check_all(&events, &end, Terms::default()) {
        match checked {
            Ok(summary) => println!("holds: {summary}"),
            Err(violation) => {
                println!("VIOLATED: {violation}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

/// What `cargo test` runs: speaks as the tests of the standard harness do, so that whoever counts them counts this one.
fn as_test() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("{NAME}: test");
        return ExitCode::SUCCESS;
    }
    let result = |word: &str, [passed, failed, out]: [u32; 3]| {
        println!(
            "test result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {out} filtered out; finished"
        );
    };
    let filters: Vec<_> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    if !filters.is_empty() && !filters.iter().any(|filter| NAME.contains(filter.as_str())) {
        result("ok", [0, 0, 1]);
        return ExitCode::SUCCESS;
    }
    println!("\nrunning 1 test");
    if let Some(why) = privately::obstacle() {
        if std::env::var_os("CI").is_none() {
            println!("skipped: {why}");
            println!("test {NAME} ... ok");
            result("ok", [1, 0, 0]);
            return ExitCode::SUCCESS;
        }
        println!("test {NAME} ... FAILED\n{why}");
        result("FAILED", [0, 1, 0]);
        return ExitCode::FAILURE;
    }
    let ended = tempfile::tempdir()
        .map_err(anyhow::Error::from)
        .and_then(|out| {
            let arguments = Arguments::parse_from(["metad_faults"].into_iter().chain(SHORT));
            let Verb::Run(arguments) = arguments.verb else {
                bail!("the short run is a run");
            };
            let code = outside(&arguments, arguments.seed.unwrap_or(1), out.path())?;
            if code != ExitCode::SUCCESS && std::env::var_os("QSFS_TEST_KEEP").is_some() {
                println!("kept: {}", out.keep().display());
            }
            Ok(code)
        });
    match ended {
        Ok(code) if code == ExitCode::SUCCESS => {
            println!("test {NAME} ... ok\n");
            result("ok", [1, 0, 0]);
            ExitCode::SUCCESS
        }
        ended => {
            if let Err(error) = ended {
                println!("{error:#}");
            }
            println!("test {NAME} ... FAILED\n");
            result("FAILED", [0, 1, 0]);
            ExitCode::FAILURE
        }
    }
}
