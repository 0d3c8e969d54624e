//! `y W`: rows of `y` are `A`, pairs of the weight's rows are `B`.
//!
//! A task is 256 columns of the weight, 128 bytes of each of its rows, and all rows of `y`. Of the
//! weight 512 rows at a time are decoded, 256 KB, and multiplied; the sums, 512 KB for 512 rows of
//! `y`, wait in the second-level cache for the next.
//!
//! The floor is that of `forward`. Seen for 4096 x 4096 on two cores: 512 rows 7.9 to 8.9 ms, where
//! torch's dense product takes 10.2; up to 16 rows 2.0 ms (torch 2.9), most of it for decoding lines
//! that are 2 KB apart.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::bf16;

use super::decode::{Rows, STEP, VECTORS, prefetch};
use super::memory::{OPERAND, TASK, with_memory};
use super::shuffle::{from_decoded_order, pair, unpaired};
use super::tiles::{DEPTH, ROW, ROWS, TILE, Tiles};
use super::{Shared, rows_at_once};
use crate::matmul::matrix::{PackedMatrix, RowScales};
use crate::{Backend, team};

/// Rows of the weight that are decoded at a time.
const CHUNK: usize = 512;
/// Steps of columns of a task.
const TASK_STEPS: usize = 2;
/// Bytes of the sums of a vector's columns and one or two tiles of rows of `y`.
const SUMS: usize = 4 * TILE;

/// [`crate::matmul::multiply_transposed`] on tiles, which the backend has, of a weight that is
/// regular.
pub(in crate::matmul) fn multiply_transposed(
    backend: Backend,
    y: &[bf16],
    matrix: &PackedMatrix<'_>,
    output: &mut [bf16],
) {
    let (outs, ins) = (matrix.out_features, matrix.in_features);
    let rows = output.len() / ins;
    assert!(backend.has_tiles() && matrix.is_regular());
    assert!(y.len() == rows * outs && output.len() == rows * ins);
    let at_once = rows_at_once(rows);
    let scales = RowScales::new(backend, matrix);
    let mut scale_memory = scales.buffer(outs);
    let scales = scales.decode(0, outs, &mut scale_memory);
    for (y, output) in y
        .chunks(at_once * outs)
        .zip(output.chunks_mut(at_once * ins))
    {
        let operand = Size::new(output.len() / ins, outs);
        with_memory(&OPERAND, operand.bytes(), |memory| {
            let packed = memory.as_mut_ptr().cast::<u8>();
            // SAFETY: the memory is as large as that.
            unsafe { pack(y, &operand, packed) };
            let product = Product {
                operand,
                packed,
                matrix,
                scales,
                output: Shared(output.as_mut_ptr()),
            };
            let product = &product;
            let steps = ins.div_ceil(STEP);
            let task = |index: usize| {
                let first = index * TASK_STEPS;
                // SAFETY: the backend has tiles; tasks have columns of their own.
                unsafe { product.run(first, TASK_STEPS.min(steps - first)) };
            };
            let tasks = steps.div_ceil(TASK_STEPS);
            team::each((0..tasks).collect(), task);
        });
    }
}

/// The sizes of a packed operand: [groups, depth, 1 or 2 tiles].
#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    outs: usize,
    /// Rows of `A`: fewer than 16 where there are fewer.
    tile_rows: usize,
}

impl Size {
    fn new(rows: usize, outs: usize) -> Self {
        Self {
            rows,
            outs,
            tile_rows: rows.min(ROWS),
        }
    }

    fn is_few(&self) -> bool {
        self.rows <= ROWS
    }

    fn groups(&self) -> usize {
        self.rows.div_ceil(2 * ROWS)
    }

    /// Even, as loops for few rows take two at a time.
    fn depth(&self) -> usize {
        self.outs.div_ceil(DEPTH).next_multiple_of(2)
    }

    fn group_bytes(&self) -> usize {
        if self.is_few() {
            self.tile_rows * ROW
        } else {
            2 * TILE
        }
    }

    fn bytes(&self) -> usize {
        self.groups() * self.depth() * self.group_bytes()
    }
}

/// Writes the rows of `y` as `A`, with zeros around them.
///
/// # Safety
/// `packed` has [`Size::bytes`], aligned to 64.
unsafe fn pack(y: &[bf16], operand: &Size, packed: *mut u8) {
    let Size { rows, outs, .. } = *operand;
    let places = if operand.is_few() {
        operand.tile_rows
    } else {
        2 * ROWS
    };
    let line = DEPTH;
    let packed = Shared(packed.cast::<bf16>());
    let group = |group: usize| {
        for depth in 0..operand.depth() {
            let from = depth * line;
            let count = line.min(outs.saturating_sub(from));
            let at = (group * operand.depth() + depth) * operand.group_bytes() / 2;
            for place in 0..places {
                let row = group * places + place;
                let count = if row < rows { count } else { 0 };
                // SAFETY: the memory has a line for each place of each depth of each group.
                let target = unsafe {
                    let target = packed.pointer().add(at + place * line);
                    std::slice::from_raw_parts_mut(target, line)
                };
                if count > 0 {
                    target[..count].copy_from_slice(&y[row * outs + from..][..count]);
                }
                target[count..].fill(bf16::ZERO);
            }
        }
    };
    team::each((0..operand.groups()).collect(), group);
}

/// What the tasks of a product share.
struct Product<'a> {
    operand: Size,
    packed: *const u8,
    matrix: &'a PackedMatrix<'a>,
    scales: &'a [f32],
    output: Shared<bf16>,
}

