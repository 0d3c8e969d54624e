//! `x W^T`: rows of the weight are `A`, rows of `x`, turned, are `B`.
//!
//! A task is some rows of the weight. Of these 32 at a time are decoded, some columns of them, and
//! multiplied with all rows of `x`, 32 at a time, whose sums wait in memory for the next columns.
//! With 512 rows of `x`, 512 of its columns are 512 KB and the sums of 256 rows of the weight
//! another 512 KB, both in the second-level cache; what is decoded, 32 KB, is read again by each
//! group of rows. Up to 16 rows of `x` are one tile, as narrow as they are few; then decoding is
//! most of the work, and a panel goes through all of its columns before the next.
//!
//! Floor: a tile product is 8,192 multiplications in 16 cycles, so 512 rows and a weight of
//! 4096 x 4096 are 2.8 ms on two cores that were seen to make one in 5.1 ns, and decoding 0.45 ms
//! (`decode`). Seen: 8.8 to 9.2 ms, where torch's dense product takes 10.3. The second-level cache
//! is what stands between: a tile product waits 11 ns for its operands, of which those of `x` come
//! from there, although they are asked for ahead. For up to 16 rows the floor is decoding, 0.23 ms
//! by instructions and 0.31 ms by memory (28 GB/s); seen 0.62 to 0.69 for four and eight rows, 0.74
//! for 16. A core waits for no more than some 16 lines at a time that it asked for, so it asks while
//! it multiplies, too: 0.67 to 0.70 ms where it asked only while decoding.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::bf16;

use super::decode::{Rows, STEP, VECTORS, prefetch};
use super::memory::{OPERAND, TASK, with_memory};
use super::shuffle::{load, to_decoded_order, transpose};
use super::tiles::{DEPTH, ROW, ROWS, TILE, Tiles};
use super::{Shared, rows_at_once};
use crate::matmul::avx512;
use crate::matmul::matrix::{PackedMatrix, RowScales};
use crate::{Backend, team};

/// Steps of columns that are decoded at a time: for few rows of `x` what stays in the first-level
/// cache, for many such that sums are not moved too often.
const CHUNK_FOR_FEW: usize = 4;
const CHUNK_FOR_MANY: usize = 4;
/// Rows of the weight that are decoded at a time: two tiles.
const PANEL: usize = 2 * ROWS;
/// The most rows of a task.
const MOST_TASK_ROWS: usize = 8 * PANEL;
/// Bytes of the sums of a panel and one or two tiles' rows of `x`.
const SUMS: usize = 4 * TILE;

/// [`crate::matmul::multiply`] on tiles, which the backend has, of a weight that is regular.
pub(in crate::matmul) fn multiply(
    backend: Backend,
    x: &[bf16],
    matrix: &PackedMatrix<'_>,
    bias: Option<&[bf16]>,
    output: &mut [bf16],
) {
    let (outs, ins) = (matrix.out_features, matrix.in_features);
    let rows = output.len() / outs;
    assert!(backend.has_tiles() && matrix.is_regular());
    assert!(x.len() == rows * ins && output.len() == rows * outs);
    assert!(bias.is_none_or(|bias| bias.len() == outs));
    let at_once = rows_at_once(rows);
    for (x, output) in x
        .chunks(at_once * ins)
        .zip(output.chunks_mut(at_once * outs))
    {
        let rows = output.len() / outs;
        let operand = Size::new(rows, ins);
        with_memory(&OPERAND, operand.bytes(), |memory| {
            let packed = Shared(memory.as_mut_ptr().cast::<u8>());
            operand.for_tiles(|tile| {
                // SAFETY: the backend has tiles; each tile of rows has memory of its own.
                unsafe { pack(x, &operand, tile, packed.pointer()) };
            });
            let panels = outs.div_ceil(PANEL);
            // Several tasks a thread, so that none waits long for the last.
            let share = panels.div_ceil(4 * team::threads());
            let task_rows = (share * PANEL).clamp(PANEL, MOST_TASK_ROWS);
            let product = Product {
                operand,
                packed: packed.pointer(),
                matrix,
                bias,
                output: Shared(output.as_mut_ptr()),
                onward: team::threads() * task_rows,
            };
            let product = &product;
            let task = |index: usize| {
                let first = index * task_rows;
                let count = task_rows.min(outs - first);
                // SAFETY: the backend has tiles; tasks have rows of the weight of their own.
                unsafe { product.run(backend, first, count) };
            };
            let tasks = outs.div_ceil(task_rows);
            team::each((0..tasks).collect(), task);
        });
    }
}

