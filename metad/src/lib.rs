//! metad: the Raft-replicated metadata service. It remembers; it decides what is to be re-silvered; it holds no user data.
//!
//! ```text
//! clients, agents --gRPC--> node/ (shell) --proposals--> raft --log/ (disk)
//!                             |                            |
//!                             |<-- plan/ (what to do) <-- state/ (what is agreed on) -- machine/ (disk)
//! ```
//!
//! - [`state`]: replicated state and `apply`, pure
//! - [`plan`]: verdicts, rebuilds, deletions, pure
//! - [`log`], [`machine`]: what Raft keeps on disk
//! - [`ground`]: what a node stands on, which a simulation replaces
//! - [`node`]: the shell; [`bootstrap`], [`join`] and [`serve`] are its doors
//! - [`mod@backup`], [`restore`], [`recover`], [`mod@inspect`]: before and after a disaster

pub mod backup;
#[cfg(feature = "broken")]
pub mod broken;
pub mod durable;
pub mod ground;
pub mod inspect;
pub mod log;
pub mod machine;
pub mod node;
pub mod options;
pub mod placing;
pub mod plan;
pub mod raft;
pub mod state;

mod birth;
mod certificate;
mod rebirth;

pub use birth::{bootstrap, join, serve, serve_on};
pub use certificate::{authority, renew_certificate};
pub use node::NodeError;
pub use options::{
    BootstrapOptions, Bootstrapped, JoinOptions, Joined, RecoverOptions, Recovery, RestoreOptions,
    Restored, ServeOptions,
};
pub use rebirth::{recover, restore};
