//! 0-db: an append-only key-value engine, its RESP server, and a client.
//!
//! ```text
//!   client ── TCP / TLS / unix ──> server ──> engine ──> datafile ──> media ──> disk
//!   (works against a foreign 0-db too)        group commit,   append-only,   the only
//!                                             index,          checksummed    thing that
//!                                             compaction      frames         touches files
//! ```
//!
//! - [`media`]: the disk as a trait, real ([`media::DiskMedia`]) and simulated with faults ([`media::SimMedia`]).
//! - [`datafile`]: *the* append-only framed file; also used by the Raft log and the client's journal.
//! - [`engine`]: namespaces with durable SET, verified GET, quotas and background compaction.
//! - [`server`]: the 0-db protocol over any byte stream.
//! - [`client`]: what the rest of QSFS uses to talk to any 0-db.
//!
//! Source: design page section 4; the protocol as probed on 0-db 2.0.8.

pub mod client;
pub mod datafile;
pub mod engine;
mod hex;
pub mod media;
pub mod server;
