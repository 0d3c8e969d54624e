//! Compiling and launching CUDA kernels for Python.
#![allow(unsafe_code)]

use std::path::PathBuf;
use std::sync::OnceLock;

use pyo3::exceptions::{PyRuntimeError, PyRuntimeWarning};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::errors::to_python;
use super::gpu::{file, specialisation, values};
use super::quantize::Codebook;
use crate::gpu::cache::Cache;
use crate::gpu::driver::driver;
use crate::gpu::launch::{self, Program};
use crate::gpu::nvrtc::Compiler;

/// The one compiler of this process.
static COMPILER: OnceLock<Compiler> = OnceLock::new();

/// Opens NVRTC and returns its path and version. It stays the compiler of this process: later calls
/// return what the first one opened.
#[pyfunction]
pub(super) fn load_nvrtc(py: Python<'_>, path: PathBuf) -> PyResult<(PathBuf, (u32, u32))> {
    let compiler = py.detach(|| match COMPILER.get() {
        Some(compiler) => Ok(compiler),
        None => Compiler::open(&path).map(|opened| COMPILER.get_or_init(|| opened)),
    });
    let compiler = compiler.map_err(|error| to_python(&error.into()))?;
    Ok((compiler.path().to_path_buf(), compiler.version()))
}

fn compiler() -> PyResult<&'static Compiler> {
    COMPILER
        .get()
        .ok_or_else(|| PyRuntimeError::new_err("load_nvrtc must be called first"))
}

/// Compiles a kernel file for an architecture (10 major + minor), whatever the cache holds.
/// Returns the machine code and the compiler's log, with the registers and spills of each kernel.
#[pyfunction]
#[pyo3(signature = (kernel, *, capability, dtype, block_size=64, codebook=None, double_quant=false))]
pub(super) fn compile_kernel<'py>(
    py: Python<'py>,
    kernel: &str,
    capability: u32,
    dtype: &str,
    block_size: u64,
    codebook: Option<&Codebook>,
    double_quant: bool,
) -> PyResult<(Bound<'py, PyBytes>, String)> {
    let specialisation = specialisation(dtype, block_size, codebook, double_quant)?;
    let (compiler, file) = (compiler()?, file(kernel)?);
    let compiled = py
        .detach(|| launch::compile(compiler, file, &specialisation, capability))
        .map_err(|error| to_python(&error.into()))?;
    Ok((PyBytes::new(py, &compiled.image), compiled.log))
}

/// As `compile_kernel`, through the cache. Returns the machine code and whether the cache had it.
#[pyfunction]
#[pyo3(signature = (kernel, *, capability, dtype, block_size=64, codebook=None, double_quant=false))]
pub(super) fn build_kernel<'py>(
    py: Python<'py>,
    kernel: &str,
    capability: u32,
    dtype: &str,
    block_size: u64,
    codebook: Option<&Codebook>,
    double_quant: bool,
) -> PyResult<(Bound<'py, PyBytes>, bool)> {
    let specialisation = specialisation(dtype, block_size, codebook, double_quant)?;
    let (compiler, file) = (compiler()?, file(kernel)?);
    let built = py
        .detach(|| {
            launch::build(
                compiler,
                cache().as_ref(),
                file,
                &specialisation,
                capability,
            )
        })
        .map_err(|error| to_python(&error.into()))?;
    warn_not_kept(py, built.not_kept.as_ref())?;
    Ok((PyBytes::new(py, &built.image), built.cached))
}

/// The cache's folder, its entries and their bytes. None where no folder is known.
#[pyfunction]
pub(super) fn kernel_cache(py: Python<'_>) -> PyResult<Option<(PathBuf, u64, u64)>> {
    let Some(cache) = cache() else {
        return Ok(None);
    };
    let contents = py.detach(|| cache.contents());
    let (entries, bytes) = contents.map_err(|error| to_python(&error))?;
    Ok(Some((cache.folder().to_path_buf(), entries, bytes)))
}

fn cache() -> Option<Cache> {
    Cache::default_folder().map(Cache::new)
}

fn warn_not_kept(py: Python<'_>, error: Option<&crate::Error>) -> PyResult<()> {
    let Some(error) = error else {
        return Ok(());
    };
    let message = format!(
        "a compiled CUDA kernel cannot be kept, so each process will compile it again: {error}; \
         set FOURBIT_CACHE_DIR to a folder that can be written\0"
    );
    let message = std::ffi::CStr::from_bytes_until_nul(message.as_bytes()).unwrap_or(c"");
    PyErr::warn(py, &py.get_type::<PyRuntimeWarning>(), message, 1)
}

/// The newest CUDA that the driver can run.
#[pyfunction]
pub(super) fn cuda_driver_version(py: Python<'_>) -> PyResult<(u32, u32)> {
    py.detach(|| driver()?.version())
        .map_err(|error| to_python(&error.into()))
}

/// The cards that this process may see: name, bytes of memory, compute capability (10 major +
/// minor), multiprocessors.
#[pyfunction]
pub(super) fn cuda_devices(py: Python<'_>) -> PyResult<Vec<(String, u64, u32, u32)>> {
    let devices = py
        .detach(|| driver()?.devices())
        .map_err(|error| to_python(&error.into()))?;
    let describe = |device: crate::gpu::driver::Device| {
        let card = device.card;
        (device.name, device.memory, card.capability, card.processors)
    };
    Ok(devices.into_iter().map(describe).collect())
}

/// A kernel file, specialised and loaded on a card.
#[pyclass(frozen, module = "fourbit._core")]
pub(super) struct CudaProgram(Program);

#[pymethods]
impl CudaProgram {
    /// Compiles the file, or takes it from the cache, and loads it on the card of that number.
    #[new]
    #[pyo3(signature = (
        kernel, *, device, dtype, block_size=64, codebook=None, double_quant=false
    ))]
    fn new(
        py: Python<'_>,
        kernel: &str,
        device: u32,
        dtype: &str,
        block_size: u64,
        codebook: Option<&Codebook>,
        double_quant: bool,
    ) -> PyResult<Self> {
        let specialisation = specialisation(dtype, block_size, codebook, double_quant)?;
        let (compiler, file) = (compiler()?, file(kernel)?);
        let (program, not_kept) = py
            .detach(|| Program::load(compiler, cache().as_ref(), file, specialisation, device))
            .map_err(|error| to_python(&error.into()))?;
        warn_not_kept(py, not_kept.as_ref())?;
        Ok(Self(program))
    }

    /// The card's compute capability, as 10 major + minor.
    #[getter]
    fn capability(&self) -> u32 {
        self.0.card().capability
    }

    /// The card's multiprocessors.
    #[getter]
    fn processors(&self) -> u32 {
        self.0.card().processors
    }

    /// Puts a launch of a kernel into a stream, given as torch's `cuda_stream`. Arguments are
    /// addresses (0 for none), counts and floats, in the kernel's order.
    fn launch(
        &self,
        py: Python<'_>,
        kernel: &str,
        stream: usize,
        arguments: Vec<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let values = values(&arguments)?;
        // SAFETY: the private Python layer, the only caller, passes addresses of tensors on this
        // card whose dtype, size, contiguity and alignment it has checked, and the card's current
        // stream; torch keeps their memory for that stream until the launch is over.
        py.detach(|| unsafe { self.0.launch(kernel, stream, &values) })
            .map_err(|error| to_python(&error.into()))
    }
}
