//! The products of a few rows in the register of kernels.

use super::ArgumentProblem;
use super::kernel::{
    AMPERE, Arguments, Card, File, Geometry, GeometryOf, Kernel, Kind, OLDEST, Parameter,
    block_bytes,
};
use super::kernels::{ALL_DTYPES, grid, parameters};
use super::source::Specialisation;
use crate::element::Dtype;

pub(super) const MATVEC: File = File {
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

pub(super) const MATVEC_TENSOR: File = File {
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
        && matvec_tensor_bytes(rows, depth) <= block_bytes(capability).into()
}
