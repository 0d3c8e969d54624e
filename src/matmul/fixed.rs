//! `x W^T` for one or two rows of 16-bit numbers, in whole numbers: for processors that multiply
//! bytes faster than numbers in single precision (AVX-512 with VNNI and VBMI).
//!
//! A value of the codebook is a number of 15 bits, [`UNIT`] for 1.0 and with [`ZERO`] added, as two
//! unsigned bytes, the lower of 7 bits. Eight numbers of `x` that share a lane share a power of two,
//! of which they are up to 2^14 times as large, as two signed bytes. Of the four products of bytes
//! the least, low with low, is left out, but for its mean. What that and the shift by [`ZERO`] add
//! to a sum depends on `x` alone and is where sums begin. The scale of the block is applied to the
//! sum of a lane, in single precision, as ever.
//!
//! Numbers of `bf16` have 8 significant bits and are exact unless they are 64 times smaller than
//! the largest of their eight. Where the rounding of `x` or of a value would be seen beside that of
//! the weight in a dense product, to 8 bits for `bf16` and to 11 for `f16`, there is nothing here
//! ([`FixedRows::new`]), and the product is made in single precision. What is left out is less: 4096
//! columns of normal numbers come out as exact as in single precision, to the rounding of the
//! output, for `bf16`, and are off by a third of what a dense product is for `f16`.
//!
//! Floor for a step of 128 columns and one row of `x`: 4 look-ups of bytes, a shift, 6 products, and
//! 6 instructions for the scales: 17 on two ports, 8.5 cycles, where single precision takes 13. The
//! loop in C on two cores of Sapphire Rapids: 2.9 ns a step from the second-level cache (single
//! precision 4.0 to 4.2), and from memory 27 to 28 GB/s (25 to 26; a loop that only reads 30 to 31).
//! A product of 4096 x 4096 from memory took 0.34 ms where single precision took 0.37; with two rows
//! 0.44 and 0.48. Three rows are no faster so, and four are slower, as registers run out. Scales
//! decoded when the loop comes to them, and not all before it, made it no faster.
#![allow(unsafe_code)]
// Rows are counted where several arrays have a place for each.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::avx512::Avx512;
use super::kernel::Kernel;
use super::loops::{Steps, forward_in_streams};
use super::tile::Tile;
use crate::Codebook;

/// Rows of `x` up to which this is faster than single precision.
pub(super) const MOST_ROWS: usize = 2;

/// Bits of a low byte.
const LOW_BITS: u32 = 7;

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

/// A step of a row, lane by lane: bytes for the high nibbles of the codes, the even columns, and for
/// the low ones.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Step {
    high: [[i8; 64]; 2],
    low: [[i8; 64]; 2],
    /// Where the sum of products of high bytes begins, and that of products with a low one.
    high_start: [i32; LANES],
    low_start: [i32; LANES],
    /// What a sum is to be multiplied with.
    unit: [f32; LANES],
}

impl Step {
    const EMPTY: Self = Self {
        high: [[0; 64]; 2],
        low: [[0; 64]; 2],
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
    /// Of `x`, [rows, columns], for a product that may be off as one of numbers with such a
    /// `roundoff` is. Nothing where this would be less exact, and where the processor or the rows
    /// are not meant for it.
    pub(super) fn new(codebook: &Codebook, x: &[f32], rows: usize, roundoff: f32) -> Option<Self> {
        if rows > MOST_ROWS || x.is_empty() || !is_there() {
            return None;
        }
        let columns = x.len() / rows;
        let mut made = Self {
            steps: vec![Step::EMPTY; columns.div_ceil(STEP) * rows],
            rows,
            table: Table::of(codebook, roundoff)?,
        };
        let mean_low = made.table.mean_low();
        for (row, x) in x.chunks_exact(columns).enumerate() {
            let steps = made.steps.iter_mut().skip(row).step_by(rows);
            // SAFETY: the processor was asked.
            let loss = unsafe { fix(x, mean_low, steps) };
            if !loss.is_small(columns, roundoff) {
                return None;
            }
        }
        Some(made)
    }

    /// Sums [count, rows] of a tile's rows with those of `x`.
    pub(super) fn forward(&self, tile: Tile<'_>, sums: &mut [f32]) {
        // SAFETY: the processor was asked when this was made.
        unsafe {
            match self.rows {
                1 => forward::<1>(self, tile, sums),
                _ => forward::<MOST_ROWS>(self, tile, sums),
            }
        }
    }
}

/// Whether the processor has the features of the functions here.
fn is_there() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vnni")
}

/// What a row loses.
struct Loss {
    /// The sum of its magnitudes, and of what was rounded off, squared.
    magnitudes: f32,
    squares: f32,
}

