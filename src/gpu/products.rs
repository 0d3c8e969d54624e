//! The products on tensor cores in the register of kernels, and how their sums are cut.

use super::ArgumentProblem;
use super::kernel::{
    AMPERE, Arguments, Card, File, Geometry, GeometryOf, Kernel, Kind, OLDEST, Parameter, reserved,
    shared_bytes,
};
use super::kernels::{MOST_BLOCKS, grid, parameters};
use super::source::Specialisation;
use crate::BlockSize;
use crate::element::Dtype;

/// Those that tensor cores take.
const TENSOR_DTYPES: &[(Dtype, u32)] = &[(Dtype::F16, OLDEST), (Dtype::Bf16, AMPERE)];

/// Rows of the result that a block of the tensor-core products may have.
pub const TILE_ROWS: [u32; 4] = [8, 16, 32, 64];

/// Columns of the result that a block of the tensor-core products has.
const TENSOR_COLUMNS: u64 = 128;

/// Rows of the counters by which the blocks of a cut sum find the last of them, in each kernel file;
/// and counters in a row, one for each tile of the result. A row serves one launch at a time.
pub const COUNTER_SLOTS: u32 = 16;
/// See [`COUNTER_SLOTS`].
pub const SLOT_COUNTERS: u32 = 512;

/// Of shared memory that a kernel declares itself, rounded up.
const STATIC_BYTES: u32 = 128;

/// Blocks of 256 threads that a multiprocessor's registers have room for: the kernels' launch
/// bounds.
const REGISTER_BLOCKS: u32 = 2;

/// Dynamic shared memory that each of so many blocks of a multiprocessor can have.
const fn room(capability: u32, blocks: u32) -> u32 {
    shared_bytes(capability) / blocks - reserved(capability) - STATIC_BYTES
}

/// How the sums of a tensor-core product are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Parts of each sum.
    pub splits: u32,
    /// Tiles of the result, and so counters; none are needed for sums of one part.
    pub tiles: u64,
    /// Numbers of workspace, f32; 0 for sums of one part.
    pub partial: u64,
}

/// The size of a product whose sums may be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Of the result.
    pub rows: u64,
    /// Of these, how many a block takes: one of [`TILE_ROWS`].
    pub tile_rows: u32,
    /// Of the result.
    pub columns: u64,
    /// Terms of each sum.
    pub depth: u64,
}

/// Which of the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// `matmul.cu`
    Matmul,
    /// `matmul_transposed.cu`
    Transposed,
}

/// Terms that the costs of [`cut`] count as one.
const STEP: u64 = 64;
/// What a block costs before its first step: tables, and the wait for the first stage.
const BLOCK_STEPS: u64 = 4;
/// What it costs that sums are cut: writing them, finding the last block, reading the first part.
const CUT_STEPS: u64 = 2;
/// Rows of a tile of which adding a part costs a step.
const ROWS_A_STEP: u64 = 32;
/// No part has fewer terms.
const FEWEST_TERMS: u64 = 256;

/// Into how many parts the sums of a product are best cut.
///
/// Of all numbers of parts the one with the least cost, by this model of the busiest
/// multiprocessor, in steps: it runs its blocks in waves of as many as fit, a wave takes
/// `(steps of a part + BLOCK_STEPS)` for each of its blocks, and no less than for two of them where
/// two fit, since one alone does not keep a multiprocessor busy; at the end the last block of a tile
/// adds `parts * tile_rows / ROWS_A_STEP`. So parts fill the card, but no further than is worth
/// their beginnings, and not so that a few blocks make one more wave.
#[must_use]
pub fn cut(product: Product, shape: &Shape, block_size: BlockSize, card: &Card) -> Cut {
    let tile_rows = u64::from(shape.tile_rows.max(1));
    let tiles = shape
        .rows
        .div_ceil(tile_rows)
        .saturating_mul(shape.columns.div_ceil(TENSOR_COLUMNS));
    let fit = u64::from(match product {
        Product::Matmul => matmul_stages(card.capability, shape.tile_rows, block_size).0,
        Product::Transposed => transposed_blocks(card.capability, shape.tile_rows),
    });
    let processors = u64::from(card.processors.max(1));
    let steps = shape.depth.div_ceil(STEP);
    let cost = |parts: u64| {
        let blocks = tiles.saturating_mul(parts).div_ceil(processors);
        let busy = fit.min(2);
        let left = blocks % fit;
        let waves = blocks / fit * fit.max(busy) + if left > 0 { left.max(busy) } else { 0 };
        let work = waves.saturating_mul(steps.div_ceil(parts) + BLOCK_STEPS);
        let adding = if parts > 1 {
            CUT_STEPS + parts * tile_rows / ROWS_A_STEP
        } else {
            0
        };
        work.saturating_add(adding)
    };
    // More than fill the card would only make more waves.
    let most = (fit * processors)
        .min(shape.depth / FEWEST_TERMS)
        .clamp(1, MOST_BLOCKS[2].into());
    let splits = (1..=most).min_by_key(|&parts| cost(parts)).unwrap_or(1);
    let tile = if splits > 1 {
        tile_rows * TENSOR_COLUMNS
    } else {
        0
    };
    Cut {
        splits: u32::try_from(splits).unwrap_or(1),
        tiles,
        partial: splits.saturating_mul(tiles).saturating_mul(tile),
    }
}

