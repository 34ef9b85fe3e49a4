//! Who may keep memory that others wait for: a transfer that moves.
//!
//! Slow clients are welcome while there is room. When somebody waits for the budget, a transfer that fell behind the pace is ended.

use std::time::Duration;

/// A transfer has this long before its pace is looked at.
const GRACE: Duration = Duration::from_secs(2);
/// The pace: a value of 8 MiB in half a minute.
const BYTES_PER_SECOND_MIN: u64 = 256 << 10;

/// Nothing at all moves for this long: what moved before, into the buffers of sockets, does not count.
const STILL: Duration = Duration::from_secs(3);

/// Has a transfer that moved `bytes` in `elapsed`, and nothing in the last `still`, fallen behind?
pub(super) fn is_too_slow(elapsed: Duration, bytes: u64, still: Duration) -> bool {
    if still >= STILL {
        return true;
    }
    let Some(judged) = elapsed.checked_sub(GRACE) else {
        return false;
    };
    let millis = u64::try_from(judged.as_millis()).unwrap_or(u64::MAX);
    bytes < millis.saturating_mul(BYTES_PER_SECOND_MIN) / 1000
}

#[cfg(test)]
mod tests {
    use super::is_too_slow;
    use std::time::Duration;

    #[test]
    fn a_transfer_that_moves_may_go_on_and_one_that_does_not_may_not() {
        let second = Duration::from_secs(1);
        let slow = |seconds, bytes| is_too_slow(second * seconds, bytes, Duration::ZERO);
        assert!(!slow(1, 0));
        assert!(!slow(2, 0));
        assert!(slow(3, 100 << 10));
        assert!(!slow(3, 300 << 10));
        assert!(!slow(30, 8 << 20));
        assert!(slow(60, 8 << 20));
        assert!(is_too_slow(Duration::MAX, 1 << 40, Duration::ZERO));
        assert!(!is_too_slow(second * 4, 8 << 20, second * 2));
        assert!(is_too_slow(second * 4, 8 << 20, second * 3));
    }
}
