//! Scales of double quantization to numbers: `value * nested scale + offset`, both rounded.
//!
//! Floor for 64 of them, on AVX-512 with VBMI: 16 look-ups of bytes, 12 instructions that put
//! bytes and numbers side by side, 8 of arithmetic, most of them on one port: 30 cycles. Gathering
//! the values takes 64 at least, at a load or two a cycle. With values of 16 bits it is 8 look-ups,
//! 3 instructions that put bytes where they belong, 9 that make words numbers and 8 of arithmetic,
//! on two ports: 14 cycles.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::Avx512;
use super::backend::{Kind, each_vector};
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
use super::vector::{ByteMap, Vector, map_2};
use crate::layout::NESTED_BLOCK_SIZE;
use crate::{Backend, Codebook};

/// Codes at a time: two groups.
const STRIDE: usize = 64;

/// The values in 16 bits, by bytes.
#[cfg(target_arch = "x86_64")]
#[repr(align(64))]
struct WordMap {
    high: [u8; 256],
    low: [u8; 256],
}

#[cfg(target_arch = "x86_64")]
impl WordMap {
    /// What the value 1.0 is.
    const UNIT: f32 = i16::MAX as f32;

    fn new(values: &[f32; 256]) -> Self {
        let words = values.map(|value| (value * Self::UNIT).round() as i16);
        Self {
            high: words.map(|word| word.to_le_bytes()[1]),
            low: words.map(|word| word.to_le_bytes()[0]),
        }
    }
}

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
        Self {
            backend,
            by_bytes: backend.has_byte_lookups(),
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

impl ScaleDecoder {
    /// [`Self::decode`], and off by 2^-16 of the nested scale at most where that is faster.
    pub(crate) fn decode_nearly(
        &self,
        codes: &[u8],
        nested: &[f32],
        offset: f32,
        scales: &mut [f32],
    ) {
        #[cfg(target_arch = "x86_64")]
        if self.by_bytes {
            static MAP: OnceLock<WordMap> = OnceLock::new();
            let words = MAP.get_or_init(|| WordMap::new(Codebook::dynamic_signed().values()));
            // SAFETY: as for `decode`.
            unsafe { avx512_words(words, self.map, codes, nested, offset, scales) };
            return;
        }
        self.decode(codes, nested, offset, scales);
    }
}

/// Which of 64 codes is at each place, so that words of 16 scales in order come to lie in one half
/// of 32 bits each.
#[cfg(target_arch = "x86_64")]
const WORDS_IN_HALVES: [u8; 64] = {
    let mut order = [0; 64];
    let mut place = 0;
    while place < 64 {
        let (lane, within) = (place / 16, place % 16);
        order[place] = (within / 8 * 32 + within % 2 * 16 + lane * 4 + within % 8 / 2) as u8;
        place += 1;
    }
    order
};

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn avx512_words(
    words: &WordMap,
    map: &ByteMap,
    codes: &[u8],
    nested: &[f32],
    offset: f32,
    scales: &mut [f32],
) {
    // SAFETY: 64 bytes are read of arrays and strides that have them.
    let read = |bytes: &[u8]| unsafe { _mm512_loadu_si512(bytes[..64].as_ptr().cast()) };
    let quarters = |bytes: &[u8; 256]| {
        let [a, b, c, d] = [0, 64, 128, 192].map(|first| &bytes[first..]);
        [read(a), read(b), read(c), read(d)]
    };
    let (high, low) = (quarters(&words.high), quarters(&words.low));
    let order = read(&WORDS_IN_HALVES);
    let offsets = _mm512_set1_ps(offset);
    let block = NESTED_BLOCK_SIZE.get();
    let blocks = scales.chunks_mut(block).zip(codes.chunks(block));
    for ((scales, codes), &nested) in blocks.zip(nested) {
        let length = scales.len().min(codes.len());
        let mut strides = scales[..length].chunks_exact_mut(STRIDE);
        let mut codes = codes[..length].chunks_exact(STRIDE);
        let unit = _mm512_set1_ps(nested / WordMap::UNIT);
        for (scales, codes) in (&mut strides).zip(&mut codes) {
            let codes = _mm512_permutexvar_epi8(order, read(codes));
            let upper = _mm512_movepi8_mask(codes);
            let odd = _mm512_movepi8_mask(_mm512_add_epi8(codes, codes));
            let among = |quarters: [__m512i; 4]| {
                let found = _mm512_permutexvar_epi8(codes, quarters[0]);
                let found = _mm512_mask_permutexvar_epi8(found, !upper & odd, codes, quarters[1]);
                let found = _mm512_mask_permutexvar_epi8(found, upper & !odd, codes, quarters[2]);
                _mm512_mask_permutexvar_epi8(found, upper & odd, codes, quarters[3])
            };
            let (high, low) = (among(high), among(low));
            let pairs = [
                _mm512_unpacklo_epi8(low, high),
                _mm512_unpackhi_epi8(low, high),
            ];
            for (pair, scales) in pairs.into_iter().zip(scales.as_chunks_mut::<32>().0) {
                let first = _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(pair));
                let second = _mm512_srai_epi32::<16>(pair);
                for (words, scales) in [first, second]
                    .into_iter()
                    .zip(scales.as_chunks_mut::<16>().0)
                {
                    let number = _mm512_fmadd_ps(_mm512_cvtepi32_ps(words), unit, offsets);
                    // SAFETY: there are sixteen.
                    unsafe { _mm512_storeu_ps(scales.as_mut_ptr(), number) };
                }
            }
        }
        let rest = strides.into_remainder();
        decode_singly(map, codes.remainder(), nested, offset, rest);
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
each_vector!(version);

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
                decoder.decode_nearly(&codes, &nested, 0.11, &mut scales);
                for ((index, &near), scale) in scales.iter().enumerate().zip(&expected) {
                    let allowed = nested[index / 256] / 65536.0 + scale.abs() * f32::EPSILON;
                    assert!((near - scale).abs() <= allowed, "{near} for {scale}");
                }
                decoder.by_bytes = false;
                decoder.decode(&codes, &nested, 0.11, &mut scales);
                assert_eq!(scales, expected, "{backend:?}, {length} scales, gathered");
            }
        }
    }
}
