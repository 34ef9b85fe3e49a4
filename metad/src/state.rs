//! The replicated state: everything the cluster must agree on, and the one function that changes it.
//!
//! ```text
//! Entry { time, request, command } -> apply(&mut State<K>) -> Reply or refusal
//! ```
//!
//! Pure: no clock (time arrives in the entry), no randomness, no I/O besides the key-value reads behind [`kv::Kv`]. Iteration
//! is in key order everywhere, so two nodes that apply the same entries hold the same bytes. What an entry writes is
//! taken back unless it succeeded; the shell commits the batch together with the applied log id.
//!
//! One file per noun: [`volumes`], [`records`], [`backends`] (with agents), [`tokens`], [`members`], [`tombstones`],
//! [`sessions`] (exactly-once), [`settings`] (with the cluster's identity, counters and log time).

pub mod backends;
mod busy;
pub mod command;
pub mod known;
pub mod kv;
pub mod members;
pub mod record_set;
pub mod records;
pub mod row;
pub mod sessions;
pub mod settings;
pub mod tokens;
pub mod tombstones;
pub mod volumes;

#[cfg(test)]
pub(crate) mod tests;

use command::{Command, Entry, Reply};
use known::Known;
use kv::{Batch, Changed, Kv, KvError, RowKey};
use qsfs_proto::api::{Applied, MetadError, Mutation};
use qsfs_zstor::id::BackendId;
use record_set::RecordSet;
use std::collections::BTreeSet;
use std::ops::Bound;

/// What one command did: an answer, or a refusal that changed nothing.
pub type Outcome = Result<Reply, MetadError>;

/// Why a command does not go through: refused (part of the replicated history) or the store failed (it is not).
#[derive(Debug, thiserror::Error)]
pub enum Stop {
    /// The same on every node.
    #[error(transparent)]
    Refused(#[from] MetadError),
    /// Of this node only; apply must not go on.
    #[error(transparent)]
    Store(#[from] KvError),
}

/// What apply may have changed, for the planner's index: names only, the rows are read again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Records written or removed.
    pub records: RecordSet,
    /// Backends written.
    pub backends: BTreeSet<BackendId>,
    /// Volumes were created, altered or deleted.
    pub volumes: bool,
    /// Settings changed.
    pub settings: bool,
    /// Tombstones were made or removed.
    pub tombstones: bool,
}

impl Touched {
    /// Nothing changed that a plan depends on.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Adds what `other` holds.
    pub fn merge(&mut self, other: Self) {
        self.records.extend(other.records);
        self.backends.extend(other.backends);
        self.volumes |= other.volumes;
        self.settings |= other.settings;
        self.tombstones |= other.tombstones;
    }
}

/// What a change found.
#[derive(Debug)]
enum Was {
    /// In the batch.
    Row(RowKey, Option<Option<Vec<u8>>>),
    /// Among the busy rows.
    Busy(busy::Name, Option<busy::Slot>),
}

/// A view of the store plus what was changed since it was last committed.
#[derive(Debug)]
pub struct State<K> {
    kv: K,
    batch: Batch,
    /// What the entry that is being applied changed, in order: each as it was before.
    undo: Vec<Was>,
    touched: Touched,
    /// Keys of watched rows that changed since that was asked last.
    noted: Option<Vec<RowKey>>,
    known: Known,
}

impl<K: Kv> State<K> {
    /// A view with nothing changed.
    pub fn new(kv: K) -> Self {
        Self {
            kv,
            batch: Batch::new(),
            undo: Vec::new(),
            touched: Touched::default(),
            noted: None,
            known: Known::default(),
        }
    }

    /// A view that notes besides how each entry leaves what may be watched, and begins with what a view before it knew.
    pub fn noting(kv: K, known: Known) -> Self {
        Self {
            noted: Some(Vec::new()),
            known,
            ..Self::new(kv)
        }
    }

    /// The watched rows that changed since this was asked last, each once, in key order.
    pub fn take_noted(&mut self) -> Vec<Changed> {
        let mut keys = self.noted.as_mut().map(std::mem::take).unwrap_or_default();
        keys.sort_unstable();
        keys.dedup();
        let changed = keys.into_iter().filter_map(|key| {
            let value = self.batch.get(&key)?.clone();
            Some((key, value))
        });
        changed.collect()
    }

