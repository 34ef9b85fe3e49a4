//! Watches what every node applies.

use super::broken;
use super::world::World;
use qsfs_metad::ground::Applier;
use qsfs_metad::machine::rows::Rows;
use qsfs_metad::raft::LogId;
use qsfs_metad::state::command::Entry;
use qsfs_metad::state::kv::KvError;
use qsfs_metad::state::{Outcome, State};
use std::fmt;
use std::sync::Arc;

/// Around `apply` of one node.
pub struct Watch {
    /// Told every outcome.
    pub world: Arc<World>,
    /// Which node.
    pub node: usize,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Watch({})", self.node)
    }
}

impl Applier for Watch {
    fn apply(
        &self,
        id: &LogId,
        state: &mut State<&Rows>,
        entry: &Entry,
    ) -> Result<Outcome, KvError> {
        let outcome = broken::apply(&self.world, self.node, state, entry)?;
        let bytes = postcard::to_stdvec(&(id, &outcome)).expect("plain data types always encode");
        let hash = blake3::hash(&bytes).to_hex()[..12].to_owned();
        let name = format!("m{}", self.node + 1);
        self.world
            .note(&name, format_args!("applied {} {hash}", id.index));
        self.world.applied(self.node, id.index, hash);
        Ok(outcome)
    }
}
