//! Directory trees: a random one with everything that is awkward, and what differs between two.

mod build;
mod compare;

pub use build::{TreeOptions, build};
pub use compare::{Summary, compare, files_below};
