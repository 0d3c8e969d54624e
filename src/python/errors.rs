//! The one place where [`crate::Error`] becomes a Python exception.

use pyo3::create_exception;
use pyo3::exceptions::{
    PyBlockingIOError, PyFileExistsError, PyKeyboardInterrupt, PyOSError, PyRuntimeError,
    PyValueError,
};
use pyo3::prelude::*;

use crate::Error;
use crate::error::DestinationProblem;
use crate::gpu::GpuProblem;

/// `errno.ENOSPC`, the same on Linux, macOS and Windows.
const ENOSPC: i32 = 28;

create_exception!(
    fourbit,
    NonFiniteError,
    PyValueError,
    "A weight to be quantized is NaN or infinite; the message names the element."
);
create_exception!(
    fourbit,
    CheckpointError,
    PyValueError,
    "A checkpoint folder or file is damaged, incomplete or of an unknown format."
);

create_exception!(
    fourbit,
    CudaError,
    PyRuntimeError,
    "A CUDA kernel could not be compiled, loaded or launched, or memory for a card could not be had; \
     the message names it and says why."
);

/// The Python exception of an error: a class that callers already catch, the whole sentence.
pub(super) fn to_python(error: &Error) -> PyErr {
    let message = error.to_string();
    match error.root() {
        Error::NonFinite { .. } => NonFiniteError::new_err(message),
        Error::Io(source) => os_error(source, message),
        Error::Checkpoint(_) => CheckpointError::new_err(message),
        // Values that are wrong in a file, not in a call.
        Error::Overflow { .. } | Error::BlockSize { .. } | Error::Codebook { .. }
            if matches!(error, Error::File { .. }) =>
        {
            CheckpointError::new_err(message)
        }
        Error::Destination(DestinationProblem::SameAsSource) => PyValueError::new_err(message),
        Error::Destination(DestinationProblem::Locked) => PyBlockingIOError::new_err(message),
        Error::Destination(_) => PyFileExistsError::new_err(message),
        Error::NoSpace { .. } => PyOSError::new_err((ENOSPC, message)),
        Error::Gpu(
            GpuProblem::UnknownKernel { .. }
            | GpuProblem::Arguments { .. }
            | GpuProblem::EmptyMemory { .. }
            | GpuProblem::MemoryRange { .. },
        ) => PyValueError::new_err(message),
        Error::Gpu(_) => CudaError::new_err(message),
        Error::Interrupted => PyKeyboardInterrupt::new_err(message),
        _ => PyValueError::new_err(message),
    }
}

/// `FileNotFoundError`, `PermissionError` and so on: Python picks the subclass by `errno`.
fn os_error(source: &std::io::Error, message: String) -> PyErr {
    match source.raw_os_error() {
        Some(errno) => PyOSError::new_err((errno, message)),
        None => PyOSError::new_err(message),
    }
}