/// The sizes of a packed operand: [tiles, steps * 4, 16 pairs, columns, 2], two tiles interleaved
/// where there are several.
#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    ins: usize,
    steps: usize,
    /// Columns of `B`: fewer than 16 where there are fewer rows.
    columns: usize,
}

impl Size {
    fn new(rows: usize, ins: usize) -> Self {
        Self {
            rows,
            ins,
            steps: ins.div_ceil(STEP),
            columns: rows.min(ROWS),
        }
    }

    /// Whether it is one tile, whose sums come in two parts.
    fn is_few(&self) -> bool {
        self.rows <= ROWS
    }

    /// Groups of rows whose sums with a panel are four tiles.
    fn groups(&self) -> usize {
        self.rows.div_ceil(2 * ROWS)
    }

    fn depth(&self) -> usize {
        self.steps * VECTORS
    }

    /// Of a group for one tile of depth.
    fn group_bytes(&self) -> usize {
        if self.is_few() {
            ROW * self.columns
        } else {
            2 * TILE
        }
    }

    fn bytes(&self) -> usize {
        self.groups() * self.depth() * self.group_bytes()
    }

    /// Calls with each tile of rows, also with those that only fill up a group.
    fn for_tiles(&self, work: impl Fn(usize) + Send + Sync) {
        let tiles = if self.is_few() { 1 } else { 2 * self.groups() };
        team::each((0..tiles).collect(), work);
    }
}

/// Writes up to 16 rows of `x` as `B`.
///
/// # Safety
/// The backend has tiles; `packed` has [`Size::bytes`], of which nobody else uses this
/// tile's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack(x: &[bf16], operand: &Size, tile: usize, packed: *mut u8) {
    let Size {
        rows, ins, columns, ..
    } = *operand;
    let bytes = operand.group_bytes();
    let (group, side) = if operand.is_few() {
        (0, 0)
    } else {
        (tile / 2, tile % 2)
    };
    let mask = u16::MAX >> (16 - columns);
    for step in 0..operand.steps {
        let from = step * STEP;
        let upto = ins.min(from + STEP);
        let mut turned = [[_mm512_setzero_si512(); ROWS]; VECTORS];
        for place in 0..columns.min(rows.saturating_sub(tile * ROWS)) {
            let start = (tile * ROWS + place) * ins;
            // SAFETY: the caller answers for the processor.
            let numbers = unsafe { load(&x[start + from..start + upto]) };
            for (turned, numbers) in turned.iter_mut().zip(to_decoded_order(numbers)) {
                turned[place] = numbers;
            }
        }
        for (vector, rows) in turned.into_iter().enumerate() {
            let depth = step * VECTORS + vector;
            let at = (group * operand.depth() + depth) * bytes + side * TILE;
            // SAFETY: a tile is 16 pairs of `columns` numbers of 4 bytes, and the memory has all.
            unsafe {
                let target = packed.add(at);
                if columns == 1 {
                    _mm512_storeu_si512(target.cast(), rows[0]);
                    continue;
                }
                for (pair, numbers) in transpose(rows).into_iter().enumerate() {
                    let target = target.add(pair * 4 * columns);
                    _mm512_mask_storeu_epi32(target.cast(), mask, numbers);
                }
            }
        }
    }
}

/// What the tasks of a product share.
struct Product<'a> {
    operand: Size,
    packed: *const u8,
    matrix: &'a PackedMatrix<'a>,
    bias: Option<&'a [bf16]>,
    output: Shared<bf16>,
    /// Rows from a task to the one that the thread is likely to take next.
    onward: usize,
}

