//! Whether the volume has room for what is written: what will not fit on the backends must not be acknowledged, for it could never be
//! pushed.
//!
//! Counted anew at most a few times a second and whenever the count runs out; in between every write takes its bytes from it.

use crate::backends::Backends;
use crate::store::LocalStore;
use parking_lot::Mutex;
use qsfs_zstor::policy::Geometry;
use std::time::{Duration, Instant};

/// Longest time a count is used.
const COUNT_EVERY: Duration = Duration::from_millis(250);
/// Part of the volume kept free: for the journal, as removing must stay possible when writing is not, and for what others stored since
/// the backends last said how much room they have.
const RESERVE_PART: u64 = 16;
/// Least and most that is kept free.
const RESERVE_BYTES: std::ops::RangeInclusive<u64> = 1 << 20..=256 << 20;

#[derive(Debug, Clone, Copy)]
struct Count {
    at: Instant,
    left_bytes: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Admission {
    count: Mutex<Option<Count>>,
}

/// Bytes of a volume, in all and not yet used, of which what is at risk already has its part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// In all.
    pub total_bytes: u64,
    /// To be written.
    pub left_bytes: u64,
}

/// What the backends can take; `None` while none is known.
pub fn room(backends: &Backends, local: &LocalStore, geometry: Geometry) -> Option<Room> {
    let known = backends.plain_room(geometry)?;
    let reserve =
        (known.total_bytes / RESERVE_PART).clamp(*RESERVE_BYTES.start(), *RESERVE_BYTES.end());
    let taken = local.at_risk().bytes.saturating_add(reserve);
    Some(Room {
        left_bytes: known.left_bytes.saturating_sub(taken),
        ..known
    })
}

impl Admission {
    /// Takes `bytes` from the room that `count` finds; false when they do not fit. Without a count nothing is refused: a client that
    /// knows no backend writes on locally.
    pub fn admit(&self, bytes: u64, count: impl Fn() -> Option<u64>) -> bool {
        let mut known = self.count.lock();
        if let Some(fresh) = known.as_mut()
            && fresh.at.elapsed() < COUNT_EVERY
            && fresh.left_bytes >= bytes
        {
            fresh.left_bytes -= bytes;
            return true;
        }
        let Some(left_bytes) = count() else {
            return true;
        };
        let fits = left_bytes >= bytes;
        *known = Some(Count {
            at: Instant::now(),
            left_bytes: if fits { left_bytes - bytes } else { left_bytes },
        });
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_take_from_the_count_until_it_runs_out() {
        let admission = Admission::default();
        let counted = std::cell::Cell::new(0);
        let count = |left| {
            let counted = &counted;
            move || {
                counted.set(counted.get() + 1);
                Some(left)
            }
        };
        assert!(admission.admit(60, count(100)));
        assert!(admission.admit(30, count(0)), "from the first count");
        assert_eq!(counted.get(), 1);
        assert!(!admission.admit(30, count(29)), "counted anew");
        assert!(admission.admit(30, count(30)), "something was freed");
        assert_eq!(counted.get(), 3);
        assert!(admission.admit(u64::MAX, || None), "nothing is known");
    }
}
