//! Rows that nearly every commit changes, decoded: log time, the sums of backends and volumes, sessions.
//!
//! Each is changed here as often as entries say so, and becomes a row of the batch once, when the view's changes are asked for
//! ([`State::settle`]). It may outlive one view, as what is [`super::known`] does. Only this file reads and writes these rows; who
//! walks one of their tables settles first.

use super::backends::BackendLoad;
use super::kv::{Kv, KvError, RowKey};
use super::row::{Key, Table, encode};
use super::sessions::Session;
use super::settings::single;
use super::volumes::VolumeTotals;
use super::{State, Was};
use qsfs_zstor::id::{BackendId, ClientId, VolumeId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;

/// Rows kept from one view to the next at most; beyond, all are read again.
const ROWS_MAX: usize = 4_096;

/// Which row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Name {
    /// Log time, ms since the epoch.
    Time,
    /// Log time of the last sweep.
    Sweep,
    Load(BackendId),
    Totals(VolumeId),
    Session(ClientId, u64),
}

impl Name {
    pub(super) fn key(self) -> RowKey {
        match self {
            Self::Time => single("time"),
            Self::Sweep => single("sweep"),
            Self::Load(id) => Key::of(Table::BackendLoad).number(id.0).done(),
            Self::Totals(id) => Key::of(Table::VolumeTotals).bytes(id.as_bytes()).done(),
            Self::Session(client, session) => Key::of(Table::Session)
                .bytes(client.as_bytes())
                .number(session)
                .done(),
        }
    }
}

/// What a row holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    Ms(u64),
    Load(BackendLoad),
    Totals(VolumeTotals),
    Session(Session),
}

impl Value {
    fn encode(self) -> Vec<u8> {
        match self {
            Self::Ms(value) => encode(&value),
            Self::Load(value) => encode(&value),
            Self::Totals(value) => encode(&value),
            Self::Session(value) => encode(&value),
        }
    }
}

/// A kind of value.
pub(super) trait Busy: Copy + Default + Serialize + DeserializeOwned {
    fn wrap(self) -> Value;
    /// `None`: it is of another kind.
    fn unwrap(value: Value) -> Option<Self>;
}

macro_rules! busy {
    ($($kind:ty => $variant:ident),*) => {$(
        impl Busy for $kind {
            fn wrap(self) -> Value {
                Value::$variant(self)
            }

            fn unwrap(value: Value) -> Option<Self> {
                match value {
                    Value::$variant(value) => Some(value),
                    _ => None,
                }
            }
        }
    )*};
}

busy!(u64 => Ms, BackendLoad => Load, VolumeTotals => Totals, Session => Session);

/// A value, and whether the batch has it yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    value: Value,
    settled: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Rows {
    slots: HashMap<Name, Slot>,
    unsettled: Vec<Name>,
}

impl<K: Kv> State<K> {
    /// What a row holds; the default if there is none.
    pub(super) fn busy<T: Busy>(&self, name: Name) -> Result<T, KvError> {
        let kept = self.known.busy.slots.get(&name);
        match kept.and_then(|slot| T::unwrap(slot.value)) {
            Some(value) => Ok(value),
            None => Ok(self.row(&name.key())?.unwrap_or_default()),
        }
    }

    /// The same, which is remembered.
    pub(super) fn busy_kept<T: Busy>(&mut self, name: Name) -> Result<T, KvError> {
        let value: T = self.busy(name)?;
        let slot = Slot {
            value: value.wrap(),
            settled: true,
        };
        self.known.busy.slots.entry(name).or_insert(slot);
        Ok(value)
    }

    /// Changes a row.
    pub(super) fn put_busy<T: Busy>(&mut self, name: Name, value: T) {
        let slot = Slot {
            value: value.wrap(),
            settled: false,
        };
        self.put_slot(name, Some(slot));
    }

    /// Removes a row.
    pub(super) fn delete_busy(&mut self, name: Name) {
        self.put_slot(name, None);
        self.delete(name.key());
    }

    fn put_slot(&mut self, name: Name, slot: Option<Slot>) {
        let before = self.known.busy.set(name, slot);
        self.undo.push(Was::Busy(name, before));
    }

    /// Puts all that was changed into the batch. Between entries only: nothing of it is taken back.
    pub(super) fn settle(&mut self) {
        let busy = &mut self.known.busy;
        for name in busy.unsettled.drain(..) {
            if let Some(slot) = busy.slots.get_mut(&name)
                && !slot.settled
            {
                slot.settled = true;
                self.batch.insert(name.key(), Some(slot.value.encode()));
            }
        }
        if busy.slots.len() > ROWS_MAX {
            busy.slots.clear();
        }
    }
}

impl Rows {
    /// What was there before.
    pub(super) fn set(&mut self, name: Name, slot: Option<Slot>) -> Option<Slot> {
        let before = match slot {
            Some(slot) => self.slots.insert(name, slot),
            None => self.slots.remove(&name),
        };
        let is_unsettled = |slot: Option<Slot>| slot.is_some_and(|slot| !slot.settled);
        if is_unsettled(slot) && !is_unsettled(before) {
            self.unsettled.push(name);
        }
        before
    }
}
