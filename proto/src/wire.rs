//! Between domain types and protobuf. Everything that arrives is parsed here, once: what comes out is valid.
//!
//! Source: `proto/qsfs.proto`. Every domain type has one [`Wire`] implementation; the macros name each field once, so that a
//! field cannot be forgotten in one direction. Limits are checked before a list or a text is taken over.

mod nouns;
mod verbs;

#[cfg(test)]
mod tests;

use crate::api::{MetadError, Secret};
use crate::server::CallError;
use prost::Message;
use qsfs_zstor::id::{
    AgentId, BackendId, ClientId, ClusterId, DatafileId, Epoch, KeyId, LocationName, MetadId,
    NodeName, Salt, ShardHash, VolumeId, VolumeName,
};
use std::fmt;

/// The generated types.
#[expect(
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::too_many_lines,
    reason = "generated; the schema says what they are"
)]
pub(crate) mod pb {
    tonic::include_proto!("qsfs.v1");
}

/// Metadata key of [`PROTOCOL_VERSION`].
pub(crate) const PROTOCOL_KEY: &str = "qsfs-protocol";
/// Raised when a message changes its meaning. Both ends understand their own version and its neighbours, so that a cluster can be
/// upgraded one process at a time; what is further away is refused.
pub(crate) const PROTOCOL_VERSION: u32 = 1;

/// May a caller of this version be answered? If not, what to do, for people.
pub(crate) fn check_protocol(callers: Option<&str>) -> Result<(), String> {
    let Some(version) = callers.and_then(|version| version.parse::<u32>().ok()) else {
        return Err(format!(
            "this metad speaks protocol {PROTOCOL_VERSION}, the caller names none: it is no program of qsfs"
        ));
    };
    if version.abs_diff(PROTOCOL_VERSION) <= 1 {
        return Ok(());
    }
    let first = if version > PROTOCOL_VERSION {
        "upgrade the metad nodes first, one at a time"
    } else {
        "upgrade the caller first"
    };
    Err(format!(
        "this metad speaks protocol {PROTOCOL_VERSION} and its neighbours, the caller {version}: {first}"
    ))
}

/// Most entries of any list.
pub(crate) const LIST_MAX: usize = 1 << 16;
/// Longest text, in bytes (a PEM is the longest).
pub(crate) const TEXT_BYTES_MAX: usize = 64 << 10;
/// Longest text inside an error: it travels in HTTP/2 trailers, whose size is limited; longer ones are cut.
pub(crate) const ERROR_TEXT_BYTES_MAX: usize = 4 << 10;

/// What arrived is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WireError {
    path: Vec<&'static str>,
    reason: String,
}

impl WireError {
    pub(crate) fn new(reason: impl fmt::Display) -> Self {
        Self {
            path: Vec::new(),
            reason: reason.to_string(),
        }
    }

    fn missing() -> Self {
        Self::new("missing, or of a later version of qsfs")
    }

