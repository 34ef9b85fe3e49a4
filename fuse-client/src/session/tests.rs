//! The session against a cluster in memory.
