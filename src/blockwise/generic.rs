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
use super::vector::{Vector, map_2};
use crate::element::Dtype;
use crate::{BlockSize, Codebook, Element};

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
    let codes_per_byte = 8 / codebook.code_bits() as usize;
    let blocks = input
        .chunks(block_size.get())
        .zip(packed.chunks_mut(block_size.get() / codes_per_byte))
        .zip(absmax);
    for (block_index, ((block, packed), absmax)) in blocks.enumerate() {
        // SAFETY: the caller answers for the features of `V`.
        let first_bad = unsafe { quantize_block::<V, T>(block, codebook, search, packed, absmax) };
        if let Some(index) = first_bad {
            return Some(block_index * block_size.get() + index);
        }
    }
    None
}

/// One block of [`quantize_blocks`].
#[inline(always)]
pub(super) unsafe fn quantize_block<V: Vector, T: Element>(
    block: &[T],
    codebook: &Codebook,
    search: &Search,
    packed: &mut [u8],
    absmax: &mut f32,
) -> Option<usize> {
    // SAFETY: the caller answers for the features of `V`.
    match unsafe { block_absmax::<V, T>(block) } {
        Some(scale) => *absmax = scale,
        None => return scalar::block_absmax(block).err(),
    }
    // SAFETY: as above.
    unsafe { encode_block::<V, T>(block, *absmax, codebook, search, packed) };
    None
}

/// The largest magnitude of a block; `None` where one is not finite.
#[inline(always)]
unsafe fn block_absmax<V: Vector, T: Element>(block: &[T]) -> Option<f32> {
    let groups = block.chunks_exact(V::GROUP);
    let rest = scalar::block_absmax(groups.remainder()).ok()?;
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

/// As [`scalar::encode_block`].
#[inline(always)]
unsafe fn encode_block<V: Vector, T: Element>(
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
    let bits = codebook.code_bits();
    let group_bytes = V::GROUP * bits as usize / 8;
    let groups = block.chunks_exact(V::GROUP);
    let rest = groups.remainder();
    let (packed, rest_packed) = packed.split_at_mut(groups.len() * group_bytes);
    // SAFETY: the caller answers for the features of `V`; `chunks_exact` for the lengths of what
    // the pointers point to.
    unsafe {
        let inverse = V::splat(inverse);
        for (group, bytes) in groups.zip(packed.chunks_exact_mut(group_bytes)) {
            let [even, odd] = V::load(group.as_ptr());
            let (even, odd) = (even.multiply(inverse), odd.multiply(inverse));
            if bits == 4 {
                let mut nodes = [nibble_node(even, search), nibble_node(odd, search)];
                if search.recode {
                    nodes = map_2!(nodes, |node| V::recode(node, &search.codes));
                }
                V::pack_nibbles(nodes, bytes.as_mut_ptr());
            } else {
                let mut codes = [0; 32];
                V::pack_bytes(
                    [byte_node(even, search), byte_node(odd, search)],
                    codes.as_mut_ptr(),
                );
                if search.recode {
                    for code in &mut codes {
                        *code = search.codes[usize::from(*code)];
                    }
                }
                if bits == 8 {
                    bytes.copy_from_slice(&codes);
                } else {
                    for (byte, codes) in bytes.iter_mut().zip(codes.chunks_exact(4)) {
                        *byte = codes.iter().fold(0, |byte, code| byte << 2 | code);
                    }
                }
            }
        }
    }
    scalar::encode_block(rest, scale, codebook, rest_packed);
}

/// Node `16 + rank` of every lane.
#[inline(always)]
unsafe fn nibble_node<V: Vector>(numbers: V, search: &Search) -> V::Index {
    // SAFETY: the caller answers for the features of `V`.
    unsafe {
        let node = V::root();
        let node = numbers.descend::<1>(search, node);
        let node = numbers.descend::<2>(search, node);
        let node = numbers.descend::<4>(search, node);
        numbers.descend::<8>(search, node)
    }
}

/// Node `256 + rank` of every lane.
#[inline(always)]
unsafe fn byte_node<V: Vector>(numbers: V, search: &Search) -> V::Index {
    // SAFETY: the caller answers for the features of `V`.
    unsafe {
        let node = nibble_node(numbers, search);
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
    let codes_per_byte = 8 / codebook.code_bits() as usize;
    let blocks = output
        .chunks_mut(block_size.get())
        .zip(packed.chunks(block_size.get() / codes_per_byte))
        .zip(absmax);
    for ((block, packed), &scale) in blocks {
        // SAFETY: the caller answers for the features of `V`; blocks are multiples of 64 bytes.
        unsafe { dequantize_block::<V, T, STREAM>(packed, scale, codebook, block) };
    }
}

/// One block of [`dequantize_blocks`].
#[inline(always)]
pub(super) unsafe fn dequantize_block<V: Vector, T: Element, const STREAM: bool>(
    packed: &[u8],
    scale: f32,
    codebook: &Codebook,
    output: &mut [T],
) {
    let bits = codebook.code_bits();
    let group_bytes = V::GROUP * bits as usize / 8;
    let mut groups = output.chunks_exact_mut(V::GROUP);
    let (packed, rest_packed) = packed.split_at(groups.len() * group_bytes);
    let bytes = packed.chunks_exact(group_bytes);
    // SAFETY: the caller answers for the features of `V`; `chunks_exact` for the lengths of what
    // the pointers point to. A group has 64 bytes or 128, so alignment carries on.
    unsafe {
        if bits == 8 {
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
                if bits == 4 {
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
    scalar::dequantize_block(rest_packed, scale, codebook, groups.into_remainder());
}
