//! Faults, workloads and checkers, against real clusters: what `qsfs/tests` are made of.
//!
//! ```text
//!   qsfs/tests/*.rs ──▶ DevCluster ──▶ `qsfs dev` (real processes, a real mount) ── killed on drop, whatever happens
//!                  ├──▶ tree: a random tree, and what differs between two trees
//!                  └──▶ history: what a crash may leave of a sequence of operations
//! ```
//!
//! Tests use only the contract for scripts: the binary, its exit codes, `status --json`, the layout of a dev
//! directory. Every checker has a bad history in its own tests that it must catch.
//!
//! - [`binary`]: running `qsfs` with a deadline
//! - [`dev_cluster`]: a cluster that never outlives its test
//! - [`daemons`]: daemons started by hand, which do not outlive it either
//! - [`wait`]: waiting for a condition instead of sleeping
//! - [`tree`]: builder and comparer of directory trees
//! - [`history`]: the prefix checker for crashes
//! - [`sim`]: a metad cluster in virtual time, from a seed
//! - [`process`]: what runs, by pid files
//! - [`metad`]: histories of metad clients, and the checkers of them

pub mod binary;
pub mod daemons;
pub mod dev_cluster;
pub mod history;
pub mod metad;
pub mod process;
pub mod sim;
pub mod tree;
pub mod wait;

pub use binary::{Binary, Outcome};
pub use daemons::{Daemons, free_address};
pub use dev_cluster::{DevCluster, DevOptions};
pub use wait::{wait_for, wait_within};
