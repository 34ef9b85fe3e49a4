//! Buffers of large values that arrive, used again: the page faults of a fresh megabyte cost more than receiving it does.

use bytes::{Buf, Bytes, BytesMut};
use parking_lot::Mutex;

/// Smaller values come out of what is read at once; larger ones are rare.
const POOLED_BYTES: std::ops::RangeInclusive<usize> = (512 << 10)..=(2 << 20);
/// Buffers kept at most: 16 MiB of pieces.
const POOLED_MAX: usize = 16;

static POOL: Pool = Pool(Mutex::new(Vec::new()));

struct Pool(Mutex<Vec<BytesMut>>);

/// An empty buffer with room for so many bytes, which begin at an address that is `residue` modulo 8.
pub(super) fn take(bytes: usize, residue: usize) -> BytesMut {
    POOL.take(bytes, residue)
}

/// A value that has arrived whole; its buffer is used again once nobody needs it any more.
pub(super) fn whole(value: BytesMut) -> Bytes {
    POOL.whole(value)
}

impl Pool {
    fn take(&self, bytes: usize, residue: usize) -> BytesMut {
        let used = POOLED_BYTES.contains(&bytes).then(|| self.0.lock().pop());
        let mut buffer = used.flatten().unwrap_or_default();
        // Of the same memory, unless that is too small or what followed the value is still needed.
        buffer.reserve(bytes + 7);
        let skipped = residue.wrapping_sub(buffer.as_ptr().addr()) % 8;
        buffer.resize(skipped, 0);
        buffer.advance(skipped);
        buffer
    }

    fn whole(&'static self, value: BytesMut) -> Bytes {
        if !POOLED_BYTES.contains(&value.len()) {
            return value.freeze();
        }
        Bytes::from_owner(Used {
            buffer: value,
            pool: self,
        })
    }
}

struct Used {
    buffer: BytesMut,
    pool: &'static Pool,
}

impl AsRef<[u8]> for Used {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        let mut pool = self.pool.0.lock();
        if pool.len() < POOLED_MAX {
            pool.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{POOLED_MAX, Pool};
    use bytes::{BufMut, Bytes};
    use parking_lot::Mutex;

    const VALUE_BYTES: usize = 1 << 20;
    const RESIDUE: usize = 5;

    /// As a connection does: the value, and behind it what belongs to the next argument.
    fn receive(pool: &'static Pool, byte: u8) -> Bytes {
        let mut buffer = pool.take(VALUE_BYTES + 2, RESIDUE);
        assert!(buffer.is_empty() && buffer.capacity() >= VALUE_BYTES + 2);
        assert_eq!(buffer.as_ptr().addr() % 8, RESIDUE);
        buffer.put_bytes(byte, VALUE_BYTES);
        buffer.put_slice(b"\r\n");
        let value = pool.whole(buffer.split_to(VALUE_BYTES));
        assert_eq!(&buffer[..], b"\r\n");
        value
    }

    #[test]
    fn memory_is_used_again_once_nobody_needs_it_and_not_before() {
        static POOL: Pool = Pool(Mutex::new(Vec::new()));
        let first = receive(&POOL, 1);
        let place = first.as_ptr();
        let part = first.slice(5..9);
        drop(first);
        let second = receive(&POOL, 2);
        assert_ne!(second.as_ptr(), place);
        assert_eq!(&part[..], [1; 4]);
        drop(part);
        let third = receive(&POOL, 3);
        assert_eq!(third.as_ptr(), place);
        assert!(second.iter().all(|&byte| byte == 2));
        assert!(third.iter().all(|&byte| byte == 3));
    }

    #[test]
    fn no_more_is_kept_than_is_allowed() {
        static POOL: Pool = Pool(Mutex::new(Vec::new()));
        let values: Vec<Bytes> = (0..40).map(|byte| receive(&POOL, byte)).collect();
        assert!(
            values
                .iter()
                .zip(0..)
                .all(|(value, byte)| value[77] == byte)
        );
        drop(values);
        assert_eq!(POOL.0.lock().len(), POOLED_MAX);
        // What is small is not kept for it.
        let small = POOL.take(100, RESIDUE);
        assert!(small.capacity() < VALUE_BYTES);
        drop(POOL.whole(small));
        assert_eq!(POOL.0.lock().len(), POOLED_MAX);
    }
}
