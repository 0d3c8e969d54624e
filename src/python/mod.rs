//! The extension module `fourbit._core`: the only folder that knows Python.
//!
//! Every function does four things: extract the arguments, release the GIL, call the core,
//! convert the result. Tensors come in as torch objects, see [`tensor`].

mod checkpoint;
mod convert;
#[cfg(feature = "cuda")]
mod cuda;
mod errors;
mod gpu;
mod matmul;
#[cfg(feature = "cuda")]
mod memory;
mod openmp;
mod optimizer;
mod quantize;
mod tensor;
mod threads;

use pyo3::prelude::*;

/// The Rust core of fourbit. Private: use the `fourbit` package.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::checkpoint::{
        CheckpointReader, CheckpointWriter, add_quantization_config, quantized_layout, read_header,
        verify,
    };
    #[pymodule_export]
    use super::convert::{convert, kept_module, matched_modules, small_files};
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use super::cuda::{
        CudaProgram, build_kernel, compile_kernel, cuda_devices, cuda_driver_version, kernel_cache,
        load_nvrtc,
    };
    #[pymodule_export]
    use super::errors::{CheckpointError, CudaError, NonFiniteError};
    #[pymodule_export]
    use super::gpu::{
        kernel_geometry, kernel_register, kernel_source, matvec_tensor_takes, product_cut,
        raise_non_finite, raise_scale_overflow,
    };
    #[pymodule_export]
    use super::matmul::{fused_rows, linear, linear_transposed};
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use super::memory::{CardMemory, card_can_page, card_free_memory, card_memory_in_use};
    #[pymodule_export]
    use super::optimizer::{adamw_segments, adamw8_step, adamw32_step};
    #[pymodule_export]
    use super::quantize::{
        Codebook, dequantize, dequantize_absmax, quantize, quantize_absmax, simd_backends,
    };

    use super::*;
    use crate::convert::{DEFAULT_CHUNK_BYTES, DEFAULT_MAX_SHARD_BYTES};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        openmp::remember_process();
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("OLDEST_CAPABILITY", crate::gpu::kernel::OLDEST)?;
        module.add("ADAMW_SEGMENT_BYTES", crate::gpu::adamw::SEGMENT_BYTES)?;
        module.add("COUNTER_SLOTS", crate::gpu::products::COUNTER_SLOTS)?;
        module.add("SLOT_COUNTERS", crate::gpu::products::SLOT_COUNTERS)?;
        module.add("MAX_HEADER_BYTES", crate::checkpoint::MAX_HEADER_BYTES)?;
        module.add("FORMAT_VERSION", crate::checkpoint::FORMAT_VERSION)?;
        module.add("MAX_TENSORS", crate::checkpoint::MAX_TENSORS)?;
        module.add("DEFAULT_MAX_SHARD_BYTES", DEFAULT_MAX_SHARD_BYTES)?;
        module.add("DEFAULT_CHUNK_BYTES", DEFAULT_CHUNK_BYTES)
    }
}