impl Loss {
    /// Whether a row is off, in the root of the mean square, by less than half the roundoff of its
    /// mean magnitude: that is about what rounding the weight does.
    fn is_small(&self, columns: usize, roundoff: f32) -> bool {
        let mean = f64::from(self.magnitudes) / columns as f64;
        let off = (f64::from(self.squares) / columns as f64).sqrt();
        // Nothing is in a range or less than another if it is NaN.
        MAGNITUDES.contains(&mean) && off <= mean * f64::from(roundoff) / 2.0
    }
}

/// A row in fixed point, step by step.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn fix<'a>(x: &[f32], mean_low: i32, steps: impl Iterator<Item = &'a mut Step>) -> Loss {
    let (mut magnitudes, mut squares) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    let low_range = (1 << LOW_BITS) as f32;
    for (step, x) in steps.zip(x.chunks(STEP)) {
        let (mut high, mut low) = ([0_i8; STEP], [0_i8; STEP]);
        let mut units = [0.0_f32; STEP];
        for (first, x) in (0..STEP).step_by(LANES).zip(x.chunks(LANES)) {
            let there = ((1_u32 << x.len()) - 1) as __mmask16;
            // SAFETY: as many numbers are read as there are.
            let x = unsafe { _mm512_maskz_loadu_ps(there, x.as_ptr()) };
            let magnitude = _mm512_abs_ps(x);
            // The largest of eight, in all eight places.
            let mut most = magnitude;
            most = _mm512_max_ps(most, _mm512_permute_ps::<0b10_11_00_01>(most));
            most = _mm512_max_ps(most, _mm512_permute_ps::<0b01_00_11_10>(most));
            most = _mm512_max_ps(most, _mm512_shuffle_f32x4::<0b10_11_00_01>(most, most));
            // 2^-13 of the power of two below it, and what is 1 with that.
            let exponent = _mm512_srli_epi32::<23>(_mm512_castps_si512(most));
            let exponent = _mm512_max_epi32(exponent, _mm512_set1_epi32(32));
            let exponent = _mm512_min_epi32(exponent, _mm512_set1_epi32(254));
            let unit = _mm512_sub_epi32(exponent, _mm512_set1_epi32(13));
            let unit = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(unit));
            let inverse = _mm512_sub_epi32(_mm512_set1_epi32(254 + 13), exponent);
            let inverse = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(inverse));
            let number = _mm512_mul_ps(x, inverse);
            let whole = _mm512_cvtps_epi32(number);
            // Halves to even, so that low bytes are 0 in the mean.
            let rough = _mm512_mul_ps(number, _mm512_set1_ps(1.0 / low_range));
            let rough = _mm512_min_epi32(_mm512_cvtps_epi32(rough), _mm512_set1_epi32(127));
            let rest = _mm512_sub_epi32(whole, _mm512_slli_epi32::<LOW_BITS>(rough));
            // SAFETY: the arrays have the columns of a step.
            unsafe {
                _mm_storeu_si128(
                    high[first..].as_mut_ptr().cast(),
                    _mm512_cvtepi32_epi8(rough),
                );
                _mm_storeu_si128(low[first..].as_mut_ptr().cast(), _mm512_cvtepi32_epi8(rest));
                _mm512_storeu_ps(units[first..].as_mut_ptr(), unit);
            }
            let lost = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole), unit, x);
            magnitudes = _mm512_add_ps(magnitudes, magnitude);
            squares = _mm512_fmadd_ps(lost, lost, squares);
        }
        for pair in 0..STEP / 2 {
            for nibble in 0..2 {
                step.high[nibble][pair] = high[2 * pair + nibble];
                step.low[nibble][pair] = low[2 * pair + nibble];
            }
        }
        let eights = high.as_chunks::<8>().0.iter().zip(low.as_chunks::<8>().0);
        for (lane, (high, low)) in eights.enumerate() {
            let sum = |bytes: &[i8; 8]| bytes.iter().copied().map(i32::from).sum::<i32>();
            let (high, low) = (sum(high), sum(low));
            step.high_start[lane] = -(ZERO >> LOW_BITS) * high;
            step.low_start[lane] = ((mean_low * low) >> LOW_BITS) - (ZERO >> LOW_BITS) * low;
            step.unit[lane] = units[8 * lane] * (low_range / UNIT);
        }
    }
    Loss {
        magnitudes: _mm512_reduce_add_ps(magnitudes),
        squares: _mm512_reduce_add_ps(squares),
    }
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
            for r in 0..R {
                // The other bits are not looked at, those of the neighbouring nibbles.
                let nibbles = [_mm512_srli_epi32::<4>(codes[r]), codes[r]];
                let high = nibbles.map(|nibble| _mm512_permutexvar_epi8(nibble, self.high));
                let low = nibbles.map(|nibble| _mm512_permutexvar_epi8(nibble, self.low));
                for m in 0..M {
                    let x = &*self.x.add(column / STEP * M + m);
                    let mut most = _mm512_load_si512(x.high_start.as_ptr().cast());
                    let mut least = _mm512_load_si512(x.low_start.as_ptr().cast());
                    for n in 0..2 {
                        let x_high = _mm512_load_si512(x.high[n].as_ptr().cast());
                        let x_low = _mm512_load_si512(x.low[n].as_ptr().cast());
                        most = _mm512_dpbusd_epi32(most, high[n], x_high);
                        least = _mm512_dpbusd_epi32(least, low[n], x_high);
                        least = _mm512_dpbusd_epi32(least, high[n], x_low);
                    }
                    let sum = _mm512_add_epi32(_mm512_slli_epi32::<LOW_BITS>(most), least);
                    let scale = _mm512_mul_ps(scales[r], _mm512_load_ps(x.unit.as_ptr()));
                    totals[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[r][m]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codebook::Ties;

    const BRAIN: f32 = 1.0 / 512.0;
    const HALF: f32 = 1.0 / 4096.0;

    /// Numbers of 8 significant bits in turns of very different sizes, none of them near zero.
    fn even_numbers(count: usize) -> Vec<f32> {
        (0..count)
            .map(|i| (if i % 3 == 0 { -1.0 } else { 1.0 }) * (128 + i * 37 % 128) as f32 / 64.0)
            .collect()
    }

    fn is_fixed(codebook: &Codebook, x: &[f32], roundoff: f32) -> bool {
        FixedRows::new(codebook, x, 1, roundoff).is_some()
    }

    #[test]
    fn what_would_be_less_exact_is_left_to_single_precision() {
        if !is_there() {
            return;
        }
        let (nf4, x) = (Codebook::nf4(), even_numbers(4096));
        for codebook in [nf4, Codebook::fp4(), Codebook::int4()] {
            for roundoff in [BRAIN, HALF] {
                assert!(is_fixed(codebook, &x, roundoff), "{}", codebook.name());
            }
        }
        let with = |number| {
            let mut x = x.clone();
            x[1000] = number;
            x
        };
        for number in [0.0, 100.0, 1000.0] {
            assert!(is_fixed(nf4, &with(number), BRAIN), "{number}");
        }
        // Its seven neighbours would be rounded to whole thousands.
        for number in [1e7, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX] {
            assert!(!is_fixed(nf4, &with(number), BRAIN), "{number}");
        }
        for scale in [0.0, 1e-20, 1e20] {
            let x: Vec<f32> = x.iter().map(|number| number * scale).collect();
            assert!(!is_fixed(nf4, &x, BRAIN), "{scale}");
        }
        assert!(!is_fixed(nf4, &[], BRAIN));
        assert!(FixedRows::new(nf4, &x, MOST_ROWS + 1, BRAIN).is_none());
        let tiny = [(0, -1.0), (1, 1.0e-4), (2, 1.0)];
        let tiny = Codebook::from_map("tiny", &tiny, Ties::Lower).unwrap();
        assert!(!is_fixed(&tiny, &x, BRAIN));
    }

    #[test]
    fn numbers_are_their_two_bytes() {
        if !is_there() {
            return;
        }
        // Cut short, and with the largest that there are.
        let mut x = even_numbers(160);
        x[130] = -255.0 / 128.0; // halfway between two high bytes
        x[131] = 255.0 / 128.0;
        let fixed = FixedRows::new(Codebook::nf4(), &x, 1, BRAIN).unwrap();
        assert_eq!(fixed.steps.len(), 2);
        for (index, step) in fixed.steps.iter().enumerate() {
            for lane in 0..LANES {
                let (mut high_sum, mut low_sum) = (0, 0);
                for place in 0..8 {
                    let (nibble, byte) = (place % 2, 4 * lane + place / 2);
                    let high = i32::from(step.high[nibble][byte]);
                    let low = i32::from(step.low[nibble][byte]);
                    (high_sum, low_sum) = (high_sum + high, low_sum + low);
                    let column = index * STEP + 8 * lane + place;
                    let whole = (high << LOW_BITS) + low;
                    // A power of two, but for the rounding of 128 / UNIT.
                    let unit = (step.unit[lane] * UNIT / 128.0).log2().round().exp2();
                    let number = whole as f32 * unit;
                    assert_eq!(number, x.get(column).copied().unwrap_or(0.0), "{column}");
                }
                assert_eq!(step.high_start[lane], -128 * high_sum);
                let mean = (fixed.table.mean_low() * low_sum) >> LOW_BITS;
                assert_eq!(step.low_start[lane], mean - 128 * low_sum);
            }
        }
        for (code, &value) in Codebook::nf4().values()[..16].iter().enumerate() {
            let whole =
                (i32::from(fixed.table.high[code]) << LOW_BITS) + i32::from(fixed.table.low[code]);
            assert!(
                ((whole - ZERO) as f32 - value * UNIT).abs() <= 0.5,
                "{code}"
            );
            assert_eq!(fixed.table.high[code + 48], fixed.table.high[code]);
        }
    }
}
