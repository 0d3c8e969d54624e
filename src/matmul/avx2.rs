//! AVX2 with FMA: the sixteen values as planes of bytes, looked up 32 codes at a time.
//!
//! A register holds 32 bytes of codes, 64 columns; a part is the 32 low or high nibbles. [`Single`]
//! looks up all four bytes of each number and puts them together by interleaving, twice: 12
//! instructions for 32 numbers, on the two ports that shuffle. [`Brain`] takes values rounded to
//! `bf16`, whose other two bytes are zero: 4 of them and 4 that any port takes.
//!
//! Floor: with four multiplications for 32 columns and a row of `x`, and 3 to get at the nibbles,
//! on three ports of which two multiply and two shuffle, 128 columns take 26 cycles for one row of
//! `x` and [`Single`], 19 for [`Brain`]; 8 for each more row. Seen on Sapphire Rapids, from the
//! second-level cache: 30 and 24; 11 for each more row; transposed 26 for [`Brain`], then 20 for
//! each more row, since sums are loaded and stored for every row or two of the weight.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::kernel::{Kernel, entry_points};
use super::loops;
use super::tile::Tile;

/// The values in single precision.
pub(super) type Single = Avx2<false>;
/// The values rounded to `bf16`.
pub(super) type Brain = Avx2<true>;

pub(super) struct Avx2<const BRAIN: bool>;

pub(super) mod single {
    use super::*;
    entry_points!(Single, "avx2,f16c,fma", 8, {
        1 => (2, false), 2 => (2, false), 3 => (2, false), 4 => (2, false),
        5 => (1, true), 6 => (1, true), 7 => (1, true), 8 => (1, true)
    }, {
        1 => (2, false), 2 => (2, false), 3 => (2, true), 4 => (2, true),
        5 => (1, true), 6 => (1, true), 7 => (1, true), 8 => (1, true)
    });
}

pub(super) mod brain {
    use super::*;
    entry_points!(Brain, "avx2,f16c,fma", 8, {
        1 => (2, false), 2 => (2, false), 3 => (2, false), 4 => (2, false),
        5 => (1, true), 6 => (1, true), 7 => (1, true), 8 => (1, true)
    }, {
        1 => (2, false), 2 => (2, false), 3 => (2, true), 4 => (2, true),
        5 => (1, true), 6 => (1, true), 7 => (1, true), 8 => (1, true)
    });
}

/// `[$body; 4]` with `$index` from 0 to 3. A closure would not have the features of the function
/// around it.
macro_rules! four {
    (|$index:ident| $body:expr) => {
        [
            {
                let $index = 0;
                $body
            },
            {
                let $index = 1;
                $body
            },
            {
                let $index = 2;
                $body
            },
            {
                let $index = 3;
                $body
            },
        ]
    };
}

