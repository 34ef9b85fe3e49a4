//! The protocol as clients see it: every command's answers and exact errors, session by session, and bytes that are no requests.
#![expect(clippy::unwrap_used, reason = "tests")]

mod alone;
mod commands;
mod framing;
mod namespaces;
mod sessions;
mod wire;
