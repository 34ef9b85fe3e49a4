//! Buffers of large frames, used again: a fresh megabyte costs more in page faults than reading it from the page cache does
//! (measured: 0.37 CPU-seconds per GiB for the faults, 0.03 for a copy).

use bytes::Bytes;
use parking_lot::Mutex;

/// Smaller buffers come from the allocator, which keeps such; larger ones are rare.
const POOLED_BYTES: std::ops::RangeInclusive<usize> = (64 << 10)..=(2 << 20);
/// Buffers kept at most: 16 MiB of pieces.
const POOLED_MAX: usize = 16;

static POOL: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A buffer of this length; what is in it is arbitrary.
pub(super) fn take(bytes: usize) -> Buffer {
    let mut buffer = Vec::new();
    if POOLED_BYTES.contains(&bytes)
        && let Some(used) = POOL.lock().pop()
    {
        buffer = used;
    }
    if buffer.capacity() < bytes {
        // Zeroed by the kernel, not by us.
        buffer = vec![0; bytes];
    }
    buffer.resize(bytes, 0);
    Buffer(buffer)
}

pub(super) struct Buffer(Vec<u8>);

impl Buffer {
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// Goes back to the pool when the last view of it is dropped.
    pub(super) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if POOLED_BYTES.contains(&self.0.capacity()) {
            let mut pool = POOL.lock();
            if pool.len() < POOLED_MAX {
                pool.push(std::mem::take(&mut self.0));
            }
        }
    }
}
