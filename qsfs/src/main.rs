//! `qsfs`: the command line of QSFS. One file per noun; everything that decides something is in the daemons' libraries.

mod agent;
mod allocator;
mod backend;
mod cache;
mod certificate;
mod cli;
mod client;
mod daemon;
mod dev;
mod exit;
mod explain;
mod heal;
mod health;
mod info;
mod key;
mod location;
mod metad;
mod mount;
mod progress;
mod scrub;
mod session;
mod signals;
mod status;
mod sync;
mod table;
mod token;
mod umount;
mod units;
mod volume;
mod zdb;

use clap::Parser;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    allocator::tune();
    let arguments = cli::Cli::parse();
    daemon::log_to_stderr(&arguments);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::new(error).context("starting the runtime")),
    };
    let outcome = runtime.block_on(cli::run(arguments));
    // A blocking thread that hangs on a dead disk must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // Standard error may be closed; there is nobody left to tell then.
    let _ = writeln!(std::io::stderr(), "qsfs: {error:#}");
    ExitCode::from(exit::code_of(error))
}
