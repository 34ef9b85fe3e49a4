//! Answers, and the bytes they become. Large values are never copied into a buffer.

use crate::engine::EngineError;
use bytes::{Buf, Bytes, BytesMut};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt::Write;
use std::io::IoSlice;

/// Values up to this size are copied into the buffer of small things.
const COPY_BYTES_MAX: usize = 16 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    Simple(Cow<'static, str>),
    Error(Cow<'static, str>),
    Integer(i64),
    Bulk(Bytes),
    Nil,
    Array(Vec<Reply>),
    /// An array of so many items, which follow as replies of their own.
    ArrayHeader(usize),
}

impl Reply {
    pub(super) fn ok() -> Self {
        Self::simple("OK")
    }

    pub(super) fn simple(text: impl Into<Cow<'static, str>>) -> Self {
        Self::Simple(text.into())
    }

    pub(super) fn error(text: &'static str) -> Self {
        Self::Error(Cow::Borrowed(text))
    }

    pub(super) fn bulk(text: impl AsRef<[u8]>) -> Self {
        Self::Bulk(Bytes::copy_from_slice(text.as_ref()))
    }

    pub(super) fn integer(number: u64) -> Self {
        Self::Integer(i64::try_from(number).unwrap_or(i64::MAX))
    }

    /// Does it say that the namespace of the connection was removed?
    pub(super) fn is_removal(&self) -> bool {
        matches!(self, Self::Error(text) if text == NAMESPACE_REMOVED)
    }

    /// Bytes it holds in memory.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Simple(text) | Self::Error(text) => text.len(),
            Self::Integer(_) | Self::Nil | Self::ArrayHeader(_) => 0,
            Self::Bulk(value) => value.len(),
            Self::Array(items) => items
                .iter()
                .map(|item| size_of::<Self>() + item.bytes())
                .sum(),
        }
    }
}

/// The words of the protocol for what the engine says.
pub(super) fn engine_error(error: &EngineError) -> Reply {
    let text = match error {
        EngineError::NoSpace => "No space left on this namespace",
        EngineError::KeyNotFound => "Key not found",
        EngineError::UpdateOnly => "Invalid key, only update authorized",
        EngineError::KeySize { bytes: 0 } => "Invalid argument, key needed",
        EngineError::KeySize { .. } => "Key too large",
        EngineError::ValueSize { .. } => "Payload too big",
        EngineError::Worm => "Namespace is protected by worm mode",
        EngineError::Locked => "Namespace is temporarily locked (read-only)",
        EngineError::Frozen => "Namespace is temporarily frozen (read-write disabled)",
        EngineError::Corrupt(_) => "Internal Error",
        EngineError::Gone { .. } => "Namespace directory is gone",
        EngineError::Stopped { .. } => "Cannot write data right now",
        EngineError::Closed => NAMESPACE_REMOVED,
        EngineError::InUseMode => "Cannot change mode of used namespace",
        EngineError::Exists(_) => "This namespace is not available",
        EngineError::UnknownNamespace(_) => "Namespace not found",
        EngineError::Name(_) => "This name is not allowed",
        EngineError::NotOffered => "Permission denied",
        EngineError::UnknownVersion { .. } => "Invalid arguments (invalid key)",
        EngineError::InUse { .. }
        | EngineError::SettingsLost { .. }
        | EngineError::Io { .. }
        | EngineError::Datafile(_) => INTERNAL,
    };
    if matches!(
        error,
        EngineError::Io { .. } | EngineError::Datafile(_) | EngineError::Gone { .. }
    ) {
        tracing::warn!(%error, "a command failed");
    }
    Reply::error(text)
}

pub(super) const INTERNAL: &str = "Unexpected Internal Error";

pub(super) const NAMESPACE_REMOVED: &str =
    "Your active namespace is not available anymore (probably removed).";

/// Bytes on their way out: small things joined, large values as they are.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    parts: VecDeque<Bytes>,
    small: BytesMut,
    bytes: usize,
}

impl Outgoing {
    pub(super) fn push(&mut self, reply: &Reply) {
        match reply {
            Reply::Simple(text) => self.line(b'+', text),
            Reply::Error(text) => self.line(b'-', text),
            Reply::Integer(number) => self.number(b':', *number),
            Reply::Nil => self.small.extend_from_slice(b"$-1\r\n"),
            Reply::ArrayHeader(count) => self.count(b'*', *count),
            Reply::Bulk(value) => {
                self.count(b'$', value.len());
                if value.len() <= COPY_BYTES_MAX {
                    self.small.extend_from_slice(value);
                } else {
                    self.seal();
                    self.bytes += value.len();
                    self.parts.push_back(value.clone());
                }
                self.small.extend_from_slice(b"\r\n");
            }
            Reply::Array(items) => {
                self.count(b'*', items.len());
                for item in items {
                    self.push(item);
                }
            }
        }
    }

    fn count(&mut self, kind: u8, count: usize) {
        self.number(kind, i64::try_from(count).unwrap_or(i64::MAX));
    }

    fn number(&mut self, kind: u8, number: i64) {
        // Writing to a buffer that grows does not fail.
        let _ = write!(self.small, "{}{number}\r\n", char::from(kind));
    }

    fn line(&mut self, kind: u8, text: &str) {
        self.small.extend_from_slice(&[kind]);
        self.small.extend_from_slice(text.as_bytes());
        self.small.extend_from_slice(b"\r\n");
    }

    /// The small things so far come before what follows.
    pub(super) fn seal(&mut self) {
        if !self.small.is_empty() {
            let part = self.small.split().freeze();
            self.bytes += part.len();
            self.parts.push_back(part);
        }
    }

    pub(super) fn pending_bytes(&self) -> usize {
        self.bytes + self.small.len()
    }
}

impl Buf for Outgoing {
    fn remaining(&self) -> usize {
        self.bytes
    }

    fn chunk(&self) -> &[u8] {
        self.parts.front().map_or(&[], |part| &part[..])
    }

    fn advance(&mut self, mut count: usize) {
        self.bytes -= count;
        while let Some(part) = self.parts.front_mut() {
            if count < part.len() {
                part.advance(count);
                return;
            }
            count -= part.len();
            self.parts.pop_front();
        }
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut filled = 0;
        for (slice, part) in slices.iter_mut().zip(&self.parts) {
            *slice = IoSlice::new(part);
            filled += 1;
        }
        filled
    }
}