    /// What is known, for the next view of the same store once this one's changes are committed. Nothing is applied any more after it.
    pub fn take_known(&mut self) -> Known {
        self.settle();
        std::mem::take(&mut self.known)
    }

    /// The changes since the view was made, to be committed atomically, and what they touched.
    pub fn into_changes(mut self) -> (Batch, Touched) {
        self.settle();
        (self.batch, self.touched)
    }

    /// Shows the value of a key, if there is one; says whether there is.
    pub(crate) fn look(&self, key: &[u8], see: &mut dyn FnMut(&[u8])) -> Result<bool, KvError> {
        match self.batch.get(key) {
            Some(Some(value)) => {
                see(value);
                Ok(true)
            }
            Some(None) => Ok(false),
            None => self.kv.look(key, see),
        }
    }

    /// Is there a row?
    pub(crate) fn has(&self, key: &[u8]) -> Result<bool, KvError> {
        self.look(key, &mut |_| ())
    }

    /// Everything in `[from, until)` in key order, at most `max` pairs; fewer only at the end of the range.
    pub(crate) fn range(
        &self,
        from: &[u8],
        until: &[u8],
        max: usize,
    ) -> Result<Vec<kv::Pair>, KvError> {
        let over = (Bound::Included(from), Bound::Excluded(until));
        if from >= until || self.batch.range::<[u8], _>(over).next().is_none() {
            return self.kv.range(from, until, max);
        }
        let page_rows = max.min(row::PAGE_ROWS);
        let (mut page, mut next) = (Vec::new().into_iter(), Some(RowKey::from_slice(from)));
        let stored = || {
            if let Some(pair) = page.next() {
                return Ok(Some(pair));
            }
            let Some(cursor) = next.take() else {
                return Ok(None);
            };
            let read: Vec<kv::Pair> = self.kv.range(&cursor, until, page_rows)?;
            if read.len() == page_rows {
                next = read.last().map(|(last, _)| kv::after(last));
            }
            page = read.into_iter();
            Ok(page.next())
        };
        kv::overlaid(&[&self.batch], stored, (from, until), max)
    }

    pub(crate) fn put(&mut self, key: RowKey, value: Vec<u8>) {
        self.change(key, Some(value));
    }

    pub(crate) fn delete(&mut self, key: RowKey) {
        self.change(key, None);
    }

    fn change(&mut self, key: RowKey, value: Option<Vec<u8>>) {
        self.known.forget(&key);
        let before = self.batch.insert(key.clone(), value);
        self.undo.push(Was::Row(key, before));
    }

    pub(crate) fn touch(&mut self) -> &mut Touched {
        &mut self.touched
    }

    /// Changes that no command asked for.
    #[cfg(feature = "broken")]
    pub(crate) fn write_past_rules(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<(), KvError>,
    ) -> Result<(), KvError> {
        change(self)?;
        self.keep_entry();
        Ok(())
    }

    fn keep_entry(&mut self) {
        let changed = self.undo.drain(..).filter_map(|was| match was {
            Was::Row(key, _) => Some(key),
            Was::Busy(..) => None,
        });
        let Some(noted) = &mut self.noted else {
            return;
        };
        noted.extend(changed.filter(|key| row::is_watched(key)));
    }

