//! What comes from clients: requests and cursors.

use crate::cursor;
use crate::parser::Parser;
use bytes::BytesMut;

/// Feed bytes to the frame parser in pieces of `step`; the requests that came out. Checks that it keeps its limits.
fn parse(bytes: &[u8], step: usize) -> Vec<Vec<bytes::Bytes>> {
    let (mut parser, mut buffer) = (Parser::default(), BytesMut::new());
    let mut requests = Vec::new();
    for part in bytes.chunks(step.max(1)) {
        buffer.extend_from_slice(part);
        loop {
            match parser.next(&mut buffer) {
                Ok(Some(request)) => {
                    assert!((1..=1024).contains(&request.len()));
                    requests.push(request);
                }
                Ok(None) => break,
                Err(malformed) if malformed.close => return requests,
                Err(_) => {}
            }
        }
        assert!(parser.announced_bytes() <= 9 << 20, "announced too much");
        assert!(
            parser.wanted_bytes(&buffer) <= (8 << 20) + 2,
            "wants too much"
        );
    }
    requests
}

/// Requests are the same however the bytes are cut.
pub fn parse_requests(bytes: &[u8]) {
    let Some((step, bytes)) = bytes.split_first() else {
        return;
    };
    let whole = parse(bytes, bytes.len());
    assert_eq!(parse(bytes, usize::from(*step)), whole);
}

/// Only the cursors that are given out are taken.
pub fn decode_cursor(bytes: &[u8]) {
    if let Some(position) = cursor::decode(bytes) {
        assert_eq!(&cursor::encode(position)[..], bytes);
    }
}
