//! The register of kernels: what a kernel file is compiled with, which kernels it holds, what they
//! take and how they are launched stands here and nowhere else. What the parameters mean stands in
//! the files.

use super::kernel::{Arguments, Card, File, Geometry, GeometryOf, Kernel, Kind, OLDEST, Parameter};
use super::source::Specialisation;
use super::{ArgumentProblem, GpuProblem};
use crate::element::Dtype;

/// Blocks of a grid's dimensions (CUDA Programming Guide, "Compute Capabilities").
const MOST_BLOCKS: [u32; 3] = [(1 << 31) - 1, 65_535, 65_535];

/// The files, in the order in which data flows through them.
pub static FILES: &[File] = &[
    QUANTIZE,
    DOUBLE_QUANT,
    DEQUANTIZE,
    MATVEC,
    MATVEC_TENSOR,
    MATMUL,
    MATMUL_TRANSPOSED,
    ADAMW,
];

/// The file of that name.
///
/// # Errors
/// [`GpuProblem::UnknownKernel`] where there is none.
pub fn file(name: &str) -> Result<&'static File, GpuProblem> {
    FILES
        .iter()
        .find(|file| file.name == name)
        .ok_or_else(|| GpuProblem::UnknownKernel {
            what: "kernel file",
            name: name.to_owned(),
            known: FILES.iter().map(|file| file.name).collect(),
        })
}

/// Parameters, as a list of names and types.
macro_rules! parameters {
    ($($name:ident: $kind:ident),* $(,)?) => {
        &[$(Parameter { name: stringify!($name), kind: Kind::$kind }),*]
    };
}

/// All dtypes, on all cards.
const ALL_DTYPES: &[(Dtype, u32)] = &[
    (Dtype::F32, OLDEST),
    (Dtype::F16, OLDEST),
    (Dtype::Bf16, OLDEST),
];

/// Codes of all widths.
const ALL_WIDTHS: &[u32] = &[2, 4, 8];

/// A grid of so many blocks, in which every block works until nothing is left: no more of them
/// than `per_processor` for each multiprocessor. None where there is no block.
fn looping(blocks: u64, block: u32, per_processor: u32, card: &Card) -> Option<Geometry> {
    let most = card.processors.saturating_mul(per_processor);
    let blocks = u32::try_from(blocks).map_or(most, |blocks| blocks.min(most));
    (blocks > 0).then_some(Geometry {
        grid: [blocks, 1, 1],
        block,
        dynamic_bytes: 0,
    })
}

/// A grid of exactly so many blocks. None where there is no block.
///
/// # Errors
/// [`ArgumentProblem::Grid`] for more than a launch can have.
fn grid(
    blocks: [u64; 3],
    block: u32,
    dynamic_bytes: u32,
) -> Result<Option<Geometry>, ArgumentProblem> {
    let mut grid = [1; 3];
    for ((count, most), dimension) in blocks.into_iter().zip(MOST_BLOCKS).zip(&mut grid) {
        *dimension = match u32::try_from(count) {
            Ok(count) if count <= most => count,
            _ => {
                let (blocks, most) = (count, u64::from(most));
                return Err(ArgumentProblem::Grid { blocks, most });
            }
        };
    }
    Ok((!blocks.contains(&0)).then_some(Geometry {
        grid,
        block,
        dynamic_bytes,
    }))
}

/// Bytes that a thread of `quantize` and `dequantize` reads or writes at a time, in four vectors.
const THREAD_BYTES: u64 = 4 * 16;

// --- quantize -----------------------------------------------------------------------------------

const QUANTIZE: File = File {
    name: "quantize",
    text: include_str!("../../cuda/quantize.cu"),
    exact: true,
    dtypes: ALL_DTYPES,
    code_bits: ALL_WIDTHS,
    kernels: &[Kernel {
        name: "fourbit_quantize",
        oldest: OLDEST,
        parameters: parameters![
            input: Pointer,
            packed: Pointer,
            absmax: Pointer,
            count: Count,
            first_bad: Pointer,
        ],
        geometry: elementwise_geometry,
    }],
};

/// 64 bytes of elements a thread at a time, and eight blocks of 256 threads fill a multiprocessor.
fn elementwise_geometry(
    arguments: &Arguments,
    specialisation: &Specialisation,
    card: &Card,
) -> Result<Option<Geometry>, ArgumentProblem> {
    let tile = 256 * THREAD_BYTES / specialisation.dtype.size() as u64;
    Ok(looping(arguments.get("count").div_ceil(tile), 256, 8, card))
}

// --- double quantization ------------------------------------------------------------------------