    fn drop_entry(&mut self) {
        // Newest first: a row that was changed twice ends as it was at first.
        for was in self.undo.drain(..).rev() {
            match was {
                Was::Row(key, before) => {
                    self.known.forget(&key);
                    match before {
                        Some(value) => self.batch.insert(key, value),
                        None => self.batch.remove(&key),
                    };
                }
                Was::Busy(name, before) => drop(self.known.busy.set(name, before)),
            }
        }
    }
}

/// Applies one log entry. The only way replicated state changes.
///
/// A retry of a request that was applied gets the first answer. A refusal changes nothing but log time and
/// the session. An error is the store's, never the command's: the caller must stop applying.
pub fn apply<K: Kv>(state: &mut State<K>, entry: &Entry) -> Result<Outcome, KvError> {
    match &entry.command {
        Command::Group(entries) => {
            let outcomes = entries.iter().map(|entry| apply_one(state, entry));
            Ok(Ok(Reply::Group(outcomes.collect::<Result<_, _>>()?)))
        }
        _ => apply_one(state, entry),
    }
}

fn apply_one<K: Kv>(state: &mut State<K>, entry: &Entry) -> Result<Outcome, KvError> {
    let now_ms = settings::advance_time(state, entry.time_ms)?;
    sessions::sweep(state, now_ms)?;
    state.keep_entry();
    let mut asker = None;
    if let Some(request) = &entry.request {
        let (session, answer) = sessions::answered(state, request)?;
        if let Some(answer) = answer {
            return Ok(answer);
        }
        asker = Some((request, session));
    }
    let outcome = match run(state, &entry.command, now_ms) {
        Ok(reply) => {
            state.keep_entry();
            Ok(reply)
        }
        Err(Stop::Refused(refusal)) => {
            state.drop_entry();
            Err(refusal)
        }
        Err(Stop::Store(error)) => return Err(error),
    };
    if let Some((request, session)) = asker {
        sessions::remember(state, request, session, &outcome, now_ms)?;
        state.keep_entry();
    }
    Ok(outcome)
}

fn run<K: Kv>(state: &mut State<K>, command: &Command, now_ms: u64) -> Result<Reply, Stop> {
    match command {
        Command::Mutation(mutation) => Ok(Reply::Applied(mutate(state, mutation, now_ms)?)),
        Command::Initialize(cluster) => settings::initialize(state, cluster, now_ms),
        Command::SetVerdicts(verdicts) => backends::set_verdicts(state, verdicts, now_ms),
        Command::ConsumeToken { hash, role, csr } => {
            tokens::consume(state, hash, *role, csr, now_ms)?;
            Ok(Reply::Applied(Applied::Done))
        }
        Command::AdmitMetad(admission) => members::admit(state, admission, now_ms),
        Command::RemoveMetad(id) => members::remove(state, *id),
        Command::OrderDeletes(places) => tombstones::order(state, places, now_ms),
        Command::ShardDeleted(place) => tombstones::deleted(state, place),
        Command::ReapVolume(volume) => volumes::reap(state, *volume, now_ms),
        Command::Group(_) => Err(MetadError::Invalid("a group within a group".into()).into()),
    }
}

fn mutate<K: Kv>(state: &mut State<K>, mutation: &Mutation, now_ms: u64) -> Result<Applied, Stop> {
    match mutation {
        Mutation::CreateVolume { .. } => volumes::create(state, mutation, now_ms),
        Mutation::AlterVolume { volume, settings } => volumes::alter(state, *volume, settings),
        Mutation::DeleteVolume { volume } => volumes::delete(state, *volume, now_ms),
        Mutation::AcquireLease {
            volume,
            client,
            holder,
            takeover,
        } => volumes::acquire(state, *volume, (*client, holder), *takeover, now_ms),
        Mutation::RenewLease { volume, epoch, .. } => {
            volumes::renew(state, *volume, *epoch, now_ms)
        }
        Mutation::ReleaseLease { volume, epoch } => volumes::release(state, *volume, *epoch),
        Mutation::CommitDatafiles {
            volume,
            epoch,
            records,
            head,
        } => records::commit(state, (*volume, *epoch), records, head.as_ref()),
        Mutation::ReleaseDatafiles {
            volume,
            epoch,
            datafiles,
        } => records::release(state, (*volume, *epoch), datafiles, now_ms),
        Mutation::SwapShard { .. } => records::swap(state, mutation, now_ms),
        Mutation::ReportShards { reports } => records::report(state, reports),
        Mutation::RegisterAgent { location, node } => {
            backends::register_agent(state, location, node)
        }
        Mutation::RegisterBackend {
            agent,
            address,
            capacity_bytes,
        } => backends::register(state, *agent, address, *capacity_bytes, now_ms),
        Mutation::SetBackendIntent { backend, intent } => {
            backends::set_intent(state, *backend, *intent)
        }
        Mutation::SetSettings(settings) => settings::set(state, settings),
        Mutation::CreateToken { hash, role, ttl_ms } => {
            tokens::create(state, hash, *role, *ttl_ms, now_ms)
        }
        Mutation::RevokeToken { prefix } => tokens::revoke(state, prefix),
        Mutation::SetCertificateLife { life_ms } => settings::set_certificate_life(state, *life_ms),
    }
}