    fn within(mut self, field: &'static str) -> Self {
        self.path.push(field);
        self
    }
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, field) in self.path.iter().rev().enumerate() {
            f.write_str(if index == 0 { "" } else { "." })?;
            f.write_str(field)?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// A domain value that `P` carries.
pub(crate) trait Wire<P>: Sized {
    fn to_wire(&self) -> P;
    fn from_wire(wire: P) -> Result<Self, WireError>;
}

impl<T: Wire<P>, P> Wire<P> for Box<T> {
    fn to_wire(&self) -> P {
        T::to_wire(self)
    }
    fn from_wire(wire: P) -> Result<Self, WireError> {
        T::from_wire(wire).map(Box::new)
    }
}

impl<T: Wire<P>, P> Wire<Option<P>> for Option<T> {
    fn to_wire(&self) -> Option<P> {
        self.as_ref().map(T::to_wire)
    }
    fn from_wire(wire: Option<P>) -> Result<Self, WireError> {
        wire.map(T::from_wire).transpose()
    }
}

impl<T: Wire<P>, P> Wire<Vec<P>> for Vec<T> {
    fn to_wire(&self) -> Vec<P> {
        self.iter().map(T::to_wire).collect()
    }
    fn from_wire(wire: Vec<P>) -> Result<Self, WireError> {
        if wire.len() > LIST_MAX {
            return Err(WireError::new(format_args!("more than {LIST_MAX} entries")));
        }
        wire.into_iter().map(T::from_wire).collect()
    }
}

macro_rules! as_is {
    ($($type:ty),*) => { $(
        impl Wire<$type> for $type {
            fn to_wire(&self) -> $type { *self }
            fn from_wire(wire: $type) -> Result<Self, WireError> { Ok(wire) }
        }
    )* };
}
as_is!(u32, u64, bool);

impl Wire<u32> for u8 {
    fn to_wire(&self) -> u32 {
        (*self).into()
    }
    fn from_wire(wire: u32) -> Result<Self, WireError> {
        Self::try_from(wire).map_err(WireError::new)
    }
}

impl Wire<String> for String {
    fn to_wire(&self) -> String {
        self.clone()
    }
    fn from_wire(wire: String) -> Result<Self, WireError> {
        if wire.len() > TEXT_BYTES_MAX {
            return Err(WireError::new(format_args!(
                "longer than {TEXT_BYTES_MAX} bytes"
            )));
        }
        Ok(wire)
    }
}

impl Wire<String> for Secret {
    fn to_wire(&self) -> String {
        self.0.clone()
    }
    fn from_wire(wire: String) -> Result<Self, WireError> {
        String::from_wire(wire).map(Self)
    }
}

impl<const N: usize> Wire<Vec<u8>> for [u8; N] {
    fn to_wire(&self) -> Vec<u8> {
        self.to_vec()
    }
    fn from_wire(wire: Vec<u8>) -> Result<Self, WireError> {
        wire.as_slice()
            .try_into()
            .map_err(|_| WireError::new(format_args!("{} bytes instead of {N}", wire.len())))
    }
}

macro_rules! bytes_ids {
    ($($type:ty),*) => { $(
        impl Wire<Vec<u8>> for $type {
            fn to_wire(&self) -> Vec<u8> { self.as_bytes().to_vec() }
            fn from_wire(wire: Vec<u8>) -> Result<Self, WireError> {
                Wire::from_wire(wire).map(Self::from_bytes)
            }
        }
    )* };
}
bytes_ids!(ClusterId, VolumeId, KeyId, ClientId, Salt, ShardHash);

macro_rules! number_ids {
    ($($type:ident),*) => { $(
        impl Wire<u64> for $type {
            fn to_wire(&self) -> u64 { self.0 }
            fn from_wire(wire: u64) -> Result<Self, WireError> { Ok(Self(wire)) }
        }
    )* };
}
number_ids!(MetadId, AgentId, BackendId, DatafileId, Epoch);

macro_rules! names {
    ($($type:ty),*) => { $(
        impl Wire<String> for $type {
            fn to_wire(&self) -> String { self.as_str().to_owned() }
            fn from_wire(wire: String) -> Result<Self, WireError> {
                wire.parse().map_err(WireError::new)
            }
        }
    )* };
}
names!(LocationName, NodeName, VolumeName);

/// A struct whose message has the same field names. `check` sees the whole.
macro_rules! wire_struct {
    ($domain:ident { $($field:ident),* $(,)? } $(check $check:path)?) => {
        impl Wire<pb::$domain> for $domain {
            fn to_wire(&self) -> pb::$domain {
                pb::$domain { $($field: Wire::to_wire(&self.$field)),* }
            }
            fn from_wire(wire: pb::$domain) -> Result<Self, WireError> {
                let value = Self {
                    $($field: Wire::from_wire(wire.$field).map_err(|error| error.within(stringify!($field)))?),*
                };
                $($check(&value)?;)?
                Ok(value)
            }
        }
        required!($domain => $domain);
    };
}

/// A message field in protobuf is always optional; here it must be there.
macro_rules! required {
    ($domain:ty => $pb:ident) => {
        impl Wire<Option<pb::$pb>> for $domain {
            fn to_wire(&self) -> Option<pb::$pb> {
                Some(Wire::to_wire(self))
            }
            fn from_wire(wire: Option<pb::$pb>) -> Result<Self, WireError> {
                Wire::from_wire(wire.ok_or_else(WireError::missing)?)
            }
        }
    };
}

macro_rules! wire_enum {
    ($domain:ident { $($variant:ident),* }) => {
        impl Wire<i32> for $domain {
            fn to_wire(&self) -> i32 {
                match self { $(Self::$variant => pb::$domain::$variant as i32),* }
            }
            fn from_wire(wire: i32) -> Result<Self, WireError> {
                match pb::$domain::try_from(wire) {
                    $(Ok(pb::$domain::$variant) => Ok(Self::$variant),)*
                    Ok(pb::$domain::Unspecified) | Err(_) => Err(WireError::missing()),
                }
            }
        }
    };
}

macro_rules! wire_list {
    ($item:ty => $list:ident) => {
        impl Wire<pb::$list> for Vec<$item> {
            fn to_wire(&self) -> pb::$list {
                pb::$list {
                    items: Wire::to_wire(self),
                }
            }
            fn from_wire(wire: pb::$list) -> Result<Self, WireError> {
                Wire::from_wire(wire.items)
            }
        }
    };
}

/// An enum whose message is a oneof `kind`: variants with fields have a message of their own, variants with one unnamed value carry it
/// directly, variants without any carry `Unit`.
macro_rules! wire_oneof {
    ($domain:ident in $module:ident;
     fields { $($s:ident = $message:ident { $($field:ident),* }),* $(,)? }
     values { $($t:ident),* $(,)? }
     units { $($u:ident),* $(,)? }) => {
        impl Wire<pb::$domain> for $domain {
            fn to_wire(&self) -> pb::$domain {
                let kind = match self {
                    $(Self::$s { $($field),* } =>
                        pb::$module::Kind::$s(pb::$message { $($field: Wire::to_wire($field)),* }),)*
                    $(Self::$t(value) => pb::$module::Kind::$t(Wire::to_wire(value)),)*
                    $(Self::$u => pb::$module::Kind::$u(pb::Unit {}),)*
                };
                pb::$domain { kind: Some(kind) }
            }
            fn from_wire(wire: pb::$domain) -> Result<Self, WireError> {
                match wire.kind {
                    None => Err(WireError::missing().within(stringify!($domain))),
                    $(Some(pb::$module::Kind::$s(message)) => Ok(Self::$s {
                        $($field: Wire::from_wire(message.$field)
                            .map_err(|error| error.within(stringify!($field)).within(stringify!($s)))?),*
                    }),)*
                    $(Some(pb::$module::Kind::$t(value)) => Wire::from_wire(value)
                        .map(Self::$t)
                        .map_err(|error| error.within(stringify!($t))),)*
                    $(Some(pb::$module::Kind::$u(pb::Unit {})) => Ok(Self::$u),)*
                }
            }
        }
        required!($domain => $domain);
    };
}

pub(crate) use {required, wire_enum, wire_list, wire_oneof, wire_struct};

/// The error as a message.
pub(crate) fn failure_of(error: &CallError) -> pb::Failure {
    let kind = match error {
        CallError::NotLeader { leader } => pb::failure::Kind::NotLeader(pb::NotLeader {
            leader: leader.clone(),
        }),
        CallError::Refused(error) | CallError::Decided(error) => {
            pb::failure::Kind::Refused(shortened(error).to_wire())
        }
    };
    pb::Failure {
        kind: Some(kind),
        decided: matches!(error, CallError::Decided(_)),
    }
}

/// A failure as the gRPC status that carries it.
pub(crate) fn status_with(code: tonic::Code, failure: &pb::Failure) -> tonic::Status {
    tonic::Status::with_details(code, "see details", failure.encode_to_vec().into())
}

/// The error as a gRPC status: the domain error in the details, whole; the code only for other tools.
pub(crate) fn status_of(error: &CallError) -> tonic::Status {
    let code = match error {
        CallError::NotLeader { .. } => tonic::Code::Unavailable,
        CallError::Refused(error) | CallError::Decided(error) => match error {
            MetadError::NoSuchVolume(_) | MetadError::NotFound(_) => tonic::Code::NotFound,
            MetadError::Held { .. } | MetadError::Fenced { .. } | MetadError::PolicyUnmet(_) => {
                tonic::Code::FailedPrecondition
            }
            MetadError::VersionConflict { .. } => tonic::Code::Aborted,
            MetadError::Exists(_) => tonic::Code::AlreadyExists,
            MetadError::Denied(_) => tonic::Code::PermissionDenied,
            MetadError::Token(_) => tonic::Code::Unauthenticated,
            MetadError::Invalid(_) => tonic::Code::InvalidArgument,
            MetadError::NoQuorum(_) | MetadError::Unreachable(_) => tonic::Code::Unavailable,
            MetadError::Unknown(_) => tonic::Code::Unknown,
            MetadError::TooOld { .. } => tonic::Code::OutOfRange,
            MetadError::Busy(_) => tonic::Code::ResourceExhausted,
        },
    };
    status_with(code, &failure_of(error))
}

/// The error in a status, if it is one of ours.
pub(crate) fn error_of(status: &tonic::Status) -> Option<CallError> {
    if status.details().is_empty() {
        return None;
    }
    let failure = pb::Failure::decode(status.details()).ok()?;
    match failure.kind? {
        pb::failure::Kind::NotLeader(hint) => Some(CallError::NotLeader {
            leader: hint.leader,
        }),
        pb::failure::Kind::Refused(error) => {
            let error = MetadError::from_wire(error).ok()?;
            Some(match failure.decided {
                true => CallError::Decided(error),
                false => CallError::Refused(error),
            })
        }
    }
}

fn shortened(error: &MetadError) -> MetadError {
    let mut error = error.clone();
    match &mut error {
        MetadError::NoSuchVolume(text)
        | MetadError::Held { holder: text, .. }
        | MetadError::PolicyUnmet(text)
        | MetadError::NotFound(text)
        | MetadError::Exists(text)
        | MetadError::Denied(text)
        | MetadError::Token(text)
        | MetadError::Invalid(text)
        | MetadError::NoQuorum(text)
        | MetadError::Unknown(text)
        | MetadError::Unreachable(text)
        | MetadError::Busy(text) => {
            if text.len() > ERROR_TEXT_BYTES_MAX {
                text.truncate(text.floor_char_boundary(ERROR_TEXT_BYTES_MAX));
            }
        }
        MetadError::Fenced { .. }
        | MetadError::VersionConflict { .. }
        | MetadError::TooOld { .. } => {}
    }
    error
}
