//! The room of one backend: what it last said was free, less what this client stored there since.
//!
//! ```text
//! -- stored --|-- stored --|-- stored --> time
//!           found        read
//!             '-- age -----'   what was stored from `found` on is taken off
//! ```
//! A reading is older than the moment it comes: the agent found it, metad kept it until it was asked, and pieces went there meanwhile.
//! What was stored about when it was found is taken off though it may count in it already: too little room for a second
//! refuses a write that would have fitted, too much acknowledges one that never fits.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Longest time a heartbeat is under way from agent to metad while all is well; no clock counts that.
const UNDERWAY: Duration = Duration::from_millis(500);
/// Age of what comes without one, from programs before it was said: a heartbeat of the default interval, and the longest time an agent
/// waits for its backends.
const AGE_UNKNOWN: Duration = Duration::from_secs(4);
/// What is stored within such a time is one entry, as long as there are not too many.
const STEP: Duration = Duration::from_millis(50);
/// Most entries; then steps are twice as long.
const ENTRIES_MAX: usize = 64;

/// Bytes stored from the first to the last of these moments.
#[derive(Debug, Clone, Copy)]
struct Stored {
    first: Instant,
    last: Instant,
    bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Heard {
    free_bytes: Option<u64>,
    /// Oldest first.
    stored: VecDeque<Stored>,
    step: Duration,
}

impl Default for Heard {
    fn default() -> Self {
        Self {
            free_bytes: None,
            stored: VecDeque::new(),
            step: STEP,
        }
    }
}

impl Heard {
    /// So much was free, `age` before whoever was asked at this moment answered.
    pub(super) fn hear(&mut self, free_bytes: u64, age: Option<Duration>, asked: Instant) {
        self.free_bytes = Some(free_bytes);
        let age = age.unwrap_or(AGE_UNKNOWN).saturating_add(UNDERWAY);
        let Some(found) = asked.checked_sub(age) else {
            return;
        };
        while self.stored.front().is_some_and(|old| old.last < found) {
            self.stored.pop_front();
        }
        if self.stored.is_empty() {
            self.step = STEP;
        }
    }

    /// So many bytes more are there.
    pub(super) fn note(&mut self, bytes: u64, now: Instant) {
        if let Some(newest) = self.stored.back_mut()
            && now.saturating_duration_since(newest.first) < self.step
        {
            newest.last = now;
            newest.bytes = newest.bytes.saturating_add(bytes);
            return;
        }
        if self.stored.len() == ENTRIES_MAX {
            self.halve();
        }
        self.stored.push_back(Stored {
            first: now,
            last: now,
            bytes,
        });
    }

    /// Two neighbours become one, which is taken off as long as the younger of them would be.
    fn halve(&mut self) {
        self.step = self.step.saturating_mul(2);
        let pairs = self.stored.make_contiguous().chunks(2);
        let merged = pairs.map(|pair| Stored {
            first: pair[0].first,
            last: pair[pair.len() - 1].last,
            bytes: pair
                .iter()
                .fold(0, |sum, one| sum.saturating_add(one.bytes)),
        });
        self.stored = merged.collect();
    }

    /// Bytes that can still be stored; `None` before the backend was heard of.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        let stored = self
            .stored
            .iter()
            .fold(0u64, |sum, one| sum.saturating_add(one.bytes));
        Some(self.free_bytes?.saturating_sub(stored))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A client stored three datafiles within the second between two heartbeats; the backends, asked in between, still said what was
    /// free before, and a write was acknowledged that never fitted.
    #[test]
    fn what_was_stored_after_a_reading_was_found_is_taken_off_of_it() {
        let begin = Instant::now();
        let mut heard = Heard::default();
        heard.note(7, begin);
        assert_eq!(heard.free_bytes(), None, "what is free was not heard yet");
        heard.hear(1_000, Some(ms(900)), begin + ms(100));
        assert_eq!(heard.free_bytes(), Some(993), "stored after it was found");
        heard.note(100, begin + ms(2_000));
        heard.note(10, begin + ms(2_300));
        assert_eq!(heard.free_bytes(), Some(883));
        heard.hear(990, Some(ms(300)), begin + ms(2_700));
        assert_eq!(heard.free_bytes(), Some(880), "the 7 are in it");
        heard.hear(990, Some(ms(0)), begin + ms(2_700));
        assert_eq!(heard.free_bytes(), Some(980), "and the 100");
        heard.hear(880, Some(ms(0)), begin + ms(9_000));
        assert_eq!(heard.free_bytes(), Some(880), "all are in it");
        heard.note(881, begin + ms(9_000));
        assert_eq!(heard.free_bytes(), Some(0));
    }

    #[test]
    fn a_reading_without_an_age_is_of_the_oldest_there_is() {
        let begin = Instant::now();
        let mut heard = Heard::default();
        heard.note(10, begin);
        heard.hear(100, None, begin + AGE_UNKNOWN);
        assert_eq!(heard.free_bytes(), Some(90));
        heard.hear(100, None, begin + AGE_UNKNOWN + UNDERWAY + ms(1));
        assert_eq!(heard.free_bytes(), Some(100));
    }

    #[derive(Debug, Clone, Copy)]
    enum Event {
        Note { bytes: u64 },
        Hear { age_ms: u64 },
    }

    fn event() -> impl Strategy<Value = (u64, Event)> {
        let note = (1u64..1_000).prop_map(|bytes| Event::Note { bytes });
        let hear = (0u64..20_000).prop_map(|age_ms| Event::Hear { age_ms });
        (0u64..400, prop_oneof![20 => note, 1 => hear])
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

        /// Against every single store remembered for ever.
        #[test]
        fn never_too_much_room_and_never_many_entries(events in prop::collection::vec(event(), 1..600)) {
            const FREE: u64 = 1 << 40;
            let mut now = Instant::now() + ms(3_600_000);
            let (mut heard, mut all) = (Heard::default(), Vec::new());
            let mut found = None;
            for (pause_ms, event) in events {
                now += ms(pause_ms);
                match event {
                    Event::Note { bytes } => {
                        heard.note(bytes, now);
                        all.push((now, bytes));
                    }
                    Event::Hear { age_ms } => {
                        heard.hear(FREE, Some(ms(age_ms)), now);
                        // metad does not forget: what comes later was not found earlier.
                        found = found.max(Some(now - ms(age_ms) - UNDERWAY));
                    }
                }
                prop_assert!(heard.stored.len() <= ENTRIES_MAX);
                let Some(found) = found else {
                    prop_assert_eq!(heard.free_bytes(), None);
                    continue;
                };
                let since = all.iter().filter(|(at, _)| *at >= found);
                let least: u64 = since.map(|(_, bytes)| bytes).sum();
                let most: u64 = all.iter().map(|(_, bytes)| bytes).sum();
                let off = FREE - heard.free_bytes().expect("it was heard");
                prop_assert!((least..=most).contains(&off), "{} of {}..={}", off, least, most);
            }
            // What is older than a reading does not stay for ever, however coarse the entries have become.
            heard.hear(FREE, Some(ms(0)), now + ms(60_000));
            prop_assert_eq!(heard.free_bytes(), Some(FREE));
            prop_assert_eq!(heard.step, STEP);
        }
    }
}
