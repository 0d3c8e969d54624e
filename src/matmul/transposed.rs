//! `y W`: it contracts over the rows of the weight, each of which adds to all sums.
//!
//! Threads take runs of rows, so that each reads the weight in order, and have sums of their own,
//! which are added at the end. The runs depend on the shape alone, and with them the order of
//! additions.

use super::choice::Kernel;
use super::matrix::{DecodedRows, PackedMatrix, RowScales};
use super::operand::Aligned;
use super::tile::{TILE_ROWS, Tile};
use super::{is_small, scalar};
use crate::blockwise::convert;
use crate::layout::check_length;
use crate::{Backend, Element, Result, team};

/// Rows of `y` at a time: as many factors and sums as registers hold.
const GROUP: usize = 8;

/// Runs of rows, and so threads that can work: sums of more would be more memory than the weight.
const RUNS: usize = 16;

/// Fewer rows than these are not worth sums of their own.
const SHORTEST_RUN: usize = 4 * TILE_ROWS;

/// Rows of `y` from which on the tiles of AMX are faster than the loops of AVX-512: 4096 x 4096,
/// two cores, 1.1 ms for four rows without them and 2.0 for eight; 2.0 for up to 16 with them.
#[cfg(target_arch = "x86_64")]
const FEWEST_FOR_TILES: usize = 8;

/// `y W` into `output`, [rows, in]; `y` is [rows, out].
///
/// # Errors
/// [`crate::Error::Length`] where `y` or `output` do not have the matrix's sizes;
/// [`crate::Error::Backend`] where the environment names an instruction set that is not there.
pub fn multiply_transposed<T: Element>(
    y: &[T],
    matrix: &PackedMatrix<'_>,
    output: &mut [T],
) -> Result<()> {
    multiply_transposed_with(Backend::detect()?, y, matrix, output)
}

/// [`multiply_transposed`] with the backend of your choice.
///
/// # Errors
/// As [`multiply_transposed`].
pub fn multiply_transposed_with<T: Element>(
    backend: Backend,
    y: &[T],
    matrix: &PackedMatrix<'_>,
    output: &mut [T],
) -> Result<()> {
    let (outs, ins) = (matrix.out_features, matrix.in_features);
    let rows = y
        .len()
        .checked_div(outs)
        .unwrap_or_else(|| output.len().checked_div(ins).unwrap_or(0));
    check_length("y", (rows * outs) as u64, y.len())?;
    check_length("output", (rows * ins) as u64, output.len())?;
    if output.is_empty() {
        return Ok(());
    }
    if is_small(rows, matrix) {
        team::alone(|| multiply_checked(backend, y, rows, matrix, output));
    } else {
        multiply_checked(backend, y, rows, matrix, output);
    }
    Ok(())
}

/// [`multiply_transposed`] with sizes that agree.
fn multiply_checked<T: Element>(
    backend: Backend,
    y: &[T],
    rows: usize,
    matrix: &PackedMatrix<'_>,
    output: &mut [T],
) {
    let (outs, ins) = (matrix.out_features, matrix.in_features);
    #[cfg(target_arch = "x86_64")]
    if super::takes_tiles(backend, matrix)
        && rows >= FEWEST_FOR_TILES
        && let (Some(y), Some(output)) = (T::as_bf16(y), T::as_bf16_mut(output))
    {
        super::amx::multiply_transposed(backend, y, matrix, output);
        return;
    }
    let kernel = Kernel::choose::<T>(backend);
    for (group, output) in output.chunks_mut(GROUP * ins).enumerate() {
        let first = group * GROUP * outs;
        let y = &y[first..first + output.len() / ins * outs];
        multiply_group(kernel, backend, y, matrix, output);
    }
}

/// Up to [`GROUP`] rows.
fn multiply_group<T: Element>(
    kernel: Kernel,
    backend: Backend,
    y: &[T],
    matrix: &PackedMatrix<'_>,
    output: &mut [T],
) {
    let (outs, ins) = (matrix.out_features, matrix.in_features);
    let rows = output.len() / ins;
    let fused = matrix.is_regular() && !kernel.is_scalar();
    // The place of each column of a step, and columns filled up to whole steps.
    let mut places = vec![0; if fused { kernel.order().len() } else { 1 }];
    for (place, column) in kernel.order().into_iter().enumerate().filter(|_| fused) {
        places[usize::from(column)] = place;
    }
    let step = places.len();
    let length = ins.next_multiple_of(step) * rows;
    let run_rows = outs
        .div_ceil(RUNS)
        .next_multiple_of(TILE_ROWS)
        .max(SHORTEST_RUN);
    let mut numbers = vec![0.0_f32; y.len()];
    convert(backend, y, &mut numbers);
    let y = &numbers[..];
    let scales = RowScales::new(backend, matrix);
    let decoder = (!fused && !kernel.is_scalar()).then(|| DecodedRows::new(backend, matrix));
    let mut sums = Aligned::new(length * outs.div_ceil(run_rows).max(1));
    let run = |(index, sums): (usize, &mut [f32])| {
        let (mut decoded, mut row) = (scales.buffer(TILE_ROWS), Vec::new());
        let rows_of_run = index * run_rows..outs.min((index + 1) * run_rows);
        for first in rows_of_run.clone().step_by(TILE_ROWS) {
            let count = TILE_ROWS.min(rows_of_run.end - first);
            let scales = scales.decode(first, count, &mut decoded);
            if fused {
                let tile = Tile::new(matrix, scales, first, count, count);
                kernel.transposed(tile, rows, &y[first..], outs, sums);
            } else if let Some(decoder) = &decoder {
                for index in first..first + count {
                    let row = decoder.decode(scales, first, index, &mut row);
                    kernel.spread(row, y[index..].iter().step_by(outs).copied(), sums);
                }
            } else {
                scalar::transposed(y, matrix, scales, first, count, sums);
            }
        }
    };
    let runs = sums.numbers_mut().chunks_mut(length).enumerate();
    team::each(runs.collect(), run);
    let sums = sums.numbers();
    let finish = |(row, output): (usize, &mut [T])| {
        let mut total = vec![0.0_f32; ins.next_multiple_of(step)];
        for sums in sums.chunks_exact(length) {
            if fused {
                let steps = sums.chunks_exact(step).skip(row).step_by(rows);
                for (total, sums) in total.chunks_exact_mut(step).zip(steps) {
                    for (total, &place) in total.iter_mut().zip(&places) {
                        *total += sums[place];
                    }
                }
            } else {
                for (total, sum) in total.iter_mut().zip(&sums[row * ins..]) {
                    *total += sum;
                }
            }
        }
        convert(backend, &total[..ins], output);
    };
    team::each(output.chunks_mut(ins).enumerate().collect(), finish);
}
