//! `x W^T` for few rows of 16-bit numbers, in whole numbers: for processors that multiply bytes
//! faster than numbers in single precision (AVX-512 with VNNI and VBMI).
//!
//! A value of the codebook is a number of 15 bits, `UNIT` for 1.0 and with [`ZERO`] added, as two
//! unsigned bytes, the lower of 7 bits. Eight numbers of `x` that share a lane share a power of two,
//! of which they are up to 2^14 times as large, as two signed bytes. Of the four products of bytes
//! the least, low with low, is left out, but for its mean. What that and the shift by [`ZERO`] add
//! to a sum depends on `x` alone and is where sums begin. The scale of the block is applied to the
//! sum of a lane, in single precision, as ever.
//!
//! Numbers of `bf16` have 8 significant bits and are exact unless they are 64 times smaller than
//! the largest of their eight. Where the rounding of `x` or of a value would be seen beside that of
//! the weight in a dense product, to 8 bits for `bf16` and to 11 for `f16`, there is nothing here
//! ([`FixedRows::new`]). What is left out is a tenth of that for `bf16` and half for `f16`.
//!
//! Floor for a step of 128 columns and one row of `x`: 4 look-ups of bytes, a shift, 6 products, and
//! 6 instructions for the scales: 17 on two ports, 8.5 cycles, where single precision takes 13.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::avx512::Avx512;
use super::kernel::Kernel;
use super::loops::{Steps, forward_in_streams};
use super::tile::Tile;
use crate::Codebook;

/// Rows of `x` up to which this is faster than single precision.
pub(super) const MOST_ROWS: usize = 2;

/// Bits of a low byte.
const LOW_BITS: i32 = 7;

/// What the value 1.0 is: less than [`ZERO`], and a multiple of 192, so that the values of FP4 are
/// exact.
const UNIT: f32 = 16320.0;

/// What the value 0.0 is: a number whose low byte is 0.
const ZERO: i32 = 128 << LOW_BITS;

/// Means of magnitudes within which nothing here overflows or vanishes.
const MAGNITUDES: std::ops::Range<f64> = 1e-15..1e15;

const LANES: usize = 16;
const STEP: usize = <Avx512 as Kernel>::STEP;

/// A codebook's values in bytes, four times over, as a look-up goes by six bits.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Table {
    high: [u8; 64],
    low: [u8; 64],
}

impl Table {
    /// Nothing for a codebook with a value that is off by more than a part of itself.
    fn of(codebook: &Codebook, tolerance: f32) -> Option<Self> {
        let mut table = Self {
            high: [0; 64],
            low: [0; 64],
        };
        for (code, &value) in codebook.values()[..16].iter().enumerate() {
            let whole = (value * UNIT).round();
            let is_near = (whole / UNIT - value).abs() <= value.abs() * tolerance;
            if !is_near {
                return None; // NaN, too, which codes without a value have
            }
            let whole = whole as i32 + ZERO;
            for copy in (code..64).step_by(16) {
                table.high[copy] = (whole >> LOW_BITS) as u8;
                table.low[copy] = (whole & ((1 << LOW_BITS) - 1)) as u8;
            }
        }
        Some(table)
    }

    /// The mean of low bytes.
    fn mean_low(&self) -> i32 {
        self.low.iter().copied().map(i32::from).sum::<i32>() / 64
    }
}

/// A step of a row: a byte for each nibble of the codes, first for all low nibbles.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Step {
    high: [[u32; LANES]; 2],
    low: [[u32; LANES]; 2],
    /// Where the sum of products of high bytes begins, and that of products with a low one.
    high_start: [i32; LANES],
    low_start: [i32; LANES],
    /// What a sum is to be multiplied with.
    unit: [f32; LANES],
}

impl Step {
    const EMPTY: Self = Self {
        high: [[0; LANES]; 2],
        low: [[0; LANES]; 2],
        high_start: [0; LANES],
        low_start: [0; LANES],
        unit: [0.0; LANES],
    };
}

/// Rows of `x` and a codebook in fixed point, for a processor that can multiply them.
pub(super) struct FixedRows {
    /// [steps, rows]
    steps: Vec<Step>,
    rows: usize,
    table: Table,
}

impl FixedRows {
    /// Of numbers in the order of [`Avx512`], [steps, rows, columns of a step], for a product that
    /// may be off as one of numbers with such a `roundoff` is. Nothing where this would be less
    /// exact, and where the processor or the rows are not meant for it.
    pub(super) fn new(codebook: &Codebook, x: &[f32], rows: usize, roundoff: f32) -> Option<Self> {
        let is_there = is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512bw");
        if !is_there || rows > MOST_ROWS {
            return None;
        }
        let mut made = Self {
            steps: vec![Step::EMPTY; x.len() / STEP],
            rows,
            table: Table::of(codebook, roundoff)?,
        };
        let mean_low = made.table.mean_low();
        let mut losses = vec![Loss::default(); rows];
        let (steps, numbers) = (made.steps.chunks_mut(rows), x.chunks_exact(STEP * rows));
        for (steps, x) in steps.zip(numbers) {
            for ((step, x), loss) in steps.iter_mut().zip(x.chunks_exact(STEP)).zip(&mut losses) {
                // SAFETY: the processor was asked.
                unsafe { fix(x, mean_low, step, loss) };
            }
        }
        losses
            .iter()
            .all(|loss| loss.is_small(roundoff))
            .then_some(made)
    }

    /// Sums [count, rows] of a tile's rows with those of `x`.
    pub(super) fn forward(&self, tile: Tile<'_>, sums: &mut [f32]) {
        // SAFETY: the processor was asked when this was made.
        unsafe {
            match self.rows {
                1 => forward::<1>(self, tile, sums),
                _ => forward::<2>(self, tile, sums),
            }
        }
    }
}

