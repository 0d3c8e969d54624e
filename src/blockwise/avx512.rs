//! AVX-512 (F, BW, DQ, VL).
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::avx2;
use super::cells::{CellWords, low_bits};
use super::search::{Bins, Search};
use super::task::entry_points;
use super::vector::{ByteMap, Vector, descend_4, map_2};
use crate::Element;
use crate::element::Dtype;

entry_points!(Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c");

/// One register of sixteen numbers.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

// SAFETY (of the whole implementation): callers guarantee the features, as the trait says; loads
// and stores are the unaligned ones, but for streamed stores, whose alignment the trait asks for.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Vector for Avx512 {
    type Index = __m512i;
    type Magnitudes = __m512i;
    /// 32 numbers of 16 bits, the sixteen twice; or 16 of 32 bits.
    type Table = __m512i;

    #[inline(always)]
    unsafe fn splat(number: f32) -> Self {
        unsafe { Self(_mm512_set1_ps(number)) }
    }

    #[inline(always)]
    unsafe fn load<T: Element>(source: *const T) -> [Self; 2] {
        unsafe {
            match T::DTYPE {
                Dtype::Bf16 => {
                    let pairs = _mm512_loadu_si512(source.cast());
                    let even = _mm512_slli_epi32::<16>(pairs);
                    let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(HIGH_HALF));
                    [
                        Self(_mm512_castsi512_ps(even)),
                        Self(_mm512_castsi512_ps(odd)),
                    ]
                }
                Dtype::F16 => deinterleave(
                    _mm512_cvtph_ps(_mm256_loadu_si256(source.cast())),
                    _mm512_cvtph_ps(_mm256_loadu_si256(source.add(16).cast())),
                ),
                Dtype::F32 => deinterleave(
                    _mm512_loadu_ps(source.cast()),
                    _mm512_loadu_ps(source.add(16).cast()),
                ),
            }
        }
    }

    #[inline(always)]
    unsafe fn store<T: Element>([even, odd]: [Self; 2], target: *mut T) {
        unsafe {
            match T::DTYPE {
                Dtype::Bf16 => {
                    let even = _mm512_srli_epi32::<16>(round_to_bf16(even.0));
                    let odd = _mm512_and_si512(round_to_bf16(odd.0), _mm512_set1_epi32(HIGH_HALF));
                    _mm512_storeu_si512(target.cast(), _mm512_or_si512(even, odd));
                }
                Dtype::F16 => {
                    let [first, second] = interleave(even, odd);
                    _mm256_storeu_si256(target.cast(), round_to_f16(first));
                    _mm256_storeu_si256(target.add(16).cast(), round_to_f16(second));
                }
                Dtype::F32 => {
                    let [first, second] = interleave(even, odd);
                    _mm512_storeu_ps(target.cast(), first);
                    _mm512_storeu_ps(target.add(16).cast(), second);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply(self, factor: Self) -> Self {
        unsafe { Self(_mm512_mul_ps(self.0, factor.0)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Self(_mm512_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn subtract(self, other: Self) -> Self {
        unsafe { Self(_mm512_sub_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn divide(self, divisor: Self) -> Self {
        unsafe { Self(_mm512_div_ps(self.0, divisor.0)) }
    }

    #[inline(always)]
    unsafe fn square_root(self) -> Self {
        unsafe { Self(_mm512_sqrt_ps(self.0)) }
    }

    #[inline(always)]
    unsafe fn no_magnitudes() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn larger<T: Element>(so_far: __m512i, group: *const T) -> __m512i {
        unsafe {
            let bits = _mm512_loadu_si512(group.cast());
            if T::DTYPE == Dtype::F32 {
                let magnitude = _mm512_set1_epi32(i32::MAX);
                let more = _mm512_loadu_si512(group.add(16).cast());
                let so_far = _mm512_max_epu32(so_far, _mm512_and_si512(bits, magnitude));
                _mm512_max_epu32(so_far, _mm512_and_si512(more, magnitude))
            } else {
                let magnitude = _mm512_set1_epi16(i16::MAX);
                _mm512_max_epu16(so_far, _mm512_and_si512(bits, magnitude))
            }
        }
    }

    #[inline(always)]
    unsafe fn larger_of(so_far: __m512i, numbers: Self) -> __m512i {
        unsafe {
            let bits = _mm512_castps_si512(numbers.0);
            _mm512_max_epu32(so_far, _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX)))
        }
    }

    #[inline(always)]
    unsafe fn largest<T: Element>(magnitudes: __m512i) -> u32 {
        unsafe {
            let low = _mm512_castsi512_si256(magnitudes);
            let high = _mm512_extracti64x4_epi64::<1>(magnitudes);
            if T::DTYPE == Dtype::F32 {
                avx2::largest_u32(_mm256_max_epu32(low, high))
            } else {
                avx2::largest_u16(_mm256_max_epu16(low, high))
            }
        }
    }

    #[inline(always)]
    unsafe fn root() -> __m512i {
        unsafe { _mm512_set1_epi32(1) }
    }

    #[inline(always)]
    unsafe fn descend<const LEVEL: usize>(self, search: &Search, node: __m512i) -> __m512i {
        let tree = &search.tree;
        unsafe {
            let midpoint = match LEVEL {
                1 => _mm512_set1_ps(tree[1]),
                2..=8 => _mm512_permutexvar_ps(node, sixteen(tree, 0)),
                16 => _mm512_permutexvar_ps(node, sixteen(tree, 16)),
                32 => among_32(tree, 32, node),
                64 => among_64(tree, 64, node),
                _ => {
                    let upper = _mm512_test_epi32_mask(node, _mm512_set1_epi32(64));
                    let (low, high) = (among_64(tree, 128, node), among_64(tree, 192, node));
                    _mm512_mask_blend_ps(upper, low, high)
                }
            };
            let greater = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, midpoint);
            let child = _mm512_add_epi32(node, node);
            _mm512_mask_add_epi32(child, greater, child, _mm512_set1_epi32(search.one))
        }
    }

    #[inline(always)]
    unsafe fn nibble_node(self, search: &Search) -> __m512i {
        unsafe {
            let Some(bins) = &search.bins else {
                return descend_4(self, search);
            };
            // Rounding down to a whole number: the bin is in the low bits of the sum.
            let bin = _mm512_castps_si512(_mm512_fmadd_round_ps::<
                { _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC },
            >(
                self.0,
                _mm512_set1_ps(Bins::SLOPE),
                _mm512_set1_ps(WHOLE_NUMBERS + 16.0),
            ));
            let midpoint = _mm512_permutex2var_ps(
                _mm512_loadu_ps(bins.midpoints.as_ptr()),
                bin,
                _mm512_loadu_ps(bins.midpoints.as_ptr().add(16)),
            );
            let node = _mm512_permutex2var_epi32(
                _mm512_loadu_si512(bins.nodes.as_ptr().cast()),
                bin,
                _mm512_loadu_si512(bins.nodes.as_ptr().add(16).cast()),
            );
            let greater = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, midpoint);
            _mm512_mask_add_epi32(node, greater, node, _mm512_set1_epi32(search.one))
        }
    }

    #[inline(always)]
    unsafe fn cell_node<const SIGNED: bool>(self, cells: CellWords) -> __m512i {
        unsafe {
            let mask = _mm512_set1_epi32((1 << low_bits(SIGNED)) - 1);
            let ordered = if !SIGNED {
                _mm512_castps_si512(_mm512_max_ps(self.0, _mm512_setzero_ps()))
            } else {
                let bits = _mm512_castps_si512(self.0);
                _mm512_ternarylogic_epi32::<XOR_AND>(
                    bits,
                    _mm512_srai_epi32::<31>(bits),
                    _mm512_set1_epi32(i32::MAX),
                )
            };
            let count = _mm512_set1_epi32(low_bits(SIGNED).cast_signed());
            let cell = _mm512_srav_epi32(ordered, count);
            let word = _mm512_i32gather_epi32::<4>(cell, cells.0.cast());
            let low = _mm512_and_si512(ordered, mask);
            _mm512_srlv_epi32(_mm512_add_epi32(word, low), count)
        }
    }

    #[inline(always)]
    unsafe fn keep_from_zero(node: __m512i, number: Self) -> __m512i {
        unsafe {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(number.0, _mm512_setzero_ps());
            _mm512_mask_max_epu32(node, above, node, _mm512_set1_epi32(257))
        }
    }

    #[inline(always)]
    unsafe fn recode(node: __m512i, codes: &[u8; 256]) -> __m512i {
        unsafe {
            let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let codes = _mm512_add_epi32(codes, _mm512_set1_epi32(16));
            _mm512_permutexvar_epi32(node, codes)
        }
    }

    #[inline(always)]
    unsafe fn pack_nibbles([even, odd]: [__m512i; 2], target: *mut u8) {
        unsafe {
            // The low byte of (16 + even) << 4 is the code's; the 16 of the odd one is taken out.
            let bytes = _mm512_ternarylogic_epi32::<XOR3>(
                _mm512_slli_epi32::<4>(even),
                odd,
                _mm512_set1_epi32(16),
            );
            _mm_storeu_si128(target.cast(), _mm512_cvtepi32_epi8(bytes));
        }
    }

    #[inline(always)]
    unsafe fn pack_bytes([even, odd]: [__m512i; 2], target: *mut u8) {
        unsafe {
            let pairs = _mm512_ternarylogic_epi32::<XOR3>(
                even,
                _mm512_slli_epi32::<8>(odd),
                _mm512_set1_epi32(256),
            );
            _mm256_storeu_si256(target.cast(), _mm512_cvtepi32_epi16(pairs));
        }
    }

    #[inline(always)]
    unsafe fn unpack_bytes(source: *const u8) -> [__m512i; 2] {
        unsafe {
            let pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256(source.cast()));
            let even = _mm512_and_si512(pairs, _mm512_set1_epi32(0xff));
            [even, _mm512_srli_epi32::<8>(pairs)]
        }
    }

    #[inline(always)]
    unsafe fn gather(values: &[f32; 256], index: __m512i) -> Self {
        unsafe { Self(_mm512_i32gather_ps::<4>(index, values.as_ptr())) }
    }

    #[inline(always)]
    unsafe fn values_by_bytes(map: &ByteMap, codes: *const u8) -> [[Self; 2]; 2] {
        unsafe {
            // Such that bytes of one number come to lie side by side below, even ones first.
            let order = _mm512_loadu_si512(GROUPS_BY_LANES.as_ptr().cast());
            let codes = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(codes.cast()));
            let [a, b, c, d] = &map.bytes;
            let (a, b) = (among_bytes(a, codes), among_bytes(b, codes));
            let (c, d) = (among_bytes(c, codes), among_bytes(d, codes));
            let low = [_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b)];
            let high = [_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d)];
            map_2!([0, 1], |group| [
                Self(_mm512_castsi512_ps(_mm512_unpacklo_epi16(
                    low[group],
                    high[group]
                ))),
                Self(_mm512_castsi512_ps(_mm512_unpackhi_epi16(
                    low[group],
                    high[group]
                ))),
            ])
        }
    }

    #[inline(always)]
    unsafe fn table<T: Element>(values: &[f32; 256], scale: f32) -> __m512i {
        unsafe {
            let values = _mm512_mul_ps(_mm512_loadu_ps(values.as_ptr()), _mm512_set1_ps(scale));
            let sixteen = match T::DTYPE {
                Dtype::F32 => return _mm512_castps_si512(values),
                Dtype::F16 => round_to_f16(values),

                Dtype::Bf16 => {
                    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(round_to_bf16(values)))
                }
            };
            _mm512_broadcast_i64x4(sixteen)
        }
    }

    #[inline(always)]
    unsafe fn decode<T: Element, const STREAM: bool>(
        table: __m512i,
        packed: *const u8,
        target: *mut T,
    ) {
        unsafe {
            // Look-ups take the low bits of a lane only, so the others need no clearing.
            if T::DTYPE == Dtype::F32 {
                for half in 0..2 {
                    let bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(packed.add(8 * half).cast()));
                    let high = _mm512_srli_epi64::<4>(bytes);
                    let codes = _mm512_or_si512(high, _mm512_slli_epi64::<32>(bytes));
                    write::<STREAM>(
                        _mm512_permutexvar_epi32(codes, table),
                        target.add(16 * half).cast(),
                    );
                }
            } else {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(packed.cast()));
                let high = _mm512_srli_epi32::<4>(bytes);
                let codes = _mm512_or_si512(high, _mm512_slli_epi32::<16>(bytes));
                write::<STREAM>(_mm512_permutexvar_epi16(codes, table), target.cast());
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn fence() {
        unsafe { _mm_sfence() }
    }
}

/// Which of 64 elements comes where, so that interleaving bytes twice within the quarters of a
/// register gives even and odd numbers of two groups.
const GROUPS_BY_LANES: [u8; 64] = {
    let mut order = [0; 64];
    let mut place = 0;
    while place < 64 {
        let (quarter, vector, number) = (place / 16, place / 4 % 4, place % 4);
        order[place] = (32 * (vector / 2) + 2 * (4 * quarter + number) + vector % 2) as u8;
        place += 1;
    }
    order
};

/// The bits of a lane that are a `bf16` at an odd place.
const HIGH_HALF: i32 = 0xffff_0000_u32.cast_signed();
/// 2^23: from here to 2^24 single precision holds whole numbers and nothing else.
const WHOLE_NUMBERS: f32 = (1 << 23) as f32;
/// The truth table of `a ^ b ^ c`.
const XOR3: i32 = 0x96;
/// The truth table of `a ^ (b & c)`.
const XOR_AND: i32 = 0x78;

/// Sixteen nodes of the tree.
///
/// # Safety
/// Needs AVX-512 F, as all below; `first` is at most 240.
#[inline(always)]
unsafe fn sixteen(tree: &[f32; 256], first: usize) -> __m512 {
    // SAFETY: the caller guarantees the feature, and that the nodes are there.
    unsafe { _mm512_loadu_ps(tree.as_ptr().add(first)) }
}

/// The low five bits of each lane choose among the 32 nodes from `first`.
#[inline(always)]
unsafe fn among_32(tree: &[f32; 256], first: usize, node: __m512i) -> __m512 {
    // SAFETY: the caller guarantees the feature, and that the nodes are there.
    unsafe { _mm512_permutex2var_ps(sixteen(tree, first), node, sixteen(tree, first + 16)) }
}

/// The low six bits of each lane choose among the 64 nodes from `first`.
#[inline(always)]
unsafe fn among_64(tree: &[f32; 256], first: usize, node: __m512i) -> __m512 {
    // SAFETY: the caller guarantees the feature, and that the nodes are there.
    unsafe {
        let upper = _mm512_test_epi32_mask(node, _mm512_set1_epi32(32));
        let (low, high) = (
            among_32(tree, first, node),
            among_32(tree, first + 32, node),
        );
        _mm512_mask_blend_ps(upper, low, high)
    }
}

/// `bytes[code]` of 64 codes.
///
/// # Safety
/// Needs AVX-512 VBMI too.
#[inline(always)]
unsafe fn among_bytes(bytes: &[u8; 256], codes: __m512i) -> __m512i {
    // SAFETY: the caller guarantees the feature; 256 bytes are four registers.
    unsafe {
        let table: *const __m512i = bytes.as_ptr().cast();
        // A look-up takes the low six bits of a code; the other two choose among four.
        let bit_7 = _mm512_movepi8_mask(codes);
        let bit_6 = _mm512_movepi8_mask(_mm512_add_epi8(codes, codes));
        let found = _mm512_permutexvar_epi8(codes, _mm512_loadu_si512(table));
        let table_1 = _mm512_loadu_si512(table.add(1));
        let found = _mm512_mask_permutexvar_epi8(found, bit_6 & !bit_7, codes, table_1);
        let table_2 = _mm512_loadu_si512(table.add(2));
        let found = _mm512_mask_permutexvar_epi8(found, bit_7 & !bit_6, codes, table_2);
        let table_3 = _mm512_loadu_si512(table.add(3));
        _mm512_mask_permutexvar_epi8(found, bit_6 & bit_7, codes, table_3)
    }
}

/// Two registers in element order as `[even, odd]`.
#[inline(always)]
unsafe fn deinterleave(first: __m512, second: __m512) -> [Avx512; 2] {
    // SAFETY: the caller guarantees the feature.
    unsafe {
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
        [
            Avx512(_mm512_permutex2var_ps(first, even, second)),
            Avx512(_mm512_permutex2var_ps(first, odd, second)),
        ]
    }
}

/// The inverse of [`deinterleave`].
#[inline(always)]
unsafe fn interleave(even: Avx512, odd: Avx512) -> [__m512; 2] {
    // SAFETY: the caller guarantees the feature.
    unsafe {
        let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        [
            _mm512_permutex2var_ps(even.0, first, odd.0),
            _mm512_permutex2var_ps(even.0, second, odd.0),
        ]
    }
}

/// Rounds to nearest even; the `bf16` is the high half of each lane, the low half is rubbish.
#[inline(always)]
unsafe fn round_to_bf16(numbers: __m512) -> __m512i {
    // SAFETY: the caller guarantees the feature.
    unsafe {
        let bits = _mm512_castps_si512(numbers);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(numbers, numbers);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(QUIET_NAN))
    }
}

/// The bit of a `bf16` in the high half of a lane that makes a NaN a quiet one.
const QUIET_NAN: i32 = 0x0040_0000;

/// Rounds to nearest even.
#[inline(always)]
unsafe fn round_to_f16(numbers: __m512) -> __m256i {
    // SAFETY: the caller guarantees the feature.
    unsafe { _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(numbers) }
}

#[inline(always)]
unsafe fn write<const STREAM: bool>(register: __m512i, target: *mut __m512i) {
    // SAFETY: the caller guarantees the feature, the room and with `STREAM` the alignment.
    unsafe {
        if STREAM {
            _mm512_stream_si512(target, register);
        } else {
            _mm512_storeu_si512(target, register);
        }
    }
}
