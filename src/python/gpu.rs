//! The register of CUDA kernels for Python: what every build has.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyFloat;

use super::errors::to_python;
use super::quantize::Codebook;
use crate::element::Dtype;
use crate::gpu::kernel::{Card, File, Value};
use crate::gpu::kernels::{self, FILES};
use crate::gpu::matvec;
use crate::gpu::products::{self, Product, Shape};
use crate::gpu::source::{Specialisation, translation_unit};
use crate::{BlockSize, Error, codebook};

/// The kernel files of `cuda/`, by name, each with the dtypes it can be compiled for and the
/// oldest architecture of each (as 10 major + minor), the widths of codes, and its kernels, each
/// with its oldest architecture and its parameters.
#[pyfunction]
#[allow(clippy::type_complexity)] // told in full in the stub
pub(super) fn kernel_register() -> Vec<(
    &'static str,
    Vec<(&'static str, u32)>,
    Vec<u32>,
    Vec<(&'static str, u32, Vec<&'static str>)>,
)> {
    let describe = |file: &File| {
        let dtypes = file
            .dtypes
            .iter()
            .map(|(dtype, oldest)| (dtype.torch_name(), *oldest));
        let kernels = file.kernels.iter().map(|kernel| {
            let parameters = kernel.parameters.iter().map(|parameter| parameter.name);
            (kernel.name, kernel.oldest, parameters.collect())
        });
        let code_bits = file.code_bits.to_vec();
        (file.name, dtypes.collect(), code_bits, kernels.collect())
    };
    FILES.iter().map(describe).collect()
}

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
    Ok(translation_unit(file(kernel)?, &specialisation))
}

/// How a kernel is launched with these arguments on a card of that capability (10 major + minor)
/// with so many multiprocessors: blocks, threads of a block, bytes of dynamic shared memory; None
/// where there is nothing to do.
#[pyfunction]
#[pyo3(signature = (
    file_name, kernel, arguments, *, capability, processors, dtype, block_size=64, codebook=None,
    double_quant=false
))]
pub(super) fn kernel_geometry(
    file_name: &str,
    kernel: &str,
    arguments: Vec<Bound<'_, PyAny>>,
    capability: u32,
    processors: u32,
    dtype: &str,
    block_size: u64,
    codebook: Option<&Codebook>,
    double_quant: bool,
) -> PyResult<Option<([u32; 3], u32, u32)>> {
    let card = Card {
        capability,
        processors,
    };
    let specialisation = specialisation(dtype, block_size, codebook, double_quant)?;
    let values = values(&arguments)?;
    let geometry = file(file_name)?
        .kernel(kernel)
        .and_then(|kernel| kernel.geometry(&kernel.arguments(&values)?, &specialisation, &card))
        .map_err(|error| to_python(&error.into()))?;
    Ok(geometry.map(|geometry| (geometry.grid, geometry.block, geometry.dynamic_bytes)))
}

/// How the sums of a tensor-core product, "matmul" or "matmul_transposed", are best cut: parts,
/// tiles of the result (counters that are needed), and float32 numbers of workspace.
#[pyfunction]
#[pyo3(signature = (
    file_name, *, rows, tile_rows, columns, depth, block_size, capability, processors
))]
#[allow(clippy::too_many_arguments)] // named by the caller
pub(super) fn product_cut(
    file_name: &str,
    rows: u64,
    tile_rows: u32,
    columns: u64,
    depth: u64,
    block_size: u64,
    capability: u32,
    processors: u32,
) -> PyResult<(u32, u64, u64)> {
    let product = match file(file_name)?.name {
        "matmul" => Product::Matmul,
        "matmul_transposed" => Product::Transposed,
        other => {
            let message = format!("the sums of {other:?} are not cut");
            return Err(PyValueError::new_err(message));
        }
    };
    if !products::TILE_ROWS.contains(&tile_rows) {
        let message = format!(
            "tile_rows is {tile_rows}; use one of {:?}",
            products::TILE_ROWS
        );
        return Err(PyValueError::new_err(message));
    }
    let shape = Shape {
        rows,
        tile_rows,
        columns,
        depth,
    };
    let card = Card {
        capability,
        processors,
    };
    let block_size = BlockSize::new(block_size).map_err(|error| to_python(&error))?;
    let cut = products::cut(product, &shape, block_size, &card);
    Ok((cut.splits, cut.tiles, cut.partial))
}

/// Whether `fourbit_matvec_tensor_<rows>` takes such a weight on such a card.
#[pyfunction]
#[pyo3(signature = (*, rows, columns, depth, block_size, capability))]
pub(super) fn matvec_tensor_takes(
    rows: u64,
    columns: u64,
    depth: u64,
    block_size: u64,
    capability: u32,
) -> bool {
    matvec::matvec_tensor_takes(rows, columns, depth, block_size, capability)
}

/// Raises the error of a tensor whose element of that index is not finite.
#[pyfunction]
pub(super) fn raise_non_finite(index: u64, value: f32) -> PyResult<()> {
    Err(to_python(&Error::NonFinite { index, value }))
}

/// Raises the error of scales that 8 bits would round to infinity.
#[pyfunction]
pub(super) fn raise_scale_overflow() -> PyResult<()> {
    Err(to_python(&Error::ScaleOverflow))
}

pub(super) fn file(name: &str) -> PyResult<&'static File> {
    kernels::file(name).map_err(|error| to_python(&error.into()))
}

pub(super) fn dtype_by_name(name: &str) -> PyResult<Dtype> {
    [Dtype::F32, Dtype::F16, Dtype::Bf16]
        .into_iter()
        .find(|known| known.torch_name() == name)
        .ok_or_else(|| {
            PyTypeError::new_err(format!(
                "dtype is {name:?}; use float32, float16 or bfloat16"
            ))
        })
}

pub(super) fn specialisation(
    dtype: &str,
    block_size: u64,
    codebook: Option<&Codebook>,
    double_quant: bool,
) -> PyResult<Specialisation> {
    Ok(Specialisation {
        dtype: dtype_by_name(dtype)?,
        block_size: BlockSize::new(block_size).map_err(|error| to_python(&error))?,
        codebook: codebook.map_or_else(|| codebook::Codebook::nf4().clone(), |book| book.0.clone()),
        double_quant,
    })
}

pub(super) fn values(arguments: &[Bound<'_, PyAny>]) -> PyResult<Vec<Value>> {
    let value = |argument: &Bound<'_, PyAny>| {
        if argument.is_instance_of::<PyFloat>() {
            argument.extract().map(Value::Float)
        } else {
            argument
                .extract::<i64>()
                .map(|number| Value::Integer(number.into()))
        }
    };
    arguments.iter().map(value).collect()
}
