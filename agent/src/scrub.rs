//! The scrub tour of one backend, as a pure core: which shard is verified next, and when.
//!
//! ```text
//! idle ──due or ordered──▶ page of records ──▶ shard, shard, … ──▶ next page … ──empty page──▶ sweep ──▶ idle
//!            ▲                   │ metad away                                              │
//!            └── cursor kept ◀───┴── wait, try again                                       └─ last_scrub
//! ```
//!
//! Invariants: at most one action is under way; the bytes read stay below the rate; what was verified is behind the
//! cursor, which survives a restart; a backend or metad that cannot be asked pauses the tour, it never ends it and
//! never becomes a finding; an order during a tour begins the tour anew, so that everything is read after the order.

use qsfs_proto::api::ShardReport;
use qsfs_zstor::id::{BackendId, DatafileId, VolumeId};
use qsfs_zstor::record::{EncodingRecord, ShardState};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Wait after the first failed question to metad or to the backend, in ms; doubled each time.
pub const RETRY_MS_MIN: u64 = 500;
/// Longest such wait.
pub const RETRY_MS_MAX: u64 = 60_000;

/// Where a tour is; what is saved.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// A tour is under way.
    pub touring: bool,
    /// Volume of the last shard verified.
    pub volume: Option<VolumeId>,
    /// Its datafile.
    pub datafile: DatafileId,
    /// Bytes verified in this tour.
    pub bytes: u64,
    /// When the tour began, ms since the epoch.
    pub started_ms: u64,
    /// When the last complete tour ended, ms since the epoch; 0 is never.
    pub last_scrub_ms: u64,
    /// When the backend was first seen, ms since the epoch: the schedule counts from here.
    pub since_ms: u64,
}

impl Cursor {
    /// The place after which the next page begins.
    pub fn after(&self) -> (VolumeId, DatafileId) {
        let volume = self.volume.unwrap_or(VolumeId::from_bytes([0; 16]));
        (volume, self.datafile)
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Time passed (the wait of [`Action::Wait`] is over, or the first call).
    Tick,
    /// Settings of the cluster, at the start and at every change.
    Settings {
        /// Between the starts of tours; 0 is never by itself.
        interval_ms: u64,
        /// Bytes per second; 0 is no limit.
        bytes_per_s: u64,
    },
    /// A person or metad wants a tour now.
    Ordered,
    /// Shards of the backend after the cursor, in order; empty at the end.
    Page(Vec<(EncodingRecord, u32)>),
    /// A shard was read.
    Checked {
        /// Bytes read.
        bytes: u64,
        /// `None`: it verifies.
        finding: Option<ShardState>,
    },
    /// Orphans were looked for.
    Swept,
    /// metad or the backend could not be asked.
    Unavailable,
}

/// What is to be done; the next event is its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Ask metad for the shards after this place.
    FetchPage {
        /// Volume and datafile of the last shard seen.
        after: (VolumeId, DatafileId),
    },
    /// Read and verify a shard.
    Check {
        /// Its record.
        record: EncodingRecord,
        /// Its index.
        shard: u32,
    },
    /// Look for keys that belong to no record.
    Sweep,
    /// Nothing before this time (ms since the epoch); then [`Event::Tick`].
    Wait {
        /// `None`: nothing by itself.
        until_ms: Option<u64>,
    },
    /// Tell metad; has no answer.
    Report(ShardReport),
    /// Make the cursor durable; has no answer.
    Save(Cursor),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Doing {
    Nothing,
    Paging,
    Checking,
    Sweeping,
}

/// The tour of one backend.
#[derive(Debug)]
pub struct Tour {
    backend: BackendId,
    cursor: Cursor,
    page: VecDeque<(EncodingRecord, u32)>,
    doing: Doing,
    restart: bool,
    at_end: bool,
    interval_ms: u64,
    bytes_per_s: u64,
    not_before_ms: u64,
    retry_ms: u64,
    found: u64,
}

impl Tour {
    /// Goes on where `cursor` says.
    pub fn new(backend: BackendId, cursor: Cursor) -> Self {
        Self {
            backend,
            cursor,
            page: VecDeque::new(),
            doing: Doing::Nothing,
            restart: false,
            at_end: false,
            interval_ms: 0,
            bytes_per_s: 0,
            not_before_ms: 0,
            retry_ms: RETRY_MS_MIN,
            found: 0,
        }
    }

    /// Where the tour is.
    pub fn cursor(&self) -> &Cursor {
        &self.cursor
    }

    /// Damaged shards found since this was made.
    pub fn found(&self) -> u64 {
        self.found
    }

