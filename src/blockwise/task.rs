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
            // SAFETY: this function has the features of the vector type; the caller checked the
            // alignment that streaming asks for.
            unsafe {
                if stream {
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
/// is aligned for it and in memory: the kernel clears the pages of fresh memory by way of the
/// cache, so writing past it would then go to memory twice.
pub(super) fn dequantize_blocks<T: Element>(
    backend: Backend,
    packed: &[u8],
    absmax: &[f32],
    codebook: &Codebook,
    block_size: BlockSize,
    output: &mut [T],
    stream: bool,
) {
    let stream = stream && output.as_ptr().addr().is_multiple_of(64) && is_resident(output);
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

/// Whether the page in the middle is in memory; true where the system cannot be asked.
fn is_resident<T>(output: &[T]) -> bool {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: asks for a number.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) });
        let Ok(page) = page else {
            return true;
        };
        let middle = output.as_ptr().wrapping_add(output.len() / 2);
        let within = middle.addr() % page;
        let mut state = 0;
        // SAFETY: the page is mapped, since an element of the slice lies in it; one byte is
        // written for one page.
        let failed = unsafe {
            let start = middle.cast::<u8>().wrapping_sub(within);
            libc::mincore(start.cast_mut().cast(), 1, &raw mut state)
        };
        failed != 0 || state & 1 == 1
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = output;
        true
    }
}

/// Asks the system for large pages under memory that is not there yet, where it gives them to those
/// who ask: fresh memory costs more than what is written into it. Advice only.
pub(super) fn advise_large_pages<T>(output: &mut [T]) {
    #[cfg(target_os = "linux")]
    if !is_resident(output) {
        // SAFETY: asks for a number.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) });
        let Ok(page) = page else {
            return;
        };
        let range = output.as_mut_ptr_range();
        let skipped = range.start.addr().next_multiple_of(page) - range.start.addr();
        let bytes = size_of_val(output).saturating_sub(skipped) / page * page;
        let start = range.start.cast::<u8>().wrapping_add(skipped);
        // SAFETY: whole pages within the slice; their contents and who may use them stay as they
        // are. A system without large pages refuses, which changes nothing.
        unsafe { libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = output;
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
