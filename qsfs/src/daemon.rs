//! What long-running processes share: logging to standard error and readiness told to whoever started them.

use crate::cli::Cli;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use tracing_subscriber::EnvFilter;

/// What a child that was started in the background says first, as one line of JSON on its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Started {
    /// It does its work.
    Ready,
    /// It ended.
    Failed {
        /// Exit code.
        code: u8,
        /// Error text.
        error: String,
    },
}

impl Started {
    /// Error of a child that ended without a word.
    pub(crate) const SILENT: &str = "it ended without a word";

    /// Tells the parent, once.
    pub(crate) fn tell(&self) {
        let mut line = serde_json::to_string(self).expect("plain data");
        line.push('\n');
        // The parent may have gone; the work goes on all the same.
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
    }

    /// Waits for the child to say it; the end of its output without a word is a failure.
    pub(crate) fn hear(output: impl Read) -> Self {
        let mut line = String::new();
        let heard = BufReader::new(output).read_line(&mut line);
        match heard.map(|_| serde_json::from_str(&line)) {
            Ok(Ok(said)) => said,
            _ => Self::Failed {
                code: crate::exit::ERROR,
                error: Self::SILENT.to_owned(),
            },
        }
    }
}

/// Tracing on standard error: `RUST_LOG`, else `--log-level`, else `info` for daemons and `warn` for commands.
pub(crate) fn log_to_stderr(arguments: &Cli) {
    let default = arguments
        .log_level
        .clone()
        .unwrap_or_else(|| arguments.command.log_level().to_owned());
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .with_env_filter(filter)
        .init();
}
