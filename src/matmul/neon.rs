//! NEON: the sixteen values as planes of bytes, looked up sixteen codes at a time.
//!
//! A register holds 16 bytes of codes, 32 columns; a part is the sixteen low or high nibbles. For
//! the values in single precision a part is 4 look-ups, 8 interleavings of two registers, and 4
//! multiplications a row of `x`; rounded to `bf16` ([`Brain`]) it is 2 look-ups and 6.
//! Only emulators have run this so far: nothing here has been timed.
#![allow(unsafe_code)]

use std::arch::aarch64::*;
use std::arch::asm;

use super::kernel::{Kernel, entry_points};
use super::loops;
use super::tile::Tile;

/// The values in single precision.
pub(super) type Single = Neon<false>;
/// The values rounded to `bf16`.
pub(super) type Brain = Neon<true>;

pub(super) struct Neon<const BRAIN: bool>;

pub(super) mod single {
    use super::*;
    entry_points!(Single, "neon", 8, {
        1 => (2, false), 2 => (2, false), 3 => (2, false), 4 => (2, false),
        5 => (1, false), 6 => (1, true), 7 => (1, true), 8 => (1, true)
    }, {
        1 => (2, false), 2 => (2, false), 3 => (2, true), 4 => (2, true),
        5 => (1, true), 6 => (1, true), 7 => (1, true), 8 => (1, true)
    });
}

pub(super) mod brain {
    use super::*;
    entry_points!(Brain, "neon", 8, {
        1 => (2, false), 2 => (2, false), 3 => (2, false), 4 => (2, false),
        5 => (1, false), 6 => (1, true), 7 => (1, true), 8 => (1, true)
    }, {
        1 => (2, false), 2 => (2, false), 3 => (2, true), 4 => (2, true),
        5 => (1, true), 6 => (1, true), 7 => (1, true), 8 => (1, true)
    });
}

// SAFETY (of the whole implementation): callers guarantee the features and good pointers, as the
// trait says; no load or store needs alignment.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const BRAIN: bool> Kernel for Neon<BRAIN> {
    type Codes = uint8x16_t;
    /// From the highest byte of a number to the lowest; the last two are not used for `bf16`.
    type Table = [uint8x16_t; 4];
    type Values = [float32x4_t; 4];
    type Sum = float32x4_t;
    type Lanes = ();
    const STEP: usize = 32;
    const PARTS: usize = 2;

    /// The first part is the low nibbles, which are the odd columns.
    fn column(place: usize) -> usize {
        2 * (place % 16) + (1 - place / 16)
    }

    #[inline(always)]
    unsafe fn table(values: &[f32; 256]) -> [uint8x16_t; 4] {
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
            [
                vld1q_u8(planes[0].as_ptr()),
                vld1q_u8(planes[1].as_ptr()),
                vld1q_u8(planes[2].as_ptr()),
                vld1q_u8(planes[3].as_ptr()),
            ]
        }
    }

    #[inline(always)]
    unsafe fn codes(at: *const u8, _columns: usize) -> uint8x16_t {
        unsafe { vld1q_u8(at) }
    }

    #[inline(always)]
    unsafe fn values(table: [uint8x16_t; 4], codes: uint8x16_t) -> [float32x4_t; 4] {
        unsafe {
            let codes = vandq_u8(codes, vdupq_n_u8(15));
            let (a, b) = (vqtbl1q_u8(table[0], codes), vqtbl1q_u8(table[1], codes));
            let upper = [
                vreinterpretq_u16_u8(vzip1q_u8(b, a)),
                vreinterpretq_u16_u8(vzip2q_u8(b, a)),
            ];
            let lower = if BRAIN {
                [vdupq_n_u16(0); 2]
            } else {
                let (c, d) = (vqtbl1q_u8(table[2], codes), vqtbl1q_u8(table[3], codes));
                [
                    vreinterpretq_u16_u8(vzip1q_u8(d, c)),
                    vreinterpretq_u16_u8(vzip2q_u8(d, c)),
                ]
            };
            [
                vreinterpretq_f32_u16(vzip1q_u16(lower[0], upper[0])),
                vreinterpretq_f32_u16(vzip2q_u16(lower[0], upper[0])),
                vreinterpretq_f32_u16(vzip1q_u16(lower[1], upper[1])),
                vreinterpretq_f32_u16(vzip2q_u16(lower[1], upper[1])),
            ]
        }
    }

    #[inline(always)]
    unsafe fn next(codes: uint8x16_t) -> uint8x16_t {
        unsafe { vshrq_n_u8::<4>(codes) }
    }

    #[inline(always)]
    unsafe fn lanes(_block_size: usize, _columns: usize) {}

    #[inline(always)]
    unsafe fn scale(at: *const f32, (): ()) -> float32x4_t {
        unsafe { vld1q_dup_f32(at) }
    }

    #[inline(always)]
    unsafe fn splat(number: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(number) }
    }

    #[inline(always)]
    unsafe fn multiply(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    unsafe fn add_product(sum: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(sum, a, b) }
    }

    #[inline(always)]
    unsafe fn total(sum: float32x4_t) -> f32 {
        unsafe { vaddvq_f32(sum) }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> [float32x4_t; 4] {
        unsafe {
            [
                vld1q_f32(at),
                vld1q_f32(at.add(4)),
                vld1q_f32(at.add(8)),
                vld1q_f32(at.add(12)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn store(values: [float32x4_t; 4], at: *mut f32) {
        unsafe {
            vst1q_f32(at, values[0]);
            vst1q_f32(at.add(4), values[1]);
            vst1q_f32(at.add(8), values[2]);
            vst1q_f32(at.add(12), values[3]);
        }
    }

    #[inline(always)]
    unsafe fn scaled(values: [float32x4_t; 4], scale: float32x4_t) -> [float32x4_t; 4] {
        unsafe {
            [
                vmulq_f32(values[0], scale),
                vmulq_f32(values[1], scale),
                vmulq_f32(values[2], scale),
                vmulq_f32(values[3], scale),
            ]
        }
    }

    #[inline(always)]
    unsafe fn dot(sum: float32x4_t, values: [float32x4_t; 4], x: [float32x4_t; 4]) -> float32x4_t {
        unsafe {
            let sum = vfmaq_f32(sum, values[0], x[0]);
            let sum = vfmaq_f32(sum, values[1], x[1]);
            let sum = vfmaq_f32(sum, values[2], x[2]);
            vfmaq_f32(sum, values[3], x[3])
        }
    }

    #[inline(always)]
    unsafe fn add_scaled(
        sums: [float32x4_t; 4],
        values: [float32x4_t; 4],
        factor: float32x4_t,
    ) -> [float32x4_t; 4] {
        unsafe {
            [
                vfmaq_f32(sums[0], values[0], factor),
                vfmaq_f32(sums[1], values[1], factor),
                vfmaq_f32(sums[2], values[2], factor),
                vfmaq_f32(sums[3], values[3], factor),
            ]
        }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // The intrinsic is not in the stable language.
        unsafe {
            asm!("prfm pldl1keep, [{0}]", in(reg) address, options(nostack, preserves_flags, readonly));
        }
    }
}
