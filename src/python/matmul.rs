//! Products with packed weights for Python.

use std::borrow::Cow;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::errors::to_python;
use super::quantize::{Codebook, choose_backend};
use super::tensor::{Tensor, with_float};
use super::threads::detached_team;
use crate::BlockSize;
use crate::element::Dtype;
use crate::matmul::{self, PackedMatrix, Scales};

/// A weight's tensors, as `fourbit.Linear4bit` has them: all of them uint8.
struct Weight<'py> {
    packed: Tensor<'py>,
    absmax: Tensor<'py>,
    nested: Option<Tensor<'py>>,
    offset: Option<Tensor<'py>>,
}

/// The constants of a weight: borrowed, but for those whose bytes are not aligned.
struct Constants<'a> {
    plain: Cow<'a, [f32]>,
    nested: Cow<'a, [f32]>,
    offset: Option<f32>,
}

impl Weight<'_> {
    fn constants(&self) -> PyResult<Constants<'_>> {
        let mut constants = Constants {
            plain: Cow::default(),
            nested: Cow::default(),
            offset: None,
        };
        match (&self.nested, &self.offset) {
            (None, _) => constants.plain = self.absmax.floats()?,
            (Some(nested), Some(offset)) => {
                constants.nested = nested.floats()?;
                constants.offset = offset.floats()?.first().copied();
                if constants.offset.is_none() {
                    return Err(PyValueError::new_err("nested_offset is empty"));
                }
            }
            (Some(_), None) => {
                let message = "nested_absmax is given without nested_offset";
                return Err(PyValueError::new_err(message));
            }
        }
        Ok(constants)
    }

    fn matrix<'a>(
        &'a self,
        constants: &'a Constants<'_>,
        codebook: &'a Codebook,
        block_size: u64,
        shape: [usize; 2],
    ) -> PyResult<PackedMatrix<'a>> {
        let block_size = BlockSize::new(block_size).map_err(|error| to_python(&error))?;
        let scales = match constants.offset {
            None => Scales::Plain(&constants.plain),
            Some(offset) => Scales::Double {
                codes: self.absmax.slice()?,
                nested_absmax: &constants.nested,
                offset,
            },
        };
        PackedMatrix::new(self.packed.slice()?, scales, &codebook.0, block_size, shape)
            .map_err(|error| to_python(&error))
    }
}

/// `x W^T + bias` into `output`, for a few rows of `x`; `x`, `bias` and `output` are of one dtype
/// (float32, float16 or bfloat16). The weight's parts are uint8, as `fourbit.Linear4bit` has them.
#[pyfunction]
#[pyo3(signature = (
    x, packed, absmax, nested_absmax, nested_offset, codebook, block_size, shape, bias, output,
    *, threads, backend=None
))]
pub(super) fn linear(
    py: Python<'_>,
    x: Tensor<'_>,
    packed: Tensor<'_>,
    absmax: Tensor<'_>,
    nested_absmax: Option<Tensor<'_>>,
    nested_offset: Option<Tensor<'_>>,
    codebook: &Codebook,
    block_size: u64,
    shape: [usize; 2],
    bias: Option<Tensor<'_>>,
    mut output: Tensor<'_>,
    threads: usize,
    backend: Option<&str>,
) -> PyResult<()> {
    let backend = choose_backend(backend)?;
    let weight = Weight {
        packed,
        absmax,
        nested: nested_absmax,
        offset: nested_offset,
    };
    let constants = weight.constants()?;
    let matrix = weight.matrix(&constants, codebook, block_size, shape)?;
    with_float!(x.float_dtype()?, T => {
        let x = x.slice::<T>()?;
        let bias = bias.as_ref().map(Tensor::slice::<T>).transpose()?;
        let output = output.slice_mut::<T>()?;
        let rows = output.len() / shape[0].max(1);
        let work = || matmul::multiply_with(backend, x, &matrix, bias, output);
        detached_team(py, threads, matmul::is_small(rows, &matrix), work)
    })
}

/// `y W` into `output`, for a few rows of `y`: the backward pass of [`linear`]. `y` and `output`
/// are of one dtype.
#[pyfunction]
#[pyo3(signature = (
    y, packed, absmax, nested_absmax, nested_offset, codebook, block_size, shape, output,
    *, threads, backend=None
))]
pub(super) fn linear_transposed(
    py: Python<'_>,
    y: Tensor<'_>,
    packed: Tensor<'_>,
    absmax: Tensor<'_>,
    nested_absmax: Option<Tensor<'_>>,
    nested_offset: Option<Tensor<'_>>,
    codebook: &Codebook,
    block_size: u64,
    shape: [usize; 2],
    mut output: Tensor<'_>,
    threads: usize,
    backend: Option<&str>,
) -> PyResult<()> {
    let backend = choose_backend(backend)?;
    let weight = Weight {
        packed,
        absmax,
        nested: nested_absmax,
        offset: nested_offset,
    };
    let constants = weight.constants()?;
    let matrix = weight.matrix(&constants, codebook, block_size, shape)?;
    with_float!(y.float_dtype()?, T => {
        let y = y.slice::<T>()?;
        let output = output.slice_mut::<T>()?;
        let rows = output.len() / shape[1].max(1);
        let work = || matmul::multiply_transposed_with(backend, y, &matrix, output);
        detached_team(py, threads, matmul::is_small(rows, &matrix), work)
    })
}

/// Up to how many rows of a dtype (float32, float16 or bfloat16) [`linear`] is faster than decoding
/// such a weight for a product of dense matrices; 0 where there is only plain code.
#[pyfunction]
#[pyo3(signature = (dtype, code_bits, block_size, in_features, *, backend=None))]
pub(super) fn fused_rows(
    dtype: &str,
    code_bits: u32,
    block_size: u64,
    in_features: usize,
    backend: Option<&str>,
) -> PyResult<usize> {
    let backend = choose_backend(backend)?;
    let size = BlockSize::new(block_size).map_err(|error| to_python(&error))?;
    let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16]
        .into_iter()
        .find(|known| known.torch_name() == dtype)
        .ok_or_else(|| PyValueError::new_err(format!("{dtype} is no dtype of products")))?;
    with_float!(dtype, T => {
        Ok(matmul::fused_rows::<T>(backend, code_bits, size, in_features))
    })
}
