//! Blockwise absmax quantization: every block of a flattened tensor has one scale, and every
//! element the code of the nearest codebook value of `x / scale`.
//!
//! `scalar` is the specification. The SIMD twins give the same bytes, on any number of threads:
//! blocks do not depend on each other. Those are the threads of
//! [`team`].
//!
//! | file | what it holds |
//! |---|---|
//! | `scalar` | the specification |
//! | `generic` | the same, 32 elements at a time, over the trait in `vector` |
//! | `avx2`, `avx512`, `neon` | that trait, and the code instantiated with it |
//! | `search` | a codebook made ready for it |
//! | `cells` | the 8-bit dynamic maps made ready for it |
//! | `scales` | scales of double quantization to numbers |
//! | `backend` | which of them runs |
//!
//! Codes are packed high bits first: the first of two 4-bit codes is in the high nibble.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod backend;
mod cells;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod generic;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
mod scales;
mod search;
mod task;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod vector;

use std::sync::atomic::{AtomicUsize, Ordering};

pub use self::backend::Backend;
pub(crate) use self::backend::{Kind, each_vector, versions};
pub(crate) use self::cells::{CellWords, Cells};
#[cfg(target_arch = "aarch64")]
pub(crate) use self::neon::Neon;
pub(crate) use self::scalar::{encode_block, normaliser};
pub(crate) use self::scales::ScaleDecoder;
use self::search::Search;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use self::vector::{ByteMap, Vector, map_2};
#[cfg(target_arch = "x86_64")]
pub(crate) use self::{avx2::Avx2, avx512::Avx512};
use crate::layout::{Layout, check_length};
use crate::{BlockSize, Codebook, Element, Error, Result, team};

/// Elements a thread works on at a time: enough to hide the cost of handing out work, few enough
/// to stay in its share of the cache. A multiple of every block size.
const TASK_ELEMENTS: usize = 1 << 16;

/// Outputs from this size on would not stay in the cache, and are best written past it.
const STREAM_BYTES: usize = 32 << 20;

/// Elements up to which the calling thread does all of the work. Some 50 µs of it: waking other
/// threads takes as long, and longer where torch's own are still spinning after a product.
const SMALL_ELEMENTS: usize = 1 << 18;

/// Whether so much work is not worth other threads.
#[must_use]
pub const fn is_small(elements: usize) -> bool {
    elements <= SMALL_ELEMENTS
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
    let search = Search::new(codebook);
    let codes_per_byte = 8 / codebook.code_bits() as usize;
    let quantize_task = |input: &[T], packed: &mut [u8], absmax: &mut [f32]| {
        task::quantize_blocks(
            backend, input, codebook, &search, block_size, packed, absmax,
        )
    };
    let bad = if is_small(input.len()) {
        quantize_task(input, packed, absmax)
    } else {
        let first = AtomicUsize::new(usize::MAX);
        let tasks = input
            .chunks(TASK_ELEMENTS)
            .zip(packed.chunks_mut(TASK_ELEMENTS / codes_per_byte))
            .zip(absmax.chunks_mut(TASK_ELEMENTS / block_size.get()))
            .enumerate()
            .collect();
        team::each(tasks, |(task, ((input, packed), absmax))| {
            if let Some(index) = quantize_task(input, packed, absmax) {
                first.fetch_min(task * TASK_ELEMENTS + index, Ordering::Relaxed);
            }
        });
        Some(first.into_inner()).filter(|index| *index != usize::MAX)
    };
    match bad {
        None => Ok(()),
        Some(index) => Err(Error::NonFinite {
            index: index as u64,
            value: input[index].to_f32(),
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
    let stream = size_of_val(output) >= STREAM_BYTES;
    if stream {
        task::advise_large_pages(output);
    }
    let dequantize_task = |packed: &[u8], absmax: &[f32], output: &mut [T]| {
        task::dequantize_blocks(
            backend, packed, absmax, codebook, block_size, output, stream,
        );
    };
    if is_small(output.len()) {
        dequantize_task(packed, absmax, output);
    } else {
        let tasks = output
            .chunks_mut(TASK_ELEMENTS)
            .zip(packed.chunks(TASK_ELEMENTS / codes_per_byte))
            .zip(absmax.chunks(TASK_ELEMENTS / block_size.get()))
            .collect();
        team::each(tasks, |((output, packed), absmax)| {
            dequantize_task(packed, absmax, output);
        });
    }
    Ok(())
}

/// As [`dequantize`] on the caller's thread, lengths unchecked: the shortest of the slices decides.
pub(crate) fn decode(
    backend: Backend,
    packed: &[u8],
    absmax: &[f32],
    codebook: &Codebook,
    block_size: BlockSize,
    output: &mut [f32],
) {
    task::dequantize_blocks(backend, packed, absmax, codebook, block_size, output, false);
}

/// A codebook and a backend at hand for many small calls, on the caller's thread.
pub(crate) struct Coder<'a> {
    backend: Backend,
    codebook: &'a Codebook,
    search: Search,
    block_size: BlockSize,
}

impl<'a> Coder<'a> {
    /// For codes of 8 bits.
    pub(crate) fn new(backend: Backend, codebook: &'a Codebook, block_size: BlockSize) -> Self {
        let search = Search::new(codebook);
        Self {
            backend,
            codebook,
            search,
            block_size,
        }
    }

    /// [`decode`] with these.
    pub(crate) fn decode(&self, codes: &[u8], absmax: &[f32], output: &mut [f32]) {
        let (codebook, block_size) = (self.codebook, self.block_size);
        decode(self.backend, codes, absmax, codebook, block_size, output);
    }

    /// As [`quantize`], lengths unchecked; whether all of `input` was finite.
    pub(crate) fn encode(&self, input: &[f32], codes: &mut [u8], absmax: &mut [f32]) -> bool {
        task::quantize_blocks(
            self.backend,
            input,
            self.codebook,
            &self.search,
            self.block_size,
            codes,
            absmax,
        )
        .is_none()
    }
}

/// Converts every element: exactly to a wider type, rounded to nearest even to a narrower one.
/// Both slices are of one length.
pub(crate) fn convert<S: Element, D: Element>(backend: Backend, source: &[S], target: &mut [D]) {
    task::convert(backend, source, target);
}
