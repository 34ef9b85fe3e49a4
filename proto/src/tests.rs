//! Over real TLS sockets, with a made-up metad behind the shell.
#![expect(clippy::unwrap_used, reason = "tests")]

mod client;
mod fake;
mod hanging;
mod identity;
mod old;
mod roles;
mod server;
mod tls;
mod versions;
mod watch;