    /// Share of the running tour done, of so many bytes in all; `None` when no tour runs.
    pub fn percent(&self, used_bytes: u64) -> Option<u8> {
        let share = self.cursor.bytes.saturating_mul(100) / used_bytes.max(1);
        self.cursor
            .touring
            .then(|| u8::try_from(share.min(99)).expect("at most 99"))
    }

    /// Takes in what happened and says what to do.
    pub fn step(&mut self, now_ms: u64, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Tick => {}
            Event::Settings {
                interval_ms,
                bytes_per_s,
            } => {
                self.interval_ms = interval_ms;
                self.bytes_per_s = bytes_per_s;
            }
            Event::Ordered => self.restart = true,
            Event::Page(shards) => self.paged(shards),
            Event::Checked { bytes, finding } => self.checked(now_ms, bytes, finding, &mut actions),
            Event::Swept => self.swept(now_ms, &mut actions),
            Event::Unavailable => {
                self.doing = Doing::Nothing;
                self.not_before_ms = now_ms + self.retry_ms;
                self.retry_ms = (self.retry_ms * 2).min(RETRY_MS_MAX);
            }
        }
        if self.doing == Doing::Nothing {
            self.go_on(now_ms, &mut actions);
        }
        actions
    }

    fn paged(&mut self, shards: Vec<(EncodingRecord, u32)>) {
        self.doing = Doing::Nothing;
        self.retry_ms = RETRY_MS_MIN;
        self.at_end = shards.is_empty();
        self.page = shards.into();
    }

    fn checked(
        &mut self,
        now_ms: u64,
        bytes: u64,
        finding: Option<ShardState>,
        actions: &mut Vec<Action>,
    ) {
        self.doing = Doing::Nothing;
        self.retry_ms = RETRY_MS_MIN;
        let (record, shard) = self
            .page
            .pop_front()
            .expect("the front of the page was being checked");
        if let Some(state) = finding {
            self.found += 1;
            actions.push(Action::Report(ShardReport {
                volume: record.volume,
                datafile: record.datafile,
                shard,
                backend: self.backend,
                state,
                by_scrub: true,
            }));
        }
        self.cursor.bytes += bytes;
        // Two shards of one record may be here when little else is up: the place is passed only after the last.
        let more_of_it = self.page.front().is_some_and(|(next, _)| {
            (next.volume, next.datafile) == (record.volume, record.datafile)
        });
        if !more_of_it {
            self.cursor.volume = Some(record.volume);
            self.cursor.datafile = record.datafile;
        }
        // No limit is a pause of nothing.
        let pause_ms = bytes.saturating_mul(1_000).checked_div(self.bytes_per_s);
        self.not_before_ms = self.not_before_ms.max(now_ms) + pause_ms.unwrap_or(0);
        if self.page.is_empty() {
            actions.push(Action::Save(self.cursor.clone()));
        }
    }

    fn swept(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        self.doing = Doing::Nothing;
        self.retry_ms = RETRY_MS_MIN;
        self.at_end = false;
        self.cursor = Cursor {
            last_scrub_ms: now_ms,
            since_ms: self.cursor.since_ms,
            ..Cursor::default()
        };
        actions.push(Action::Save(self.cursor.clone()));
    }

    fn go_on(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        if self.cursor.since_ms == 0 {
            self.cursor.since_ms = now_ms;
            actions.push(Action::Save(self.cursor.clone()));
        }
        let due_ms = self.cursor.last_scrub_ms.max(self.cursor.since_ms) + self.interval_ms;
        let due = self.interval_ms > 0 && now_ms >= due_ms;
        if self.restart || (!self.cursor.touring && due) {
            self.begin(now_ms, actions);
        }
        if !self.cursor.touring {
            let until_ms = (self.interval_ms > 0).then_some(due_ms);
            actions.push(Action::Wait { until_ms });
            return;
        }
        if now_ms < self.not_before_ms {
            actions.push(Action::Wait {
                until_ms: Some(self.not_before_ms),
            });
            return;
        }
        if let Some((record, shard)) = self.page.front() {
            self.doing = Doing::Checking;
            actions.push(Action::Check {
                record: record.clone(),
                shard: *shard,
            });
        } else if self.at_end {
            self.doing = Doing::Sweeping;
            actions.push(Action::Sweep);
        } else {
            self.doing = Doing::Paging;
            actions.push(Action::FetchPage {
                after: self.cursor.after(),
            });
        }
    }

    fn begin(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        self.restart = false;
        self.at_end = false;
        self.page.clear();
        self.not_before_ms = now_ms;
        self.cursor = Cursor {
            touring: true,
            started_ms: now_ms,
            last_scrub_ms: self.cursor.last_scrub_ms,
            since_ms: self.cursor.since_ms,
            ..Cursor::default()
        };
        actions.push(Action::Save(self.cursor.clone()));
    }
}

#[cfg(test)]
mod tests;
