//! Products with packed weights: `x W^T` and `y W` for a few rows of `x` or `y`, straight from the
//! codes.
//!
//! A weight of `out` rows and `in` columns is 0.516 bytes a number in NF4 with double quantization;
//! with one row of `x`, reading it once is all that has to happen. So codes become numbers in
//! registers, scales are decoded on the way, and nothing is written but the output.
//!
//! | file | what it holds |
//! |---|---|
//! | `matrix` | a packed weight, the scales of some of its rows, a row decoded |
//! | `operand` | the rows of `x` in the order in which numbers leave a register |
//! | `forward`, `transposed` | `x W^T` and `y W`: who does what, in which order |
//! | `tile` | some rows of the weight, and the way through them |
//! | `loops` | the loops over codes, over what an instruction set gives |
//! | `kernel` | what that is |
//! | `avx512`, `avx2`, `neon` | an instruction set, and the loops compiled with it |
//! | `fixed` | one or two rows of 16-bit numbers, by products of bytes |
//! | `choice` | which of them runs |
//! | `amx` | products of `bf16` with as many rows as there are, on the tiles of AMX |
//! | `scalar` | the specification |
//!
//! The loops over codes want rows that begin with a block and codes of four bits. Elsewhere a row
//! is decoded into the first-level cache and multiplied from there, which takes about three times
//! as long for one row of `x`.
//!
//! With more rows than [`fused_rows`] the weight is better decoded once, for a product of dense
//! matrices; that is the caller's to do.
//!
//! Sums are in single precision, in an order that depends on the instruction set but not on
//! threads. So are the products, but for these: AVX2 and NEON round the codebook's values to `bf16`
//! where `x` is `bf16`, and apply the scales to sums; `fixed` rounds less than a dense product does.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod choice;
#[cfg(target_arch = "x86_64")]
mod fixed;
mod forward;
mod kernel;
mod loops;
mod matrix;
#[cfg(target_arch = "aarch64")]
mod neon;
mod operand;
mod scalar;
mod tile;
mod transposed;

pub use self::forward::{multiply, multiply_with};
pub use self::matrix::{PackedMatrix, Scales};
pub use self::transposed::{multiply_transposed, multiply_transposed_with};
#[cfg(target_arch = "aarch64")]
use crate::blockwise::Kind;
#[cfg(target_arch = "x86_64")]
use crate::element::Dtype;
use crate::{Backend, BlockSize, Element};

/// Whether a product of `bf16` can use tiles: there is something to multiply.
#[cfg(target_arch = "x86_64")]
fn takes_tiles(backend: Backend, matrix: &PackedMatrix<'_>) -> bool {
    backend.has_tiles() && matrix.is_regular() && matrix.in_features > 0 && matrix.out_features > 0
}

/// Weights up to so many numbers are multiplied by the calling thread alone, unless there are
/// several rows of `x`.
const SMALL_PRODUCT: usize = 1 << 18;

/// Whether so much work is not worth other threads.
#[must_use]
pub const fn is_small(rows: usize, matrix: &PackedMatrix<'_>) -> bool {
    rows * matrix.out_features * matrix.in_features <= SMALL_PRODUCT
}

/// Up to how many rows of `x` or `y` these products are faster than decoding the weight for a
/// product of dense matrices; 0 where there is only plain Rust. More are right, too. With the tiles
/// of AMX, products of `bf16` are always faster.
///
/// Measured with 4096 x 4096 on two cores of Sapphire Rapids against decoding and torch 2.15's
/// product, which was not allowed to use AMX. `x W^T`: with AVX-512 faster up to 64 rows of any
/// type (`f32` 10.4 ms to 14.8, `bf16` 11.3 to 13.8), with AVX2 and `f32` up to 48 (14.4 to 15.4).
/// `y W`: as fast at 32 rows of `f32` and 48 of `bf16`, with AVX2 and `f32` faster at 32; `f16`,
/// and `bf16` on AVX2, took torch a hundred times as long. NEON was not measured.
#[must_use]
pub fn fused_rows<T: Element>(
    backend: Backend,
    code_bits: u32,
    block_size: BlockSize,
    in_features: usize,
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if backend.has_tiles()
        && T::DTYPE == Dtype::Bf16
        && matrix::is_regular(code_bits, block_size, in_features)
    {
        return usize::MAX;
    }
    let _ = (code_bits, block_size, in_features);
    match backend.kind() {
        _ if choice::Kernel::choose::<T>(backend).is_scalar() => 0,
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => 8,
        _ => 32,
    }
}
