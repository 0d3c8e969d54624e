//! The SIMD twins of [`super::scalar`], written once over [`Vector`].
//!
//! What does not fill a group of 32, and blocks whose scale must be lifted, go to the scalar code.
//!
//! # Safety
//! For every function: the processor must have the features of `V`.
#![allow(unsafe_code)]

use half::{bf16, f16};

use super::scalar;
use super::search::Search;
use super::vector::{Vector, descend_4, map_2};
use crate::element::Dtype;
use crate::{BlockSize, Codebook, Element};

/// Elements whose scales are all found before the first is encoded. A processor that must wait for
/// a scale before it can encode waits less if the scale is a while old. Fits the first-level cache.
const BATCH: usize = 1024;

/// Bytes from what is read to what is asked for: the hardware alone does not look far enough. Took
/// a third off the time for a tensor larger than the cache.
const AHEAD: usize = 2048;
const CACHE_LINE: usize = 64;

/// As [`scalar::quantize_blocks`].
#[inline(always)]
pub(super) unsafe fn quantize_blocks<V: Vector, T: Element>(
    input: &[T],
    codebook: &Codebook,
    search: &Search,
    block_size: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Option<usize> {
    // SAFETY: the caller answers for the features of `V`.
    unsafe {
        match codebook.code_bits() {
            2 => quantize::<V, T, 2>(input, codebook, search, block_size, packed, absmax),
            4 => quantize::<V, T, 4>(input, codebook, search, block_size, packed, absmax),
            _ => quantize::<V, T, 8>(input, codebook, search, block_size, packed, absmax),
        }
    }
}

/// [`quantize_blocks`] for one width of code, so that each loop has the registers to itself.
#[inline(always)]
unsafe fn quantize<V: Vector, T: Element, const BITS: usize>(
    input: &[T],
    codebook: &Codebook,
    search: &Search,
    block_size: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Option<usize> {
    let batch_elements = BATCH.max(block_size.get());
    let batches = input
        .chunks(batch_elements)
        .zip(packed.chunks_mut(batch_elements * BITS / 8))
        .zip(absmax.chunks_mut(batch_elements / block_size.get()));
    for (batch_index, ((input, packed), absmax)) in batches.enumerate() {
        for (block_index, (block, absmax)) in
            input.chunks(block_size.get()).zip(&mut *absmax).enumerate()
        {
            // SAFETY: the caller answers for the features of `V`; any address may be prefetched.
            let largest = unsafe {
                for byte in (0..size_of_val(block)).step_by(CACHE_LINE) {
                    V::prefetch(block.as_ptr().cast::<u8>().wrapping_add(byte + AHEAD));
                }
                block_absmax::<V, T>(block)
            };
            let Some(scale) = largest else {
                let index = scalar::block_absmax(block).err()?;
                return Some(batch_index * batch_elements + block_index * block_size.get() + index);
            };
            *absmax = scale;
        }
        let blocks = input
            .chunks(block_size.get())
            .zip(packed.chunks_mut(block_size.get() * BITS / 8));
        for ((block, packed), &scale) in blocks.zip(&*absmax) {
            // SAFETY: the caller answers for the features of `V`.
            unsafe { encode_block::<V, T, BITS>(block, scale, codebook, search, packed) };
        }
    }
    None
}

/// The largest magnitude of a block; `None` where one is not finite.
#[inline(always)]
unsafe fn block_absmax<V: Vector, T: Element>(block: &[T]) -> Option<f32> {
    let groups = block.chunks_exact(V::GROUP);
    let mut rest = 0.0;
    if !groups.remainder().is_empty() {
        rest = scalar::block_absmax(groups.remainder()).ok()?;
    }
    // SAFETY: the caller answers for the features of `V`; `chunks_exact` for the lengths of what
    // the pointers point to.
    let bits = unsafe {
        let mut magnitudes = V::no_magnitudes();
        for group in groups {
            magnitudes = V::larger(magnitudes, group.as_ptr());
        }
        V::largest::<T>(magnitudes)
    };
    let largest = match T::DTYPE {
        Dtype::F32 => f32::from_bits(bits),
        // The upper half of the bits is zero.
        Dtype::F16 => f16::from_bits(bits as u16).to_f32(),
        Dtype::Bf16 => bf16::from_bits(bits as u16).to_f32(),
    };
    largest.is_finite().then(|| largest.max(rest))
}

/// As [`scalar::encode_block`]; `scale` is not below the block's largest magnitude.
#[inline(always)]
unsafe fn encode_block<V: Vector, T: Element, const BITS: usize>(
    block: &[T],
    scale: f32,
    codebook: &Codebook,
    search: &Search,
    packed: &mut [u8],
) {
    let (lift, inverse) = scalar::normaliser(scale);
    if lift != 1.0 {
        return scalar::encode_block(block, scale, codebook, packed);
    }
    let groups = block.chunks_exact(V::GROUP);
    let rest = groups.remainder();
    let (packed, rest_packed) = packed.split_at_mut(groups.len() * V::GROUP * BITS / 8);
    // SAFETY: the caller answers for the features of `V`; `chunks_exact` for the lengths of what
    // the pointers point to.
    unsafe {
        let inverse = V::splat(inverse);
        for (group, bytes) in groups.zip(packed.chunks_exact_mut(V::GROUP * BITS / 8)) {
            let numbers = map_2!(V::load(group.as_ptr()), |half| half.multiply(inverse));
            if BITS == 4 {
                let mut nodes = map_2!(numbers, |half| half.nibble_node(search));
                if search.recode {
                    nodes = map_2!(nodes, |half| V::recode(half, &search.codes));
                }
                V::pack_nibbles(nodes, bytes.as_mut_ptr());
            } else {
                let mut codes = [0; 32];
                let nodes = map_2!(numbers, |half| byte_node(half, search));
                V::pack_bytes(nodes, codes.as_mut_ptr());
                if search.recode {
                    for code in &mut codes {
                        *code = search.codes[usize::from(*code)];
                    }
                }
                if BITS == 8 {
                    bytes.copy_from_slice(&codes);
                } else {
                    for (byte, codes) in bytes.iter_mut().zip(codes.chunks_exact(4)) {
                        *byte = codes.iter().fold(0, |byte, code| byte << 2 | code);
                    }
                }
            }
        }
    }
    if !rest.is_empty() {
        scalar::encode_block(rest, scale, codebook, rest_packed);
    }
}

/// Node `256 + rank` of every lane.
#[inline(always)]
unsafe fn byte_node<V: Vector>(numbers: V, search: &Search) -> V::Index {
    // SAFETY: the caller answers for the features of `V`.
    unsafe {
        if let Some(cells) = search.cells {
            let words = cells.middle();
            return if cells.is_signed() {
                numbers.cell_node::<true>(words)
            } else {
                numbers.cell_node::<false>(words)
            };
        }
        let node = descend_4(numbers, search);
        let node = numbers.descend::<16>(search, node);
        let node = numbers.descend::<32>(search, node);
        let node = numbers.descend::<64>(search, node);
        numbers.descend::<128>(search, node)
    }
}

/// As [`scalar::dequantize_blocks`]. With `STREAM`, `output` is aligned to 64 bytes and the
/// caller fences.
#[inline(always)]
pub(super) unsafe fn dequantize_blocks<V: Vector, T: Element, const STREAM: bool>(
    packed: &[u8],
    absmax: &[f32],
    codebook: &Codebook,
    block_size: BlockSize,
    output: &mut [T],
) {
    // SAFETY: the caller answers for the features of `V` and the alignment.
    unsafe {
        match codebook.code_bits() {
            2 => dequantize::<V, T, STREAM, 2>(packed, absmax, codebook, block_size, output),
            4 => dequantize::<V, T, STREAM, 4>(packed, absmax, codebook, block_size, output),
            _ => dequantize::<V, T, STREAM, 8>(packed, absmax, codebook, block_size, output),
        }
    }
}

/// [`dequantize_blocks`] for one width of code.
#[inline(always)]
unsafe fn dequantize<V: Vector, T: Element, const STREAM: bool, const BITS: usize>(
    packed: &[u8],
    absmax: &[f32],
    codebook: &Codebook,
    block_size: BlockSize,
    output: &mut [T],
) {
    let blocks = output
        .chunks_mut(block_size.get())
        .zip(packed.chunks(block_size.get() * BITS / 8))
        .zip(absmax);
    for ((block, packed), &scale) in blocks {
        // SAFETY: the caller answers for the features of `V`; blocks are multiples of 64 bytes.
        unsafe { decode_block::<V, T, STREAM, BITS>(packed, scale, codebook, block) };
    }
}

/// As [`scalar::dequantize_block`].
#[inline(always)]
unsafe fn decode_block<V: Vector, T: Element, const STREAM: bool, const BITS: usize>(
    packed: &[u8],
    scale: f32,
    codebook: &Codebook,
    output: &mut [T],
) {
    let mut groups = output.chunks_exact_mut(V::GROUP);
    let (packed, rest_packed) = packed.split_at(groups.len() * V::GROUP * BITS / 8);
    let bytes = packed.chunks_exact(V::GROUP * BITS / 8);
    // SAFETY: the caller answers for the features of `V`; `chunks_exact` for the lengths of what
    // the pointers point to. A group has 64 bytes or 128, so alignment carries on.
    unsafe {
        if BITS == 8 {
            let scale = V::splat(scale);
            for (group, bytes) in (&mut groups).zip(bytes) {
                let numbers = map_2!(V::unpack_bytes(bytes.as_ptr()), |codes| {
                    V::gather(codebook.values(), codes).multiply(scale)
                });
                V::store(numbers, group.as_mut_ptr());
            }
        } else {
            let table = V::table::<T>(codebook.values(), scale);
            for (group, bytes) in (&mut groups).zip(bytes) {
                if BITS == 4 {
                    V::decode::<T, STREAM>(table, bytes.as_ptr(), group.as_mut_ptr());
                } else {
                    let mut nibbles = [0; 16];
                    for (pair, &byte) in nibbles.chunks_exact_mut(2).zip(bytes) {
                        pair[0] = byte >> 2 & 0x30 | byte >> 4 & 0x03;
                        pair[1] = byte << 2 & 0x30 | byte & 0x03;
                    }
                    V::decode::<T, STREAM>(table, nibbles.as_ptr(), group.as_mut_ptr());
                }
            }
        }
    }
    let rest = groups.into_remainder();
    if !rest.is_empty() {
        scalar::dequantize_block(rest_packed, scale, codebook, rest);
    }
}

/// Converts every element: exactly to a wider type, rounded to nearest even to a narrower one.
#[inline(always)]
pub(super) unsafe fn convert<V: Vector, S: Element, D: Element>(source: &[S], target: &mut [D]) {
    let sources = source.chunks_exact(V::GROUP);
    let mut targets = target.chunks_exact_mut(V::GROUP);
    let rest = sources.remainder();
    for (source, target) in sources.zip(&mut targets) {
        // SAFETY: the caller answers for the features of `V`; `chunks_exact` for the lengths.
        unsafe { V::store(V::load(source.as_ptr()), target.as_mut_ptr()) };
    }
    scalar::convert(rest, targets.into_remainder());
}
