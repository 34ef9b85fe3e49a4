//! A disk that is full to the last byte, so that a node really meets its end.

use super::{HEALED_WITHIN, Run};
use anyhow::bail;
use qsfs_proto::client::MetadClient;
use qsfs_proto::status::Finding;
use qsfs_zstor::id::ClientId;
use std::time::{Duration, Instant};

/// What the status calls it.
const FINDING: &str = "METAD_DISK_FULL";
/// For a new term after the leader fell silent.
const TERM_WITHIN: Duration = Duration::from_secs(5);

impl Run {
    /// A running node meets the end of its disk at a new term, which it must write down (its log has room set aside, which lasts
    /// longer than a run); and once more when it is killed and started while nothing was given back. Each time it must say so and
    /// wait; nobody starts it when there is room again. If nothing else is wrong, the status of the others must say it as well.
    pub(super) fn fill(&mut self, of: usize, alone: bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + HEALED_WITHIN;
        let from = self.arena.log_bytes(of);
        while !self.waits_for_room(of, from)? {
            if Instant::now() > deadline {
                let name = self.arena.name(of);
                bail!("{name} goes on for {HEALED_WITHIN:?} with not a byte left on its disk");
            }
            self.arena.fill(of)?;
            self.force_term(of, from)?;
        }
        self.full += 1;
        if alone {
            self.until_others_tell(of)?;
        }
        let from = self.arena.log_bytes(of);
        self.arena.kill(of)?;
        self.arena.fill(of)?;
        self.arena.serve(of)?;
        while !self.waits_for_room(of, from)? {
            if Instant::now() > deadline {
                let name = self.arena.name(of);
                bail!("{name} was started with not a byte left on its disk, and did not say so");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.full += 1;
        Ok(())
    }

    /// Has it said, behind so many bytes of its log, that its disk is full and which, and what to do? An end of the process without a
    /// clear word is trouble.
    fn waits_for_room(&mut self, of: usize, from: usize) -> anyhow::Result<bool> {
        let said = self.arena.log_from(of, from);
        let data = self.arena.data(of);
        let wanted = [
            "is full",
            "takes no part",
            "make room",
            &data.to_string_lossy(),
        ];
        if said
            .lines()
            .any(|line| wanted.iter().all(|word| line.contains(word)))
        {
            return Ok(true);
        }
        if self.arena.dead()?.iter().any(|(number, _)| *number == of) {
            let name = self.arena.name(of);
            let last = said.lines().last().unwrap_or_default();
            bail!("{name} ended on a full disk instead of waiting for room: {last}");
        }
        Ok(false)
    }

    /// Waits until each of the others, asked by itself, says that the disk of this one is full: a person may ask any of them.
    fn until_others_tell(&mut self, of: usize) -> anyhow::Result<()> {
        for other in self.others(of) {
            let client = self.client_of(&[other])?.stale();
            self.until_findings(&client, of, |told| !told.is_empty())?;
        }
        Ok(())
    }

    /// Waits until the status does not say it any more.
    pub(super) fn until_not_told(&mut self, of: usize) -> anyhow::Result<()> {
        let client = self.client_of(&self.others(of))?;
        self.until_findings(&client, of, <[Finding]>::is_empty)
    }

    fn others(&self, of: usize) -> Vec<usize> {
        let mut others = self.arena.expected();
        others.retain(|number| *number != of);
        others
    }

    fn client_of(&self, numbers: &[usize]) -> anyhow::Result<MetadClient> {
        let own = ClientId::from_bytes([0xaf; ClientId::LEN]);
        let endpoints = numbers.iter().map(|number| self.arena.address(*number));
        Ok(MetadClient::new(
            endpoints.collect(),
            self.context.identity(),
            own,
        )?)
    }

    fn until_findings(
        &mut self,
        client: &MetadClient,
        of: usize,
        wanted: impl Fn(&[Finding]) -> bool,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + HEALED_WITHIN;
        loop {
            let status = self.runtime.block_on(client.status());
            if let Ok(status) = &status {
                let name = self.arena.name(of);
                let all = status.findings.iter();
                let told: Vec<_> = all
                    .filter(|found| found.name == FINDING && found.subject == name)
                    .cloned()
                    .collect();
                if wanted(&told) {
                    return Ok(());
                }
            }
            self.complain_of_the_dead()?;
            if Instant::now() > deadline {
                let name = self.arena.name(of);
                bail!(
                    "{FINDING} of {name} is not as it should be for {HEALED_WITHIN:?}: {status:?}"
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Lets the others, or it, see the leader silent until there is a new term that the node has to write down.
    fn force_term(&mut self, of: usize, from: usize) -> anyhow::Result<()> {
        let Some(leader) = self.leader() else {
            std::thread::sleep(Duration::from_millis(50));
            return Ok(());
        };
        self.arena.pause(leader);
        let deadline = Instant::now() + TERM_WITHIN;
        while Instant::now() < deadline && !self.waits_for_room(of, from)? {
            if leader == of && self.leader().is_some_and(|next| next != of) {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.arena.resume(leader);
        while Instant::now() < deadline && !self.waits_for_room(of, from)? {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}
