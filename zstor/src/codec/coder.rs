//! Reed-Solomon over GF(2^8): parity from data, and any shard from any `k` others.
//!
//! The code is systematic: shard `i < k` is data, shard `k + j` is row `j` of a Vandermonde matrix made systematic (polynomial
//! 0x11d), as `reed-solomon-erasure` makes it. Slices are worked on in strips that fit the processor's cache.
//!
//! Source: J. S. Plank, "A Tutorial on Reed-Solomon Coding for Fault-Tolerance in RAID-like Systems", with its 2003 correction.

use crate::policy::Geometry;
use reed_solomon_erasure::galois_8::{self, ReedSolomon};

/// Bytes of every shard worked on at a time.
const STRIP_BYTES: usize = 64 << 10;

/// Why shards cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CoderError {
    /// Fewer than `k` shards.
    #[error("{got} shards are present, {want} are needed")]
    TooFew {
        /// Distinct shards present.
        got: usize,
        /// `k`.
        want: usize,
    },
    /// A shard index is not of this geometry.
    #[error("no shard {0} in this geometry")]
    NoSuchShard(usize),
    /// Shards of one row must have one length.
    #[error("shard {shard} has {got} bytes where the first has {want}")]
    Length {
        /// Index.
        shard: usize,
        /// Its length.
        got: usize,
        /// Length of the first.
        want: usize,
    },
}

/// The processor lacks instructions that this build of the Reed-Solomon code was compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this processor has no AVX2, which the erasure code of this build needs; build with RUST_REED_SOLOMON_ERASURE_ARCH=x86-64"
)]
pub struct UnsupportedCpu;

/// To be called once at the start of a program that will encode: an error is better than an illegal instruction.
pub fn check_cpu() -> Result<(), UnsupportedCpu> {
    #[cfg(target_arch = "x86_64")]
    if !(std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("bmi2"))
    {
        return Err(UnsupportedCpu);
    }
    Ok(())
}

/// The erasure code of one geometry. Cheap to share: all methods take `&self`.
pub struct StripeCoder {
    geometry: Geometry,
    /// `k + m` rows of `k` coefficients: identity, then parity.
    matrix: Vec<Vec<u8>>,
}

impl StripeCoder {
    /// Computes the code's matrix.
    pub fn new(geometry: Geometry) -> Self {
        let (k, m) = (geometry.data(), geometry.parity());
        let code = ReedSolomon::new(k, m).expect("geometry is valid by construction");
        let mut matrix = vec![vec![0; k]; k + m];
        // The library keeps its matrix to itself; the parity of unit vectors tells it.
        for column in 0..k {
            let unit: Vec<[u8; 1]> = (0..k).map(|row| [u8::from(row == column)]).collect();
            let mut parity = vec![[0; 1]; m];
            code.encode_sep(&unit, &mut parity)
                .expect("k data and m parity slices of one byte");
            for (row, byte) in matrix.iter_mut().zip(unit.iter().chain(&parity)) {
                row[column] = byte[0];
            }
        }
        Self { geometry, matrix }
    }

    /// The geometry.
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Fills the `m` parity slices from the `k` data slices, all of one length. Panics if they are not.
    pub fn parity<D: AsRef<[u8]>, P: AsMut<[u8]>>(&self, data: &[D], parity: &mut [P]) {
        let k = self.geometry.data();
        assert_eq!(
            (data.len(), parity.len()),
            (k, self.geometry.parity()),
            "slices"
        );
        let inputs: Vec<&[u8]> = data.iter().map(AsRef::as_ref).collect();
        let mut outputs: Vec<&mut [u8]> = parity.iter_mut().map(AsMut::as_mut).collect();
        let rows: Vec<&[u8]> = self.matrix[k..].iter().map(Vec::as_slice).collect();
        multiply(&rows, &inputs, &mut outputs);
    }

    /// The wanted shards, in that order, from those present (index, bytes), at least `k` of them and all of one
    /// length. A wanted shard that is present is copied.
    pub fn reconstruct(
        &self,
        present: &[(usize, &[u8])],
        wanted: &[usize],
    ) -> Result<Vec<Vec<u8>>, CoderError> {
        let bytes = present.first().map_or(0, |(_, slice)| slice.len());
        let mut made: Vec<Vec<u8>> = wanted.iter().map(|_| vec![0; bytes]).collect();
        self.reconstruct_into(present, wanted, &mut made)?;
        Ok(made)
    }

