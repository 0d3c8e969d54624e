//! AVX-512: a register holds 64 bytes of codes, 128 columns.
//!
//! Shifted right by nibble after nibble, the low bits of its lanes are the indices of a table
//! look-up, which ignores the others: the values come in single precision and exact, and a lane
//! goes on holding the same eight columns, so that scales are a number a lane.
//!
//! Floor: two ports can take these instructions. A step of 128 columns is 8 look-ups, 7 shifts, one
//! instruction for the scales, and 9 multiplications a row of `x`: 13 cycles for one row of `x`, 44
//! for eight. Seen on two cores of Sapphire Rapids at 3.5 GHz and more: one row of `x` takes 4.3 ns a
//! step from the second-level cache (3.0 where it has 512 columns) and 5.1 to 5.3 from memory, where
//! a loop that only reads takes 4.2 to 4.7; eight rows take 70 cycles, transposed one takes 20 and
//! eight 105. The loop for eight in C without look-ups or without loads takes 52 and with both 58 to
//! 62: it gets about one register of 64 bytes a cycle from the first-level cache, and each serves two
//! multiplications.
//!
//! One or two rows of 16-bit numbers are multiplied by bytes where the chip can ([`super::fixed`]). In
//! half precision, with AVX512-FP16, one row took 3.7 ns from that cache and 4.8 to 5.0 from
//! memory, as widening the sums takes back most of what half the look-ups save. That made a product
//! 2% faster, and is not here.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::kernel::{Kernel, entry_points};
use super::loops;
use super::tile::Tile;

pub(super) struct Avx512;

entry_points!(Avx512, "avx512f,avx512bw,avx512dq,avx512vl", 8, {
    1 => (4, false), 2 => (4, false), 3 => (4, false), 4 => (4, true),
    5 => (2, false), 6 => (2, true), 7 => (2, true), 8 => (2, true)
}, {
    1 => (4, false), 2 => (4, false), 3 => (4, true), 4 => (4, true),
    5 => (4, true), 6 => (4, true), 7 => (4, true), 8 => (4, true)
});

// SAFETY (of the whole implementation): callers guarantee the features and good pointers, as the
// trait says; no load or store needs alignment.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Kernel for Avx512 {
    type Codes = __m512i;
    type Table = __m512;
    type Values = __m512;
    type Sum = __m512;
    type Lanes = __m512i;
    const STEP: usize = 128;
    const PARTS: usize = 8;

    /// Nibble `place / 16` of an integer of eight nibbles; the even one of two is the high one.
    fn column(place: usize) -> usize {
        place % 16 * 8 + ((place / 16) ^ 1)
    }

    #[inline(always)]
    unsafe fn table(values: &[f32; 256]) -> __m512 {
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn codes(at: *const u8, columns: usize) -> __m512i {
        unsafe {
            if columns == Self::STEP {
                return _mm512_loadu_si512(at.cast());
            }
            let there = (1_u16 << (columns / 8)).wrapping_sub(1);
            let others = _mm512_set1_epi32(at.cast::<i32>().read_unaligned());
            _mm512_mask_loadu_epi32(others, there, at.cast())
        }
    }

    #[inline(always)]
    unsafe fn values(table: __m512, codes: __m512i) -> __m512 {
        unsafe { _mm512_permutexvar_ps(codes, table) }
    }

    #[inline(always)]
    unsafe fn next(codes: __m512i) -> __m512i {
        unsafe { _mm512_srli_epi32::<4>(codes) }
    }

    #[inline(always)]
    unsafe fn lanes(block_size: usize, columns: usize) -> __m512i {
        let mut lanes = [0_i32; 16];
        for (lane, scale) in lanes.iter_mut().enumerate() {
            // Codes that are not there have a scale that is.
            *scale = (8 * lane).min(columns - 1) as i32 / block_size as i32;
        }
        unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn scale(at: *const f32, lanes: __m512i) -> __m512 {
        unsafe { _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(at)), lanes) }
    }

    #[inline(always)]
    unsafe fn splat(number: f32) -> __m512 {
        unsafe { _mm512_set1_ps(number) }
    }

    #[inline(always)]
    unsafe fn multiply(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn add_product(sum: __m512, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }

    #[inline(always)]
    unsafe fn total(sum: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(sum) }
    }

    #[inline(always)]
    unsafe fn totals<const R: usize>(sums: [__m512; R]) -> [f32; R] {
        unsafe {
            let mut totals = sums.map(|_| 0.0);
            let mut fours = sums.chunks_exact(4);
            for (four, totals) in (&mut fours).zip(totals.chunks_exact_mut(4)) {
                // Lanes of two registers side by side, then of four; all at once, as the chain of
                // additions is what takes long.
                let pair = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let low = _mm512_castps_pd(pair(four[0], four[1]));
                let high = _mm512_castps_pd(pair(four[2], four[3]));
                let lanes = _mm512_add_ps(
                    _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)),
                );
                let halves = _mm256_add_ps(
                    _mm512_castps512_ps256(lanes),
                    _mm512_extractf32x8_ps::<1>(lanes),
                );
                let quarters = _mm_add_ps(
                    _mm256_castps256_ps128(halves),
                    _mm256_extractf128_ps::<1>(halves),
                );
                _mm_storeu_ps(totals.as_mut_ptr(), quarters);
            }
            let done = R - fours.remainder().len();
            for (total, sum) in totals[done..].iter_mut().zip(&sums[done..]) {
                *total = Self::total(*sum);
            }
            totals
        }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(at) }
    }

    #[inline(always)]
    unsafe fn store(values: __m512, at: *mut f32) {
        unsafe { _mm512_storeu_ps(at, values) }
    }

    #[inline(always)]
    unsafe fn scaled(values: __m512, scale: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(values, scale) }
    }

    #[inline(always)]
    unsafe fn dot(sum: __m512, values: __m512, x: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(values, x, sum) }
    }

    #[inline(always)]
    unsafe fn add_scaled(sums: __m512, values: __m512, factor: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(values, factor, sums) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}