pub(super) const MATMUL: File = File {
    name: "matmul",
    text: include_str!("../../cuda/matmul.cu"),
    exact: false,
    dtypes: TENSOR_DTYPES,
    code_bits: &[4],
    kernels: &[
        matmul("fourbit_matmul_8", OLDEST, |a, s, card| {
            matmul_geometry(a, s, card, 8)
        }),
        matmul("fourbit_matmul_16", OLDEST, |a, s, card| {
            matmul_geometry(a, s, card, 16)
        }),
        matmul("fourbit_matmul_32", OLDEST, |a, s, card| {
            matmul_geometry(a, s, card, 32)
        }),
        matmul("fourbit_matmul_64", AMPERE, |a, s, card| {
            matmul_geometry(a, s, card, 64)
        }),
    ],
};

const fn matmul(name: &'static str, oldest: u32, geometry: GeometryOf) -> Kernel {
    Kernel {
        name,
        oldest,
        parameters: parameters![
            x: Pointer,
            packed: Pointer,
            absmax: Pointer,
            nested_absmax: OptionalPointer,
            nested_offset: OptionalPointer,
            bias: OptionalPointer,
            y: Pointer,
            partial: OptionalPointer,
            arrived: OptionalPointer,
            m: Count,
            n: Count,
            k: Count,
            splits: U32,
            slot: U32,
        ],
        geometry,
    }
}

/// Of `matmul`: a table of pairs of values in 32 copies, and the nested codebook.
const TABLES_BYTES: u32 = (32 << 10) + (1 << 10);
/// Of `matmul`.
const MOST_STAGES: u32 = 6;
/// With fewer stages in a block, more blocks are not worth it.
const ENOUGH_STAGES: u32 = 3;

/// Of `matmul`: codes and two scales for each of 128 rows of the weight, and rows of `x`, which a
/// stage has in shared memory.
fn stage_bytes(rows: u32, block_size: BlockSize) -> u32 {
    let depth = if rows <= 16 && block_size.get() >= 64 {
        128
    } else {
        64
    };
    128 * (depth / 2 + 2 * 4) + rows * depth * 2
}

/// Of `matmul`: blocks of a multiprocessor, and stages of each, as shared memory has room for.
fn matmul_stages(capability: u32, rows: u32, block_size: BlockSize) -> (u32, u32) {
    let stages = |blocks| {
        let room = room(capability, blocks).saturating_sub(TABLES_BYTES);
        (room / stage_bytes(rows, block_size)).min(MOST_STAGES)
    };
    (2..=REGISTER_BLOCKS)
        .rev()
        .map(|blocks| (blocks, stages(blocks)))
        .find(|&(_, stages)| stages >= ENOUGH_STAGES)
        .unwrap_or((1, stages(1)))
}

/// Tables, and as many stages as there is room for.
fn matmul_geometry(
    arguments: &Arguments,
    specialisation: &Specialisation,
    card: &Card,
    rows: u32,
) -> Result<Option<Geometry>, ArgumentProblem> {
    let block_size = specialisation.block_size;
    let (_, stages) = matmul_stages(card.capability, rows, block_size);
    let columns = arguments.get("n").div_ceil(TENSOR_COLUMNS);
    let dynamic_bytes = TABLES_BYTES + stages * stage_bytes(rows, block_size);
    tensor_geometry(arguments, columns, rows, dynamic_bytes)
}

pub(super) const MATMUL_TRANSPOSED: File = File {
    name: "matmul_transposed",
    text: include_str!("../../cuda/matmul_transposed.cu"),
    exact: false,
    dtypes: TENSOR_DTYPES,
    code_bits: &[4],
    kernels: &[
        matmul_transposed("fourbit_matmul_transposed_8", OLDEST, |a, _, card| {
            transposed_geometry(a, card, 8)
        }),
        matmul_transposed("fourbit_matmul_transposed_16", OLDEST, |a, _, card| {
            transposed_geometry(a, card, 16)
        }),
        matmul_transposed("fourbit_matmul_transposed_32", OLDEST, |a, _, card| {
            transposed_geometry(a, card, 32)
        }),
        matmul_transposed("fourbit_matmul_transposed_64", AMPERE, |a, _, card| {
            transposed_geometry(a, card, 64)
        }),
    ],
};

const fn matmul_transposed(name: &'static str, oldest: u32, geometry: GeometryOf) -> Kernel {
    Kernel {
        name,
        oldest,
        parameters: parameters![
            dy: Pointer,
            packed: Pointer,
            absmax: Pointer,
            nested_absmax: OptionalPointer,
            nested_offset: OptionalPointer,
            dx: Pointer,
            partial: OptionalPointer,
            arrived: OptionalPointer,
            m: Count,
            n: Count,
            k: Count,
            splits: U32,
            slot: U32,
        ],
        geometry,
    }
}

