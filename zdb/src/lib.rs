//! zdb
