//! Commands about datafiles: INDEX and DATA.

use super::manage::blocking;
use super::reply::{INTERNAL, Reply};
use super::session::Session;
use crate::engine::{EngineError, Namespace, RawEntry};
use bytes::Bytes;
use std::sync::Arc;

/// In a datafile of 0-db the first entry stands here, and each takes so much beside key and value. Clients of DATA RAW count on that, so
/// offsets are counted like this here too, whatever our own format takes.
const FIRST_OFFSET: u64 = 28;
const ENTRY_BYTES: u64 = 18;
const SUBCOMMAND_BYTES_MAX: usize = 256;

/// An entry of a datafile: where 0-db would have it, and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    file: u32,
    counted: u64,
    actual: u64,
    /// Where the entry before stands, as counted; 0 for the first.
    previous: u64,
}

impl Place {
    fn first(file: u32) -> Self {
        Self {
            file,
            counted: FIRST_OFFSET,
            actual: 0,
            previous: 0,
        }
    }

    fn after(self, entry: &RawEntry) -> Self {
        Self {
            counted: self.counted + ENTRY_BYTES + (entry.key.len() + entry.value.len()) as u64,
            actual: entry.next_offset,
            previous: self.counted,
            ..self
        }
    }
}

enum Raw {
    Entry(RawEntry, Place),
    End,
    /// No entry begins there.
    Nowhere,
}

/// Go on from `place` to the entry at `counted`.
fn walk(namespace: &Namespace, mut place: Place, counted: u64) -> Result<Raw, EngineError> {
    loop {
        let Some(entry) = namespace.raw_entry(place.file, place.actual)? else {
            let is_end = counted == place.counted;
            return Ok(if is_end { Raw::End } else { Raw::Nowhere });
        };
        if place.counted == counted {
            return Ok(Raw::Entry(entry, place));
        }
        if place.counted > counted {
            return Ok(Raw::Nowhere);
        }
        place = place.after(&entry);
    }
}

/// DATA RAW file offset.
pub(super) async fn data(session: &mut Session, request: &[Bytes]) -> Result<Reply, Reply> {
    session.require_admin()?;
    if !subcommand(request)?.eq_ignore_ascii_case(b"RAW") {
        return Err(Reply::error("Unknown DATA subcommand"));
    }
    let [_, _, file, offset] = request else {
        return Err(Reply::error("Unexpected arguments"));
    };
    let invalid = || Reply::error("Invalid Request");
    let file = number(file).and_then(|file| u32::try_from(file).ok());
    let file = file.ok_or_else(invalid)?;
    let counted = number(offset).ok_or_else(invalid)?;
    let namespace = Arc::clone(session.thawed()?);
    let known = session.raw.take();
    let known = known.filter(|place| place.file == file && place.counted == counted);
    let place = known.unwrap_or(Place::first(file));
    let found = blocking(session, move |_| match walk(&namespace, place, counted) {
        // Bytes that do not verify are never shown.
        Err(EngineError::Datafile(_) | EngineError::Corrupt(_)) => Ok(None),
        found => found.map(Some),
    });
    match found.await? {
        Some(Raw::Entry(entry, place)) => {
            session.raw = Some(place.after(&entry));
            Ok(raw_reply(entry, place))
        }
        Some(Raw::End) => Err(Reply::error("EOF")),
        Some(Raw::Nowhere) => Err(invalid()),
        None => Err(Reply::error(INTERNAL)),
    }
}

fn raw_reply(entry: RawEntry, place: Place) -> Reply {
    Reply::Array(vec![
        Reply::Bulk(entry.key),
        Reply::integer(place.previous),
        Reply::bulk(format!("0x{:08x}", crc32c(&entry.value))),
        Reply::Integer(i64::from(entry.deleted)),
        Reply::integer(u64::from(entry.timestamp)),
        if entry.deleted {
            Reply::Nil
        } else {
            Reply::Bulk(entry.value)
        },
    ])
}

/// INDEX DIRTY [RESET]: the datafiles that were written to.
pub(super) fn index(session: &Session, request: &[Bytes]) -> Result<Reply, Reply> {
    session.require_admin()?;
    if !subcommand(request)?.eq_ignore_ascii_case(b"DIRTY") {
        return Err(Reply::error("Unknown INDEX subcommand"));
    }
    let namespace = session.current()?;
    let [_, _, more] = request else {
        let dirty = namespace.dirty_datafiles().into_iter();
        let dirty = dirty.map(|file| Reply::integer(u64::from(file)));
        return Ok(Reply::Array(dirty.collect()));
    };
    if more.len() > SUBCOMMAND_BYTES_MAX {
        return Err(Reply::error("Argument too long"));
    }
    if !more.eq_ignore_ascii_case(b"RESET") {
        return Err(Reply::error("Unknown INDEX DIRTY subcommand"));
    }
    namespace.reset_dirty_datafiles();
    Ok(Reply::ok())
}

/// The first argument of a command with subcommands; no argument may be empty.
fn subcommand(request: &[Bytes]) -> Result<&Bytes, Reply> {
    let [_, subcommand, ..] = request else {
        return Err(Reply::error("Missing arguments"));
    };
    if request.iter().any(Bytes::is_empty) {
        return Err(Reply::error("Invalid argument"));
    }
    if subcommand.len() > SUBCOMMAND_BYTES_MAX {
        return Err(Reply::error("Argument too long"));
    }
    Ok(subcommand)
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The checksum of values that 0-db shows: CRC-32C, beginning with 0 and not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0_u32;
        while byte < 256 {
            let mut crc = byte;
            let mut bit = 0;
            while bit < 8 {
                let out = crc & 1;
                crc >>= 1;
                if out == 1 {
                    crc ^= 0x82F6_3B78;
                }
                bit += 1;
            }
            table[byte as usize] = crc;
            byte += 1;
        }
        table
    };
    bytes.iter().fold(0, |crc, byte| {
        (crc >> 8) ^ TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize]
    })
}

#[cfg(test)]
mod tests {
    use super::crc32c;

    #[test]
    fn the_checksum_is_that_of_the_original() {
        // The published check value of CRC-32C is for the usual beginning (all ones) and end (inverted).
        let mut bytes = *b"123456789";
        for byte in bytes.iter_mut().take(4) {
            *byte ^= 0xff;
        }
        assert_eq!(crc32c(&bytes) ^ 0xffff_ffff, 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
    }
}
