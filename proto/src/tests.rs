//! Over real TLS sockets, with a made-up metad behind the shell.
#![expect(clippy::unwrap_used, reason = "tests")]

mod client;
mod fake;
mod hanging;
mod identity;
mod limits;
mod old;
mod renewal;
mod roles;
mod server;
mod tls;
mod versions;
mod watch;
