//! Requests out of bytes: arrays of bulk strings, limits first.

use super::buffers;
use bytes::{Buf, Bytes, BytesMut};

/// Arguments of a request, the command included.
const ARGUMENTS_MAX: usize = 1024;
/// The largest bulk string.
const BULK_BYTES_MAX: usize = 8 << 20;
/// All bulk strings of a request together: the largest value, and room for names.
const REQUEST_BYTES_MAX: usize = BULK_BYTES_MAX + (512 << 10);
/// A header line, its end included.
const LINE_BYTES_MAX: usize = 32;

/// Bytes that are no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed {
    /// The error to answer.
    pub(super) text: &'static str,
    /// The rest of the stream cannot be understood.
    pub(super) close: bool,
}

const fn fatal(text: &'static str) -> Malformed {
    Malformed { text, close: true }
}

/// A request that has begun.
#[derive(Debug, Default)]
pub(super) struct Parser {
    /// Arguments still to come; `None` between requests.
    missing: Option<usize>,
    /// Length of the bulk string whose header was read.
    bulk: Option<usize>,
    arguments: Vec<Bytes>,
    /// Bytes of the bulk strings announced so far.
    request_bytes: usize,
    /// A limit on `request_bytes` for clients that have not been let in.
    pub(super) request_bytes_max: Option<usize>,
}

impl Parser {
    /// The next whole request, if there is one.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Vec<Bytes>>, Malformed> {
        let missing = match self.missing {
            Some(missing) => missing,
            None => match self.array_header(buffer)? {
                Some(missing) => missing,
                None => return Ok(None),
            },
        };
        for _ in 0..missing {
            if !self.argument(buffer)? {
                return Ok(None);
            }
        }
        self.missing = None;
        self.request_bytes = 0;
        Ok(Some(std::mem::take(&mut self.arguments)))
    }

    /// Is a request half read?
    pub(super) fn is_inside(&self) -> bool {
        self.missing.is_some()
    }

    /// Bytes of the request being read that were announced.
    pub(super) fn announced_bytes(&self) -> usize {
        self.request_bytes
    }

    /// The argument behind the command, if it is here.
    pub(super) fn key(&self) -> Option<&Bytes> {
        self.arguments.get(1)
    }

    /// Bytes that must arrive before the next step.
    pub(super) fn wanted_bytes(&self, buffer: &BytesMut) -> usize {
        match self.bulk {
            Some(length) => (length + 2).saturating_sub(buffer.len()),
            None => 1,
        }
    }

    fn array_header(&mut self, buffer: &mut BytesMut) -> Result<Option<usize>, Malformed> {
        match buffer.first() {
            None => return Ok(None),
            Some(b'*') => {}
            Some(_) => return Err(fatal("Malformed request, array expected")),
        }
        let Some(count) = header_number(buffer)? else {
            return Ok(None);
        };
        match usize::try_from(count) {
            Err(_) => Err(fatal("Internal memory error")),
            Ok(0) => Err(Malformed {
                text: "Missing arguments",
                close: false,
            }),
            Ok(count) if count > ARGUMENTS_MAX => Err(fatal("Too many arguments")),
            Ok(count) => {
                self.missing = Some(count);
                Ok(Some(count))
            }
        }
    }

    /// Read one argument; `false` if its bytes are not all there.
    fn argument(&mut self, buffer: &mut BytesMut) -> Result<bool, Malformed> {
        let length = match self.bulk {
            Some(length) => length,
            None => match self.bulk_header(buffer)? {
                Some(length) => length,
                None => return Ok(false),
            },
        };
        if buffer.len() < length + 2 {
            return Ok(false);
        }
        self.arguments.push(buffers::whole(buffer.split_to(length)));
        // As the original does, without looking at the two bytes.
        buffer.advance(2);
        self.bulk = None;
        self.missing = self.missing.map(|missing| missing - 1);
        Ok(true)
    }

    fn bulk_header(&mut self, buffer: &mut BytesMut) -> Result<Option<usize>, Malformed> {
        match buffer.first() {
            None => return Ok(None),
            Some(b'$') => {}
            Some(_) => return Err(fatal("Malformed query string")),
        }
        let Some(length) = header_number(buffer)? else {
            return Ok(None);
        };
        let length = usize::try_from(length).map_err(|_| fatal("Malformed query string"))?;
        self.request_bytes += length;
        let most = self.request_bytes_max.unwrap_or(REQUEST_BYTES_MAX);
        if length > BULK_BYTES_MAX || self.request_bytes > most {
            return Err(fatal("Payload too big"));
        }
        self.bulk = Some(length);
        Ok(Some(length))
    }
}

/// The number in a header line, which is consumed; `None` if the line's end is not there yet.
fn header_number(buffer: &mut BytesMut) -> Result<Option<i64>, Malformed> {
    let looked_at = &buffer[..buffer.len().min(LINE_BYTES_MAX)];
    let Some(end) = looked_at.iter().position(|&byte| byte == b'\n') else {
        return if buffer.len() >= LINE_BYTES_MAX {
            Err(fatal("Malformed query string"))
        } else {
            Ok(None)
        };
    };
    let line = &looked_at[1..end];
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let number = std::str::from_utf8(line)
        .ok()
        .and_then(|text| text.parse().ok());
    let number = number.ok_or(fatal("Malformed query string"))?;
    buffer.advance(end + 1);
    Ok(Some(number))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::{Malformed, Parser};
    use bytes::{Bytes, BytesMut};
    use proptest::prelude::{any, prop, proptest};

    fn feed(bytes: &[u8], step: usize) -> Result<Vec<Vec<Bytes>>, Malformed> {
        let (mut parser, mut buffer) = (Parser::default(), BytesMut::new());
        let mut requests = Vec::new();
        for part in bytes.chunks(step) {
            buffer.extend_from_slice(part);
            while let Some(request) = parser.next(&mut buffer)? {
                requests.push(request);
            }
        }
        Ok(requests)
    }

    proptest! {
        #[test]
        fn requests_come_out_however_the_bytes_are_cut(
            requests in prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..5), 0..6),
            step in 1..50_usize,
        ) {
            let mut bytes = Vec::new();
            for request in &requests {
                bytes.extend_from_slice(format!("*{}\r\n", request.len()).as_bytes());
                for argument in request {
                    bytes.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
                    bytes.extend_from_slice(argument);
                    bytes.extend_from_slice(b"\r\n");
                }
            }
            assert_eq!(feed(&bytes, step).unwrap(), requests);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), step in 1..50_usize) {
            let _ = feed(&bytes, step);
            let mut prefixed = b"*2\r\n$3\r\nGET\r\n".to_vec();
            prefixed.extend_from_slice(&bytes);
            let _ = feed(&prefixed, step);
        }
    }

    #[test]
    fn limits_are_kept_before_bytes_are_taken() {
        let refused = |bytes: &[u8]| feed(bytes, 64).unwrap_err();
        assert_eq!(
            refused(b"PING\r\n").text,
            "Malformed request, array expected"
        );
        assert_eq!(refused(b"*1025\r\n").text, "Too many arguments");
        assert_eq!(refused(b"*1\r\n$8388609\r\n").text, "Payload too big");
        assert_eq!(refused(b"*2\r\n$-1\r\n").text, "Malformed query string");
        assert_eq!(refused(b"*1\r\n:5\r\n").text, "Malformed query string");
        assert_eq!(refused(b"*-1\r\n").text, "Internal memory error");
        assert!(!refused(b"*0\r\n").close);
        assert!(refused(b"*99999999999999999999999999999999999").close);
    }
}
