//! The register of kernels: what a kernel file is compiled with, which kernels it holds, what they
//! take and how they are launched stands here and nowhere else. What the parameters mean stands in
//! the files.

use super::kernel::{Arguments, Card, File, Geometry, Kernel, Kind, OLDEST, Parameter};
use super::{ArgumentProblem, GpuProblem};
use crate::element::Dtype;

/// The files, in the order in which data flows through them.
pub static FILES: &[File] = &[ADAMW];

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
            parameters: parameters![segments: Pointer, count: U32, tiles: Count, flags: Pointer],
            geometry: adamw_geometry,
        },
        Kernel {
            name: "fourbit_adamw",
            parameters: parameters![segments: Pointer, count: U32, tiles: Count, flags: Pointer],
            geometry: adamw_geometry,
        },
    ],
};

fn adamw_geometry(arguments: &Arguments, card: &Card) -> Result<Option<Geometry>, ArgumentProblem> {
    // Eight tiles a block, one a warp.
    Ok(looping(arguments.get("tiles").div_ceil(8), 256, 8, card))
}