// SAFETY (of the whole implementation): callers guarantee the features and good pointers, as the
// trait says; no load or store needs alignment.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const BRAIN: bool> Kernel for Avx2<BRAIN> {
    type Codes = __m256i;
    /// From the highest byte of a number to the lowest; the last two are not used for `bf16`.
    type Table = [__m256i; 4];
    type Values = [__m256; 4];
    type Sum = __m256;
    type Lanes = __m256i;
    const STEP: usize = 64;
    const PARTS: usize = 2;

    /// Halves of registers are interleaved by themselves; the first part is the low nibbles, which
    /// are the odd columns.
    fn column(place: usize) -> usize {
        let (part, register, lane) = (place / 32, place % 32 / 8, place % 8);
        let (half, lane) = (lane / 4, lane % 4);
        let byte = if BRAIN {
            register / 2 * 8 + 2 * lane + register % 2
        } else {
            4 * register + lane
        };
        2 * (16 * half + byte) + (1 - part)
    }

    #[inline(always)]
    unsafe fn table(values: &[f32; 256]) -> [__m256i; 4] {
        let mut planes = [[0_u8; 16]; 4];
        for (code, value) in values[..16].iter().enumerate() {
            let bytes = if BRAIN {
                half::bf16::from_f32(*value).to_f32().to_be_bytes()
            } else {
                value.to_be_bytes()
            };
            for (plane, byte) in planes.iter_mut().zip(bytes) {
                plane[code] = byte;
            }
        }
        unsafe {
            four!(|plane| _mm256_broadcastsi128_si256(_mm_loadu_si128(
                planes[plane].as_ptr().cast()
            )))
        }
    }

    #[inline(always)]
    unsafe fn codes(at: *const u8, columns: usize) -> __m256i {
        unsafe {
            if columns == Self::STEP {
                _mm256_loadu_si256(at.cast())
            } else {
                _mm256_broadcastsi128_si256(_mm_loadu_si128(at.cast()))
            }
        }
    }

    #[inline(always)]
    unsafe fn values(table: [__m256i; 4], codes: __m256i) -> [__m256; 4] {
        unsafe {
            let codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
            let a = _mm256_shuffle_epi8(table[0], codes);
            let b = _mm256_shuffle_epi8(table[1], codes);
            let upper = [_mm256_unpacklo_epi8(b, a), _mm256_unpackhi_epi8(b, a)];
            if BRAIN {
                let odd = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(upper[0])),
                    _mm256_castsi256_ps(_mm256_and_si256(upper[0], odd)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(upper[1])),
                    _mm256_castsi256_ps(_mm256_and_si256(upper[1], odd)),
                ]
            } else {
                let c = _mm256_shuffle_epi8(table[2], codes);
                let d = _mm256_shuffle_epi8(table[3], codes);
                let lower = [_mm256_unpacklo_epi8(d, c), _mm256_unpackhi_epi8(d, c)];
                [
                    _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower[0], upper[0])),
                    _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower[0], upper[0])),
                    _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower[1], upper[1])),
                    _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower[1], upper[1])),
                ]
            }
        }
    }

    #[inline(always)]
    unsafe fn next(codes: __m256i) -> __m256i {
        unsafe { _mm256_srli_epi16::<4>(codes) }
    }

    #[inline(always)]
    unsafe fn lanes(block_size: usize, columns: usize) -> __m256i {
        let second = i32::from(block_size == 32 && columns == Self::STEP);
        unsafe { _mm256_setr_epi32(0, 0, 0, 0, second, second, second, second) }
    }

    #[inline(always)]
    unsafe fn scale(at: *const f32, lanes: __m256i) -> __m256 {
        unsafe { _mm256_permutevar_ps(_mm256_broadcast_ps(&_mm_loadu_ps(at)), lanes) }
    }

    #[inline(always)]
    unsafe fn splat(number: f32) -> __m256 {
        unsafe { _mm256_set1_ps(number) }
    }

    #[inline(always)]
    unsafe fn multiply(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn add_product(sum: __m256, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, sum) }
    }

    #[inline(always)]
    unsafe fn total(sum: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> [__m256; 4] {
        unsafe { four!(|register| _mm256_loadu_ps(at.add(8 * register))) }
    }

    #[inline(always)]
    unsafe fn store(values: [__m256; 4], at: *mut f32) {
        unsafe {
            four!(|register| _mm256_storeu_ps(at.add(8 * register), values[register]));
        }
    }

    #[inline(always)]
    unsafe fn scaled(values: [__m256; 4], scale: __m256) -> [__m256; 4] {
        unsafe { four!(|register| _mm256_mul_ps(values[register], scale)) }
    }

    #[inline(always)]
    unsafe fn dot(sum: __m256, values: [__m256; 4], x: [__m256; 4]) -> __m256 {
        unsafe {
            let sum = _mm256_fmadd_ps(values[0], x[0], sum);
            let sum = _mm256_fmadd_ps(values[1], x[1], sum);
            let sum = _mm256_fmadd_ps(values[2], x[2], sum);
            _mm256_fmadd_ps(values[3], x[3], sum)
        }
    }

    #[inline(always)]
    unsafe fn add_scaled(sums: [__m256; 4], values: [__m256; 4], factor: __m256) -> [__m256; 4] {
        unsafe { four!(|register| _mm256_fmadd_ps(values[register], factor, sums[register])) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}