/// What a row loses, lane by lane.
#[derive(Clone, Copy, Default)]
struct Loss {
    magnitudes: [f32; LANES],
    squares: [f32; LANES],
    steps: usize,
}

impl Loss {
    /// Whether a row is off, in the root of the mean square, by less than half the roundoff of its
    /// mean magnitude: that is about what rounding the weight does.
    fn is_small(&self, roundoff: f32) -> bool {
        let sum = |lanes: &[f32]| lanes.iter().copied().map(f64::from).sum::<f64>();
        let columns = (self.steps * STEP) as f64;
        let mean = sum(&self.magnitudes) / columns;
        let square = sum(&self.squares) / columns;
        // Nothing is in a range or less than another if it is NaN.
        MAGNITUDES.contains(&mean) && square.sqrt() <= mean * f64::from(roundoff) / 2.0
    }
}

/// Rounds to a whole number by what is added, since the last bit of that sum is 1.
fn round(number: f32) -> i32 {
    const SUM: f32 = 12_582_912.0;
    (number + SUM).to_bits() as i32 - SUM.to_bits() as i32
}

/// A step in fixed point.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
fn fix(x: &[f32], mean_low: i32, step: &mut Step, loss: &mut Loss) {
    let mut most = [0.0_f32; LANES];
    for part in x.chunks_exact(LANES) {
        for lane in 0..LANES {
            let magnitude = part[lane].abs();
            most[lane] = most[lane].max(magnitude);
            loss.magnitudes[lane] += magnitude;
        }
    }
    let (mut unit, mut inverse) = ([0.0; LANES], [0.0; LANES]);
    for lane in 0..LANES {
        // 2^-13 of the power of two below the largest, and what is 1 with it.
        let exponent = (most[lane].to_bits() >> 23).clamp(32, 254);
        unit[lane] = f32::from_bits((exponent - 13) << 23);
        inverse[lane] = f32::from_bits((254 + 13 - exponent) << 23);
    }
    *step = Step::EMPTY;
    let mut sum_low = [0; LANES];
    for (index, part) in x.chunks_exact(LANES).enumerate() {
        let (nibble, byte) = (index % 2, index / 2);
        for lane in 0..LANES {
            let number = part[lane] * inverse[lane];
            let whole = round(number);
            // Halves to even, so that low bytes are 0 in the mean.
            let high = round(number / (1 << LOW_BITS) as f32).min(127);
            let low = whole - (high << LOW_BITS);
            step.high[nibble][lane] |= ((high & 0xff) as u32) << (8 * byte);
            step.low[nibble][lane] |= ((low & 0xff) as u32) << (8 * byte);
            step.high_start[lane] -= (ZERO >> LOW_BITS) * high;
            sum_low[lane] += low;
            let lost = part[lane] - whole as f32 * unit[lane];
            loss.squares[lane] += lost * lost;
        }
    }
    for lane in 0..LANES {
        let left_out = (mean_low * sum_low[lane]) >> LOW_BITS;
        step.low_start[lane] = left_out - (ZERO >> LOW_BITS) * sum_low[lane];
        step.unit[lane] = unit[lane] * ((1 << LOW_BITS) as f32 / UNIT);
    }
    loss.steps += 1;
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn forward<const M: usize>(x: &FixedRows, tile: Tile<'_>, sums: &mut [f32]) {
    assert!(x.steps.len() == tile.matrix.in_features.div_ceil(STEP) * M);
    // SAFETY: this function has the features; x has all steps.
    unsafe {
        let steps = Fixed {
            high: _mm512_load_si512(x.table.high.as_ptr().cast()),
            low: _mm512_load_si512(x.table.low.as_ptr().cast()),
            x: x.steps.as_ptr(),
        };
        forward_in_streams::<Avx512, 4, M>(tile, &steps, sums);
    }
}

/// Steps in fixed point.
struct Fixed {
    high: __m512i,
    low: __m512i,
    x: *const Step,
}

impl<const R: usize, const M: usize> Steps<Avx512, R, M> for Fixed {
    #[inline(always)]
    unsafe fn add(
        &self,
        column: usize,
        codes: [__m512i; R],
        scales: [__m512; R],
        totals: &mut [[__m512; M]; R],
    ) {
        // SAFETY: the caller answers for the features and the step; it is aligned by its type.
        unsafe {
            let load = |lanes: *const u32| _mm512_load_si512(lanes.cast());
            for r in 0..R {
                // The other bits are not looked at, those of the neighbouring nibbles.
                let nibbles = [codes[r], _mm512_srli_epi32::<4>(codes[r])];
                let high = nibbles.map(|nibble| _mm512_permutexvar_epi8(nibble, self.high));
                let low = nibbles.map(|nibble| _mm512_permutexvar_epi8(nibble, self.low));
                for m in 0..M {
                    let x = &*self.x.add(column / STEP * M + m);
                    let mut most = load(x.high_start.as_ptr().cast());
                    let mut least = load(x.low_start.as_ptr().cast());
                    for n in 0..2 {
                        let x_high = load(x.high[n].as_ptr());
                        most = _mm512_dpbusd_epi32(most, high[n], x_high);
                        least = _mm512_dpbusd_epi32(least, low[n], x_high);
                        least = _mm512_dpbusd_epi32(least, high[n], load(x.low[n].as_ptr()));
                    }
                    let sum =
                        _mm512_add_epi32(_mm512_slli_epi32::<{ LOW_BITS as u32 }>(most), least);
                    let scale = _mm512_mul_ps(scales[r], _mm512_load_ps(x.unit.as_ptr()));
                    totals[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[r][m]);
                }
            }
        }
    }
}
