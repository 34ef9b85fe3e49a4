//! A disk that is full to the last byte, so that a node really meets its end.

use super::{HEALED_WITHIN, Run};
use anyhow::bail;
use std::time::{Duration, Instant};

/// For a new term after the leader fell silent.
const TERM_WITHIN: Duration = Duration::from_secs(5);

impl Run {
    /// A running node meets the end of its disk at a new term, which it must write down (its log has room set aside, which lasts
    /// longer than a run); and once more when it is started while nothing was given back.
    pub(super) fn fill(&mut self, of: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + HEALED_WITHIN;
        while !self.is_dead(of)? {
            if Instant::now() > deadline {
                let name = self.arena.name(of);
                bail!("{name} goes on for {HEALED_WITHIN:?} with not a byte left on its disk");
            }
            self.arena.fill(of)?;
            self.force_term(of)?;
        }
        self.named_full_disk(of, "ran", 0)?;
        let before = self.arena.log_bytes(of);
        self.arena.fill(of)?;
        self.arena.serve(of)?;
        while !self.is_dead(of)? {
            if Instant::now() > deadline {
                let name = self.arena.name(of);
                bail!("{name} was started with not a byte left on its disk, and did not end");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.named_full_disk(of, "was started", before)
    }

    fn is_dead(&mut self, of: usize) -> anyhow::Result<bool> {
        Ok(self.arena.dead()?.iter().any(|(number, _)| *number == of))
    }

    /// Lets the others, or it, see the leader silent until there is a new term that the node has to write down.
    fn force_term(&mut self, of: usize) -> anyhow::Result<()> {
        let Some(leader) = self.leader() else {
            std::thread::sleep(Duration::from_millis(50));
            return Ok(());
        };
        self.arena.pause(leader);
        let deadline = Instant::now() + TERM_WITHIN;
        while Instant::now() < deadline && !self.is_dead(of)? {
            if leader == of && self.leader().is_some_and(|next| next != of) {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.arena.resume(leader);
        while Instant::now() < deadline && !self.is_dead(of)? {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// It ended: because its disk is full, and it said which disk and what to do. `from`: bytes of its log that are older.
    fn named_full_disk(&mut self, of: usize, when: &str, from: usize) -> anyhow::Result<()> {
        self.arena.kill(of)?;
        let said = self.arena.log_from(of, from);
        let last = said.lines().last().unwrap_or_default();
        let data = self.arena.data(of);
        let wanted = ["is full", "make room", &data.to_string_lossy()];
        if wanted.iter().all(|word| last.contains(word)) {
            self.full += 1;
        } else {
            let name = self.arena.name(of);
            self.trouble.push(format!(
                "{name} {when} on a full disk and ended without a clear word: {last}"
            ));
        }
        Ok(())
    }
}
