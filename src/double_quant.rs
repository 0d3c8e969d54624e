//! Double quantization (paper, section 3): the block scales, less their mean, in 8 bits, with one
//! single-precision scale for every 256 of them. 0.127 bits a parameter in place of 0.5.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::blockwise::{Coder, ScaleDecoder};
use crate::layout::{Layout, NESTED_BLOCK_SIZE, check_length};
use crate::sums::{LANES, add_rows, shift};
use crate::{Backend, Codebook, Error, Result, blockwise, team};

/// Scales that are summed as a unit: one warp's work on a GPU, four registers' on a CPU.
const CHUNK: usize = 1024;
/// Scales a thread takes at a time, and how many of them it shifts by the offset at a time.
const TASK: usize = 1 << 15;
const PIECE: usize = 1024;
const _: () = assert!(
    TASK.is_multiple_of(CHUNK)
        && TASK.is_multiple_of(PIECE)
        && PIECE.is_multiple_of(NESTED_BLOCK_SIZE.get())
);

/// The mean of a stream of scales, in an order of summation that does not depend on how the
/// stream is cut, on threads or on the device.
///
/// Within a chunk of 1024 scales, lane `l` of 32 adds scales `l`, `l + 32`, `l + 64` … in double
/// precision; the lanes are added in a binary tree (`l` and `l + 16`, then `l + 8`, …); the chunks
/// are added in order. The sum over the count is rounded once to single precision.
#[derive(Debug, Clone)]
pub struct MeanAccumulator {
    lanes: [f64; LANES],
    /// Scales in the chunk under way.
    filled: usize,
    sum: f64,
    count: u64,
}

impl Default for MeanAccumulator {
    fn default() -> Self {
        Self {
            lanes: [0.0; LANES],
            filled: 0,
            sum: 0.0,
            count: 0,
        }
    }
}

impl MeanAccumulator {
    /// Adds the next scales of the stream.
    pub fn add(&mut self, mut scales: &[f32]) {
        // Any gives the same sum.
        let backend = Backend::detect().unwrap_or(Backend::SCALAR);
        self.count += scales.len() as u64;
        while !scales.is_empty() {
            let (now, later) = scales.split_at(scales.len().min(CHUNK - self.filled));
            // One by one to the end of a row of lanes, then rows, then one by one.
            let to_row = (LANES - self.filled % LANES) % LANES;
            let (start, rows) = now.split_at(now.len().min(to_row));
            let (rows, rest) = rows.as_chunks();
            self.add_singly(start);
            add_rows(backend, &mut self.lanes, rows);
            self.filled += LANES * rows.len();
            self.add_singly(rest);
            if self.filled == CHUNK {
                self.sum += fold(self.lanes);
                self.lanes = [0.0; LANES];
                self.filled = 0;
            }
            scales = later;
        }
    }

    /// [`add`](Self::add) at the start of a stream, on the threads of [`team`].
    fn add_parallel(&mut self, scales: &[f32]) {
        let (chunks, rest) = scales.split_at(scales.len() - scales.len() % CHUNK);
        let mut sums = vec![0.0; chunks.len() / CHUNK];
        let tasks = chunks
            .chunks(TASK)
            .zip(sums.chunks_mut(TASK / CHUNK))
            .collect();
        team::each(tasks, |(chunks, sums)| {
            for (chunk, sum) in chunks.chunks_exact(CHUNK).zip(sums) {
                let mut one = Self::default();
                one.add(chunk);
                *sum = one.sum;
            }
        });
        self.sum = sums.iter().fold(self.sum, |sum, chunk| sum + chunk);
        self.count += chunks.len() as u64;
        self.add(rest);
    }

    fn add_singly(&mut self, scales: &[f32]) {
        for &scale in scales {
            self.lanes[self.filled % LANES] += f64::from(scale);
            self.filled += 1;
        }
    }

    /// The mean of what was added; 0 for nothing.
    #[must_use]
    // Rounding to single precision is what the format asks for; counts below 2^53 are exact.
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
    pub fn mean(&self) -> f32 {
        if self.count == 0 {
            return 0.0;
        }
        ((self.sum + fold(self.lanes)) / self.count as f64) as f32
    }
}