/// Scales are `f32` and their codebook is the signed dynamic map: there is one specialisation.
const DOUBLE_QUANT: File = File {
    name: "double_quant",
    text: include_str!("../../cuda/double_quant.cu"),
    exact: true,
    dtypes: &[(Dtype::F32, OLDEST)],
    code_bits: &[4],
    kernels: &[
        Kernel {
            name: "fourbit_absmax_sums",
            oldest: OLDEST,
            parameters: parameters![absmax: Pointer, count: Count, sums: Pointer],
            geometry: |arguments, _, card| {
                // Eight chunks of 1024 scales a block, one a warp.
                Ok(looping(
                    arguments.get("count").div_ceil(8 * 1024),
                    256,
                    8,
                    card,
                ))
            },
        },
        Kernel {
            name: "fourbit_absmax_encode",
            oldest: OLDEST,
            parameters: parameters![
                absmax: Pointer,
                count: Count,
                sums: Pointer,
                codes: Pointer,
                nested_absmax: Pointer,
                nested_offset: Pointer,
                first_bad: Pointer,
            ],
            geometry: |arguments, _, card| {
                // Eight blocks of 256 scales a block, one a warp.
                Ok(looping(
                    arguments.get("count").div_ceil(8 * 256),
                    256,
                    8,
                    card,
                ))
            },
        },
        Kernel {
            name: "fourbit_absmax_decode",
            oldest: OLDEST,
            parameters: parameters![
                codes: Pointer,
                nested_absmax: Pointer,
                nested_offset: Pointer,
                count: Count,
                absmax: Pointer,
            ],
            geometry: |arguments, _, card| {
                Ok(looping(arguments.get("count").div_ceil(256), 256, 8, card))
            },
        },
    ],
};

// --- dequantize ---------------------------------------------------------------------------------

const DEQUANTIZE: File = File {
    name: "dequantize",
    text: include_str!("../../cuda/dequantize.cu"),
    exact: true,
    dtypes: ALL_DTYPES,
    code_bits: ALL_WIDTHS,
    kernels: &[Kernel {
        name: "fourbit_dequantize",
        oldest: OLDEST,
        parameters: parameters![
            packed: Pointer,
            absmax: Pointer,
            nested_absmax: OptionalPointer,
            nested_offset: OptionalPointer,
            output: Pointer,
            count: Count,
        ],
        geometry: elementwise_geometry,
    }],
};

// --- products -----------------------------------------------------------------------------------

const MATVEC: File = File {
    name: "matvec",
    text: include_str!("../../cuda/matvec.cu"),
    exact: false,
    dtypes: ALL_DTYPES,
    code_bits: &[4],
    kernels: &[
        matvec("fourbit_matvec_1", |a, s, _| matvec_geometry(a, s, 1)),
        matvec("fourbit_matvec_2", |a, s, _| matvec_geometry(a, s, 2)),
        matvec("fourbit_matvec_4", |a, s, _| matvec_geometry(a, s, 4)),
        matvec("fourbit_matvec_8", |a, s, _| matvec_geometry(a, s, 8)),
    ],
};

const fn matvec(name: &'static str, geometry: GeometryOf) -> Kernel {
    Kernel {
        name,
        oldest: OLDEST,
        parameters: parameters![
            x: Pointer,
            packed: Pointer,
            absmax: Pointer,
            nested_absmax: OptionalPointer,
            nested_offset: OptionalPointer,
            bias: OptionalPointer,
            y: Pointer,
            m: Count,
            n: Count,
            k: Count,
        ],
        geometry,
    }
}

/// Sixteen outputs a block, two a warp, for so many rows of `x`. In dynamic shared memory 32 KiB of
/// pairs of values, and at most as much of `x`, by windows of 1024 columns.
fn matvec_geometry(
    arguments: &Arguments,
    specialisation: &Specialisation,
    rows: u64,
) -> Result<Option<Geometry>, ArgumentProblem> {
    let window = 1024 * rows * specialisation.dtype.size() as u64;
    let x_bytes = arguments
        .get("k")
        .div_ceil(1024)
        .saturating_mul(window)
        .min(32 << 10);
    grid(
        [
            arguments.get("n").div_ceil(16),
            arguments.get("m").div_ceil(rows),
            1,
        ],
        256,
        (32 << 10) + u32::try_from(x_bytes).unwrap_or(32 << 10),
    )
}

/// The first architecture with asynchronous copies, more than 64 KiB of shared memory, and tensor
/// cores for bf16.
const AMPERE: u32 = 80;

/// Those that tensor cores take.
const TENSOR_DTYPES: &[(Dtype, u32)] = &[(Dtype::F16, OLDEST), (Dtype::Bf16, AMPERE)];

const MATVEC_TENSOR: File = File {
    name: "matvec_tensor",
    text: include_str!("../../cuda/matvec_tensor.cu"),
    exact: false,
    dtypes: &[(Dtype::F16, AMPERE), (Dtype::Bf16, AMPERE)],
    code_bits: &[4],
    kernels: &[
        matvec_tensor("fourbit_matvec_tensor_1", |a, _, card| {
            matvec_tensor_geometry(a, card, 1)
        }),
        matvec_tensor("fourbit_matvec_tensor_2", |a, _, card| {
            matvec_tensor_geometry(a, card, 2)
        }),
        matvec_tensor("fourbit_matvec_tensor_4", |a, _, card| {
            matvec_tensor_geometry(a, card, 4)
        }),
    ],
};

