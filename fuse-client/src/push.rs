//! Push: sealed datafiles to shards to commit.

pub mod lifecycle;
