//! The storage agent: the daemon of one node at one location. It keeps shards, scrubs them and rebuilds lost ones.
//!
//! ```text
//!   clients ──RESP/TLS──▶ zdb server ──▶ zdb engine ──▶ one directory per backend
//!                                            ▲
//!   metad ──session──▶ serve ──orders──▶ jobs (core) ──▶ rebuild, delete (shells)
//!                        ▲                   scrub (core) ──▶ tour (shell), one per backend
//!                        └── facts ◀── hosted and attached backends
//! ```
//!
//! *Scrub finds, re-silver decides, rebuild does*: this crate finds and does; what is to be done is decided by
//! metad. No key is ever here: pieces are verified by their own headers and by the hashes of the encoding record.
//!
//! - [`options`]: what a person asks for
//! - [`join`](fn@join), [`serve`](fn@serve): the two verbs
//! - [`jobs`]: which rebuilds and deletions run now (`step`)
//! - [`scrub`]: which shard is verified next (`step`); [`orphans`]: which keys belong to no record
//! - [`cluster`], [`store`]: the seams to metad and to backends

mod attached;
mod certificate;
mod client_store;
pub mod cluster;
mod config;
mod director;
mod durable;
mod error;
#[cfg(test)]
mod fixture;
mod hosted;
pub mod jobs;
mod join;
mod local;
mod members;
mod metad;
mod noticer;
pub mod options;
pub mod orphans;
mod rebuild;
pub mod scrub;
mod serve;
mod session;
pub mod store;
mod survivors;
#[cfg(test)]
mod testing;
mod tour;
mod tour_file;

pub use certificate::renew_certificate;
pub use error::AgentError;
pub use join::{Joined, join};
pub use options::{AttachSpec, BackendSpec, JoinOptions, ServeOptions};
pub use serve::serve;
