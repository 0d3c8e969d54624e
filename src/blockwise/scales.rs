//! Scales of double quantization to numbers: `value * nested scale + offset`, both rounded.
//!
//! Floor for 64 of them, on AVX-512 with VBMI: 16 look-ups of bytes, 12 instructions that put
//! bytes and numbers side by side, 8 of arithmetic, most of them on one port: 30 cycles. Gathering
//! the values takes 64 at least, at a load or two a cycle.
#![allow(unsafe_code)]

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
use super::backend::Kind;
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
use super::vector::{ByteMap, Vector, map_2};
use crate::layout::NESTED_BLOCK_SIZE;
use crate::{Backend, Codebook};

/// Codes at a time: two groups.
const STRIDE: usize = 64;

/// Decodes scales, on the caller's thread.
pub(crate) struct ScaleDecoder {
    backend: Backend,
    /// Of a processor with AVX-512, whether it has VBMI too.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    by_bytes: bool,
    map: &'static ByteMap,
}

impl ScaleDecoder {
    pub(crate) fn new(backend: Backend) -> Self {
        static MAP: OnceLock<ByteMap> = OnceLock::new();
        #[cfg(target_arch = "x86_64")]
        let by_bytes = is_x86_feature_detected!("avx512vbmi");
        #[cfg(not(target_arch = "x86_64"))]
        let by_bytes = false;
        Self {
            backend,
            by_bytes,
            map: MAP.get_or_init(|| ByteMap::new(Codebook::dynamic_signed().values())),
        }
    }

    /// Whole blocks of 256 scales, the last of which may be short: the shortest of the slices
    /// decides.
    pub(crate) fn decode(&self, codes: &[u8], nested: &[f32], offset: f32, scales: &mut [f32]) {
        let map = self.map;
        // SAFETY: a `Backend` exists only where the processor has its features, and the processor
        // was asked for VBMI.
        unsafe {
            match self.backend.kind() {
                Kind::Scalar => decode_scalar(map, codes, nested, offset, scales),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx2 => avx2(map, codes, nested, offset, scales),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 if self.by_bytes => avx512_vbmi(map, codes, nested, offset, scales),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 => avx512(map, codes, nested, offset, scales),
                #[cfg(target_arch = "aarch64")]
                Kind::Neon => neon(map, codes, nested, offset, scales),
            }
        }
    }
}

macro_rules! version {
    ($name:ident, $vector:ident, $features:literal, by_bytes: $by_bytes:literal) => {
        #[target_feature(enable = $features)]
        fn $name(map: &ByteMap, codes: &[u8], nested: &[f32], offset: f32, scales: &mut [f32]) {
            // SAFETY: this function has the features of the vector type.
            unsafe { decode_simd::<$vector, $by_bytes>(map, codes, nested, offset, scales) }
        }
    };
}
#[cfg(target_arch = "x86_64")]
version!(avx512_vbmi, Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,f16c", by_bytes: true);
#[cfg(target_arch = "x86_64")]
version!(avx512, Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c", by_bytes: false);
#[cfg(target_arch = "x86_64")]
version!(avx2, Avx2, "avx2,f16c", by_bytes: false);
#[cfg(target_arch = "aarch64")]
version!(neon, Neon, "neon", by_bytes: false);

fn decode_scalar(map: &ByteMap, codes: &[u8], nested: &[f32], offset: f32, scales: &mut [f32]) {
    let block = NESTED_BLOCK_SIZE.get();
    let blocks = scales.chunks_mut(block).zip(codes.chunks(block));
    for ((scales, codes), &nested) in blocks.zip(nested) {
        decode_singly(map, codes, nested, offset, scales);
    }
}

/// # Safety
/// The processor must have the features of `V`, and AVX-512 VBMI with `BY_BYTES`.
#[inline(always)]
unsafe fn decode_simd<V: Vector, const BY_BYTES: bool>(
    map: &ByteMap,
    codes: &[u8],
    nested: &[f32],
    offset: f32,
    scales: &mut [f32],
) {
    let block = NESTED_BLOCK_SIZE.get();
    let blocks = scales.chunks_mut(block).zip(codes.chunks(block));
    for ((scales, codes), &nested) in blocks.zip(nested) {
        let length = scales.len().min(codes.len());
        let mut strides = scales[..length].chunks_exact_mut(STRIDE);
        let mut codes = codes[..length].chunks_exact(STRIDE);
        // SAFETY: the caller answers for the features; a stride is two groups.
        unsafe {
            let (nested, offset) = (V::splat(nested), V::splat(offset));
            for (scales, codes) in (&mut strides).zip(&mut codes) {
                let values = if BY_BYTES {
                    V::values_by_bytes(map, codes.as_ptr())
                } else {
                    V::values_of(map, codes.as_ptr())
                };
                for (group, scales) in values.into_iter().zip(scales.chunks_exact_mut(V::GROUP)) {
                    let numbers = map_2!(group, |value| value.multiply(nested).add(offset));
                    V::store(numbers, scales.as_mut_ptr());
                }
            }
        }
        let rest = strides.into_remainder();
        decode_singly(map, codes.remainder(), nested, offset, rest);
    }
}

fn decode_singly(map: &ByteMap, codes: &[u8], nested: f32, offset: f32, scales: &mut [f32]) {
    for (scale, &code) in scales.iter_mut().zip(codes) {
        *scale = map.values[usize::from(code)] * nested + offset;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_backend_gives_what_the_scalar_one_gives() {
        let codes: Vec<u8> = (0..1000_u32).map(|i| (i * 37 % 256) as u8).collect();
        let nested = [1.5e-3, 0.7, 3.0e-39, 12.0];
        for length in [0, 1, 63, 64, 255, 256, 257, 600, 1000] {
            let mut expected = vec![0.0; length];
            ScaleDecoder::new(Backend::SCALAR).decode(&codes, &nested, 0.11, &mut expected);
            for (index, &scale) in expected.iter().enumerate() {
                let value = Codebook::dynamic_signed().values()[usize::from(codes[index])];
                assert_eq!(scale, value * nested[index / 256] + 0.11);
            }
            for backend in Backend::available() {
                let mut scales = vec![0.0; length];
                let mut decoder = ScaleDecoder::new(backend);
                decoder.decode(&codes, &nested, 0.11, &mut scales);
                assert_eq!(scales, expected, "{backend:?}, {length} scales");
                decoder.by_bytes = false;
                decoder.decode(&codes, &nested, 0.11, &mut scales);
                assert_eq!(scales, expected, "{backend:?}, {length} scales, gathered");
            }
        }
    }
}