// SAFETY: the packed operand is only read while tasks run.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    /// Multiplies all of `y` with `steps` of columns from `first` on.
    ///
    /// # Safety
    /// The backend has tiles; nobody else writes these columns of the output.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn run(&self, first: usize, steps: usize) {
        let operand = &self.operand;
        let (groups, depth) = (operand.groups(), operand.depth());
        let vectors = steps * VECTORS;
        let vector_bytes = CHUNK / DEPTH * 2 * TILE;
        let decoded_bytes = vectors * vector_bytes;
        let sums_bytes = groups * vectors * SUMS;
        with_memory(&TASK, decoded_bytes + sums_bytes, |memory| {
            let decoded = memory.as_mut_ptr().cast::<u8>();
            // SAFETY: the caller answers for the processor; all pointers are into the memory that
            // was asked for, of the sizes above, and into the packed operand.
            unsafe {
                let sums = decoded.add(decoded_bytes);
                let rows = Rows::new(self.matrix, self.scales, 0, operand.outs);
                let tiles = if operand.is_few() {
                    Tiles::few_rows(operand.tile_rows)
                } else {
                    Tiles::whole()
                };
                for chunk in (0..depth).step_by(CHUNK / DEPTH) {
                    let deep = (CHUNK / DEPTH).min(depth - chunk);
                    for step in 0..steps {
                        let target = decoded.add(step * VECTORS * vector_bytes);
                        if rows.has_small_blocks() {
                            decode::<true>(&rows, chunk, deep, first + step, vector_bytes, target);
                        } else {
                            decode::<false>(&rows, chunk, deep, first + step, vector_bytes, target);
                        }
                    }
                    for group in 0..groups {
                        let at = (group * depth + chunk) * operand.group_bytes();
                        let a = self.packed.add(at);
                        for vector in 0..vectors {
                            let b = decoded.add(vector * vector_bytes);
                            let sums = sums.add((group * vectors + vector) * SUMS).cast();
                            if operand.is_few() {
                                tiles.few_by_two(a, b, sums, deep, chunk == 0);
                            } else {
                                tiles.two_by_two(a, b, sums, deep, chunk == 0);
                            }
                        }
                    }
                }
                drop(tiles);
                for group in 0..groups {
                    for step in 0..steps {
                        let sums = sums.add((group * vectors + step * VECTORS) * SUMS).cast();
                        self.write(sums, first + step, group);
                    }
                }
            }
        });
    }

    /// Writes the sums of a step of columns and a group of rows.
    ///
    /// # Safety
    /// As [`Product::run`]; `sums` are four tiles for each vector of the step.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn write(&self, sums: *const f32, step: usize, group: usize) {
        let ins = self.matrix.in_features;
        for place in 0..2 * ROWS {
            let row = group * 2 * ROWS + place;
            if row >= self.operand.rows {
                break;
            }
            let mut vectors = [_mm512_setzero_si512(); VECTORS];
            for (vector, numbers) in vectors.iter_mut().enumerate() {
                let sum = |tile: usize| {
                    let at = (vector * 4 + tile) * TILE / 4 + place % ROWS * 16;
                    // SAFETY: the tiles are there, the caller says.
                    unsafe { _mm512_loadu_ps(sums.add(at)) }
                };
                *numbers = unpaired(if self.operand.is_few() {
                    [_mm512_add_ps(sum(0), sum(2)), _mm512_add_ps(sum(1), sum(3))]
                } else {
                    let side = place / ROWS * 2;
                    [sum(side), sum(side + 1)]
                });
            }
            let from = step * STEP;
            for (part, numbers) in from_decoded_order(vectors).into_iter().enumerate() {
                let from = from + part * 32;
                let count = 32.min(ins.saturating_sub(from));
                if count > 0 {
                    // SAFETY: the row has these columns, and they are this task's.
                    unsafe {
                        let at = self.output.pointer().add(row * ins + from);
                        _mm512_mask_storeu_epi16(at.cast(), u32::MAX >> (32 - count), numbers);
                    }
                }
            }
        }
    }
}

/// Decodes a step of columns of `deep * 32` rows from `chunk * 32` on into [4 vectors, depth, 2
/// tiles], with zeros for rows that are not there.
///
/// # Safety
/// The backend has tiles; the target has as many bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn decode<const SMALL: bool>(
    rows: &Rows<'_>,
    chunk: usize,
    deep: usize,
    step: usize,
    vector_bytes: usize,
    target: *mut u8,
) {
    for pairs in 0..deep * DEPTH / 2 {
        let row = chunk * DEPTH + 2 * pairs;
        // SAFETY: only rows that are there are decoded; the target has room for all.
        unsafe {
            let numbers = |row: usize| {
                if row < rows.count() {
                    prefetch(rows.row(row + AHEAD).wrapping_add(step * STEP / 2));
                    rows.step::<SMALL>(row, step)
                } else {
                    [_mm512_setzero_si512(); VECTORS]
                }
            };
            let (first, second) = (numbers(row), numbers(row + 1));
            let at = target.add(pairs / ROWS * 2 * TILE + pairs % ROWS * ROW);
            for vector in 0..VECTORS {
                let [low, high] = pair(first[vector], second[vector]);
                let at = at.add(vector * vector_bytes);
                _mm512_storeu_si512(at.cast(), low);
                _mm512_storeu_si512(at.add(TILE).cast(), high);
            }
        }
    }
}

/// Rows between what is decoded and what is asked for: a line of each, too far apart for the
/// processor to foresee.
const AHEAD: usize = 24;
