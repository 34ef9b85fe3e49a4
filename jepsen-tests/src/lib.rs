//! jepsen-tests
