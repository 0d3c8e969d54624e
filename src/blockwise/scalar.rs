//! The specification of blockwise quantization, in plain Rust.

use crate::{BlockSize, Codebook, Element};

/// Where the reciprocal of a scale would overflow, scale and elements are first multiplied by
/// this power of two, which is exact.
const SUBNORMAL_LIFT: f32 = (1_u128 << 64) as f32;

/// Quantizes whole blocks, the last of which may be short.
///
/// Returns the index of the first element that is not finite, if there is one; `packed` and
/// `absmax` are then unspecified.
pub(super) fn quantize_blocks<T: Element>(
    input: &[T],
    codebook: &Codebook,
    block_size: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Option<usize> {
    let codes_per_byte = 8 / codebook.code_bits() as usize;
    let blocks = input
        .chunks(block_size.get())
        .zip(packed.chunks_mut(block_size.get() / codes_per_byte))
        .zip(absmax);
    for (block_index, ((block, packed), absmax)) in blocks.enumerate() {
        match block_absmax(block) {
            Ok(scale) => *absmax = scale,
            Err(index) => return Some(block_index * block_size.get() + index),
        }
        encode_block(block, *absmax, codebook, packed);
    }
    None
}

/// The largest magnitude of a block, or the index of its first element that is not finite.
#[inline(never)]
pub(super) fn block_absmax<T: Element>(block: &[T]) -> Result<f32, usize> {
    let mut absmax = 0.0_f32;
    for (index, element) in block.iter().enumerate() {
        let magnitude = element.to_f32().abs();
        if !magnitude.is_finite() {
            return Err(index);
        }
        absmax = absmax.max(magnitude);
    }
    Ok(absmax)
}

/// Encodes and packs one block, given its scale.
#[inline(never)]
pub(crate) fn encode_block<T: Element>(
    block: &[T],
    scale: f32,
    codebook: &Codebook,
    packed: &mut [u8],
) {
    let (lift, inverse) = normaliser(scale);
    let bits = codebook.code_bits();
    let codes_per_byte = 8 / bits as usize;
    let zero = codebook.encode(0.0);
    for (elements, byte) in block.chunks(codes_per_byte).zip(packed) {
        *byte = (0..codes_per_byte).fold(0, |byte: u8, position| {
            let code = elements.get(position).map_or(zero, |element| {
                codebook.encode(element.to_f32() * lift * inverse)
            });
            byte.checked_shl(bits).unwrap_or(0) | code
        });
    }
}

/// What elements are multiplied by: first an exact power of two, then the reciprocal of the scale.
///
/// A block of zeros has scale 0, and its elements stay zero. The reciprocal of a scale below
/// 2^-128 would be infinite, so such a scale is lifted.
pub(crate) fn normaliser(scale: f32) -> (f32, f32) {
    if scale == 0.0 {
        return (1.0, 0.0);
    }
    let inverse = 1.0 / scale;
    if inverse.is_finite() {
        (1.0, inverse)
    } else {
        (SUBNORMAL_LIFT, 1.0 / (scale * SUBNORMAL_LIFT))
    }
}

/// Decodes whole blocks, the last of which may be short.
pub(super) fn dequantize_blocks<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    codebook: &Codebook,
    block_size: BlockSize,
    output: &mut [T],
) {
    let codes_per_byte = 8 / codebook.code_bits() as usize;
    let blocks = output
        .chunks_mut(block_size.get())
        .zip(packed.chunks(block_size.get() / codes_per_byte))
        .zip(absmax);
    for ((block, packed), &scale) in blocks {
        dequantize_block(packed, scale, codebook, block);
    }
}

/// Decodes one block.
#[inline(never)]
pub(super) fn dequantize_block<T: Element>(
    packed: &[u8],
    scale: f32,
    codebook: &Codebook,
    output: &mut [T],
) {
    let bits = codebook.code_bits();
    let codes_per_byte = 8 / bits as usize;
    let values = codebook.values();
    let mask = u8::MAX >> (8 - bits);
    for (elements, &byte) in output.chunks_mut(codes_per_byte).zip(packed) {
        for (position, element) in elements.iter_mut().enumerate() {
            let shift = 8 - bits * (position as u32 + 1);
            let code = (byte >> shift) & mask;
            *element = T::from_f32(values[usize::from(code)] * scale);
        }
    }
}

/// Converts every element: exactly to a wider type, rounded to nearest even to a narrower one.
pub(super) fn convert<S: Element, D: Element>(source: &[S], target: &mut [D]) {
    for (source, target) in source.iter().zip(target) {
        *target = D::from_f32(source.to_f32());
    }
}
