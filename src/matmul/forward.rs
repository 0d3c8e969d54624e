//! `x W^T`: threads take tiles of rows of the weight.

use super::choice::Kernel;
use super::loops::MOST_ROWS_OF_STREAMS;
use super::matrix::{DecodedRows, PackedMatrix, RowScales};
use super::operand::{self, Aligned};
use super::tile::{MOST_TASK_ROWS, TILE_ROWS, Tile};
use super::{is_small, scalar};
use crate::blockwise::convert;
use crate::layout::check_length;
use crate::{Backend, Element, Result, team};

/// Rows of `x` from which on the tiles of AMX are faster than the loops of AVX-512: 4096 x 4096,
/// two cores, 0.56 ms for three rows and 0.70 for four without them; 0.62 for four with them.
#[cfg(target_arch = "x86_64")]
const FEWEST_FOR_TILES: usize = 4;

/// `x W^T + bias` into `output`, [rows, out].
///
/// # Errors
/// [`crate::Error::Length`] where `x`, `bias` or `output` do not have the matrix's sizes;
/// [`crate::Error::Backend`] where the environment names an instruction set that is not there.
pub fn multiply<T: Element>(
    x: &[T],
    matrix: &PackedMatrix<'_>,
    bias: Option<&[T]>,
    output: &mut [T],
) -> Result<()> {
    multiply_with(Backend::detect()?, x, matrix, bias, output)
}

/// [`multiply`] with the backend of your choice.
///
/// # Errors
/// As [`multiply`].
pub fn multiply_with<T: Element>(
    backend: Backend,
    x: &[T],
    matrix: &PackedMatrix<'_>,
    bias: Option<&[T]>,
    output: &mut [T],
) -> Result<()> {
    let (outs, ins) = (matrix.out_features, matrix.in_features);
    let rows = x
        .len()
        .checked_div(ins)
        .unwrap_or_else(|| output.len().checked_div(outs).unwrap_or(0));
    check_length("x", (rows * ins) as u64, x.len())?;
    check_length("output", (rows * outs) as u64, output.len())?;
    if let Some(bias) = bias {
        check_length("bias", outs as u64, bias.len())?;
    }
    if output.is_empty() {
        return Ok(());
    }
    if is_small(rows, matrix) {
        team::alone(|| multiply_checked(backend, x, rows, matrix, bias, output));
    } else {
        multiply_checked(backend, x, rows, matrix, bias, output);
    }
    Ok(())
}

/// [`multiply`] with sizes that agree.
fn multiply_checked<T: Element>(
    backend: Backend,
    x: &[T],
    rows: usize,
    matrix: &PackedMatrix<'_>,
    bias: Option<&[T]>,
    output: &mut [T],
) {
    let outs = matrix.out_features;
    #[cfg(target_arch = "x86_64")]
    if super::takes_tiles(backend, matrix)
        && rows >= FEWEST_FOR_TILES
        && let (Some(x), Some(output)) = (T::as_bf16(x), T::as_bf16_mut(output))
    {
        super::amx::multiply(backend, x, matrix, bias.and_then(T::as_bf16), output);
        return;
    }
    let ins = matrix.in_features;
    let bias: Vec<f32> = bias
        .unwrap_or_default()
        .iter()
        .map(|number| number.to_f32())
        .collect();
    let kernel = Kernel::choose::<T>(backend);
    // Rows of x in even groups that the accumulators of a kernel hold.
    let group_rows = rows.div_ceil(rows.div_ceil(kernel.most_rows()));
    for (group, output) in output.chunks_mut(group_rows * outs).enumerate() {
        let first = group * group_rows * ins;
        let x = &x[first..first + output.len() / outs * ins];
        multiply_group(kernel, backend, x, matrix, &bias, output);
    }
}

/// As many rows as the kernel takes.
fn multiply_group<T: Element>(
    kernel: Kernel,
    backend: Backend,
    x: &[T],
    matrix: &PackedMatrix<'_>,
    bias: &[f32],
    output: &mut [T],
) {
    let outs = matrix.out_features;
    let rows = output.len() / outs;
    let fused = matrix.is_regular() && !kernel.is_scalar();
    let mut numbers = Aligned::new(x.len());
    convert(backend, x, numbers.numbers_mut());
    #[cfg(target_arch = "x86_64")]
    let fixed = fused
        .then(|| kernel.fixed::<T>(matrix.codebook, numbers.numbers(), rows))
        .flatten();
    #[cfg(not(target_arch = "x86_64"))]
    let fixed: Option<()> = None;
    if fused && fixed.is_none() {
        numbers = operand::arrange(kernel, numbers.numbers(), rows);
    }
    let x = numbers.numbers();
    let scales = RowScales::new(backend, matrix).nearly(fixed.is_some());
    let decoder = (!fused && !kernel.is_scalar()).then(|| DecodedRows::new(backend, matrix));
    // Written with the rows of the weight outermost, as threads take them.
    let mut columns = vec![0.0_f32; rows * outs];
    // Several tasks a thread, so that none waits long for the last; several tiles a task, whose
    // scales are decoded together: those begin with a whole block of scales.
    let share = outs
        .div_ceil(4 * team::threads())
        .next_multiple_of(TILE_ROWS);
    let task_rows = share.min(MOST_TASK_ROWS);
    let tile_rows = if rows <= MOST_ROWS_OF_STREAMS {
        task_rows
    } else {
        TILE_ROWS
    };
    let tasks = columns.chunks_mut(task_rows * rows).enumerate().collect();
    // Where a thread is likely to go on; the first tasks have nobody who asked for their scales.
    let onward = team::threads().min(outs.div_ceil(task_rows)) * task_rows;
    team::each(tasks, |(index, sums): (usize, &mut [f32])| {
        let (mut decoded, mut row) = (scales.buffer(task_rows), Vec::new());
        let first = index * task_rows;
        if fused {
            kernel.ask(scales.memory(first + onward, task_rows));
        }
        let scales = scales.decode(first, sums.len() / rows, &mut decoded);
        if fused {
            let tile_scales = tile_rows * matrix.in_features / matrix.block_size.get();
            for (index, sums) in sums.chunks_mut(tile_rows * rows).enumerate() {
                let (start, scales) = (index * tile_rows, &scales[index * tile_scales..]);
                let last = start + tile_rows >= task_rows;
                let next = if last { onward - start } else { tile_rows };
                let tile = Tile::new(matrix, scales, first + start, sums.len() / rows, next);
                #[cfg(target_arch = "x86_64")]
                if let Some(fixed) = &fixed {
                    fixed.forward(tile, sums);
                    continue;
                }
                kernel.forward(tile, rows, x, sums);
            }
        } else if let Some(decoder) = &decoder {
            for (index, sums) in sums.chunks_exact_mut(rows).enumerate() {
                kernel.dots(
                    decoder.decode(scales, first, first + index, &mut row),
                    x,
                    sums,
                );
            }
        } else {
            scalar::forward(x, matrix, scales, first, rows, sums);
        }
    });
    let mut straight = vec![0.0; if rows == 1 { 0 } else { outs }];
    for (row, output) in output.chunks_mut(outs).enumerate() {
        let numbers = if rows == 1 {
            &mut columns
        } else {
            let numbers = columns.iter().skip(row).step_by(rows);
            for (target, number) in straight.iter_mut().zip(numbers) {
                *target = *number;
            }
            &mut straight
        };
        for (number, bias) in numbers.iter_mut().zip(bias) {
            *number += bias;
        }
        convert(backend, numbers, output);
    }
}
