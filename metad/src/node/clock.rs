//! Leader time: what entries of the log carry. The time of day, but it never goes back, never stands, and never jumps.
//!
//! Everything that counts time compares two readings of it: leases, verdicts, graces. A time of day that is set while a node leads must
//! not end them all at once, or never. So leader time runs at least nine tenths as fast as time itself, and at most twice (to within a
//! second), and in between it nears the time of day.

use crate::ground::WallClock;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Slowest and fastest run beside time itself, in tenths.
const TENTHS: (u64, u64) = (9, 20);
/// Counted from an anchor that is at most so old, so that fractions of milliseconds are not lost with every reading.
const ANCHOR_MAX: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub struct Clock {
    wall: Arc<dyn WallClock>,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy)]
struct State {
    anchor: Instant,
    anchor_ms: u64,
    last_ms: u64,
}

/// A reading, `elapsed` after the anchor, when the time of day is `wall_ms`.
fn reading(anchor_ms: u64, elapsed: Duration, wall_ms: u64) -> u64 {
    let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
    let after = |tenths: u64| anchor_ms.saturating_add(elapsed_ms.saturating_mul(tenths) / 10);
    wall_ms.clamp(after(TENTHS.0), after(TENTHS.1))
}

impl Clock {
    /// Begins at the time of day.
    pub fn new(wall: Arc<dyn WallClock>) -> Self {
        let now_ms = wall.now_ms();
        Self {
            wall,
            state: Mutex::new(State {
                anchor: Instant::now(),
                anchor_ms: now_ms,
                last_ms: now_ms,
            }),
        }
    }

    /// Now, in ms since the epoch.
    pub fn now_ms(&self) -> u64 {
        let wall_ms = self.wall.now_ms();
        let mut state = self.state.lock();
        let now = Instant::now();
        let elapsed = now.saturating_duration_since(state.anchor);
        let now_ms = reading(state.anchor_ms, elapsed, wall_ms).max(state.last_ms);
        state.last_ms = now_ms;
        if elapsed >= ANCHOR_MAX {
            (state.anchor, state.anchor_ms) = (now, now_ms);
        }
        now_ms
    }

    /// A term begins: from the time of day again, however long this node was asleep or followed, but not before `log_ms`, up to
    /// which the log has counted already. (A leader behind it would let it stand until it caught up.)
    pub fn begin_term(&self, log_ms: u64) {
        let now_ms = self.wall.now_ms().max(log_ms);
        *self.state.lock() = State {
            anchor: Instant::now(),
            anchor_ms: now_ms,
            last_ms: now_ms,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{ProptestConfig, prop_assert, proptest};
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Debug, Default)]
    struct Set(AtomicU64);

    impl WallClock for Set {
        fn now_ms(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// Whatever is done to the time of day, between any two readings leader time runs within its bounds.
        #[test]
        fn it_runs_within_its_bounds_whatever_the_time_of_day_does(
            steps in proptest::collection::vec((0_u64..5_000, -10_000_000_i64..10_000_000, 0..4), 1..60),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .map_err(|error| proptest::test_runner::TestCaseError::fail(error.to_string()))?;
            let readings = runtime.block_on(async {
                let wall = Arc::new(Set(AtomicU64::new(1_000_000_000_000)));
                let clock = Clock::new(wall.clone());
                let began = Instant::now();
                let mut readings = vec![(0, clock.now_ms())];
                for (wait_ms, jump_ms, kind) in steps {
                    tokio::time::advance(Duration::from_millis(wait_ms)).await;
                    wall.0.fetch_add(wait_ms, Ordering::Relaxed);
                    if kind == 0 {
                        let set = wall.0.load(Ordering::Relaxed).saturating_add_signed(jump_ms);
                        wall.0.store(set, Ordering::Relaxed);
                    }
                    let at_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                    readings.push((at_ms, clock.now_ms()));
                }
                readings
            });
            for (number, (from, before)) in readings.iter().enumerate() {
                for (to, after) in &readings[number..] {
                    let (took, ran) = (to - from, after - before);
                    // Up to an anchor's age it may make up for in one reading, and a fraction is lost at every anchor.
                    let slack = 1_102 + took / 1_000;
                    prop_assert!(ran + slack >= took * 9 / 10, "{ran} in {took}");
                    prop_assert!(ran <= took * 2 + slack, "{ran} in {took}");
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_nears_the_time_of_day_again_and_a_term_begins_after_the_log() {
        let wall = Arc::new(Set(AtomicU64::new(1_000_000)));
        let clock = Clock::new(wall.clone());
        // Set back an hour: leader time runs on, and they meet in the end.
        wall.0.fetch_sub(600_000, Ordering::Relaxed);
        let mut met = false;
        for _ in 0..7_000 {
            tokio::time::advance(Duration::from_secs(1)).await;
            wall.0.fetch_add(1_000, Ordering::Relaxed);
            met |= clock.now_ms() == wall.0.load(Ordering::Relaxed);
        }
        assert!(met);
        // A leader whose clock is behind what the log has counted begins there, and runs at once.
        let log_ms = wall.0.load(Ordering::Relaxed) + 3_600_000;
        clock.begin_term(log_ms);
        tokio::time::advance(Duration::from_secs(10)).await;
        wall.0.fetch_add(10_000, Ordering::Relaxed);
        assert_eq!(clock.now_ms(), log_ms + 9_000);
    }
}
