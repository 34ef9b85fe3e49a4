//! Do those who are answered propose again at once?
//!
//! Callers that wait for one answer before they ask for the next thing come in two halves: one is under way, the other waits for it. If the
//! group that goes next waited for those who have just been answered, all would go together, with half the entries and messages. That
//! pays only if they come at once. This core learns it from what it sees, and is quick to stop believing it.

/// Larger groups gain little: what an entry costs of its own is shared by many already, and answers to many take their time.
const ANSWERED_MAX: usize = 16;

/// So often in a row it must have been true at first.
const PROOFS_MIN: u32 = 4;
/// And so often at most after it was found to be wrong.
const PROOFS_MAX: u32 = 1 << 12;

/// What is believed.
#[derive(Debug)]
pub(super) struct Returning {
    /// How often in a row it was true.
    proofs: u32,
    /// How often it has to be.
    wanted: u32,
}

impl Default for Returning {
    fn default() -> Self {
        Self {
            proofs: 0,
            wanted: PROOFS_MIN,
        }
    }
}

impl Returning {
    /// How many to wait for after so many were answered.
    pub(super) fn expected(&self, answered: usize) -> usize {
        if self.proofs >= self.wanted && answered <= ANSWERED_MAX {
            answered
        } else {
            0
        }
    }

    /// While another group was under way, as many came as had been answered before it, or not.
    pub(super) fn seen(&mut self, all: bool) {
        self.proofs = if all {
            self.proofs.saturating_add(1)
        } else {
            0
        };
    }

    /// They were waited for, and came in time, or not.
    pub(super) fn waited(&mut self, in_time: bool) {
        if in_time {
            self.wanted = (self.wanted - self.wanted.div_ceil(16)).max(PROOFS_MIN);
        } else {
            self.proofs = 0;
            self.wanted = (self.wanted * 2).min(PROOFS_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prove(returning: &mut Returning, times: u32) {
        for _ in 0..times {
            returning.seen(true);
        }
    }

    #[test]
    fn nobody_is_waited_for_before_it_was_seen_often_enough_in_a_row() {
        let mut returning = Returning::default();
        prove(&mut returning, PROOFS_MIN - 1);
        returning.seen(false);
        prove(&mut returning, PROOFS_MIN - 1);
        assert_eq!(returning.expected(8), 0);
        returning.seen(true);
        assert_eq!(returning.expected(8), 8);
        assert_eq!(returning.expected(ANSWERED_MAX + 1), 0);
    }

    #[test]
    fn who_waits_in_vain_waits_ever_more_rarely() {
        let mut returning = Returning::default();
        let mut groups = 0;
        for _ in 0..20 {
            while returning.expected(8) == 0 {
                returning.seen(true);
                groups += 1;
            }
            returning.waited(false);
        }
        assert!(groups > 20 * 1_000, "{groups}");
        assert_eq!(returning.wanted, PROOFS_MAX);
        // And takes as long to trust again.
        prove(&mut returning, PROOFS_MAX);
        for _ in 0..200 {
            assert_eq!(returning.expected(8), 8);
            returning.waited(true);
        }
        assert_eq!(returning.wanted, PROOFS_MIN);
    }
}
