//! Codebooks, blockwise quantization and double quantization for Python.

use pyo3::prelude::*;

use super::errors::to_python;
use super::tensor::{Tensor, with_float};
use super::threads::detached_team;
use crate::blockwise::is_small;
use crate::codebook::Ties;
use crate::{Backend, BlockSize, blockwise, codebook, double_quant};

/// A map from codes to values in [-1, 1].
#[pyclass(frozen, module = "fourbit._core")]
pub(super) struct Codebook(pub(super) codebook::Codebook);

#[pymethods]
impl Codebook {
    /// A built-in codebook: "nf4", "fp4", "int4", "dynamic-signed" or "dynamic-unsigned".
    #[staticmethod]
    fn by_name(name: &str) -> PyResult<Self> {
        match name {
            "dynamic-signed" => Ok(Self(codebook::Codebook::dynamic_signed().clone())),
            "dynamic-unsigned" => Ok(Self(codebook::Codebook::dynamic_unsigned().clone())),
            _ => codebook::Codebook::by_name(name)
                .map(|codebook| Self(codebook.clone()))
                .map_err(|error| to_python(&error)),
        }
    }

    /// A codebook from (index, value) pairs; ties between values go to the upper one if asked.
    #[staticmethod]
    #[pyo3(signature = (name, entries, *, ties_upper))]
    fn from_entries(name: &str, entries: Vec<(u64, f32)>, ties_upper: bool) -> PyResult<Self> {
        let ties = if ties_upper { Ties::Upper } else { Ties::Lower };
        codebook::Codebook::from_map(name, &entries, ties)
            .map(Self)
            .map_err(|error| to_python(&error))
    }

    /// Its name.
    #[getter]
    fn name(&self) -> &str {
        self.0.name()
    }

    /// Bits of one packed code: 2, 4 or 8.
    #[getter]
    fn code_bits(&self) -> u32 {
        self.0.code_bits()
    }

    /// Whether a number halfway between two values takes the upper one.
    #[getter]
    fn ties_upper(&self) -> bool {
        self.0.ties() == Ties::Upper
    }

    /// The values by code, up to the last code defined; NaN for a code that is not.
    #[getter]
    fn values(&self) -> Vec<f32> {
        let values = self.0.values();
        let last = values.iter().rposition(|value| !value.is_nan());
        values[..last.map_or(0, |last| last + 1)].to_vec()
    }
}

/// Quantizes `input` (float32, float16 or bfloat16; any shape) into `packed` (uint8) and
/// `absmax` (float32). `backend` is a SIMD backend's name, or None for the fastest.
#[pyfunction]
#[pyo3(signature = (input, codebook, block_size, packed, absmax, *, threads, backend=None))]
pub(super) fn quantize(
    py: Python<'_>,
    input: Tensor<'_>,
    codebook: &Codebook,
    block_size: u64,
    mut packed: Tensor<'_>,
    mut absmax: Tensor<'_>,
    threads: usize,
    backend: Option<&str>,
) -> PyResult<()> {
    let block_size = BlockSize::new(block_size).map_err(|error| to_python(&error))?;
    let backend = choose_backend(backend)?;
    let (packed, absmax) = (packed.slice_mut()?, absmax.slice_mut()?);
    with_float!(input.float_dtype()?, T => {
        let input = input.slice::<T>()?;
        detached_team(py, threads, is_small(input.len()), || {
            blockwise::quantize_with(backend, input, &codebook.0, block_size, packed, absmax)
        })
    })
}

/// Decodes `packed` (uint8) and `absmax` (float32) into `output` (float32, float16 or bfloat16).
#[pyfunction]
#[pyo3(signature = (packed, absmax, codebook, block_size, output, *, threads, backend=None))]
pub(super) fn dequantize(
    py: Python<'_>,
    packed: Tensor<'_>,
    absmax: Tensor<'_>,
    codebook: &Codebook,
    block_size: u64,
    mut output: Tensor<'_>,
    threads: usize,
    backend: Option<&str>,
) -> PyResult<()> {
    let block_size = BlockSize::new(block_size).map_err(|error| to_python(&error))?;
    let backend = choose_backend(backend)?;
    let (packed, absmax) = (packed.slice()?, absmax.slice()?);
    with_float!(output.float_dtype()?, T => {
        let output = output.slice_mut::<T>()?;
        detached_team(py, threads, is_small(output.len()), || {
            blockwise::dequantize_with(backend, packed, absmax, &codebook.0, block_size, output)
        })
    })
}

/// Double quantization: `absmax` (float32) into `codes` (uint8) and `nested_absmax` (float32).
/// Returns the offset.
#[pyfunction]
#[pyo3(signature = (absmax, codes, nested_absmax, *, threads))]
pub(super) fn quantize_absmax(
    py: Python<'_>,
    absmax: Tensor<'_>,
    mut codes: Tensor<'_>,
    mut nested_absmax: Tensor<'_>,
    threads: usize,
) -> PyResult<f32> {
    let absmax = absmax.slice()?;
    let (codes, nested_absmax) = (codes.slice_mut()?, nested_absmax.slice_mut()?);
    detached_team(py, threads, is_small(absmax.len()), || {
        double_quant::quantize(absmax, codes, nested_absmax)
    })
}

/// The inverse of `quantize_absmax`, into `absmax` (float32).
#[pyfunction]
#[pyo3(signature = (codes, nested_absmax, offset, absmax, *, threads))]
pub(super) fn dequantize_absmax(
    py: Python<'_>,
    codes: Tensor<'_>,
    nested_absmax: Tensor<'_>,
    offset: f32,
    mut absmax: Tensor<'_>,
    threads: usize,
) -> PyResult<()> {
    let (codes, nested_absmax) = (codes.slice()?, nested_absmax.slice()?);
    let absmax = absmax.slice_mut()?;
    detached_team(py, threads, is_small(absmax.len()), || {
        double_quant::dequantize(codes, nested_absmax, offset, absmax)
    })
}

/// The names of the SIMD backends this processor can run, the fastest last.
#[pyfunction]
pub(super) fn simd_backends() -> Vec<&'static str> {
    Backend::available()
        .into_iter()
        .map(Backend::name)
        .collect()
}

pub(super) fn choose_backend(name: Option<&str>) -> PyResult<Backend> {
    match name {
        Some(name) => Backend::by_name(name),
        None => Backend::detect(),
    }
    .map_err(|error| to_python(&error))
}
