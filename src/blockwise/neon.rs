//! NEON, which every 64-bit Arm processor has.
#![allow(unsafe_code)]

use std::arch::aarch64::*;
use std::arch::asm;

use super::cells::{CellWords, low_bits};
use super::search::Search;
use super::task::entry_points;
use super::vector::{Vector, map_2};
use crate::Element;
use crate::element::Dtype;

entry_points!(Neon, "neon");

/// Four registers of four numbers.
#[derive(Clone, Copy)]
pub(crate) struct Neon([float32x4_t; 4]);

const QUARTERS: [usize; 4] = [0, 1, 2, 3];

/// As [`super::vector::map_2`], for four elements.
macro_rules! map_4 {
    ($array:expr, |$x:pat_param| $body:expr) => {{
        let [a, b, c, d] = $array;
        let ([a, b], [c, d]) = (map_2!([a, b], |$x| $body), map_2!([c, d], |$x| $body));
        [a, b, c, d]
    }};
}

// SAFETY (of the whole implementation): callers guarantee the features, as the trait says; no load
// or store needs alignment.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Vector for Neon {
    type Index = [uint32x4_t; 4];
    type Magnitudes = uint32x4_t;
    /// The first, second … bytes of 16 numbers: two registers for 16 bits, four for 32 bits.
    type Table = [uint8x16_t; 4];

    #[inline(always)]
    unsafe fn splat(number: f32) -> Self {
        unsafe { Self([vdupq_n_f32(number); 4]) }
    }

    #[inline(always)]
    unsafe fn load<T: Element>(source: *const T) -> [Self; 2] {
        unsafe {
            let pairs = map_4!(QUARTERS, |quarter| {
                let source = source.add(8 * quarter);
                match T::DTYPE {
                    Dtype::Bf16 => {
                        let pairs = vreinterpretq_u32_u16(vld1q_u16(source.cast()));
                        [
                            vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)),
                            vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(HIGH_HALF))),
                        ]
                    }
                    Dtype::F16 => {
                        let (first, second) = (
                            widen_f16(vld1_u16(source.cast())),
                            widen_f16(vld1_u16(source.add(4).cast())),
                        );
                        [vuzp1q_f32(first, second), vuzp2q_f32(first, second)]
                    }
                    Dtype::F32 => {
                        let float32x4x2_t(even, odd) = vld2q_f32(source.cast());
                        [even, odd]
                    }
                }
            });
            [
                Self(map_4!(pairs, |[even, _]| even)),
                Self(map_4!(pairs, |[_, odd]| odd)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn store<T: Element>([even, odd]: [Self; 2], target: *mut T) {
        unsafe {
            for quarter in QUARTERS {
                let (even, odd, target) =
                    (even.0[quarter], odd.0[quarter], target.add(8 * quarter));
                match T::DTYPE {
                    Dtype::Bf16 => {
                        let even = vshrq_n_u32::<16>(round_to_bf16(even));
                        let odd = vandq_u32(round_to_bf16(odd), vdupq_n_u32(HIGH_HALF));
                        vst1q_u16(target.cast(), vreinterpretq_u16_u32(vorrq_u32(even, odd)));
                    }
                    Dtype::F16 => {
                        vst2_u16(
                            target.cast(),
                            uint16x4x2_t(narrow_f16(even), narrow_f16(odd)),
                        );
                    }
                    Dtype::F32 => vst2q_f32(target.cast(), float32x4x2_t(even, odd)),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply(self, factor: Self) -> Self {
        unsafe {
            Self(map_4!(QUARTERS, |quarter| vmulq_f32(
                self.0[quarter],
                factor.0[quarter]
            )))
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe {
            Self(map_4!(QUARTERS, |quarter| vaddq_f32(
                self.0[quarter],
                other.0[quarter]
            )))
        }
    }

    #[inline(always)]
    unsafe fn subtract(self, other: Self) -> Self {
        unsafe {
            Self(map_4!(QUARTERS, |quarter| vsubq_f32(
                self.0[quarter],
                other.0[quarter]
            )))
        }
    }

    #[inline(always)]
    unsafe fn divide(self, divisor: Self) -> Self {
        unsafe {
            Self(map_4!(QUARTERS, |quarter| vdivq_f32(
                self.0[quarter],
                divisor.0[quarter]
            )))
        }
    }

    #[inline(always)]
    unsafe fn square_root(self) -> Self {
        unsafe { Self(map_4!(QUARTERS, |quarter| vsqrtq_f32(self.0[quarter]))) }
    }

    #[inline(always)]
    unsafe fn no_magnitudes() -> uint32x4_t {
        unsafe { vdupq_n_u32(0) }
    }

    #[inline(always)]
    unsafe fn larger<T: Element>(mut so_far: uint32x4_t, group: *const T) -> uint32x4_t {
        unsafe {
            let registers = 2 * size_of::<T>();
            for register in 0..registers {
                let source = group.cast::<u8>().add(16 * register);
                so_far = if T::DTYPE == Dtype::F32 {
                    let bits = vld1q_u32(source.cast());
                    vmaxq_u32(so_far, vandq_u32(bits, vdupq_n_u32(u32::MAX >> 1)))
                } else {
                    let bits = vandq_u16(vld1q_u16(source.cast()), vdupq_n_u16(u16::MAX >> 1));
                    vreinterpretq_u32_u16(vmaxq_u16(vreinterpretq_u16_u32(so_far), bits))
                };
            }
            so_far
        }
    }

    #[inline(always)]
    unsafe fn larger_of(so_far: uint32x4_t, numbers: Self) -> uint32x4_t {
        unsafe {
            let [a, b, c, d] = map_4!(numbers.0, |quarter| vreinterpretq_u32_f32(vabsq_f32(
                quarter
            )));
            let all = vmaxq_u32(vmaxq_u32(a, b), vmaxq_u32(c, d));
            vmaxq_u32(so_far, all)
        }
    }

    #[inline(always)]
    unsafe fn largest<T: Element>(magnitudes: uint32x4_t) -> u32 {
        unsafe {
            if T::DTYPE == Dtype::F32 {
                vmaxvq_u32(magnitudes)
            } else {
                u32::from(vmaxvq_u16(vreinterpretq_u16_u32(magnitudes)))
            }
        }
    }

    #[inline(always)]
    unsafe fn root() -> [uint32x4_t; 4] {
        unsafe { [vdupq_n_u32(1); 4] }
    }

    #[inline(always)]
    unsafe fn descend<const LEVEL: usize>(
        self,
        search: &Search,
        node: [uint32x4_t; 4],
    ) -> [uint32x4_t; 4] {
        let tree = &search.tree;
        unsafe {
            let midpoint = match LEVEL {
                1 => Self::splat(tree[1]),
                2..=8 => look_up_16(tree.as_ptr(), node),
                16 => look_up_16(
                    tree.as_ptr().add(16),
                    map_4!(node, |node| vsubq_u32(node, vdupq_n_u32(16))),
                ),
                _ => Self::gather(tree, node),
            };
            map_4!(QUARTERS, |quarter| {
                let child = vaddq_u32(node[quarter], node[quarter]);
                // True is -1.
                vsubq_u32(child, vcgtq_f32(self.0[quarter], midpoint.0[quarter]))
            })
        }
    }

    #[inline(always)]
    unsafe fn cell_node<const SIGNED: bool>(self, cells: CellWords) -> [uint32x4_t; 4] {
        unsafe {
            map_4!(self.0, |quarter| {
                let ordered = if SIGNED {
                    let bits = vreinterpretq_s32_f32(quarter);
                    let inverted = vandq_s32(vshrq_n_s32::<31>(bits), vdupq_n_s32(i32::MAX));
                    veorq_s32(bits, inverted)
                } else {
                    vreinterpretq_s32_f32(vmaxq_f32(quarter, vdupq_n_f32(0.0)))
                };
                let shift = vdupq_n_s32(-low_bits(SIGNED).cast_signed());
                let mut lanes = [0; 4];
                vst1q_s32(lanes.as_mut_ptr(), vshlq_s32(ordered, shift));
                let words = map_4!(lanes, |cell| *cells.0.offset(cell as isize));
                let low = vdupq_n_u32((1 << low_bits(SIGNED)) - 1);
                let low = vandq_u32(vreinterpretq_u32_s32(ordered), low);
                vshlq_u32(vaddq_u32(vld1q_u32(words.as_ptr()), low), shift)
            })
        }
    }

    #[inline(always)]
    unsafe fn keep_from_zero(node: [uint32x4_t; 4], number: Self) -> [uint32x4_t; 4] {
        unsafe {
            map_4!(QUARTERS, |quarter| {
                let above = vcgtzq_f32(number.0[quarter]);
                vmaxq_u32(node[quarter], vandq_u32(above, vdupq_n_u32(257)))
            })
        }
    }

    #[inline(always)]
    unsafe fn recode(node: [uint32x4_t; 4], codes: &[u8; 256]) -> [uint32x4_t; 4] {
        unsafe {
            let codes = vld1q_u8(codes.as_ptr());
            map_4!(node, |node| {
                // A byte beyond the table looks up zero, so only the lowest byte is left.
                let rank = vsubq_u32(node, vdupq_n_u32(16));
                let others = vreinterpretq_u8_u32(vorrq_u32(rank, vdupq_n_u32(0xffff_ff00)));
                let code = vreinterpretq_u32_u8(vqtbl1q_u8(codes, others));
                vaddq_u32(code, vdupq_n_u32(16))
            })
        }
    }

    #[inline(always)]
    unsafe fn pack_nibbles([even, odd]: [[uint32x4_t; 4]; 2], target: *mut u8) {
        unsafe {
            let bytes = map_4!(QUARTERS, |quarter| {
                let bytes = veorq_u32(vshlq_n_u32::<4>(even[quarter]), odd[quarter]);
                // Takes out the 16 of the odd node; that of the even one is cut off.
                vmovn_u32(veorq_u32(bytes, vdupq_n_u32(16)))
            });
            let first = vmovn_u16(vcombine_u16(bytes[0], bytes[1]));
            let second = vmovn_u16(vcombine_u16(bytes[2], bytes[3]));
            vst1q_u8(target, vcombine_u8(first, second));
        }
    }

    #[inline(always)]
    unsafe fn pack_bytes([even, odd]: [[uint32x4_t; 4]; 2], target: *mut u8) {
        unsafe {
            for quarter in QUARTERS {
                let pairs = veorq_u32(even[quarter], vshlq_n_u32::<8>(odd[quarter]));
                // Takes out the 256 of the even node; that of the odd one is cut off.
                let pairs = vmovn_u32(veorq_u32(pairs, vdupq_n_u32(256)));
                vst1_u8(target.add(8 * quarter), vreinterpret_u8_u16(pairs));
            }
        }
    }

    #[inline(always)]
    unsafe fn unpack_bytes(source: *const u8) -> [[uint32x4_t; 4]; 2] {
        unsafe {
            let pairs = map_4!(QUARTERS, |quarter| {
                let pairs = vreinterpret_u16_u8(vld1_u8(source.add(8 * quarter)));
                vmovl_u16(pairs)
            });
            [
                map_4!(pairs, |pairs| vandq_u32(pairs, vdupq_n_u32(0xff))),
                map_4!(pairs, |pairs| vshrq_n_u32::<8>(pairs)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn gather(values: &[f32; 256], index: [uint32x4_t; 4]) -> Self {
        unsafe {
            Self(map_4!(index, |index| {
                let mut lanes = [0; 4];
                vst1q_u32(lanes.as_mut_ptr(), index);
                let numbers = map_4!(lanes, |index| values[index as usize & 0xff]);
                vld1q_f32(numbers.as_ptr())
            }))
        }
    }

    #[inline(always)]
    unsafe fn table<T: Element>(values: &[f32; 256], scale: f32) -> [uint8x16_t; 4] {
        unsafe {
            let scaled = map_4!(QUARTERS, |quarter| vmulq_n_f32(
                vld1q_f32(values.as_ptr().add(4 * quarter)),
                scale
            ));
            let halves = |[a, b, c, d]: [uint16x4_t; 4]| {
                let (first, second) = (
                    vreinterpretq_u8_u16(vcombine_u16(a, b)),
                    vreinterpretq_u8_u16(vcombine_u16(c, d)),
                );
                let (low, high) = (vuzp1q_u8(first, second), vuzp2q_u8(first, second));
                [low, high, low, high]
            };
            match T::DTYPE {
                Dtype::Bf16 => halves(map_4!(scaled, |values| vshrn_n_u32::<16>(round_to_bf16(
                    values
                )))),
                Dtype::F16 => halves(map_4!(scaled, |values| narrow_f16(values))),
                Dtype::F32 => {
                    let [a, b, c, d] = map_4!(scaled, |values| vreinterpretq_u8_f32(values));
                    let (even, even_later) = (vuzp1q_u8(a, b), vuzp1q_u8(c, d));
                    let (odd, odd_later) = (vuzp2q_u8(a, b), vuzp2q_u8(c, d));
                    [
                        vuzp1q_u8(even, even_later),
                        vuzp1q_u8(odd, odd_later),
                        vuzp2q_u8(even, even_later),
                        vuzp2q_u8(odd, odd_later),
                    ]
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn decode<T: Element, const STREAM: bool>(
        table: [uint8x16_t; 4],
        packed: *const u8,
        target: *mut T,
    ) {
        unsafe {
            let bytes = vld1q_u8(packed);
            let (high, low) = (vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(15)));
            let codes = [vzip1q_u8(high, low), vzip2q_u8(high, low)];
            for (half, codes) in codes.into_iter().enumerate() {
                let target = target.add(16 * half).cast();
                let plane = |byte: usize| vqtbl1q_u8(table[byte], codes);
                // These stores put the bytes of each number side by side.
                if T::DTYPE == Dtype::F32 {
                    vst4q_u8(target, uint8x16x4_t(plane(0), plane(1), plane(2), plane(3)));
                } else {
                    vst2q_u8(target, uint8x16x2_t(plane(0), plane(1)));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn fence() {}
}

/// The bits of a lane that are a `bf16` at an odd place.
const HIGH_HALF: u32 = 0xffff_0000;
/// The bit of a `bf16` in the high half of a lane that makes a NaN a quiet one.
const QUIET_NAN: u32 = 0x0040_0000;

/// `table[index]` for indices below 16.
///
/// # Safety
/// Needs NEON, as all below; 16 numbers at `table`.
#[inline(always)]
unsafe fn look_up_16(table: *const f32, index: [uint32x4_t; 4]) -> Neon {
    // SAFETY: the caller guarantees the feature and the numbers.
    unsafe {
        let bytes = uint8x16x4_t(
            vld1q_u8(table.cast()),
            vld1q_u8(table.add(4).cast()),
            vld1q_u8(table.add(8).cast()),
            vld1q_u8(table.add(12).cast()),
        );
        Neon(map_4!(index, |index| {
            // The four bytes of number `i` are 4i, 4i + 1, 4i + 2, 4i + 3.
            let places = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), index, 0x0404_0404);
            vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(places)))
        }))
    }
}

/// Rounds to nearest even; the `bf16` is the high half of each lane, the low half is rubbish.
#[inline(always)]
unsafe fn round_to_bf16(numbers: float32x4_t) -> uint32x4_t {
    // SAFETY: the caller guarantees the feature.
    unsafe {
        let bits = vreinterpretq_u32_f32(numbers);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        let quiet = vorrq_u32(bits, vdupq_n_u32(QUIET_NAN));
        vbslq_u32(vceqq_f32(numbers, numbers), rounded, quiet)
    }
}

/// Exact. The intrinsic is not stable in every compiler we support; the instruction is.
#[inline(always)]
unsafe fn widen_f16(numbers: uint16x4_t) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: the caller guarantees the feature; registers only.
    unsafe {
        asm!(
            "fcvtl {wide:v}.4s, {numbers:v}.4h",
            wide = lateout(vreg) wide,
            numbers = in(vreg) numbers,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    wide
}

/// Rounds to nearest even.
#[inline(always)]
unsafe fn narrow_f16(numbers: float32x4_t) -> uint16x4_t {
    let narrow: uint16x4_t;
    // SAFETY: the caller guarantees the feature; registers only.
    unsafe {
        asm!(
            "fcvtn {narrow:v}.4h, {numbers:v}.4s",
            narrow = lateout(vreg) narrow,
            numbers = in(vreg) numbers,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    narrow
}
