//! CUDA kernels for Python.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::errors::to_python;
use super::quantize::Codebook;
use crate::element::Dtype;
use crate::gpu::source::{self, Specialisation};
use crate::{BlockSize, codebook};

/// The whole translation unit of a kernel file of `cuda/`, as it is compiled: `kernel` is the
/// file's name without ".cu"; `dtype` is "float32", "float16" or "bfloat16"; `codebook` is NF4
/// unless given.
#[pyfunction]
#[pyo3(signature = (kernel, *, dtype, block_size=64, codebook=None, double_quant=false))]
pub(super) fn kernel_source(
    kernel: &str,
    dtype: &str,
    block_size: u64,
    codebook: Option<&Codebook>,
    double_quant: bool,
) -> PyResult<String> {
    let specialisation = specialisation(dtype, block_size, codebook, double_quant)?;
    source::translation_unit(kernel, &specialisation).map_err(|error| to_python(&error))
}

/// The names of the kernel files.
#[pyfunction]
pub(super) fn kernel_files() -> Vec<&'static str> {
    source::names()
}

fn specialisation(
    dtype: &str,
    block_size: u64,
    codebook: Option<&Codebook>,
    double_quant: bool,
) -> PyResult<Specialisation> {
    let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16]
        .into_iter()
        .find(|known| known.torch_name() == dtype)
        .ok_or_else(|| {
            PyTypeError::new_err(format!(
                "dtype is {dtype:?}; use float32, float16 or bfloat16"
            ))
        })?;
    Ok(Specialisation {
        dtype,
        block_size: BlockSize::new(block_size).map_err(|error| to_python(&error))?,
        codebook: codebook.map_or_else(|| codebook::Codebook::nf4().clone(), |book| book.0.clone()),
        double_quant,
    })
}
