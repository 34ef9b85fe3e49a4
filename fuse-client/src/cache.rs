//! The cache of committed datafiles on the local disk.

pub mod eviction;