// SAFETY: the packed operand is only read while tasks run.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    /// Multiplies `count` rows of the weight from `first` on with all of `x`.
    ///
    /// # Safety
    /// The backend has tiles; nobody else writes these columns of the output.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn run(&self, backend: Backend, first: usize, count: usize) {
        let operand = &self.operand;
        let (groups, depth) = (operand.groups(), operand.depth());
        let panels = count.div_ceil(PANEL);
        let chunk_steps = if operand.is_few() {
            CHUNK_FOR_FEW
        } else {
            CHUNK_FOR_MANY
        };
        let decoded_bytes = chunk_steps * VECTORS * PANEL * ROW;
        let sums_bytes = panels * groups * SUMS;
        let scales = RowScales::new(backend, self.matrix);
        let mut scale_memory = scales.buffer(count);
        avx512::ask(scales.memory(first + self.onward, count));
        let scales = scales.decode(first, count, &mut scale_memory);
        with_memory(&TASK, decoded_bytes + sums_bytes, |memory| {
            let decoded = memory.as_mut_ptr().cast::<u8>();
            // SAFETY: the memory begins with the decoded numbers.
            let sums = unsafe { decoded.add(decoded_bytes) };
            // SAFETY: the caller answers for the processor; all pointers are into the memory that
            // was asked for, of the sizes above, and into the packed operand; only the rows and
            // steps that there are, are decoded.
            unsafe {
                let rows = Rows::new(self.matrix, scales, first, count);
                let tiles = if operand.is_few() {
                    Tiles::few_columns(operand.columns)
                } else {
                    Tiles::whole()
                };
                // Where memory is asked for while a chunk is worked on: lines of the next panel.
                let ahead = |panel: usize, lines: usize| {
                    let last = panel + 1 == panels;
                    let next = if last {
                        self.onward
                    } else {
                        (panel + 1) * PANEL
                    };
                    rows.row(next).wrapping_add(lines * STEP / 2)
                };
                // Half of them while decoding, where the product asks for the others.
                let all = !operand.is_few();
                let decode = |panel: usize, chunk: usize| {
                    let ahead = ahead(
                        panel,
                        if all {
                            chunk * PANEL
                        } else {
                            chunk * PANEL / 2
                        },
                    );
                    decode(
                        &rows,
                        panel * PANEL,
                        chunk,
                        chunk_steps,
                        ahead,
                        all,
                        decoded,
                    );
                };
                let multiply = |panel: usize, chunk: usize, group: usize| {
                    let deep = chunk_steps.min(operand.steps - chunk) * VECTORS;
                    let at = (group * depth + chunk * VECTORS) * operand.group_bytes();
                    let b = self.packed.add(at);
                    let sums = sums.add((panel * groups + group) * SUMS).cast();
                    if operand.is_few() {
                        let ahead = ahead(panel, (operand.steps + chunk) * PANEL / 2);
                        tiles.two_by_few(decoded, b, sums, deep, chunk == 0, ahead);
                    } else {
                        tiles.two_by_two(decoded, b, sums, deep, chunk == 0);
                    }
                };
                let chunks = (0..operand.steps).step_by(chunk_steps);
                if operand.is_few() {
                    for panel in 0..panels {
                        for chunk in chunks.clone() {
                            decode(panel, chunk);
                            multiply(panel, chunk, 0);
                        }
                    }
                } else {
                    for chunk in chunks {
                        for panel in 0..panels {
                            decode(panel, chunk);
                            (0..groups).for_each(|group| multiply(panel, chunk, group));
                        }
                    }
                }
                drop(tiles);
                for panel in 0..panels {
                    for group in 0..groups {
                        let sums = sums.add((panel * groups + group) * SUMS).cast();
                        let first = first + panel * PANEL;
                        self.write(sums, first, PANEL.min(count - panel * PANEL), group);
                    }
                }
            }
        });
    }

    /// Writes the sums of a panel of `count` rows from `first` on and a group of rows of `x`.
    ///
    /// # Safety
    /// As [`Product::run`]; `sums` are four tiles.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn write(&self, sums: *const f32, first: usize, count: usize, group: usize) {
        let outs = self.matrix.out_features;
        for half in 0..count.div_ceil(ROWS) {
            let first = first + half * ROWS;
            let lanes = u16::MAX >> (16 - ROWS.min(count - half * ROWS));
            let bias = match self.bias {
                Some(bias) => {
                    // SAFETY: the bias has a number for each row of the weight; no more are read.
                    let halves =
                        unsafe { _mm256_maskz_loadu_epi16(lanes, bias.as_ptr().add(first).cast()) };
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
                }
                None => _mm512_setzero_ps(),
            };
            // SAFETY: the tiles are there, the caller says.
            let tile = |tile: usize| unsafe { sums.add(tile * TILE / 4) };
            for side in 0..2 {
                let row = (2 * group + side) * ROWS;
                let rows = ROWS.min(self.operand.rows.saturating_sub(row));
                if rows == 0 {
                    break;
                }
                let read = |lane: usize| {
                    // SAFETY: a tile has 16 rows of 16 numbers.
                    let sum = |index| unsafe { _mm512_loadu_ps(tile(index).add(lane * 16)) };
                    if self.operand.is_few() {
                        _mm512_castps_si512(_mm512_add_ps(sum(half), sum(2 + half)))
                    } else {
                        _mm512_castps_si512(sum(2 * half + side))
                    }
                };
                let mut turned = [_mm512_setzero_si512(); ROWS];
                for (lane, register) in turned.iter_mut().enumerate() {
                    *register = read(lane);
                }
                for (place, numbers) in transpose(turned).into_iter().take(rows).enumerate() {
                    let numbers = _mm512_add_ps(_mm512_castsi512_ps(numbers), bias);
                    // SAFETY: 32 bytes of any bits; the output has these columns in that row, and
                    // they are this task's.
                    unsafe {
                        let halves =
                            std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers));
                        let at = self.output.pointer().add((row + place) * outs + first);
                        _mm256_mask_storeu_epi16(at.cast(), lanes, halves);
                    }
                }
            }
        }
    }
}

