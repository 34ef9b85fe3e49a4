//! Deliberately broken metads, each of which some checker must catch. What is broken is what surrounds the real code: a disk that
//! lies about syncs, a network that rewrites messages, an `apply` that is asked something else than what stands in the log.

use super::world::World;
use bytes::Bytes;
use openraft::raft::AppendEntriesRequest;
use parking_lot::Mutex;
use qsfs_metad::machine::rows::Rows;
use qsfs_metad::raft::TypeConfig;
use qsfs_metad::state::command::{Command, Entry};
use qsfs_metad::state::kv::KvError;
use qsfs_metad::state::{self, Outcome, State};
use qsfs_proto::api::{Applied, Freshness, MetadError, Mutation};
use qsfs_proto::raft::RaftRpc;
use qsfs_proto::server::Consistency;
use qsfs_zdb::media::{Identity, Media, MediaFile, MediaLock, OpenMode, SimMedia, Space};
use std::io;
use std::path::Path;
use std::sync::Arc;

macro_rules! variants {
    ($($(#[doc = $doc:literal])* $name:ident = $text:literal),* $(,)?) => {
        /// What is broken.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Variant { $($(#[doc = $doc])* $name),* }

        impl Variant {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Its name on the command line.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }
        }
    };
}

variants! {
    /// The newest votes are lost with power.
    VoteNotSynced = "vote-not-synced",
    /// Appends are acknowledged before they are durable.
    AppendAcknowledgedEarly = "append-acknowledged-early",
    /// Only the leader counts itself before its own sync.
    LeaderCountsItselfEarly = "leader-counts-itself-early",
    /// A linearizable read asks nobody.
    StaleReadServed = "stale-read-served",
    /// A commit under an old epoch goes through.
    EpochUnchecked = "epoch-unchecked",
    /// What was applied is forgotten, so a retry is applied again.
    RetryAppliedTwice = "retry-applied-twice",
    /// Rot in the log is cut like a torn tail.
    RotTakenForTornTail = "rot-taken-for-torn-tail",
    /// After a crash `last_applied` is ahead of the rows.
    AppliedNotAtomic = "applied-not-atomic",
    /// The log is purged before state and snapshot are durable.
    SnapshotBeforeFlush = "snapshot-before-flush",
    /// A leader of an older term is obeyed.
    OldTermAccepted = "old-term-accepted",
    /// The head may go back.
    HeadGoesBack = "head-goes-back",
    /// `apply` asks the node's own clock.
    OwnClock = "own-clock",
    /// A living lease is given away.
    LeaseTakenEarly = "lease-taken-early",
    /// A swap does not look at the record's version.
    SwapUnversioned = "swap-unversioned",
    /// A report of a damaged shard is answered and forgotten.
    ReportForgotten = "report-forgotten",
    /// A node says of its own knowledge that it is of now.
    AgeUntold = "age-untold",
    /// Rot in the state is not looked for.
    StateRotUnseen = "state-rot-unseen",
    /// Rot in a snapshot is not looked for.
    SnapshotRotUnseen = "snapshot-rot-unseen",
    /// A wiped node comes back under its old id.
    WipedNodeKeepsId = "wiped-node-keeps-id",
    /// Records go where the placement rules forbid it.
    PlacementUnchecked = "placement-unchecked",
}

/// Is a read to ask the others?
pub fn consistency(world: &World, wanted: Consistency) -> Consistency {
    match world.broken {
        Some(Variant::StaleReadServed) => Consistency::Stale,
        _ => wanted,
    }
}

/// How old a node says that its own knowledge is.
pub fn freshness(world: &World, told: Freshness) -> Freshness {
    match world.broken {
        Some(Variant::AgeUntold) => Freshness {
            age_ms: Some(0),
            ..told
        },
        _ => told,
    }
}

/// Does rot look like what was written, because nobody looks?
pub fn rot_is_unseen(world: &World) -> bool {
    matches!(
        world.broken,
        Some(Variant::StateRotUnseen | Variant::SnapshotRotUnseen)
    )
}

/// What of a mutation reaches the node's service: with a lease that is taken early, the leader does not wait for its end either.
pub fn proposed(world: &World, mut mutation: Mutation) -> Mutation {
    if let (Some(Variant::LeaseTakenEarly), Mutation::AcquireLease { takeover, .. }) =
        (world.broken, &mut mutation)
    {
        *takeover = true;
    }
    mutation
}

/// Does this run cut rot away?
pub fn cuts_rot(world: &World) -> bool {
    world.broken == Some(Variant::RotTakenForTornTail)
}

/// What of a Raft message reaches the node.
pub fn inbound(world: &World, node: usize, rpc: RaftRpc, payload: Bytes) -> Bytes {
    if world.broken != Some(Variant::OldTermAccepted) || rpc != RaftRpc::Append {
        return payload;
    }
    let Some((version, body)) = payload.split_first() else {
        return payload;
    };
    let Ok(mut request) = postcard::from_bytes::<AppendEntriesRequest<TypeConfig>>(body) else {
        return payload;
    };
    let doors = world.nodes.lock()[node].doors.clone();
    let Some(doors) = doors else {
        return payload;
    };
    let own = doors.consensus.raft().metrics().borrow().vote;
    // The sender stays who it is: only its term is made up.
    if request.vote < own {
        request.vote = openraft::Vote::new_committed(
            own.leader_id().term + 1,
            request.vote.leader_id().node_id,
        );
    }
    postcard::to_extend(&request, vec![*version]).map_or(payload.clone(), Bytes::from)
}

fn asked(state: &State<&Rows>, mutation: &Mutation, broken: Variant) -> Result<Mutation, KvError> {
    let mut asked = mutation.clone();
    match (&mut asked, broken) {
        (Mutation::CommitDatafiles { volume, epoch, .. }, Variant::EpochUnchecked) => {
            if let Some(now) = state.volume(*volume)?
                && now.lease.is_some()
            {
                *epoch = now.epoch;
            }
        }
        (Mutation::ReportShards { reports }, Variant::ReportForgotten) => reports.clear(),
        (Mutation::AcquireLease { takeover, .. }, Variant::LeaseTakenEarly) => *takeover = true,
        (
            Mutation::SwapShard {
                volume,
                datafile,
                shard,
                from,
                version,
                ..
            },
            Variant::SwapUnversioned,
        ) => {
            if let Some(record) = state.record(*volume, *datafile)? {
                *version = record.version;
                if let Some(place) = record.shards.get(*shard as usize) {
                    *from = place.backend;
                }
            }
        }
        _ => {}
    }
    Ok(asked)
}

/// `apply` as this run has it.
pub fn apply(
    world: &World,
    node: usize,
    state: &mut State<&Rows>,
    entry: &Entry,
) -> Result<Outcome, KvError> {
    let Some(broken) = world.broken else {
        return state::apply(state, entry);
    };
    if broken == Variant::AppliedNotAtomic && world.skips_next(node) {
        return Ok(Ok(state::command::Reply::Applied(Applied::Done)));
    }
    let mut entry = entry.clone();
    let parts: Vec<&mut Entry> = match &mut entry.command {
        Command::Group(entries) => entries.iter_mut().collect(),
        _ => Vec::new(),
    };
    let mut refused_by_rule = Vec::new();
    let mut change = |part: &mut Entry| -> Result<(), KvError> {
        if broken == Variant::RetryAppliedTwice {
            part.request = None;
        }
        if broken == Variant::OwnClock {
            part.time_ms = world.own_clock_ms(node);
        }
        if let Command::Mutation(mutation) = &mut part.command {
            *mutation = asked(state, mutation, broken)?;
            refused_by_rule.push(mutation.clone());
        }
        Ok(())
    };
    if parts.is_empty() {
        change(&mut entry)?;
    } else {
        for part in parts {
            change(part)?;
        }
    }
    let mut outcome = state::apply(state, &entry)?;
    // Alone it shows best: what stands in a group stays as it is.
    if let ([mutation], Err(refusal)) = (refused_by_rule.as_slice(), &outcome)
        && overrules(state, mutation, refusal, broken)?
    {
        outcome = Ok(state::command::Reply::Applied(Applied::Done));
    }
    Ok(outcome)
}

/// Does what the rules refused.
fn overrules(
    state: &mut State<&Rows>,
    mutation: &Mutation,
    refusal: &MetadError,
    broken: Variant,
) -> Result<bool, KvError> {
    let Mutation::CommitDatafiles {
        volume,
        epoch,
        records,
        head,
    } = mutation
    else {
        return Ok(false);
    };
    let Some(now) = state.volume(*volume)? else {
        return Ok(false);
    };
    if now.epoch != *epoch || now.lease.is_none() {
        return Ok(false);
    }
    match (broken, refusal, head) {
        (Variant::HeadGoesBack, MetadError::Invalid(text), Some(head))
            if text.contains("head would go back") =>
        {
            qsfs_metad::broken::set_head(state, *volume, *head)?;
            for record in records {
                qsfs_metad::broken::put_record(state, record)?;
            }
            Ok(true)
        }
        (Variant::PlacementUnchecked, MetadError::PolicyUnmet(_), None) => {
            for record in records {
                qsfs_metad::broken::put_record(state, record)?;
            }
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// A disk that says "synced" when nothing is.
#[derive(Debug)]
pub struct LyingMedia {
    inner: SimMedia,
    variant: Variant,
    /// Contents of the vote, in the order in which they were stored.
    votes: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Set while its node leads.
    pub leads: Arc<std::sync::atomic::AtomicBool>,
}

impl LyingMedia {
    /// Does this variant want one?
    pub fn wanted(broken: Option<Variant>) -> bool {
        matches!(
            broken,
            Some(
                Variant::VoteNotSynced
                    | Variant::AppendAcknowledgedEarly
                    | Variant::LeaderCountsItselfEarly
                    | Variant::SnapshotBeforeFlush
            )
        )
    }

    /// Over a disk.
    pub fn new(inner: SimMedia, variant: Variant) -> Self {
        Self {
            inner,
            variant,
            votes: Arc::default(),
            leads: Arc::default(),
        }
    }

    /// Over what the disk holds after power was lost.
    pub fn after_power_loss(&self, inner: SimMedia) -> Self {
        let votes = self.votes.lock();
        let path = super::world::NodeSlot::dir().join("log").join("vote");
        if let (Variant::VoteNotSynced, Some(older)) = (
            self.variant,
            votes.len().checked_sub(3).and_then(|at| votes.get(at)),
        ) && let Ok(file) = inner.open(&path, OpenMode::ReadWrite)
        {
            let stored = file
                .truncate(0)
                .and_then(|()| file.write_all_at(older, 0))
                .and_then(|()| file.sync_data());
            stored.expect("a disk in memory takes it");
        }
        Self::new(inner, self.variant)
    }

    fn lies_about(&self, path: &Path) -> bool {
        let name = path.file_name().and_then(|name| name.to_str());
        let ends = |end: &str| name.is_some_and(|name| name.ends_with(end));
        match self.variant {
            Variant::AppendAcknowledgedEarly => ends(".log"),
            Variant::LeaderCountsItselfEarly => {
                ends(".log") && self.leads.load(std::sync::atomic::Ordering::Relaxed)
            }
            Variant::SnapshotBeforeFlush => ends(".part") || ends(".snap"),
            _ => false,
        }
    }
}

#[derive(Debug)]
struct LyingFile {
    inner: Box<dyn MediaFile>,
    lies: bool,
    votes: Option<Arc<Mutex<Vec<Vec<u8>>>>>,
    leads: Option<Arc<std::sync::atomic::AtomicBool>>,
}

impl MediaFile for LyingFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(buffer, offset)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if let Some(votes) = &self.votes {
            votes.lock().push(bytes.to_vec());
        }
        self.inner.write_all_at(bytes, offset)
    }
    fn write_vectored_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.inner.write_vectored_at(parts, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        let leads = self.leads.as_ref();
        let leads = leads.is_none_or(|leads| leads.load(std::sync::atomic::Ordering::Relaxed));
        if self.lies && leads {
            return Ok(());
        }
        self.inner.sync_data()
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.allocate(offset, length)
    }
    fn truncate(&self, length: u64) -> io::Result<()> {
        self.inner.truncate(length)
    }
    fn length(&self) -> io::Result<u64> {
        self.inner.length()
    }
}

impl Media for LyingMedia {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn MediaFile>> {
        let inner = self.inner.open(path, mode)?;
        let is_log = path.extension().is_some_and(|end| end == "log");
        let only_leading = self.variant == Variant::LeaderCountsItselfEarly && is_log;
        let is_vote = path.ends_with("vote.new") && self.variant == Variant::VoteNotSynced;
        Ok(Box::new(LyingFile {
            inner,
            lies: only_leading || self.lies_about(path),
            votes: is_vote.then(|| Arc::clone(&self.votes)),
            leads: only_leading.then(|| Arc::clone(&self.leads)),
        }))
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.create_dir_all(path)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.inner.remove(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.inner.list(dir)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        if self.variant == Variant::SnapshotBeforeFlush && dir.ends_with("snapshot") {
            return Ok(());
        }
        self.inner.sync_dir(dir)
    }
    fn exists(&self, path: &Path) -> bool {
        self.inner.exists(path)
    }
    fn identity(&self, path: &Path) -> io::Result<Identity> {
        self.inner.identity(path)
    }
    fn space(&self, path: &Path) -> io::Result<Space> {
        self.inner.space(path)
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn MediaLock>> {
        self.inner.lock(path)
    }
}
