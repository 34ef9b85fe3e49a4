//! Who runs the cluster: admits nodes, replaces those that are damaged, and looks at what is there in the end.

use super::host::{address, token_hash};
use super::nemesis::Order;
use super::workload::{VOLUMES, client, key_of, policy, prepare, volume_id};
use super::world::{Doors, HostRequest, NodeSlot, World};
use crate::metad::final_state::{BackendSite, FinalState, FinalVolume, NodeHash, volume_seen};
use qsfs_metad::state::command::{Admission, Command, Reply};
use qsfs_proto::api::MetadError;
use qsfs_proto::client::MetadClient;
use qsfs_zstor::id::{DatafileId, MetadId};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// After the last fault the cluster must be whole again within so long.
const SETTLE: Duration = Duration::from_secs(60);

/// The operator.
pub struct Operator {
    world: Arc<World>,
    client: MetadClient,
    orders: UnboundedReceiver<Order>,
    tokens: u8,
}

impl Operator {
    /// With the orders of the nemesis.
    pub fn new(world: &Arc<World>, orders: UnboundedReceiver<Order>) -> Self {
        Self {
            world: Arc::clone(world),
            client: client(world, 200),
            orders,
            tokens: 0,
        }
    }

    /// From the first node to the last look.
    pub async fn run(mut self, nodes: usize) -> turmoil::Result {
        for at in 1..nodes {
            self.admit(at).await;
        }
        while !self.whole() {
            sleep(LOOK).await;
        }
        prepare(&self.world, &self.client).await;
        self.world.note("op", format_args!("ready"));
        self.world.ready.store(true, Ordering::Relaxed);
        let mut deadline = None;
        loop {
            self.tend().await;
            if self.world.calm.load(Ordering::Relaxed) {
                let until = *deadline.get_or_insert_with(|| Instant::now() + SETTLE);
                let idle = self.world.busy.load(Ordering::Relaxed) == 0;
                if idle && self.whole() {
                    break;
                }
                if Instant::now() > until {
                    let text = format!(
                        "recovery: {SETTLE:?} after the last fault the cluster is not whole: {}",
                        self.picture()
                    );
                    self.world.violation(text);
                    return Ok(());
                }
            }
            sleep(LOOK).await;
        }
        match self.look().await {
            Ok(end) => *self.world.end.lock() = Some(end),
            Err(error) => self.world.violation(format!(
                "recovery: a whole cluster does not answer: {error}"
            )),
        }
        self.world.note("op", format_args!("done"));
        Ok(())
    }

    async fn tend(&mut self) {
        if self.world.changing.load(Ordering::Relaxed) && self.whole() {
            self.world.changing.store(false, Ordering::Relaxed);
        }
        while let Ok(order) = self.orders.try_recv() {
            // Nobody sane takes a node out, or adds one that has to catch up, while another one is ill.
            let well = self.whole() && !self.world.nodes.lock().iter().any(|slot| slot.harmed);
            self.world.note("op", format_args!("{order:?}: {well}"));
            if !well {
                continue;
            }
            self.world.changing.store(true, Ordering::Relaxed);
            match order {
                Order::Grow => {
                    let free = self.world.nodes.lock().iter().position(|s| s.id.is_none());
                    if let Some(at) = free {
                        self.admit(at).await;
                    }
                }
                Order::Replace(at) => self.replace(at).await,
            }
        }
        let damaged = {
            let nodes = self.world.nodes.lock();
            nodes
                .iter()
                .position(|slot| slot.failure.as_ref().is_some_and(|f| f.damaged))
        };
        if let Some(at) = damaged {
            self.judge_damage(at);
            self.world.changing.store(true, Ordering::Relaxed);
            self.replace(at).await;
        }
    }

    /// Only a disk that rotted may be damaged: losing power never is a reason.
    fn judge_damage(&self, at: usize) {
        let (harmed, text) = {
            let nodes = self.world.nodes.lock();
            let failure = nodes[at].failure.as_ref();
            let text = failure.map_or(String::new(), |failure| failure.text.clone());
            (nodes[at].harmed, text)
        };
        if !harmed {
            self.world.violation(format!(
                "recovery: node {at} says that its data is damaged, and nothing rotted: {text}"
            ));
        }
    }

    fn leader(&self) -> Option<Doors> {
        let at = self.world.leader()?;
        self.world.nodes.lock()[at].doors.clone()
    }

    /// Gives a host an id and starts it.
    async fn admit(&mut self, at: usize) {
        self.tokens += 1;
        let name = self.world.nodes.lock()[at].name.clone();
        let admission = Admission {
            hash: token_hash(self.tokens),
            csr: [self.tokens; 32],
            name: name.parse().expect("a name"),
            location: format!("loc{}", at % 3 + 1).parse().expect("a name"),
            address: address(&name),
        };
        let id = loop {
            if let Some(doors) = self.leader() {
                let command = Command::AdmitMetad(admission.clone());
                match doors.consensus.propose_internal(command).await {
                    Ok(Reply::Admitted(id)) => break id,
                    other => self
                        .world
                        .note("op", format_args!("not admitted: {other:?}")),
                }
            }
            sleep(LOOK * 8).await;
        };
        self.world.note("op", format_args!("{name} is {id}"));
        self.world.nodes.lock()[at].id = Some(id);
        self.world.requests.lock().push(HostRequest::Start(at));
    }

