//! Waiting for a condition, with a deadline. No test sleeps for luck.

use std::fmt::Display;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Deadline of [`wait_for`]: far above what anything here takes, so that a slow machine does not fail a test.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Waits up to [`PATIENCE`] until `look` answers `Ok`; panics with its last complaint otherwise.
pub fn wait_for<T, E: Display>(what: &str, look: impl FnMut() -> Result<T, E>) -> T {
    wait_within(PATIENCE, what, look)
}

/// Waits up to `patience` until `look` answers `Ok`; panics with its last complaint otherwise.
pub fn wait_within<T, E: Display>(
    patience: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<T, E>,
) -> T {
    let deadline = Instant::now() + patience;
    loop {
        match look() {
            Ok(found) => return found,
            Err(complaint) if Instant::now() >= deadline => {
                panic!("waited {patience:?} for {what}; last seen: {complaint}")
            }
            Err(_) => sleep(LOOK_EVERY),
        }
    }
}

/// `Ok` when `holds`, else the complaint: turns a condition into what [`wait_for`] looks at.
pub fn holds(condition: bool, complaint: impl Display) -> Result<(), String> {
    if condition {
        Ok(())
    } else {
        Err(complaint.to_string())
    }
}
