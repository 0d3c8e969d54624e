//! The register of kernels: what a kernel file is compiled with, which kernels it holds, what they
//! take and how they are launched stands here and nowhere else. What the parameters mean stands in
//! the files.

use super::kernel::{Arguments, Card, File, Geometry, Kernel, Kind, OLDEST, Parameter};
use super::matvec::{MATVEC, MATVEC_TENSOR};
use super::products::{MATMUL, MATMUL_TRANSPOSED};
use super::source::Specialisation;
use super::{ArgumentProblem, GpuProblem};
use crate::element::Dtype;

/// Blocks of a grid's dimensions (CUDA Programming Guide, "Compute Capabilities").
pub(super) const MOST_BLOCKS: [u32; 3] = [(1 << 31) - 1, 65_535, 65_535];

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

pub(super) use parameters;

/// All dtypes, on all cards.
pub(super) const ALL_DTYPES: &[(Dtype, u32)] = &[
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
pub(super) fn grid(
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
            parameters: ADAMW_PARAMETERS,
            geometry: adamw_geometry,
        },
        Kernel {
            name: "fourbit_adamw",
            oldest: OLDEST,
            parameters: ADAMW_PARAMETERS,
            geometry: adamw_geometry,
        },
    ],
};

/// A slice of the table of segments, and where the verdicts on all of them stand.
const ADAMW_PARAMETERS: &[Parameter] = parameters![
    segments: Pointer,
    count: U32,
    first_tile: Count,
    tiles: Count,
    flags: Pointer,
    damaged: Pointer,
];

fn adamw_geometry(
    arguments: &Arguments,
    _: &Specialisation,
    card: &Card,
) -> Result<Option<Geometry>, ArgumentProblem> {
    // Eight tiles a block, one a warp.
    Ok(looping(arguments.get("tiles").div_ceil(8), 256, 8, card))
}
