//! The filesystem: FUSE adapter, namespace, local store, push and fetch.

pub mod admission;
pub mod backends;
pub mod cache;
mod certificate;
pub mod cluster;
pub mod control;
pub mod errno;
pub mod error;
pub mod fetch;
pub mod filesystem;
pub mod fuse;
pub mod kit;
pub mod lease;
pub mod namespace;
pub mod ports;
pub mod push;
pub mod recover;
pub mod run;
pub mod session;
pub mod state;
pub mod store;
#[cfg(test)]
pub(crate) mod testing;
pub mod volume_store;
