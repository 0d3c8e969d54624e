//! Codes to numbers of `bf16`, 128 of them a step, in vectors.
//!
//! A step is 64 bytes of codes of one row. Shifted right by nibble after nibble, the low bits of
//! its 16-bit lanes are the indices of a look-up of 32 numbers: the sixteen values by the scale of
//! the first 64 columns, and by that of the second. So what comes out is rounded once, as
//! [`crate::blockwise::dequantize`] rounds it (but for numbers below 1.2e-38, which become zero).
//!
//! Floor: two ports take 3 shifts, 4 masks, 4 look-ups, 2 multiplications and a conversion, which
//! keeps both for 2 cycles: 8.5 cycles, and the same in C took 12. Seen in forward products, with
//! what is asked for ahead: 14 (4.0 ns) from the second-level cache, on a Sapphire Rapids or later at
//! 3.5 GHz.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use crate::matmul::matrix::PackedMatrix;

/// Columns of a step.
pub(super) const STEP: usize = 128;
/// Vectors of a step, each of 32 numbers.
pub(super) const VECTORS: usize = STEP / 32;

/// Vector `v` has in lane `l` column `4 * l + (v ^ 1)` of the step: of a byte's two codes, the
/// even one is in the high nibble.
pub(super) const fn column_in_four(vector: usize) -> usize {
    vector ^ 1
}

/// Some rows of a weight, with their scales.
pub(super) struct Rows<'a> {
    codes: &'a [u8],
    scales: &'a [f32],
    /// Of a row.
    bytes: usize,
    blocks: usize,
    block_size: usize,
    block_bits: u32,
    values: __m512,
}

