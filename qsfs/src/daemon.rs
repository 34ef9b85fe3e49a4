//! What long-running processes share: logging to standard error and readiness told to whoever started them.

use crate::cli::Cli;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

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
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(colours);
    tracing_subscriber::registry()
        .with(filter)
        .with(NotEveryRead)
        .with(lines)
        .init();
}

/// Hides one line of openraft, and no other: that a voter did not confirm the leader for a read, which it says at every read and of
/// every such voter. metad says itself, now and then, that reads are refused and why.
#[derive(Debug, Clone, Copy)]
struct NotEveryRead;

impl NotEveryRead {
    const TARGET: &str = "openraft::core::raft_core";
    const TEXT: &str = "timeout while confirming leadership for read request";

    fn may_be_it(metadata: &Metadata<'_>) -> bool {
        metadata.target() == Self::TARGET && *metadata.level() == Level::ERROR
    }
}

impl<S: Subscriber> Layer<S> for NotEveryRead {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        if !Self::may_be_it(event.metadata()) {
            return true;
        }
        let mut text = Text::default();
        event.record(&mut text);
        text.0 != Self::TEXT
    }
}

/// What an event says.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no writer panics").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn openraft_is_not_heard_of_every_read_and_of_everything_else() {
        let written = Written::default();
        let to = written.clone();
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(move || to.clone())
            .with_ansi(false);
        let subscriber = tracing_subscriber::registry()
            .with(EnvFilter::new("info"))
            .with(NotEveryRead)
            .with(lines);
        tracing::subscriber::with_default(subscriber, || {
            for (target, error) in [(1, "the first"), (2, "the second")] {
                tracing::error!(target: "openraft::core::raft_core", target, error, "timeout while confirming leadership for read request");
            }
            tracing::error!(target: "openraft::core::raft_core", target = 3, error = "third", "while requesting vote");
            tracing::error!(target: "openraft::core::raft_core", error = "timeout while confirming leadership for read request", "fourth");
            tracing::warn!(target: "openraft::core::raft_core", "timeout while confirming leadership for read request, fifth");
            tracing::error!(target: "openraft::replication", "sixth: timeout while confirming leadership for read request");
            tracing::error!("timeout while confirming leadership for read request: ours");
            tracing::debug!(target: "openraft::core::raft_core", "nobody asked for it");
        });
        let text = String::from_utf8(written.0.lock().expect("it ended").clone()).expect("text");
        let expected = ["third", "fourth", "fifth", "sixth", "ours"];
        assert_eq!(text.lines().count(), expected.len(), "{text}");
        for (line, word) in text.lines().zip(expected) {
            assert!(line.contains(word), "{line} is not of {word}");
        }
    }
}
