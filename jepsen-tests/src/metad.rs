//! What clients saw of a metad cluster under faults, and whether it may have been so.
//!
//! ```text
//!   clients ──▶ Recorder ──▶ history (JSON lines) ──┐
//!   the healed cluster ──▶ FinalState ──────────────┼──▶ checkers ──▶ Summary, or Violation with the events that show it
//!   stopped nodes ──▶ NodeHash ─────────────────────┘
//! ```
//!
//! - [`history`]: events and their files
//! - [`final_state`]: what is there when all faults are over
//! - [`checkers`]: one file per property
//!
//! Real processes under real faults:
//!
//! ```text
//!   plan (pure: seed -> steps) ──▶ run ──▶ arena: namespaces, processes, disks
//!                                   └────▶ workload: what clients do ──▶ Recorder
//! ```

pub mod arena;
pub mod checkers;
pub mod final_state;
pub mod history;
pub mod plan;
pub mod privately;
pub mod report;
pub mod run;
pub mod workload;
