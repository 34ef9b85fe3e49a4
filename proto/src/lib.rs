//! What is said between QSFS processes, and who may say it.
//!
//! ```text
//! MetadClient --gRPC over TLS 1.3 (X25519MLKEM768), client certificate--> server::serve -> dyn MetadService
//! ```
//!
//! - [`api`]: the verbs and nouns as domain types; [`watch`]: changes as they come; [`status`]: the status contract
//! - [`identity`], [`ca`], [`token`], [`tls`]: who a process is, how it came to be, and how it proves it
//! - [`renewal`]: a process renews its own certificate, in time and without a pause
//! - [`context`]: `cluster.toml`, where the cluster is and who we are
//! - [`dial`]: how a connection comes to be, which a simulation replaces
//! - [`client`]: finds the leader, retries exactly once, ends at its deadline; [`join`]: the first contact
//! - [`server`]: TLS, limits and the role table around a [`server::MetadService`]; [`raft`]: the peers' channel
//!
//! The protobuf types (`proto/qsfs.proto`) are private: they are parsed into domain types at the edge, once.

pub mod api;
pub mod ca;
pub mod client;
pub mod context;
pub mod dial;
pub mod identity;
pub mod join;
pub mod raft;
pub mod renewal;
pub mod server;
pub mod status;
pub mod tls;
pub mod token;
pub mod watch;

mod channel;
mod line;
mod verb;
mod wire;

#[cfg(test)]
mod tests;
