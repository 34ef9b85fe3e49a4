//! Do nodes that applied the same entries hold the same rows?

use super::{Summary, Violation};
use crate::metad::final_state::NodeHash;
use std::collections::BTreeMap;

const NAME: &str = "deterministic";

/// Compares hashes of the whole state at the same applied index. Of fewer than two nodes at one index nothing is shown, which the
/// summary says.
pub fn check(nodes: &[NodeHash]) -> Result<Summary, Violation> {
    let mut at: BTreeMap<u64, Vec<&NodeHash>> = BTreeMap::new();
    for node in nodes {
        at.entry(node.applied).or_default().push(node);
    }
    let mut compared = 0;
    for (applied, same) in &at {
        for other in &same[1..] {
            if other.hash != same[0].hash {
                let what = format!(
                    "{} and {} hold different rows after entry {applied}: {} and {}",
                    same[0].node, other.node, same[0].hash, other.hash
                );
                return Err(Violation::new(NAME, what, Vec::new()));
            }
            compared += 1;
        }
    }
    let text = format!(
        "{compared} pairs of equal states at the same entry, of {} states",
        nodes.len()
    );
    Ok(Summary::new(NAME, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, applied: u64, hash: &str) -> NodeHash {
        NodeHash {
            node: name.into(),
            applied,
            hash: hash.into(),
        }
    }

    #[test]
    fn equal_states_at_the_same_entry_are_fine() {
        let nodes = [node("a", 5, "x"), node("b", 5, "x"), node("c", 4, "y")];
        let text = check(&nodes).expect("fine").text;
        assert!(text.starts_with("1 pairs"), "{text}");
    }

    #[test]
    fn different_states_at_the_same_entry_are_caught() {
        let nodes = [node("a", 5, "x"), node("c", 4, "y"), node("b", 5, "z")];
        let violation = check(&nodes).expect_err("caught");
        assert!(violation.what.contains("a and b"), "{violation}");
    }
}