    /// Takes a node out for good, and its host in under a new id, with an empty disk.
    async fn replace(&mut self, at: usize) {
        let old = self.world.nodes.lock()[at].id;
        let Some(old) = old else { return };
        loop {
            match self.client.remove_member(old).await {
                Ok(()) | Err(MetadError::NotFound(_)) => break,
                Err(error) => self.world.note("op", format_args!("not removed: {error}")),
            }
            // It leads by now: somebody else is to be replaced, another time.
            let leads = self.world.leader() == Some(at);
            let damaged = self.world.nodes.lock()[at].failure.is_some();
            if leads && !damaged {
                return;
            }
            sleep(LOOK * 8).await;
        }
        self.world
            .requests
            .lock()
            .push(HostRequest::StopAndWipe(at));
        self.world.nodes.lock()[at].id = None;
        sleep(LOOK).await;
        self.admit(at).await;
    }

    /// Every admitted node runs, votes, and has applied everything.
    fn whole(&self) -> bool {
        let Some(leader) = self.leader() else {
            return false;
        };
        let (voters, last) = {
            let metrics = leader.consensus.raft().metrics();
            let metrics = metrics.borrow();
            let membership = metrics.membership_config.membership();
            let joint = membership.get_joint_config().len() > 1;
            let voters: BTreeSet<u64> = membership.voter_ids().collect();
            let known = membership.nodes().count();
            if joint || known != voters.len() {
                return false;
            }
            (voters, metrics.last_log_index)
        };
        let nodes = self.world.nodes.lock();
        let admitted = nodes.iter().filter_map(|slot| slot.id.map(|id| (id, slot)));
        let mut ids = BTreeSet::new();
        for (MetadId(id), slot) in admitted {
            ids.insert(id);
            let applied = slot
                .doors
                .as_ref()
                .and_then(|doors| doors.machine.raft_row().applied);
            if applied.map(|id| id.index) != last {
                return false;
            }
        }
        ids == voters
    }

    fn picture(&self) -> String {
        let nodes = self.world.nodes.lock();
        let texts = nodes.iter().map(|slot| {
            let state = match (&slot.failure, &slot.doors) {
                (Some(failure), _) => failure.text.clone(),
                (None, Some(doors)) => {
                    let metrics = doors.consensus.raft().metrics();
                    let metrics = metrics.borrow();
                    let applied = doors.machine.raft_row().applied;
                    format!(
                        "term {} leader {:?} last {:?} applied {:?} of {}",
                        metrics.current_term,
                        metrics.current_leader,
                        metrics.last_log_index,
                        applied.map(|id| id.index),
                        metrics.membership_config
                    )
                }
                (None, None) => "down".into(),
            };
            format!("{} {:?}: {state}", slot.name, slot.id)
        });
        texts.collect::<Vec<_>>().join("; ")
    }

    async fn look(&self) -> Result<FinalState, MetadError> {
        let mut end = FinalState::default();
        for volume in 1..=VOLUMES {
            let id = volume_id(volume);
            let found = self.client.volume_by_id(id).await?;
            let mut records = Vec::new();
            loop {
                let after = records.last().map_or(
                    DatafileId(0),
                    |last: &qsfs_zstor::record::EncodingRecord| last.datafile,
                );
                let page = self.client.list_records(id, None, after, 1_024).await?;
                if page.is_empty() {
                    break;
                }
                records.extend(page);
            }
            let seen = FinalVolume {
                policy: policy(),
                seen: volume_seen(&found),
                records,
                below_policy: None,
            };
            end.volumes.insert(key_of(volume), seen);
        }
        for backend in self.client.backends().await? {
            end.backends.push(BackendSite {
                backend: backend.id,
                location: backend.location,
                node: backend.node,
            });
        }
        end.nodes = self.hashes();
        Ok(end)
    }

    /// Hash of all rows of every node, with what entry they stand after.
    fn hashes(&self) -> Vec<NodeHash> {
        let nodes = self.world.nodes.lock();
        let mut hashes = Vec::new();
        for slot in nodes.iter() {
            let Some(doors) = &slot.doors else { continue };
            let path = NodeSlot::dir().join("judged");
            let applied = doors.machine.raft_row().applied.map_or(0, |id| id.index);
            let copied = doors.machine.copy_to(&path);
            let contents = copied.ok().and_then(|()| slot.media.contents(&path));
            let hash = blake3::hash(&contents.unwrap_or_default());
            hashes.push(NodeHash {
                node: slot.name.clone(),
                applied,
                hash: hash.to_hex().to_string(),
            });
        }
        hashes
    }
}
