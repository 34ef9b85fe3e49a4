//! The filesystem: FUSE adapter, namespace, local store, push and fetch.

pub mod cache;
pub mod errno;
pub mod filesystem;
pub mod fuse;
pub mod namespace;
pub mod ports;
pub mod push;
pub mod store;
