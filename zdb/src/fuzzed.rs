//! The root of `zdb/fuzz`'s library; no part of this crate. It compiles what is fuzzed a second time, without client, sockets and TLS, whose
//! C library alone takes longer to build than a short fuzz run takes. It stands here so that modules find their files.

#![allow(
    dead_code,
    unused_imports,
    reason = "what the rest of the crate uses is not here"
)]

pub mod datafile;
pub mod engine;
pub mod media;

#[path = "server/buffers.rs"]
mod buffers;
#[path = "server/cursor.rs"]
mod cursor;
#[path = "server/parser.rs"]
mod parser;

#[path = "../fuzz/src/namespace.rs"]
pub mod namespace;
#[path = "../fuzz/src/wire.rs"]
pub mod wire;
