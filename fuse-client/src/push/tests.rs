//! Transfers against backends in memory.
