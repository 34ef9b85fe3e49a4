//! What happened, line by line, with virtual time; and its hash, by which two runs are compared.

use std::fmt;

/// All lines so far.
#[derive(Default)]
pub struct Trace {
    hasher: blake3::Hasher,
    lines: u64,
    echo: bool,
    last: std::collections::VecDeque<String>,
}

/// Lines kept for the report of a failure.
const KEPT_LINES: usize = 400;

impl Trace {
    /// `echo`: every line also goes to stderr.
    pub fn new(echo: bool) -> Self {
        Self {
            echo,
            ..Self::default()
        }
    }

    /// One more line.
    pub fn line(&mut self, now_ns: u64, who: &str, what: fmt::Arguments<'_>) {
        let line = format!("{:>12.6} {who:<4} {what}", now_ns as f64 / 1e9);
        self.hasher.update(line.as_bytes());
        self.hasher.update(b"\n");
        self.lines += 1;
        if self.echo {
            eprintln!("{line}");
        }
        if self.last.len() == KEPT_LINES {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }

    /// Number of lines and their hash.
    pub fn digest(&self) -> (u64, String) {
        let hash = self.hasher.finalize().to_hex();
        (self.lines, hash[..16].to_owned())
    }
}
