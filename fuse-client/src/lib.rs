//! The filesystem: FUSE adapter, namespace, local store, push and fetch.

pub mod backends;
pub mod cache;
pub mod cluster;
pub mod errno;
pub mod fetch;
pub mod filesystem;
pub mod fuse;
pub mod namespace;
pub mod ports;
pub mod push;
pub mod store;