impl<'a> Rows<'a> {
    /// Rows from `first` on, `count` of them; `scales` begins with the first row's.
    ///
    /// # Safety
    /// The backend has tiles.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn new(
        matrix: &PackedMatrix<'a>,
        scales: &'a [f32],
        first: usize,
        count: usize,
    ) -> Self {
        let (bytes, block_size) = (matrix.in_features / 2, matrix.block_size.get());
        let blocks = matrix.in_features / block_size;
        Self {
            codes: &matrix.packed[first * bytes..(first + count) * bytes],
            scales: &scales[..count * blocks],
            bytes,
            blocks,
            block_size,
            block_bits: block_size.trailing_zeros(),
            // SAFETY: there are 256 values.
            values: unsafe { _mm512_loadu_ps(matrix.codebook.values().as_ptr()) },
        }
    }

    /// Whether blocks are of 32 columns, so that a step takes four scales.
    pub(super) fn has_small_blocks(&self) -> bool {
        self.block_size < STEP / 2
    }

    /// Steps of a row.
    pub(super) fn steps(&self) -> usize {
        self.bytes.div_ceil(STEP / 2)
    }

    /// How many rows there are.
    pub(super) fn count(&self) -> usize {
        self.codes.len() / self.bytes
    }

    /// One step of `count` rows from `first` on, one after the other, as [`Rows::step`] gives it;
    /// what hangs on the step alone is worked out once.
    ///
    /// # Safety
    /// As for [`Rows::step`], for all rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn each_row<const SMALL: bool>(
        &self,
        first: usize,
        count: usize,
        step: usize,
        mut take: impl FnMut(usize, [__m512i; VECTORS]),
    ) {
        let start = step * STEP / 2;
        if start + STEP / 2 > self.bytes {
            for place in 0..count {
                // SAFETY: the caller's promise.
                take(place, unsafe { self.step::<SMALL>(first + place, step) });
            }
            return;
        }
        let block = first * self.blocks + ((step * STEP) >> self.block_bits);
        let mut at = self.codes[first * self.bytes + start..].as_ptr();
        let mut scales = self.scales[block..].as_ptr();
        let quarter = (STEP / 4) >> self.block_bits;
        let half = (STEP / 2) >> self.block_bits;
        for place in 0..count {
            // SAFETY: the row's codes are there, 64 bytes from the step's first on, and its scales.
            unsafe {
                let scale = |column: usize| match column {
                    0 => *scales,
                    32 => *scales.add(quarter),
                    64 => *scales.add(half),
                    _ => *scales.add(half + quarter),
                };
                take(
                    place,
                    self.look_up::<SMALL>(_mm512_loadu_si512(at.cast()), scale),
                );
            }
            at = at.wrapping_add(self.bytes);
            scales = scales.wrapping_add(self.blocks);
        }
    }

    /// The columns of one step of one row; behind the last column are numbers that are finite if
    /// the row's are.
    ///
    /// # Safety
    /// The backend has tiles; there is such a row and such a step; `SMALL` is
    /// [`Rows::has_small_blocks`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn step<const SMALL: bool>(
        &self,
        row: usize,
        step: usize,
    ) -> [__m512i; VECTORS] {
        let (start, first) = (step * STEP / 2, (step * STEP) >> self.block_bits);
        // SAFETY: the row's codes from `start` on are there, 64 bytes or what is left of it, and
        // the row's scales, of which none behind the last is read.
        unsafe {
            let at = self.codes.as_ptr().add(row * self.bytes + start);
            let scales = self.scales.as_ptr().add(row * self.blocks + first);
            if start + STEP / 2 <= self.bytes {
                let scale = |column: usize| *scales.add(column >> self.block_bits);
                return self.look_up::<SMALL>(_mm512_loadu_si512(at.cast()), scale);
            }
            let left = self.bytes - start;
            let last = self.blocks - 1 - first;
            let scale = |column: usize| *scales.add((column >> self.block_bits).min(last));
            self.look_up::<SMALL>(_mm512_maskz_loadu_epi8((1 << left) - 1, at.cast()), scale)
        }
    }

    /// The numbers of 128 codes; `scale` is that of a column of them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn look_up<const SMALL: bool>(
        &self,
        codes: __m512i,
        scale: impl Fn(usize) -> f32,
    ) -> [__m512i; VECTORS] {
        let table = |first, second| {
            let [first, second] = [first, second]
                .map(|column| _mm512_mul_ps(self.values, _mm512_set1_ps(scale(column))));
            // SAFETY: both are 64 bytes of any bits.
            unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first)) }
        };
        let shifted = [
            codes,
            _mm512_srli_epi16::<4>(codes),
            _mm512_srli_epi16::<8>(codes),
            _mm512_srli_epi16::<12>(codes),
        ];
        let nibbles = _mm512_set1_epi16(0xf);
        if !SMALL {
            let table = table(0, STEP / 2);
            // Of 32 lanes, the second half is the second 64 columns.
            let half = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(1 << 4));
            shifted.map(|codes| {
                let index = _mm512_ternarylogic_epi32::<OR_MASKED>(codes, nibbles, half);
                _mm512_permutexvar_epi16(index, table)
            })
        } else {
            let tables = [table(0, STEP / 4), table(STEP / 2, 3 * STEP / 4)];
            let quarter = _mm512_mullo_epi64(
                _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0),
                _mm512_set1_epi64(SIXTEENS),
            );
            shifted.map(|codes| {
                let index = _mm512_ternarylogic_epi32::<OR_MASKED>(codes, nibbles, quarter);
                _mm512_permutex2var_epi16(tables[0], index, tables[1])
            })
        }
    }

    /// Where a row's codes begin; it may be behind the last.
    pub(super) fn row(&self, row: usize) -> *const u8 {
        self.codes.as_ptr().wrapping_add(row * self.bytes)
    }
}

/// Asks for a line of memory, whatever its address.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn prefetch(line: *const u8) {
    _mm_prefetch::<_MM_HINT_T1>(line.cast());
}

/// `a & b | c`.
const OR_MASKED: i32 = 0xea;
/// 16 in each of four lanes.
const SIXTEENS: i64 = 0x0010_0010_0010_0010;
