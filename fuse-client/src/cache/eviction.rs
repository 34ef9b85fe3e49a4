//! Which local datafiles to drop: the pure core of the cache.
//!
//! Invariant: only a committed data datafile is ever chosen. When the limit is reached by bytes that may not be
//! dropped, the verdict is that writers must wait.

use qsfs_zstor::id::DatafileId;

/// Where the water marks are, in percent of the limit.
const HIGH_WATER_PERCENT: u64 = 95;
const LOW_WATER_PERCENT: u64 = 85;

/// One local datafile, as eviction sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalFile {
    /// Which.
    pub id: DatafileId,
    /// Bytes on the local disk.
    pub bytes: u64,
    /// Sealed, committed and of the data stream.
    pub evictable: bool,
    /// Logical time of the last use; smaller is longer ago.
    pub last_used: u64,
}

/// Something happened to the cache.
#[derive(Debug, Clone)]
pub enum Event {
    /// The set of local files as it is now.
    Files(Vec<LocalFile>),
    /// Drop everything that may be dropped.
    EvictAll(Vec<LocalFile>),
}

/// What to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Drop these local copies, in this order.
    Drop(Vec<DatafileId>),
    /// Writers must wait: `bytes` are local and may not be dropped.
    HoldWriters {
        /// Bytes that may not be dropped yet.
        bytes: u64,
    },
    /// Writers may go on.
    ReleaseWriters,
}

/// The core.
#[derive(Debug, Clone)]
pub struct Eviction {
    limit_bytes: u64,
}

impl Eviction {
    /// A cache of at most `limit_bytes`.
    pub const fn new(limit_bytes: u64) -> Self {
        Self { limit_bytes }
    }

    /// The limit.
    pub const fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// Decides.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let (files, target) = match event {
            Event::EvictAll(files) => (files, Some(0)),
            Event::Files(files) => {
                let used: u64 = files.iter().map(|file| file.bytes).sum();
                let high = percent(self.limit_bytes, HIGH_WATER_PERCENT);
                let low = percent(self.limit_bytes, LOW_WATER_PERCENT);
                (files, (used > high).then_some(low))
            }
        };
        let mut actions = Vec::new();
        if let Some(target) = target {
            let dropped = choose(&files, target);
            if !dropped.is_empty() {
                actions.push(Action::Drop(dropped));
            }
        }
        let kept: u64 = files
            .iter()
            .filter(|file| !file.evictable)
            .map(|file| file.bytes)
            .sum();
        actions.push(if kept >= self.limit_bytes {
            Action::HoldWriters { bytes: kept }
        } else {
            Action::ReleaseWriters
        });
        actions
    }
}

fn percent(bytes: u64, percent: u64) -> u64 {
    bytes / 100 * percent + bytes % 100 * percent / 100
}

fn choose(files: &[LocalFile], target: u64) -> Vec<DatafileId> {
    let mut used: u64 = files.iter().map(|file| file.bytes).sum();
    let mut candidates: Vec<&LocalFile> = files.iter().filter(|file| file.evictable).collect();
    candidates.sort_by_key(|file| (file.last_used, file.id));
    let mut dropped = Vec::new();
    for file in candidates {
        if used <= target {
            break;
        }
        used -= file.bytes;
        dropped.push(file.id);
    }
    dropped
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn files() -> impl Strategy<Value = Vec<LocalFile>> {
        proptest::collection::vec((0_u64..100, any::<bool>(), 0_u64..20), 0..40).prop_map(|raw| {
            raw.into_iter()
                .zip(1..)
                .map(|((bytes, evictable, last_used), id)| LocalFile {
                    id: DatafileId(id),
                    bytes,
                    evictable,
                    last_used,
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn never_drops_what_is_not_committed_and_reaches_low_water_if_it_can(
            files in files(), limit in 1_u64..2_000,
        ) {
            let used: u64 = files.iter().map(|file| file.bytes).sum();
            let kept: u64 = files.iter().filter(|file| !file.evictable).map(|file| file.bytes).sum();
            let actions = Eviction::new(limit).step(Event::Files(files.clone()));
            let dropped: Vec<DatafileId> = actions.iter().flat_map(|action| match action {
                Action::Drop(ids) => ids.clone(),
                _ => Vec::new(),
            }).collect();
            let find = |id: DatafileId| files.iter().find(|file| file.id == id);
            let mut left = used;
            for id in &dropped {
                let file = find(*id).expect("a file that exists");
                prop_assert!(file.evictable);
                // Everything longer unused went before it.
                for other in &files {
                    if other.evictable && other.last_used < file.last_used {
                        prop_assert!(dropped.contains(&other.id));
                    }
                }
                left -= file.bytes;
            }
            if used > percent(limit, HIGH_WATER_PERCENT) {
                prop_assert!(left <= percent(limit, LOW_WATER_PERCENT) || left == kept
                    || files.iter().filter(|file| file.evictable && !dropped.contains(&file.id)).all(|file| file.bytes == 0));
            } else {
                prop_assert!(dropped.is_empty());
            }
            prop_assert_eq!(actions.contains(&Action::HoldWriters { bytes: kept }), kept >= limit);
        }

        #[test]
        fn evict_all_leaves_only_what_must_stay(files in files()) {
            let actions = Eviction::new(1 << 40).step(Event::EvictAll(files.clone()));
            let dropped = actions.iter().find_map(|action| match action {
                Action::Drop(ids) => Some(ids.clone()),
                _ => None,
            }).unwrap_or_default();
            for file in &files {
                prop_assert!(dropped.contains(&file.id) || !file.evictable || file.bytes == 0);
                prop_assert!(file.evictable || !dropped.contains(&file.id));
            }
        }
    }
}
