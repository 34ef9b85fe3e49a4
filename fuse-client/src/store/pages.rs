//! Page checksums of data datafiles: CRC-32 per 4 KiB page, so that local rot is found at every read.
//!
//! While a datafile is appended to, its sums live in memory. At seal they are written beside it, durable before the
//! rename that makes the file `.sealed`:
//!
//! ```text
//! 0       8        16            24                24+4n   28+4n
//! +-------+--------+-------------+-----------------+-------+
//! | magic | bytes  | pages = n   | crc32 x n       | crc32 |   little-endian; last = CRC of all before
//! +-------+--------+-------------+-----------------+-------+
//! ```

use crc32fast::Hasher;

/// Bytes covered by one checksum.
pub const PAGE_BYTES: usize = 4096;

/// First bytes of a side file; the digit is the version.
const MAGIC: &[u8; 8] = b"QSFSPAG1";
const HEAD_BYTES: usize = 24;

/// Why a side file is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageSumsError {
    /// Shorter than its own header says.
    #[error("page checksum file is truncated")]
    Truncated,
    /// Another kind of file, or a newer version.
    #[error("not a page checksum file of version 1")]
    Magic,
    /// Its own checksum does not match.
    #[error("page checksum file is damaged")]
    Damaged,
}

/// Checksums of the pages of one datafile that only grows.
#[derive(Debug, Clone, Default)]
pub struct PageSums {
    full: Vec<u32>,
    tail: Hasher,
    bytes: u64,
}

impl PageSums {
    /// Of an empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Length of the file in bytes.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Accounts for `data` appended at the end.
    pub fn append(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let used = self.tail_bytes();
            let take = data.len().min(PAGE_BYTES - used);
            let (now, rest) = data.split_at(take);
            self.tail.update(now);
            self.bytes += take as u64;
            if used + take == PAGE_BYTES {
                self.full
                    .push(std::mem::replace(&mut self.tail, Hasher::new()).finalize());
            }
            data = rest;
        }
    }

    /// Checksum of a page as far as it is written; `None` past the end.
    pub fn page(&self, page: usize) -> Option<u32> {
        if page < self.full.len() {
            return Some(self.full[page]);
        }
        (page == self.full.len() && self.tail_bytes() > 0).then(|| self.tail.clone().finalize())
    }

    /// All checksums, the partial last page included.
    pub fn to_vec(&self) -> Vec<u32> {
        let mut all = self.full.clone();
        all.extend(self.page(self.full.len()));
        all
    }

    fn tail_bytes(&self) -> usize {
        // Less than one page by construction.
        usize::try_from(self.bytes % PAGE_BYTES as u64).unwrap_or(0)
    }
}

/// The side file of a sealed datafile.
pub fn encode(bytes: u64, sums: &[u32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEAD_BYTES + 4 * sums.len() + 4);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&bytes.to_le_bytes());
    out.extend_from_slice(&(sums.len() as u64).to_le_bytes());
    for sum in sums {
        out.extend_from_slice(&sum.to_le_bytes());
    }
    out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
    out
}

/// Reads a side file: bytes of the datafile and its page checksums.
pub fn decode(raw: &[u8]) -> Result<(u64, Vec<u32>), PageSumsError> {
    if raw.len() < HEAD_BYTES + 4 {
        return Err(PageSumsError::Truncated);
    }
    if &raw[..8] != MAGIC {
        return Err(PageSumsError::Magic);
    }
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&raw[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let (bytes, pages) = (word(8), word(16));
    if pages != bytes.div_ceil(PAGE_BYTES as u64) {
        return Err(PageSumsError::Damaged);
    }
    let body = raw.len() - 4;
    if (HEAD_BYTES as u64).checked_add(pages.saturating_mul(4)) != Some(body as u64) {
        return Err(PageSumsError::Truncated);
    }
    let quad = |chunk: &[u8]| u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
    if crc32fast::hash(&raw[..body]) != quad(&raw[body..]) {
        return Err(PageSumsError::Damaged);
    }
    Ok((
        bytes,
        raw[HEAD_BYTES..body].chunks_exact(4).map(quad).collect(),
    ))
}

/// First byte (relative to `data`) of the first page that does not verify. `data` starts at page `first` and ends at
/// a page boundary or at the end of what `sums` cover.
pub fn first_bad_page(data: &[u8], sums: &[u32]) -> Option<usize> {
    data.chunks(PAGE_BYTES)
        .zip(sums)
        .position(|(page, sum)| crc32fast::hash(page) != *sum)
        .map(|page| page * PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    fn naive(data: &[u8]) -> Vec<u32> {
        data.chunks(PAGE_BYTES).map(crc32fast::hash).collect()
    }

    proptest! {
        #[test]
        fn appended_in_any_cuts_the_sums_are_those_of_the_whole(
            data in proptest::collection::vec(any::<u8>(), 0..3 * PAGE_BYTES),
            cuts in proptest::collection::vec(0_usize..3 * PAGE_BYTES, 0..8),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(data.len())).collect();
            cuts.extend([0, data.len()]);
            cuts.sort_unstable();
            let mut sums = PageSums::new();
            for pair in cuts.windows(2) {
                sums.append(&data[pair[0]..pair[1]]);
                prop_assert_eq!(sums.to_vec(), naive(&data[..pair[1]]));
            }
            prop_assert_eq!(first_bad_page(&data, &sums.to_vec()), None);
            let raw = encode(sums.bytes(), &sums.to_vec());
            prop_assert_eq!(decode(&raw).unwrap(), (data.len() as u64, naive(&data)));
        }

        #[test]
        fn any_flipped_or_missing_byte_of_the_side_file_is_refused(at in any::<prop::sample::Index>()) {
            let raw = encode(10_000, &naive(&vec![7; 10_000]));
            let at = at.index(raw.len());
            let mut flipped = raw.clone();
            flipped[at] ^= 0x10;
            prop_assert!(decode(&flipped).is_err());
            prop_assert!(decode(&raw[..at]).is_err());
        }
    }

    #[test]
    fn a_flipped_bit_is_found_in_its_page() {
        let mut data = vec![3; 2 * PAGE_BYTES + 10];
        let sums = naive(&data);
        data[PAGE_BYTES + 5] ^= 1;
        assert_eq!(first_bad_page(&data, &sums), Some(PAGE_BYTES));
    }
}
