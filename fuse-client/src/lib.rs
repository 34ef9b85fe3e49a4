//! The filesystem: FUSE adapter, namespace, local store, push and fetch.

pub mod namespace;
pub mod ports;