const fn matvec_tensor(name: &'static str, geometry: GeometryOf) -> Kernel {
    Kernel {
        oldest: AMPERE,
        ..matvec(name, geometry)
    }
}

/// A block a multiprocessor, each with every so manieth tile of sixteen outputs.
fn matvec_tensor_geometry(
    arguments: &Arguments,
    card: &Card,
    rows: u64,
) -> Result<Option<Geometry>, ArgumentProblem> {
    let tiles = arguments.get("n").div_ceil(16);
    let bytes = matvec_tensor_bytes(rows, arguments.get("k"));
    grid(
        [
            tiles.min(card.processors.into()),
            arguments.get("m").div_ceil(rows),
            1,
        ],
        512,
        u32::try_from(bytes).unwrap_or(u32::MAX),
    )
}

/// Its dynamic shared memory: 256 entries of a table and as many lines of `x` between them, and
/// what more of those there are, 128 bytes each; the nested codebook; and for two rounds of sixteen
/// warps 16 sums for each row. A line has 64 columns, of which there are whole windows of 512.
fn matvec_tensor_bytes(rows: u64, depth: u64) -> u64 {
    let lines = depth.div_ceil(512).saturating_mul(8 * rows);
    lines
        .saturating_add(256)
        .max(512)
        .saturating_mul(128)
        .saturating_add(1024 + 2 * 16 * 16 * 4 * rows)
}

/// Shared memory that a block can have (CUDA Programming Guide, "Compute Capabilities"); of cards
/// that are not known yet, the least.
const fn most_shared_bytes(capability: u32) -> u64 {
    match capability {
        80 | 87 => 163 << 10,
        90 | 100 | 103 | 110 => 227 << 10,
        _ => 99 << 10,
    }
}

/// Whether `fourbit_matvec_tensor_<rows>` takes a weight of that many columns of outputs and terms
/// of each sum on such a card: all rows of `x` fit the shared memory, sums of at most 64 terms have
/// one scale, and 32 bits count the weight's chunks of 32 codes.
#[must_use]
pub fn matvec_tensor_takes(
    rows: u64,
    columns: u64,
    depth: u64,
    block_size: u64,
    capability: u32,
) -> bool {
    capability >= AMPERE
        && depth > 0
        && depth.is_multiple_of(block_size.clamp(1, 64))
        && (columns.div_ceil(16) * 16).saturating_mul(depth / 32) <= u64::from(u32::MAX)
        && matvec_tensor_bytes(rows, depth) <= most_shared_bytes(capability)
}

/// Columns of the result that a block of the tensor-core products has.
const TENSOR_COLUMNS: u64 = 128;

/// Into how many parts a tensor-core product's sum of `depth` terms is best cut, where the result
/// has so many tiles, to fill a card of so many multiprocessors: no part has fewer than 256 terms.
#[must_use]
pub fn splits(rows: u64, tile_rows: u64, columns: u64, depth: u64, processors: u32) -> (u64, u32) {
    let tiles = rows
        .div_ceil(tile_rows.max(1))
        .saturating_mul(columns.div_ceil(TENSOR_COLUMNS));
    let to_fill = u64::from(processors) / tiles.max(1);
    let splits = to_fill.min(depth / 256).clamp(1, MOST_BLOCKS[1].into());
    (tiles, u32::try_from(splits).unwrap_or(1))
}

const MATMUL: File = File {
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

const MATMUL_TRANSPOSED: File = File {
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

// --- AdamW --------------------------------------------------------------------------------------

/// It knows the dtypes of each parameter at run time, and no codebook but the dynamic maps; of the
/// specialisations, it is compiled for one.
const ADAMW: File = File {
    name: "adamw",
    text: include_str!("../../cuda/adamw.cu"),
    exact: true,
    dtypes: &[(Dtype::F32, OLDEST)],
    code_bits: &[4],
    kernels: &[
        Kernel {
            name: "fourbit_adamw_check",
            oldest: OLDEST,
            parameters: parameters![segments: Pointer, count: U32, tiles: Count, flags: Pointer],
            geometry: adamw_geometry,
        },
        Kernel {
            name: "fourbit_adamw",
            oldest: OLDEST,
            parameters: parameters![segments: Pointer, count: U32, tiles: Count, flags: Pointer],
            geometry: adamw_geometry,
        },
    ],
};

fn adamw_geometry(
    arguments: &Arguments,
    _: &Specialisation,
    card: &Card,
) -> Result<Option<Geometry>, ArgumentProblem> {
    // Eight tiles a block, one a warp.
    Ok(looping(arguments.get("tiles").div_ceil(8), 256, 8, card))
}