/// Decodes a chunk of a panel's rows into [depth, 2 tiles], with zeros for rows that are not there.
/// For each step of a row, or of two unless `all`, it asks for a line of memory from `ahead` on:
/// codes of the next panel as they lie, so that the processor foresees the rest, which it does not
/// where it sees a few lines of each row.
///
/// # Safety
/// The backend has tiles; the target has as many bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn decode(
    rows: &Rows<'_>,
    first: usize,
    chunk: usize,
    chunk_steps: usize,
    ahead: *const u8,
    all: bool,
    target: *mut u8,
) {
    let steps = chunk_steps.min(rows.steps() - chunk);
    // SAFETY: the caller's promises.
    unsafe {
        if rows.has_small_blocks() {
            decode_blocks::<true>(rows, first, chunk, steps, ahead, all, target);
        } else {
            decode_blocks::<false>(rows, first, chunk, steps, ahead, all, target);
        }
    }
}

/// # Safety
/// As [`decode`]; `SMALL` is [`Rows::has_small_blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn decode_blocks<const SMALL: bool>(
    rows: &Rows<'_>,
    first: usize,
    chunk: usize,
    steps: usize,
    ahead: *const u8,
    all: bool,
    target: *mut u8,
) {
    let count = PANEL.min(rows.count() - first);
    let mut ahead = ahead;
    // SAFETY: the target has room for a panel; only rows and steps that are there are decoded.
    unsafe {
        for step in 0..steps {
            let target = target.add(step * VECTORS * PANEL * ROW);
            rows.each_row::<SMALL>(first, count, chunk + step, |place, numbers| {
                if all || place % 2 == 0 {
                    prefetch(ahead);
                    ahead = ahead.wrapping_add(STEP / 2);
                }
                for (vector, numbers) in numbers.into_iter().enumerate() {
                    let target = target.add((vector * PANEL + place) * ROW);
                    _mm512_storeu_si512(target.cast(), numbers);
                }
            });
        }
        for place in count..PANEL {
            for depth in 0..steps * VECTORS {
                let target = target.add((depth * PANEL + place) * ROW);
                _mm512_storeu_si512(target.cast(), _mm512_setzero_si512());
            }
        }
    }
}
const _: () = assert!(DEPTH * VECTORS == STEP);