    /// Like [`StripeCoder::reconstruct`], into buffers of the caller that have the shards' length.
    pub fn reconstruct_into<P: AsMut<[u8]>>(
        &self,
        present: &[(usize, &[u8])],
        wanted: &[usize],
        made: &mut [P],
    ) -> Result<(), CoderError> {
        assert_eq!(wanted.len(), made.len(), "one buffer per wanted shard");
        self.check(present, wanted)?;
        let mut outputs: Vec<&mut [u8]> = made.iter_mut().map(AsMut::as_mut).collect();
        if let Some(copies) = copies(present, wanted) {
            for (output, input) in outputs.iter_mut().zip(copies) {
                output.copy_from_slice(input);
            }
            return Ok(());
        }
        let k = self.geometry.data();
        let mut sources: Vec<(usize, &[u8])> = Vec::with_capacity(k);
        for (shard, slice) in present {
            if sources.len() < k && sources.iter().all(|(known, _)| known != shard) {
                sources.push((*shard, slice));
            }
        }
        if sources.len() < k {
            return Err(CoderError::TooFew {
                got: sources.len(),
                want: k,
            });
        }
        let inverse = invert(
            sources
                .iter()
                .map(|(shard, _)| self.matrix[*shard].clone())
                .collect(),
        );
        let rows: Vec<Vec<u8>> = wanted
            .iter()
            .map(|shard| row_times(&self.matrix[*shard], &inverse))
            .collect();
        let rows: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
        let inputs: Vec<&[u8]> = sources.iter().map(|(_, slice)| *slice).collect();
        multiply(&rows, &inputs, &mut outputs);
        Ok(())
    }

    fn check(&self, present: &[(usize, &[u8])], wanted: &[usize]) -> Result<(), CoderError> {
        let total = self.geometry.total();
        let indices = present.iter().map(|(shard, _)| shard).chain(wanted);
        if let Some(shard) = indices.into_iter().find(|shard| **shard >= total) {
            return Err(CoderError::NoSuchShard(*shard));
        }
        let want = present.first().map_or(0, |(_, slice)| slice.len());
        match present.iter().find(|(_, slice)| slice.len() != want) {
            Some((shard, slice)) => Err(CoderError::Length {
                shard: *shard,
                got: slice.len(),
                want,
            }),
            None => Ok(()),
        }
    }
}

/// The wanted slices when all of them are present.
fn copies<'a>(present: &[(usize, &'a [u8])], wanted: &[usize]) -> Option<Vec<&'a [u8]>> {
    let find = |shard: &usize| {
        present
            .iter()
            .find(|(index, _)| index == shard)
            .map(|(_, slice)| *slice)
    };
    wanted.iter().map(find).collect()
}

/// `outputs[r] = sum over i of rows[r][i] * inputs[i]`, strip by strip.
fn multiply(rows: &[&[u8]], inputs: &[&[u8]], outputs: &mut [&mut [u8]]) {
    let bytes = inputs.first().map_or(0, |input| input.len());
    let mut start = 0;
    while start < bytes {
        let strip = start..bytes.min(start + STRIP_BYTES);
        for (column, input) in inputs.iter().enumerate() {
            let input = &input[strip.clone()];
            for (row, output) in rows.iter().zip(outputs.iter_mut()) {
                let output = &mut output[strip.clone()];
                if column == 0 {
                    galois_8::mul_slice(row[column], input, output);
                } else {
                    galois_8::mul_slice_xor(row[column], input, output);
                }
            }
        }
        start = strip.end;
    }
}

/// `row * matrix`.
fn row_times(row: &[u8], matrix: &[Vec<u8>]) -> Vec<u8> {
    let cell = |column: usize| {
        row.iter()
            .zip(matrix)
            .fold(0, |sum, (a, other)| sum ^ galois_8::mul(*a, other[column]))
    };
    (0..row.len()).map(cell).collect()
}

/// Gauss-Jordan. Any `k` rows of the code's matrix are independent, so there is always an inverse.
fn invert(mut matrix: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let size = matrix.len();
    let mut inverse: Vec<Vec<u8>> = (0..size)
        .map(|row| (0..size).map(|column| u8::from(row == column)).collect())
        .collect();
    for pivot in 0..size {
        let row = (pivot..size)
            .find(|row| matrix[*row][pivot] != 0)
            .expect("any k rows of the code's matrix are independent");
        matrix.swap(pivot, row);
        inverse.swap(pivot, row);
        let scale = galois_8::div(1, matrix[pivot][pivot]);
        for cell in matrix[pivot].iter_mut().chain(inverse[pivot].iter_mut()) {
            *cell = galois_8::mul(*cell, scale);
        }
        let (pivot_row, pivot_inverse) = (matrix[pivot].clone(), inverse[pivot].clone());
        for row in (0..size).filter(|row| *row != pivot) {
            let factor = matrix[row][pivot];
            for column in 0..size {
                matrix[row][column] ^= galois_8::mul(factor, pivot_row[column]);
                inverse[row][column] ^= galois_8::mul(factor, pivot_inverse[column]);
            }
        }
    }
    inverse
}