/// Two decoded tiles, copies of a table of pairs of values, and two tiles of `dy`.
const fn transposed_bytes(capability: u32, rows: u32) -> u32 {
    let copies = if capability < AMPERE { 8 } else { 16 };
    35_840 + 128 * copies * 16 + 288 * rows
}

/// Of `matmul_transposed`: blocks of a multiprocessor.
fn transposed_blocks(capability: u32, rows: u32) -> u32 {
    (2..=REGISTER_BLOCKS)
        .rev()
        .find(|&blocks| transposed_bytes(capability, rows) <= room(capability, blocks))
        .unwrap_or(1)
}

fn transposed_geometry(
    arguments: &Arguments,
    card: &Card,
    rows: u32,
) -> Result<Option<Geometry>, ArgumentProblem> {
    let columns = arguments.get("k").div_ceil(TENSOR_COLUMNS);
    let dynamic_bytes = transposed_bytes(card.capability, rows);
    tensor_geometry(arguments, columns, rows, dynamic_bytes)
}

fn tensor_geometry(
    arguments: &Arguments,
    columns: u64,
    rows: u32,
    dynamic_bytes: u32,
) -> Result<Option<Geometry>, ArgumentProblem> {
    let tiles = arguments.get("m").div_ceil(u64::from(rows));
    grid(
        [columns, tiles, arguments.get("splits")],
        256,
        dynamic_bytes,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Card = Card {
        capability: 90,
        processors: 132,
    };

    fn of(rows: u32, columns: u64, depth: u64, card: &Card) -> Cut {
        let shape = Shape {
            rows: rows.into(),
            tile_rows: rows,
            columns,
            depth,
        };
        cut(Product::Matmul, &shape, BlockSize::DEFAULT, card)
    }

    #[test]
    fn blocks_and_stages_are_what_shared_memory_affords() {
        let of = |capability| {
            [8, 16, 32, 64].map(|rows| matmul_stages(capability, rows, BlockSize::DEFAULT))
        };
        // The table in the head of matmul.cu.
        assert_eq!(of(75)[..3], [(1, 2), (1, 2), (1, 3)]);
        assert_eq!(of(80), [(2, 4), (2, 3), (2, 5), (2, 3)]);
        for capability in [86, 89, 120] {
            assert_eq!(of(capability), [(1, 5), (1, 5), (1, 6), (1, 5)]);
        }
        for capability in [90, 100] {
            assert_eq!(of(capability), [(2, 6); 4]);
        }
        for capability in [75, 80, 86, 87, 89, 90, 100, 103, 120, 121] {
            let rows: &[u32] = if capability < AMPERE {
                &[8, 16, 32]
            } else {
                &[8, 16, 32, 64]
            };
            for &rows in rows {
                let (blocks, stages) = matmul_stages(capability, rows, BlockSize::DEFAULT);
                let bytes = TABLES_BYTES + stages * stage_bytes(rows, BlockSize::DEFAULT);
                for (blocks, bytes) in [
                    (blocks, bytes),
                    (
                        transposed_blocks(capability, rows),
                        transposed_bytes(capability, rows),
                    ),
                ] {
                    let whole = bytes + STATIC_BYTES + reserved(capability);
                    assert!(
                        blocks * whole <= shared_bytes(capability),
                        "{capability} {rows}"
                    );
                }
            }
        }
    }

    #[test]
    fn sums_are_cut_to_fill_the_card() {
        for (columns, depth) in [(4096, 4096), (4096, 14336), (14336, 4096), (1024, 4096)] {
            for rows in [8, 16, 32, 64] {
                let found = of(rows, columns, depth, &H100);
                let blocks = found.tiles * u64::from(found.splits);
                // Nowhere does one wave of two blocks a processor overflow by a little, and most of
                // the card is busy where sums are long enough.
                assert!(blocks <= 264, "{columns} {depth} {rows}: {blocks}");
                assert!(blocks >= 64, "{columns} {depth} {rows}: {blocks}");
                assert!(depth / u64::from(found.splits) >= FEWEST_TERMS);
                assert_eq!(found.partial, blocks * u64::from(rows) * 128);
            }
        }
    }

    #[test]
    fn sums_stay_whole_where_tiles_fill_the_card() {
        let found = of(16, 28_672, 8_192, &H100);
        assert_eq!((found.splits, found.tiles, found.partial), (1, 224, 0));
        // Nothing to cut, and the largest of sizes.
        for (columns, depth) in [(0, 4096), (128, 0), (u64::MAX, u64::MAX), (128, 64)] {
            assert_eq!(of(8, columns, depth, &H100).splits, 1);
        }
        let most = of(8, 128, u64::MAX, &H100);
        assert!(most.splits <= 264);
    }
}