fn fold(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Quantizes `absmax` to 8-bit `codes` with one scale in `nested_absmax` for 256 of them, and
/// returns the offset: their mean.
///
/// # Errors
/// [`crate::Error::Length`] for buffers of another size; [`crate::Error::NonFinite`] for a scale
/// that is not finite; [`crate::Error::ScaleOverflow`] where 8 bits would round one to infinity.
pub fn quantize(absmax: &[f32], codes: &mut [u8], nested_absmax: &mut [f32]) -> Result<f32> {
    let mut mean = MeanAccumulator::default();
    if blockwise::is_small(absmax.len()) {
        mean.add(absmax);
    } else {
        mean.add_parallel(absmax);
    }
    quantize_with_offset(absmax, mean.mean(), codes, nested_absmax)?;
    Ok(mean.mean())
}

/// [`quantize`] for a part of a stream whose mean is known. All parts but the last hold a
/// multiple of 256 scales.
///
/// # Errors
/// As [`quantize`].
pub fn quantize_with_offset(
    absmax: &[f32],
    offset: f32,
    codes: &mut [u8],
    nested_absmax: &mut [f32],
) -> Result<()> {
    check_lengths(absmax.len(), codes.len(), nested_absmax.len())?;
    let backend = Backend::detect()?;
    let coder = Coder::new(backend, Codebook::dynamic_signed(), NESTED_BLOCK_SIZE);
    // Whether all was finite.
    let part = |absmax: &[f32], codes: &mut [u8], nested: &mut [f32]| {
        let mut shifted = [0.0; PIECE];
        let pieces = absmax
            .chunks(PIECE)
            .zip(codes.chunks_mut(PIECE))
            .zip(nested.chunks_mut(PIECE / NESTED_BLOCK_SIZE.get()));
        pieces.fold(true, |finite, ((absmax, codes), nested)| {
            let shifted = &mut shifted[..absmax.len()];
            shift(backend, absmax, offset, shifted);
            coder.encode(shifted, codes, nested) && finite
        })
    };
    let finite = if blockwise::is_small(absmax.len()) {
        part(absmax, codes, nested_absmax)
    } else {
        let finite = AtomicBool::new(true);
        let tasks = absmax
            .chunks(TASK)
            .zip(codes.chunks_mut(TASK))
            .zip(nested_absmax.chunks_mut(TASK / NESTED_BLOCK_SIZE.get()))
            .collect();
        team::each(tasks, |((absmax, codes), nested)| {
            if !part(absmax, codes, nested) {
                finite.store(false, Ordering::Relaxed);
            }
        });
        finite.into_inner()
    };
    if !finite {
        let mut shifted = absmax.iter().map(|scale| scale - offset).enumerate();
        if let Some((index, value)) = shifted.find(|(_, value)| !value.is_finite()) {
            let index = index as u64;
            return Err(Error::NonFinite { index, value });
        }
    }
    check_finite(codes, nested_absmax, offset)
}

fn check_lengths(scales: usize, codes: usize, nested: usize) -> Result<()> {
    let layout = Layout::new(scales as u64, NESTED_BLOCK_SIZE, 8);
    check_length("codes", layout.packed_bytes, codes)?;
    check_length("nested_absmax", layout.blocks, nested)
}

/// That no scale became infinite by being rounded up, which one next to the largest number can.
fn check_finite(codes: &[u8], nested_absmax: &[f32], offset: f32) -> Result<()> {
    if nested_absmax
        .iter()
        .all(|scale| (scale + offset.abs()).is_finite())
    {
        return Ok(());
    }
    let mut decoded = vec![0.0; codes.len()];
    dequantize(codes, nested_absmax, offset, &mut decoded)?;
    match decoded.iter().all(|scale| scale.is_finite()) {
        true => Ok(()),
        false => Err(Error::ScaleOverflow),
    }
}

/// The scales again: `map[code] * nested_absmax + offset`, each operation rounded to single
/// precision.
///
/// # Errors
/// [`crate::Error::Length`] for buffers of another size.
pub fn dequantize(
    codes: &[u8],
    nested_absmax: &[f32],
    offset: f32,
    absmax: &mut [f32],
) -> Result<()> {
    check_lengths(absmax.len(), codes.len(), nested_absmax.len())?;
    let decoder = ScaleDecoder::new(Backend::detect()?);
    let part = |codes: &[u8], nested: &[f32], absmax: &mut [f32]| {
        decoder.decode(codes, nested, offset, absmax);
    };
    if blockwise::is_small(absmax.len()) {
        part(codes, nested_absmax, absmax);
    } else {
        let tasks = absmax
            .chunks_mut(TASK)
            .zip(codes.chunks(TASK))
            .zip(nested_absmax.chunks(TASK / NESTED_BLOCK_SIZE.get()))
            .collect();
        team::each(tasks, |((absmax, codes), nested)| {
            part(codes, nested, absmax)
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_that_rounds_to_infinity_is_refused() {
        let mut scales = [f32::MAX; 100];
        let (mut codes, mut nested) = ([0; 100], [0.0]);
        assert!(
            quantize(&scales, &mut codes, &mut nested).is_ok(),
            "the mean is exact"
        );
        // The mean is 0.6 of the largest; the other 0.4 are 0.667 of a scale, rounded to 0.670.
        scales[..40].fill(0.0);
        let result = quantize(&scales, &mut codes, &mut nested);
        assert!(matches!(result, Err(Error::ScaleOverflow)), "{result:?}");
    }

    #[test]
    fn the_mean_does_not_depend_on_how_the_stream_is_cut() {
        let scales: Vec<f32> = (0..5000_u16).map(|i| 1.0 / (1.0 + f32::from(i))).collect();
        let mut whole = MeanAccumulator::default();
        whole.add(&scales);
        for cut in [1, 31, 255, 1024, 4999] {
            let mut parts = MeanAccumulator::default();
            scales.chunks(cut).for_each(|part| parts.add(part));
            assert_eq!(parts.mean().to_bits(), whole.mean().to_bits(), "cut {cut}");
        }
        let mut parallel = MeanAccumulator::default();
        parallel.add_parallel(&scales);
        assert_eq!(parallel.sum.to_bits(), whole.sum.to_bits());
        assert_eq!(parallel.mean().to_bits(), whole.mean().to_bits());
        let exact = scales.iter().map(|&s| f64::from(s)).sum::<f64>() / 5000.0;
        assert!((f64::from(whole.mean()) - exact).abs() <= exact * f64::from(f32::EPSILON));
        assert_eq!(MeanAccumulator::default().mean(), 0.0);
    }
}
