//! Blockwise absmax quantization: every block of a flattened tensor has one scale, and every
//! element the code of the nearest codebook value of `x / scale`.
//!
//! [`scalar`] is the specification. The SIMD twins give the same bytes, on any number of threads:
//! blocks do not depend on each other. Work runs on the current rayon pool.
//!
//! Codes are packed high bits first: the first of two 4-bit codes is in the high nibble.

mod scalar;

use rayon::prelude::*;

use crate::layout::{Layout, check_length};
use crate::{BlockSize, Codebook, Element, Error, Result};

/// Elements a thread works on at a time: enough to hide the cost of handing out work, few enough
/// to stay in its share of the cache. A multiple of every block size.
const TASK_ELEMENTS: usize = 1 << 16;

/// The instruction set that does the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backend {
    /// Plain Rust: the specification.
    Scalar,
}

impl Backend {
    /// Every backend this processor can run, the fastest last.
    #[must_use]
    pub fn available() -> Vec<Self> {
        vec![Self::Scalar]
    }

    /// The fastest backend of this processor, or the one that the environment variable
    /// `FOURBIT_SIMD` names.
    ///
    /// # Errors
    /// [`Error::Backend`] where the variable names one that cannot run here.
    pub fn detect() -> Result<Self> {
        Ok(Self::Scalar)
    }

    /// The backend of that name.
    ///
    /// # Errors
    /// [`Error::Backend`] where there is none, or this processor cannot run it.
    pub fn by_name(name: &str) -> Result<Self> {
        let available = Self::available();
        available
            .iter()
            .copied()
            .find(|backend| backend.name() == name)
            .ok_or_else(|| Error::Backend {
                name: name.to_owned(),
                available: available.iter().map(|backend| backend.name()).collect(),
            })
    }

    /// `scalar`, `avx2`, `avx512` or `neon`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
        }
    }
}

/// Quantizes `input` into `packed` codes and one scale a block, with the backend that
/// [`Backend::detect`] finds.
///
/// `packed` and `absmax` have the lengths that [`Layout`] gives. In a last byte that is not full,
/// the missing codes are those of zero.
///
/// # Errors
/// [`Error::NonFinite`] names the first element that is NaN or infinite; what `packed` and
/// `absmax` then hold is unspecified. [`Error::Length`] for a buffer of another size.
pub fn quantize<T: Element>(
    input: &[T],
    codebook: &Codebook,
    block_size: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    quantize_with(
        Backend::detect()?,
        input,
        codebook,
        block_size,
        packed,
        absmax,
    )
}

/// [`quantize`] with the backend of your choice.
///
/// # Errors
/// As [`quantize`].
pub fn quantize_with<T: Element>(
    backend: Backend,
    input: &[T],
    codebook: &Codebook,
    block_size: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    let layout = Layout::new(input.len() as u64, block_size, codebook.code_bits());
    check_length("packed", layout.packed_bytes, packed.len())?;
    check_length("absmax", layout.blocks, absmax.len())?;
    let codes_per_byte = 8 / codebook.code_bits() as usize;
    let bad = input
        .par_chunks(TASK_ELEMENTS)
        .zip(packed.par_chunks_mut(TASK_ELEMENTS / codes_per_byte))
        .zip(absmax.par_chunks_mut(TASK_ELEMENTS / block_size.get()))
        .enumerate()
        .filter_map(|(task, ((input, packed), absmax))| {
            let first_bad = match backend {
                Backend::Scalar => {
                    scalar::quantize_blocks(input, codebook, block_size, packed, absmax)
                }
            };
            first_bad.map(|index| (task * TASK_ELEMENTS + index, input[index].to_f32()))
        })
        .min_by_key(|&(index, _)| index);
    match bad {
        None => Ok(()),
        Some((index, value)) => Err(Error::NonFinite {
            index: index as u64,
            value,
        }),
    }
}

/// Turns codes and scales back into numbers: `codebook[code] * absmax`, computed in single
/// precision and rounded once to `T`. Scales may be of either sign.
///
/// # Errors
/// [`Error::Length`] where `packed` or `absmax` do not have the lengths that [`Layout`] gives for
/// `output.len()` elements.
pub fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    codebook: &Codebook,
    block_size: BlockSize,
    output: &mut [T],
) -> Result<()> {
    dequantize_with(
        Backend::detect()?,
        packed,
        absmax,
        codebook,
        block_size,
        output,
    )
}

/// [`dequantize`] with the backend of your choice.
///
/// # Errors
/// As [`dequantize`].
pub fn dequantize_with<T: Element>(
    backend: Backend,
    packed: &[u8],
    absmax: &[f32],
    codebook: &Codebook,
    block_size: BlockSize,
    output: &mut [T],
) -> Result<()> {
    let layout = Layout::new(output.len() as u64, block_size, codebook.code_bits());
    check_length("packed", layout.packed_bytes, packed.len())?;
    check_length("absmax", layout.blocks, absmax.len())?;
    let codes_per_byte = 8 / codebook.code_bits() as usize;
    output
        .par_chunks_mut(TASK_ELEMENTS)
        .zip(packed.par_chunks(TASK_ELEMENTS / codes_per_byte))
        .zip(absmax.par_chunks(TASK_ELEMENTS / block_size.get()))
        .for_each(|((output, packed), absmax)| match backend {
            Backend::Scalar => {
                scalar::dequantize_blocks(packed, absmax, codebook, block_size, output);
            }
        });
    Ok(())
}
