//! The products on tensor cores in the register of kernels, and how their sums are cut.

use super::ArgumentProblem;
use super::kernel::{Arguments, Card, File, Geometry, GeometryOf, Kernel, Kind, OLDEST, Parameter};
use super::kernels::{MOST_BLOCKS, grid, parameters};
use crate::element::Dtype;

/// The first architecture with asynchronous copies, more than 64 KiB of shared memory, and tensor
/// cores for bf16.
const AMPERE: u32 = 80;

/// Those that tensor cores take.
const TENSOR_DTYPES: &[(Dtype, u32)] = &[(Dtype::F16, OLDEST), (Dtype::Bf16, AMPERE)];

/// Columns of the result that a block of the tensor-core products has.
const TENSOR_COLUMNS: u64 = 128;

/// Rows of the counters by which the blocks of a cut sum find the last of them, in each kernel file;
/// and counters in a row, one for each tile of the result. A row serves one launch at a time.
pub const COUNTER_SLOTS: u32 = 16;
/// See [`COUNTER_SLOTS`].
pub const SLOT_COUNTERS: u32 = 512;

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

/// Into how many parts a tensor-core product's sum of `depth` terms is best cut, where the result
/// has `columns` and a block takes `tile_rows` of its `rows`, to fill a card of so many
/// multiprocessors: no part has fewer than 256 terms.
#[must_use]
pub fn cut(rows: u64, tile_rows: u64, columns: u64, depth: u64, processors: u32) -> Cut {
    let tile_rows = tile_rows.max(1);
    let tiles = rows
        .div_ceil(tile_rows)
        .saturating_mul(columns.div_ceil(TENSOR_COLUMNS));
    let to_fill = u64::from(processors) / tiles.max(1);
    let splits = to_fill.min(depth / 256).clamp(1, MOST_BLOCKS[2].into());
    let tile = if splits > 1 {
        tile_rows.saturating_mul(TENSOR_COLUMNS)
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
        matmul("fourbit_matmul_8", OLDEST, |a, _, card| {
            matmul_geometry(a, card, 8)
        }),
        matmul("fourbit_matmul_16", OLDEST, |a, _, card| {
            matmul_geometry(a, card, 16)
        }),
        matmul("fourbit_matmul_32", OLDEST, |a, _, card| {
            matmul_geometry(a, card, 32)
        }),
        matmul("fourbit_matmul_64", AMPERE, |a, _, card| {
            matmul_geometry(a, card, 64)
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

/// A table of pairs of values, and stages of codes, scales and rows of `x`.
fn matmul_geometry(
    arguments: &Arguments,
    card: &Card,
    rows: u32,
) -> Result<Option<Geometry>, ArgumentProblem> {
    let stages = if card.capability < AMPERE { 2 } else { 3 };
    let columns = arguments.get("n").div_ceil(TENSOR_COLUMNS);
    let dynamic_bytes = 32_768 + stages * (7_168 + 192 * rows);
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
fn transposed_geometry(
    arguments: &Arguments,
    card: &Card,
    rows: u32,
) -> Result<Option<Geometry>, ArgumentProblem> {
    let copies = if card.capability < AMPERE { 8 } else { 16 };
    let columns = arguments.get("k").div_ceil(TENSOR_COLUMNS);
    let dynamic_bytes = 34_816 + 128 * copies * 16 + 288 * rows;
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
