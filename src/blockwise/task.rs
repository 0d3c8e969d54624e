//! From a backend to its code: the only place that calls functions of a target feature.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::backend::{Backend, Kind};
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::scalar;
use super::search::Search;
use crate::{BlockSize, Codebook, Element};

/// Instantiates the generic code for one vector type.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! entry_points {
    ($vector:ident, $features:literal) => {
        #[target_feature(enable = $features)]
        pub(super) fn quantize_blocks<T: Element>(
            input: &[T],
            codebook: &$crate::Codebook,
            search: &super::search::Search,
            block_size: $crate::BlockSize,
            packed: &mut [u8],
            absmax: &mut [f32],
        ) -> Option<usize> {
            // SAFETY: this function has the features of the vector type.
            unsafe {
                super::generic::quantize_blocks::<$vector, T>(
                    input, codebook, search, block_size, packed, absmax,
                )
            }
        }

        #[target_feature(enable = $features)]
        pub(super) fn dequantize_blocks<T: Element>(
            packed: &[u8],
            absmax: &[f32],
            codebook: &$crate::Codebook,
            block_size: $crate::BlockSize,
            output: &mut [T],
            stream: bool,
        ) {
            // SAFETY: this function has the features of the vector type, and checks the alignment
            // that streaming asks for.
            unsafe {
                if stream && output.as_ptr().addr() % 64 == 0 {
                    super::generic::dequantize_blocks::<$vector, T, true>(
                        packed, absmax, codebook, block_size, output,
                    );
                    <$vector as super::vector::Vector>::fence();
                } else {
                    super::generic::dequantize_blocks::<$vector, T, false>(
                        packed, absmax, codebook, block_size, output,
                    );
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(super) fn convert<S: Element, D: Element>(source: &[S], target: &mut [D]) {
            // SAFETY: this function has the features of the vector type.
            unsafe { super::generic::convert::<$vector, S, D>(source, target) }
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use entry_points;

/// As [`scalar::quantize_blocks`], on `backend`.
pub(super) fn quantize_blocks<T: Element>(
    backend: Backend,
    input: &[T],
    codebook: &Codebook,
    search: &Search,
    block_size: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Option<usize> {
    // SAFETY: a `Backend` exists only where the processor has its features.
    unsafe {
        match backend.kind() {
            Kind::Scalar => scalar::quantize_blocks(input, codebook, block_size, packed, absmax),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => {
                avx2::quantize_blocks(input, codebook, search, block_size, packed, absmax)
            }
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => {
                avx512::quantize_blocks(input, codebook, search, block_size, packed, absmax)
            }
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => {
                neon::quantize_blocks(input, codebook, search, block_size, packed, absmax)
            }
        }
    }
}

/// As [`scalar::dequantize_blocks`], on `backend`. With `stream`, past the cache where `output`
/// is aligned for it.
pub(super) fn dequantize_blocks<T: Element>(
    backend: Backend,
    packed: &[u8],
    absmax: &[f32],
    codebook: &Codebook,
    block_size: BlockSize,
    output: &mut [T],
    stream: bool,
) {
    // SAFETY: a `Backend` exists only where the processor has its features.
    unsafe {
        match backend.kind() {
            Kind::Scalar => scalar::dequantize_blocks(packed, absmax, codebook, block_size, output),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => {
                avx2::dequantize_blocks(packed, absmax, codebook, block_size, output, stream);
            }
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => {
                avx512::dequantize_blocks(packed, absmax, codebook, block_size, output, stream);
            }
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => {
                neon::dequantize_blocks(packed, absmax, codebook, block_size, output, stream);
            }
        }
    }
}

/// As [`scalar::convert`], on `backend`. Both slices are of one length.
pub(super) fn convert<S: Element, D: Element>(backend: Backend, source: &[S], target: &mut [D]) {
    // SAFETY: a `Backend` exists only where the processor has its features.
    unsafe {
        match backend.kind() {
            Kind::Scalar => scalar::convert(source, target),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => avx2::convert(source, target),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => avx512::convert(source, target),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => neon::convert(source, target),
        }
    }
}
