//! AVX2 with F16C.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::cells::{CellWords, low_bits};
use super::search::Search;
use super::task::entry_points;
use super::vector::{Vector, map_2};
use crate::Element;
use crate::element::Dtype;

entry_points!(Avx2, "avx2,f16c");

/// Two registers of eight numbers.
#[derive(Clone, Copy)]
pub(crate) struct Avx2([__m256; 2]);

// SAFETY (of the whole implementation): callers guarantee the features, as the trait says; loads
// and stores are the unaligned ones, but for streamed stores, whose alignment the trait asks for.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Vector for Avx2 {
    type Index = [__m256i; 2];
    type Magnitudes = __m256i;
    /// The low and the high bytes of 16 numbers of 16 bits, each in both halves of a register; or
    /// 16 numbers of 32 bits.
    type Table = [__m256i; 2];

    #[inline(always)]
    unsafe fn splat(number: f32) -> Self {
        unsafe { Self([_mm256_set1_ps(number); 2]) }
    }

    #[inline(always)]
    unsafe fn load<T: Element>(source: *const T) -> [Self; 2] {
        unsafe {
            let [first, second] = map_2!([0, 1], |half| {
                let source = source.add(16 * half);
                match T::DTYPE {
                    Dtype::Bf16 => {
                        let pairs = _mm256_loadu_si256(source.cast());
                        let even = _mm256_slli_epi32::<16>(pairs);
                        let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(HIGH_HALF));
                        [_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd)]
                    }
                    Dtype::F16 => deinterleave(
                        _mm256_cvtph_ps(_mm_loadu_si128(source.cast())),
                        _mm256_cvtph_ps(_mm_loadu_si128(source.add(8).cast())),
                    ),
                    Dtype::F32 => deinterleave(
                        _mm256_loadu_ps(source.cast()),
                        _mm256_loadu_ps(source.add(8).cast()),
                    ),
                }
            });
            [Self([first[0], second[0]]), Self([first[1], second[1]])]
        }
    }

    #[inline(always)]
    unsafe fn store<T: Element>([even, odd]: [Self; 2], target: *mut T) {
        unsafe {
            for half in 0..2 {
                let (even, odd, target) = (even.0[half], odd.0[half], target.add(16 * half));
                match T::DTYPE {
                    Dtype::Bf16 => {
                        let even = _mm256_srli_epi32::<16>(round_to_bf16(even));
                        let odd =
                            _mm256_and_si256(round_to_bf16(odd), _mm256_set1_epi32(HIGH_HALF));
                        _mm256_storeu_si256(target.cast(), _mm256_or_si256(even, odd));
                    }
                    Dtype::F16 => {
                        let [first, second] = interleave(even, odd);
                        _mm_storeu_si128(target.cast(), round_to_f16(first));
                        _mm_storeu_si128(target.add(8).cast(), round_to_f16(second));
                    }
                    Dtype::F32 => {
                        let [first, second] = interleave(even, odd);
                        _mm256_storeu_ps(target.cast(), first);
                        _mm256_storeu_ps(target.add(8).cast(), second);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply(self, factor: Self) -> Self {
        unsafe {
            Self(map_2!([0, 1], |half| _mm256_mul_ps(
                self.0[half],
                factor.0[half]
            )))
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe {
            Self(map_2!([0, 1], |half| _mm256_add_ps(
                self.0[half],
                other.0[half]
            )))
        }
    }

    #[inline(always)]
    unsafe fn subtract(self, other: Self) -> Self {
        unsafe {
            Self(map_2!([0, 1], |half| _mm256_sub_ps(
                self.0[half],
                other.0[half]
            )))
        }
    }

    #[inline(always)]
    unsafe fn divide(self, divisor: Self) -> Self {
        unsafe {
            Self(map_2!([0, 1], |half| _mm256_div_ps(
                self.0[half],
                divisor.0[half]
            )))
        }
    }

    #[inline(always)]
    unsafe fn square_root(self) -> Self {
        unsafe { Self(map_2!([0, 1], |half| _mm256_sqrt_ps(self.0[half]))) }
    }

    #[inline(always)]
    unsafe fn no_magnitudes() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn larger<T: Element>(mut so_far: __m256i, group: *const T) -> __m256i {
        unsafe {
            let registers = size_of::<T>();
            for register in 0..registers {
                let bits = _mm256_loadu_si256(group.cast::<__m256i>().add(register));
                so_far = if T::DTYPE == Dtype::F32 {
                    let magnitude = _mm256_set1_epi32(i32::MAX);
                    _mm256_max_epu32(so_far, _mm256_and_si256(bits, magnitude))
                } else {
                    let magnitude = _mm256_set1_epi16(i16::MAX);
                    _mm256_max_epu16(so_far, _mm256_and_si256(bits, magnitude))
                };
            }
            so_far
        }
    }

    #[inline(always)]
    unsafe fn larger_of(so_far: __m256i, numbers: Self) -> __m256i {
        unsafe {
            let [first, second] = map_2!(numbers.0, |half| _mm256_and_si256(
                _mm256_castps_si256(half),
                _mm256_set1_epi32(i32::MAX)
            ));
            _mm256_max_epu32(so_far, _mm256_max_epu32(first, second))
        }
    }

    #[inline(always)]
    unsafe fn largest<T: Element>(magnitudes: __m256i) -> u32 {
        unsafe {
            if T::DTYPE == Dtype::F32 {
                largest_u32(magnitudes)
            } else {
                largest_u16(magnitudes)
            }
        }
    }

    #[inline(always)]
    unsafe fn root() -> [__m256i; 2] {
        unsafe { [_mm256_set1_epi32(1); 2] }
    }

    #[inline(always)]
    unsafe fn descend<const LEVEL: usize>(
        self,
        search: &Search,
        node: [__m256i; 2],
    ) -> [__m256i; 2] {
        let tree = &search.tree;
        unsafe {
            map_2!([0, 1], |half| {
                let node = node[half];
                let midpoint = match LEVEL {
                    1 => _mm256_set1_ps(tree[1]),
                    2 | 4 => _mm256_permutevar8x32_ps(_mm256_loadu_ps(tree.as_ptr()), node),
                    8 => _mm256_permutevar8x32_ps(_mm256_loadu_ps(tree.as_ptr().add(8)), node),
                    16 => {
                        let table =
                            map_2!([16, 24], |first| _mm256_loadu_ps(tree.as_ptr().add(first)));
                        look_up(table, node)
                    }
                    _ => _mm256_i32gather_ps::<4>(tree.as_ptr(), node),
                };
                let greater = _mm256_cmp_ps::<_CMP_GT_OQ>(self.0[half], midpoint);
                // True is -1.
                _mm256_sub_epi32(_mm256_add_epi32(node, node), _mm256_castps_si256(greater))
            })
        }
    }

    #[inline(always)]
    unsafe fn cell_node<const SIGNED: bool>(self, cells: CellWords) -> [__m256i; 2] {
        unsafe {
            let count = _mm_cvtsi32_si128(low_bits(SIGNED).cast_signed());
            let mask = _mm256_set1_epi32((1 << low_bits(SIGNED)) - 1);
            map_2!(self.0, |half| {
                let ordered = if !SIGNED {
                    _mm256_castps_si256(_mm256_max_ps(half, _mm256_setzero_ps()))
                } else {
                    let bits = _mm256_castps_si256(half);
                    let inverted = _mm256_srli_epi32::<1>(_mm256_srai_epi32::<31>(bits));
                    _mm256_xor_si256(bits, inverted)
                };
                let cell = _mm256_sra_epi32(ordered, count);
                let word = _mm256_i32gather_epi32::<4>(cells.0.cast(), cell);
                let low = _mm256_and_si256(ordered, mask);
                _mm256_srl_epi32(_mm256_add_epi32(word, low), count)
            })
        }
    }

    #[inline(always)]
    unsafe fn keep_from_zero(node: [__m256i; 2], number: Self) -> [__m256i; 2] {
        unsafe {
            map_2!([0, 1], |half| {
                let above = _mm256_cmp_ps::<_CMP_GT_OQ>(number.0[half], _mm256_setzero_ps());
                let least = _mm256_and_si256(_mm256_castps_si256(above), _mm256_set1_epi32(257));
                _mm256_max_epu32(node[half], least)
            })
        }
    }

    #[inline(always)]
    unsafe fn recode(node: [__m256i; 2], codes: &[u8; 256]) -> [__m256i; 2] {
        unsafe {
            let codes = _mm256_broadcastsi128_si256(_mm_loadu_si128(codes.as_ptr().cast()));
            let codes = _mm256_add_epi8(codes, _mm256_set1_epi8(16));
            // A byte with its high bit set looks up zero.
            let others = _mm256_set1_epi32(0x8080_8000_u32.cast_signed());
            map_2!(node, |node| _mm256_shuffle_epi8(
                codes,
                _mm256_or_si256(node, others)
            ))
        }
    }

    #[inline(always)]
    unsafe fn pack_nibbles([even, odd]: [[__m256i; 2]; 2], target: *mut u8) {
        unsafe {
            let [first, second] = map_2!([0, 1], |half| {
                let bytes = _mm256_xor_si256(_mm256_slli_epi32::<4>(even[half]), odd[half]);
                // Takes out the 16 of both nodes.
                _mm256_xor_si256(bytes, _mm256_set1_epi32(0x110))
            });
            // Each half of a register packs by itself: dwords 0 2 1 3 are then in order.
            let words =
                _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(first, second));
            let bytes = _mm_packus_epi16(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(target.cast(), bytes);
        }
    }

    #[inline(always)]
    unsafe fn pack_bytes([even, odd]: [[__m256i; 2]; 2], target: *mut u8) {
        unsafe {
            let [first, second] = map_2!([0, 1], |half| {
                let pairs = _mm256_xor_si256(even[half], _mm256_slli_epi32::<8>(odd[half]));
                // Takes out the 256 of both nodes.
                _mm256_xor_si256(pairs, _mm256_set1_epi32(0x1_0100))
            });
            let words =
                _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(first, second));
            _mm256_storeu_si256(target.cast(), words);
        }
    }

    #[inline(always)]
    unsafe fn unpack_bytes(source: *const u8) -> [[__m256i; 2]; 2] {
        unsafe {
            let [first, second] = map_2!([0, 1], |half| {
                let pairs = _mm256_cvtepu16_epi32(_mm_loadu_si128(source.add(16 * half).cast()));
                let even = _mm256_and_si256(pairs, _mm256_set1_epi32(0xff));
                [even, _mm256_srli_epi32::<8>(pairs)]
            });
            [[first[0], second[0]], [first[1], second[1]]]
        }
    }

    #[inline(always)]
    unsafe fn gather(values: &[f32; 256], index: [__m256i; 2]) -> Self {
        unsafe {
            Self(map_2!(index, |index| _mm256_i32gather_ps::<4>(
                values.as_ptr(),
                index
            )))
        }
    }

    #[inline(always)]
    unsafe fn table<T: Element>(values: &[f32; 256], scale: f32) -> [__m256i; 2] {
        unsafe {
            let scale = _mm256_set1_ps(scale);
            let scaled = map_2!([0, 8], |code| _mm256_mul_ps(
                _mm256_loadu_ps(values.as_ptr().add(code)),
                scale
            ));
            let [first, second] = match T::DTYPE {
                Dtype::F32 => return map_2!(scaled, |values| _mm256_castps_si256(values)),
                Dtype::F16 => map_2!(scaled, |values| round_to_f16(values)),
                Dtype::Bf16 => map_2!(scaled, |values| {
                    let bits = _mm256_srli_epi32::<16>(round_to_bf16(values));
                    _mm_packus_epi32(
                        _mm256_castsi256_si128(bits),
                        _mm256_extracti128_si256::<1>(bits),
                    )
                }),
            };
            let low = _mm_set1_epi16(0xff);
            map_2!(
                [
                    _mm_packus_epi16(_mm_and_si128(first, low), _mm_and_si128(second, low)),
                    _mm_packus_epi16(_mm_srli_epi16::<8>(first), _mm_srli_epi16::<8>(second)),
                ],
                |plane| _mm256_broadcastsi128_si256(plane)
            )
        }
    }

    #[inline(always)]
    unsafe fn decode<T: Element, const STREAM: bool>(
        table: [__m256i; 2],
        packed: *const u8,
        target: *mut T,
    ) {
        unsafe {
            let bytes = _mm_loadu_si128(packed.cast());
            let nibble = _mm_set1_epi8(15);
            let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble);
            let low = _mm_and_si128(bytes, nibble);
            let codes = [_mm_unpacklo_epi8(high, low), _mm_unpackhi_epi8(high, low)];
            if T::DTYPE == Dtype::F32 {
                let table = map_2!(table, |values| _mm256_castsi256_ps(values));
                for (half, codes) in codes.into_iter().enumerate() {
                    for (quarter, codes) in
                        [codes, _mm_srli_si128::<8>(codes)].into_iter().enumerate()
                    {
                        let numbers = look_up(table, _mm256_cvtepu8_epi32(codes));
                        write::<STREAM>(
                            _mm256_castps_si256(numbers),
                            target.add(16 * half + 8 * quarter).cast(),
                        );
                    }
                }
            } else {
                let codes = _mm256_set_m128i(codes[1], codes[0]);
                let [low, high] = map_2!(table, |plane| _mm256_shuffle_epi8(plane, codes));
                // Numbers 0 to 7 and 16 to 23, 8 to 15 and 24 to 31.
                let (a, b) = (
                    _mm256_unpacklo_epi8(low, high),
                    _mm256_unpackhi_epi8(low, high),
                );
                write::<STREAM>(_mm256_permute2x128_si256::<0x20>(a, b), target.cast());
                write::<STREAM>(
                    _mm256_permute2x128_si256::<0x31>(a, b),
                    target.add(16).cast(),
                );
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

/// The bits of a lane that are a `bf16` at an odd place.
const HIGH_HALF: i32 = 0xffff_0000_u32.cast_signed();
/// The bit of a `bf16` in the high half of a lane that makes a NaN a quiet one.
const QUIET_NAN: i32 = 0x0040_0000;

/// Looks up the low four bits of each lane among sixteen numbers.
///
/// # Safety
/// Needs AVX2, as all below.
#[inline(always)]
unsafe fn look_up(table: [__m256; 2], index: __m256i) -> __m256 {
    // SAFETY: the caller guarantees the feature.
    unsafe {
        let [lower, upper] = map_2!(table, |eight| _mm256_permutevar8x32_ps(eight, index));
        // Bit 3 becomes the sign, which is what a blend looks at.
        let choice = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
        _mm256_blendv_ps(lower, upper, choice)
    }
}

/// The largest of eight.
///
/// # Safety
/// Needs AVX2, as all here.
#[inline(always)]
pub(super) unsafe fn largest_u32(numbers: __m256i) -> u32 {
    // SAFETY: the caller guarantees the feature.
    unsafe {
        let four = _mm_max_epu32(
            _mm256_castsi256_si128(numbers),
            _mm256_extracti128_si256::<1>(numbers),
        );
        let two = _mm_max_epu32(four, _mm_srli_si128::<8>(four));
        let one = _mm_max_epu32(two, _mm_srli_si128::<4>(two));
        _mm_cvtsi128_si32(one).cast_unsigned()
    }
}

/// The largest of sixteen, none above `u16::MAX / 2`.
///
/// # Safety
/// Needs AVX2, as all here.
#[inline(always)]
pub(super) unsafe fn largest_u16(numbers: __m256i) -> u32 {
    // SAFETY: the caller guarantees the feature.
    unsafe {
        let eight = _mm_max_epu16(
            _mm256_castsi256_si128(numbers),
            _mm256_extracti128_si256::<1>(numbers),
        );
        // There is an instruction for the smallest, so it is asked for the smallest complement.
        let smallest = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
        !_mm_extract_epi16::<0>(smallest).cast_unsigned() & 0xffff
    }
}

/// Two registers in element order as `[even, odd]`.
#[inline(always)]
unsafe fn deinterleave(first: __m256, second: __m256) -> [__m256; 2] {
    // SAFETY: the caller guarantees the feature.
    unsafe {
        // Each half of a register shuffles by itself: quarters 0 2 1 3 are then in order.
        map_2!(
            [
                _mm256_shuffle_ps::<0b10_00_10_00>(first, second),
                _mm256_shuffle_ps::<0b11_01_11_01>(first, second),
            ],
            |mixed| {
                _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(
                    mixed,
                )))
            }
        )
    }
}

/// The inverse of [`deinterleave`].
#[inline(always)]
unsafe fn interleave(even: __m256, odd: __m256) -> [__m256; 2] {
    // SAFETY: the caller guarantees the feature.
    unsafe {
        let (a, b) = (_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
        [
            _mm256_permute2f128_ps::<0x20>(a, b),
            _mm256_permute2f128_ps::<0x31>(a, b),
        ]
    }
}

/// Rounds to nearest even; the `bf16` is the high half of each lane, the low half is rubbish.
#[inline(always)]
unsafe fn round_to_bf16(numbers: __m256) -> __m256i {
    // SAFETY: the caller guarantees the feature.
    unsafe {
        let bits = _mm256_castps_si256(numbers);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(numbers, numbers));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(QUIET_NAN));
        _mm256_blendv_epi8(rounded, quiet, nan)
    }
}

/// Rounds to nearest even.
#[inline(always)]
unsafe fn round_to_f16(numbers: __m256) -> __m128i {
    // SAFETY: the caller guarantees the feature (F16C).
    unsafe { _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(numbers) }
}

#[inline(always)]
unsafe fn write<const STREAM: bool>(register: __m256i, target: *mut __m256i) {
    // SAFETY: the caller guarantees the feature, the room and with `STREAM` the alignment.
    unsafe {
        if STREAM {
            _mm256_stream_si256(target, register);
        } else {
            _mm256_storeu_si256(target, register);
        }
    }
}
