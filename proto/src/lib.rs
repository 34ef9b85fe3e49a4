//! What is said between QSFS processes: domain types, wire form, TLS identities, the metad client.

pub mod api;
pub mod status;
